"""`lmcache kvcache`: what each model has in L1; pin, unpin, prefetch, list and delete the KV of prompts; `clear`."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from lmcache.chunks import tenant_of
from lmcache.cli import clear
from lmcache.cli.told import Told, lacking
from lmcache.cli.verbs import Verbs, add, size_text, token_of
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME
from lmcache.wire.http_client import ask

_TEXT = """
usage: the chunks and bytes that each model has in L1, the largest first; --by tenant: of each cache_salt, with the tokens that it
asked for and found (--cache-salt: of this one alone). Salts are shown as ids. lookup: how much of a prompt is in L1 and in tiers.
pin: keep what L1 has of a prompt, for --seconds. unpin: by the pin's id, or by the prompt. pins: list them. prefetch: load a
prompt from tiers into L1 (--wait SECONDS waits for it), and pin it with --seconds. delete: remove a prompt from L1, and with
--tiers from tiers. list: the chunks in L1. clear: the spelling of the public LMCache project for `lmcache clear`.

A prompt is --tokens 1,2,3 or a file with a JSON list (--tokens @FILE), --text TEXT or --text @FILE, which needs the server's
--tokenizer-url, or --hashes. From another host than the server's this needs the server's token.

examples:
  lmcache kvcache usage
  lmcache kvcache usage --by tenant
  lmcache kvcache pin --tokens @prompt.json --seconds 86400 --note "system prompt"
  lmcache kvcache pins
  lmcache kvcache unpin 5f0c1e9a2b7d4e63
  lmcache kvcache prefetch --text "You are a helpful assistant." --wait 60
  lmcache kvcache delete --tokens @prompt.json --tiers all
  lmcache kvcache list --model Qwen/Qwen3-8B --limit 1000
  lmcache kvcache clear --url http://localhost:8080
"""
_POLL_SECONDS = 0.2
_DEADLINE_SECONDS = 20.0
"""Longer than the server takes for a tokenizer and tiers."""
ACTIONS = "usage", "lookup", "pin", "unpin", "pins", "prefetch", "delete", "list", "clear"


def add_verb(verbs: Verbs) -> None:
    """Add `kvcache` to the command line."""
    parser = add(verbs, "kvcache", run, "show, pin, prefetch and delete the KV of prompts and models", _TEXT)
    parser.add_argument("action", choices=ACTIONS, help="What to do.")
    parser.add_argument("id", nargs="?", default="", help="unpin: the id of the pin.")
    parser.add_argument("--json", action="store_true", help="The server's answer as JSON instead of text.")
    parser.add_argument("--tokens", metavar="IDS", default="", help="The prompt as token ids with commas, or @FILE.")
    parser.add_argument("--text", metavar="TEXT", default="", help="The prompt as text, or @FILE.")
    parser.add_argument(
        "--hashes", metavar="HASHES", default="", help="The prompt as chunk hashes with commas, or @FILE."
    )
    parser.add_argument("--model", metavar="MODEL", default="", help="Needed if engines with several models are known.")
    parser.add_argument("--cache-salt", metavar="SALT", default="", help="The prompt's cache_salt, if it has one.")
    parser.add_argument(
        "--seconds",
        metavar="S",
        default="",
        help="pin, prefetch: for how long; 3600 for pin by default, a week at most.",
    )
    parser.add_argument("--note", metavar="TEXT", default="", help="pin: what it is for, for people.")
    parser.add_argument("--wait", metavar="S", default="", help="prefetch: wait for its end so long.")
    parser.add_argument(
        "--by",
        choices=("model", "tenant"),
        default="model",
        help="usage: rows of models or of tenants. Default: model.",
    )
    parser.add_argument("--limit", metavar="N", default="100", help="list: chunks at most. Default: 100.")
    clear.add_to(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the action says, and print what has come of it.

    Raises:
        ConfigError: a flag is wrong. ServerRefused: the server declines.
    """
    if arguments.action == "clear":
        return clear.run(arguments)
    if arguments.tiers and arguments.action != "delete":
        raise ConfigError(
            f"--tiers {arguments.tiers}: is for `lmcache kvcache clear` and `delete`; `lmcache tier list` shows tiers"
        )
    if arguments.id and arguments.action != "unpin":
        raise ConfigError(f"{arguments.id}: not expected after `lmcache kvcache {arguments.action}`")
    doing: dict[str, Callable[[argparse.Namespace], int]] = {
        "usage": _usage,
        "lookup": _lookup,
        "pin": _pin,
        "unpin": _unpin,
        "pins": _pins,
        "prefetch": _prefetch,
        "delete": _delete,
        "list": _list,
    }
    return doing[arguments.action](arguments)


