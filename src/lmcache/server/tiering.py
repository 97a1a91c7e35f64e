"""The tiers behind L1, as the server drives them: loads for lookups, writes of what has become whole.

`cache.fetch` and `cache.writeback` decide; here their effects are carried out: extents are reserved and leased in L1
as the process SERVER, lanes move the bytes, and what came of it goes back. Everything runs in the loop's thread.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from lmcache.cache import L1, SERVER, Event, Refusal
from lmcache.cache.allocator import Space
from lmcache.cache.fetch import Ask, Decided, Fetches, FetchRecord, Load, TierTraits
from lmcache.cache.writeback import Batch
from lmcache.chunks import HASH_BYTES
from lmcache.errors import ConfigError
from lmcache.memory.slabs import NO_EXTENT
from lmcache.observability.log import init_logger
from lmcache.server.lane import Lane, one_each
from lmcache.server.loop import Loop
from lmcache.tiers import KEPT, OK, Shard, ShardKey
from lmcache.tiers.registry import TierSpec

logger = init_logger(__name__)
OPEN_SECONDS = 15.0
"""How long start-up waits for tiers; those that take longer serve later."""
CLOSE_SECONDS = 3.0
"""How long the end waits for calls under way and for tiers to close; those that take longer are left behind."""
_HURRY_SECONDS = 0.5
"""The same after a second signal: enough for a tier that does not hang."""


@dataclass(frozen=True)
class _Part:
    """One rank's share of a load: reserved extents at `sectors`, for the shards `keys`."""

    reservation: int
    keys: list[ShardKey]
    sectors: list[int]
    shard_bytes: int


