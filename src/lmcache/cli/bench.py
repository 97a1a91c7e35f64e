"""`lmcache bench`: measure this machine's cache against the machine's own limits. The work is in `lmcache.bench`."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs


def add_verb(verbs: Verbs) -> None:
    """Add `bench` to the command line. It parses its own flags, including `--help`."""
    parser = verbs.add_parser("bench", help="measure the cache on this machine", add_help=False, allow_abbrev=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark. `arguments.rest` are its own arguments."""
    from lmcache.bench.main import main

    return main(arguments.rest)
