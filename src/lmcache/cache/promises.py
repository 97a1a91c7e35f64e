"""Promises: chunks that an engine has announced, so that others can wait for them. No I/O: `now` is an argument.

An announcement is a lookup: an engine that has asked for chunks, has got only some of them, and stores what it computes, promises
the others. The promise of a chunk ends when the chunk is stored, cannot be stored, or is promised by somebody else, who has asked
later. All promises of a request end when it asks again, waits itself or ends, when a process of its engine instance ends, or when
nothing has been stored for longer than computing should take. The oldest promises are dropped beyond `MAX_PROMISED`. An engine
that somebody has waited for in vain promises nothing until it has stored something.

When a chunk should be there follows from the pace that its engine has stated, until the engine begins to fill chunks of the
promise: then it follows from how fast these were computed. The stated pace is a rough one: it is that of earlier steps, with
whatever else ran then. An engine that was faster than it said with its last promises is expected to be so with the next one.

No two requests can wait for each other, whatever the number of engines between them: a request that waits promises nothing, so
whoever is waited for does not wait. An engine that computes nothing while one of its lookups waits (`Asker.halts`) lets that
lookup wait only while the engine has promised nothing. A request waits neither for its own engine nor twice for the same chunk.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from lmcache.chunks import split_hashes

MAX_PROMISED = 16384
"""Chunks."""
MAX_GIVEN_UP = 4096
"""The requests that have ended a wait last, which do not wait for the same chunk again."""
STALL_FACTOR, STALL_SECONDS = 2.0, 1.0
"""A promise ends when no chunk has been stored for so many times the time of computing the chunks that are left, plus seconds for
the engine's queue and the copy."""
UNPACED_SECONDS = 10.0
"""The same if the engine's pace is not known."""

LEAST_HASTE, HASTE_WEIGHT = 0.25, 0.5
"""An engine is expected to take at least this share of the time that it states, and the latest promise has this weight."""

_INSTANT = 1e-9
"""The least seconds for a chunk, so that a pace is not taken for an unknown one."""

Key = tuple[int, bytes]
"""Space and chunk hash."""


class Asker(NamedTuple):
    """Who looks up. request: the engine's id of the request; without one it waits for nobody. engine: the name of an engine that
    stores what it computes, the same in all of its ranks; "" for others. have: number of the first chunk that it lacks itself.
    halts: whether the engine computes nothing while it waits for the answer."""

    process: int
    request: str = ""
    engine: str = ""
    have: int = 0
    halts: bool = False


class Coming(NamedTuple):
    """What engines compute or store now of a prompt, from the first missing chunk on.

    expected_seconds: until all of it should be stored; None if that is not known. barred: there are such chunks, but the asking
    request must not wait for them, which does not concern others that wait for the same chunks. latest_seconds: as
    `expected_seconds`, but no less than the stated pace gives: before that, nobody is late."""

    chunks: int = 0
    expected_seconds: float | None = None
    barred: bool = False
    latest_seconds: float | None = None


NOTHING = Coming()