class Tiering:
    """All tiers of one server, nearest first.

    always, patience_seconds: as `Fetches` says. queue_bytes: of chunks that wait to be written, for each tier.
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
        self._chunk_tokens = chunk_tokens
        self.lanes = [Lane(loop, spec, queue_bytes, l1.total_bytes) for spec in specs]
        traits = [TierTraits(lane.tier.batch_bytes, lane.tier.concurrency, lane.usable) for lane in self.lanes]
        self.fetches = Fetches(traits, always, patience_seconds)
        self._origin: dict[bytes, int] = {}
        """Chunk -> the tier that it is being loaded from: it is not written back there."""
        self._drained: Callable[[], None] | None = None
        self._being_written: Counter[str] = Counter()
        self._reported_unwritten: Counter[str] = Counter()
        """Chunks by the tier's name."""
        self._drain_until = 0.0
        self._closed = False
        self._interrupts = 0
        self._ended: queue.SimpleQueue[object] = queue.SimpleQueue()
        """Of what `_wait` waits for. A signal handler may put into it at any time, which no lock would allow."""
        loop.on_tick.append(self._tick)
        l1.events.listen(["stored"], self._stored)
        l1.events.listen(["cleared"], self._l1_cleared, named=False)

    def open(self, required: bool) -> None:
        """Open all, side by side; an interrupt ends the waiting.

        Raises:
            ConfigError: `required`, and one does not serve.
        """
        for lane in self.lanes:
            if lane.spec.warning:
                logger.warning("%s", lane.spec.warning)
        futures: dict[Future[None], Lane] = {lane.open(): lane for lane in self.lanes}
        self._wait(futures, OPEN_SECONDS, interrupts=1)
        if self._interrupts:
            return
        for future, lane in futures.items():
            late = TimeoutError(f"not open after {OPEN_SECONDS:.0f} s")
            error = future.exception() if future.done() else late
            if error is not None and required:
                raise ConfigError(f"--l2 {lane.spec.url}: {error} (--l2-required is set)")
            lane.opened(error)
            if error is None:
                logger.info("Tier %s: %s, write=%s", lane.name, lane.spec.url, lane.spec.write)

    # Reading

    def knows(self, space: int, hashes: bytes) -> bool:
        """Whether tiers have lately been asked for these chunks."""
        return self.fetches.knows(space, hashes)

    def wait_for(
        self, process: int, space_number: int, hashes: bytes, prefill_tokens_per_second: float, request: str = ""
    ) -> tuple[int, int]:
        """How many of these chunks are in L1 from the first on, and how many more are on their way and worth waiting for.

        request: how the engine calls it, for the fetch's record.

        Raises:
            Refusal: unknown space or process.
        """
        now = time.monotonic()
        in_l1 = self._l1.peek(now, process, space_number, hashes)
        space = self._l1.space(space_number)
        if space is None or not all(space.shard_bytes):
            return in_l1, 0
        seconds = self._chunk_tokens / prefill_tokens_per_second if prefill_tokens_per_second > 0 else 0.0
        full = in_l1 * HASH_BYTES >= len(hashes)
        known = [] if full else [self._knower(lane, space) for lane in self.lanes]
        chunk_bytes = sum(space.shard_bytes)
        coming = self.fetches.poll(now, space_number, hashes, in_l1, chunk_bytes, seconds, known, request)
        self._carry_out()
        return in_l1, coming

    @staticmethod
    def _knower(lane: Lane, space: Space) -> Callable[[bytes], Sequence[bool] | None]:
        def known(hashes: bytes) -> Sequence[bool] | None:
            present = lane.known(_keys(space, hashes))
            return None if present is None else _complete(present, space.shards)

        return known

    def _carry_out(self) -> None:
        while self.fetches.effects and not self._closed:
            effect = self.fetches.effects.pop(0)  # before it is carried out: one that fails takes no other with it
            if isinstance(effect, Ask):
                self._ask(effect)
            elif isinstance(effect, Load):
                self._load(effect)
            else:
                _log(effect)

    def _ask(self, ask: Ask) -> None:
        lane, space = self.lanes[ask.tier], self._l1.space(ask.space)
        if space is None:
            self.fetches.answered(time.monotonic(), ask.fetch, ask.tier, None, 0.0)
            return
        keys, shards = _keys(space, ask.hashes), space.shards

        def done(present: list[bool] | None, seconds: float) -> None:
            whole = None if present is None else _complete(present, shards)
            self.fetches.answered(time.monotonic(), ask.fetch, ask.tier, whole, seconds)
            self._carry_out()

        lane.ask(lambda: one_each(lane.tier.contains(keys), keys), done)

    def _load(self, load: Load) -> None:
        lane, parts = self.lanes[load.tier], self._reserve(load)
        if not parts:
            self._loop.call_soon(lambda: self._loaded(load, [], None))
            return
        for at in range(0, len(load.hashes), HASH_BYTES):
            self._origin[load.hashes[at : at + HASH_BYTES]] = load.tier
        keys = [key for part in parts for key in part.keys]
        into = [self._l1.view(sector, part.shard_bytes) for part in parts for sector in part.sectors]

        def done(outcomes: list[str] | None, seconds: float) -> None:
            _let_go(into)
            self._loaded(load, parts, outcomes)

        lane.load(lambda: one_each(lane.tier.load(keys, into), keys), done)

    def _reserve(self, load: Load) -> list[_Part]:
        """Extents for what the load brings; what is in L1 or under way by somebody else is left out."""
        space, parts = self._l1.space(load.space), []
        if space is None:
            return []
        for shard in range(space.shards):
            now, tier = time.monotonic(), self.lanes[load.tier].name
            try:
                grant = self._l1.reserve(now, SERVER, load.space, shard, load.parent, load.root, load.hashes, tier)
            except Refusal:  # there is no memory behind L1
                continue
            if not grant.reservation:
                continue
            sectors = array("I", grant.extents)
            keys = [
                ShardKey(space.fingerprint, load.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES], shard, space.shards)
                for at, sector in enumerate(sectors)
                if sector != NO_EXTENT
            ]
            extents = [sector for sector in sectors if sector != NO_EXTENT]
            parts.append(_Part(grant.reservation, keys, extents, space.shard_bytes[shard]))
        return parts

    def _loaded(self, load: Load, parts: list[_Part], outcomes: list[str] | None) -> None:
        """Commit what has come. None: the tier failed, and nothing has."""
        lane, at, good_bytes = self.lanes[load.tier], 0, 0
        for part in parts:
            own = outcomes[at : at + len(part.sectors)] if outcomes is not None else ["tier failed"] * len(part.sectors)
            at += len(part.sectors)
            failed = {sector for sector, outcome in zip(part.sectors, own, strict=True) if outcome != OK}
            try:
                self._l1.commit(time.monotonic(), SERVER, part.reservation, len(failed) < len(own), failed)
            except Refusal:  # its claim has expired, and the chunks may be somebody else's by now
                failed, own = set(part.sectors), ["too late"] * len(own)
            good = len(own) - len(failed)
            good_bytes += good * part.shard_bytes
            lane.counters["loaded_shards"] += good
            for outcome in own:
                if outcome != OK:
                    lane.counters[f"missed:{outcome}"] += 1
        lane.counters["loaded_bytes"] += good_bytes
        for begin in range(0, len(load.hashes), HASH_BYTES):
            self._origin.pop(load.hashes[begin : begin + HASH_BYTES], None)
        self.fetches.loaded(time.monotonic(), load, None if outcomes is None and parts else good_bytes)
        self._carry_out()

    # Writing

    def _stored(self, event: Event) -> None:
        """Chunks that have become readable are written to every tier that wants them; loaded ones to nearer tiers only."""
        space = self._l1.space(event.space)
        if space is None:
            return
        chunk_bytes = sum(space.shard_bytes)
        for number, lane in enumerate(self.lanes):
            if lane.spec.write == "none":
                continue
            if event.process != SERVER:
                lane.queue.add(event.space, event.hashes, event.parents, chunk_bytes)
                continue
            for at in range(0, len(event.hashes), HASH_BYTES):
                cut = slice(at, at + HASH_BYTES)
                if number < self._origin.get(event.hashes[cut], 0):
                    lane.queue.add(event.space, event.hashes[cut], event.parents[cut], chunk_bytes)
        self._loop.call_soon(self._pump)  # not now: a listener calls no verb of L1

    def _l1_cleared(self, event: Event) -> None:
        """What waits to be written is gone."""
        for lane in self.lanes:
            lane.queue.clear()

    def _pump(self) -> None:
        if self._closed:
            return
        now = time.monotonic()
        for lane in self.lanes:
            lane.queue.make_ready(self._l1.used_bytes())
            while lane.may_store(now) and lane.writing < lane.write_concurrency:
                batch = lane.queue.take()
                if batch is None:
                    break
                self._write(lane, batch)
        if self._drained is not None and (self.idle or time.monotonic() > self._drain_until):
            drained, self._drained = self._drained, None
            self._report_unwritten()
            drained()

    def _write(self, lane: Lane, batch: Batch) -> None:
        lease, found, extents = self._l1.hold(time.monotonic(), batch.space, batch.hashes, lane.name)
        batch = lane.queue.still_there(batch, found)
        space = self._l1.space(batch.space)
        if not lease or space is None:
            return
        shards = self._shards(space, batch, array("I", extents))
        sizes = [one.payload.nbytes for one in shards]
        generation, chunks = lane.generation, len(batch.hashes) // HASH_BYTES
        self._being_written[lane.name] += chunks

        def done(outcomes: list[str] | None, seconds: float) -> None:
            self._being_written[lane.name] -= chunks
            _let_go(one.payload for one in shards)
            self._l1.release(SERVER, lease)
            self._written(lane, batch, shards, sizes, outcomes, generation)
            self._pump()

        lane.store(lambda: one_each(lane.tier.store(shards), shards), done)

    def _shards(self, space: Space, batch: Batch, sectors: array[int]) -> list[Shard]:
        shards = []
        for at, sector in enumerate(sectors):
            chunk, shard = divmod(at, space.shards)
            cut = slice(chunk * HASH_BYTES, (chunk + 1) * HASH_BYTES)
            key = ShardKey(space.fingerprint, batch.hashes[cut], shard, space.shards)
            payload = self._l1.view(sector, space.shard_bytes[shard])
            shards.append(Shard(key, batch.parents[cut], payload.toreadonly()))
        return shards

    def _written(
        self,
        lane: Lane,
        batch: Batch,
        shards: list[Shard],
        sizes: list[int],
        outcomes: list[str] | None,
        generation: int,
    ) -> None:
        cleared = generation != lane.generation  # meanwhile, and some of the batch may have been written since
        if cleared and not self._closed:
            keys = [one.key for one in shards]
            lane.change("remove", lambda: lane.tier.remove(keys), lambda result, seconds: None)
        if outcomes is None:
            lane.queue.put_back(batch)
            return
        for outcome, size in zip(outcomes, sizes, strict=True):
            lane.counters["written_shards"] += outcome == OK
            if outcome in (OK, KEPT):
                lane.counters["kept_shards"] += 1
            else:
                lane.counters[f"unwritten:{outcome}"] += 1
                lane.counters[f"unwritten_bytes:{outcome}"] += size
        if OK in outcomes or KEPT in outcomes:
            self.fetches.kept(batch.space, batch.hashes)

    # Upkeep

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, and nothing waits that may be written before the drain's end (or now, without one).
        A tier in trouble is tried again, if its pause ends by then."""
        until = max(time.monotonic(), self._drain_until)
        return all(not lane.writing and (not len(lane.queue) or not lane.may_store_by(until)) for lane in self.lanes)

    def drain(self, seconds: float, then: Callable[[], None]) -> None:
        """Write what waits, for so many seconds at most; then call."""
        for lane in self.lanes:
            lane.queue.make_all_ready()
        waiting = sum(len(lane.queue) for lane in self.lanes) + self._being_written.total()
        if waiting:
            logger.info(
                "%d chunks are written to tiers before the end, for up to %g s; a second signal ends this",
                waiting,
                seconds,
            )
        self._drained, self._drain_until = then, time.monotonic() + seconds
        self._pump()

    def _report_unwritten(self, given_up: bool = False) -> None:
        """given_up: what is still being written will not be, either."""
        for lane in self.lanes:
            left = len(lane.queue) + given_up * self._being_written[lane.name]
            if left > self._reported_unwritten[lane.name]:
                logger.warning("Tier %s: %d chunks could not be written before the end", lane.name, left)
                self._reported_unwritten[lane.name] = left

    def clear(self, names: set[str] | None, done: Callable[[dict[str, str]], None]) -> None:
        """Empty these tiers (None: all); `done` gets what went wrong, by name.

        What waits to be written goes as well, and what is being written is removed again.
        """
        chosen = [lane for lane in self.lanes if names is None or lane.name in names]
        left = {lane.name for lane in chosen}
        wrong: dict[str, str] = {}
        if not chosen:
            done(wrong)
            return

        def cleared(lane: Lane, result: bool | None) -> None:
            left.discard(lane.name)
            if result is None:
                wrong[lane.name] = lane.breaker.reason or "it does not serve"
                logger.warning("Tier %s could not be cleared: %s", lane.name, wrong[lane.name])
            else:
                logger.info("Tier %s cleared", lane.name)
            if not left:
                done(wrong)

        for lane in chosen:
            lane.queue.clear()
            lane.generation += 1
            if lane.breaker.closed:
                self._clear_one(lane, cleared)
            else:  # and its reason stays the one for which it does not serve
                cleared(lane, None)

    @staticmethod
    def _clear_one(lane: Lane, cleared: Callable[[Lane, bool | None], None]) -> None:
        def clear() -> bool:
            lane.tier.clear()
            return True

        lane.change("clear", clear, lambda result, seconds: cleared(lane, result))

    def degraded(self) -> list[str]:
        """Tiers that do not serve now, or not in full, and why."""
        now = time.monotonic()
        return [f"{lane.name}: {trouble}" for lane in self.lanes if (trouble := lane.trouble(now))]

    def status(self) -> list[dict[str, object]]:
        """For /status, nearest first."""
        found = []
        for lane, pace in zip(self.lanes, self.fetches.paces, strict=True):
            rate, ask = pace.bytes_per_second, pace.ask_seconds
            found.append(
                lane.status()
                | {
                    "load_bytes_per_second": None if rate is None else round(rate),
                    "ask_seconds": None if ask is None else round(ask, 6),
                    "counters": dict(lane.counters) | dict(lane.queue.counters),
                }
            )
        return found

    def told(self, record: FetchRecord) -> dict[str, object]:
        """A fetch's record with the tiers' names; JSON types only."""
        expected = record.expected_seconds
        names = [lane.name for lane in self.lanes]
        return {
            "request": " ".join(record.requests),
            "prompt": record.prompt[-4:].hex(),
            "space": record.space,
            "ended_seconds_ago": round(time.monotonic() - record.ended, 1),
            "asked_chunks": record.asked_chunks,
            "l1_chunks": record.l1_chunks,
            "expected_seconds": None if expected is None or math.isinf(expected) else round(expected, 6),
            "recompute_seconds": None if record.recompute_seconds is None else round(record.recompute_seconds, 6),
            "decision": record.decision,
            "waited_seconds": round(record.waited_seconds, 6),
            "outcome": record.outcome,
            "arrived_chunks": record.arrived_chunks,
            "from": {names[tier]: chunks for tier, chunks in record.planned.items()},
            "left_out": {names[tier]: why for tier, why in record.left_out.items()},
        }

    def counters(self) -> dict[str, float]:
        """For /metrics, labelled by tier."""
        out: dict[str, float] = {"fetches_open": self.fetches.open}
        now = time.monotonic()
        for name, value in self.fetches.counters.items():
            kind, _, reason = name.partition(":")
            if kind == "fetches" and reason:
                out[f'fetches_by_end_total{{reason="{reason}"}}'] = value
            elif not reason:
                out[f"{'fetches' if kind == 'fetches' else f'fetched_chunks_{kind}'}_total"] = value
        last = self.fetches.last
        if last is not None:
            out["last_fetch_expected_seconds"] = last.expected_seconds or 0.0
            out["last_fetch_recompute_seconds"] = last.recompute_seconds or 0.0
            out["last_fetch_loaded"] = last.loads
        for lane, pace in zip(self.lanes, self.fetches.paces, strict=True):
            label, usage = f'{{tier="{lane.name}"}}', lane.tier.usage()
            out |= {
                f"tier_serving{label}": not lane.trouble(now),
                f"tier_stored_bytes{label}": usage.stored_bytes,
                f"tier_shards{label}": usage.shards,
                f"tier_queued_bytes{label}": lane.queue.queued_bytes,
                f"tier_load_bytes_per_second{label}": pace.bytes_per_second or 0.0,
                f"tier_ask_seconds{label}": pace.ask_seconds or 0.0,
            }
            for name, value in (*lane.counters.items(), *lane.queue.counters.items()):
                kind, _, reason = name.partition(":")
                labels = f'{{tier="{lane.name}",reason="{reason}"}}' if reason else label
                out[f"tier_{kind}_total{labels}"] = value
        return out

    def interrupt(self) -> int:
        """For signal handlers: the first time ends the waiting in `open`, the next that in `close`. Returns which it is."""
        self._interrupts += 1
        self._ended.put(None)
        return self._interrupts

    def _wait(self, futures: Iterable[Future[None]], seconds: float, interrupts: int) -> None:
        """Until all are done, the time is over, or there have been so many interrupts."""
        until, left = time.monotonic() + seconds, set(futures)
        self._ended = queue.SimpleQueue()
        for future in left:
            future.add_done_callback(self._ended.put)
        while left and self._interrupts < interrupts:
            try:
                left.discard(self._ended.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                return

    def close(self) -> None:
        """After the loop has ended. Nothing holds a view of the arena afterwards, but for calls that hang and are left behind."""
        self._closed = True
        begun = time.monotonic()
        closed = {lane: lane.close() for lane in self.lanes}
        self._wait(closed.values(), CLOSE_SECONDS, interrupts=2)
        if self._interrupts > 1:
            self._wait(closed.values(), _HURRY_SECONDS, interrupts=3)
        for lane in (lane for lane, future in closed.items() if not future.done()):
            methods = Counter(lane.leave_behind())
            logger.warning(
                "Tier %s is left behind: %d calls (%s) have not returned after %.1f s; see whether %s answers",
                lane.name,
                methods.total(),
                ", ".join(f"{count} of {method}" for method, count in methods.items()),
                time.monotonic() - begun,
                lane.spec.url,
            )
        self._loop.run_calls()  # what the lanes' last calls have to say
        for lane in self.lanes:
            lane.report_losses(math.inf)  # it is the last time
        self._report_unwritten(given_up=True)  # again where the last writes have failed, too, or never began

    def _tick(self) -> None:
        now = time.monotonic()
        self.fetches.tick(now)
        for lane in self.lanes:
            lane.tick(now)
            lane.report_losses(now)
        self._carry_out()
        self._pump()


def _log(decided: Decided) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "Prompt %s (%s): loading is expected to take %.3f s, computing %.3f s: %s",
            decided.prompt[-4:].hex(),
            " ".join(decided.requests) or "no request id told",
            decided.expected_seconds or 0.0,
            decided.recompute_seconds or 0.0,
            "loading" if decided.loads else "not worth it",
        )


def _keys(space: Space, hashes: bytes) -> list[ShardKey]:
    """All shards of these chunks, [chunk][shard]."""
    return [
        ShardKey(space.fingerprint, hashes[at : at + HASH_BYTES], shard, space.shards)
        for at in range(0, len(hashes), HASH_BYTES)
        for shard in range(space.shards)
    ]


def _let_go(views: Iterable[memoryview]) -> None:
    """A tier that keeps one for itself keeps the arena mapped for longer; what the call leads to must go on."""
    for one in views:
        with suppress(BufferError):
            one.release()


def _complete(present: Sequence[bool], shards: int) -> Sequence[bool]:
    """Which chunks are there with all their shards."""
    if shards == 1:
        return present
    return [all(present[at : at + shards]) for at in range(0, len(present), shards)]
