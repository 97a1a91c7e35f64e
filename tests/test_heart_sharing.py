"""What the heart is worth: exact LRU's hits, fair shares of the memory, little lost to its map, and a quick clear."""

from __future__ import annotations

import random
import sys
import time
from collections import OrderedDict

import pytest

from lmcache.cache import Heart, Refusal
from lmcache.cache.heart import MAX_SPACES_OF_INSTANCE
from lmcache.cache.table import Table, unpack
from lmcache.chunks import HASH_BYTES
from lmcache.memory.slabs import NO_EXTENT
from py_table import PyTable

MIB = 1 << 20


class Engine:
    """An engine with one process: looks prompts up and stores what is missing, all ranks of it."""

    def __init__(self, heart: Heart, process: int, shard_bytes: list[int], name: bytes = b"") -> None:
        self.heart, self.process, self.shards = heart, process, len(shard_bytes)
        heart.join(process, f"engine {process}")
        fingerprint = (name or bytes([process])).ljust(16)
        for shard, size in enumerate(shard_bytes):
            self.space = heart.open_space(process, fingerprint, self.shards, shard, size)

    def lookup(self, keys: list[bytes]) -> int:
        hit = self.heart.lookup(0.0, self.process, self.space, b"".join(keys))
        self.heart.release(self.process, hit.lease)
        return hit.chunks

    def store(self, keys: list[bytes], shards: list[int] | None = None) -> int:
        """How many chunks got no room, at the most."""
        grants = [
            self.heart.reserve(0.0, self.process, self.space, shard, b"", True, b"".join(keys))
            for shard in (range(self.shards) if shards is None else shards)
        ]
        for grant in grants:
            if grant.reservation:
                self.heart.commit(0.0, self.process, grant.reservation, True)
        return max(grant.refused for grant in grants)

    def held_bytes(self) -> int:
        space = next(one for one in self.heart.spaces if one.number == self.space)
        return sum(self.heart.slabs.held_bytes(own) for own in set(space.classes))

    def whole(self) -> int:
        return next(one.complete for one in self.heart.spaces if one.number == self.space)


def prompt(dice: random.Random, length: int) -> list[bytes]:
    return [dice.randbytes(HASH_BYTES) for _ in range(length)]


class ExactLru:
    """Chunks by age; the oldest that nothing hangs on goes. Independent of the heart, and slow."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.chunks: OrderedDict[bytes, bytes] = OrderedDict()  # key -> the key before it

    def use(self, keys: list[bytes]) -> int:
        hits = next((at for at, key in enumerate(keys) if key not in self.chunks), len(keys))
        for key in reversed(keys[:hits]):
            self.chunks.move_to_end(key)
        missing = keys[hits:]
        while len(self.chunks) + len(missing) > self.capacity:
            needed = set(self.chunks.values()) | set(keys)
            del self.chunks[next(key for key in self.chunks if key not in needed)]
        for at in range(len(keys) - 1, -1, -1):
            self.chunks[keys[at]] = keys[at - 1] if at else b""
            self.chunks.move_to_end(keys[at])
        return hits


@pytest.mark.parametrize("favourites", [0.0, 1.0])
def test_hits_are_those_of_exact_lru(favourites: float) -> None:
    """Documents of 1 to 12 chunks, twice as many as fit, in groups with a common beginning; evenly or by Zipf's law."""
    dice, capacity = random.Random(5), 200
    heart, exact = Heart(capacity * MIB), ExactLru(capacity)
    engine = Engine(heart, 1, [MIB])
    beginnings = [prompt(dice, 3) for _ in range(6)]
    documents = [dice.choice(beginnings)[: dice.randint(0, 3)] + prompt(dice, dice.randint(1, 9)) for _ in range(76)]
    weights = [1 / (1 + at) ** favourites for at in range(len(documents))]
    asked = hits = 0
    for keys in dice.choices(documents, weights, k=3_000):
        found = engine.lookup(keys)
        assert found == exact.use(keys)
        assert not engine.store(keys)
        asked, hits = asked + len(keys), hits + found
    assert 0.4 < hits / asked < 1.0 and heart.chunks == capacity


@pytest.mark.parametrize("table", [PyTable, Table])
def test_what_a_prompt_grows_on_is_as_young_as_the_prompt(table) -> None:
    """A store far down a prompt touches all that is above: it would be of no use without."""
    heart = Heart(6 * 4096, new_table=table)
    engine = Engine(heart, 1, [4096])
    dice = random.Random(12)
    other, long, late = prompt(dice, 1), prompt(dice, 4), prompt(dice, 2)
    engine.store(long[:3])
    engine.store(other)
    reader = heart.lookup(0.0, 1, engine.space, b"".join(other))
    grown = heart.reserve(0.0, 1, engine.space, 0, long[2], False, long[3])
    heart.commit(0.0, 1, grown.reservation, True)
    engine.store(late[:1])
    engine.store(prompt(dice, 2))  # the prompt's end goes for it, since the other one is being read
    heart.release(1, reader.lease)
    engine.store(late[1:])
    assert (engine.lookup(other), engine.lookup(long)) == (0, 2)


