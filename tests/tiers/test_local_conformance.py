"""The published suite, on our tiers for local media, and on a dictionary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import disk_files
import pytest
import xxhash
from memory_tier import STORES, MemoryTier

from lmcache.testing.conformance import ConformanceSuite, EncodedSuite, corrupted, payload_of, shard_key, shard_of
from lmcache.tiers import OK, Shard, ShardKey, Tier, frame


class TestMemory(ConformanceSuite):
    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Tier:
        return MemoryTier(place, max_bytes, key_file)

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return STORES[place][key.packed]

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        STORES[place][key.packed] = stored


class TestDisk(ConformanceSuite):
    def url(self, place: Path) -> str:
        return f"disk://{place}/tier?io=auto"

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return disk_files.stored_frame(tier, key)

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        disk_files.replace_frame(tier, key, stored)

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        return disk_files.filesystem_bytes(place / "tier")


class TestDiskBuffered(TestDisk):
    def url(self, place: Path) -> str:
        return f"disk://{place}/tier?io=buffered"


class TestDiskEncoded(EncodedSuite, TestDisk):
    corruptions = 500

    def url(self, place: Path) -> str:
        return f"disk://{place}/tier?codec=pack12"


class TestDirectory(ConformanceSuite):
    corruptions = 1000
    least_recent_goes = False
    """Times of use are a minute apart: test_directory.py has a test of its own."""

    def url(self, place: Path) -> str:
        return f"dir://{place}/tier"

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return self.file(place, key).read_bytes()

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        self.file(place, key).write_bytes(stored)

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        return disk_files.filesystem_bytes(place / "tier")

    def file(self, place: Path, key: ShardKey) -> Path:
        space, name = key.text.split("/")
        return place / "tier" / space / name[:2] / name


class TestDirectoryEncoded(EncodedSuite, TestDirectory):
    corruptions = 500

    def url(self, place: Path) -> str:
        return f"dir://{place}/tier?codec=pack12"


class Unchecked(MemoryTier):
    """Serves what it finds."""

    def load_one(self, key: ShardKey, buffer: memoryview) -> str:
        stored = self.frames.get(key.packed)
        if stored is None:
            return super().load_one(key, buffer)
        buffer[:] = stored[frame.HEADER_BYTES :][: buffer.nbytes].ljust(buffer.nbytes, b"\0")
        return OK


class Hoarding(MemoryTier):
    """Checks, and keeps what is damaged."""

    def load_one(self, key: ShardKey, buffer: memoryview) -> str:
        stored = self.frames.get(key.packed)
        outcome = super().load_one(key, buffer)
        if stored is not None:
            self.frames[key.packed] = stored
        return outcome


class Endless(MemoryTier):
    """Knows no cap."""

    def store_one(self, shard: Shard) -> str:
        cap, self._max_bytes = self._max_bytes, None
        try:
            return super().store_one(shard)
        finally:
            self._max_bytes = cap


class FirstComeFirstGo(MemoryTier):
    """A load is no use."""

    def load_one(self, key: ShardKey, buffer: memoryview) -> str:
        before = list(self.frames)
        outcome = super().load_one(key, buffer)
        for packed in before:
            if packed in self.frames:
                self.frames[packed] = self.frames.pop(packed)
        return outcome


class Confused(MemoryTier):
    """Answers in another order."""

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return super().contains(keys)[::-1]


class Lying(MemoryTier):
    """Says that it kept what it dropped."""

    def store_one(self, shard: Shard) -> str:
        return super().store_one(shard) if shard.payload.nbytes % 2 else OK


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Unchecked, "test_damage_is_a_miss_with_its_name_and_goes"),
        (Unchecked, "test_cut_off_frames_are_misses"),
        (Unchecked, "test_frames_in_each_others_place_are_misses"),
        (Unchecked, "test_no_random_corruption_is_served"),
        (Unchecked, "test_keyed_frames"),
        (Unchecked, "test_a_buffer_of_another_size_is_a_miss_and_the_shard_goes"),
        (Hoarding, "test_damage_is_a_miss_with_its_name_and_goes"),
        (Endless, "test_the_cap_is_hard"),
        (Endless, "test_what_can_never_fit_is_said_and_costs_nothing"),
        (FirstComeFirstGo, "test_least_recently_used_goes_first_also_after_a_restart"),
        (Confused, "test_a_batch_is_answered_in_order"),
        (Confused, "test_known_says_what_contains_says"),
        (Lying, "test_any_size_comes_back"),
    ],
)
def test_the_suite_finds_what_is_broken(broken: type[MemoryTier], test: str, tmp_path: Path) -> None:
    class Suite(TestMemory):
        def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Tier:
            return broken(place, max_bytes, key_file)

    with pytest.raises(AssertionError):
        getattr(Suite(), test)(tmp_path)


def test_corruptions_are_never_the_frame_itself() -> None:
    dice, key = random.Random(1), shard_key(1)
    payload = payload_of(key, 300)
    stored = frame.make_header(key, bytes(16), payload) + payload
    other = frame.make_header(shard_key(2), bytes(16), payload) + payload
    made = [corrupted(stored, other, dice) for _ in range(3000)]
    assert stored not in made and len(set(made)) > 1500
    assert any(len(one) < len(stored) for one in made) and other in made
    assert any(one[8] > 1 and xxhash.xxh3_128_digest(one[128:] + one[:112]) == one[112:128] for one in made if one[8:9])


def test_contents_are_told_by_key_and_size() -> None:
    one, two = shard_of(shard_key(1), 100), shard_of(shard_key(2), 100)
    assert bytes(one.payload) == payload_of(shard_key(1), 100) != bytes(two.payload)
