"""A full disk tier writes where evicted frames lay: it frees and allocates no blocks, and takes no old frame for a new one."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from disk_files import filesystem_bytes
from filesystems import WRITES

from lmcache.testing.conformance import load_one, payload_of, shard_key, shard_of
from lmcache.tiers import ABSENT, KEPT, OK, ShardKey, frame
from lmcache.tiers.disk.journal import ENTRY_BYTES, PUT, Journal
from lmcache.tiers.disk.segments import frame_bytes, offset_of
from lmcache.tiers.disk.shard_index import RECORD, tag_of
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import BLOCK_BYTES, Filesystem

MIB = 1 << 20
CUTS = 6
"""How many power cuts each of ten lives ends with."""
SIZES = (1000, 3000, 20_000, 70_000, 131_072, 400_001)


class Counting(Filesystem):
    """Counts what changes something, by operation."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys((*WRITES, "open"), 0)

    def __getattribute__(self, name: str) -> object:
        if name in (*WRITES, "open"):
            self.counts[name] += 1
        return super().__getattribute__(name)


@contextmanager
def opened(folder: Path, max_bytes: int, filesystem: Filesystem | None = None) -> Iterator[DiskTier]:
    tier = DiskTier(folder, max_bytes, filesystem=filesystem)
    tier.open()
    try:
        yield tier
    finally:
        tier.close()


def store(tier: DiskTier, *numbers: int, size: int) -> list[str]:
    return tier.store([shard_of(shard_key(number), size) for number in numbers])


@pytest.mark.parametrize(("size", "batch"), [(MIB, 1), (131_072, 8), (3000, 100)])
def test_a_full_tier_frees_and_allocates_nothing(folders: Callable[[str], Path], size: int, batch: int) -> None:
    filesystem, folder = Counting(), folders("/dev/shm") / "tier"
    with opened(folder, 8 * MIB, filesystem) as tier:
        calls = 2 * 8 * MIB // (size * batch)
        for call in range(2 * calls):
            if call == calls:
                before, on_device = dict(filesystem.counts), filesystem_bytes(folder)
            numbers = range(call * batch, (call + 1) * batch)
            assert store(tier, *numbers, size=size) == [OK] * batch
            assert [load_one(tier, shard_key(one), size) for one in (numbers[0], numbers[-1])] == [
                (OK, payload_of(shard_key(one), size)) for one in (numbers[0], numbers[-1])
            ]
        done = {name: count - before[name] for name, count in filesystem.counts.items()}
        compactions = done["rename"]
        assert done["punch"] == done["truncate"] == 0 and done["unlink"] == 0, done
        assert done["open"] <= compactions + len(list(folder.iterdir())), done
        assert abs(filesystem_bytes(folder) - on_device) < MIB // 2
        assert tier.usage().stored_bytes <= 8 * MIB


def test_a_tier_with_room_gives_back_what_it_does_not_need(folders: Callable[[str], Path]) -> None:
    folder = folders("/dev/shm") / "tier"
    with opened(folder, 64 * MIB) as tier:
        store(tier, *range(8), size=MIB)
        before = filesystem_bytes(folder)
        assert store(tier, *range(8), size=70_000) == [OK] * 8  # in place of the larger ones
        assert filesystem_bytes(folder) < before - 7 * MIB


def test_frames_lie_apart_and_every_block_is_counted(folders: Callable[[str], Path]) -> None:
    """Stores, removals and restarts at random, with evictions: frames never overlap, and no block is lost track of."""
    dice, folder = random.Random(3), folders("/dev/shm") / "tier"
    stored = 0
    for _ in range(6):
        with opened(folder, 3 * MIB) as tier:
            for _ in range(60):
                numbers = dice.sample(range(400), dice.randint(1, 6))
                if dice.random() < 0.8:
                    stored += store(tier, *numbers, size=dice.choice(SIZES)).count(OK)
                else:
                    tier.remove([shard_key(number) for number in numbers])
                consistent(tier)
            left = {bytes(one["key"]): int(one["payload"]) for one in tier._index.records()}
            sizes = {number: left[packed] for number in range(400) if (packed := shard_key(number).packed) in left}
            assert all(
                load_one(tier, shard_key(one), size) == (OK, payload_of(shard_key(one), size))
                for one, size in sizes.items()
            )
            order = [bytes(one["key"]) for one in tier._index.records()]
            crashed = folder.with_name("crashed")
            shutil.rmtree(crashed, ignore_errors=True)
            shutil.copytree(folder, crashed)  # with the journal as it is, and not rewritten by a close
        with opened(crashed, 3 * MIB) as tier:
            assert [bytes(one["key"]) for one in tier._index.records()] == order
            consistent(tier)
    assert stored > 500


def consistent(tier: DiskTier) -> None:
    """Check the accounting of segments against the index."""
    segments = tier._segments
    assert segments.bytes == sum(one.cost for one in segments._all.values())
    assert segments.freed_bytes == sum(one.size for one in segments._pending)
    taken: dict[int, list[tuple[int, int]]] = {}
    for one in tier._index.records():
        place, size = int(one["place"]), frame_bytes(int(one["payload"]))
        taken.setdefault(place >> 32, []).append((offset_of(place), offset_of(place) + size))
    for pending in segments._pending:
        if pending.size:
            taken.setdefault(pending.segment.number, []).append((pending.offset, pending.offset + pending.size))
    for number, ranges in taken.items():
        ranges.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges)), (number, ranges)
        used = {block for begin, end in ranges for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))}
        assert segments._all[number].used == len(used) * BLOCK_BYTES


