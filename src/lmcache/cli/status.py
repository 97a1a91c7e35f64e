"""`lmcache status`: one screen about a running server: whether it serves, what it holds, whether it helps, and what is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache.cli.told import Told, lacking
from lmcache.cli.verbs import Verbs, add, add_token, add_url, size_text, token_of
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
    told, condition = Told(status), Told(health)
    counters, arena, index = told.part("counters"), told.part("arena"), told.part("index")
    state = condition.text("status") + (f": {condition.text('reason')}" if condition.given("reason") else "")
    yield f"server    {url} is {state}; version {told.text('version')}, up {_duration(told.number('uptime_seconds'))}"
    used, total = arena.number("used_bytes"), arena.number("bytes")
    yield (
        f"L1        {size_text(used)} of {size_text(total)} used ({used / max(1.0, total):.0%}), {index.text('chunks')} chunks "
        f"of {told.text('chunk_size')} tokens; {counters.number('evicted_chunks_total'):.0f} evicted so far"
    )
    if index.given("pins"):
        pinned, most = index.number("pinned_bytes"), index.number("pinnable_bytes")
        yield f"pinned    {size_text(pinned)} of at most {size_text(most)}, by {index.text('pins')} pins (`lmcache kvcache pins`)"
    hits, misses = counters.number("hit_chunks_total"), counters.number("missed_chunks_total")
    ratio = f"{hits / (hits + misses):.0%} of the chunks asked for" if hits + misses else "nothing asked for yet"
    yield f"hits      {ratio} ({hits:.0f} found, {misses:.0f} not)"
    yield (
        f"tokens    {counters.number('retrieved_tokens_total'):.0f} loaded by engines, "
        f"{counters.number('stored_tokens_total'):.0f} stored"
    )
    yield from _listed("engines", [_engine(one) for one in told.rows("engines")], "no engine process is connected")
    yield from _listed("tiers", [_tier(one) for one in told.rows("tiers")], "none")
    trouble = [*condition.lines("degraded"), *condition.lines("refused_engines"), *_trouble(counters)]
    wrong = lacking(told, told.text("version"))
    yield from _listed("trouble", trouble + [wrong] * bool(wrong), "none")


def _listed(title: str, rows: list[str], none: str) -> Iterator[str]:
    for number, row in enumerate(rows[:_MOST_ROWS] or [none]):
        yield f"{title if not number else '':<10}{row}"
    if len(rows) > _MOST_ROWS:
        yield f"{'':<10}and {len(rows) - _MOST_ROWS} more"


def _engine(one: Told) -> str:
    how = "payload frames" if one.given("payload_frames") else "the mapped arena"
    who = f"{one.text('instance')}: {one.text('role')}, rank {one.text('rank')}, pid {one.text('pid')}"
    return f"{who}, {how}, for {_duration(one.number('connected_seconds'))}"


def _tier(one: Told) -> str:
    most = f" of {size_text(one.number('max_bytes'))}" if one.given("max_bytes") else ""
    stored_bytes = one.optional("stored_bytes")
    stored = "size unknown" if stored_bytes is None else f"{size_text(stored_bytes)}{most}"
    queued = f", {size_text(one.number('queued_bytes'))} to be written" if one.given("queued_bytes") else ""
    reason = f" ({one.text('reason')})" if one.given("reason") else ""
    return f"{one.text('name')}: {one.text('state')}{reason}, {stored}{queued}"


def _trouble(counters: Told) -> Iterator[str]:
    for name, what in (
        ("failed_loads_total", "loads failed; the engines computed these tokens"),
        ("failed_stores_total", "stores failed"),
        ("refused_chunks_total", "shards were not stored, for want of memory or of a free claim"),
        ("internal_errors_total", "unexpected exceptions; the log has their tracebacks"),
        ("loop_errors_total", "exceptions in the main loop; the log has their tracebacks"),
    ):
        if counters.given(name):
            yield f"{counters.number(name):.0f} {what}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
