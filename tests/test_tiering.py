"""The server's side of tiers, with tiers that a test holds in its hand: real loop, heart and threads, no sockets."""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import queue
import random
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcache.cache import L1, SERVER, TIER_KINDS, Event
from lmcache.cache.fetch import ENDED_SECONDS
from lmcache.cache.promises import Asker
from lmcache.cache.touches import Touches
from lmcache.chunks import Split
from lmcache.errors import ConfigError
from lmcache.memory.arena import Arena
from lmcache.memory.slabs import NO_EXTENT
from lmcache.runtime import Runtime
from lmcache.server.loop import Loop
from lmcache.server.tiering import Tiering
from lmcache.tiers import (
    ABSENT,
    KEPT,
    OK,
    AsyncTier,
    Region,
    Shard,
    ShardKey,
    Tier,
    TierError,
    Usage,
)
from lmcache.tiers.blocking import BlockingAdapter
from lmcache.tiers.breaker import FIRST_PAUSE_SECONDS
from lmcache.tiers.operation import Load, Operation
from lmcache.tiers.registry import TierSpec
from lmcache.tiers.tier import TierBase
from lmcache.tiers.url import TierURL
from servers import PATIENCE, eventually

SECTOR = 4096
ENGINE = 1


class HandTier(Tier):
    """A dictionary, with gates: `hold(what)` makes calls wait, `trouble` makes them fail, `refuses` those of one kind."""

    scheme = "hand"
    concurrency = 2
    batch_bytes = 4 * SECTOR

    def __init__(self, knows: bool = False) -> None:
        self.kept: dict[ShardKey, bytes] = {}
        self.trouble = self.refuses = ""
        self.knows = knows
        self.calls: list[str] = []
        self.gates = {name: threading.Event() for name in ("contains", "load", "store")}
        for gate in self.gates.values():
            gate.set()

    @classmethod
    def from_url(cls, url: TierURL) -> HandTier:
        return cls()

    def hold(self, what: str) -> None:
        self.gates[what].clear()

    def let_go(self) -> None:
        for gate in self.gates.values():
            gate.set()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.gates:
            assert self.gates[name].wait(PATIENCE)
        if self.trouble:
            raise TierError("trouble", f"the tier is {self.trouble}")
        if self.refuses == name:
            raise TierError("refused", f"{name} is refused")

    def open(self) -> None:
        self._called("open")

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        return [key in self.kept for key in keys] if self.knows else None

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._called("contains")
        return [key in self.kept for key in keys]

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        self._called("load")
        for key, one in zip(keys, into, strict=True):
            one[:] = self.kept.get(key, b"\xee" * len(one))[: len(one)].ljust(len(one), b"\xdd")
        return [OK if key in self.kept else ABSENT for key in keys]

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._called("store")
        outcomes = [KEPT if one.key in self.kept else OK for one in shards]
        self.kept |= {one.key: bytes(one.payload) for one in shards}
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        for key in keys:
            self.kept.pop(key, None)

    def clear(self) -> None:
        self._called("clear")
        self.kept.clear()

    def usage(self) -> Usage:
        return Usage(sum(map(len, self.kept.values())), len(self.kept), None)

    def close(self) -> None:
        self.calls.append("close")


class Rig:
    """An L1 of `sectors` pages with these tiers, in a running loop; everything is asked for in the loop's thread."""

    def __init__(
        self,
        *specs: TierSpec,
        sectors: int = 64,
        shards: int = 1,
        clock: Callable[[], float] = time.monotonic,
        **more: Any,
    ) -> None:
        self.loop, self.folder = Loop(Runtime(now=clock)), tempfile.TemporaryDirectory(dir="/dev/shm")
        self.l1 = L1(Arena(Path(self.folder.name), sectors * SECTOR))
        options = {
            "chunk_tokens": 16,
            "always": False,
            "patience_seconds": PATIENCE,
            "queue_bytes": sectors * SECTOR,
            **more,
        }
        self.tiering = Tiering(self.loop, self.l1, specs, **options)
        arena = self.l1.arena
        self.tiering.attach(
            Region(arena.mapping.address, arena.size_bytes, arena.descriptor, arena.mapping.view(0, arena.size_bytes))
        )
        self.shards, self.closed = shards, False
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.tiering.open(required=False)
        self.thread.start()
        self.space = self.ask(self._join)

    def _join(self) -> int:
        self.l1.join(ENGINE, "engine")
        for shard in range(self.shards):
            space = self.l1.open_space(ENGINE, b"f" * 16, self.shards, shard, SECTOR)
        return space

    def ask(self, call: Callable[[], Any]) -> Any:
        return self.loop.ask(call, PATIENCE)

    def store(self, hashes: bytes) -> None:
        """As an engine's ranks do: each page is filled with bytes that its chunk and shard decide."""

        def fill() -> None:
            for shard in range(self.shards):
                grant = self.l1.reserve(self.loop.now(), ENGINE, self.space, shard, b"", True, hashes)
                for at, sector in enumerate(memoryview(grant.extents).cast("I")):
                    if sector != NO_EXTENT:
                        self.l1.view(sector, SECTOR)[:] = content(hashes[16 * at : 16 * at + 16], shard)
                if grant.reservation:
                    self.l1.commit(self.loop.now(), ENGINE, grant.reservation, True)

        self.ask(fill)

    def wait_for(self, hashes: bytes, rate: float = 0.0) -> int:
        return self.ask(lambda: self.tiering.wait_for(Asker(ENGINE), [self.space], hashes, rate)[1])

    def held_up(self, tier: HandTier | OwnThreadTier, prompt: bytes, rate: float = 0.0) -> None:
        """Store a prompt and forget it in L1. Then begin its loads, which the tier holds up until it lets go."""
        self.store(prompt)
        self.written()
        self.forget_l1()
        tier.hold("load")
        assert self.wait_for(prompt, rate) == len(prompt) // 16
        if isinstance(tier, HandTier):
            eventually(lambda: "load" in tier.calls)

    def fetch(self, hashes: bytes, rate: float = 0.0) -> int:
        """Wait as an engine does; then how many chunks are there, checked byte by byte."""
        eventually(lambda: not self.wait_for(hashes, rate))
        return self.there(hashes)

    def there(self, hashes: bytes) -> int:
        def look() -> int:
            hit = self.l1.lookup(self.loop.now(), ENGINE, self.space, hashes)
            for at, sector in enumerate(memoryview(hit.extents).cast("I")):
                chunk, shard = divmod(at, self.shards)
                expected = content(hashes[16 * chunk : 16 * chunk + 16], shard)
                assert self.l1.view(sector, SECTOR) == expected, "wrong bytes were served"
            self.l1.release(ENGINE, hit.lease)
            return hit.chunks

        return self.ask(look)

    def forget_l1(self) -> None:
        self.ask(self.l1.clear)

    def written(self) -> None:
        """Until nothing waits to be written."""
        eventually(lambda: self.ask(lambda: self.tiering.writes.idle))

    def close(self, let_go: bool = True) -> None:
        if self.closed:
            return
        self.closed = True
        for runner in self.tiering.runners if let_go else ():
            runner.tier.let_go()  # type: ignore[attr-defined]
        self.loop.stop()
        self.thread.join(PATIENCE)
        self.tiering.close()
        self.loop.close()
        self.l1.arena.close()
        self.folder.cleanup()


def content(key: bytes, shard: int) -> bytes:
    return random.Random(key + bytes([shard])).randbytes(SECTOR)


def keys_of(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + 16] for at in range(0, len(hashes), 16)]


def chain(seed: int, chunks: int) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


def spec(tier: TierBase, name: str = "hand", write: str = "through", read: bool = True, admit: str = "all") -> TierSpec:
    return TierSpec(name, f"{name}://", write, read, tier, admit=admit)