def _usage(arguments: argparse.Namespace) -> int:
    if arguments.by == "tenant":
        return _tenants(arguments)
    status, answer = ask(arguments.url, "/status", token=token_of(arguments))
    if status != 200:
        raise ServerUnavailable(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    told = Told(answer)
    rows = usage(told)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(map(printable, [*_table(rows), *filter(None, [lacking(told, told.text("version"))])])))
    return 0


def usage(told: Told) -> list[dict[str, Any]]:
    """Return model, chunks and bytes, the largest first. The shards of all ranks and the groups of a model are added up."""
    found: dict[str, dict[str, Any]] = {}
    for one in told.part("index").rows("spaces"):
        row = found.setdefault(one.text("model"), {"model": one.text("model"), "chunks": 0, "bytes": 0})
        row["chunks"] += int(one.number("chunks"))
        row["bytes"] += int(one.number("chunks") * sum(one.numbers("shard_bytes")))
    return sorted(found.values(), key=lambda row: -row["bytes"])


def _tenants(arguments: argparse.Namespace) -> int:
    salt = arguments.cache_salt
    answer = _ask(arguments, "GET", "/cache/usage" + (f"?tenant={tenant_of(salt).hex()}" if salt else ""))

    def lines(told: Told) -> Iterator[str]:
        rows = told.rows("tenants")
        if not rows:
            yield "Nothing is known of this tenant." if salt else "L1 holds nothing, and nobody has asked for anything."
        for one in rows:
            yield f"{_of_tenant(one)}  {one.text('tenant') or '(no cache_salt)':16}  {one.text('model')}"
        if told.given("other") and told.part("other").number("rows"):
            yield f"{_of_tenant(told.part('other'))}  {told.part('other').text('rows')} others"
        if told.given("counted_all") and not answer["counted_all"]:
            yield "L1 has more chunks than could be counted in time."

    return _show(arguments, answer, lines)


def _of_tenant(row: Told) -> str:
    asked, found = row.number("requested_tokens"), row.number("found_tokens")
    share = f"{100 * found / asked:5.1f} %" if asked else "      –"
    size = f"{size_text(row.number('bytes')):>12}  {row.number('chunks'):>10,.0f} chunks"
    return f"{size}  {asked:>14,.0f} tokens asked for  {share} found"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "L1 holds nothing."
    for row in rows:
        yield f"{size_text(row['bytes']):>12}  {row['chunks']:>10,} chunks  {row['model'] or '(no engine has told its name)'}"


def _lookup(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "POST", "/cache/lookup", _prompt(arguments))

    def lines(told: Told) -> Iterator[str]:
        for one in told.rows("models"):
            yield f"{one.text('l1_tokens')} of {one.text('tokens')} tokens in L1  {one.text('model')}"
            for name in one.part("tier_tokens").names() if one.given("tier_tokens") else ():
                yield f"{one.part('tier_tokens').text(name)} more in the tier {name}"

    return _show(arguments, answer, lines)


def _pin(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "POST", "/cache/pins", _pinned(arguments, "seconds"))
    return _show(arguments, answer, lambda told: iter([f"pin {told.text('id')}: {_of_pin(told)}"]))


def _of_pin(told: Told) -> str:
    note = f"  {told.text('note')}" if told.given("note") else ""
    size = size_text(told.number("bytes"))
    return f"{told.text('chunks')} chunks, {size}, {told.number('seconds_left'):.0f} s left  {told.text('model')}{note}"


def _unpin(arguments: argparse.Namespace) -> int:
    if arguments.id:
        answer = _ask(arguments, "DELETE", f"/cache/pins/{quote(arguments.id, safe='')}")
    else:
        answer = _ask(arguments, "DELETE", "/cache/pins", _prompt(arguments))
    return _show(arguments, answer, lambda told: iter([f"ended: {', '.join(told.lines('unpinned'))}"]))


def _pins(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "GET", "/cache/pins")

    def lines(told: Told) -> Iterator[str]:
        used, most = size_text(told.number("pinned_bytes")), size_text(told.number("pinnable_bytes"))
        yield f"{used} of {most} that may be pinned"
        yield from (f"pin {one.text('id')}: {_of_pin(one)}" for one in told.rows("pins"))

    return _show(arguments, answer, lines)


