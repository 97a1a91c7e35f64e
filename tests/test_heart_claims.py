"""Claims that nobody ends: what they cost the others, and what it costs the server to end many."""

from __future__ import annotations

import weakref

import pytest

from lmcache.cache import SERVER, Heart, Hit, Refusal, TooSmall
from lmcache.cache.claims import MAX_LEASES
from lmcache.cache.heart import EXPIRED_A_TICK
from lmcache.cache.table import Table, unpack
from lmcache.chunks import HASH_BYTES
from lmcache.memory.slabs import NO_EXTENT
from py_table import PyTable

SECTOR = 4096
CLAIM_SECONDS = 10.0
LATER = CLAIM_SECONDS + 1


class CountingTable(PyTable):
    """Counts the records that it is asked about, of which a bound on work is a bound."""

    steps = 0

    def extents(self, ids: bytes, /) -> bytes:
        CountingTable.steps += len(ids) // 4
        return super().extents(ids)

    def unpin(self, ids: bytes, /) -> bytes:
        CountingTable.steps += len(ids) // 4
        return super().unpin(ids)


def hashes(count: int, first: int = 1) -> bytes:
    return b"".join(number.to_bytes(HASH_BYTES, "little") for number in range(first, first + count))


def world(sectors: int, engines: int = 2, new_table=Table) -> tuple[Heart, int]:
    """A heart with engines 1, 2 ... of one process each, which share a space of one shard."""
    heart = Heart(sectors * SECTOR, CLAIM_SECONDS, new_table)
    for process in range(1, engines + 1):
        heart.join(process, f"engine {process}")
        space = heart.open_space(process, b"f" * 16, 1, 0, SECTOR)
    return heart, space


def reserve(heart: Heart, now: float, process: int, space: int, keys: bytes, tier: str = "") -> tuple[int, int]:
    """The reservation, and how many slots it has."""
    grant = heart.reserve(now, process, space, 0, b"", True, keys, tier)
    return grant.reservation, sum(sector != NO_EXTENT for sector in unpack(grant.extents))


def store(heart: Heart, now: float, process: int, space: int, keys: bytes) -> None:
    number, count = reserve(heart, now, process, space, keys)
    assert count == len(keys) // HASH_BYTES
    heart.commit(now, process, number, True)


@pytest.mark.parametrize("writer", [1, SERVER])
@pytest.mark.parametrize("end", ["commit", "death"])
def test_a_writer_that_freezes_keeps_its_extents_and_no_chunk(writer: int, end: str) -> None:
    heart, space = world(sectors=40)
    number, _ = reserve(heart, 0.0, writer, space, hashes(2))
    assert reserve(heart, CLAIM_SECONDS, 2, space, hashes(2)) == (0, 0), "it may still come"
    heart.tick(LATER)
    assert heart.quarantined_bytes == 2 * SECTOR and heart.chunks == 0
    store(heart, LATER, 2, space, hashes(20))
    assert heart.lookup(LATER, 2, space, hashes(20)).chunks == 20
    assert heart.used_bytes() == 22 * SECTOR, "nobody else has its slots"
    if end == "death" and writer != SERVER:
        heart.leave(writer)
    else:
        with pytest.raises(Refusal, match="expired after"):
            heart.commit(2 * LATER, writer, number, True)
    assert heart.quarantined_bytes == 0 and heart.used_bytes() == 20 * SECTOR
    assert heart.lookup(LATER, 2, space, hashes(20)).chunks == 20, "what another has stored stays"
    assert heart.events.counters["reserved"] == heart.events.counters["committed"] + heart.events.counters["dropped"]


