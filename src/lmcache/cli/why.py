"""`lmcache why`: where the tokens of requests came from, why the others were missing, and what to do about it."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from lmcache.cache.reasons import REASONS
from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import ask

_TEXT = """
Explain requests. Of each one the server remembers where its tokens came from (the engine, L1, a tier, another engine) and why the
others were not found. REQUEST_ID is the id that the engine's API has returned, or its beginning (vLLM adds to it). The
server forgets the oldest requests when --records-mb is full. From another host than the server's this needs the server's token.

examples:
  lmcache why cmpl-8f4e12                    one request
  lmcache why --last 20                      the latest requests
  lmcache why --misses --since 10m           those of the last ten minutes of which tokens were missing
  lmcache why --summary                      the causes by the tokens that they cost, and what to do about each
"""
_PAGE = 500
_SHOWN = 20
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
Row = Mapping[str, Any]


def add_verb(verbs: Verbs) -> None:
    """Add `why` to the command line."""
    parser = add(verbs, "why", run, "explain why tokens were not found", _TEXT)
    parser.add_argument(
        "request", nargs="?", default="", metavar="REQUEST_ID", help="The id of a request, or its beginning."
    )
    parser.add_argument("--last", type=int, default=0, metavar="N", help=f"The latest N requests. Default: {_SHOWN}.")
    parser.add_argument("--misses", action="store_true", help="Only requests of which tokens were missing.")
    parser.add_argument("--since", metavar="TIME", default="", help="Only requests of the last 30s, 10m, 2h or 1d.")
    parser.add_argument("--summary", action="store_true", help="Rank the causes by the tokens that they cost.")
    parser.add_argument("--json", action="store_true", help="JSON instead of text.")
    add_url(parser)
    add_token(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the chosen requests, or the summary. The exit code is 1 if no request fits.

    Raises:
        ConfigError: --since or --last has no meaning, or --summary is about other requests than the rest says.
    """
    since = RUNTIME.wall() - _seconds(arguments.since) if arguments.since else 0.0
    if arguments.last < 0:
        raise ConfigError(f"--last {arguments.last}: pass a number of requests, such as {_SHOWN}")
    if arguments.summary:
        alone = {"REQUEST_ID": arguments.request, "--last": arguments.last, "--misses": arguments.misses}
        if other := next((name for name, value in alone.items() if value), ""):
            raise ConfigError(f"--summary is about all requests: leave out {other}, or pass --since")
        return _summary(arguments, since)
    most = arguments.last or _SHOWN
    rows = list(_records(arguments, since, most))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(_nothing(arguments))
    for row in [] if arguments.json else rows:
        print("\n".join(printable(line, len(line)) for line in explained(row)))
    return 0 if rows else 1


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text)
    if found is None:
        raise ConfigError(f"--since {text}: write 30s, 10m, 2h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def _page(arguments: argparse.Namespace, query: dict[str, object]) -> dict[str, Any]:
    path = "/requests?" + urlencode({name: value for name, value in query.items() if value})
    status, answer = ask(arguments.url, path, token=token_of(arguments))
    if status == 400:
        raise ServerRefused(f"{arguments.url}: {answer.get('reason', 'HTTP 400')}")
    if status != 200:
        raise ServerUnavailable(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    return answer


def _records(arguments: argparse.Namespace, since: float, most: int) -> Iterator[dict[str, Any]]:
    """Yield at most so many records that fit, the latest first."""
    before, left = 0, most
    while left > 0:
        asked = {"request": arguments.request, "misses": int(arguments.misses), "since": since, "before": before}
        page = _page(arguments, {**asked, "limit": min(left, _PAGE)})
        yield from page["requests"]
        left, before = left - len(page["requests"]), page["next"]
        if not before:
            return


def _nothing(arguments: argparse.Namespace) -> str:
    if arguments.request:
        return (
            f"No record of a request whose id begins with {printable(arguments.request, 200)}. It was not looked up on this "
            "server (the engine has no connection, or its own prefix cache had all of the prompt), or its record has been "
            "overwritten (--records-mb)."
        )
    return "No request fits. If engines have sent some, `lmcache describe status` shows whether they are connected."


def explained(row: Row) -> Iterator[str]:
    """Yield the lines that explain one record to people."""
    size, tokens = row["chunk_tokens"], row["tokens"]
    when = datetime.fromtimestamp(row["at"]).strftime("%Y-%m-%d %H:%M:%S")
    found = sum(row["sources"].values())
    yield f"{row['request'] or '(a request without an id)'}  {when}  {row['model'] or '?'}: {found:,} of {tokens:,} tokens found"
    for source, count in row["sources"].items():
        yield f"  {count:>9,} tokens from {_SOURCES.get(source, f'the tier {source}')}"
    if row.get("blended"):
        passages, again = row["blended"]["passages"], row["blended"]["recomputed"]
        yield f"  They are of {passages:,} passages that were blended into a prompt; {again:,} of them were computed again."
    if row["waited_seconds"]:
        yield f"  The lookup waited {row['waited_seconds']:.3f} s."
    for kind, (count, seconds) in row["copies"].items():
        yield f"  The engine {_COPIES.get(kind, kind)} {count:,} tokens" + (f" in {seconds:.3f} s." if seconds else ".")
    for reason, count in sorted(row["missed"].items(), key=lambda one: -one[1]):
        meaning = (
            REASONS[reason].meaning if reason in REASONS else "This version of `lmcache why` does not know the reason."
        )
        yield f"  {count:>9,} tokens missing: {reason}. {meaning}"
    if row["chunk"] >= 0:
        first = row["chunk"] * size
        yield f"  The first missing chunk has the tokens {first:,} to {min(tokens, first + size) - 1:,}. {_detail(row)}".rstrip()
        if row["reason"] in REASONS:
            yield f"  What to do: {REASONS[row['reason']].remedy}"


_COPIES = {"load": "loaded", "store": "stored", "failed_load": "could not load (its log says why)"}
_SOURCES = {
    "engine": "the engine's own prefix cache",
    "passages": "passages, wherever they stood before",
    "l1": "L1",
    "other_engine": "another engine, for which the lookup waited",
}


def _detail(row: Row) -> str:
    """Return the sentences about the first missing chunk that only this record can tell."""
    parts = []
    if row.get("differs_at", -1) >= 0:
        parts.append(
            f"It differs from the nearest prompt that the engine knows from token position {row['differs_at']:,} on."
        )
    elif row["reason"] == "differs":
        parts.append("Up to there a prompt that was stored before is the same; in these tokens it differs.")
    if row["twin"]:
        parts.append(f"The same tokens are stored for {row['twin']}.")
    if row["gone"]:
        verb = {"cleared": "cleared", "not_stored": "not stored"}.get(row["reason"], "evicted")
        parts.append(f"It was {verb} {_ago(row['at'] - row['gone'])} before the lookup")
        if row["used"]:
            parts[-1] += f", {_ago(row['gone'] - row['used'])} after its last use"
        if row["wanted_by"] >= 0:
            parts[-1] += f", for space {row['wanted_by']}" + (" (its own)" if row["wanted_by"] == row["space"] else "")
        parts[-1] += "."
    fetch = row["fetch"]
    if fetch:
        parts.append(f"Tiers and other engines: {fetch['outcome']}")
        if fetch["expected_seconds"] is not None and fetch["recompute_seconds"] is not None:
            parts[-1] += (
                f" (a load was expected to take {fetch['expected_seconds']:.3f} s, computing {fetch['recompute_seconds']:.3f} s)"
            )
        parts[-1] += "".join(f"; {tier}: {why}" for tier, why in fetch["left_out"].items()) + "."
    return " ".join(parts)


def _ago(seconds: float) -> str:
    unit = next((one for one in ("d", "h", "m") if seconds >= 2 * _UNITS[one]), "s")
    return f"{seconds / _UNITS[unit]:.1f} {unit}"


def _summary(arguments: argparse.Namespace, since: float) -> int:
    """Print the causes of all missing tokens, or of those since a time, the most expensive first."""
    requested, missed, found, oldest, lost = 0, Counter[str](), Counter[str](), 1, False
    if since:
        for row in _records(arguments, since, 1 << 30):
            if row.get("blended"):  # these tokens are also in the record of the prompt's lookup
                continue
            requested, oldest = requested + row["tokens"], row["number"]
            missed.update(row["missed"])
            found.update(row["sources"])
        lost = oldest > 1 and not _page(arguments, {"limit": 1, "before": oldest})["requests"]
    else:
        for name, value in _page(arguments, {"limit": 1})["totals"].items():
            label = name.partition('="')[2].removesuffix('"}')
            counter = missed if name.startswith("missed") else found if name.startswith("lookup") else None
            if counter is None:
                requested = int(value)
            elif value:
                counter[label] += int(value)
    if arguments.json:
        answer = {"requested_tokens": requested, "found": found, "missed": missed, "older_overwritten": lost}
        print(json.dumps(answer, indent=2))
        return 0
    share = 100.0 / max(1, requested)
    print(
        f"{requested:,} tokens were looked up{f' in the last {arguments.since}' if since else ' since the server started'}."
    )
    if lost:
        print("The records of older requests of this time have been overwritten (--records-mb), so these are not all.")
    for source, count in found.most_common():
        print(
            f"  {count * share:5.1f} %  {count:>13,}  found in {printable(_SOURCES.get(source, f'the tier {source}'), 200)}"
        )
    for reason, count in missed.most_common():
        known = REASONS.get(reason)
        print(f"  {count * share:5.1f} %  {count:>13,}  missing: {printable(reason, 80)}")
        if known is not None:
            print(f"           {known.meaning}\n           What to do: {known.remedy}")
    return 0