def _prefetch(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "POST", "/cache/prefetches", _pinned(arguments, "pin_seconds"))
    end = RUNTIME.now() + (_number("--wait", arguments.wait) if arguments.wait else 0.0)
    while arguments.wait and answer.get("state") == "loading" and RUNTIME.now() < end:
        RUNTIME.sleep(_POLL_SECONDS)
        answer = _ask(arguments, "GET", f"/cache/prefetches/{quote(str(answer.get('id')), safe='')}")

    def lines(told: Told) -> Iterator[str]:
        why = f" ({told.text('reason')})" if told.given("reason") else ""
        tokens = f"{told.text('l1_tokens')} of {told.text('tokens')} tokens in L1"
        yield f"prefetch {told.text('id')}: {told.text('state')}{why}, {tokens}"

    _show(arguments, answer, lines)
    return 0 if not arguments.wait or answer.get("state") == "done" else 1


def _delete(arguments: argparse.Namespace) -> int:
    content = _prompt(arguments) | ({"tiers": arguments.tiers} if arguments.tiers else {})
    answer = _ask(arguments, "POST", "/cache/delete", content)

    def lines(told: Told) -> Iterator[str]:
        yield f"deleted {told.text('deleted_chunks')} chunks, {size_text(told.number('deleted_bytes'))}"
        kept = told.part("kept_chunks")
        yield from (f"kept {kept.text(name)} chunks: {name.replace('_', ' ')}" for name in kept.names())

    return _show(arguments, answer, lines)


def _list(arguments: argparse.Namespace) -> int:
    """Print chunks, from as many pages as it takes."""
    left, rows, asked = int(_number("--limit", arguments.limit)), list[Any](), {"model": arguments.model}
    while left > 0:
        query = {name: value for name, value in asked.items() if value != ""} | {"limit": min(left, 1000)}
        answer = _ask(arguments, "GET", f"/cache/objects?{urlencode(query)}")
        found = answer.get("objects")
        rows += found if isinstance(found, list) else []
        left -= min(left, 1000)
        following = answer.get("next")
        if not isinstance(following, dict):
            break
        asked |= following

    def lines(told: Told) -> Iterator[str]:
        for one in told.rows("objects"):
            marks = "  pinned" if one.given("pinned") else ""
            yield f"{one.text('hash')}  {size_text(one.number('bytes')):>10}  {one.text('model')}{marks}"

    return _show(arguments, {"objects": rows}, lines)


def _ask(arguments: argparse.Namespace, method: str, path: str, content: Any = None) -> dict[str, Any]:
    status, answer = ask(arguments.url, path, method, token_of(arguments), _DEADLINE_SECONDS, content)
    if status not in (200, 202):
        raise ServerRefused(f"{arguments.url}: {answer.get('reason', f'HTTP {status}')}")
    return answer


def _show(arguments: argparse.Namespace, answer: dict[str, Any], lines: Callable[[Told], Iterator[str]]) -> int:
    told = Told(answer)
    if arguments.json:
        print(json.dumps(answer, indent=1))
    else:
        print("\n".join(map(printable, [*lines(told), *filter(None, [lacking(told, "unknown")])])))
    return 0


def _prompt(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON that names the prompt of the flags."""
    given = {name: _text_of(name, getattr(arguments, name)) for name in ("tokens", "text", "hashes")}
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        raise ConfigError("name the prompt by one of --tokens, --text and --hashes")
    (name,) = named
    content: dict[str, Any] = {name: given[name]}
    if name != "text":
        words = [one for one in re.split(r"[\s,\[\]\"']+", given[name]) if one]
        try:
            content[name] = list(map(int, words)) if name == "tokens" else words
        except ValueError:
            raise ConfigError(f"--tokens {given[name][:80]}: must be numbers with commas, or @FILE with them") from None
    also = {"model": arguments.model, "cache_salt": arguments.cache_salt}
    return content | {name: value for name, value in also.items() if value}


def _pinned(arguments: argparse.Namespace, seconds: str) -> dict[str, Any]:
    """Return the JSON that names the prompt, with a note and for how long it is pinned. seconds: the name of that."""
    time = {seconds: _number("--seconds", arguments.seconds)} if arguments.seconds else {}
    return _prompt(arguments) | {"note": arguments.note} | time


def _text_of(name: str, value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{name} {value}: cannot be read: {error}") from None


def _number(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{flag} {text}: must be a number")
    return number
