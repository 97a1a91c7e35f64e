"""`lmcache ping`: check whether a server serves, for people and for container health checks."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs, add, add_url
from lmcache.errors import ServerUnavailable
from lmcache.wire.http_client import ask

_TEXT = """
Check whether a server serves. The exit code is 0 when it does, 1 when it does not or does not answer.

examples:
  lmcache ping
  lmcache ping --url http://10.0.0.7:8080
"""


def add_verb(verbs: Verbs) -> None:
    """Add `ping` to the command line."""
    add_url(add(verbs, "ping", run, "check whether a server serves (exit code 0 or 1)", _TEXT))


def run(arguments: argparse.Namespace) -> int:
    """Print that the server is healthy. Raises ServerUnavailable otherwise."""
    status, answer = ask(arguments.url, "/healthcheck")
    if status != 200 or answer.get("status") != "healthy":
        raise ServerUnavailable(f"{arguments.url} is unhealthy: {answer.get('reason', f'HTTP {status}')}")
    print(f"{arguments.url} is healthy")
    return 0
