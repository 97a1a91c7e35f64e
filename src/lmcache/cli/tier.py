"""`lmcache tier`: list, attach, remove and pause the tiers of a running server."""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any
from urllib.parse import quote

from lmcache.cli.describe import table
from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ConfigError, ServerRefused
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import ask

_TEXT = """
List, attach, remove and pause the tiers of a running server. Engines go on and notice nothing. All but `list` need the
server's token, on its own host too. SIGHUP does the same from the configuration file, and only what is written there
holds after a restart.

add URL       opens the tier, and attaches it as the farthest one or before another; a tier that cannot be opened is not
              attached. ${NAME} in the URL is replaced by the variable of this shell.
remove NAME   lookups ignore the tier at once. What is queued for it is written for up to --drain SECONDS; the rest is
              counted as lost. The stored data stays in the store.
pause NAME    nothing touches the store any more when this returns; queued writes wait. Until `resume NAME`.

examples:
  lmcache tier list
  lmcache tier add 'disk:///mnt/nvme1?max_gb=200' --before redis --api-token-file token
  lmcache tier remove disk --drain 60 --api-token-file token
  lmcache tier pause s3 --api-token-file token
"""
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_CHANGE_SECONDS = 35.0
"""A longer deadline for changes, for which the server has 25 s."""
_PAUSE_SECONDS, _POLL_SECONDS = 60.0, 0.2
_CLOSE_SECONDS = 10.0
"""When the drain has ended, `remove` waits so long for the tier to be closed."""


def add_verb(verbs: Verbs) -> None:
    """Add `tier` to the command line."""
    parser = add(verbs, "tier", run, "list, attach, remove and pause tiers of a running server", _TEXT)
    parser.add_argument("action", choices=("list", "add", "remove", "pause", "resume"), help="What to do.")
    parser.add_argument(
        "tier", nargs="?", default="", metavar="URL|NAME", help="The URL for add, a name for the others."
    )
    parser.add_argument("--before", metavar="NAME", default="", help="add: the tier that will be the next farther one.")
    parser.add_argument(
        "--drain",
        type=float,
        metavar="SECONDS",
        help="remove: how long queued chunks are written. Default: the server's --drain-seconds.",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of text.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it, and print the result. The exit code is 1 if calls of a removed or paused tier have not returned.

    Raises:
        ConfigError: an argument is missing or does not fit.
        ServerRefused: the server has refused.
    """
    action, tier = arguments.action, arguments.tier
    if (action == "list") == bool(tier):
        wanted = {"list": "nothing follows `list`", "add": "name the URL of the tier"}.get(action, "name the tier")
        raise ConfigError(f"lmcache tier {action} {tier}: {wanted} (try lmcache tier --help)")
    if (arguments.before and action != "add") or (arguments.drain is not None and action != "remove"):
        raise ConfigError("--before is for `lmcache tier add`, and --drain for `lmcache tier remove`")
    if action == "list":
        return _list(arguments)
    return {"add": _add, "remove": _remove, "pause": _pause, "resume": _resume}[action](arguments)


def _call(arguments: argparse.Namespace, path: str, method: str = "GET", content: Any = None) -> dict[str, Any]:
    seconds = None if method == "GET" else _CHANGE_SECONDS
    status, answer = ask(arguments.url, path, method, token_of(arguments), seconds, content)
    if status >= 300:
        raise ServerRefused(f"{arguments.url} refused: {answer.get('reason', f'HTTP {status}')}")
    return answer


def _list(arguments: argparse.Namespace) -> int:
    answer = _call(arguments, "/tiers")
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    shown = ("name", "state", "reason", "url", "read", "write", "stored_bytes", "max_bytes", "queued_chunks")
    rows = [{name: one.get(name) for name in shown} for one in answer.get("tiers", [])]
    leaving = answer.get("leaving", [])
    print(
        "\n".join(
            printable(one, len(one)) for one in table({"tiers": rows} | ({"leaving": leaving} if leaving else {}))
        )
    )
    return 0


def _said(arguments: argparse.Namespace, answer: dict[str, Any], text: str) -> None:
    print(json.dumps(answer) if arguments.json else printable(text, 4000))


def _add(arguments: argparse.Namespace) -> int:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"${{{match[1]}}} is not set here: export {match[1]}")
        return quote(os.environ[match[1]], safe="")

    given = {"url": _REFERENCE.sub(value, arguments.tier)} | ({"before": arguments.before} if arguments.before else {})
    answer = _call(arguments, "/tiers", "POST", given)
    text = f"{answer.get('name')} is attached: {answer.get('url')}. Write it into the configuration to have it after a restart."
    _said(arguments, answer, text)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    query = "" if arguments.drain is None else f"?drain_seconds={arguments.drain:g}"
    answer = _call(arguments, f"/tiers/{quote(arguments.tier, safe='')}{query}", "DELETE")
    until = RUNTIME.now() + (arguments.drain or 0.0) + _CLOSE_SECONDS
    while answer.get("state") == "leaving" and RUNTIME.now() < until:
        RUNTIME.sleep(_POLL_SECONDS)
        leaving = [one for one in _call(arguments, "/tiers").get("leaving", []) if one.get("name") == arguments.tier]
        if not leaving:
            answer["state"] = "removed"
    behind = answer.get("left_behind") or ("it is still being closed" if answer.get("state") == "leaving" else "")
    _said(
        arguments,
        answer,
        f"{arguments.tier} is removed" + (f"; {behind}" if behind else ". Its data stays in the store."),
    )
    return 1 if behind else 0


def _pause(arguments: argparse.Namespace) -> int:
    path, until = f"/tiers/{quote(arguments.tier, safe='')}/pause", RUNTIME.now() + _PAUSE_SECONDS
    while (answer := _call(arguments, path, "POST")).get("under_way") and RUNTIME.now() < until:
        RUNTIME.sleep(_POLL_SECONDS)
    busy = ", ".join(f"{count} of {method}" for method, count in answer.get("under_way", {}).items())
    rest = (
        f"; calls have not returned yet: {busy}" if busy else ": nothing touches its store until `lmcache tier resume`"
    )
    _said(arguments, answer, f"{arguments.tier} is paused{rest}")
    return 1 if busy else 0


def _resume(arguments: argparse.Namespace) -> int:
    answer = _call(arguments, f"/tiers/{quote(arguments.tier, safe='')}/resume", "POST")
    _said(arguments, answer, f"{arguments.tier} goes on")
    return 0
