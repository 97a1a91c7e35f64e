"""How long an engine waits for a fetch: what is known of a fetch, and what follows for its time. No I/O: `now` is an argument.

`cache.fetch` asks whether a plan is worth waiting for, and later whether the wait goes on. The wait ends when every planned chunk
has arrived or failed, when loading would take longer than computing, or when the next chunk is late by more than
`load_cost.slack_seconds`. An awaited chunk is late when computing would have been faster, when it takes twice as long as
expected, or when its promise has ended. So a slow or stalled tier costs a small share of the time that computing takes, and
another engine at most that time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.load_cost import (
    AWAIT_SLACK,
    AWAIT_TOLERANCE,
    UNPACED_QUIET_SECONDS,
    UNPACED_WAIT_SECONDS,
    Pace,
    slack_seconds,
)
from lmcache.cache.promises import Asker, Coming
from lmcache.chunks import HASH_BYTES, split_hashes

ASK_SECONDS = 0.5
"""A fetch goes on without the tiers that have not answered by then."""
MAX_REQUESTS = 8
"""A record names at most so many request ids."""
MAX_WAITING = 1024
"""A fetch for which more requests wait than these is not ended when they have ended."""
AWAITED = -1
"""In place of the number of a tier: another engine computes or stores the chunk."""
NO_GAIN, BROKEN = "not worth it", "promise ended"
REMOVED, PAUSED = "removed", "paused"
"""Why a tier was left out: an operator has removed it while the fetch was under way, or has paused it."""
_BATCH_SECONDS = 0.03
_FIRST_BATCH_BYTES = 4 << 20
_FAIR_TRY = 0.25
"""The share of the computing time for which a fetch waits for a tier whose pace is not known yet."""


class TierTraits(NamedTuple):
    """Properties of a tier for planning. usable(now): whether it may be asked now. batch_shards: the most of one load. name: of
    the tier, in events. why_not(): why it may not be asked, where `usable` says so."""

    batch_bytes: int
    concurrency: int
    usable: Callable[[float], bool]
    batch_shards: int
    name: str = ""
    why_not: Callable[[], str] = lambda: "not serving"


class Wanted(NamedTuple):
    """Chunks of one space that a request wants. chunk_bytes, chunk_shards: all shards of one chunk. prefill_seconds: in which the
    request's engine computes one chunk; 0 if unknown."""

    space: int
    hashes: bytes
    chunk_bytes: int
    chunk_shards: int = 1
    prefill_seconds: float = 0.0
    asker: Asker = Asker(0)

    @property
    def key(self) -> tuple[int, bytes]:
        """The space and the hash of the last chunk, which identify the chunks."""
        return self.space, self.hashes[-HASH_BYTES:]


@dataclass(slots=True, eq=False)
class FetchRecord:
    """A fetch: the chunks asked for, the decision with its numbers, and, once it has ended, the outcome."""

    prompt: bytes
    """Hash of the last chunk asked for."""
    space: int
    asked_chunks: int
    l1_chunks: int
    """L1 had so many leading chunks when the fetch began."""
    recompute_seconds: float | None
    """Time to compute the same chunks (all missing ones if no tier had any); None if the engine's pace was unknown."""
    requests: tuple[str, ...] = ()
    """The engines' ids of the requests, as far as they were given."""
    planned: Counter[int] = field(default_factory=Counter)
    """Tier -> number of chunks to be loaded from it. `AWAITED` -> number of chunks to be stored by other engines."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Tier -> why it was not asked, or its answer not used."""
    expected_seconds: float | None = None
    """Expected time of the load; None if a tier's pace was unknown, or no tier had a chunk."""
    decision: str = ""
    """`load`, `not worth it`, or "" if there was nothing to decide. Waiting for another engine counts as a load."""
    waited_seconds: float = 0.0
    outcome: str = ""
    """arrived, failed (planned chunks did not arrive), absent, not worth it, late, patience, too many, promise ended, or
    withdrawn."""
    arrived_chunks: int = 0
    """Chunks that the fetch added to those that were in L1 at its beginning."""
    ended: float = math.inf
    events: Counter[str] = field(default_factory=Counter)
    """Events of the chunks whose loads this fetch has begun, as `kind` or `kind:reason`: stored, evicted (chunks), and refused,
    dropped, load_failed (shards). Events after the end of the fetch are added, too."""


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


