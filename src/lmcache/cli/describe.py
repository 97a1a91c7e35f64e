"""`lmcache describe`: the settings, contents and activity of a running server, as a table or as JSON."""

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
Show a running server. `server`: its settings. `status`: everything, with arena, index, sessions, engines and counters.
`tiers`: the tiers behind L1 and their state. `fetches`: the lookups that asked tiers for what L1 lacked or waited for other
engines, the latest first: the expected times of loading and of computing, which was chosen, how long the request
waited, and what arrived. From another host than the server's this needs the server's token.

examples:
  lmcache describe server
  lmcache describe status --json | jq .counters
  lmcache describe fetches | grep REQUEST-ID
"""


def add_verb(verbs: Verbs) -> None:
    """Add `describe` to the command line."""
    parser = add(verbs, "describe", run, "show a running server's settings or state", _TEXT)
    parser.add_argument(
        "what",
        choices=("server", "status", "tiers", "fetches", "kvcache"),
        help="What to show. kvcache: the same as status.",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the chosen part of the server's status."""
    path = "/fetches" if arguments.what == "fetches" else "/status"
    status, answer = ask(arguments.url, path, token=token_of(arguments))
    if status != 200:
        raise ServerUnavailable(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    part = {"server": "config", "tiers": "tiers"}.get(arguments.what)
    chosen = answer if part is None else {part: answer.get(part)}
    if arguments.json:
        print(json.dumps(chosen, indent=2))
    else:  # whoever answers at the URL may have sent control characters, which a terminal would obey
        print("\n".join(printable(line, len(line)) for line in table(chosen)))
    return 0


def table(status: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: plain values first, then a section for each part."""
    yield from _pairs({key: value for key, value in status.items() if not isinstance(value, (dict, list))})
    for key, value in status.items():
        if isinstance(value, dict):
            yield from ("", key.upper(), *_pairs(_flat(value)))
        elif isinstance(value, list):
            rows = [_flat(row) if isinstance(row, dict) else {key: row} for row in value]
            yield from ("", f"{key.upper()} ({len(rows)})", *_columns(rows))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, values), default=0)
    for key, value in values.items():
        yield f"  {key:<{width}}  {_cell(key, value)}"


def _columns(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_cell(name, row.get(name)) for name in names] for row in rows)] if names else []
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()


def _cell(name: str, value: Any) -> str:
    """Format a value for people: sizes in GiB or MiB, thousands separated."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and "bytes" in name:
        return f"{value / 2**30:.2f} GiB" if value >= 1 << 30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, int) and not name.endswith(("port", "pid")):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