def test_new_data_always_gets_in() -> None:
    """20 times the arena, offered without a pause: everything is stored, and what is newest is there."""
    dice, heart = random.Random(1), Heart(2048 * MIB)
    engine = Engine(heart, 1, [36 * MIB])
    for _ in range(100):
        keys = prompt(dice, 10)
        assert engine.store(keys) == 0 and engine.lookup(keys) == 10
    assert heart.events.counters["stored"] == 1000 and heart.events.counters["refused"] == 0
    assert heart.used_bytes() >= 0.95 * heart.total_bytes


@pytest.mark.parametrize("sizes", [(36, 20, 7), (36, 36, 36), (1, 30, 64), (9, 100, 3)])
def test_layouts_share_fairly_and_little_is_lost(sizes: tuple[int, ...]) -> None:
    """The first has taken everything before the others come; then all want more than there is."""
    dice, heart = random.Random(2), Heart(20 << 30)
    first = Engine(heart, 1, [sizes[0] * MIB])
    while heart.events.counters["evicted"] < 100:
        first.store(prompt(dice, 8))
    engines = [first] + [Engine(heart, at, [size * MIB], bytes([at])) for at, size in enumerate(sizes[1:], 2)]
    offered = [0] * len(engines)
    while min(offered) < 30 << 30:  # bytes: each the arena and a half
        at = offered.index(min(offered))
        assert engines[at].store(prompt(dice, 8)) == 0
        offered[at] += 8 * sizes[at] * MIB
        if dice.random() < 0.05:
            heart.tick(0.0)
    assert heart.used_bytes() >= 0.95 * heart.total_bytes
    for engine in engines:
        assert 0.30 <= engine.held_bytes() / heart.total_bytes <= 0.37
    before = heart.events.counters["evicted"], heart.events.counters["stored"]
    for _ in range(200):
        for engine in engines:
            engine.store(prompt(dice, 8))
        heart.tick(0.0)
    stored = heart.events.counters["stored"] - before[1]
    assert (
        heart.events.counters["evicted"] - before[0] <= 1.02 * stored
    )  # nothing is lost to and fro once all have their share


def test_memory_of_a_layout_that_nobody_uses_goes_first() -> None:
    dice, heart = random.Random(3), Heart(2048 * MIB)
    old, busy = Engine(heart, 1, [10 * MIB]), Engine(heart, 2, [10 * MIB])
    for _ in range(40):
        old.store(prompt(dice, 5))
        busy.store(prompt(dice, 5))
    kept = prompt(dice, 40)
    busy.store(kept)
    heart.leave(1)
    new = Engine(heart, 3, [17 * MIB])
    for _ in range(12):
        assert new.store(prompt(dice, 5)) == 0
    assert busy.lookup(kept) == 40 and old.whole() < 45
    for _ in range(40):
        new.store(prompt(dice, 5))
        busy.store(prompt(dice, 5))
    heart.tick(0.0)
    assert len(heart.spaces) == 2
    assert heart.used_bytes() >= 0.92 * heart.total_bytes  # a slot is 1 % of the arena here; smaller ones lose less


def test_a_hot_beginning_outlives_the_arrival_of_another_layout() -> None:
    """Its chunks lie where the arena begins, in the region that would otherwise be the first to be taken."""
    dice, heart = random.Random(4), Heart(2048 * MIB)
    one = Engine(heart, 1, [4 * MIB])
    system = prompt(dice, 8)
    while heart.events.counters["evicted"] < 200:
        one.store(system + prompt(dice, 4))
    two = Engine(heart, 2, [6 * MIB])
    for _ in range(60):
        two.store(prompt(dice, 6))
        assert one.lookup(system) == 8
    assert two.held_bytes() > 0.45 * heart.total_bytes


def test_uneven_ranks_of_one_layout_find_their_balance() -> None:
    """Rank 0 has 36 MiB of each chunk and rank 1 20; rank 0 fills the arena before rank 1 has begun."""
    dice, heart = random.Random(6), Heart(10 << 30)
    engine = Engine(heart, 1, [36 * MIB, 20 * MIB])
    for _ in range(60):
        engine.store(prompt(dice, 8), shards=[0])
    for _ in range(150):
        keys = prompt(dice, 8)
        assert engine.store(keys) == 0 and engine.lookup(keys) == 8
    assert engine.whole() >= 0.95 * heart.total_bytes // (56 * MIB)