@pytest.mark.parametrize("new_table", [PyTable, Table])
def test_a_cleared_index_is_kept_no_longer_than_the_claims_on_it(new_table) -> None:
    """Also where what hangs on a leased chunk is nobody's."""
    heart, space = world(sectors=20, new_table=new_table)
    store(heart, 0.0, 1, space, hashes(10))
    lease = heart.lookup(0.0, 1, space, hashes(1)).lease
    table = weakref.ref(heart.space(space).table) if new_table is PyTable else None
    heart.clear()
    empty = heart.space(space).table.memory_bytes()
    assert heart.index_bytes() > empty
    heart.release(1, lease)
    heart.tick(0.0)
    assert heart.index_bytes() == empty and (table is None or table() is None)


def test_extents_in_quarantine_outlive_a_clear_and_an_engine_of_their_space() -> None:
    heart, space = world(sectors=8)
    number, _ = reserve(heart, 0.0, SERVER, space, hashes(3), "far")
    heart.tick(LATER)
    heart.clear()
    heart.leave(1)
    heart.leave(2)
    heart.tick(LATER)
    assert heart.used_bytes() == heart.quarantined_bytes == 3 * SECTOR
    with pytest.raises(Refusal, match="expired after"):
        heart.commit(LATER, SERVER, number, True)
    heart.tick(LATER)
    assert heart.used_bytes() == heart.quarantined_bytes == 0 and not heart.spaces


def test_a_tier_that_hangs_costs_no_other_tier_and_no_engine_anything() -> None:
    heart, space = world(sectors=40)
    far, _ = reserve(heart, 0.0, SERVER, space, hashes(11), "far")
    heart.tick(LATER)
    grant = heart.reserve(LATER, SERVER, space, 0, b"", True, hashes(5, 100), "far")
    assert (grant.reservation, grant.refused, grant.reason) == (0, 5, "quarantine")
    near, count = reserve(heart, LATER, SERVER, space, hashes(5, 100), "near")
    assert count == 5 and heart.commit(LATER, SERVER, near, True) == 5
    store(heart, LATER, 1, space, hashes(5, 200))
    assert heart.lookup(LATER, 1, space, hashes(5, 100)).chunks == 5
    with pytest.raises(Refusal):
        heart.commit(LATER, SERVER, far, True)
    assert reserve(heart, LATER, SERVER, space, hashes(5, 300), "far")[1] == 5, "it answers again"


def test_chunks_before_one_that_was_not_filled_leave_the_index_with_it() -> None:
    """In whichever order their writers give up: an index of chunks without slots would grow for ever."""
    heart, space = world(sectors=40)
    for first in (1, 100):
        before, _ = reserve(heart, 0.0, 1, space, hashes(3, first))
        behind = heart.reserve(0.0, 1, space, 0, hashes(1, first + 2), False, hashes(2, first + 3)).reservation
        for number in (before, behind) if first == 1 else (behind, before):
            heart.commit(0.0, 1, number, ok=False)
        assert heart.chunks == 0 and heart.used_bytes() == 0


def test_a_chunk_in_quarantine_counts_once_for_each_engine_and_once_for_all() -> None:
    heart, space = world(sectors=40)
    store(heart, 0.0, 1, space, hashes(8))
    leases = [(process, heart.lookup(0.0, process, space, hashes(8)).lease) for process in (1, 1, 2)]
    heart.tick(LATER)
    assert heart.quarantined_bytes == 8 * SECTOR
    for left, (process, lease) in zip((8, 8, 0), leases, strict=True):
        heart.release(process, lease)
        assert heart.quarantined_bytes == left * SECTOR


