"""The lives of chunks: what each histogram counts, that the sample is 1 %, and that its memory is bounded."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable

import pytest

from lmcache.cache import lifetimes
from lmcache.cache.events import Event, Events
from lmcache.cache.lifetimes import SAMPLED_BYTES, Lifetimes
from lmcache.wire import messages as m
from servers import Raw, Server, eventually


class Followed:
    """Lifetimes by a made-up clock."""

    def __init__(self) -> None:
        self.at, self.events = 100.0, Events()
        self.lives = Lifetimes(self.events, lambda: self.at)

    def stored(self, hashes: bytes, space: int = 1) -> None:
        self.events.tell(Event("stored", space, len(hashes) // 16, hashes=hashes))

    def evicted(self, hashes: bytes, space: int = 1) -> None:
        self.events.tell(Event("evicted", space, len(hashes) // 16, hashes=hashes))

    def answered(self, hashes: bytes, found: int, have: int = 0) -> None:
        self.events.tell(Event("answered", 1, len(hashes) // 16, hashes=hashes, found=found, have=have))

    def told(self, name: str) -> tuple[float, float]:
        """Count and sum of a histogram."""
        counters = self.lives.counters()
        return counters[f"{name}_count"], counters[f"{name}_sum"]


def sampled(*names: int) -> bytes:
    """Hashes that are in the sample."""
    return b"".join(name.to_bytes(15, "little") + b"\1" for name in names)


def test_a_life_from_store_to_eviction() -> None:
    one, chunks = Followed(), sampled(1, 2)
    one.stored(chunks)
    one.at += 10
    one.answered(chunks, 2)
    assert one.told("chunk_first_hit_age_seconds") == (2, 20)
    one.at += 5
    one.stored(chunks)  # again, in another group
    one.answered(chunks, 1)
    assert one.told("chunk_reuse_gap_seconds") == (1, 5)
    one.at += 100
    one.answered(chunks, 2, have=2)
    assert one.told("chunk_reuse_gap_seconds") == (1, 5), "the engine had them itself"
    one.evicted(chunks, space=2)
    assert one.told("chunk_reuses") == (0, 0), "another space lost them"
    one.evicted(chunks)
    assert one.told("chunk_eviction_age_seconds") == (2, 2 * 115)
    assert one.told("chunk_idle_before_eviction_seconds") == (2, 100 + 105)
    assert one.told("chunk_reuses") == (2, 3) and one.lives.counters()['chunk_reuses_bucket{le="1"}'] == 1
    one.answered(chunks, 2)
    one.evicted(chunks)
    assert one.told("chunk_first_hit_age_seconds") == (2, 20) and one.told("chunk_reuses") == (2, 3), "they are gone"


def test_cleared_chunks_are_forgotten() -> None:
    one = Followed()
    one.stored(sampled(1))
    one.stored(sampled(2), space=2)
    one.events.tell(Event("cleared", 1, 1))
    one.evicted(sampled(1))
    one.evicted(sampled(2), space=2)
    assert one.told("chunk_reuses") == (1, 0) and len(one.lives) == 0


def test_the_sample_is_a_hundredth_whoever_asks() -> None:
    one, hashes = Followed(), random.Random(3).randbytes(16 * 100_000)
    one.stored(hashes)
    assert 1000 < len(one.lives) < 1350
    one.answered(hashes, 50_000)
    assert 500 < one.told("chunk_first_hit_age_seconds")[0] < 680
    one.evicted(hashes)
    assert len(one.lives) == 0, "the same chunks are in it at each event"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "MOST_SAMPLED", 20_000)
    one = Followed()
    hashes = sampled(*range(30_000))
    tracemalloc.start()
    one.stored(hashes)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(one.lives) == 20_000 and taken < 20_000 * SAMPLED_BYTES + sys.getsizeof(hashes)


def test_a_server_has_them_unless_it_remembers_nothing(server: Callable[..., Server]) -> None:
    for flags, there in (((), True), (("--records-mb", "0"), False)):
        cache = server(l1=1.03, flags=flags)
        raw = Raw(cache, "raw", shard_bytes=1 << 16)
        chunks = sampled(*range(12))
        raw.store(chunks)
        found = raw.ask(m.Lookup(raw.space, chunks, 0, request="r"))
        raw.ask(m.Release([found.lease]))
        if there:  # a hit is told when the loop is idle
            eventually(lambda cache=cache: cache.metrics()["lmcache_chunk_first_hit_age_seconds_count"] == 12)
        raw.store(sampled(*range(100, 112)))
        told = cache.metrics()
        assert ("lmcache_chunk_reuses_count" in told) == there
        assert not any("_bucket" in name for name in cache.counters()), "/status has no histograms"
        if there:
            assert told["lmcache_chunk_reuses_count"] == told["lmcache_evicted_chunks_total"] > 0
            assert told["lmcache_chunks_followed"] == told["lmcache_complete_chunks"]
        raw.close()
        cache.end()  # both would listen in one folder
