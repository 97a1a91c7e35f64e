"""Fetches decide what tiers are asked, and what is loaded from them. No I/O: `now` is an argument.

A *fetch* brings the part of a prompt that L1 lacks, from tiers and from other engines. It has three states:

    asking   All usable tiers are asked at the same time which of the chunks they have.
    loading  The chunks before the first one that nobody has are loaded in order, each from the nearest tier that has it. What no
             tier has is awaited, if another engine is storing or has promised it (`cache.promises`).
    ended    The engine uses the chunks that have arrived, and computes the rest.

The engine calls `poll` repeatedly; the answer says how many chunks to wait for. The wait ends when `cache.waits` says so, or with
the last request that waits for it. Running loads go on and fill L1; queued loads are dropped when the last fetch that waits for
them ends. A chunk is loaded once, however many fetches want it. After `patience_seconds`, a hanging load no longer counts, and
its chunks may be loaded from another tier. Every fetch leaves a `FetchRecord`, which says what happened and why.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import NamedTuple

from lmcache.cache.events import Event
from lmcache.cache.load_cost import Pace
from lmcache.cache.promises import NOTHING, Coming
from lmcache.cache.waits import (
    AWAITED,
    BROKEN,
    NO_GAIN,
    REMOVED,
    Fetch,
    FetchRecord,
    Load,
    Pending,
    TierTraits,
    Waits,
    Wanted,
)
from lmcache.chunks import HASH_BYTES, split_hashes

ENDED_SECONDS = 1.0
"""A lookup for the same chunks starts no new fetch for so long after the last one ended without them, unless a tier has stored
the next chunk meanwhile."""
MAX_FETCHES = 4096
KEPT_RECORDS = 1000
"""How many records of ended fetches are kept."""
FOLLOWED_CHUNKS = 16384
"""Events are added to the records for so many chunks, those whose loads have begun last."""
PROBE_SECONDS = 15.0
"""Time between loads that only measure whether a slow tier has become faster."""
_TOO_SLOW = "too slow to ask"
Knowers = Mapping[int, Callable[[bytes], Sequence[bool] | None]] | Sequence[Callable[[bytes], Sequence[bool] | None]]
"""For each tier by its number, a function that answers which of these chunk hashes it has without I/O, or None."""


class Ask(NamedTuple):
    """Effect: ask the tier which of these chunks it has, and pass the answer to `answered`."""

    fetch: int
    tier: int
    space: int
    hashes: bytes


class Ended(NamedTuple):
    """Effect: the fetch of this record has ended."""

    record: FetchRecord


class Fetches:
    """All fetches from these tiers, nearest first; their numbers begin with 0. A tier that is attached later gets a number
    that no tier has had before.

    always: load whatever a tier has, and wait up to `patience_seconds`. Otherwise load only if that is faster than computing.
    """

    def __init__(self, tiers: Sequence[TierTraits], always: bool = False, patience_seconds: float = 10.0) -> None:
        self.effects: list[Ask | Load | FetchRecord | Ended] = []
        """The server carries these out after every call, and removes them. A record: log the decision whether to
        load."""
        self.counters: Counter[str] = Counter()
        self.records: deque[FetchRecord] = deque(maxlen=KEPT_RECORDS)
        """Records of ended fetches, the latest one last."""
        self.last: FetchRecord | None = None
        """With the latest decision."""
        self._tiers: dict[int, TierTraits] = {}
        """By number: the attached tiers, and detached ones from which loads have not returned."""
        self._order: list[int] = []
        """The attached tiers, nearest first."""
        self._waits = Waits(self._tiers, always, patience_seconds)
        self.paces = self._waits.paces
        self._numbers = itertools.count(1)
        self._fetches: dict[int, Fetch] = {}
        self._by_request: dict[tuple[int, bytes], Fetch] = {}
        self._waited_for: defaultdict[tuple[int, str], set[Fetch]] = defaultdict(set)
        """(process, request) -> the open fetches that it waits for, or has waited for."""
        self._queues: dict[int, OrderedDict[int, Pending]] = {}
        """Loads that have not begun, by number."""
        self._queued_chunks = Counter[int]()
        self._running: dict[int, dict[int, Pending]] = {}
        """Loads that have begun and not returned, by number."""
        self._under_way: dict[tuple[int, bytes], Pending] = {}
        """(space, chunk hash) -> the queued or running load of the chunk; hanging loads are not in it."""
        self._followed: OrderedDict[tuple[int, bytes], Pending] = OrderedDict()
        """(space, chunk hash) -> the last load of the chunk that has begun, until L1 loses the chunk."""
        self._tier_numbers = itertools.count()
        for one in tiers:
            self.attach(one)

    def attach(self, traits: TierTraits, place: int | None = None) -> int:
        """Ask this tier, too, from the next fetch on. Return its number. place: so many tiers are nearer; None: all."""
        tier = next(self._tier_numbers)
        self._order.insert(len(self._order) if place is None else place, tier)
        self._tiers[tier], self.paces[tier] = traits, Pace()
        self._queues[tier], self._running[tier] = OrderedDict(), {}
        return tier

    def detach(self, now: float, tier: int) -> None:
        """Ask the tier nothing more. Fetches go on without its answers and its queued loads, and note why; the loads that run
        may still bring what they load, until `loaded` is called for each."""
        self._order.remove(tier)
        for pending in list(self._queues[tier].values()):
            for fetch in pending.waiters:
                fetch.record.left_out[tier] = REMOVED
            self._unqueue(pending)
            self._forget(pending)
        for pending in self._running[tier].values():
            for fetch in pending.waiters:
                fetch.record.left_out[tier] = REMOVED
        for fetch in [one for one in self._fetches.values() if tier in one.unanswered]:
            self.answered(now, fetch.number, tier, None, 0.0)
            fetch.record.left_out[tier] = REMOVED
        self._drop_detached(tier)

    def _drop_detached(self, tier: int) -> None:
        if tier not in self._order and not self._running[tier]:
            del self._tiers[tier], self.paces[tier], self._queues[tier], self._running[tier]
            self._queued_chunks.pop(tier, None)

    @property
    def numbered(self) -> Sized:
        """The fetches that are under way or have just ended, as they change."""
        return self._fetches

    @property
    def open(self) -> int:
        """How many fetches have not ended."""
        return sum(fetch.is_open for fetch in self._fetches.values())

    def knows(self, space: int, hashes: bytes) -> bool:
        """Return whether a fetch of these chunks is under way or has just ended."""
        return (space, hashes[-HASH_BYTES:]) in self._by_request

    def is_open(self, space: int, hashes: bytes) -> bool:
        """Return whether a fetch of these chunks is under way."""
        fetch = self._by_request.get((space, hashes[-HASH_BYTES:]))
        return fetch is not None and fetch.is_open

    def poll(self, now: float, wanted: Wanted, in_l1: int, known: Knowers, coming: Coming = NOTHING) -> int:
        """Return how many more chunks the engine should wait for; 0 if it should go on with the chunks in L1.

        in_l1: number of leading chunks in L1 now. known: of the tiers. coming: what other engines store of the missing chunks.
        """
        fetch, full, since = self._by_request.get(wanted.key), in_l1 * HASH_BYTES >= len(wanted.hashes), now
        if fetch is not None and self._waits.goes_on(now, fetch, wanted, in_l1, coming):
            return 0
        if fetch is not None and coming.chunks and self._waits.may_await_again(fetch, wanted.asker.request):
            if fetch.record.outcome == BROKEN:
                since = fetch.since  # the promises of several engines together may not take longer than computing
            self._drop(fetch)
            fetch = None
        is_new = fetch is None
        if fetch is None:
            if full:
                return 0
            fetch = Fetch(next(self._numbers), wanted, in_l1, now, coming, since)
        if fetch.is_open:
            self._waited_for[fetch.asked(now, in_l1, wanted.asker)].add(fetch)
            if full:
                self._end(now, fetch, "")
        if full:
            return 0
        if is_new:
            if len(self._fetches) >= MAX_FETCHES:
                self.counters["too_many"] += 1
                self._wait_no_longer(fetch)
                self._keep(fetch.end(now, "too many"))
                return 0
            self._begin(now, fetch, known)
        if fetch.unanswered:
            if now - fetch.began <= self._waits.ask_patience(fetch):
                return fetch.missing
            for tier in fetch.unanswered:
                self.counters[f"late_answers:{self._tiers[tier].name}"] += 1
                fetch.record.left_out[tier] = "late answer"
            fetch.unanswered.clear()
            self._plan(now, fetch)
        reason = self._waits.why_end(now, fetch, coming) if fetch.is_open else None
        if reason is not None:
            self._end(now, fetch, reason)
        return len(fetch.plan) - fetch.arrived if fetch.is_open else 0

    def answered(self, now: float, number: int, tier: int, present: Sequence[bool] | None, seconds: float) -> None:
        """Take a tier's answer to an `Ask`, which took `seconds`; None if the tier failed."""
        if present is not None and tier in self.paces:
            self.paces[tier].answered(seconds)
        fetch = self._fetches.get(number)
        if fetch is None or tier not in fetch.unanswered:
            return
        fetch.unanswered.discard(tier)
        if present is not None:
            fetch.has[tier] = present
        else:
            fetch.record.left_out[tier] = "failed"
        if not fetch.unanswered:
            self._plan(now, fetch)

    def loaded(self, now: float, load: Load, size_bytes: int | None) -> None:
        """Note that a load has ended and brought `size_bytes` into L1; None if the call of the tier failed."""
        self.paces[load.tier].ended(now, size_bytes)
        self._forget(self._running[load.tier].pop(load.number))
        self._pump(now, load.tier)
        self._drop_detached(load.tier)

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
            evicted, of_load = event.kind == "evicted", event.tier == pending.tier_name
            if evicted or of_load:
                pending.events[f"{event.kind}:{event.reason}" if event.reason else event.kind] += 1
            if evicted or (event.kind == "stored" and not of_load):  # what an engine has stored was not loaded
                del self._followed[event.space, key]

    def kept(self, space: int, hashes: bytes) -> None:
        """Note that a tier has stored these chunks, so a new fetch may look for them at once."""
        keys = set(split_hashes(hashes))
        for fetch in list(self._fetches.values()):
            if not fetch.is_open and fetch.wanted.space == space and fetch.hash_of(fetch.first) in keys:
                self._drop(fetch)

    def withdraw(self, now: float, process: int, request: str) -> None:
        """Note that this request has ended. A fetch that no other one waits for ends, too, and its queued loads are dropped."""
        for fetch in self._waited_for.pop((process, request), ()):
            fetch.askers.discard((process, request))
            if not fetch.askers:
                self._end(now, fetch, "withdrawn")
                self._drop(fetch)  # who asks again begins anew

    def leave(self, now: float, process: int) -> None:
        """Note that this process has ended, and all its requests."""
        for _, request in [asker for asker in self._waited_for if asker[0] == process]:
            self.withdraw(now, process, request)

    def tick(self, now: float) -> None:
        """End fetches that have lasted too long, forget fetches that ended a while ago, and stop waiting for hanging loads."""
        for fetch in list(self._fetches.values()):
            if fetch.is_open and self._waits.is_forgotten(now, fetch):
                self._end(now, fetch, "patience")
            if now - fetch.record.ended > ENDED_SECONDS:
                self._drop(fetch)
        for running in self._running.values():
            for pending in running.values():
                if pending.began is not None and now - pending.began > self._waits.patience_seconds:
                    self._forget(pending)

    # The states of a fetch

    def _begin(self, now: float, fetch: Fetch, known: Knowers) -> None:
        self._fetches[fetch.number] = self._by_request[fetch.wanted.key] = fetch
        missing = fetch.wanted.hashes[fetch.first * HASH_BYTES :]
        for tier in self._order:
            traits = self._tiers[tier]
            if not traits.usable(now):
                fetch.record.left_out[tier] = traits.why_not()
            elif self._waits.too_slow_to_ask(tier, fetch):
                fetch.record.left_out[tier] = _TOO_SLOW
            elif (answer := known[tier](missing)) is not None:
                fetch.has[tier] = answer
            else:
                fetch.unanswered.add(tier)
                self.effects.append(Ask(fetch.number, tier, fetch.wanted.space, missing))
        if not fetch.unanswered:
            self._plan(now, fetch)

    def _plan(self, now: float, fetch: Fetch) -> None:
        """Choose the tier of each chunk, decide whether to load, and queue the loads."""
        sources: list[int] = []
        has = [tier for tier in self._order if tier in fetch.has]
        for at in range(fetch.missing):
            source = next((tier for tier in has if fetch.has[tier][at]), AWAITED)
            if source == AWAITED and at >= fetch.coming.chunks:
                break
            sources.append(source)
        if not sources:
            slow = (tier for tier, why in fetch.record.left_out.items() if why == _TOO_SLOW)
            asks = [self.paces[tier].ask_seconds for tier in slow if tier in self.paces]
            if asks:
                fetch.decided(min(one or 0.0 for one in asks), fetch.recompute_missing_seconds, good=False)
                self._log_decision(fetch)
            self._end(now, fetch, NO_GAIN if asks else "absent")
            return
        from_tiers = sources[: sources.index(AWAITED)] if AWAITED in sources else []
        worth = self._waits.worth_it(now, fetch, sources, self._queued_chunks)
        if not worth and from_tiers:
            sources, worth = from_tiers, self._waits.worth_it(now, fetch, from_tiers, self._queued_chunks)
        self._log_decision(fetch)
        if not worth:
            self._probe(now, fetch, sources)
            self._end(now, fetch, NO_GAIN)
            return
        fetch.plan = sources
        self._queue(now, fetch, sources)

    def _probe(self, now: float, fetch: Fetch, sources: list[int]) -> None:
        """Load one batch from a slow tier now and then, since otherwise nothing would show that it has become faster."""
        tier = sources[0]
        if tier != AWAITED and now - self.paces[tier].measured_at > PROBE_SECONDS and not self._running[tier]:
            batch = self._waits.batch_chunks(tier, fetch)
            self._queue(now, fetch, [one for one in sources[:batch] if one == tier])
            self.counters["probes"] += 1

    def _log_decision(self, fetch: Fetch) -> None:
        self.last = fetch.record
        self.effects.append(self.last)

    def _queue(self, now: float, fetch: Fetch, sources: list[int]) -> None:
        """Queue loads of consecutive chunks from one tier each. For chunks that are being loaded already, only wait."""
        at = 0
        while at < len(sources):
            tier, first = sources[at], at
            if tier == AWAITED:
                at += 1
                continue
            most = self._waits.batch_chunks(tier, fetch)
            hashes: list[bytes] = []
            while at < len(sources) and sources[at] == tier and len(hashes) < most:
                key = fetch.hash_of(fetch.first + at)
                at += 1
                pending = self._under_way.get((fetch.wanted.space, key))
                if pending is not None:
                    self._wait(fetch, pending)
                    break
                hashes.append(key)
            if hashes:
                chunk = fetch.first + first
                parent = fetch.hash_of(chunk - 1) if chunk else b""
                request = next(iter(fetch.record.requests), "")
                load = Load(next(self._numbers), tier, fetch.wanted.space, parent, not chunk, b"".join(hashes), request)
                pending = Pending(load, fetch.record.events, self._tiers[tier].name)
                self._queues[tier][load.number] = pending
                self._queued_chunks[tier] += len(hashes)
                self._under_way.update(dict.fromkeys(pending.keys, pending))
                self._wait(fetch, pending)
        for tier in set(sources) - {AWAITED}:
            self._pump(now, tier)

    @staticmethod
    def _wait(fetch: Fetch, pending: Pending) -> None:
        fetch.waiting.add(pending)
        pending.waiters.add(fetch)

    def _end(self, now: float, fetch: Fetch, reason: str) -> None:
        """End a fetch, once. `reason`: why the engine stops waiting; "" if all planned chunks have arrived or failed."""
        fetch.unanswered.clear()
        self._wait_no_longer(fetch)
        for pending in fetch.waiting:
            pending.waiters.discard(fetch)
            if pending.began is None and not pending.waiters:
                self._unqueue(pending)
                self._forget(pending)
        fetch.waiting.clear()
        self.counters["fetches"] += 1
        self.counters["arrived"] += fetch.arrived
        outcome = reason or ("arrived" if fetch.arrived == len(fetch.plan) else "failed")
        self._keep(fetch.end(now, outcome))
        if AWAITED in fetch.record.planned:
            self.counters["awaited"] += fetch.plan[: fetch.arrived].count(AWAITED)
            self.counters[f"awaits:{outcome}"] += 1
        if reason:
            self.counters[f"fetches:{reason}"] += 1
        else:  # the chunks may be evicted, and a new fetch may then load them again
            self.counters["failed"] += len(fetch.plan) - fetch.arrived
            self._drop(fetch)

    def _keep(self, record: FetchRecord) -> None:
        self.records.append(record)
        self.effects.append(Ended(record))

    def _wait_no_longer(self, fetch: Fetch) -> None:
        for asker in fetch.askers:
            self._waited_for[asker].discard(fetch)
            if not self._waited_for[asker]:
                del self._waited_for[asker]

    def _drop(self, fetch: Fetch) -> None:
        del self._fetches[fetch.number]
        del self._by_request[fetch.wanted.key]

    def _unqueue(self, pending: Pending) -> None:
        del self._queues[pending.load.tier][pending.load.number]
        self._queued_chunks[pending.load.tier] -= len(pending.load.hashes) // HASH_BYTES

    def _forget(self, pending: Pending) -> None:
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
