"""What verbs share: how one is added, and how one asks a running server over HTTP."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeAlias

from lmcache.config.load import load
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable

Verbs: TypeAlias = "argparse._SubParsersAction[Any]"

DEFAULT_URL = "http://127.0.0.1:8080"
DEADLINE_SECONDS = 3.0
_LONGEST_ANSWER_BYTES = 16 << 20


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
    """The flag that says which server."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"HTTP face of the server. Default: {DEFAULT_URL}.")


def add_token(parser: argparse.ArgumentParser) -> None:
    """The flag with the server's token, which other hosts than the server's need."""
    parser.add_argument(
        "--api-token-file", metavar="FILE", help="File (0600) with the server's token [LMCACHE_SERVER_API_TOKEN_FILE]."
    )


def token_of(arguments: argparse.Namespace) -> str:
    """The token that `add_token`'s flag, the environment or the configuration gives; "" where none does.

    Raises:
        ConfigError: the file cannot be read, or others may read it.
    """
    return load({"api_token_file": arguments.api_token_file}).config.api_token


def ask(
    url: str, path: str, method: str = "GET", token: str = "", seconds: float | None = None
) -> tuple[int, dict[str, Any]]:
    """One call to a server's HTTP face: (HTTP status, the JSON object of the answer). Proxies are not used.

    Raises:
        ConfigError: not a URL of a server.
        ServerUnavailable: nobody answers there within three seconds, or so many.
        ServerRefused: what answers is not an LMCache server.
    """
    request = urllib.request.Request(_base(url) + path, method=method, headers={"Accept": "application/json"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    deadline = DEADLINE_SECONDS if seconds is None else seconds
    try:
        status, body = _exchange(request, deadline)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, (TimeoutError, socket.timeout))
        why = f"no answer within {deadline:g} s" if late else f"{reason}"
        raise ServerUnavailable(f"no server at {url}: {why}: start `lmcache server`, or pass --url") from None
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServerRefused(f"{url}{path} answered {status}, but not as LMCache does: pass the --url of lmcache server")
    return status, answer


def _exchange(request: urllib.request.Request, deadline: float) -> tuple[int, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=deadline) as response:
            return response.status, response.read(_LONGEST_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_LONGEST_ANSWER_BYTES)


def _base(url: str) -> str:
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: must be like {DEFAULT_URL}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
