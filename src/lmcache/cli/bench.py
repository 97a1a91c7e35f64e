"""`lmcache bench`: measure what a server gives an engine on this host. The work is in `lmcache.bench`."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of

_TEXT = """
Measure what a server gives an engine on this host. It leaves a few chunks behind, in tiers too.

examples:
  lmcache bench
  lmcache bench --model big --threads 2 --json
"""


def add_verb(verbs: Verbs) -> None:
    """Add `bench` to the command line."""
    parser = add(verbs, "bench", run, "measure the cache on this machine", _TEXT)
    add_url(parser)
    add_token(parser)
    parser.add_argument(
        "--model", choices=("small", "mid", "big"), default="small", help="Size of the KV. Default: small."
    )
    parser.add_argument("--threads", type=int, default=1, help="Copy threads of the engine. Default: 1.")
    parser.add_argument("--rounds", type=int, default=20, help="Samples of each copy. Default: 20.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark."""
    from lmcache.bench.main import report

    print(report(arguments, token_of(arguments)))
    return 0
