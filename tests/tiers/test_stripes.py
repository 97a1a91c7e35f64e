"""`disk:///a,/b`: two devices as one tier, each with the chunks that belong to it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disk_files
import pytest
from filesystems import FaultyFilesystem

from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite, shard_key, shard_of
from lmcache.tiers import ABSENT, OK, ShardKey, Tier, TierError
from lmcache.tiers.disk.stripes import StripedTier
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.registry import make_tier
from stores import load, shards_of

MIB = 1 << 20


def part_of(tier: Any, key: ShardKey) -> DiskTier:
    """The device of a shard. tier: a StripedTier, or what the conformance suite wraps around it."""
    (number, _), *_ = tier._divided([key])
    part = tier._parts[number]
    assert isinstance(part, DiskTier)
    return part


class TestConformance(ConformanceSuite):
    least_recent_goes = False
    """Each device evicts its own least recently used shard."""
    corruptions = 300

    def url(self, place: Path) -> str:
        return f"disk://{place}/a,{place}/b"

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        return disk_files.stored_frame(part_of(tier, key), key)

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        disk_files.replace_frame(part_of(tier, key), key, stored)

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        return sum(disk_files.filesystem_bytes(place / folder) for folder in ("a", "b"))


@pytest.fixture
def striped(tmp_path: Path) -> Iterator[Callable[..., StripedTier]]:
    made: list[StripedTier] = []

    def make(*filesystems: FaultyFilesystem | None) -> StripedTier:
        parts = [
            (tmp_path / str(number), DiskTier(tmp_path / str(number), 64 * MIB, filesystem=one))
            for number, one in enumerate(filesystems)
        ]
        made.append(StripedTier(parts))
        made[-1].open()
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def test_every_device_has_about_its_share_and_a_restart_finds_all(striped: Callable[..., StripedTier]) -> None:
    tier, shards = striped(None, None, None), shards_of(300, 1000)
    assert tier.store(shards) == [OK] * 300
    of_parts = [part.usage().shards for part in tier._parts]
    assert sum(of_parts) == 300 == tier.usage().shards and min(of_parts) > 50
    assert tier.usage().max_bytes == 3 * 64 * MIB
    tier.close()
    again = striped(None, None, None)
    assert again.known([shard.key for shard in shards]) == [True] * 300 and load(again, shards) == [OK] * 300
    again.remove([shard.key for shard in shards[:100]])
    assert again.contains([shard.key for shard in shards]) == [False] * 100 + [True] * 200
    again.clear()
    assert again.usage().shards == 0


def test_a_device_that_fails_takes_its_own_chunks_along_and_no_others(striped: Callable[..., StripedTier]) -> None:
    bad = FaultyFilesystem()
    tier, shards = striped(None, bad), shards_of(40, 100_000)
    assert tier.store(shards) == [OK] * 40
    mine = [part_of(tier, shard.key) is tier._parts[1] for shard in shards]
    assert 0 < sum(mine) < 40
    bad.fail = {"preadv": errno.EIO, "pwritev": errno.EIO}
    assert [outcome == OK for outcome in load(tier, shards)] == [not one for one in mine]
    assert "input/output error" in tier.degraded()
    more = shards_of(40, 100_000)
    assert [outcome == OK for outcome in tier.store(more)] == [
        part_of(tier, shard.key) is tier._parts[0] for shard in more
    ]
    only_bad = [shard for shard, is_bad in zip(shards, mine, strict=True) if is_bad]
    with pytest.raises(TierError, match="input/output error"):
        load(tier, only_bad)
    bad.fail.clear()
    assert load(tier, shards) == [OK] * 40 and not tier.degraded()


def test_what_the_devices_drop_is_told(striped: Callable[..., StripedTier], tmp_path: Path) -> None:
    tier = StripedTier([(tmp_path / name, DiskTier(tmp_path / name, 2 * MIB)) for name in "ab"])
    told: list[ShardKey] = []
    tier.dropped = told.extend
    tier.open()
    for number in range(60):
        tier.store([shard_of(shard_key(number), 100_000)])
    assert told and not any(tier.contains(told))
    tier.close()


def test_devices_in_a_url(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = make_tier(f"disk://{tmp_path}/a,{tmp_path}/b?max_gb=1").tier
    assert isinstance(tier, StripedTier)
    tier.open()
    assert tier.usage().max_bytes == 1 << 30 and "are on one file system" in caplog.text
    assert load(tier, shards_of(2, 10)) == [ABSENT] * 2
    tier.close()
    assert isinstance(make_tier(f"disk://{tmp_path}/a,b").tier, DiskTier), "a comma is a letter"
    for url in (f"disk://{tmp_path}/a,{tmp_path}/a", f"disk://{tmp_path}/a,{tmp_path}/a/b"):
        with pytest.raises(ConfigError, match="each device needs a folder of its own"):
            make_tier(url)


def test_a_device_that_fails_to_open_without_a_reason_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_text("no folder")
    tier = StripedTier([(tmp_path / name, DiskTier(tmp_path / name, 64 * MIB)) for name in "ab"])
    monkeypatch.setattr(tier._parts[1], "open", lambda: (tmp_path / "b").iterdir().__next__())
    with pytest.raises(OSError):
        tier.open()
    assert not any(thread.name.startswith("lmcache-") for thread in threading.enumerate())
    alone = DiskTier(tmp_path / "a", 64 * MIB)
    alone.open()  # nobody has its lock
    alone.close()
