"""Events of L1: they name chunks only for those who ask, and no listener costs anybody else anything."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest

from lmcache.cache import KINDS, Event, Heart
from lmcache.engine import Store
from servers import PATIENCE, server_parts

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


def test_the_engines_request_is_named(folders, engine) -> None:
    with server_parts(folders, 8 << 20) as (service, port):
        heard: list[Event] = []
        service.loop.ask(lambda: service.l1.events.listen(["missed", "stored"], heard.append), PATIENCE)
        one = engine(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"))
        chain = one.chain(list(range(64)))
        one.scheduler.lookup(chain, request_id="cmpl-7")
        one.worker.store("job", Store(16, chain.parent(0), chain.hashes, 0, one.table(64), request_id="cmpl-8"))
        one.wait("job")
        missed, stored = heard
        assert (missed.kind, missed.request, missed.reason) == ("missed", "cmpl-7", "absent")
        assert (stored.kind, stored.request) == ("stored", "cmpl-8") and stored.hashes == missed.hashes == chain.hashes