@pytest.fixture(autouse=True)
def patient_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """No busy machine makes a tier's answer come too late."""
    monkeypatch.setattr("lmcache.cache.waits.ASK_SECONDS", PATIENCE)


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*specs: TierSpec, **more: Any) -> Rig:
        made.append(Rig(*specs, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("knows", [True, False])
def test_what_is_stored_comes_back_from_the_tier(rig: Callable[..., Rig], knows: bool, shards: int) -> None:
    tier = HandTier(knows)
    one = rig(spec(tier), shards=shards)
    prompt = chain(1, 9)
    one.store(prompt)
    one.written()
    assert len(tier.kept) == 9 * shards
    one.forget_l1()
    assert one.there(prompt) == 0
    assert one.fetch(prompt + chain(2, 3)) == 9
    one.written()
    assert len(tier.kept) == 9 * shards and tier.calls.count("store") <= 9 * shards, (
        "not written back where it came from"
    )
    assert one.ask(lambda: one.l1.open_leases) == one.ask(lambda: one.l1.open_reservations) == 0


def test_a_record_says_what_l1_did_with_the_chunks_that_were_loaded(rig: Callable[..., Rig]) -> None:
    tier = HandTier(True)
    one, prompt = rig(spec(tier), sectors=8), chain(1, 6)
    one.held_up(tier, prompt)
    lost = next(key for key in tier.kept if key.chunk == prompt[32:48])
    shard = tier.kept.pop(lost)
    tier.let_go()
    assert one.fetch(prompt) == 2
    eventually(lambda: not one.ask(lambda: one.l1.open_reservations))
    first = one.ask(lambda: one.tiering.fetches.records[-1])
    assert (
        first.events == {"stored": 5, "dropped:copy failed": 1, "load_failed:absent": 1} and first.outcome == "failed"
    )
    one.store(prompt)  # the engine has computed what did not come
    one.written()
    one.store(chain(2, 8))
    assert first.events == {"stored": 5, "dropped:copy failed": 1, "load_failed:absent": 1, "evicted:room": 5}
    tier.kept[lost] = shard
    lease = one.ask(lambda: one.l1.lookup(one.loop.now(), ENGINE, one.space, chain(2, 8)).lease)
    assert one.fetch(prompt) == 0
    second = one.ask(lambda: one.tiering.fetches.records[-1])
    assert set(second.events) == {"refused:no room", "refused:no parent"} and second.events.total() == 6
    assert one.tiering.report.describe(second)["events"] == second.events
    one.ask(lambda: one.l1.release(ENGINE, lease))


def test_what_a_tier_did_is_on_the_stream_of_events(rig: Callable[..., Rig]) -> None:
    tier, events, clock = HandTier(True), list[Event](), HandClock()
    one, prompt = rig(spec(tier), shards=2, clock=clock, always=True, patience_seconds=3600.0), chain(1, 2)
    one.ask(lambda: one.l1.events.listen(TIER_KINDS, events.append))

    def told(kind: str, reason: str = "", request: str = "") -> None:
        """Such an event for each shard of both chunks, and nothing else, once nothing is under way."""
        one.written()
        eventually(lambda: not one.ask(lambda: one.l1.open_reservations))
        assert {event._replace(chunks=0, shard=0, hashes=b"") for event in events} == {
            Event(kind, one.space, 0, reason, SERVER, "hand", request, 0)
        }
        shards = [(event.hashes[16 * at : 16 * at + 16], event.shard) for event in events for at in range(event.chunks)]
        assert sorted(shards) == sorted((prompt[at : at + 16], shard) for at in (0, 16) for shard in range(2))
        events.clear()

    def load(request: str) -> None:
        one.forget_l1()
        eventually(lambda: one.ask(lambda: one.tiering.wait_for(Asker(ENGINE, request), [one.space], prompt, 0.0))[1])

    one.store(prompt)
    told("written")
    one.forget_l1()
    one.store(prompt)
    told("written", KEPT)
    load("r-1")
    told("loaded", request="r-1")
    tier.hold("load")
    load("r-2")
    eventually(lambda: "load" in tier.calls)
    tier.kept.clear()
    tier.let_go()
    told("load_failed", ABSENT, "r-2")
    tier.hold("store")
    tier.refuses = "store"
    one.forget_l1()
    one.store(prompt)
    eventually(lambda: tier.calls.count("store") == 3)
    one.forget_l1()  # so that it does not try again
    tier.let_go()
    told("write_failed", "tier failed")
    tier.kept = {
        ShardKey(b"f" * 16, prompt[at : at + 16], shard, 2): bytes(SECTOR) for at in (0, 16) for shard in (0, 1)
    }
    calls = len(tier.calls)
    tier.hold("load")
    load("r-3")
    eventually(lambda: "load" in tier.calls[calls:])
    clock.time += one.l1.claim_seconds + 1
    one.ask(one.tiering._tick)
    one.ask(lambda: one.l1.tick(clock()))
    tier.let_go()
    told("load_failed", "too late", "r-3")


def test_what_is_loaded_for_a_request_is_reserved_and_stored_under_its_id(rig: Callable[..., Rig]) -> None:
    tier, events = HandTier(True), list[Event]()
    one, prompt = rig(spec(tier)), chain(1, 6)
    one.store(prompt)
    one.written()
    one.forget_l1()
    one.ask(lambda: one.l1.events.listen(["reserved", "committed", "stored"], events.append))
    eventually(lambda: one.ask(lambda: one.tiering.wait_for(Asker(ENGINE, "cmpl-1"), [one.space], prompt, 0.0))[0] == 6)
    assert {(event.process, event.tier, event.request) for event in events} == {(SERVER, "hand", "cmpl-1")}
    for kind in ("reserved", "committed", "stored"):  # by two loads, either of which may end first
        hashes = b"".join(event.hashes for event in events if event.kind == kind)
        assert sorted(keys_of(hashes)) == sorted(keys_of(prompt))


def test_the_nearer_tiers_get_each_split_from_the_tier_that_had_it(rig: Callable[..., Rig]) -> None:
    """The chunks of two splits of one layout have equal hashes, and are loaded at the same time."""
    near, far = HandTier(True), HandTier(True)
    one, prompt = rig(spec(near, "near"), spec(far, "far")), chain(1, 1)
    split = one.ask(lambda: [one.l1.open_space(ENGINE, b"f" * 16, 2, shard, SECTOR) for shard in range(2)])[0]
    keys = [ShardKey(b"f" * 16, prompt, shard, 2) for shard in range(2)]
    for tier, kept in ((far, keys), (near, [ShardKey(b"f" * 16, prompt, 0, 1)])):
        tier.kept = {key: content(prompt, key.shard) for key in kept}
        tier.hold("load")
    assert one.ask(lambda: one.tiering.wait_for(Asker(ENGINE), [split], prompt, 0.0)) == (0, 1)
    assert one.wait_for(prompt) == 1
    eventually(lambda: "load" in far.calls and "load" in near.calls)
    far.let_go()
    eventually(lambda: one.ask(lambda: one.l1.peek(0.0, ENGINE, split, prompt)))
    near.let_go()
    assert one.fetch(prompt) == 1
    one.written()
    assert set(near.kept) > set(keys) and set(far.kept) == set(keys)


def test_a_record_names_the_tiers_and_fits_json(rig: Callable[..., Rig]) -> None:
    near, far = HandTier(True), HandTier(True)
    one = rig(spec(near, "near"), spec(far, "far", read=False))
    prompt = chain(1, 4)
    one.store(prompt)
    one.written()
    one.forget_l1()
    assert one.fetch(prompt, rate=1.0) == 4
    (record,) = one.ask(lambda: list(one.tiering.fetches.records))
    told = one.tiering.report.describe(record)
    assert told["from"] == {"near": 4} and told["left_out"] == {"far": "not serving"}
    assert told["recompute_seconds"] == 4 * 16 / 1.0 and told["expected_seconds"] is None
    endless = one.tiering.report.describe(replace(record, expected_seconds=float("inf")))
    assert json.loads(json.dumps(endless, allow_nan=False))["expected_seconds"] is None


def test_a_full_hit_asks_no_tier_and_a_stalled_one_holds_up_nobody(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than tiers have to answer."""
    monkeypatch.setattr("lmcache.cache.waits.ASK_SECONDS", 0.1)
    near, far = HandTier(True), HandTier()
    one = rig(spec(near, "near"), spec(far, "far", write="none"))
    prompt = chain(1, 4)
    one.store(prompt)
    one.written()
    far.hold("contains")
    assert one.wait_for(prompt) == 0 and "contains" not in far.calls
    one.forget_l1()
    assert one.fetch(prompt) == 4
    assert "load" in near.calls and "load" not in far.calls
    eventually(lambda: far.calls.count("contains") == 1)
    one.forget_l1()
    (hanging,) = one.tiering.runners[1]._under_way
    hanging.since -= 5
    assert one.fetch(prompt) == 4 and far.calls.count("contains") == 1, "a call hangs: it is not asked again"


def test_damaged_and_lost_shards_are_misses_with_a_name(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    prompt = chain(1, 6)
    one.held_up(tier, prompt)
    del tier.kept[next(key for key in tier.kept if key.chunk == prompt[32:48])]
    tier.let_go()
    assert one.fetch(prompt) == 2
    assert one.tiering.runners[0].counters["missed:absent"] == 1


def test_a_load_that_hangs_blocks_no_chunk_and_what_it_brings_at_last_is_not_used(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    prompt, other = chain(1, 6), chain(2, 4)
    one.store(other)
    one.held_up(tier, prompt)
    one.ask(lambda: one.l1.tick(time.monotonic() + one.l1.claim_seconds + 1))
    assert one.ask(lambda: one.l1.quarantined_bytes) == 6 * SECTOR
    one.store(prompt)  # as an engine that has computed it meanwhile
    assert one.there(prompt) == 6
    tier.let_go()
    eventually(lambda: not one.ask(lambda: one.l1.quarantined_bytes))
    assert one.there(prompt) == 6 and one.tiering.runners[0].counters["missed:too late"] == 6
    assert one.fetch(other) == 4 and one.loop.errors == 0, "its tier goes on"


def test_a_tier_that_fails_is_left_alone_tried_again_and_then_gets_what_waited(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    runner = one.tiering.runners[0]
    runner.breaker.pause_seconds = 3600.0
    tier.trouble = "on fire"
    for seed in range(4):
        one.store(chain(seed, 2))
    eventually(lambda: not runner.breaker.closed)
    assert one.ask(one.tiering.report.degraded) == ["hand: the tier is on fire"]
    assert one.fetch(chain(9, 3)) == 0
    calls = len(tier.calls)
    assert one.fetch(chain(10, 3)) == 0 and len(tier.calls) == calls, "an open breaker lets nothing through"
    tier.trouble = ""
    runner.breaker.retry_at = 0.0
    eventually(lambda: runner.breaker.closed and len(tier.kept) == 8)  # nothing that waited was lost
    assert one.ask(one.tiering.report.degraded) == []


@pytest.mark.parametrize("refused", ["load", "store"])
def test_one_kind_of_call_may_fail_for_long_while_the_rest_goes_on(rig: Callable[..., Rig], refused: str) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    runner = one.tiering.runners[0]
    kind, other = (runner.loads, runner.stores) if refused == "load" else (runner.stores, runner.loads)
    fresh = iter(range(100, 10_000))

    def use() -> None:
        """A question, which is always answered, a store, and a load of what is nowhere else."""
        assert one.fetch(chain(next(fresh), 1)) == 0
        one.store(chain(next(fresh), 1))
        key = ShardKey(b"f" * 16, chain(next(fresh), 1), 0, 1)
        tier.kept[key] = content(key.chunk, 0)
        one.fetch(key.chunk)

    tier.refuses = refused
    eventually(lambda: use() or not kind.closed)
    calls = tier.calls.count(refused) - runner.counters["opened_breaker"]
    eventually(lambda: runner.breaker.closed)
    assert (kind.closed, other.closed) == (False, True)
    eventually(lambda: use() or kind.pause_seconds > FIRST_PAUSE_SECONDS)
    eventually(lambda: tier.calls.count(refused) == calls + runner.counters["opened_breaker"])  # one call decides
    assert runner.breaker.closed and one.ask(one.tiering.report.degraded) == [f"hand: {refused} is refused"]
    (status,) = one.ask(one.tiering.report.status)
    assert (status["state"], status["reason"]) == (f"{refused}s fail", f"{refused} is refused")
    tier.refuses = ""
    eventually(lambda: use() or kind.closed)
    one.written()
    assert one.ask(one.tiering.report.degraded) == []


class CarelessTier(HandTier):
    """A third party's, with faults in what `careless` names."""

    careless = ""

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        if self.careless == "known":
            raise KeyError("known")
        return [] if self.careless == "known, short" else super().known(keys)

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return super().contains(keys)[self.careless == "contains" :]

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        return super().load(keys, into)[self.careless == "load" :]

    def store(self, shards: Sequence[Shard]) -> list[str]:
        outcomes = super().store(shards)
        return outcomes if self.careless != "store" else None  # type: ignore[return-value]

    def close(self) -> None:
        if self.careless == "close":
            raise OSError("close failed")
        super().close()

    def usage(self) -> Usage:
        if self.careless == "usage":
            raise KeyError("usage")
        return super().usage()


@pytest.mark.parametrize("careless", ["contains", "load"])
def test_a_tier_that_breaks_its_word_costs_no_extents(rig: Callable[..., Rig], careless: str) -> None:
    tier = CarelessTier()
    one, hashes = rig(spec(tier)), chain(1, 6)
    one.store(hashes)
    one.written()
    one.forget_l1()
    tier.careless = careless
    assert one.fetch(hashes) == 0
    (runner,) = one.ask(one.tiering.report.status)
    assert runner["counters"]["failed:internal"] == (1 if careless == "contains" else 2), (
        "and two loads of four and two"
    )
    assert one.ask(one.l1.used_bytes) == 0 and one.loop.errors == 0
    tier.careless = ""
    eventually(lambda: one.fetch(hashes) == 6)  # for a second it is not asked again


@pytest.mark.parametrize("careless", ["known", "known, short"])
def test_a_tier_that_does_not_know_what_it_has_is_asked(rig: Callable[..., Rig], careless: str) -> None:
    tier = CarelessTier(True)
    one, hashes = rig(spec(tier)), chain(1, 6)
    one.store(hashes)
    one.written()
    one.forget_l1()
    tier.careless = careless
    assert one.fetch(hashes) == 6
    (runner,) = one.ask(one.tiering.report.status)
    assert runner["counters"]["failed:internal"] == 1 and "contains" in tier.calls and one.loop.errors == 0


def test_a_tier_that_does_not_tell_its_usage_hides_nothing_else(rig: Callable[..., Rig]) -> None:
    tier, other = CarelessTier(), HandTier()
    one = rig(spec(tier), spec(other, "other"))
    one.store(chain(1, 6))
    one.written()
    one.ask(one.tiering.report.status)
    tier.careless = "usage"
    assert [told["shards"] for told in one.ask(one.tiering.report.status)] == [6, 6]
    for _ in range(5):
        counters = one.ask(one.tiering.report.counters)
    assert counters['tier_shards{tier="hand"}'] == counters['tier_shards{tier="other"}'] == 6
    assert counters['tier_failed_total{tier="hand",reason="internal"}'] >= 6, "ticks ask for it, too"
    assert counters['tier_serving{tier="hand"}']


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_no_tier_is_asked_about_all_of_a_very_long_prompt_at_once(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, knows: bool, shards: int
) -> None:
    """The names of its shards are made in the loop, which serves nobody meanwhile."""
    monkeypatch.setattr("lmcache.server.tier_contents.MOST_ASKED", 8)
    tier, asked = HandTier(knows), list[int]()
    one, hashes = rig(spec(tier), shards=shards), chain(1, 20)
    for name in ("known", "contains"):
        ask = getattr(tier, name)
        monkeypatch.setattr(tier, name, lambda keys, ask=ask: (asked.append(len(keys)), ask(keys))[1])
    one.store(hashes)
    one.written()
    one.forget_l1()
    assert one.fetch(hashes) == 20 and max(asked) <= 8
    assert one.fetch(hashes + chain(2, 9)) == 20
    records = one.ask(lambda: [(one.outcome, one.arrived_chunks) for one in one.tiering.fetches.records])
    part = 8 // shards
    assert records[: 20 // part] == [("arrived", part)] * (20 // part)
    assert sum(chunks for _, chunks in records) == 20 and one.ask(lambda: one.tiering.fetches.open) <= 1


class WordyTier(HandTier):
    """A third party's, in whose reasons each shard has its name."""

    def store(self, shards: Sequence[Shard]) -> list[str]:
        return [f"no room\nfor {one.key.chunk.hex()}" for one in shards]


def test_the_reasons_that_a_tier_makes_up_are_bounded(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.server.tier_runner.MAX_COUNTERS", 8)
    one = rig(spec(WordyTier()))
    for seed in range(4):
        one.store(chain(seed, 12))
        one.written()
    (runner,) = one.tiering.runners
    unwritten = {name: count for name, count in runner.counters.items() if name.startswith("unwritten:")}
    assert sum(unwritten.values()) == 48 and unwritten["unwritten:other"] > 40
    assert len(runner.counters) <= 10 and all(name.isprintable() and len(name) < 60 for name in runner.counters)


class ClingingTier(HandTier):
    """A third party's, with buffers of its own of what it is to fill: in an error's frames, or for good."""

    def __init__(self, clings: str) -> None:
        super().__init__()
        self.clings, self.held = clings, list[pickle.PickleBuffer]()

    def _receive(self, view: memoryview) -> None:
        buffer = pickle.PickleBuffer(view)
        if self.clings == "in an error":
            self.clings = ""
            raise OSError("the network is gone")
        self.held.append(buffer)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        try:
            self._receive(into[0])
        except OSError as error:
            raise TierError("unreachable", str(error)) from error
        return super().load(keys, into)


@pytest.mark.parametrize("clings", ["in an error", "for good"])
def test_a_tier_that_clings_to_memory_costs_no_extents(rig: Callable[..., Rig], clings: str) -> None:
    """Without the collector, which would help now and then."""
    tier = ClingingTier(clings)
    one, hashes = rig(spec(tier)), chain(1, 4)
    one.store(hashes)
    one.written()
    one.forget_l1()
    gc.disable()
    try:
        assert one.fetch(hashes) == (0 if clings == "in an error" else 4)
        assert one.ask(lambda: one.l1.open_reservations) == 0 and one.loop.errors == 0
        assert one.fetch(hashes) == 4, "now it is there"
    finally:
        gc.enable()


def test_a_tier_that_answers_no_store_gets_it_again(rig: Callable[..., Rig]) -> None:
    tier = CarelessTier()
    tier.careless = "store"
    one, hashes = rig(spec(tier)), chain(1, 3)
    one.store(hashes)
    eventually(lambda: one.ask(one.tiering.report.degraded))
    assert one.ask(one.tiering.report.degraded) == [
        "hand: internal error TypeError: object of type 'NoneType' has no len()"
    ]
    tier.careless = ""
    one.written()
    eventually(lambda: one.ask(one.tiering.report.status)[0]["counters"].get("kept_shards") == 3)
    assert one.loop.errors == 0


def test_the_others_are_closed_beside_one_that_cannot_be(rig: Callable[..., Rig]) -> None:
    careless, other = CarelessTier(), HandTier()
    careless.careless = "close"
    rig(spec(careless, "one"), spec(other, "two")).close()
    assert "close" in other.calls


def test_loaded_chunks_go_to_nearer_tiers_only(rig: Callable[..., Rig]) -> None:
    near, middle, far = HandTier(True), HandTier(True), HandTier(True)
    one = rig(spec(near, "near"), spec(middle, "middle"), spec(far, "far"))
    prompt = chain(1, 3)
    for at in range(3):
        key = ShardKey(b"f" * 16, prompt[16 * at : 16 * at + 16], 0, 1)
        middle.kept[key] = content(key.chunk, 0)
    assert one.fetch(prompt) == 3
    one.written()
    assert (len(near.kept), len(middle.kept), len(far.kept)) == (3, 3, 0)


def test_read_and_write_of_a_tier_can_be_switched_off(rig: Callable[..., Rig]) -> None:
    only_read, only_write = HandTier(True), HandTier(True)
    one = rig(spec(only_read, "r", write="none"), spec(only_write, "w", read=False))
    prompt = chain(1, 3)
    one.store(prompt)
    one.written()
    assert not only_read.kept and len(only_write.kept) == 3
    one.forget_l1()
    assert one.fetch(prompt) == 0
    only_read.kept = dict(only_write.kept)
    assert one.fetch(prompt + chain(5, 1)) == 3


def test_a_choosy_tier_gets_what_is_wanted_a_second_time(rig: Callable[..., Rig]) -> None:
    """At the second store, after L1 has evicted it, or when L1 answers with it; each chunk once; beginnings before ends."""
    tier, every = HandTier(), HandTier()
    one = rig(spec(every, "every"), spec(tier, admit="second-touch", read=False))
    first, second = chain(1, 6), chain(2, 4)
    for prompt in (first, second):
        one.store(prompt)
    one.written()
    assert len(every.kept) == 10 and not tier.kept
    writes = one.tiering.writes
    one.ask(lambda: writes.used([one.space], first, 3))
    one.written()
    assert {key.chunk for key in tier.kept} == set(keys_of(first)[:3])
    asked = tier.calls.count("store")
    one.ask(lambda: writes.used([one.space], first, 3))
    one.written()
    assert tier.calls.count("store") == asked, "it has them"
    one.ask(lambda: writes.used([one.space], first, 6))
    one.written()
    assert {key.chunk for key in tier.kept} == set(keys_of(first))
    one.forget_l1()
    every.kept.clear()
    one.store(second)
    one.written()
    assert {key.chunk for key in tier.kept} == set(keys_of(first + second))


def test_what_a_slower_tier_had_is_wanted_a_second_time(rig: Callable[..., Rig]) -> None:
    near, far = HandTier(), HandTier(True)
    one, prompt = rig(spec(near, "near", admit="second-touch"), spec(far, "far")), chain(1, 5)
    one.store(prompt)
    one.written()
    assert not near.kept and len(far.kept) == 5
    one.tiering.writes.choosy[0] = one.tiering.writes.choosy[0][0], Touches()  # as after a restart
    one.forget_l1()
    assert one.fetch(prompt) == 5
    one.written()
    assert len(near.kept) == 5


def test_the_memory_of_touches_is_bounded() -> None:
    touches = Touches(100)
    names = [number.to_bytes(16, "big") for number in range(1000)]
    assert not any(touches.touch(1, name) for name in names)
    assert len(touches._young) + len(touches._old) <= 100
    assert [touches.touch(1, name) for name in (names[0], names[-1])] == [False, True]
    assert (
        touches.is_wanted(1, names[-1]) and not touches.is_wanted(2, names[-1]) and not touches.is_wanted(1, names[-2])
    )


def test_on_evict_writes_when_l1_runs_full_and_before_the_end(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier, write="on-evict"), sectors=40)
    one.store(chain(1, 20))
    one.written()
    assert not tier.kept, "half of L1 is empty"
    for seed in range(2, 30):
        one.store(chain(seed, 4))
        one.written()
    lost = one.tiering.runners[0].queue.counters["lost:evicted"]
    assert len(tier.kept) >= 20 + 28 * 4 - 40 and lost == 0, "all that was evicted had been written"
    drained = threading.Event()
    one.ask(lambda: one.tiering.writes.drain(PATIENCE, drained.set))
    assert drained.wait(PATIENCE) and len(tier.kept) == 20 + 28 * 4


def test_what_is_evicted_before_it_was_written_is_counted(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier), sectors=16, queue_bytes=1 << 30)
    tier.hold("store")
    for seed in range(10):
        one.store(chain(seed, 4))
    tier.let_go()
    one.written()
    lost = one.tiering.runners[0].queue.counters["lost:evicted"]
    assert lost > 0 and len(tier.kept) + lost == 40


def test_a_tier_in_trouble_is_tried_again_before_the_end(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    runner, tier.refuses = one.tiering.runners[0], "store"
    one.store(chain(1, 30))
    eventually(lambda: one.ask(lambda: runner.stores.state == "open" and not runner.writing and len(runner.queue)))
    drained = threading.Event()
    one.ask(lambda: one.tiering.writes.drain(PATIENCE, drained.set))
    tier.refuses = ""
    assert drained.wait(PATIENCE) and len(tier.kept) == 30


def test_a_chunk_that_is_used_before_it_is_written_is_written_and_counted_once(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    writes, (runner,) = one.tiering.writes, one.tiering.runners
    tier.hold("store")
    one.store(chain(1, 1))
    one.store(chain(2, 2))  # this one waits for the other

    def use() -> None:
        writes.nearly_full = [runner]
        writes.used([one.space], chain(2, 2), 2)
        writes.used([one.space], chain(1, 1), 1)
        runner.queue.add(one.space, chain(2, 1), bytes(16), SECTOR)  # as if L1 had lost it and got it again

    one.ask(use)
    tier.let_go()
    one.written()
    assert runner.counters["written_shards"] == 3 and runner.counters["kept_shards"] >= 4


def test_chunks_that_are_to_be_written_again_hold_up_no_end_and_are_not_lost(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    writes, (runner,) = one.tiering.writes, one.tiering.runners
    one.store(chain(1, 3))
    one.written()
    tier.hold("store")
    one.store(chain(2, 1))
    drained = threading.Event()

    def use(prompt: bytes) -> None:
        writes.nearly_full = [runner]
        writes.used([one.space], prompt, len(prompt) // 16)

    one.ask(lambda: use(chain(1, 3)))
    assert one.ask(lambda: len(runner.queue)) == 3
    one.ask(lambda: writes.drain(PATIENCE, drained.set))
    one.ask(lambda: use(chain(2, 1)))
    assert one.ask(lambda: len(runner.queue)) == 0
    tier.let_go()
    assert drained.wait(PATIENCE) and not any(name.startswith("lost") for name in runner.queue.counters)


def test_draining_has_an_end_though_the_tier_has_none(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    tier.hold("store")
    one.store(chain(1, 30))
    drained = threading.Event()
    one.ask(lambda: one.tiering.writes.drain(0.1, drained.set))
    assert drained.wait(PATIENCE) and not tier.kept


def test_clearing_a_tier_takes_what_waits_and_what_is_being_written(rig: Callable[..., Rig]) -> None:
    first, second = HandTier(), HandTier()
    one = rig(spec(first, "first"), spec(second, "second"))
    one.store(chain(1, 3))
    one.written()
    first.hold("store")
    one.store(chain(2, 30))
    eventually(lambda: one.ask(lambda: one.tiering.runners[0].writing))
    done: list[dict[str, str]] = []
    one.ask(lambda: one.tiering.clear({"first"}, done.append))
    first.let_go()
    assert eventually(lambda: done) == [{}]
    one.written()
    assert not first.kept and len(second.kept) == 33
    second.trouble = "gone"
    done.clear()
    one.ask(lambda: one.tiering.clear(None, done.append))
    assert eventually(lambda: done) == [{"second": "the tier is gone"}]


class HalfWayTier(HandTier):
    """Fails when the first shard of a call is written."""

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._called("store")
        self.kept[shards[0].key] = bytes(shards[0].payload)
        raise TierError("half way", "the rest was not written")


def test_a_write_that_fails_half_way_does_not_outlive_a_clear(rig: Callable[..., Rig]) -> None:
    tier = HalfWayTier()
    one = rig(spec(tier))
    tier.hold("store")
    one.store(chain(1, 2))
    eventually(lambda: "store" in tier.calls)
    done: list[dict[str, str]] = []
    one.ask(lambda: one.tiering.clear(None, done.append))
    eventually(lambda: done)
    tier.let_go()
    eventually(lambda: one.ask(one.tiering.report.status)[0]["counters"].get("failed:half way"))
    one.written()
    assert not tier.kept and tier.calls.count("store") == 1, "nor is it written again"


def test_what_l1_lost_by_a_clear_is_told_as_that(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    tier.hold("store")
    one.store(chain(1, 30))
    eventually(lambda: "store" in tier.calls)
    one.forget_l1()
    tier.let_go()
    one.written()
    (runner,) = one.ask(one.tiering.report.status)
    counters = runner["counters"]
    assert counters["lost:cleared"] == 30 - counters["kept_shards"] > 0 and "lost:evicted" not in counters
    assert counters["lost_bytes:cleared"] == SECTOR * counters["lost:cleared"]


@pytest.mark.parametrize("tiers_when", ["never", "amid the write", "after it"])
def test_every_chunk_of_a_failed_write_that_is_cleared_counts_once_as_cleared(
    rig: Callable[..., Rig], tiers_when: str
) -> None:
    """L1 is cleared in the middle of the write, the tier then, later, or not at all."""
    tier = HandTier()
    tier.refuses = "store"
    one = rig(spec(tier))

    def clear_tiers() -> None:
        done: list[dict[str, str]] = []
        one.ask(lambda: one.tiering.clear(None, done.append))
        eventually(lambda: done)

    tier.hold("store")
    one.store(chain(1, 30))
    eventually(lambda: "store" in tier.calls)
    one.forget_l1()
    if tiers_when == "amid the write":
        clear_tiers()
    tier.let_go()
    (runner,) = one.tiering.runners
    eventually(lambda: one.ask(lambda: runner.counters["failed:refused"] and not runner.writing))
    if tiers_when == "after it":
        clear_tiers()
    one.ask(runner.stores.succeeded)  # the tier is tried again
    one.written()
    assert one.ask(lambda: dict(runner.queue.counters)) == {
        "queued": 30,
        "lost:cleared": 30,
        "lost_bytes:cleared": 30 * SECTOR,
    }
    assert not tier.kept


def amid_a_load(rig: Callable[..., Rig]) -> tuple[HandTier, Rig, bytes]:
    """A tier that holds up the load of a prompt until it is let go."""
    tier = HandTier()
    one = rig(spec(tier))
    prompt = chain(1, 8)
    one.held_up(tier, prompt)
    return tier, one, prompt


def test_a_load_for_an_engine_that_has_gone_is_no_harm(rig: Callable[..., Rig]) -> None:
    tier, one, prompt = amid_a_load(rig)
    one.ask(lambda: one.l1.leave(ENGINE))
    tier.let_go()
    eventually(lambda: one.ask(lambda: not one.l1.open_reservations))
    one.ask(one._join)
    one.forget_l1()
    assert one.ask(lambda: one.l1.used_bytes()) == 0
    eventually(lambda: one.fetch(prompt) == 8)


def test_l1_is_cleared_in_the_middle_of_a_load(rig: Callable[..., Rig]) -> None:
    tier, one, prompt = amid_a_load(rig)
    one.forget_l1()
    tier.let_go()
    eventually(lambda: one.ask(lambda: not one.l1.open_reservations))
    assert one.ask(lambda: one.l1.leave_reservations(SERVER)) is None
    eventually(lambda: one.fetch(prompt) == 8)


def test_tiers_that_are_required_must_serve(tmp_path: Path) -> None:
    tier = HandTier()
    tier.trouble = "not there"
    loop = Loop()
    arena = Arena(tmp_path, SECTOR)
    tiering = Tiering(loop, L1(arena), [spec(tier)], chunk_tokens=16, always=False, patience_seconds=1.0, queue_bytes=1)
    with pytest.raises(ConfigError, match=r"--l2 hand://: the tier is not there"):
        tiering.open(required=True)
    tiering.open(required=False)
    assert tiering.report.degraded() == ["hand: the tier is not there"]
    tiering.close()
    arena.close()
    loop.close()


def test_a_tier_that_opens_late_serves_later(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The start does not wait for it, and nobody has to tell the server when it is there."""
    monkeypatch.setattr("lmcache.server.tiering.OPEN_SECONDS", 0.05)
    tier = HandTier(True)
    tier.gates["open"] = threading.Event()
    one = rig(spec(tier))
    assert one.ask(one.tiering.report.degraded) == ["hand: not open after 0 s"]
    one.store(chain(1, 3))
    tier.let_go()
    eventually(lambda: one.ask(lambda: one.tiering.report.degraded() == []))
    one.written()
    assert len(tier.kept) == 3


def test_what_comes_too_late_is_there_for_the_next(rig: Callable[..., Rig]) -> None:
    tier = HandTier(True)
    one = rig(spec(tier))
    prompt = chain(1, 4)
    one.held_up(tier, prompt, rate=1000.0)
    assert one.fetch(prompt, rate=1000.0) == 0, "it was given up"
    assert one.ask(lambda: one.tiering.fetches.records[-1].outcome) == "late"
    tier.let_go()
    eventually(lambda: one.there(prompt) == 4)


def test_a_frame_names_the_chunk_before(rig: Callable[..., Rig]) -> None:
    tier, parents = HandTier(), dict[bytes, bytes]()
    store = tier.store

    def noted(shards: Sequence[Shard]) -> list[str]:
        parents.update((one.key.chunk, one.parent) for one in shards)
        return store(shards)

    tier.store = noted  # type: ignore[method-assign]
    one = rig(spec(tier))
    prompt = chain(1, 9)
    one.store(prompt)
    one.written()
    chunks = [prompt[at : at + 16] for at in range(0, len(prompt), 16)]
    assert parents == dict(zip(chunks, [bytes(16), *chunks], strict=False))


def test_the_state_of_a_breaker_is_shown(rig: Callable[..., Rig]) -> None:
    tier = HandTier()
    one = rig(spec(tier))
    runner = one.tiering.runners[0]

    def shown() -> tuple[object, object, object]:
        (status,), metrics = one.ask(one.tiering.report.status), one.ask(one.tiering.report.counters)
        return status["state"], status["reason"], metrics['tier_serving{tier="hand"}']

    assert shown() == ("serving", "", True)
    runner.breaker.pause_seconds = 3600.0
    tier.trouble = "on fire"
    one.store(chain(1, 2))
    eventually(lambda: not runner.breaker.closed)
    assert shown() == ("failing", "the tier is on fire", False)
    tier.hold("contains")
    tier.trouble = ""
    runner.breaker.retry_at = 0.0
    eventually(lambda: shown() == ("being tried", "the tier is on fire", False))
    tier.let_go()
    eventually(lambda: shown() == ("serving", "", True))
    assert one.ask(one.tiering.report.counters)['tier_opened_breaker_total{tier="hand"}'] == 1


def test_what_was_lost_or_missed_is_counted_with_its_reason(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, said, drained = HandTier(True), list[str](), threading.Event()
    monkeypatch.setattr(
        "lmcache.server.tier_report.logger.warning", lambda text, *parts: said.append(text % parts if parts else text)
    )
    one = rig(spec(tier), queue_bytes=3 * SECTOR)
    tier.hold("store")
    one.store(chain(1, 1))
    eventually(lambda: tier.calls.count("store") == 1)
    for seed in range(2, 7):
        one.store(chain(seed, 1))
    metrics = one.ask(one.tiering.report.counters)
    assert metrics['tier_lost_total{tier="hand",reason="queue full"}'] == 2
    one.ask(lambda: one.tiering.writes.drain(0.05, drained.set))
    assert drained.wait(PATIENCE) and "Tier hand: 3 chunks could not be written before the server ended" in said
    tier.let_go()
    one.written()
    one.forget_l1()
    monkeypatch.setattr(tier, "load", lambda keys, into: ["checksum"] * len(keys))
    assert one.fetch(chain(1, 1)) == 0
    assert one.ask(one.tiering.report.counters)['tier_missed_total{tier="hand",reason="checksum"}'] == 1


def test_a_last_write_that_fails_is_told_of_as_well(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is under way when the time is over, and what it could not write is put back."""
    tier, said, drained = HandTier(True), list[str](), threading.Event()
    monkeypatch.setattr(
        "lmcache.server.tier_report.logger.warning", lambda text, *parts: said.append(text % parts if parts else text)
    )
    one = rig(spec(tier))
    tier.hold("store")
    one.store(chain(1, 4))
    eventually(lambda: tier.calls.count("store") == 1)
    one.ask(lambda: one.tiering.writes.drain(0.05, drained.set))
    assert drained.wait(PATIENCE) and not said
    tier.trouble = "on fire"
    tier.let_go()
    one.close()
    assert [line for line in said if "before the server ended" in line] == [
        "Tier hand: 4 chunks could not be written before the server ended"
    ]


# What is not written is told


class HandClock:
    """It stands still until a test moves it."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Told:
    """A rig whose clock stands still until `later` moves it, and what is logged about its tiers."""

    def __init__(self, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, tier: HandTier, **more: Any) -> None:
        self.clock, self.said = HandClock(), list[str]()
        for module in ("tier_report", "tier_runner"):
            monkeypatch.setattr(
                f"lmcache.server.{module}.logger.warning", lambda text, *parts, **_: self.said.append(text % parts)
            )
        self.rig = rig(spec(tier), clock=self.clock, **more)

    def later(self, seconds: float) -> list[str]:
        """What was said since the last call and after so many seconds more, by any number of ticks."""
        self.clock.time += seconds
        for _ in range(3):
            self.rig.ask(self.rig.tiering._tick)
        said, self.said[:] = self.said[:], []
        return said


def test_losses_are_told_at_once_and_then_now_and_then(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier hangs, and three chunks may wait."""
    tier = HandTier()
    told = Told(rig, monkeypatch, tier, sectors=1024, queue_bytes=3 * SECTOR)
    tier.hold("store")
    told.rig.store(chain(1, 1))
    eventually(lambda: "store" in tier.calls)
    (hangs,) = told.later(60)
    assert hangs.startswith("Tier hand: store has not returned for "), "and no loss yet"
    why = "queue full: a higher --l2-queue-gb lets more chunks wait"
    told.rig.store(chain(2, 3 + 384))
    assert told.later(0) == [f"Tier hand: not written: 384 chunks (1.5 MiB), {why}"], "at once"
    for seed in range(3, 7):
        told.rig.store(chain(seed, 64))
        assert told.later(2.4) == [], "within ten seconds: once"
    assert told.later(0.5) == [f"Tier hand: not written: 256 chunks (1.0 MiB), {why}"], "only what is new"
    assert told.later(60) == [], "nothing is new"
    tier.let_go()
    told.rig.written()
    assert told.later(60) == [], "what waited has been written"
    assert len(tier.kept) == 1 + 3
    metrics = told.rig.ask(told.rig.tiering.report.counters)
    assert metrics['tier_lost_bytes_total{tier="hand",reason="queue full"}'] == 640 * SECTOR


def test_what_a_tier_refuses_is_told_with_its_reasons_and_at_the_end_in_any_case(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, outcomes = HandTier(), list[str]()
    told = Told(rig, monkeypatch, tier, shards=2)
    monkeypatch.setattr(tier, "store", lambda shards: outcomes)

    def answered(seed: int, *answers: str) -> None:
        outcomes[:] = answers
        told.rig.store(chain(seed, 2))
        told.rig.written()

    answered(1, OK, KEPT, OK, OK)
    assert told.later(60) == []
    answered(2, "too large", "cursed", OK, "too large")
    too_large = "too large: set a higher max_gb or a lower --chunk-size"
    assert told.later(0) == [f"Tier hand: not written: 2 shards (0.0 MiB), {too_large}; 1 shards (0.0 MiB), cursed"]
    answered(3, "cursed", OK, "cursed", "cursed")
    assert told.later(9) == []
    metrics = told.rig.ask(told.rig.tiering.report.counters)
    assert metrics['tier_unwritten_bytes_total{tier="hand",reason="too large"}'] == 2 * SECTOR
    assert metrics['tier_unwritten_bytes_total{tier="hand",reason="cursed"}'] == 4 * SECTOR
    told.rig.close()
    assert told.said == ["Tier hand: not written: 3 shards (0.0 MiB), cursed"]


def test_what_was_evicted_is_lost_once_though_the_rest_of_its_batch_is_tried_again(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, store, fails = HandTier(), HandTier.store, [False, True, True]
    told = Told(rig, monkeypatch, tier, sectors=16, queue_bytes=64 * SECTOR)

    def sometimes(shards: Sequence[Shard]) -> list[str]:
        outcomes = store(tier, shards)
        if fails and fails.pop(0):
            raise TierError("trouble", "it was not kept")
        return outcomes

    monkeypatch.setattr(tier, "store", sometimes)
    tier.hold("store")
    told.rig.store(chain(1, 4))
    eventually(lambda: "store" in tier.calls)
    for seed in range(2, 5):
        told.rig.store(chain(seed, 4))
    told.rig.store(chain(5, 2))  # it takes the place of the end of what waits longest
    tier.let_go()
    told.rig.written()
    assert not fails and len(tier.kept) == 4 * 4
    lines = [line for line in told.later(0) if "not written" in line]
    assert lines == ["Tier hand: not written: 2 chunks (0.0 MiB), evicted: a higher --l1-size-gb keeps chunks longer"]


# Asynchronous tiers, and deadlines


class OwnThreadTier(AsyncTier):
    """A dictionary whose operations one thread of the tier completes, but for those of methods that the test holds.

    gives_up: it ends an operation that is held when it is asked to cancel that.
    """

    scheme = "hand"
    concurrency = 2
    batch_bytes = 4 * SECTOR

    def __init__(self, gives_up: bool = True) -> None:
        self.hand, self.gives_up = HandTier(), gives_up
        self.region: Region | None = None
        self.holds, self.cancels, self.faults = set[str](), list[str](), set[str]()
        self.held: dict[Operation[Any], None] = {}
        self._queue: queue.SimpleQueue[Operation[Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    @classmethod
    def from_url(cls, url: TierURL) -> OwnThreadTier:
        return cls()

    def hold(self, method: str) -> None:
        self.holds.add(method)

    def let_go(self) -> None:
        self.holds.clear()
        for operation in list(self.held):
            if self.held.pop(operation, 1) is None:
                self._queue.put(operation)

    def attach(self, region: Region) -> None:
        self.region = region

    def usage(self) -> Usage:
        return self.hand.usage()

    def submit(self, operation: Operation[Any]) -> None:
        if f"submit {operation.method}" in self.faults:
            raise KeyError("not this one")
        self._queue.put(operation)

    def cancel(self, operation: Operation[Any]) -> None:
        self.cancels.append(operation.method)
        if "cancel" in self.faults:
            raise KeyError("not this one")
        if self.gives_up and self.held.pop(operation, 1) is None:
            operation.cancelled()

    def _serve(self) -> None:
        while True:
            operation = self._queue.get()
            if operation.method in self.holds:
                self.held[operation] = None
                continue
            arguments = [getattr(operation, name) for name in ("keys", "into", "shards") if hasattr(operation, name)]
            result = getattr(self.hand, operation.method)(*arguments)
            operation.complete(result)
            if "twice" in self.faults:
                operation.complete(result)


def test_an_asynchronous_tier_is_written_to_and_read_from(rig: Callable[..., Rig]) -> None:
    tier = OwnThreadTier()
    one, prompt = rig(spec(tier), shards=2), chain(1, 9)
    one.store(prompt)
    one.written()
    assert len(tier.hand.kept) == 18
    one.forget_l1()
    assert one.fetch(prompt + chain(2, 3)) == 9
    done = list[dict[str, str]]()
    one.ask(lambda: one.tiering.clear(None, done.append))
    assert eventually(lambda: done) == [{}] and not tier.hand.kept
    one.close()
    assert tier.hand.calls[-1] == "close" and tier.cancels == []


def test_a_tier_is_told_where_all_memory_lies_that_it_is_handed(rig: Callable[..., Rig]) -> None:
    tier = OwnThreadTier()
    one, prompt = rig(spec(tier)), chain(1, 3)
    one.held_up(tier, prompt)
    (load,) = eventually(lambda: list(tier.held))
    region = tier.region
    assert region is not None and isinstance(load, Load)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in load.into]
    assert all(0 <= at - region.address <= region.size_bytes - SECTOR for at in addresses)
    assert len(region.memory) == region.size_bytes == one.l1.arena.size_bytes
    one.close()
    with pytest.raises(ValueError, match="released"):
        region.memory[0]


def tier_of(kind: str) -> HandTier | OwnThreadTier:
    return HandTier() if kind == "blocking" else OwnThreadTier(kind == "gives up")


@pytest.mark.parametrize("kind", ["blocking", "gives up", "goes on"])
def test_a_load_that_passes_its_deadline_is_a_miss_at_once_and_keeps_its_memory_until_it_ends(
    rig: Callable[..., Rig], kind: str
) -> None:
    tier, clock = tier_of(kind), HandClock()
    one, prompt = rig(spec(tier), clock=clock, always=True, patience_seconds=3600.0), chain(1, 6)
    one.held_up(tier, prompt)
    calls = tier.calls if isinstance(tier, HandTier) else tier.held
    eventually(lambda: sum("load" in (call if isinstance(call, str) else call.method) for call in calls) == 2)

    def pass_time() -> None:
        clock.time += one.l1.claim_seconds + 1
        one.l1.tick(clock())
        one.tiering._tick()

    one.ask(pass_time)
    assert one.wait_for(prompt) == 0
    assert one.ask(lambda: one.tiering.fetches.records[-1].outcome) == "failed"
    counters = one.tiering.runners[0].counters
    assert counters["missed:too late"] == 6
    if kind == "gives up":
        eventually(lambda: not one.ask(lambda: one.l1.open_reservations))
        assert counters["failed:late"] == 2
    assert one.ask(lambda: one.l1.quarantined_bytes) == (0 if kind == "gives up" else 6 * SECTOR)
    one.store(prompt)  # as an engine that has computed it meanwhile
    assert one.there(prompt) == 6
    tier.let_go()
    eventually(lambda: not one.ask(lambda: one.l1.open_reservations))
    assert one.ask(lambda: one.l1.quarantined_bytes) == 0 and one.there(prompt) == 6
    assert counters["missed:too late"] == 6 and one.loop.errors == 0


def test_a_question_behind_calls_that_hang_is_given_up_at_its_deadline(rig: Callable[..., Rig]) -> None:
    """The tier's two threads are in calls that do not return."""
    tier, clock = HandTier(), HandClock()
    one = rig(spec(tier), clock=clock, patience_seconds=10.0)
    tier.hold("contains")
    for seed in range(3):
        one.wait_for(chain(seed, 2))
    eventually(lambda: tier.calls.count("contains") == 2)
    clock.time += 11.0
    one.ask(one.tiering._tick)
    counters = one.tiering.runners[0].counters
    eventually(lambda: counters["failed:late"] == 1)
    tier.let_go()
    eventually(lambda: not one.ask(lambda: one.tiering.runners[0].under_way))
    assert tier.calls.count("contains") == 2


def test_the_time_that_a_question_waits_for_a_thread_is_not_the_tiers(rig: Callable[..., Rig]) -> None:
    """Otherwise a burst of questions would make a quick tier too slow to ask."""
    tier, clock = HandTier(), HandClock()
    one = rig(spec(tier), clock=clock, patience_seconds=3600.0)
    tier.hold("contains")
    for seed in range(3):
        one.wait_for(chain(seed, 2))
    eventually(lambda: tier.calls.count("contains") == 2)
    clock.time += 0.5
    tier.let_go()
    eventually(lambda: not one.ask(lambda: one.tiering.runners[0].under_way))
    ask_seconds = one.tiering.fetches.paces[0].ask_seconds
    assert ask_seconds is not None and ask_seconds < 0.45, "0.5, 0.5 and 0.0 s, of which the last two are in any order"


def test_an_operation_that_gets_no_thread_is_not_kept_while_the_tier_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tier may hang for hours, and is tried now and then."""
    loop, tier, ended = Loop(), HandTier(), list[Any]()
    adapter = BlockingAdapter(tier, "hand", loop.executor, loop.now)

    def load() -> Load:
        return Load(
            0.0, lambda result, error: ended.append(result), [ShardKey(b"f" * 16, b"c" * 16, 0, 1)], [bytearray(1)]
        )

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tier.hold("load")
    adapter.submit(load())
    eventually(lambda: tier.calls == ["load"])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        refused = [load() for _ in range(3)]
        for operation in refused:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                adapter.submit(operation)
    operations = [weakref.ref(operation) for operation in refused]
    del refused, operation
    gc.collect()
    assert [operation() for operation in operations] == [None] * 3
    tier.let_go()
    adapter.submit(load())
    eventually(lambda: len(ended) == 2)
    assert tier.calls == ["load"] * 2
    loop.close()


def test_what_a_tier_has_not_stored_in_time_is_stored_again(rig: Callable[..., Rig]) -> None:
    tier, clock = OwnThreadTier(), HandClock()
    one = rig(spec(tier), clock=clock)
    tier.hold("store")
    one.store(chain(1, 3))
    eventually(lambda: tier.held)
    tier.holds.clear()
    clock.time += 61.0
    one.ask(one.tiering._tick)
    one.written()
    assert len(tier.hand.kept) == 3 and tier.cancels == ["store"]


def test_faults_of_an_asynchronous_tier_cost_no_extents_and_no_chunks(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, said, clock = OwnThreadTier(), list[str](), HandClock()
    monkeypatch.setattr("lmcache.server.tier_runner.logger.error", lambda text, *parts, **_: said.append(text % parts))
    one, prompt = rig(spec(tier), clock=clock), chain(1, 3)
    tier.faults = {"twice"}
    one.store(prompt)
    eventually(lambda: said == ["Tier hand ended one store operation twice, which is a bug in the tier"])
    one.written()
    one.forget_l1()
    tier.faults = {"submit load", "cancel"}
    assert one.fetch(prompt) == 0
    assert one.tiering.runners[0].counters["failed:internal"] == 1
    assert one.ask(lambda: one.l1.open_reservations) == 0
    tier.hold("load")
    tier.faults.discard("submit load")
    assert one.wait_for(prompt) == 3
    eventually(lambda: tier.held)
    clock.time += one.l1.claim_seconds + 1
    one.ask(one.tiering._tick)
    assert tier.cancels == ["load"] and one.loop.errors == 0
    tier.let_go()
    eventually(lambda: not one.ask(lambda: one.l1.open_reservations))


@pytest.mark.parametrize("gives_up", [True, False])
def test_the_end_cancels_what_is_under_way_and_leaves_behind_what_goes_on(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    tier, said = OwnThreadTier(gives_up), list[str]()
    monkeypatch.setattr("lmcache.server.tier_report.logger.warning", lambda text, *parts: said.append(text % parts))
    monkeypatch.setattr("lmcache.server.tiering.CLOSE_SECONDS", PATIENCE if gives_up else 0.05)
    one = rig(spec(tier))
    tier.hold("store")
    one.store(chain(1, 4))
    (store,) = eventually(lambda: list(tier.held))
    one.close(let_go=False)
    assert tier.cancels == ["store"] and "Tier hand: 4 chunks could not be written before the server ended" in said
    behind = [line for line in said if "abandoned: 1 calls (1 of store)" in line]
    assert ("close" in tier.hand.calls, len(behind)) == ((True, 0) if gives_up else (False, 1))
    store.cancelled()  # it does no harm to a loop that has been closed


def test_a_split_that_cannot_be_read_does_not_keep_lookups_waiting() -> None:
    """The tier has it, but another engine has registered the same name for shards that are no parts of the layout."""
    tier, family, prompt = HandTier(knows=True), b"s" * 16, chain(80, 4)
    rig = Rig(spec(tier), clock=lambda: 1000.0)

    def open_spaces() -> int:
        for shard in range(2):
            rig.l1.open_space(ENGINE, family, 2, shard, 3 * SECTOR)
        return rig.l1.open_space(ENGINE, family, 1, 0, 2 * SECTOR, 0, 1.0, family, Split((), 1), [Split((), 2)])

    try:
        space = rig.ask(open_spaces)
        tier.kept = {ShardKey(family, prompt[:16], shard, 2): bytes(SECTOR) for shard in range(2)}
        for _ in range(3):
            eventually(lambda: not rig.ask(lambda: rig.tiering.wait_for(Asker(ENGINE), [space], prompt, 0.0, True))[1])
        assert not rig.ask(lambda: rig.l1.space(space).sisters), "nothing was opened"
    finally:
        rig.close()


def test_slow_loads_that_fail_are_not_begun_again_while_a_lookup_asks_for_another_split() -> None:
    """Otherwise each of the two would be forgotten while the lookup waits for the other one, and the wait would never end."""
    clock, family, prompt = HandClock(), b"s" * 16, chain(81, 2)

    class Slow(HandTier):
        def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
            self._called("load")
            clock.time += 2 * ENDED_SECONDS
            return [ABSENT] * len(keys)

    tier = Slow()
    rig = Rig(spec(tier), clock=clock)

    def open_spaces() -> int:
        for shard in range(2):
            rig.l1.open_space(ENGINE, family, 2, shard, SECTOR, 0, 1.0, family, Split((), 2))
        return rig.l1.open_space(ENGINE, family + b"1", 1, 0, 2 * SECTOR, 0, 1.0, family, Split((), 1))

    try:
        space = rig.ask(open_spaces)
        tier.kept = {ShardKey(family + b"1", prompt[at : at + 16], 0, 1): b"" for at in range(0, len(prompt), 16)}

        def wait() -> int:
            return rig.ask(lambda: rig.tiering.wait_for(Asker(ENGINE), [space], prompt, 0.0, True))[1]

        eventually(lambda: not wait() or tier.calls.count("load") > 4)
        assert tier.calls.count("load") == 1
    finally:
        rig.close()
