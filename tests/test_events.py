"""Events of L1: they name chunks only for those who ask, and no listener costs anybody else anything."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.cache import KINDS, L1, TIER_KINDS, Event, Heart
from lmcache.chunks import TokenChain
from lmcache.engine import Store
from lmcache.memory.arena import Arena, ArenaFull
from servers import PATIENCE, eventually, server_parts

SECTOR = 4096


def chain(seed: int, chunks: int) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


def life(heart: Heart) -> None:
    """Four chunks are stored, hit with one that is missing, evicted for another space's, and cleared."""
    for process, name in ((1, b"f" * 16), (2, b"g" * 16)):
        heart.join(process, f"engine {process}")
        heart.open_space(process, name, 1, 0, SECTOR)
    keys = chain(1, 5)
    grant = heart.reserve(1.0, 1, 0, 0, b"", True, keys[:64])
    heart.commit(1.0, 1, grant.reservation, True)
    heart.release(1, heart.lookup(2.0, 1, 0, keys, request="r-1").lease)
    heart.leave(1)
    for seed, ok in ((2, True), (3, False)):
        grant = heart.reserve(3.0, 2, 1, 0, b"", True, chain(seed, 2))
        heart.commit(3.0, 2, grant.reservation, ok)
    heart.reserve(4.0, 2, 1, 0, b"nobody's".ljust(16), False, chain(4, 1))
    heart.reserve(4.0, 2, 1, 0, b"", True, chain(5, 1))
    heart.tick(100.0)
    heart.clear()


def test_every_event_says_what_where_who_and_why() -> None:
    heart, events = Heart(4 * SECTOR), list[Event]()
    heart.events.listen(KINDS, events.append, timed=True)
    life(heart)
    keys = chain(1, 5)
    assert events[:5] == [
        Event("reserved", 0, 4, process=1, shard=0, hashes=keys[:64]),
        Event("committed", 0, 4, process=1, shard=0, hashes=keys[:64]),
        Event("stored", 0, 4, process=1, hashes=keys[:64], parents=bytes(16) + keys[:48]),
        Event("hit", 0, 4, process=1, request="r-1", hashes=keys[:64]),
        Event("missed", 0, 1, "absent", process=1, request="r-1", hashes=keys[64:]),
    ]
    evicted = [one for one in events if one.kind == "evicted"]
    assert {(one.space, one.reason, one.process, one.wanted_by) for one in evicted} == {(0, "room", 2, 1)}
    assert sum(one.chunks for one in evicted) == 4 and {used for one in evicted for used in one.last_used} == {2.0}
    later = {one.kind: one for one in events if one.space == 1}
    assert later["dropped"][2:4] == (1, "too late") and later["dropped"].hashes == chain(5, 1)
    assert later["refused"] == Event("refused", 1, 1, "no parent", process=2, shard=0, hashes=chain(4, 1))
    assert later["expired"].reason == "reservation" and later["expired"].hashes == chain(5, 1)
    assert later["cleared"] == Event("cleared", 1, 2, hashes=later["cleared"].hashes)
    assert Counter({kind: sum(one.chunks for one in events if one.kind == kind) for kind in KINDS}) == Counter(
        {kind: count for kind, count in heart.events.counters.items() if kind in KINDS}
    )


