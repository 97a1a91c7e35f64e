"""`lmcache ping`: check whether a server or an engine serves, for people, scripts and container health checks."""

from __future__ import annotations

import argparse
import json

from lmcache.cli.verbs import Verbs, add, add_url
from lmcache.errors import LMCacheError, ServerUnavailable
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import DEFAULT_URL, ask, status_of

_ENGINE_URL = "http://localhost:8000"
_PAUSE_SECONDS = 0.2
_TEXT = """
Check whether a server serves. The exit code is 0 when it does, 1 when it does not or does not answer.

examples:
  lmcache ping
  lmcache ping --url http://10.0.0.7:8080 --wait 30
  lmcache ping engine --url http://localhost:8000     vLLM or SGLang: GET /health
"""


def add_verb(verbs: Verbs) -> None:
    """Add `ping` to the command line."""
    parser = add(verbs, "ping", run, "check whether a server serves (exit code 0 or 1)", _TEXT)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("kvcache", "engine"),
        default="kvcache",
        help=f"kvcache: the LMCache server, which is the default. engine: an engine's HTTP server, {_ENGINE_URL} by default.",
    )
    add_url(parser)
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="Ask again for so long until it serves. Default: 0."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a sentence.")
    parser.add_argument("--format", choices=("json", "terminal"), help="json: the same as --json.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print nothing; the exit code tells.")


def run(arguments: argparse.Namespace) -> int:
    """Print that the server is healthy, or why it is not.

    Raises:
        LMCacheError: it is not, and the output is for people.
    """
    url = _ENGINE_URL if arguments.what == "engine" and arguments.url == DEFAULT_URL else arguments.url
    deadline = RUNTIME.now() + arguments.wait
    while True:
        try:
            _check_engine(url) if arguments.what == "engine" else _check_server(url)
            failure = None
            break
        except LMCacheError as error:
            failure = error
        if RUNTIME.now() >= deadline:
            break
        RUNTIME.sleep(_PAUSE_SECONDS)
    if arguments.json or arguments.format == "json":
        answer = {"url": url, "status": "unhealthy" if failure else "healthy"}
        print(json.dumps(answer | ({"reason": str(failure)} if failure else {})))
    elif failure and not arguments.quiet:
        raise failure
    elif not arguments.quiet:
        print(f"{url} is healthy")
    return 1 if failure else 0


def _check_server(url: str) -> None:
    status, answer = ask(url, "/healthcheck")
    if status != 200 or answer.get("status") != "healthy":
        raise ServerUnavailable(f"{url} is unhealthy: {answer.get('reason', f'HTTP {status}')}")


def _check_engine(url: str) -> None:
    try:
        status = status_of(url, "/health")
    except ServerUnavailable:
        raise ServerUnavailable(f"no engine answers at {url}/health: start it, or pass --url") from None
    if status != 200:
        raise ServerUnavailable(f"{url} is unhealthy: GET /health answered HTTP {status}")