@dataclass(slots=True, eq=False)
class Promise:
    """The chunks that one request will store. left: those that are not stored yet, with the number of those computed before
    them. chunk_seconds: of computing one chunk, as stated; 0 if unknown. progress: when it was made or a chunk was last stored;
    None until the tick after a chunk was stored. haste: the share of the stated time that the engine has needed lately."""

    instance: str
    asker: Asker
    made: float
    chunk_seconds: float
    left: dict[Key, int]
    progress: float | None
    haste: float = 1.0
    first: tuple[float, int] | None = None
    """When the engine began to fill chunks of this promise, and how many it had computed by then; None if it has not."""
    since: float = field(init=False)
    computed: int = field(default=0, init=False)
    """At this time the engine had computed so many chunks, as far as it has shown."""
    pace: float = field(init=False)
    """The seconds for one chunk, by what has come; 0 if nothing is known of it."""

    def __post_init__(self) -> None:
        self.since, self.pace = self.made, self.chunk_seconds * self.haste

    def shown(self, now: float, key: Key) -> bool:
        """Note that this chunk and those before it are computed, since the engine begins to fill it. Return whether this is news.

        Until the first chunks come, the engine may have been busy with other requests, so that time can only make the stated
        pace faster. The time between chunks can make it slower, too; that of chunks of the same step is next to nothing.
        """
        chunks = self.left.get(key, -1) + 1
        if chunks <= self.computed:
            return False
        first_at, first = self.first = self.first or (now, chunks)
        self.since, self.computed = now, chunks
        self.pace = max(_INSTANT, min((now - self.made) / chunks, self.chunk_seconds or math.inf))
        if chunks > first:
            self.pace = max(self.pace, (now - first_at) / (chunks - first))
        return True

    def expected(self, now: float, key: Key) -> float | None:
        """Return in how many seconds this chunk should be stored, as far as that is known."""
        chunks = self.left[key] + 1 - self.computed
        return max(0.0, self.since + max(0, chunks) * self.pace - now) if self.pace else None

    def stated(self, now: float, key: Key) -> float | None:
        """Return the same at the pace that the engine has stated."""
        return max(0.0, self.made + (self.left[key] + 1) * self.chunk_seconds - now) if self.chunk_seconds else None

    def overdue(self, now: float, key: Key) -> bool:
        """Return whether this chunk should have been stored by now."""
        return now > self.made + ((self.left[key] + 1) * self.chunk_seconds or STALL_SECONDS)

    def stalled(self, now: float) -> bool:
        """Return whether nothing has been stored for too long; asked at every tick."""
        if self.progress is None:
            self.progress = now
        limit = STALL_FACTOR * len(self.left) * self.chunk_seconds + STALL_SECONDS
        return now - self.progress > (limit if self.chunk_seconds else UNPACED_SECONDS)


