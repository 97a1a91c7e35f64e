"""`lmcache top`: a running server on one screen that refreshes itself."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache.cli.told import Told, lacking
from lmcache.cli.verbs import Verbs, add, add_token, add_url, size_text, token_of
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import ask

_TEXT = """
Show a running server on one screen, again every second: what is looked up and found, what is loaded and stored, how full L1
and the tiers are, which engines are connected, and why tokens were missing. Ctrl-C ends it. --once prints one screen, with rates
since the server's start. From another host than the server's this needs the server's token.

examples:
  lmcache top
  lmcache top --once | grep found
  lmcache top --url http://10.0.0.7:8080 --api-token-file token.txt --interval 5
"""
_CLEAR, _HIDE, _SHOW, _END_OF_LINE, _BELOW = "\x1b[H\x1b[2J", "\x1b[?25l", "\x1b[?25h", "\x1b[K", "\x1b[J"
_HOME = "\x1b[H"
_BAR, _MOST_ROWS = 30, 6


def add_verb(verbs: Verbs) -> None:
    """Add `top` to the command line."""
    parser = add(verbs, "top", run, "show a running server, again every second", _TEXT)
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="Time between screens. Default: 1."
    )
    parser.add_argument("--once", action="store_true", help="Print one screen and end, as without a terminal.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show screens until Ctrl-C. A server that goes away is waited for.

    Raises:
        ServerUnavailable, ServerRefused: there is no server at the beginning, or it does not show its state.
    """
    if not 0.1 <= arguments.interval <= 3600:
        raise ConfigError(f"--interval {arguments.interval:g}: must be from 0.1 to 3600 seconds")
    token = token_of(arguments)
    before, status = None, _status(arguments.url, token)
    if arguments.once or not sys.stdout.isatty():
        print("\n".join(map(printable, screen(arguments.url, status, None))))
        return 0
    sys.stdout.write(_HIDE + _CLEAR)
    try:
        while True:
            paint(list(screen(arguments.url, status, before)))
            RUNTIME.sleep(arguments.interval)
            before = status
            while True:
                try:
                    status = _status(arguments.url, token)
                    break
                except (ServerUnavailable, ServerRefused) as error:
                    paint([str(error), "Trying again; Ctrl-C ends this."])
                    before = None
                    RUNTIME.sleep(arguments.interval)
    except KeyboardInterrupt:
        return 0
    finally:
        sys.stdout.write(_SHOW + "\n")
        sys.stdout.flush()


def _status(url: str, token: str) -> dict[str, Any]:
    code, status = ask(url, "/status", token=token)
    if code != 200:
        raise ServerUnavailable(f"{url}: {status.get('reason', f'HTTP {code}')}")
    return status


def paint(lines: list[str]) -> None:
    """Write a screen over the one before, cut to the size of the terminal."""
    width, height = shutil.get_terminal_size()
    shown = [printable(line, len(line) or 1)[: max(1, width - 1)] for line in lines[: max(1, height - 1)]]
    sys.stdout.write(_HOME + "".join(f"{line}{_END_OF_LINE}\r\n" for line in shown) + _BELOW)
    sys.stdout.flush()


def screen(url: str, status: Mapping[str, Any], before: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of a screen. before: the status of the screen before, for the rates; None: rates since the start."""
    told, earlier = Told(status), Told(before)
    counters, old = told.part("counters"), earlier.part("counters")
    seconds = told.number("uptime_seconds") - (earlier.number("uptime_seconds") if before is not None else 0.0)
    if seconds <= 0:  # another server has taken its place
        seconds, old = max(0.1, told.number("uptime_seconds")), Told({})

    def grown(name: str) -> float:
        return max(0.0, counters.number(name) - (old.number(name) if old.given(name) else 0.0))

    engines = len(told.rows("engines"))
    up = f"up {told.number('uptime_seconds'):,.0f} s"
    yield f"{url}  version {told.text('version')}, {up}, {engines} engine processes"
    yield ""
    asked, found = grown("requested_tokens_total"), _labelled(counters, old, "lookup_tokens_total")
    share = sum(found.values()) / asked if asked else 0.0
    yield f"lookups   {asked / seconds:12,.0f} tokens a second, of which {share:6.1%} were found"
    for source, count in sorted(found.items(), key=lambda one: -one[1])[:_MOST_ROWS]:
        if count:
            yield f"          {count / seconds:12,.0f} in {source}"
    missed = sorted(_labelled(counters, old, "missed_tokens_total").items(), key=lambda one: -one[1])
    for reason, count in missed[:_MOST_ROWS]:
        if count:
            yield f"missing   {count / seconds:12,.0f} tokens a second: {reason}"
    yield (
        f"copies    {grown('retrieved_tokens_total') / seconds:12,.0f} tokens a second loaded, "
        f"{grown('stored_tokens_total') / seconds:,.0f} stored, {grown('evicted_chunks_total') / seconds:,.0f} chunks evicted"
    )
    yield ""
    arena, index = told.part("arena"), told.part("index")
    yield f"L1        {_bar(arena.number('used_bytes'), arena.number('bytes'))}, {index.number('chunks'):,.0f} chunks"
    tiers = told.rows("tiers")
    for one in tiers[:_MOST_ROWS]:
        stored = one.optional("stored_bytes")
        size = (
            "size unknown"
            if stored is None
            else _bar(stored, one.number("max_bytes"))
            if one.given("max_bytes")
            else size_text(stored)
        )
        queued = f", {size_text(one.number('queued_bytes'))} to be written" if one.given("queued_bytes") else ""
        yield f"{one.text('name')[:9]:<9} {size}{queued}; {one.text('state')}" + (
            f": {one.text('reason')}" if one.given("reason") else ""
        )
    if len(tiers) > _MOST_ROWS:
        yield f"          and {len(tiers) - _MOST_ROWS} more tiers"
    if wrong := lacking(told, told.text("version")):
        yield f"note      {wrong}"


def _labelled(counters: Told, old: Told, name: str) -> dict[str, float]:
    """Return label -> growth of a counter."""
    found = {}
    for key in counters.names():
        if key.startswith(f"{name}{{") and key.endswith('"}'):
            label = key.partition('="')[2].removesuffix('"}')
            found[label] = max(0.0, counters.number(key) - (old.number(key) if old.given(key) else 0.0))
    return found


def _bar(used: float, whole: float) -> str:
    share = min(1.0, max(0.0, used / whole)) if whole else 0.0
    filled = round(share * _BAR)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {share:4.0%} of {size_text(whole)}"
