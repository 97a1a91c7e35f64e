"""`lmcache status`: one screen about a running server: whether it serves, what it holds, whether it helps, and what is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ServerUnavailable
from lmcache.observability.log import printable
from lmcache.wire.http_client import ask

_TEXT = """
Show on one screen whether a server serves, what it holds, whether it helps, which engines are connected, and what is wrong.
`lmcache describe status` shows everything. From another host than the server's this needs the server's token.

examples:
  lmcache status
  lmcache status --url http://10.0.0.7:8080 --api-token-file token.txt
"""
_MOST_ROWS = 8
"""Engines and tiers that are listed; the rest is only counted, so that the output fits a screen."""


def add_verb(verbs: Verbs) -> None:
    """Add `status` to the command line."""
    parser = add(verbs, "status", run, "show a running server on one screen", _TEXT)
    add_url(parser)
    add_token(parser)
    parser.add_argument("--json", action="store_true", help="Print /status as JSON instead.")


def run(arguments: argparse.Namespace) -> int:
    """Print the state of the server. The exit code is 1 if it is unhealthy."""
    token = token_of(arguments)
    code, status = ask(arguments.url, "/status", token=token)
    if code != 200:
        raise ServerUnavailable(f"{arguments.url}: {status.get('reason', f'HTTP {code}')}")
    _, health = ask(arguments.url, "/healthcheck", token=token)
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:  # whoever answers at the URL may have sent control characters, which a terminal would obey
        print("\n".join(printable(line) for line in screen(arguments.url, status, health)))
    return 0 if health.get("status") == "healthy" else 1


def screen(url: str, status: Mapping[str, Any], health: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines. status, health: what /status and /healthcheck have answered."""
    counters, arena, index = status["counters"], status["arena"], status["index"]
    state = f"{health.get('status')}{': ' + str(health['reason']) if health.get('reason') else ''}"
    yield f"server    {url} is {state}; version {status['version']}, up {_duration(status['uptime_seconds'])}"
    used, total = arena["used_bytes"], arena["bytes"]
    yield (
        f"L1        {_size(used)} of {_size(total)} used ({used / total:.0%}), {index['chunks']} chunks of "
        f"{status['chunk_size']} tokens; {counters['evicted_chunks_total']:.0f} evicted so far"
    )
    hits, misses = counters["hit_chunks_total"], counters["missed_chunks_total"]
    ratio = f"{hits / (hits + misses):.0%} of the chunks asked for" if hits + misses else "nothing asked for yet"
    yield f"hits      {ratio} ({hits:.0f} found, {misses:.0f} not)"
    yield (
        f"tokens    {counters['retrieved_tokens_total']:.0f} loaded by engines, {counters['stored_tokens_total']:.0f} stored"
    )
    yield from _listed("engines", [_engine(one) for one in status["engines"]], "no engine process is connected")
    yield from _listed("tiers", [_tier(one) for one in status["tiers"]], "none")
    yield from _listed("trouble", list(_trouble(counters, health)), "none")


def _listed(title: str, rows: list[str], none: str) -> Iterator[str]:
    for number, row in enumerate(rows[:_MOST_ROWS] or [none]):
        yield f"{title if not number else '':<10}{row}"
    if len(rows) > _MOST_ROWS:
        yield f"{'':<10}and {len(rows) - _MOST_ROWS} more"


def _engine(one: Mapping[str, Any]) -> str:
    how = "payload frames" if one["payload_frames"] else "the mapped arena"
    who = f"{one['instance']}: {one['role']}, rank {one['rank']}, pid {one['pid']}"
    return f"{who}, {how}, for {_duration(one['connected_seconds'])}"


def _tier(one: Mapping[str, Any]) -> str:
    most = f" of {_size(one['max_bytes'])}" if one["max_bytes"] else ""
    stored = "size unknown" if one["stored_bytes"] is None else f"{_size(one['stored_bytes'])}{most}"
    queued = f", {_size(one['queued_bytes'])} to be written" if one["queued_bytes"] else ""
    reason = f" ({one['reason']})" if one["reason"] else ""
    return f"{one['name']}: {one['state']}{reason}, {stored}{queued}"


def _trouble(counters: Mapping[str, float], health: Mapping[str, Any]) -> Iterator[str]:
    yield from (str(one) for one in (*health.get("degraded", ()), *health.get("refused_engines", ())))
    for name, what in (
        ("failed_loads_total", "loads failed; the engines computed these tokens"),
        ("failed_stores_total", "stores failed"),
        ("refused_chunks_total", "shards were not stored, for want of memory or of a free claim"),
        ("internal_errors_total", "unexpected exceptions; the log has their tracebacks"),
        ("loop_errors_total", "exceptions in the main loop; the log has their tracebacks"),
    ):
        if counters.get(name):
            yield f"{counters[name]:.0f} {what}"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