class Life:
    """An L1 of eight extents, whose events are heard. Process 1 uses space 0 of one shard, process 2 space 1 of two shards.

    Each operation takes place a second after the one before, for the request rN at the time N; the first one is r1.
    """

    def __init__(self, folder: Path) -> None:
        self.l1, self.events, self.now = L1(Arena(folder, 8 * SECTOR), claim_seconds=30.0), list[Event](), 0.0
        for process, name, shards in ((1, b"f" * 16, 1), (2, b"g" * 16, 2)):
            self.l1.join(process, f"engine {process}")
            for shard in range(shards):
                self.l1.open_space(process, name, shards, shard, SECTOR)
        self.l1.events.listen(KINDS, self.events.append, timed=True)

    def reserve(
        self, hashes: bytes, process: int = 1, shard: int = 0, tier: str = "", parent: bytes = b"", space: int = 0
    ) -> int:
        self.now += 1.0
        where = process, space or process // 2, shard, parent, not parent, hashes, tier, f"r{self.now:.0f}"
        return self.l1.reserve(self.now, *where).reservation

    def store(self, hashes: bytes, process: int = 1, *more: Any) -> None:
        self.l1.commit(self.now, process, self.reserve(hashes, process, *more), True)

    def lookup(self, hashes: bytes, process: int = 1) -> int:
        self.now += 1.0
        return self.l1.lookup(self.now, process, process // 2, hashes, request=f"r{self.now:.0f}").lease

    def hold(self, hashes: bytes, tier: str) -> None:
        self.l1.hold(self.now, 0, hashes, tier)

    def later(self) -> None:
        """Claims expire."""
        self.now += 50.0
        self.l1.tick(self.now)

    def fail(self, reservation: int) -> None:
        self.l1.commit(self.now, 1, reservation, False)

    def no_memory(self) -> None:
        """The file system gives none for the next reservation."""
        back, failures = self.l1.arena.back, [ArenaFull("no memory")]

        def once(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            back(*arguments)

        self.l1.arena.back = once  # type: ignore[method-assign]


A, B, C, MANY = chain(1, 2), chain(2, 2), chain(3, 1), chain(4, 6)
CASES: list[tuple[Callable[[Life], object], Event]] = [
    (lambda one: (one.store(A), one.lookup(A + C)), Event("hit", 0, 2, "", 1, "", "r2", hashes=A)),
    (
        lambda one: (one.store(A), one.lookup(A + C)),
        Event("missed", 0, 1, "absent", 1, "", "r2", hashes=C),
    ),
    (
        lambda one: (one.reserve(A), one.lookup(A)),
        Event("missed", 0, 2, "being filled", 1, "", "r2", hashes=A),
    ),
    (
        lambda one: (one.store(A, 2), one.lookup(A, 2)),
        Event("missed", 1, 2, "incomplete", 2, "", "r2", hashes=A),
    ),
    (
        lambda one: (one.store(A + C), one.lookup(A + C), one.later(), one.lookup(B)),
        Event("missed", 0, 2, "quarantine", 1, "", "r53", hashes=B),
    ),
    (
        lambda one: (one.store(A), one.lookup(A), one.lookup(A)),
        Event("missed", 0, 2, "too many leases", 1, "", "r3", hashes=A),
    ),
    (
        lambda one: (one.store(A), one.store(B, 1, 0, "", A[16:])),
        Event("stored", 0, 2, "", 1, "", "r2", hashes=B, parents=A[16:] + B[:16]),
    ),
    (
        lambda one: (one.store(A, 2), one.store(A, 0, 1, "disk", b"", 1)),
        Event("stored", 1, 2, "", 0, "disk", "r2", hashes=A, parents=bytes(16) + A[:16]),
    ),
    (lambda one: one.store(A, 0, 0, "disk"), Event("reserved", 0, 2, "", 0, "disk", "r1", 0, A)),
    (lambda one: one.store(A, 2, 1), Event("committed", 1, 2, "", 2, "", "r1", 1, A)),
    (
        lambda one: (one.store(A), one.l1.release(1, one.lookup(A)), one.store(MANY), one.store(C, 0, 0, "disk")),
        Event("evicted", 0, 1, "room", 0, "disk", "r4", -1, A[16:], b"", 0, (2.0,)),
    ),
    (
        lambda one: (one.store(A, 2), one.store(MANY, 2), one.store(B, 2)),
        Event("incomplete", 1, 2, "room", 2, "", "r3", -1, A[16:] + A[:16], b"", 1, (1.0, 1.0)),
    ),
    (lambda one: (one.store(A), one.l1.clear()), Event("cleared", 0, 2, hashes=A)),
    (lambda one: one.fail(one.reserve(A)), Event("dropped", 0, 2, "copy failed", 1, "", "r1", 0, A)),
    (lambda one: (one.reserve(A, 2, 1), one.later()), Event("dropped", 1, 2, "too late", 2, "", "r1", 1, A)),
    (lambda one: (one.reserve(A), one.l1.leave(1)), Event("dropped", 0, 2, "owner died", 1, "", "r1", 0, A)),
    (
        lambda one: (one.reserve(A), one.l1.leave_reservations(1)),
        Event("dropped", 0, 2, "connection lost", 1, "", "r1", 0, A),
    ),
    (
        lambda one: one.l1.commit(1.0, 0, (one.reserve(A, 0, 0, "disk"), one.l1.clear())[0], True),
        Event("dropped", 0, 2, "cleared", 0, "disk", "r1", 0, A),
    ),
    (
        lambda one: (one.no_memory(), one.reserve(A, 0, 0, "disk")),
        Event("dropped", 0, 2, "no memory", 0, "disk", "r1", 0, A),
    ),
    (lambda one: one.reserve(C, 1, 0, "", A[:16]), Event("refused", 0, 1, "no parent", 1, "", "r1", 0, C)),
    (
        lambda one: (one.reserve(MANY), one.reserve(A + C, 0, 0, "disk")),
        Event("refused", 0, 1, "no room", 0, "disk", "r2", 0, C),
    ),
    (
        lambda one: (one.reserve(MANY, 2, 1), one.later(), one.reserve(C, 2)),
        Event("refused", 1, 1, "quarantine", 2, "", "r52", 0, C),
    ),
    (
        lambda one: (one.l1.leave(1), one.reserve(C, 0, 0, "disk")),
        Event("refused", 0, 1, "no engine", 0, "disk", "r1", 0, C),
    ),
    (
        lambda one: (one.reserve(A, 0, 0, "disk"), one.later()),
        Event("expired", 0, 2, "reservation", 0, "disk", "r1", 0, A),
    ),
    (lambda one: (one.store(A), one.lookup(A), one.later()), Event("expired", 0, 2, "lease", 1, "", "r2", -1, A)),
    (
        lambda one: (one.store(A), one.hold(A, "disk"), one.later()),
        Event("expired", 0, 2, "lease", 0, "disk", "", -1, A),
    ),
]


@pytest.mark.parametrize(("act", "expected"), CASES, ids=[f"{event.kind} {event.reason}" for _, event in CASES])
def test_every_kind_of_event_has_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Life], object], expected: Event
) -> None:
    monkeypatch.setattr("lmcache.cache.claims.MAX_LEASES", 1)
    one = Life(tmp_path)
    act(one)
    assert [event for event in one.events if event.kind == expected.kind][-1] == expected
    one.l1.arena.close()


