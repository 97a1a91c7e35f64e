"""Tiering connects L1 with the tiers: it loads chunks for lookups, and `tier_writes` writes chunks that have become complete.
Lookups also wait for chunks that other engines compute.

`cache.fetch` decides, and this module carries out its effects. It reserves extents in L1 as the process SERVER, a `TierRunner`
for each tier moves the bytes, and the outcomes are reported back. Everything runs in the loop's thread.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache.cache import L1, SERVER, Refusal
from lmcache.cache.allocator import Space
from lmcache.cache.events import Event
from lmcache.cache.fetch import Ask, Ended, Fetches
from lmcache.cache.groups import longest_prefix
from lmcache.cache.promises import NOTHING, Asker, Coming
from lmcache.cache.waits import ASK_SECONDS, FetchRecord, Load, TierTraits, Wanted
from lmcache.chunks import HASH_BYTES, split_hashes
from lmcache.errors import ConfigError
from lmcache.memory.slabs import NO_EXTENT
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.server.tier_contents import (
    EarlierEnds,
    complete_chunks,
    known_chunks,
    known_splits,
    most_asked,
    shard_keys,
)
from lmcache.server.tier_report import TierReport, log_decision
from lmcache.server.tier_runner import CLOSE_SECONDS, OPEN_SECONDS, TierRunner
from lmcache.server.tier_writes import TIER_FAILED, Writes, emit_outcomes, let_go
from lmcache.tiers import OK, Region, ShardKey, TierError

if TYPE_CHECKING:
    from lmcache.tiers.registry import TierSpec  # imports what only servers with tiers need

logger = init_logger(__name__)
_HURRY_SECONDS = 0.5
"""How long the end waits after a second signal; a tier that does not hang closes in that time."""
_MOST_ENDS = 8
"""How many earlier ends a lookup tries: what tiers say they have may fail to load at each of them."""
_MOST_AWAITED_ENDS = 64
"""The same for ends at which other engines are about to store what all groups need."""
_SHARE = 0.25
"""Of the time of computing a prompt, for which a lookup waits to hear where an earlier end is."""
_TOO_LATE = "too late"
"""Outcome of the shards of a load that ended after its reservations had expired."""
_LOAD = "loaded", "load_failed"
"""Kinds of events: of good outcomes, and of the others."""


@dataclass(frozen=True)
class _Part:
    """One rank's part of a load: reserved extents at `sectors`, for the shards `keys`."""

    reservation: int
    keys: list[ShardKey]
    sectors: list[int]
    shard_bytes: int


