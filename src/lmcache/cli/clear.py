"""`lmcache clear`: empty the cache."""

from __future__ import annotations

import argparse
from urllib.parse import quote

from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ServerRefused
from lmcache.observability.log import printable
from lmcache.wire.http_client import ask

_TIERS_SECONDS = 45.0
"""A longer deadline for clearing tiers, for which the server has 30 s."""
_TEXT = """
Empty L1, and with --tiers also tiers. Engines go on: their next lookups are misses, and reads in progress stay correct.
From another host than the server's this needs the server's token.

examples:
  lmcache clear
  lmcache clear --tiers all
  lmcache clear --url http://10.0.0.7:8080 --api-token-file token.txt
"""


def add_verb(verbs: Verbs) -> None:
    """Add `clear` to the command line."""
    add_to(add(verbs, "clear", run, "empty the cache", _TEXT))


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `run` to a parser."""
    add_url(parser)
    parser.add_argument(
        "--tiers", metavar="NAMES", default="", help="Tiers to empty as well: all, or their names separated by commas."
    )
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Empty the cache and print what was removed.

    Raises:
        ServerRefused: the server refused, or a tier was not emptied.
    """
    path = "/clear-cache" + (f"?tiers={quote(arguments.tiers)}" if arguments.tiers else "")
    status, answer = ask(arguments.url, path, "POST", token_of(arguments), _TIERS_SECONDS if arguments.tiers else None)
    failed = "; ".join(f"tier {name} was not emptied: {why}" for name, why in answer.get("failed_tiers", {}).items())
    if failed:
        raise ServerRefused(f"{arguments.url}: {failed}; L1 and the other named tiers are empty")
    if status != 200:
        raise ServerRefused(f"{arguments.url} refused: {answer.get('reason', f'HTTP {status}')}")
    details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in answer.items() if key != "status")
    what = arguments.url if arguments.tiers else f"L1 of {arguments.url}"
    print(f"{what} is empty now" + (f" ({printable(details)})" if details else ""))
    return 0
