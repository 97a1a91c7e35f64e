"""`lmcache clear`: empty the cache."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmcache.cli.verbs import Verbs, add, add_url, ask
from lmcache.config.load import load
from lmcache.errors import ServerRefused

_TEXT = """
Empty L1. Engines go on: what they look up next is a miss, and what they are reading now stays right.
From another host than the server's it needs the server's token.

examples:
  lmcache clear
  lmcache clear --url http://10.0.0.7:8080 --api-token-file token.txt
"""


def add_verb(verbs: Verbs) -> None:
    """Add `clear` to the command line."""
    parser = add(verbs, "clear", run, "empty the cache", _TEXT)
    add_url(parser)
    parser.add_argument(
        "--api-token-file", metavar="FILE", help="File (0600) with the server's token [LMCACHE_SERVER_API_TOKEN_FILE]."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print that it is done."""
    token = load({"api_token_file": arguments.api_token_file and str(Path(arguments.api_token_file))}).config.api_token
    status, answer = ask(arguments.url, "/clear-cache", "POST", token)
    if status != 200:
        raise ServerRefused(f"{arguments.url} refused: {answer.get('reason', f'HTTP {status}')}")
    print(f"{arguments.url} is empty now")
    return 0