def test_no_kind_of_event_was_forgotten() -> None:
    assert {expected.kind for _, expected in CASES} == set(KINDS)


def test_who_asks_for_no_names_gets_none_and_nothing_is_copied() -> None:
    heart, events = Heart(4 * SECTOR), list[Event]()
    heart.events.listen(KINDS, events.append, named=False)
    life(heart)
    assert len(events) > 10 and not any(one.hashes or one.parents or one.last_used for one in events)
    large = Heart(8192 * SECTOR)
    large.join(1, "engine")
    space, keys = large.open_space(1, b"f" * 16, 1, 0, SECTOR), chain(6, 8192)
    large.commit(0.0, 1, large.reserve(0.0, 1, space, 0, b"", True, keys).reservation, True)
    asked = keys + bytes(16)
    tracemalloc.start()
    large.release(1, large.lookup(0.0, 1, space, asked).lease)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < len(keys), "ids and pages take half of it; a copy of the hashes would be as large again"


def test_a_listener_that_fails_fails_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    heart, heard = Heart(4 * SECTOR), list[Event]()
    heart.events.listen(["stored", "evicted"], lambda event: 1 // 0)
    heart.events.listen(["stored"], heard.append)
    life(heart)
    assert sum(event.chunks for event in heard) == heart.events.counters["stored"] == 6
    assert heart.events.counters["failed_effects"] > 3
    assert len([one for one in caplog.records if "Processing an L1 event" in one.getMessage()]) == 2, "once a kind"


def test_a_real_engine_and_a_real_tier_are_named_in_what_they_cause(folders, engine) -> None:
    """L1 has room for 16 chunks: `b` evicts the end of `a`, which is loaded again; then `c` finds no room, and `d` no blocks."""
    with server_parts(folders, 16 * SECTOR, l2=[f"disk://{folders('/tmp')}?max_gb=1"]) as (service, port):
        events = list[Event]()
        service.loop.ask(lambda: service.l1.events.listen(KINDS + TIER_KINDS, events.append, timed=True), PATIENCE)
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"))
        a, b, c, d = (one.chain(range(seed, seed + 16 * chunks)) for seed, chunks in ((1, 8), (2, 12), (3, 10), (4, 1)))

        def lookup(request: str) -> Any:
            return one.scheduler.lookup(a, request_id=request)

        def store(chain: TokenChain, request: str, blocks: list[int]) -> None:
            one.worker.store(request, Store(16, chain.parent(0), chain.hashes, 0, blocks, request_id=request))
            one.wait(request)
            eventually(lambda: service.loop.ask(lambda: service.tiering.writes.idle, PATIENCE))

        assert lookup("a-1") is None
        store(a, "a-2", one.table(8 * 16))
        store(b, "b-1", one.table(12 * 16))
        assert lookup("a-3").chunks == 8
        store(c, "c-1", one.table(10 * 16))
        store(d, "d-1", [1 << 20])
        service.loop.ask(lambda: service.l1.tick(time.monotonic() + 100.0), PATIENCE)
        service.loop.ask(service.clear, PATIENCE)
    (lookups,) = {event.process for event in events if event.kind == "hit"}
    (stores,) = {event.process for event in events if event.kind == "reserved" and not event.tier}
    caused = {(event.kind, event.reason, event.process, event.tier, event.request): b"" for event in events}
    for event in events:
        assert event.space == 0 and len(event.hashes) == 16 * event.chunks
        assert len(event.parents) == 16 * event.chunks * (event.kind == "stored")
        assert len(event.last_used) == event.chunks * (event.kind == "evicted") and None not in event.last_used
        assert event.wanted_by == (0 if event.kind == "evicted" else -1)
        of_shard = event.kind in ("reserved", "committed", "dropped", "refused", *TIER_KINDS)
        assert event.shard == (0 if of_shard else -1)
        caused[event.kind, event.reason, event.process, event.tier, event.request] += event.hashes
    filled = "reserved", "committed", "stored"
    disk, a_end = (0, "disk"), a.hashes[-4 * 16 :]
    expected = {
        ("missed", "absent", lookups, "", "a-1"): a.hashes,
        **{(kind, "", stores, "", "a-2"): a.hashes for kind in filled},
        ("evicted", "room", stores, "", "b-1"): a_end,
        **{(kind, "", stores, "", "b-1"): b.hashes for kind in filled},
        **{(kind, "", *disk, "a-3"): a_end for kind in (*filled, "loaded")},
        ("evicted", "room", *disk, "a-3"): b.hashes[-4 * 16 :],
        ("hit", "", lookups, "", "a-3"): a.hashes,
        ("evicted", "room", stores, "", "c-1"): b.hashes[: 8 * 16],
        **{(kind, "", stores, "", "c-1"): c.hashes[: 8 * 16] for kind in filled},
        ("refused", "no room", stores, "", "c-1"): c.hashes[8 * 16 :],
        ("evicted", "room", stores, "", "d-1"): c.hashes[7 * 16 : 8 * 16],
        ("reserved", "", stores, "", "d-1"): d.hashes,
        ("dropped", "copy failed", stores, "", "d-1"): d.hashes,
        ("expired", "lease", lookups, "", "a-3"): a.hashes,
        ("cleared", "", 0, "", ""): a.hashes + c.hashes[: 7 * 16],
        ("written", "", *disk, ""): a.hashes + b.hashes + c.hashes[: 8 * 16],
    }

    def chunks(hashes: bytes) -> list[bytes]:
        return sorted(hashes[at : at + 16] for at in range(0, len(hashes), 16))

    assert {key: chunks(hashes) for key, hashes in caused.items()} == {
        key: chunks(hashes) for key, hashes in expected.items()
    }