class Tiering:
    """All tiers of one server, nearest first.

    always, patience_seconds: as for `Fetches`. queue_bytes: bound of the write queue of each tier.
    """

    def __init__(
        self,
        loop: Loop,
        l1: L1,
        specs: Sequence[TierSpec],
        *,
        chunk_tokens: int,
        always: bool,
        patience_seconds: float,
        queue_bytes: int,
    ) -> None:
        self._loop, self._l1 = loop, l1
        self._chunk_tokens, self._always, self._patience_seconds = chunk_tokens, always, patience_seconds
        self.runners = [TierRunner(loop, spec, queue_bytes, l1.total_bytes) for spec in specs]
        traits = [
            TierTraits(one.tier.batch_bytes, one.tier.concurrency, one.usable, one.tier.batch_shards, one.name)
            for one in self.runners
        ]
        self.fetches = Fetches(traits, always, patience_seconds)
        self._earlier_ends = EarlierEnds(self.runners, patience_seconds)
        self.report = TierReport(loop.now, self.runners, self.fetches, chunk_tokens)
        self.writes = Writes(loop, l1, self.runners, self.fetches, self.report)
        self.sources = self.runners, l1.promises.by_chunk, l1.reservations, self.fetches.numbered
        """If all are empty, neither tiers nor other engines can bring anything into L1 for a lookup."""
        self._region: Region | None = None
        self._late_loads = set[int]()
        """Numbers of loads that are still running after their deadline."""
        self._interrupts = 0
        self.on_clear: list[Callable[[], None]] = []
        """Called when a tier is being emptied."""
        loop.on_tick.append(self._tick)
        if specs:
            l1.events.listen(["stored", "refused", "dropped", "evicted", "load_failed"], self.fetches.heard)

    def attach(self, region: Region) -> None:
        """Attach all tiers to the memory that their operations will use. Call this before `open`."""
        self._region = region
        for runner in self.runners:
            runner.tier.attach(region)

    def open(self, required: bool) -> None:
        """Open all tiers concurrently; `interrupt` ends the wait.

        Raises:
            ConfigError: `required` is set, and a tier could not be opened in time.
        """
        opened: dict[TierRunner, Exception | None] = {}
        for runner in self.runners:
            if runner.spec.warning:
                logger.warning("%s", runner.spec.warning)
            runner.open(partial(opened.__setitem__, runner))
        self._loop.run_until(lambda: len(opened) == len(self.runners) or self._interrupts > 0, OPEN_SECONDS)
        if self._interrupts:
            return
        late = TimeoutError(f"not open after {OPEN_SECONDS:.0f} s")
        for runner in self.runners:
            error = opened.get(runner, late)
            if error is not None and required:
                raise ConfigError(f"--l2 {runner.spec.url}: {error} (--l2-required is set)")
            runner.opened(error)
            if error is None:
                logger.info("Tier %s: %s, write=%s", runner.name, runner.spec.url, runner.spec.write)

    # Reading

    def answered(
        self, asker: Asker, spaces: Sequence[int], hashes: bytes, chunks: int, prefill_tokens_per_second: float
    ) -> None:
        """Note that the request goes on with the first `chunks` chunks, and computes the others. Announce these if its engine
        stores them."""
        promises = self._l1.promises
        if chunks * HASH_BYTES < len(hashes) and asker.engine and asker.request:
            self._l1.announce(
                self._loop.now(), asker, spaces, hashes, chunks, self._chunk_seconds(prefill_tokens_per_second)
            )
        elif promises.by_chunk:
            promises.end(self._l1.instance_name(asker.process), asker.request)

    def _chunk_seconds(self, prefill_tokens_per_second: float) -> float:
        return self._chunk_tokens / prefill_tokens_per_second if prefill_tokens_per_second > 0 else 0.0

    def knows(self, space: int, hashes: bytes, sisters: bool = False) -> bool:
        """Return whether a fetch of these chunks, or of one of their parts, is under way or has just ended; with `sisters`, in
        the space or a sister of it."""
        return len(self.fetches.numbered) > 0 and any(
            self._any_part(self.fetches.knows, one, hashes) for one in self._family(space, sisters)
        )

    @staticmethod
    def _any_part(holds: Callable[[int, bytes], bool], space: Space, hashes: bytes) -> bool:
        return any(holds(space.number, hashes[:end]) for end in _ends(space, len(hashes)))

    def _family(self, number: int, sisters: bool) -> list[Space]:
        space = self._l1.space(number)
        return [] if space is None else [space, *(space.sisters if sisters else ())]

    def wait_for(
        self,
        asker: Asker,
        spaces: Sequence[int],
        hashes: bytes,
        prefill_tokens_per_second: float,
        sisters: bool = False,
    ) -> tuple[int, int]:
        """Return how many leading chunks are in L1, and how many more the engine should wait for.

        spaces: of all groups of the model. Those without a reach are asked first, for all chunks; the others then for the last
        chunks before the end of what the first ones have, or before the next earlier end at which all of them are there.
        sisters: whether the engine can use what sisters of the spaces have.

        Raises:
            Refusal: unknown space or process.
        """
        in_l1, coming = self._wait_for_all(asker, spaces, hashes, prefill_tokens_per_second, sisters)
        if coming:  # who waits promises nothing, so that nobody waits for it
            self._l1.promises.end(self._l1.instance_name(asker.process), asker.request)
        return in_l1, coming

    def _wait_for_all(
        self, asker: Asker, spaces: Sequence[int], hashes: bytes, prefill_tokens_per_second: float, sisters: bool
    ) -> tuple[int, int]:
        reaches = {number: space.reach_chunks for number in spaces if (space := self._l1.space(number)) is not None}
        chunks, agreed, rate = len(hashes) // HASH_BYTES, 0, prefill_tokens_per_second
        tries, awaited = _MOST_ENDS, self._awaited_end(asker, reaches, hashes)
        queue = deque(sorted(spaces, key=lambda one: reaches.get(one, 0) > 0))
        while chunks and agreed < len(queue):  # each round either shortens the prefix or is the last one
            number, reach = queue[0], reaches.get(queue[0], 0)
            first = max(0, chunks - reach) if reach else 0
            needed = hashes[first * HASH_BYTES : chunks * HASH_BYTES]
            # Without these chunks, all `chunks` would have to be computed.
            mine = asker._replace(have=max(0, asker.have - first))
            in_l1, coming = self._wait_for(
                mine, number, needed, rate * (chunks - first) / chunks, sisters, awaited - first
            )
            if coming:
                return first + in_l1, coming
            end, agreed = first + in_l1, agreed + 1
            if end < chunks and not reach:
                agreed = 1
            elif end < chunks:
                agreed, tries = 0, tries - 1
                earlier = self._earlier_end(number, hashes[: chunks * HASH_BYTES], rate) if tries else 0
                if earlier is None:
                    return end, chunks - end
                end = earlier
            chunks = end
            queue.rotate(-1)
        return chunks, 0

    def _awaited_end(self, asker: Asker, reaches: dict[int, int], hashes: bytes) -> int:
        """Return the end of the longest prefix that all groups have, once other engines have stored what they store now. Nobody
        waits for chunks behind it."""
        l1, now, comes, short = self._l1, self._loop.now(), False, 0
        chunks, numbers = len(hashes) // HASH_BYTES, list(reaches)
        if not (l1.promises.by_chunk or l1.open_reservations):
            return 0
        if len(reaches) == 1:
            return chunks

        def end_of(group: int, first: int, end: int) -> int:
            nonlocal comes, short
            needed = hashes[first * HASH_BYTES : end * HASH_BYTES]
            have = l1.peek(now, asker.process, numbers[group], needed)
            coming = l1.coming(now, asker, numbers[group], needed, have).chunks
            comes, short = comes or coming > 0, short + (first + have + coming < end)
            # If nothing comes, the lookup itself finds an earlier end, with less work.
            return first + have + coming if short <= (_MOST_AWAITED_ENDS if comes else len(numbers)) else 0

        return longest_prefix(list(reaches.values()), chunks, end_of)

    def _earlier_end(self, number: int, hashes: bytes, prefill_tokens_per_second: float) -> int | None:
        """Return as `EarlierEnds.last`. Waiting for it takes a small part of the time of computing the chunks."""
        space = self._l1.space(number)
        if space is None or not all(space.shard_bytes):
            return 0
        wait = self._patience_seconds if self._always else ASK_SECONDS
        if prefill_tokens_per_second > 0 and not self._always:
            tokens = len(hashes) // HASH_BYTES * self._chunk_tokens
            wait = min(wait, _SHARE * tokens / prefill_tokens_per_second)
        return self._earlier_ends.last(self._loop.now(), space, hashes, wait)

    def _wait_for(
        self,
        asker: Asker,
        space_number: int,
        hashes: bytes,
        prefill_tokens_per_second: float,
        sisters: bool,
        awaited: int,
    ) -> tuple[int, int]:
        """Return how many leading chunks are in L1, and how many more of this group to wait for. awaited: only chunks before this
        one are awaited from other engines."""
        in_l1 = self._l1.peek(self._loop.now(), asker.process, space_number, hashes, sisters)
        seconds = self._chunk_seconds(prefill_tokens_per_second)
        family = self._family(space_number, sisters)  # sisters for what the tiers do not have of the space itself
        for space in family[self._first_to_poll(family, hashes) :]:
            coming = self._poll(asker, space, hashes, in_l1, seconds, awaited)
            if coming:
                return in_l1, coming
        missing = hashes[in_l1 * HASH_BYTES :]
        if sisters and missing and self._discover(family[0], missing[:HASH_BYTES]):
            return self._wait_for(asker, space_number, hashes, prefill_tokens_per_second, sisters, awaited)
        return in_l1, 0

    def _first_to_poll(self, family: Sequence[Space], hashes: bytes) -> int:
        """Return the place in the family of the first fetch that is under way, else of the last one that has just ended, else 0:
        a fetch that has failed is forgotten, and must not begin again while the lookup waits for those after it."""
        places, fetches = range(len(family)), self.fetches
        under_way = (at for at in places if self._any_part(fetches.is_open, family[at], hashes))
        ended = (at for at in reversed(places) if self._any_part(fetches.knows, family[at], hashes))
        return next(under_way, next(ended, 0))

    def _discover(self, space: Space, chunk: bytes) -> bool:
        """Open the sisters of splits that have stored this chunk in a tier before this server's start, as far as tiers know that
        without I/O. Return whether there are any."""
        before = len(self._l1.spaces)
        for split in known_splits(self.runners, space, chunk) if all(space.shard_bytes) else ():
            with suppress(Refusal):
                self._l1.open_sister(space.number, split)
        return len(self._l1.spaces) > before

    def _poll(self, asker: Asker, space: Space, hashes: bytes, in_l1: int, prefill_seconds: float, awaited: int) -> int:
        """Return how many chunks of this space the engine should wait for."""
        if not all(space.shard_bytes):
            return 0
        now, coming, knowers = self._loop.now(), 0, [partial(known_chunks, one, space) for one in self.runners]
        for end in _ends(space, len(hashes)):
            part, found = hashes[:end], min(in_l1, end // HASH_BYTES)
            stored_next = self._coming(asker, space.number, part, found, awaited)
            if self.runners or stored_next.chunks or self.fetches.knows(space.number, part):
                wanted = Wanted(space.number, part, sum(space.shard_bytes), space.shards, prefill_seconds, asker)
                coming = self.fetches.poll(now, wanted, found, knowers, stored_next)
            if stored_next.chunks and not coming:
                missing = part[found * HASH_BYTES : (found + 1) * HASH_BYTES]
                name = self._l1.instance_name(asker.process)
                self._l1.promises.give_up(now, name, asker.request, (space.number, missing))
            if found * HASH_BYTES < len(part):
                break
        self._carry_out()
        return coming

    def _coming(self, asker: Asker, space_number: int, hashes: bytes, in_l1: int, awaited: int) -> Coming:
        """Return what other engines store next of these chunks, if the engine lacks it itself."""
        now, end = self._loop.now(), min(awaited, len(hashes) // HASH_BYTES)
        if self.fetches.is_open(space_number, hashes):  # then it matters only whether the next chunk is still coming
            found = self._l1.coming(now, asker, space_number, hashes[: (in_l1 + 1) * HASH_BYTES], in_l1)
            return found if end > in_l1 or not found.chunks else Coming(barred=True)
        if end <= in_l1:
            return NOTHING
        found = self._l1.coming(now, asker, space_number, hashes[: end * HASH_BYTES], in_l1)
        return found if found.barred or in_l1 + found.chunks > asker.have else NOTHING

    def _carry_out(self) -> None:
        while self.fetches.effects and not self.writes.closed:
            effect = self.fetches.effects.pop(0)  # removed first, so that a failing effect does not repeat
            if isinstance(effect, Ask):
                self._ask(effect)
            elif isinstance(effect, Load):
                self._load(effect)
            elif isinstance(effect, Ended):
                self._tell(effect.record)
            else:
                log_decision(effect)

    def _tell(self, fetch: FetchRecord) -> None:
        requests = next(iter(fetch.requests), "")
        missing = fetch.asked_chunks - fetch.l1_chunks
        self._l1.events.tell(
            Event("fetched", fetch.space, missing, fetch.outcome, SERVER, request=requests, fetch=fetch)
        )

    def _ask(self, ask: Ask) -> None:
        runner, space = self.runners[ask.tier], self._l1.space(ask.space)
        if space is None:
            self.fetches.answered(self._loop.now(), ask.fetch, ask.tier, None, 0.0)
            return
        keys, shards = shard_keys(space, ask.hashes), space.shards

        def done(present: list[bool] | None, error: Exception | None, seconds: float) -> None:
            complete = None if present is None else complete_chunks(present, shards)
            self.fetches.answered(self._loop.now(), ask.fetch, ask.tier, complete, seconds)
            self._carry_out()

        runner.contains(keys, self._patience_seconds, done)

    def _load(self, load: Load) -> None:
        runner, parts = self.runners[load.tier], self._reserve(load)
        if not parts:
            self._loop.call_soon(lambda: self._loaded(load, [], None))
            return
        keys, by = [key for part in parts for key in part.keys], (SERVER, runner.name, load.request)
        into = [self._l1.view(sector, part.shard_bytes) for part in parts for sector in part.sectors]

        paced = runner.tier.is_paced(keys)

        def late() -> None:  # the reservations have expired, so what arrives from now on is not used
            self._late_loads.add(load.number)
            runner.count("missed", _TOO_LATE, len(keys))
            emit_outcomes(self._l1.events, _LOAD, load.space, by, keys, [_TOO_LATE] * len(keys))
            self.fetches.late(load)

        def done(outcomes: list[str] | None, error: Exception | None, seconds: float) -> None:
            let_go(into)
            self._loaded(load, parts, outcomes, paced)

        runner.load(keys, into, self._l1.claim_seconds, late, done)

    def _reserve(self, load: Load) -> list[_Part]:
        """Reserve extents for a load. Shards that are in L1 or being filled already are left out."""
        space, parts = self._l1.space(load.space), []
        if space is None:
            return []
        for shard in range(space.shards):
            now, tier = self._loop.now(), self.runners[load.tier].name
            try:
                grant = self._l1.reserve(
                    now, SERVER, load.space, shard, load.parent, load.root, load.hashes, tier, load.request
                )
            except Refusal:  # no memory can be allocated for extents
                continue
            if not grant.reservation:
                continue
            sectors = array("I", grant.extents)
            keys = [
                ShardKey(space.fingerprint, chunk, shard, space.shards)
                for chunk, sector in zip(split_hashes(load.hashes), sectors, strict=True)
                if sector != NO_EXTENT
            ]
            extents = [sector for sector in sectors if sector != NO_EXTENT]
            parts.append(_Part(grant.reservation, keys, extents, space.shard_bytes[shard]))
        return parts

    def _loaded(self, load: Load, parts: list[_Part], outcomes: list[str] | None, paced: bool = True) -> None:
        """Commit the shards that have arrived. outcomes: one for each shard; None if the tier failed. paced: whether its time
        shows how fast the tier is."""
        runner, at, good_bytes = self.runners[load.tier], 0, 0
        by = SERVER, runner.name, load.request
        for part in parts:
            own = outcomes[at : at + len(part.sectors)] if outcomes is not None else [TIER_FAILED] * len(part.sectors)
            at += len(part.sectors)
            failed = {sector for sector, outcome in zip(part.sectors, own, strict=True) if outcome != OK}
            try:
                self._l1.commit(self._loop.now(), SERVER, part.reservation, len(failed) < len(own), failed)
            except Refusal:  # the reservation has expired, and others may be filling the chunks
                failed, own = set(part.sectors), [_TOO_LATE] * len(own)
            good = len(own) - len(failed)
            good_bytes += good * part.shard_bytes
            runner.counters["loaded_shards"] += good
            if load.number not in self._late_loads:
                emit_outcomes(self._l1.events, _LOAD, load.space, by, part.keys, own)
                for outcome in own:
                    if outcome != OK:
                        runner.count("missed", outcome)
        self._late_loads.discard(load.number)
        runner.counters["loaded_bytes"] += good_bytes
        self.fetches.loaded(self._loop.now(), load, None if (outcomes is None or not paced) and parts else good_bytes)
        self._carry_out()

    # Clearing and closing

    def clear(self, names: set[str] | None, done: Callable[[dict[str, str]], None]) -> None:
        """Empty these tiers (None: all); `done` gets the failures, as name -> reason.

        Queued writes are dropped, and what running writes store is removed.
        """
        chosen = [runner for runner in self.runners if names is None or runner.name in names]
        left = {runner.name for runner in chosen}
        wrong: dict[str, str] = {}
        if not chosen:
            done(wrong)
            return

        def cleared(runner: TierRunner, result: None, error: Exception | None, seconds: float = 0.0) -> None:
            left.discard(runner.name)
            if error is None:
                logger.info("Tier %s cleared", runner.name)
            else:
                wrong[runner.name] = runner.breaker.reason or str(error)
                logger.warning("Tier %s could not be cleared: %s", runner.name, wrong[runner.name])
            if not left:
                done(wrong)

        for runner in chosen:
            runner.queue.clear()
            runner.generation += 1
            for listener in self.on_clear:
                listener()
            if runner.breaker.closed:
                runner.clear(partial(cleared, runner))
            else:  # report the reason for which the tier does not serve
                cleared(runner, None, TierError("open", "it does not serve"))

    def interrupt(self) -> int:
        """Note a signal: the first ends the wait in `open`, the second that in `close`. Returns the number of signals so far."""
        self._interrupts += 1
        self._loop.call_soon(lambda: None)  # wakes the loop, which then checks whether to go on waiting
        return self._interrupts

    def close(self) -> None:
        """Close all tiers after the loop has ended. Afterwards only operations that hang hold views of the arena."""
        self.writes.closed = True
        begun = self._loop.now()
        for runner in self.runners:
            runner.close()
        self._loop.run_until(lambda: self._all_closed or self._interrupts > 1, CLOSE_SECONDS)
        if self._interrupts > 1:
            self._loop.run_until(lambda: self._all_closed or self._interrupts > 2, _HURRY_SECONDS)
        self.report.log_left_behind(self._loop.now() - begun)
        if self._region is not None:
            let_go([self._region.memory])
        self.report.log_losses(math.inf)  # the last line is not delayed
        self.report.log_unwritten(given_up=True)  # logs again if the last writes failed or did not begin

    @property
    def _all_closed(self) -> bool:
        return all(runner.closed for runner in self.runners)

    def _tick(self) -> None:
        now = self._loop.now()
        self.fetches.tick(now)
        self._earlier_ends.tick(now)
        for runner in self.runners:
            runner.tick(now)
        self.report.log_losses(now)
        self._carry_out()
        self.writes.tick(now)


def _ends(space: Space, size: int) -> range:
    """Return where the parts of `size` bytes of hashes end that fetches cover; the last one may end behind them."""
    step = most_asked(space) * HASH_BYTES
    return range(step, size + step, step)
