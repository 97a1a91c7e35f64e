"""`lmcache ping`: is the server serving? For people and for container health checks."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs, add, add_url
from lmcache.errors import ServerUnavailable
from lmcache.wire.http_client import ask

_TEXT = """
Ask a server whether it serves. Exit code 0 when it does, 1 when it does not or nobody answers.

examples:
  lmcache ping
  lmcache ping --url http://10.0.0.7:8080
"""


def add_verb(verbs: Verbs) -> None:
    """Add `ping` to the command line."""
    add_url(add(verbs, "ping", run, "is a server serving? (exit code 0 or 1)", _TEXT))


def run(arguments: argparse.Namespace) -> int:
    """Print the answer."""
    status, answer = ask(arguments.url, "/healthcheck")
    if status != 200 or answer.get("status") != "healthy":
        raise ServerUnavailable(f"{arguments.url} is unhealthy: {answer.get('reason', f'HTTP {status}')}")
    print(f"{arguments.url} is healthy")
    return 0
