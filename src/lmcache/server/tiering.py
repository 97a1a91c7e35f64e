"""Tiering connects L1 with the tiers: it loads chunks for lookups, and `tier_writes` writes chunks that have become complete.
Lookups also wait for chunks that other engines compute.

`cache.fetch` decides, and this module carries out its effects. It reserves extents in L1 as the process SERVER, a `TierRunner`
for each tier moves the bytes, and the outcomes are reported back. Everything runs in the loop's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from lmcache.cache import L1, Refusal
from lmcache.cache.allocator import Space
from lmcache.cache.fetch import Fetches
from lmcache.cache.groups import longest_prefix
from lmcache.cache.promises import NOTHING, Asker, Coming
from lmcache.cache.waits import ASK_SECONDS, PAUSED, TierTraits, Wanted
from lmcache.chunks import HASH_BYTES
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.server.tier_contents import (
    EarlierEnds,
    known_chunks,
    known_splits,
    most_asked,
)
from lmcache.server.tier_loads import Loads
from lmcache.server.tier_report import TierReport
from lmcache.server.tier_runner import CLOSE_SECONDS, OPEN_SECONDS, TierRunner
from lmcache.server.tier_writes import Writes, let_go
from lmcache.tiers import Region, TierError

if TYPE_CHECKING:
    from lmcache.tiers.registry import TierSpec  # imports what only servers with tiers need

logger = init_logger(__name__)
_HURRY_SECONDS = 0.5
"""How long the end waits after a second signal; a tier that does not hang closes in that time."""
_MOST_ENDS = 8
"""How many earlier ends a lookup tries: what tiers say they have may fail to load at each of them."""
_MOST_AWAITED_ENDS = 64
"""The same for ends at which other engines are about to store what all groups need."""
_MOST_NAMES = 512
"""Numbers of tiers whose names are remembered, for the records of fetches."""
_SHARE = 0.25
"""Of the time of computing a prompt, for which a lookup waits to hear where an earlier end is."""


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
        self._queue_bytes = queue_bytes
        self.runners: list[TierRunner] = []
        """Of the attached tiers, nearest first. This list stays the same object, and so does `leaving`."""
        self.leaving: list[TierRunner] = []
        """Of tiers that are being removed. Lookups and new writes ignore them."""
        self._by_number: dict[int, TierRunner] = {}
        self.names: dict[int, str] = {}
        """Number of a tier -> name, also of those that were removed lately."""
        self.fetches = Fetches((), always, patience_seconds)
        self._earlier_ends = EarlierEnds(self.runners, patience_seconds)
        self.report = TierReport(loop.now, self.runners, self.leaving, self.fetches, self.names, chunk_tokens)
        self.writes = Writes(loop, l1, self.runners, self.leaving, self.fetches, self.report)
        self._loads = Loads(loop, l1, self.fetches, self.writes, self._by_number, self.leaving, patience_seconds)
        self.sources = self.runners, l1.promises.by_chunk, l1.reservations, self.fetches.numbered
        """If all are empty, neither tiers nor other engines can bring anything into L1 for a lookup."""
        self._region: Region | None = None
        self._interrupts = 0
        self.on_clear: list[Callable[[], None]] = []
        """Called when a tier is being emptied or removed."""
        self.on_join: list[Callable[[TierRunner], None]] = []
        """Called when a tier has joined."""
        self._letting_go = False
        l1.on_unfinished = self._let_go_soon
        loop.on_tick.append(self._tick)
        for spec in specs:
            self.join(self.runner_of(spec))

    def _let_go_soon(self) -> None:
        """Let L1 go on in the next turn of the loop with what has been read and is not kept, and not twice in a turn."""
        if not self._letting_go:
            self._letting_go = True
            self._loop.call_soon(self._let_go)

    def _let_go(self) -> None:
        self._letting_go = False
        self._l1.let_go()

    def attach(self, region: Region) -> None:
        """Attach all tiers to the memory that their operations will use. Call this before `open`."""
        self._region = region
        for runner in self.runners:
            runner.tier.attach(region)

    # Which tiers there are

    def runner_of(self, spec: TierSpec) -> TierRunner:
        """Return a runner for the tier, which is not opened yet and has not joined."""
        runner = TierRunner(self._loop, spec, self._queue_bytes, self._l1.total_bytes)
        if self._region is not None:
            runner.tier.attach(self._region)
        return runner

    def join(self, runner: TierRunner, place: int | None = None) -> None:
        """Let lookups ask this tier and write to it from now on. place: so many tiers are nearer; None: all."""
        if not self.names:
            kinds = ["stored", "refused", "dropped", "evicted", "load_failed"]
            self._l1.events.listen(kinds, self.fetches.heard)
            self.writes.listen()
        tier = runner.tier
        (self._l1.fleeting_tiers.add if tier.fleeting else self._l1.fleeting_tiers.discard)(runner.name)
        traits = TierTraits(
            tier.batch_bytes, tier.concurrency, runner.usable, tier.batch_shards, runner.name, runner.why_not_usable
        )
        runner.number = self.fetches.attach(traits, place)
        self._by_number[runner.number], self.names[runner.number] = runner, runner.name
        while len(self.names) > _MOST_NAMES:
            del self.names[next(number for number in self.names if number not in self._by_number)]
        self.report.joined(runner)
        self.runners.insert(len(self.runners) if place is None else place, runner)
        self.writes.tiers_changed()
        self._earlier_ends.forget()
        for listener in self.on_join:
            listener(runner)

    def leave(self, runner: TierRunner) -> None:
        """Let lookups and new writes ignore this tier from now on. What is queued for it is written until `let_go_of`."""
        self.runners.remove(runner)
        self.writes.tiers_changed()
        self.leaving.append(runner)
        runner.queue.make_all_ready()
        self.writes.nearly_full = [one for one in self.writes.nearly_full if one is not runner]
        self.fetches.detach(self._loop.now(), runner.number)
        self._earlier_ends.forget()
        for listener in self.on_clear:
            listener()
        self._loads.carry_out()
        self._loop.call_soon(self.writes.pump)

    def let_go_of(self, runner: TierRunner) -> None:
        """Drop what is queued for a tier that leaves, cancel its operations, and close it. It is in `leaving` until the last of
        them has ended, because they may touch memory."""
        runner.queue.clear("tier removed")
        runner.close()

    def _forget_closed(self) -> None:
        for runner in [one for one in self.leaving if one.closed]:
            self.leaving.remove(runner)
            self._by_number.pop(runner.number, None)
            self.report.left(runner)
            runner.release()

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
        now, coming = self._loop.now(), 0
        knowers = {one.number: partial(known_chunks, one, space) for one in self.runners}
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
        self._loads.carry_out()
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
            if runner.paused:
                cleared(runner, None, TierError(PAUSED, "it is paused"))
            elif runner.breaker.closed:
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
        for runner in (*self.runners, *self.leaving):
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
        return all(runner.closed for runner in (*self.runners, *self.leaving))

    def _tick(self) -> None:
        now = self._loop.now()
        self.fetches.tick(now)
        self._earlier_ends.tick(now)
        for runner in (*self.runners, *self.leaving):
            runner.tick(now)
        self._forget_closed()
        self.report.log_losses(now)
        self._loads.carry_out()
        self.writes.tick(now)


def _ends(space: Space, size: int) -> range:
    """Return where the parts of `size` bytes of hashes end that fetches cover; the last one may end behind them."""
    step = most_asked(space) * HASH_BYTES
    return range(step, size + step, step)