@pytest.mark.parametrize("count", [100, 400])
def test_the_work_of_ending_leases_is_that_of_their_own_chunks(count: int) -> None:
    """Not of those of all other expired leases: 400 would stop the server for seconds."""
    chunks = 64
    heart, space = world(sectors=chunks, new_table=CountingTable)
    store(heart, 0.0, 1, space, hashes(chunks))
    for _ in range(count):
        assert heart.lookup(0.0, 1, space, hashes(chunks)).lease
    CountingTable.steps = 0
    for _ in range(1 + count * chunks // EXPIRED_A_TICK):
        heart.tick(LATER)
    assert heart.events.counters["expired:lease"] == count * chunks
    assert heart.quarantined_bytes == chunks * SECTOR
    heart.leave(1)
    assert CountingTable.steps <= 5 * count * chunks
    assert heart.open_leases == heart.quarantined_bytes == 0


def test_a_tick_ends_no_more_claims_than_fit_in_one() -> None:
    heart, space = world(sectors=1024)
    store(heart, 0.0, 1, space, hashes(1024))
    for _ in range(40):
        heart.lookup(0.0, 1, space, hashes(1024))
    ended = []
    while heart.events.counters["expired:lease"] < 40 * 1024:
        before = heart.events.counters["expired:lease"]
        heart.tick(LATER)
        ended.append(heart.events.counters["expired:lease"] - before)
    assert len(ended) == 3 and max(ended) == EXPIRED_A_TICK


def test_an_engine_with_too_many_leases_gets_misses_and_goes_on() -> None:
    heart, space = world(sectors=8)
    store(heart, 0.0, 1, space, hashes(2))
    leases = [heart.lookup(0.0, 1, space, hashes(2)).lease for _ in range(MAX_LEASES)]
    assert all(leases)
    assert heart.lookup(0.0, 1, space, hashes(2)) == Hit(0, 0, b"")
    assert heart.lookup(0.0, 1, space, hashes(2), partly=False) == Hit(0, 0, b"")
    assert heart.events.counters["missed:too many leases"] == 2
    assert heart.lookup(0.0, 2, space, hashes(2)).chunks == 2, "another engine's are its own"
    store(heart, 0.0, 1, space, hashes(2, 50))
    heart.release(1, leases[0])
    assert heart.lookup(0.0, 1, space, hashes(2)).chunks == 2


def test_an_absurd_split_is_refused() -> None:
    """A record takes 5 bytes a shard, and may have no more than one slot."""
    heart, _ = world(sectors=8)
    with pytest.raises(Refusal, match="1 to 1024 shards"):
        heart.open_space(1, b"g" * 16, 1025)


def test_a_chunk_has_to_fit_with_all_of_its_shards() -> None:
    heart, _ = world(sectors=8)
    for _ in range(2):  # a rank may register again
        assert heart.open_space(1, b"g" * 16, 2, 0, 5 * SECTOR) == heart.open_space(1, b"g" * 16, 2, 1, 3 * SECTOR)
    heart.open_space(1, b"h" * 16, 2, 0, 5 * SECTOR)
    with pytest.raises(
        TooSmall, match=r"L1 has 0\.0 MiB.*takes 0\.0 MiB: start the server with --l1-size-gb .*above 0\.001"
    ):
        heart.open_space(1, b"h" * 16, 2, 1, 4 * SECTOR)


def test_a_lease_lives_for_as_long_as_it_is_renewed() -> None:
    heart, space = world(sectors=8)
    store(heart, 0.0, 1, space, hashes(4))
    first, second = (heart.lookup(0.0, 1, space, hashes(4)).lease for _ in range(2))
    for now in range(0, 100, 5):
        assert heart.renew(now, 1, [first]) == 1
        heart.tick(now)
    assert heart.events.counters["expired:lease"] == 4 and heart.quarantined_bytes == 4 * SECTOR, "the second one's"
    assert heart.leased_sectors(1, second, 0, 0, 4) == ([0, 1, 2, 3], SECTOR), "its slots stay as they were"
    heart.clear()
    assert heart.renew(100, 1, [first, second]) == 2, "its slots are as they were, whatever the index says"
    assert heart.quarantined_bytes == 0 and heart.leased_sectors(1, second, 0, 0, 4) == ([0, 1, 2, 3], SECTOR)
    assert heart.renew(100, 2, [first]) == 0, "another engine's"
    heart.release(1, first)
    assert heart.renew(100, 1, [first, 4711]) == 0
    heart.tick(111)
    assert heart.quarantined_bytes == 4 * SECTOR
    heart.release(1, second)
    assert heart.used_bytes() == heart.quarantined_bytes == 0
