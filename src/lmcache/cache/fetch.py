"""Fetches decide what tiers are asked, what is loaded from them, and how long an engine waits. No I/O: `now` is an argument.

A *fetch* brings the part of a prompt that L1 lacks, from tiers and from other engines. It has three states:

    asking   All usable tiers are asked at the same time which of the chunks they have.
    loading  The chunks before the first one that nobody has are loaded in order, each from the nearest tier that has it. What no
             tier has is awaited, if another engine is storing or has promised it (`cache.promises`).
    ended    The engine uses the chunks that have arrived, and computes the rest.

The engine calls `poll` repeatedly; the answer says how many chunks to wait for. The wait ends when every planned chunk has
arrived or failed, when loading would take longer than computing, or when the next chunk is late by more than
`load_cost.slack_seconds`. An awaited chunk is late when computing would have been faster, when it takes twice as long as
expected, or when its promise has ended. So a slow or stalled tier costs a small share of the time that computing takes, and
another engine at most that time. A fetch also ends with the last request that waits for it. Running loads go on and fill L1;
queued loads are dropped when the last fetch that waits for them ends. A chunk is loaded once, however many fetches want it.
After `patience_seconds`, a hanging load no longer counts, and its chunks may be loaded from another tier. Every fetch leaves a
`FetchRecord`, which says what happened and why.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.events import Event
from lmcache.cache.load_cost import AWAIT_SLACK, AWAIT_TOLERANCE, UNPACED_WAIT_SECONDS, Pace, slack_seconds
from lmcache.cache.promises import NOTHING, Coming
from lmcache.chunks import HASH_BYTES, split_hashes

ASK_SECONDS = 0.5
"""A fetch goes on without the tiers that have not answered by then."""
ENDED_SECONDS = 1.0
"""A lookup for the same chunks starts no new fetch for so long after the last one ended without them, unless a tier has stored
the next chunk meanwhile."""
MAX_FETCHES = 4096
KEPT_RECORDS = 1000
"""How many records of ended fetches are kept."""
FOLLOWED_CHUNKS = 16384
"""Events are added to the records for so many chunks, those whose loads have begun last."""
MAX_REQUESTS = 8
"""How many request ids a record names at most."""
MAX_WAITING = 1024
"""A fetch for which more requests wait than these is not ended when they have ended."""
PROBE_SECONDS = 15.0
"""Time between loads that only measure whether a slow tier has become faster."""
AWAITED = -1
"""In place of the number of a tier: another engine computes or stores the chunk."""
_BATCH_SECONDS = 0.03
_FIRST_BATCH_BYTES = 4 << 20
_NOT_WORTH_IT, _TOO_SLOW, _BROKEN = "not worth it", "too slow to ask", "promise ended"
_FAIR_TRY = 0.25
"""The share of the computing time for which a fetch waits for a tier whose pace is not known yet."""


class Ask(NamedTuple):
    """Effect: ask the tier which of these chunks it has, and pass the answer to `answered`."""

    fetch: int
    tier: int
    space: int
    hashes: bytes


class Load(NamedTuple):
    """Effect: load these chunks, which follow `parent` (or the root if `root`), from the tier into L1. Call `loaded` when the
    load has ended, however late; until then it counts as running."""

    number: int
    tier: int
    space: int
    parent: bytes
    root: bool
    hashes: bytes
    request: str = ""
    """The engine's id of the request whose lookup has started the fetch."""


class Decided(NamedTuple):
    """Effect: log the decision whether a fetch loads its chunks."""

    requests: tuple[str, ...]
    prompt: bytes
    expected_seconds: float | None
    recompute_seconds: float | None
    loads: bool


class FetchRecord(NamedTuple):
    """A fetch that has ended: the chunks asked for, the decision with its numbers, and the outcome."""

    requests: tuple[str, ...]
    """The engines' ids of the requests, as far as they were given."""
    prompt: bytes
    """Hash of the last chunk asked for."""
    space: int
    asked_chunks: int
    l1_chunks: int
    """How many leading chunks were in L1 when the fetch began."""
    planned: dict[int, int]
    """Tier -> number of chunks to be loaded from it. `AWAITED` -> number of chunks to be stored by other engines."""
    left_out: dict[int, str]
    """Tier -> why it was not asked, or its answer not used."""
    expected_seconds: float | None
    """Expected time of the load; None if a tier's pace was unknown, or no tier had a chunk."""
    recompute_seconds: float | None
    """Time to compute the same chunks (all missing ones if no tier had any); None if the engine's pace was unknown."""
    decision: str
    """`load`, `not worth it`, or "" if there was nothing to decide. Waiting for another engine counts as a load."""
    waited_seconds: float
    outcome: str
    """arrived, failed (planned chunks did not arrive), absent, not worth it, late, patience, too many, promise ended, or
    withdrawn."""
    arrived_chunks: int
    """Chunks that the fetch added to those that were in L1 at its beginning."""
    ended: float
    events: Counter[str]
    """Events of the chunks whose loads this fetch has begun, as `kind` or `kind:reason`: stored, evicted (chunks), and refused,
    dropped, load_failed (shards). Events after the end of the fetch are added, too."""