@dataclass(eq=False)
class Fetch:
    number: int
    wanted: Wanted
    """The first request that waits has asked for this."""
    first: int
    """The number of leading chunks that were in L1 at the beginning."""
    began: float
    coming: Coming
    """The chunks that other engines were storing when the fetch began."""
    since: float
    """When the wait for other engines began, in this fetch or in the one before it."""
    askers: set[tuple[int, str]] = field(default_factory=set)
    """The requests that wait, with their processes; requests without an id count as one."""
    unanswered: set[int] = field(default_factory=set)
    has: dict[int, Sequence[bool]] = field(default_factory=dict)
    """Tier -> which of the missing chunks it has."""
    plan: list[int] = field(default_factory=list)
    """The source of each chunk, from `first` on; `record.planned` counts them by source."""
    in_l1: int = 0
    """L1 had so many leading chunks at the last `poll`."""
    asked_at: float = 0.0
    """Time of the last `poll`."""
    due: list[float | None] = field(default_factory=list)
    """When each planned chunk is expected, in seconds after `began`; None while a tier's pace is unknown."""
    waiting: set[Pending] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.progress = self.began
        """When a chunk arrived last."""
        chunks, seconds = len(self.wanted.hashes) // HASH_BYTES, self.recompute_missing_seconds
        self.record = FetchRecord(self.hash_of(chunks - 1), self.wanted.space, chunks, self.first, seconds or None)

    def hash_of(self, chunk: int) -> bytes:
        return self.wanted.hashes[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES]

    @property
    def is_open(self) -> bool:
        return self.record.ended == math.inf

    @property
    def missing(self) -> int:
        return len(self.wanted.hashes) // HASH_BYTES - self.first

    @property
    def arrived(self) -> int:
        """Return how many planned chunks L1 had at the last `poll`."""
        return min(max(0, self.in_l1 - self.first), len(self.plan))

    @property
    def recompute_missing_seconds(self) -> float:
        """The time that the engine would need to compute all missing chunks; 0 if unknown."""
        return self.wanted.prefill_seconds * self.missing

    @property
    def recompute_seconds(self) -> float:
        """The time that the engine would need to compute the chunks that the fetch brings; 0 if unknown."""
        chunks = self.record.planned.total()
        if AWAITED in self.record.planned:  # an engine that waits for another one does so for what it lacks itself
            chunks = max(1, min(chunks, self.first + chunks - self.wanted.asker.have))
        return self.wanted.prefill_seconds * chunks

    def asked(self, now: float, in_l1: int, asker: Asker) -> tuple[int, str]:
        """Note a `poll`. Return the element of `askers` that stands for its request."""
        process, request, record = asker.process, asker.request, self.record
        known = (process, request) in self.askers or len(self.askers) < MAX_WAITING
        waiter = (process, request if known else "")
        self.askers.add(waiter)
        if in_l1 > self.in_l1:
            self.progress = now
        self.asked_at, self.in_l1 = now, in_l1
        if request and request not in record.requests and len(record.requests) < MAX_REQUESTS:
            record.requests += (request,)
        return waiter

    def end(self, now: float, outcome: str) -> FetchRecord:
        """Complete the record."""
        record, record.ended, record.outcome = self.record, now, outcome
        record.waited_seconds = (self.asked_at if outcome == "patience" else now) - self.began
        record.arrived_chunks = self.arrived
        return record

    def decided(self, expected: float | None, recompute: float | None, good: bool) -> None:
        self.record.expected_seconds, self.record.recompute_seconds = expected, recompute
        self.record.decision = "load" if good else NO_GAIN


