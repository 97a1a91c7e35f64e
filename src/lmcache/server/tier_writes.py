"""Writes to tiers: chunks that have become complete in L1, and again those that full tiers should keep.

`cache.writeback` decides what is written next, and its extents are leased from L1 as the process SERVER while a `TierRunner`
writes them. Everything runs in the loop's thread.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress, takewhile

from lmcache.cache import L1, SERVER, Event
from lmcache.cache.allocator import Space
from lmcache.cache.events import By, Events
from lmcache.cache.fetch import Fetches
from lmcache.cache.touches import Touches
from lmcache.cache.writeback import Batch
from lmcache.chunks import HASH_BYTES, split_hashes
from lmcache.server.loop import Loop
from lmcache.server.tier_contents import shard_keys
from lmcache.server.tier_report import TierReport
from lmcache.server.tier_runner import TierRunner
from lmcache.tiers import KEPT, OK, Shard, ShardKey

USE_SECONDS, _USED_SHARE = 600.0, 8
"""What L1 answers with counts as used in the tiers once in so many seconds, and again when they have stored so small a part of
their shards anew."""
_NEARLY_FULL = 0.8
"""The share of a tier's bound from which on it matters what has been used last."""
_MOST_USED = 65536
"""Chunks that are told to the tiers as used in that time."""
TIER_FAILED = "tier failed"
"""Outcome of the shards of an operation that failed."""
CLEARED = "cleared"
"""Outcome of the shards of a write that ended after a clear of the tier, which removes them again."""
_WRITE = "written", "write_failed"
"""Kinds of events: of good outcomes, and of the others."""