class Promises:
    """All promises of a server. by_chunk: the promise of each chunk; empty if nothing is promised."""

    def __init__(self) -> None:
        self.by_chunk: dict[Key, Promise] = {}
        self._by_request: OrderedDict[tuple[str, str], Promise] = OrderedDict()
        """(instance, request) -> the promise of this request, the oldest first."""
        self._given_up: OrderedDict[tuple[str, str], Key] = OrderedDict()
        """(instance, request) -> the chunk that this request has stopped to wait for."""
        self._engine_of: dict[str, str] = {}
        """Instance -> the name of its engine, for each instance that has promised anything."""
        self._distrusted = set[str]()
        """Engines that somebody has waited for in vain, and that have stored nothing since."""
        self._haste: dict[str, float] = {}
        """Engine -> the share of the stated time that it has needed for its last promises; of engines that have promised."""
        self._made_by: dict[str, int] = {}
        """Name of an instance or of its engine -> the number of its promises."""

    def make(self, now: float, instance: str, asker: Asker, chunk_seconds: float, places: Mapping[Key, int]) -> None:
        """Promise these chunks, in place of what the request has promised before. places: how many chunks are computed before
        each of them."""
        self.end(instance, asker.request)
        if self._engine_of.get(instance) != asker.engine:
            self._forget_engine_of(instance)
            self._engine_of[instance] = asker.engine
        if asker.engine in self._distrusted:
            return
        promise = Promise(instance, asker, now, chunk_seconds, {}, now, self._haste.get(asker.engine, 1.0))
        for key in islice(places, MAX_PROMISED):
            self._forget(key)
            promise.left[key], self.by_chunk[key] = places[key], promise
        if promise.left:
            self._by_request[instance, asker.request] = promise
            for name in {instance, asker.engine}:
                self._made_by[name] = self._made_by.get(name, 0) + 1
        while len(self.by_chunk) > MAX_PROMISED:
            self.end(*next(iter(self._by_request)))

    def end(self, instance: str, request: str) -> None:
        """End the promise of a request, if it has one."""
        promise = self._by_request.pop((instance, request), None)
        if promise is not None:
            for key in promise.left:
                del self.by_chunk[key]
            for name in {instance, promise.asker.engine}:
                if (left := self._made_by.pop(name) - 1) > 0:
                    self._made_by[name] = left

    def leave(self, instance: str) -> None:
        """End all promises of an engine instance."""
        self.has_stored(instance)
        self._forget_engine_of(instance)
        for one in [one for one in self._by_request if one[0] == instance]:
            self.end(*one)

    def clear(self) -> None:
        self.by_chunk.clear()
        self._by_request.clear()
        self._made_by.clear()

    def tick(self, now: float) -> None:
        """End the promises of which nothing has been stored for too long."""
        for one in [one for one, promise in self._by_request.items() if promise.stalled(now)]:
            self.end(*one)

    def computed(self, now: float, instance: str, key: Key) -> None:
        """Note that this instance begins to fill this chunk, the last one of those that it fills now."""
        promise, engine = self.by_chunk.get(key), self._engine_of.get(instance, "")
        if promise is None or not self.is_own(promise, instance, engine) or not promise.shown(now, key):
            return
        if promise.chunk_seconds:
            taken = (now - promise.made) / (promise.computed * promise.chunk_seconds)
            haste, before = min(1.0, max(LEAST_HASTE, taken)), self._haste.get(engine, 1.0)
            self._haste[engine] = before + HASTE_WEIGHT * (haste - before)

    def kept(self, space: int, hashes: bytes) -> None:
        """Note that these chunks are stored, by whomever."""
        for key in keys_of(space, hashes):
            promise = self.by_chunk.get(key)
            if promise is not None:
                promise.progress = None
                self._forget(key)

    def has_stored(self, instance: str) -> None:
        """Note that this instance has stored chunks, promised or not."""
        if self._distrusted:
            self._distrusted.discard(self._engine_of.get(instance, ""))

    def broken(self, instance: str, space: int, hashes: bytes) -> None:
        """Note that this instance could not store these chunks."""
        for key in keys_of(space, hashes):
            promise = self.by_chunk.get(key)
            if promise is not None and promise.instance == instance:
                self._forget(key)

    def of_engine(self, instance: str, engine: str) -> bool:
        """Return whether this engine has promised anything."""
        return instance in self._made_by or bool(engine and engine in self._made_by)

    @staticmethod
    def is_own(promise: Promise, instance: str, engine: str) -> bool:
        """Return whether the promise is of this engine, in which each rank may be an instance."""
        return promise.instance == instance or bool(engine and promise.asker.engine == engine)

    def give_up(self, now: float, instance: str, request: str, key: Key) -> None:
        """Note that the request stops to wait for this chunk, or does not begin to."""
        promise = self.by_chunk.get(key)
        if promise is not None and promise.overdue(now, key) and len(self._distrusted) < MAX_GIVEN_UP:
            self._distrusted.add(promise.asker.engine)
        self._given_up[instance, request] = key
        self._given_up.move_to_end((instance, request))
        if len(self._given_up) > MAX_GIVEN_UP:
            self._given_up.popitem(last=False)

    def given_up(self, instance: str, request: str) -> Key | None:
        return self._given_up.get((instance, request)) if self._given_up else None

    def __len__(self) -> int:
        """Return the number of requests with a promise."""
        return len(self._by_request)

    def _forget_engine_of(self, instance: str) -> None:
        engine = self._engine_of.pop(instance, None)
        if engine not in self._engine_of.values():
            self._haste.pop(engine or "", None)

    def _forget(self, key: Key) -> None:
        promise = self.by_chunk.pop(key, None)
        if promise is not None:
            del promise.left[key]
            if not promise.left:
                self.end(promise.instance, promise.asker.request)


def keys_of(space: int, hashes: bytes) -> list[Key]:
    return [(space, one) for one in split_hashes(hashes)]
