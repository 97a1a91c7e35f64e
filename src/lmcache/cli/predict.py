"""`lmcache predict`: what other sizes of L1 would find, by the estimate of a running server."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ServerUnavailable
from lmcache.wire.http_client import ask

_TEXT = """
Show which share of the looked-up tokens a running server would find with a quarter to sixteen times its L1, and with
unlimited memory. The server estimates this for LRU, from a sample of its lookups since its start, and names the interval
that contains the truth 19 times of 20. From another host than the server's this needs the server's token.

examples:
  lmcache predict
  lmcache predict --json | jq .sizes
"""


def add_verb(verbs: Verbs) -> None:
    """Add `predict` to the command line."""
    parser = add(verbs, "predict", run, "what other sizes of a running server's L1 would find", _TEXT)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the server's estimate."""
    status, answer = ask(arguments.url, "/status", token=token_of(arguments))
    if status != 200:
        raise ServerUnavailable(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    found: dict[str, Any] | None = answer.get("prediction")
    if found is None:
        raise ServerUnavailable(f"{arguments.url} makes no estimate: start it with --predict on")
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print("no lookup yet: ask again when engines have used the server")
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    print(f"{found['asked_tokens']:,} tokens were looked up; sampling rate {found['sampling_rate']:.2%}")
    print(f"{'L1':>12}  {'GiB':>9}  {'tokens found':>12}  interval")
    for one in found["sizes"]:
        print(f"{one['times_l1']:>11g}x  {one['l1_bytes'] / 2**30:>9.2f}  {_cells(one)}")
    print(f"{'unlimited':>12}  {'':>9}  {_cells(found['unlimited'])}")


def _cells(one: dict[str, float]) -> str:
    return f"{one['token_hit_ratio']:>12.2%}  {one['low']:.2%} to {one['high']:.2%}"
