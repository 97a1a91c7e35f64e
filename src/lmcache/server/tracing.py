"""Makes one span of each request, with its lookup, waits, loads and stores as children, for `otlp` to send.

The loop only notes what has happened. A thread turns the notes into spans: the children when they end, and the request's own span
when the engine says that the request has ended, or after a minute without news of it.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from lmcache.cache.accounts import Account
from lmcache.runtime import Runtime
from lmcache.server.otlp import Exporter, Span, Value
from lmcache.server.sessions import Peer
from lmcache.wire import messages as m

MOST_OPEN = 8192
"""Requests whose spans are open; of more, the oldest end."""
QUIET_SECONDS = 60.0
ENDED_SECONDS = 2.0
"""An ended request's last stores may still be reported for so long."""
_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Note(NamedTuple):
    """What has happened to a request at a time (seconds since the epoch). kind: asked, accounted, load, store, or ended."""

    kind: str
    at: float
    engine: str
    request: str
    trace: str = ""
    model: str = ""
    account: Account | None = None
    copied: m.Copied | None = None


@dataclass(slots=True)
class _Open:
    """A request's span. sampled: whether the engine's trace is recorded. asked: when the lookup that has no answer yet began."""

    span: Span
    sampled: bool
    news: float
    asked: float | None = None
    ended: bool = False
    totals: dict[str, int] = field(default_factory=dict)


class Tracing:
    """The spans of one server. All methods but `spans` run in the loop's thread; `exporter` says what was sent."""

    def __init__(self, runtime: Runtime, endpoint: str, instance: str, who: Callable[[int], tuple[str, str]]) -> None:
        self._wall, self._who = runtime.wall, who
        self._open: OrderedDict[tuple[str, str], _Open] = OrderedDict()
        """(engine, request) -> its span; belongs to the exporter's thread. The one with the oldest news is the first."""
        self.exporter: Exporter[Note] = Exporter(runtime, endpoint, instance, self.spans)

    # In the loop

    def asked(self, peer: Peer, lookup: m.Lookup) -> None:
        """Note that a lookup has arrived."""
        if lookup.request:
            name, model = m.request_name(lookup.request), str(peer.layout.get("model_id", ""))
            self.exporter.put(Note("asked", self._wall(), peer.instance, name, lookup.trace, model))

    def accounted(self, account: Account) -> None:
        """Note that a lookup has its answer, and where the tokens came from."""
        if account.request:
            engine = self._who(account.process)[0]
            self.exporter.put(Note("accounted", self._wall(), engine, account.request, account=account))

    def copied(self, peer: Peer, copied: m.Copied) -> None:
        """Note that a rank has loaded or stored."""
        if copied.request:
            name = m.request_name(copied.request)
            short = msgspec.structs.replace(
                copied, request=""
            )  # a name may be as long as a message, and many notes wait
            self.exporter.put(Note(copied.kind, self._wall(), peer.instance, name, copied=short))

    def ended(self, peer: Peer, request: str) -> None:
        """Note that a request has ended."""
        self.exporter.put(Note("ended", self._wall(), peer.instance, m.request_name(request)))

    def counters(self) -> dict[str, float]:
        """Return the counters for /metrics."""
        one = self.exporter
        return {
            "spans_sent_total": one.sent,
            "spans_dropped_total": one.dropped,
            "span_notes_lost_total": one.lost_notes,
        }

    # In the exporter's thread

    def spans(self, notes: Sequence[Note], last: bool = False) -> list[Span]:
        """Return the spans that are complete after these notes; with `last`, all."""
        made: list[Span] = []
        for note in notes:
            self._note(note, made)
        now = self._wall()
        for key, one in list(self._open.items()):
            quiet = now - one.news
            if last or len(self._open) > MOST_OPEN or quiet > (ENDED_SECONDS if one.ended else QUIET_SECONDS):
                del self._open[key]
                self._end(one, made)
        return made

    def _note(self, note: Note, made: list[Span]) -> None:
        key = note.engine, note.request
        if key not in self._open:
            if note.kind == "ended":
                return
            self._open[key] = _opened(note)
        one = self._open[key]
        one.news, one.span.end = note.at, max(one.span.end, note.at)
        self._open.move_to_end(key)
        if note.kind == "asked":
            one.asked = note.at if one.asked is None else one.asked
        elif note.kind == "ended":
            one.ended = True
        elif note.account is not None:
            self._answered(one, note, note.account, made)
        elif note.copied is not None and one.sampled:
            copied = note.copied
            told: dict[str, Value] = {"lmcache.tokens": copied.tokens, "lmcache.shard": copied.shard}
            child = _child(one, f"lmcache.{copied.kind}", note.at - copied.seconds, note.at, told)
            child.failed = not copied.ok
            one.span.start = min(one.span.start, child.start)
            made.append(child)

    def _answered(self, one: _Open, note: Note, account: Account, made: list[Span]) -> None:
        began = note.at - account.waited if one.asked is None else one.asked
        found: Mapping[str, int] = {f"lmcache.found.{source}": count for source, count in account.found.items()}
        missed = {f"lmcache.missed.{reason}": count for reason, count in account.missed.items()}
        told: dict[str, Value] = {"lmcache.tokens": account.tokens, **found, **missed}
        one.span.attributes |= told
        one.asked = None
        if not one.sampled:
            return
        lookup = _child(one, "lmcache.lookup", began, note.at, told)
        made.append(lookup)
        if account.waited:
            fetch, why = account.fetch, dict[str, Value]()
            if fetch is not None:
                why = {
                    "lmcache.outcome": fetch.outcome,
                    "lmcache.decision": fetch.decision,
                    "lmcache.planned_chunks": fetch.planned.total(),
                    "lmcache.arrived_chunks": fetch.arrived_chunks,
                }
            made.append(_child(one, "lmcache.wait", note.at - account.waited, note.at, why, lookup))

    def _end(self, one: _Open, made: list[Span]) -> None:
        if one.sampled:
            made.append(one.span)


def _opened(note: Note) -> _Open:
    joined = _PARENT.fullmatch(note.trace)
    trace, parent = (bytes.fromhex(joined[1]), bytes.fromhex(joined[2])) if joined else (secrets.token_bytes(16), b"")
    about: dict[str, Value] = {
        "gen_ai.request.id": note.request,
        "lmcache.engine": note.engine,
        "lmcache.model": note.model,
    }
    span = Span("lmcache.request", trace, secrets.token_bytes(8), parent, note.at, note.at)
    span.attributes = {name: value for name, value in about.items() if value}
    return _Open(span, not joined or bool(int(joined[3], 16) & 1), note.at)


def _child(
    one: _Open, name: str, start: float, end: float, attributes: dict[str, Value], parent: Span | None = None
) -> Span:
    return Span(name, one.span.trace, secrets.token_bytes(8), (parent or one.span).span, start, end, attributes)