class TierTraits(NamedTuple):
    """Properties of a tier for planning. usable(now): whether it may be asked now. batch_shards: the most of one load. name: of
    the tier, in events."""

    batch_bytes: int
    concurrency: int
    usable: Callable[[float], bool]
    batch_shards: int
    name: str = ""


@dataclass(eq=False)
class _Fetch:
    number: int
    space: int
    hashes: bytes
    first: int
    """The number of leading chunks that were in L1 at the beginning."""
    began: float
    prefill_seconds: float
    """Time to compute one chunk; 0 if unknown."""
    chunk_bytes: int
    chunk_shards: int
    requests: list[str] = field(default_factory=list)
    """The ids of the requests, as far as they were given."""
    askers: set[tuple[int, str]] = field(default_factory=set)
    """The requests that wait, with their processes; requests without an id count as one."""
    unanswered: set[int] = field(default_factory=set)
    left_out: dict[int, str] = field(default_factory=dict)
    """Tier -> why it was not asked, or its answer not used."""
    has: dict[int, Sequence[bool]] = field(default_factory=dict)
    """Tier -> which of the missing chunks it has."""
    coming: Coming = NOTHING
    """The chunks that other engines were storing when the fetch began."""
    have: int = 0
    """The number of leading chunks that the engine has itself."""
    since: float = 0.0
    """When the wait for other engines began, in this fetch or in the one before it."""
    progress: float = 0.0
    """When a chunk arrived last."""
    plan: list[int] = field(default_factory=list)
    """The source of each chunk, from `first` on."""
    sources: Counter[int] = field(default_factory=Counter)
    """The same, counted by source."""
    in_l1: int = 0
    """How many leading chunks were in L1 at the last `poll`."""
    asked_at: float = 0.0
    """Time of the last `poll`."""
    expected_seconds: float | None = None
    recompute_seconds: float | None = None
    """The two times that the decision compared."""
    decision: str = ""
    due: list[float | None] = field(default_factory=list)
    """When each planned chunk is expected, in seconds after `began`; None while a tier's pace is unknown."""
    waiting: set[_Pending] = field(default_factory=set)
    events: Counter[str] = field(default_factory=Counter)
    ended: float | None = None
    outcome: str = ""
    """As in the record, once it has ended."""

    def hash_of(self, chunk: int) -> bytes:
        return self.hashes[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES]

    @property
    def missing(self) -> int:
        return len(self.hashes) // HASH_BYTES - self.first

    @property
    def planned(self) -> int:
        return len(self.plan)

    @property
    def arrived(self) -> int:
        """How many planned chunks were in L1 at the last `poll`."""
        return min(max(0, self.in_l1 - self.first), self.planned)

    def asked(self, now: float, in_l1: int, process: int, request: str) -> None:
        self.askers.add((process, request) if request and len(self.askers) < MAX_WAITING else (process, ""))
        if in_l1 > self.in_l1:
            self.progress = now
        self.asked_at, self.in_l1 = now, in_l1
        if request and request not in self.requests and len(self.requests) < MAX_REQUESTS:
            self.requests.append(request)

    def record(self, now: float, outcome: str) -> FetchRecord:
        return FetchRecord(
            tuple(self.requests),
            self.hashes[-HASH_BYTES:],
            self.space,
            len(self.hashes) // HASH_BYTES,
            self.first,
            dict(self.sources),
            self.left_out,
            self.expected_seconds,
            self.recompute_seconds if self.decision else self.prefill_seconds * self.missing or None,
            self.decision,
            (self.asked_at if outcome == "patience" else now) - self.began,
            outcome,
            self.arrived,
            now,
            self.events,
        )