def test_leased_regions_are_left_alone_and_others_found() -> None:
    dice, heart = random.Random(7), Heart(1024 * MIB)
    one, two = Engine(heart, 1, [4 * MIB]), Engine(heart, 2, [6 * MIB])
    documents = [prompt(dice, 16) for _ in range(16)]
    for keys in documents:
        one.store(keys)
    sectors = set()
    leases = []
    for keys in documents:
        hit = heart.lookup(0.0, 1, one.space, b"".join(keys))
        leases.append(hit.lease)
        sectors |= set(unpack(hit.extents))
    assert len(sectors) == 256
    assert two.store(prompt(dice, 4)) == 4  # all is leased
    for lease in leases[::2]:
        heart.release(1, lease)
    assert two.store(prompt(dice, 4)) == 0
    for at, keys in enumerate(documents):
        if at % 2:
            assert one.lookup(keys) == 16


def test_one_engine_cannot_open_all_spaces() -> None:
    heart = Heart(64 * MIB)
    heart.join(1, "greedy")
    heart.join(2, "modest")
    names = [bytes([number]) * 16 for number in range(MAX_SPACES_OF_INSTANCE)]
    for name in names:
        heart.open_space(1, name, 1, 0, MIB)
    with pytest.raises(Refusal, match="layouts open already"):
        heart.open_space(1, b"one more".ljust(16), 1, 0, MIB)
    heart.open_space(1, names[0], 1, 0, MIB)  # what it has already is no new one
    heart.open_space(2, names[0], 1, 0, MIB)
    assert len(heart.spaces) == MAX_SPACES_OF_INSTANCE
    heart.leave(1)
    heart.leave(2)
    heart.tick(1.0)
    assert not heart.spaces


def test_more_layouts_than_regions_all_get_something() -> None:
    dice, heart = random.Random(8), Heart(64 * MIB)
    for number in range(1, 41):
        engine = Engine(heart, number, [MIB])
        assert engine.store(prompt(dice, 2)) == 0


def test_a_rank_that_fails_leaves_a_gap_that_the_next_one_fills() -> None:
    dice, heart = random.Random(9), Heart(64 * MIB)
    engine, keys = Engine(heart, 1, [MIB, MIB]), prompt(dice, 3)
    joined = b"".join(keys)
    grants = [heart.reserve(0.0, 1, engine.space, shard, b"", True, joined) for shard in (0, 1)]
    heart.commit(0.0, 1, grants[0].reservation, True)
    heart.commit(0.0, 1, grants[1].reservation, False)
    assert engine.lookup(keys) == 0
    again = [heart.reserve(0.0, 1, engine.space, shard, b"", True, joined) for shard in (0, 1)]
    assert set(unpack(again[0].extents)) == {NO_EXTENT} and NO_EXTENT not in unpack(again[1].extents)
    heart.commit(0.0, 1, again[1].reservation, True)
    assert engine.lookup(keys) == 3


def test_chunks_that_hang_on_a_failed_one_come_back_with_it() -> None:
    dice, heart = random.Random(10), Heart(64 * MIB)
    Engine(heart, 1, [MIB], b"same")
    two, keys = Engine(heart, 2, [MIB], b"same"), prompt(dice, 4)
    head = heart.reserve(0.0, 1, two.space, 0, b"", True, keys[0])
    two.store(keys)
    heart.leave(1)
    assert two.lookup(keys) == 0
    two.store(keys[:1])
    assert head.reservation and two.lookup(keys) == 4


@pytest.mark.parametrize("leased", [False, True])
def test_clearing_a_large_index_is_quick(leased: bool) -> None:
    dice, count = random.Random(11), 200_000
    heart = Heart(count * 4096)
    engine = Engine(heart, 1, [4096])
    keys = b""
    for _ in range(count // 500):
        keys = dice.randbytes(500 * HASH_BYTES)
        heart.commit(0.0, 1, heart.reserve(0.0, 1, engine.space, 0, b"", True, keys).reservation, True)
    hit = heart.lookup(0.0, 1, engine.space, keys)
    if not leased:
        heart.release(1, hit.lease)
    begin = time.thread_time()
    assert heart.clear() == count
    assert time.thread_time() - begin < 0.2
    assert heart.used_bytes() == (500 * 4096 if leased else 0)
    heart.release(1, hit.lease)
    assert heart.used_bytes() == 0


def test_the_work_for_memory_grows_with_the_number_of_models_and_not_with_its_square() -> None:
    """Every model of every engine has a share, and the server's loop serves nobody while it compares them."""

    def calls(models: int) -> int:
        """How many Python functions run while a full cache of so many models stores one more prompt."""
        heart, dice, count = Heart(20000 * 4096), random.Random(1), 0
        engines = [Engine(heart, 1 + number, [4096], number.to_bytes(2, "big")) for number in range(models)]
        for one in engines:
            one.store(prompt(dice, 20000 // models))
        heart.tick(0.0)

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            engines[0].store(prompt(dice, 1))
        finally:
            sys.setprofile(None)
        return count

    assert calls(200) < 6 * calls(50)