class Writes:
    """The writes to these tiers, nearest first. leaving: tiers that are being removed, and are only given what is queued."""

    def __init__(
        self,
        loop: Loop,
        l1: L1,
        runners: Sequence[TierRunner],
        leaving: Sequence[TierRunner],
        fetches: Fetches,
        report: TierReport,
    ) -> None:
        self._loop, self._l1, self._runners, self._fetches, self._report = loop, l1, runners, fetches, report
        self._leaving = leaving
        self.choosy: list[tuple[TierRunner, Touches]] = []
        """Tiers that are given only what is wanted a second time, and what they have been offered."""
        self.nearly_full: list[TierRunner] = []
        """Tiers that evict soon, by the time of last use."""
        self._used, self._used_until = set[tuple[int, bytes]](), 0.0
        """Chunks that these have been told to be in use, as (space, hash), and when they are told again at the latest."""
        self._written_before: dict[str, int] = {}
        """How many shards each of these had written when `_used` was emptied last."""
        self._drained: Callable[[], None] | None = None
        self._drain_until = 0.0
        self.closed = False
        """Whether nothing more is written."""

    def listen(self) -> None:
        """Write what becomes complete in L1 from now on."""
        self._l1.events.listen(["stored"], self._stored)
        self._l1.events.listen(["cleared"], self._l1_cleared, named=False)

    def tiers_changed(self) -> None:
        """Note that a tier has come or gone."""
        self.choosy = [(one, one.touches) for one in self._runners if one.touches is not None]

    @property
    def _all(self) -> list[TierRunner]:
        return [*self._runners, *self._leaving]

    def _stored(self, event: Event) -> None:
        """Queue chunks that have become complete for every tier that stores; chunks loaded from a tier only for nearer tiers."""
        space = self._l1.space(event.space)
        if space is None:
            return
        chunk_bytes = sum(space.shard_bytes)
        for runner in takewhile(lambda one: one.name != event.tier, self._runners):
            hashes, parents, touches = event.hashes, event.parents, runner.touches
            if touches is not None:
                again = [touches.touch(event.space, one) or bool(event.tier) for one in split_hashes(hashes)]
                hashes, parents = (b"".join(compress(split_hashes(some), again)) for some in (hashes, parents))
            if runner.spec.write != "none" and hashes:
                runner.queue.add(event.space, hashes, parents, chunk_bytes, space.shards)
        self._loop.call_soon(self.pump)  # later, since a listener must not call L1

    def used(self, spaces: Sequence[int], hashes: bytes, chunks: int) -> None:
        """Note that L1 has answered with the first `chunks` chunks. Tiers do not see that, so a full one would lose what all
        prompts begin with before what is seldom used. To store it again is a use of it."""
        if self._drained is not None:
            return
        for space in filter(None, map(self._l1.space, spaces)):
            end, first = chunks, max(0, chunks - space.reach_chunks) if space.reach_chunks else 0
            for runner, touches in self.choosy:
                self._touch(runner, touches, space, hashes, range(first, chunks))
            while (
                self.nearly_full
                and end > first
                and len(self._used) < _MOST_USED
                and (space.number, _hash(hashes, end)) not in self._used
            ):
                self._used.add((space.number, _hash(hashes, end)))
                end -= 1
            # Not what a sister has; and the beginning is stored last, so that it is evicted last.
            own = [at for at in range(chunks, end, -1) if space.table.match(_hash(hashes, at))]
            names, parents = (b"".join(_hash(hashes, at - back) for at in own) for back in (0, 1))
            for runner in self.nearly_full if own else ():
                runner.queue.add_again(space.number, names, parents, sum(space.shard_bytes), space.shards)
                self._loop.call_soon(self.pump)

    def _touch(self, runner: TierRunner, touches: Touches, space: Space, hashes: bytes, found: range) -> None:
        """Give a choosy tier those of the chunks found that are wanted a second time now. `found`: the number of chunks before
        each. What is before a chunk has been touched as often, so the work ends at one that the tier was given."""
        begin = found.stop
        while begin > found.start and not touches.is_wanted(space.number, _hash(hashes, begin)):
            begin -= 1
        own = [
            at
            for at in range(begin + 1, found.stop + 1)
            if space.table.match(_hash(hashes, at)) and touches.touch(space.number, _hash(hashes, at))
        ]
        if own:
            names, parents = (b"".join(_hash(hashes, at - back) for at in own) for back in (0, 1))
            runner.queue.add(space.number, names, parents, sum(space.shard_bytes), space.shards)
            self._loop.call_soon(self.pump)

    def _look_for_full_tiers(self, now: float) -> None:
        """Find the tiers that evict soon, and begin anew to tell them what is used once they have stored much that is newer."""
        usages = [(one, one.usage()) for one in self._runners if one.spec.write == "through"]
        full = [
            (one, told) for one, told in usages if told.max_bytes and told.stored_bytes > _NEARLY_FULL * told.max_bytes
        ]
        self.nearly_full = [one for one, _ in full]
        newer = [
            one.counters["written_shards"] - self._written_before.get(one.name, 0) > told.shards // _USED_SHARE
            for one, told in full
        ]
        if any(newer) or now > self._used_until:
            self._used.clear()
            self._used_until = now + USE_SECONDS
            self._written_before.update({one.name: one.counters["written_shards"] for one, _ in full})

    def _l1_cleared(self, event: Event) -> None:
        """Drop all queued writes."""
        for runner in self._all:
            runner.queue.clear()

    def pump(self) -> None:
        """Begin what may be written now."""
        if self.closed:
            return
        now = self._loop.now()
        for runner in self._all:
            runner.queue.make_ready(self._l1.used_bytes())
            while runner.may_store(now) and runner.writing < runner.write_concurrency:
                batch = runner.queue.take()
                if batch is None:
                    break
                self._write(runner, batch)
        if self._drained is not None and (self.idle or self._loop.now() > self._drain_until):
            drained, self._drained = self._drained, None
            self._report.log_unwritten()
            drained()

    def _write(self, runner: TierRunner, batch: Batch) -> None:
        lease, found, extents = self._l1.hold(self._loop.now(), batch.space, batch.hashes, runner.name)
        batch = runner.queue.still_there(batch, found)
        space = self._l1.space(batch.space)
        if not lease or space is None:
            return
        parents = (parent for parent in split_hashes(batch.parents) for _ in range(space.shards))
        shards = [
            Shard(
                *(key, parent, self._l1.view(sector, space.shard_bytes[key.shard]).toreadonly(), space.kv_dtype),
                rounded_row=space.rounded_row,
            )
            for key, parent, sector in zip(shard_keys(space, batch.hashes), parents, array("I", extents), strict=True)
        ]
        sizes = {one.key: one.payload.nbytes for one in shards}
        generation, chunks = runner.generation, len(batch.hashes) // HASH_BYTES
        runner.chunks_being_written += chunks

        def done(outcomes: list[str] | None, error: Exception | None, seconds: float) -> None:
            runner.chunks_being_written -= chunks
            let_go(one.payload for one in shards)
            self._l1.release(SERVER, lease)
            self._written(runner, batch, sizes, outcomes, generation != runner.generation)
            self.pump()

        runner.store(shards, done)

    def _written(
        self, runner: TierRunner, batch: Batch, sizes: dict[ShardKey, int], outcomes: list[str] | None, cleared: bool
    ) -> None:
        by, reported = (SERVER, runner.name, ""), [TIER_FAILED] * len(sizes) if outcomes is None else outcomes
        if cleared and not self.closed:  # some of the batch may have been stored after the clear
            runner.remove(list(sizes))
            reported = [CLEARED] * len(sizes)
        emit_outcomes(self._l1.events, _WRITE, batch.space, by, list(sizes), reported)
        if outcomes is None:
            runner.queue.put_back(batch)
            return
        for outcome, size in zip(outcomes, sizes.values(), strict=True):
            runner.counters["written_shards"] += outcome == OK
            if outcome in (OK, KEPT):
                runner.counters["kept_shards"] += 1
            else:
                runner.count("unwritten", outcome)
                runner.count("unwritten_bytes", outcome, size)
        if OK in outcomes or KEPT in outcomes:
            self._fetches.kept(batch.space, batch.hashes)

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, and no queued chunk may be written before the drain ends (without a drain: now). A
        tier whose breaker is open counts if its pause ends before that."""
        until = max(self._loop.now(), self._drain_until)
        return all(
            not runner.writing and (not len(runner.queue) or not runner.may_store_by(until)) for runner in self._all
        )

    def drain(self, seconds: float, then: Callable[[], None]) -> None:
        """Write queued chunks for at most `seconds`; call `then` afterwards."""
        for runner in self._all:
            runner.queue.make_all_ready()
        self._report.log_drain(seconds)
        self._drained, self._drain_until = then, self._loop.now() + seconds
        self.pump()

    def tick(self, now: float) -> None:
        self._look_for_full_tiers(now)
        self.pump()


def emit_outcomes(
    events: Events, kinds: tuple[str, str], space: int, by: By, keys: list[ShardKey], outcomes: list[str]
) -> None:
    """Emit an event for each shard number and outcome of a load or a write."""
    found: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
    for key, outcome in zip(keys, outcomes, strict=True):
        found[outcome, key.shard].append(key.chunk)
    for (outcome, shard), chunks in found.items():
        kind, detail = kinds[outcome not in (OK, KEPT)], partial(Event._replace, hashes=b"".join(chunks))
        events.emit(kind, space, len(chunks), outcome, by, detail, shard)


def _hash(hashes: bytes, chunks: int) -> bytes:
    """Return the hash of the last of so many chunks; zeros for none."""
    return hashes[(chunks - 1) * HASH_BYTES : chunks * HASH_BYTES] if chunks else bytes(HASH_BYTES)


def let_go(views: Iterable[memoryview]) -> None:
    """Release these views. A view that a tier has exported cannot be released, and keeps the arena mapped for longer."""
    for one in views:
        with suppress(BufferError):
            one.release()