@pytest.mark.parametrize("others", [0, 12], ids=["its place is free", "another lies there"])
def test_a_shard_that_was_replaced_does_not_come_back(folders: Callable[[str], Path], others: int) -> None:
    """It was replaced without a removal in the journal, and its successor was removed."""
    folder, cap = folders("/dev/shm") / "tier", MIB + MIB // 2
    with opened(folder, cap) as tier:
        store(tier, 1, size=131_072)
        store(tier, 1, size=70_000)
        for number in range(2, 2 + others):
            store(tier, number, size=131_072)
        tier.remove([shard_key(1)])
        there = [number for number in range(14) if tier.known([shard_key(number)])[0]]
        assert 1 not in there
        shutil.copytree(folder, crashed := folder.with_name("crashed"))
    with opened(crashed, cap) as tier:
        assert [number for number in range(14) if tier.known([shard_key(number)])[0]] == there
        assert all(load_one(tier, shard_key(number), 131_072)[0] == OK for number in there)


def test_of_two_shards_in_one_place_the_later_one_is_there(tmp_path: Path) -> None:
    """Whatever the journal lacks: a frame that was freed twice would give its place to two others."""
    records = np.zeros(3, RECORD)
    for number, record in enumerate(records):
        key = shard_key(number).packed
        record["key"], record["payload"], record["tag"] = key, 70_000, tag_of(key)
        record["place"] = (1 << 32) + number // 2 * 2000
    journal = Journal(Filesystem(), tmp_path)
    journal.open()
    journal.append((PUT, records.tobytes()))
    journal.close()
    left, _ = journal.open()
    journal.close()
    assert [bytes(one["key"]) for one in left] == [shard_key(number).packed for number in (1, 2)]


def test_whatever_a_power_cut_leaves_is_right_or_a_miss(folders: Callable[[str], Path]) -> None:
    """Blocks reach the device in any order, and the journal is cut anywhere: an evicted frame may be in the index and have been
    overwritten, and a new one may be in the index and not be there."""
    root, dice = folders("/dev/shm"), random.Random(9)
    outcomes: dict[str, int] = {}
    for life in range(10):
        folder = root / f"tier{life}"
        with opened(folder, 3 * MIB // 2) as tier:
            work(tier, dice, 25)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            work(tier, dice, dice.choice((1, 3, 10)))
            after = {path.name: path.read_bytes() for path in folder.iterdir()}
        for _ in range(CUTS):
            shutil.rmtree(root / "cut", ignore_errors=True)
            (root / "cut").mkdir(mode=0o700)
            for name in {*before, *after}:
                if name == "index":
                    whole = dice.choice((before, after))[name]
                    content = whole[: dice.randint(max(ENTRY_BYTES * 2, len(whole) - 2000), len(whole))]
                else:
                    content = mixed(before.get(name, b""), after.get(name, b""), dice)
                if content or dice.random() < 0.5:
                    (root / "cut" / name).write_bytes(content)
            with opened(root / "cut", 3 * MIB // 2) as tier:
                for record in tier._index.records():
                    key, size = ShardKey.unpack(bytes(record["key"])), int(record["payload"])
                    outcome, payload = load_one(tier, key, size)
                    assert outcome != OK or payload == payload_of(key, size)
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
                consistent(tier)
                work(tier, dice, 3)
    assert min(outcomes[one] for one in (OK, frame.OTHER_SHARD, frame.CHECKSUM)) > 5, outcomes


def work(tier: DiskTier, dice: random.Random, calls: int) -> None:
    """Store few shards again and again, in several sizes, so that most evict others."""
    for _ in range(calls):
        numbers, size = dice.sample(range(60), dice.randint(1, 4)), dice.choice(SIZES)
        outcomes = store(tier, *numbers, size=size)
        assert set(outcomes) <= {OK, KEPT}
        if outcomes[-1] == OK:  # one that was there already may have made way for the others
            assert load_one(tier, shard_key(numbers[-1]), size) == (OK, payload_of(shard_key(numbers[-1]), size))


def mixed(old: bytes, new: bytes, dice: random.Random) -> bytes:
    """Return a file of which some sectors are as they were, others as they have become; perhaps cut at any byte between both."""
    size, step = max(len(old), len(new)), dice.choice((512, 4096, 65536))
    made, share = bytearray(size), dice.choice((0.1, 0.5, 0.9))
    for at in range(0, size, step):
        source = new if dice.random() < share else old
        made[at : at + step] = source[at : at + step].ljust(min(step, size - at), b"\0")
    cut = dice.randrange(size + 1)
    return bytes(made[:cut] + old[cut:size].ljust(size - cut, b"\0")) if dice.random() < 0.3 else bytes(made)


def test_loads_beside_evictions_are_right_or_absent(folders: Callable[[str], Path]) -> None:
    """Never damaged either: a frame that was overwritten during its read is gone, not broken."""
    wrong: list[str] = []
    hits = [0] * 4

    def run(tier: DiskTier, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(300):
            number = dice.randrange(60)
            key, size = shard_key(number), SIZES[number % len(SIZES)]
            if dice.random() < 0.5:
                wrong.extend(one for one in store(tier, number, size=size) if one not in (OK, KEPT))
            else:
                outcome, payload = load_one(tier, key, size)
                hits[seed] += outcome == OK
                if outcome not in (OK, ABSENT) or (outcome == OK and payload != payload_of(key, size)):
                    wrong.append(f"{number}: {outcome}")

    with opened(folders("/dev/shm") / "tier", 3 * MIB) as tier:
        threads = [threading.Thread(target=run, args=(tier, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and min(hits) > 5
        consistent(tier)