@dataclass(eq=False)
class _Pending:
    """A load. began: time of its beginning; None while it is queued. events: of the fetch that has begun it."""

    load: Load
    events: Counter[str]
    waiters: set[_Fetch] = field(default_factory=set)
    began: float | None = None

    @property
    def keys(self) -> list[tuple[int, bytes]]:
        return [(self.load.space, key) for key in split_hashes(self.load.hashes)]


class Fetches:
    """All fetches from these tiers, nearest first.

    always: load whatever a tier has, and wait up to `patience_seconds`. Otherwise load only if that is faster than computing.
    """

    def __init__(self, tiers: Sequence[TierTraits], always: bool = False, patience_seconds: float = 10.0) -> None:
        self.effects: list[Ask | Load | Decided] = []
        """The server carries these out after every call, and removes them."""
        self.counters: Counter[str] = Counter()
        self.paces = [Pace() for _ in tiers]
        self.records: deque[FetchRecord] = deque(maxlen=KEPT_RECORDS)
        """Records of ended fetches, the latest one last."""
        self.last: Decided | None = None
        self._tiers = tiers
        self._always = always
        self._patience_seconds = patience_seconds
        self._numbers = itertools.count(1)
        self._fetches: dict[int, _Fetch] = {}
        self._by_request: dict[tuple[int, bytes], _Fetch] = {}
        self._queues = [OrderedDict[int, _Pending]() for _ in tiers]
        """Loads that have not begun, by number."""
        self._queued_chunks = [0] * len(tiers)
        self._running: list[dict[int, _Pending]] = [{} for _ in tiers]
        """Loads that have begun and not returned, by number."""
        self._under_way: dict[tuple[int, bytes], _Pending] = {}
        """(space, chunk hash) -> the queued or running load of the chunk; hanging loads are not in it."""
        self._followed: OrderedDict[tuple[int, bytes], _Pending] = OrderedDict()
        """(space, chunk hash) -> the last load of the chunk that has begun, until L1 loses the chunk."""

    @property
    def numbered(self) -> Sized:
        """The fetches that are under way or have just ended, as they change."""
        return self._fetches

    @property
    def open(self) -> int:
        """How many fetches have not ended."""
        return sum(fetch.ended is None for fetch in self._fetches.values())

    def knows(self, space: int, hashes: bytes) -> bool:
        """Return whether a fetch of these chunks is under way or has just ended."""
        return (space, hashes[-HASH_BYTES:]) in self._by_request

    def is_open(self, space: int, hashes: bytes) -> bool:
        """Return whether a fetch of these chunks is under way."""
        fetch = self._by_request.get((space, hashes[-HASH_BYTES:]))
        return fetch is not None and fetch.ended is None

    def poll(
        self,
        now: float,
        space: int,
        hashes: bytes,
        in_l1: int,
        chunk_bytes: int,
        prefill_seconds: float,
        known: Sequence[Callable[[bytes], Sequence[bool] | None]],
        request: str = "",
        chunk_shards: int = 1,
        coming: Coming = NOTHING,
        have: int = 0,
        process: int = 0,
    ) -> int:
        """Return how many more chunks the engine should wait for; 0 if it should go on with the chunks in L1.

        in_l1: number of leading chunks in L1 now. chunk_bytes, chunk_shards: all shards of one chunk. prefill_seconds: time to
        compute one chunk, 0 if unknown. known: for each tier, a function that answers which hashes it has without I/O, or None.
        request: the engine's id of the request. coming: what other engines store of the missing chunks. have: number of leading
        chunks that the engine has itself. process: of the engine.
        """
        fetch, full = self._by_request.get((space, hashes[-HASH_BYTES:])), in_l1 * HASH_BYTES >= len(hashes)
        since = now
        if fetch is not None and self._goes_on(now, fetch, in_l1, prefill_seconds, have, coming):
            return 0
        if fetch is not None and fetch.ended is not None and coming.chunks and self._may_await_again(fetch, request):
            if fetch.outcome == _BROKEN:
                since = fetch.since  # the promises of several engines together may not take longer than computing
            self._drop(fetch)
            fetch = None
        is_new = fetch is None
        if fetch is None:
            if full:
                return 0
            fetch = _Fetch(next(self._numbers), space, hashes, in_l1, now, prefill_seconds, chunk_bytes, chunk_shards)
            fetch.coming, fetch.have, fetch.since, fetch.progress = coming, have, since, now
        if fetch.ended is None:
            fetch.asked(now, in_l1, process, request)
        if full:
            if fetch.ended is None:
                self._settle(now, fetch)
            return 0
        if is_new:
            if len(self._fetches) >= MAX_FETCHES:
                self.counters["too_many"] += 1
                self.records.append(fetch.record(now, "too many"))
                return 0
            self._begin(now, fetch, known)
        if fetch.ended is None and fetch.unanswered:
            if now - fetch.began <= self._ask_patience(fetch):
                return fetch.missing
            for tier in fetch.unanswered:
                self.counters[f"late_answers:{tier}"] += 1
                fetch.left_out[tier] = "late answer"
            fetch.unanswered.clear()
            self._plan(now, fetch)
        return self._judge(now, fetch, coming)

    def answered(self, now: float, number: int, tier: int, present: Sequence[bool] | None, seconds: float) -> None:
        """Take a tier's answer to an `Ask`, which took `seconds`; None if the tier failed."""
        if present is not None:
            self.paces[tier].answered(seconds)
        fetch = self._fetches.get(number)
        if fetch is None or tier not in fetch.unanswered:
            return
        fetch.unanswered.discard(tier)
        if present is not None:
            fetch.has[tier] = present
        else:
            fetch.left_out[tier] = "failed"
        if not fetch.unanswered:
            self._plan(now, fetch)

    def loaded(self, now: float, load: Load, size_bytes: int | None) -> None:
        """Note that a load has ended and brought `size_bytes` into L1; None if the call of the tier failed."""
        self.paces[load.tier].ended(now, size_bytes)
        self._forget(self._running[load.tier].pop(load.number))
        self._pump(now, load.tier)

    def late(self, load: Load) -> None:
        """Note that a running load has passed its deadline, so its chunks will not be used. It counts as running until `loaded`
        is called."""
        self._forget(self._running[load.tier][load.number])

    def heard(self, event: Event) -> None:
        """Add an event to the records of the fetches that have loaded its chunks."""
        for key in split_hashes(event.hashes) if self._followed else ():
            pending = self._followed.get((event.space, key))
            if pending is None:
                continue
            evicted, of_load = event.kind == "evicted", event.tier == self._tiers[pending.load.tier].name
            if evicted or of_load:
                pending.events[f"{event.kind}:{event.reason}" if event.reason else event.kind] += 1
            if evicted or (event.kind == "stored" and not of_load):  # what an engine has stored was not loaded
                del self._followed[event.space, key]

    def kept(self, space: int, hashes: bytes) -> None:
        """Note that a tier has stored these chunks, so a new fetch may look for them at once."""
        keys = set(split_hashes(hashes))
        for fetch in list(self._fetches.values()):
            if fetch.ended is not None and fetch.space == space and fetch.hash_of(fetch.first) in keys:
                self._drop(fetch)

    def withdraw(self, now: float, process: int, request: str) -> None:
        """Note that this request has ended. A fetch that no other one waits for ends, too, and its queued loads are dropped."""
        for fetch in [one for one in self._fetches.values() if (process, request) in one.askers and one.ended is None]:
            fetch.askers.discard((process, request))
            if not fetch.askers:
                self._end(now, fetch, "withdrawn")
                self._drop(fetch)  # who asks again begins anew

    def tick(self, now: float) -> None:
        """End fetches that have lasted too long, forget fetches that ended a while ago, and stop waiting for hanging loads."""
        for fetch in list(self._fetches.values()):
            # A wait for another engine may take as long as computing, as `_judge` decides while somebody asks.
            awaits = AWAITED in fetch.plan and now - fetch.asked_at < self._patience_seconds
            if fetch.ended is None and now - fetch.began > self._patience_seconds and not awaits:
                self._end(now, fetch, "patience")
            if fetch.ended is not None and now - fetch.ended > ENDED_SECONDS:
                self._drop(fetch)
        for running in self._running:
            for pending in running.values():
                if pending.began is not None and now - pending.began > self._patience_seconds:
                    self._forget(pending)

    # The states of a fetch

    @staticmethod
    def _may_await_again(fetch: _Fetch, request: str) -> bool:
        """Return whether this ended fetch leaves it open to wait for what is coming: it knew of nothing, has decided for others,
        whose engine may be faster, or has lost a promise that somebody else may have renewed."""
        if fetch.outcome == _NOT_WORTH_IT and fetch.coming.chunks:
            return request not in fetch.requests
        return not fetch.coming.chunks or fetch.outcome == _BROKEN

    def _goes_on(
        self, now: float, fetch: _Fetch, in_l1: int, prefill_seconds: float, have: int, coming: Coming
    ) -> bool:
        """Return whether the asking request does not wait for the engine that the fetch waits for next, while others may: it must
        not, has those chunks, or computes them sooner than they should come, or in less time than they are overdue."""
        at = max(0, in_l1 - fetch.first)
        if fetch.ended is not None or at >= fetch.planned or fetch.plan[at] != AWAITED:
            return False
        left = fetch.first + fetch.planned - have
        if coming.barred or left <= 0:
            return True
        own, early = prefill_seconds * left, fetch.began + (fetch.due[at] or 0.0) - now
        faster = not self._always and 0 < own < (self._recompute_seconds(fetch) or math.inf)
        return faster and abs(early) > AWAIT_TOLERANCE * own + AWAIT_SLACK * slack_seconds(own)

    def _begin(self, now: float, fetch: _Fetch, known: Sequence[Callable[[bytes], Sequence[bool] | None]]) -> None:
        self._fetches[fetch.number] = self._by_request[fetch.space, fetch.hashes[-HASH_BYTES:]] = fetch
        missing = fetch.hashes[fetch.first * HASH_BYTES :]
        for tier, traits in enumerate(self._tiers):
            if not traits.usable(now):
                fetch.left_out[tier] = "not serving"
            elif self._too_slow_to_ask(tier, fetch):
                fetch.left_out[tier] = _TOO_SLOW
            elif (answer := known[tier](missing)) is not None:
                fetch.has[tier] = answer
            else:
                fetch.unanswered.add(tier)
                self.effects.append(Ask(fetch.number, tier, fetch.space, missing))
        if not fetch.unanswered:
            self._plan(now, fetch)

    def _too_slow_to_ask(self, tier: int, fetch: _Fetch) -> bool:
        """Return whether the tier's answer alone is expected to take longer than computing all missing chunks."""
        ask = self.paces[tier].ask_seconds
        recompute = fetch.prefill_seconds * fetch.missing
        return not self._always and bool(recompute) and ask is not None and ask > recompute

    def _ask_patience(self, fetch: _Fetch) -> float:
        """Return how long to wait for answers: twice the measured time of the slowest tier (if that is unknown, a share of the
        computing time), plus the slack."""
        if self._always:
            return self._patience_seconds
        if not fetch.prefill_seconds:
            return ASK_SECONDS
        recompute = fetch.prefill_seconds * fetch.missing
        seen = [self.paces[tier].ask_seconds for tier in fetch.unanswered]
        expected = max(recompute * _FAIR_TRY if ask is None else 2 * ask for ask in seen)
        return min(ASK_SECONDS, expected + slack_seconds(recompute))

    def _plan(self, now: float, fetch: _Fetch) -> None:
        """Choose the tier of each chunk, decide whether to load, and queue the loads."""
        sources: list[int] = []
        for at in range(fetch.missing):
            source = next((tier for tier in sorted(fetch.has) if fetch.has[tier][at]), AWAITED)
            if source == AWAITED and at >= fetch.coming.chunks:
                break
            sources.append(source)
        if not sources:
            asks = [self.paces[tier].ask_seconds for tier, why in fetch.left_out.items() if why == _TOO_SLOW]
            if asks:
                recompute = fetch.prefill_seconds * fetch.missing
                self._decide(fetch, min(one or 0.0 for one in asks), recompute, loads=False)
            self._end(now, fetch, _NOT_WORTH_IT if asks else "absent")
            return
        from_tiers = sources[: sources.index(AWAITED)] if AWAITED in sources else []
        worth = self._worth_it(now, fetch, sources)
        if not worth and from_tiers:
            sources, worth = from_tiers, self._worth_it(now, fetch, from_tiers)
        if not worth:
            self._probe(now, fetch, sources)
            self._end(now, fetch, _NOT_WORTH_IT)
            return
        fetch.plan = sources
        self._queue(now, fetch, sources)

    def _probe(self, now: float, fetch: _Fetch, sources: list[int]) -> None:
        """Load one batch from a slow tier now and then, since otherwise nothing would show that it has become faster."""
        tier = sources[0]
        if tier == AWAITED:
            return
        if now - self.paces[tier].measured_at > PROBE_SECONDS and not self._running[tier]:
            batch = self._batch_chunks(tier, fetch)
            self._queue(now, fetch, [one for one in sources[:batch] if one == tier])
            self.counters["probes"] += 1

    def _due(self, asked: float, fetch: _Fetch, sources: list[int]) -> list[float | None]:
        """Return when each chunk is expected. The chunks of a batch arrive together, and concurrent batches may end together."""
        total, ahead = Counter(sources), Counter[int]()
        due: list[float | None] = []
        for tier in sources:
            if tier == AWAITED:
                due.append(fetch.coming.expected_seconds)
                continue
            batch = self._batch_chunks(tier, fetch)
            last = (ahead[tier] // batch + self._tiers[tier].concurrency) * batch
            size = (min(last, total[tier]) + self._queued_chunks[tier]) * fetch.chunk_bytes
            ahead[tier] += 1
            seconds = self.paces[tier].expected_seconds(size)
            due.append(None if seconds is None else asked + seconds)
        return due

    def _batch_chunks(self, tier: int, fetch: _Fetch) -> int:
        """Return the most chunks of one load: those that arrive within `_BATCH_SECONDS`, to show progress, up to a full batch."""
        rate, traits = self.paces[tier].bytes_per_second, self._tiers[tier]
        most = _FIRST_BATCH_BYTES if rate is None else int(rate * _BATCH_SECONDS)
        by_size = min(traits.batch_bytes, most) // fetch.chunk_bytes
        return max(1, min(by_size, traits.batch_shards // fetch.chunk_shards))

    def _worth_it(self, now: float, fetch: _Fetch, sources: list[int]) -> bool:
        fetch.sources = Counter(sources)
        fetch.due = due = self._due(now - fetch.began, fetch, sources)
        recompute = self._recompute_seconds(fetch) or None
        known = [one for one in due if one is not None]
        expected = max(known) if len(known) == len(due) else None
        good = self._always or recompute is None or expected is None or expected < recompute
        if recompute is not None and AWAITED in sources and not good:
            good = expected is not None and expected <= AWAIT_TOLERANCE * recompute
        self._decide(fetch, expected, recompute, good)
        return good

    @staticmethod
    def _recompute_seconds(fetch: _Fetch) -> float:
        """Return the time that the engine would need to compute the chunks that the fetch brings; 0 if unknown."""
        chunks = fetch.sources.total()
        if AWAITED in fetch.sources:  # an engine that waits for another one does so for what it lacks itself
            chunks = max(1, min(chunks, fetch.first + chunks - fetch.have))
        return fetch.prefill_seconds * chunks

    def _decide(self, fetch: _Fetch, expected: float | None, recompute: float | None, loads: bool) -> None:
        fetch.expected_seconds, fetch.recompute_seconds = expected, recompute
        fetch.decision = "load" if loads else _NOT_WORTH_IT
        self.last = Decided(tuple(fetch.requests), fetch.hashes[-HASH_BYTES:], expected, recompute, loads)
        self.effects.append(self.last)

    def _queue(self, now: float, fetch: _Fetch, sources: list[int]) -> None:
        """Queue loads of consecutive chunks from one tier each. For chunks that are being loaded already, only wait."""
        at = 0
        while at < len(sources):
            tier, first = sources[at], at
            if tier == AWAITED:
                at += 1
                continue
            most = self._batch_chunks(tier, fetch)
            hashes: list[bytes] = []
            while at < len(sources) and sources[at] == tier and len(hashes) < most:
                key = fetch.hash_of(fetch.first + at)
                at += 1
                pending = self._under_way.get((fetch.space, key))
                if pending is not None:
                    self._wait(fetch, pending)
                    break
                hashes.append(key)
            if hashes:
                chunk = fetch.first + first
                parent = fetch.hash_of(chunk - 1) if chunk else b""
                request = fetch.requests[0] if fetch.requests else ""
                load = Load(next(self._numbers), tier, fetch.space, parent, not chunk, b"".join(hashes), request)
                self._queues[tier][load.number] = pending = _Pending(load, fetch.events)
                self._queued_chunks[tier] += len(hashes)
                self._under_way.update(dict.fromkeys(pending.keys, pending))
                self._wait(fetch, pending)
        for tier in set(sources) - {AWAITED}:
            self._pump(now, tier)

    @staticmethod
    def _wait(fetch: _Fetch, pending: _Pending) -> None:
        fetch.waiting.add(pending)
        pending.waiters.add(fetch)

    def _judge(self, now: float, fetch: _Fetch, coming: Coming) -> int:
        """Return how many chunks to wait for, or 0 if the fetch has ended. coming: what other engines are storing now."""
        if fetch.ended is not None:
            return 0
        awaits = fetch.arrived < fetch.planned and fetch.plan[fetch.arrived] == AWAITED
        if fetch.arrived >= fetch.planned or not (awaits or fetch.waiting):
            self._settle(now, fetch)
            return 0
        if awaits and not coming.chunks:
            self._end(now, fetch, _BROKEN)
            return 0
        if self._is_late(now, fetch, awaits):
            self._end(now, fetch, "late")
            return 0
        return fetch.planned - fetch.arrived

    def _is_late(self, now: float, fetch: _Fetch, awaits: bool) -> bool:
        if not awaits:
            return now - fetch.began > self._patience(fetch)
        if not fetch.prefill_seconds:
            return now - fetch.progress > UNPACED_WAIT_SECONDS
        recompute, due = self._recompute_seconds(fetch), fetch.due[fetch.arrived]
        slack = AWAIT_SLACK * slack_seconds(recompute)
        own = recompute if due is None else max(2 * due, _FAIR_TRY * recompute)
        return now - fetch.since > recompute + slack or now - fetch.began > own + slack

    def _patience(self, fetch: _Fetch) -> float:
        """Return how long after the beginning the next chunk may arrive, in seconds."""
        if self._always or not fetch.prefill_seconds:
            return self._patience_seconds
        due = fetch.due[fetch.arrived]
        slack = slack_seconds(fetch.prefill_seconds * fetch.planned)
        if due is None:  # the first load of a tier
            due = fetch.prefill_seconds * max(fetch.arrived + 1, _FAIR_TRY * fetch.planned)
        return min(self._patience_seconds, due + slack)

    def _settle(self, now: float, fetch: _Fetch) -> None:
        """End a fetch whose planned chunks have all arrived or failed."""
        self.counters["failed"] += fetch.planned - fetch.arrived
        self._end(now, fetch, "")

    def _end(self, now: float, fetch: _Fetch, reason: str) -> None:
        """End a fetch, once. `reason`: why the engine stops waiting; "" if all planned chunks have arrived or failed."""
        fetch.ended = now
        fetch.unanswered.clear()
        for pending in fetch.waiting:
            pending.waiters.discard(fetch)
            if pending.began is None and not pending.waiters:
                self._unqueue(pending)
                self._forget(pending)
        fetch.waiting.clear()
        self.counters["fetches"] += 1
        self.counters["arrived"] += fetch.arrived
        fetch.outcome = outcome = reason or ("arrived" if fetch.arrived == fetch.planned else "failed")
        self.records.append(fetch.record(now, outcome))
        if AWAITED in fetch.sources:
            self.counters["awaited"] += fetch.plan[: fetch.arrived].count(AWAITED)
            self.counters[f"awaits:{outcome}"] += 1
        if reason:
            self.counters[f"fetches:{reason}"] += 1
        else:  # the chunks may be evicted, and a new fetch may then load them again
            self._drop(fetch)

    def _drop(self, fetch: _Fetch) -> None:
        del self._fetches[fetch.number]
        del self._by_request[fetch.space, fetch.hashes[-HASH_BYTES:]]

    def _unqueue(self, pending: _Pending) -> None:
        del self._queues[pending.load.tier][pending.load.number]
        self._queued_chunks[pending.load.tier] -= len(pending.load.hashes) // HASH_BYTES

    def _forget(self, pending: _Pending) -> None:
        """Let no fetch wait for this load any more, and let its chunks be loaded again."""
        for key in pending.keys:
            if self._under_way.get(key) is pending:
                del self._under_way[key]
        for fetch in pending.waiters:
            fetch.waiting.discard(pending)
        pending.waiters.clear()

    def _pump(self, now: float, tier: int) -> None:
        queue, running = self._queues[tier], self._running[tier]
        while queue and len(running) < self._tiers[tier].concurrency:
            number, pending = next(iter(queue.items()))
            self._unqueue(pending)
            running[number], pending.began = pending, now
            self.paces[tier].began(now)
            self.effects.append(pending.load)
            for key in pending.keys:
                self._followed[key] = pending
                self._followed.move_to_end(key)
            while len(self._followed) > FOLLOWED_CHUNKS:
                self._followed.popitem(last=False)