@dataclass(eq=False)
class Pending:
    """A load. began: time of its beginning; None while it is queued. events: of the fetch that has begun it."""

    load: Load
    events: Counter[str]
    tier_name: str = ""
    waiters: set[Fetch] = field(default_factory=set)
    began: float | None = None

    @property
    def keys(self) -> list[tuple[int, bytes]]:
        return [(self.load.space, key) for key in split_hashes(self.load.hashes)]


class Waits:
    """How long engines wait for fetches from these tiers, and for each other. The arguments are as in `Fetches`."""

    def __init__(self, tiers: Mapping[int, TierTraits], always: bool, patience_seconds: float) -> None:
        self.paces: dict[int, Pace] = {}
        """By the number of the tier. `Fetches` adds and removes them."""
        self.patience_seconds = patience_seconds
        self._tiers, self._always = tiers, always

    @staticmethod
    def may_await_again(fetch: Fetch, request: str) -> bool:
        """Return whether this fetch has ended and leaves it open to wait for what is coming: it knew of nothing, has decided for
        others, whose engine may be faster, or has lost a promise that somebody else may have renewed."""
        if fetch.is_open:
            return False
        if fetch.record.outcome == NO_GAIN and fetch.coming.chunks:
            return request not in fetch.record.requests
        return not fetch.coming.chunks or fetch.record.outcome == BROKEN

    def goes_on(self, now: float, fetch: Fetch, wanted: Wanted, in_l1: int, coming: Coming) -> bool:
        """Return whether the asking request does not wait for the engine that the fetch waits for next, while others may: it must
        not, has those chunks, or computes them sooner than they should come, or in less time than they are overdue."""
        at = max(0, in_l1 - fetch.first)
        if not fetch.is_open or at >= len(fetch.plan) or fetch.plan[at] != AWAITED:
            return False
        left = fetch.first + len(fetch.plan) - wanted.asker.have
        if coming.barred or left <= 0:
            return True
        own, early = wanted.prefill_seconds * left, fetch.began + (fetch.due[at] or 0.0) - now
        faster = not self._always and 0 < own < (fetch.recompute_seconds or math.inf)
        return faster and abs(early) > AWAIT_TOLERANCE * own + AWAIT_SLACK * slack_seconds(own)

    def too_slow_to_ask(self, tier: int, fetch: Fetch) -> bool:
        """Return whether the tier's answer alone is expected to take longer than computing all missing chunks."""
        ask, recompute = self.paces[tier].ask_seconds, fetch.recompute_missing_seconds
        return not self._always and bool(recompute) and ask is not None and ask > recompute

    def ask_patience(self, fetch: Fetch) -> float:
        """Return how long to wait for answers: twice the measured time of the slowest tier (if that is unknown, a share of the
        computing time), plus the slack."""
        if self._always:
            return self.patience_seconds
        if not fetch.wanted.prefill_seconds:
            return ASK_SECONDS
        recompute = fetch.recompute_missing_seconds
        seen = [self.paces[tier].ask_seconds for tier in fetch.unanswered]
        expected = max(recompute * _FAIR_TRY if ask is None else 2 * ask for ask in seen)
        return min(ASK_SECONDS, expected + slack_seconds(recompute))

    def _due(self, asked: float, fetch: Fetch, sources: list[int], queued: Mapping[int, int]) -> list[float | None]:
        """Return when each chunk is expected. The chunks of a batch arrive together, and concurrent batches may end together."""
        total, ahead = Counter(sources), Counter[int]()
        due: list[float | None] = []
        for tier in sources:
            if tier == AWAITED:
                due.append(fetch.coming.expected_seconds)
                continue
            batch = self.batch_chunks(tier, fetch)
            last = (ahead[tier] // batch + self._tiers[tier].concurrency) * batch
            size = (min(last, total[tier]) + queued[tier]) * fetch.wanted.chunk_bytes
            ahead[tier] += 1
            seconds = self.paces[tier].expected_seconds(size)
            due.append(None if seconds is None else asked + seconds)
        return due

    def batch_chunks(self, tier: int, fetch: Fetch) -> int:
        """Return the most chunks of one load: those that arrive within `_BATCH_SECONDS`, to show progress, up to a full batch."""
        rate, traits = self.paces[tier].bytes_per_second, self._tiers[tier]
        most = _FIRST_BATCH_BYTES if rate is None else int(rate * _BATCH_SECONDS)
        by_size = min(traits.batch_bytes, most) // fetch.wanted.chunk_bytes
        return max(1, min(by_size, traits.batch_shards // fetch.wanted.chunk_shards))

    def worth_it(self, now: float, fetch: Fetch, sources: list[int], queued: Mapping[int, int]) -> bool:
        """Decide whether to wait for these sources, and note that in the record. queued: chunks by tier that wait already."""
        fetch.record.planned = Counter(sources)
        fetch.due = due = self._due(now - fetch.began, fetch, sources, queued)
        recompute = fetch.recompute_seconds or None
        known = [one for one in due if one is not None]
        expected = max(known) if len(known) == len(due) else None
        good = self._always or recompute is None or expected is None or expected < recompute
        if recompute is not None and AWAITED in sources and not good:
            good = expected is not None and expected <= AWAIT_TOLERANCE * recompute
        fetch.decided(expected, recompute, good)
        return good

    def why_end(self, now: float, fetch: Fetch, coming: Coming) -> str | None:
        """Return why the wait for this fetch ends now: "" if all planned chunks have arrived or failed. None if it goes on.
        coming: what other engines are storing now."""
        awaits = fetch.arrived < len(fetch.plan) and fetch.plan[fetch.arrived] == AWAITED
        if fetch.arrived >= len(fetch.plan) or not (awaits or fetch.waiting):
            return ""
        if awaits and not coming.chunks:
            return BROKEN
        return "late" if self._is_late(now, fetch, awaits) else None

    def is_forgotten(self, now: float, fetch: Fetch) -> bool:
        """Return whether the fetch has lasted too long. A wait for another engine may take as long as computing, as `why_end`
        decides while somebody asks."""
        awaits = AWAITED in fetch.plan and now - fetch.asked_at < self.patience_seconds
        return now - fetch.began > self.patience_seconds and not awaits

    def _is_late(self, now: float, fetch: Fetch, awaits: bool) -> bool:
        if not awaits:
            return now - fetch.began > self._patience(fetch)
        due = fetch.coming.latest_seconds
        if due is not None and fetch.coming.expected_seconds is not None:
            due = max(due, fetch.coming.expected_seconds)
        if not fetch.wanted.prefill_seconds:  # an engine that has only decoded so far: the other one's pace has to do
            quiet_until = min(fetch.began + 2 * (due or 0.0), fetch.progress + UNPACED_QUIET_SECONDS)
            return now - max(fetch.progress, quiet_until) > UNPACED_WAIT_SECONDS
        recompute = fetch.recompute_seconds
        slack = AWAIT_SLACK * slack_seconds(recompute)
        own = recompute if due is None else max(2 * due, _FAIR_TRY * recompute)
        return now - fetch.since > recompute + slack or now - fetch.began > own + slack

    def _patience(self, fetch: Fetch) -> float:
        """Return how long after the beginning the next chunk may arrive, in seconds."""
        if self._always or not fetch.wanted.prefill_seconds:
            return self.patience_seconds
        due = fetch.due[fetch.arrived]
        slack = slack_seconds(fetch.wanted.prefill_seconds * len(fetch.plan))
        if due is None:  # the first load of a tier
            due = fetch.wanted.prefill_seconds * max(fetch.arrived + 1, _FAIR_TRY * len(fetch.plan))
        return min(self.patience_seconds, due + slack)
