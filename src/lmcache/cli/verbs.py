"""Functions that the verbs share: adding a verb and common flags to the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from lmcache.config.load import load
from lmcache.config.options import size_text as size_text
from lmcache.wire.http_client import DEFAULT_URL

Verbs: TypeAlias = "argparse._SubParsersAction[Any]"


def add(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str
) -> argparse.ArgumentParser:
    """Add a verb. `text` is its description and, after an empty line, its examples."""
    description, _, examples = text.strip().partition("\n\n")
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, flags=parser._option_string_actions)
    return parser


def add_url(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the server."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"HTTP endpoint of the server. Default: {DEFAULT_URL}.")


def add_token(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the server's token, which clients on other hosts need."""
    parser.add_argument(
        "--api-token-file", metavar="FILE", help="File (0600) with the server's token [LMCACHE_SERVER_API_TOKEN_FILE]."
    )


def token_of(arguments: argparse.Namespace) -> str:
    """Return the token that `add_token`'s flag, the environment or the configuration gives; "" where none does.

    Raises:
        ConfigError: the file cannot be read, or other users may read it.
    """
    return load({"api_token_file": arguments.api_token_file}).config.api_token
