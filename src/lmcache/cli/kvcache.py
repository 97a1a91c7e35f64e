"""`lmcache kvcache`: `clear`, the public project's spelling of `lmcache clear`, and `usage`, what each model has in L1."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from lmcache.cli import clear
from lmcache.cli.told import Told, lacking
from lmcache.cli.verbs import Verbs, add, size_text, token_of
from lmcache.errors import ConfigError, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.wire.http_client import ask

_TEXT = """
clear: the spelling of the public LMCache project for `lmcache clear`. usage: the chunks and bytes that each model has in L1, the
largest first. A model is named while an engine with it is connected.

examples:
  lmcache kvcache usage
  lmcache kvcache usage --json | jq '.[].bytes'
  lmcache kvcache clear --url http://localhost:8080
"""


def add_verb(verbs: Verbs) -> None:
    """Add `kvcache` to the command line."""
    parser = add(verbs, "kvcache", run, "show what each model has in L1, or empty the cache", _TEXT)
    parser.add_argument("action", choices=("clear", "usage"), help="What to do.")
    parser.add_argument("--json", action="store_true", help="usage: JSON instead of a table.")
    clear.add_to(parser)


def run(arguments: argparse.Namespace) -> int:
    """Clear the cache, or print what is in it."""
    if arguments.action == "clear":
        return clear.run(arguments)
    if arguments.tiers:
        raise ConfigError(f"--tiers {arguments.tiers}: is for `lmcache kvcache clear`; `lmcache tier list` shows tiers")
    status, answer = ask(arguments.url, "/status", token=token_of(arguments))
    if status != 200:
        raise ServerUnavailable(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    told = Told(answer)
    rows = usage(told)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(map(printable, [*_table(rows), *filter(None, [lacking(told, told.text("version"))])])))
    return 0


def usage(told: Told) -> list[dict[str, Any]]:
    """Return model, chunks and bytes, the largest first. The shards of all ranks and the groups of a model are added up."""
    found: dict[str, dict[str, Any]] = {}
    for one in told.part("index").rows("spaces"):
        row = found.setdefault(one.text("model"), {"model": one.text("model"), "chunks": 0, "bytes": 0})
        row["chunks"] += int(one.number("chunks"))
        row["bytes"] += int(one.number("chunks") * sum(one.numbers("shard_bytes")))
    return sorted(found.values(), key=lambda row: -row["bytes"])


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "L1 holds nothing."
    for row in rows:
        yield f"{size_text(row['bytes']):>12}  {row['chunks']:>10,} chunks  {row['model'] or '(no engine with it is connected)'}"
