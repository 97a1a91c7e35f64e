"""What is the disk tier's own: room, the lock, media that fail, and what a start finds."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_files import filesystem_bytes, where
from filesystems import FaultyFilesystem

from lmcache.errors import ConfigError
from lmcache.testing.conformance import load_one, payload_of, shard_key, shard_of
from lmcache.tiers import ABSENT, KEPT, OK, Shard, ShardKey, TierError, frame
from lmcache.tiers.disk import folder as disk_folder
from lmcache.tiers.disk import tier as disk_module
from lmcache.tiers.disk.journal import PUT, Journal
from lmcache.tiers.disk.shard_index import RECORD, ShardIndex, tag_of
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import Filesystem
from lmcache.tiers.frame_io import UNREADABLE
from lmcache.tiers.registry import make_tier

MIB = 1 << 20
CAP = 16 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    """Open tiers over one folder: disk(max_bytes=..., filesystem=...); those still open are closed at the end."""
    made: list[DiskTier] = []

    def make(
        max_bytes: int | None = CAP, io: str = "auto", filesystem: Filesystem | None = None, at: Path | None = None
    ) -> DiskTier:
        made.append(DiskTier(at or tmp_path / "tier", max_bytes, io, filesystem=filesystem))
        made[-1].open()
        return made[-1]

    yield make
    for tier in made:
        if isinstance(tier._filesystem, FaultyFilesystem):
            tier._filesystem.fail.clear()
        tier.close()


def fill(tier: DiskTier, numbers: range, size: int) -> list[str]:
    return tier.store([shard_of(shard_key(number), size) for number in numbers])


def there(tier: DiskTier, numbers: range) -> list[int]:
    return [number for number in numbers if tier.known([shard_key(number)])[0]]


# ---- the directory


def test_a_second_opener_is_told_who_has_it(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    first = disk()
    with pytest.raises(TierError, match=f"in use by process {os.getpid()}") as caught:
        disk()
    assert caught.value.reason == "locked"
    fill(first, range(3), 1000)
    first.close()
    assert there(disk(), range(3)) == [0, 1, 2]


def test_a_lock_of_a_dead_process_holds_nobody(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from lmcache.tiers.disk.tier import DiskTier;"
        "from lmcache.testing.conformance import shard_key, shard_of;"
        "t = DiskTier(Path(sys.argv[1]), 1 << 24); t.open();"
        "t.store([shard_of(shard_key(1), 70000), shard_of(shard_key(2), 700)]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "tier")], check=False)
    tier = disk()
    assert load_one(tier, shard_key(1), 70000) == (OK, payload_of(shard_key(1), 70000))
    assert load_one(tier, shard_key(2), 700) == (OK, payload_of(shard_key(2), 700))


def test_nobody_else_can_read_it(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        fill(disk(), range(4), 100_000)
    finally:
        os.umask(old)
    assert (tmp_path / "tier").stat().st_mode & 0o777 == 0o700
    files = list((tmp_path / "tier").iterdir())
    assert len(files) == 3 and all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_a_directory_of_something_else_is_left_alone(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier" / "thesis.txt").write_text("precious")
    with pytest.raises(TierError, match=r"'thesis.txt' is not a cache file; give the tier its own directory"):
        disk()
    (tmp_path / "tier" / "thesis.txt").unlink()
    (tmp_path / "tier").chmod(0o777)
    with pytest.raises(TierError, match=r"others may write to it; .* such as (disk://[^ ]+)$") as caught:
        disk()
    inside = make_tier(str(caught.value).split()[-1]).tier  # volumes of containers often belong to others
    inside.open()
    inside.close()


def test_an_index_of_another_kind_or_version_is_left_alone(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    disk().close()
    path = tmp_path / "tier" / "index"
    whole = path.read_bytes()
    for at, match in ((0, "not the index of a disk tier"), (8, "has version"), (20, "is damaged")):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(TierError, match=match):
            disk()
        assert path.read_bytes() == broken
    path.write_bytes(whole)
    disk()


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("disk://var/lib", "three slashes"),
        ("disk:///", "three slashes"),
        ("disk:///x?io=fast", "io: unknown; known: auto, direct, buffered"),
        ("disk:///x?maxgb=3", "did you mean max_gb"),
    ],
)
def test_urls_that_cannot_be_used(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_tier(url)


# ---- room


def test_without_a_cap_it_takes_nine_tenths_of_what_is_free(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk(max_bytes=None)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert tier.usage().max_bytes == pytest.approx(0.9 * free, rel=0.05)


def test_small_shards_are_packed(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk()
    before = filesystem_bytes(tmp_path / "tier")
    assert fill(tier, range(1000), 2048) == [OK] * 1000
    assert filesystem_bytes(tmp_path / "tier") - before <= 1000 * 2350  # frame 2176, index 64, journal's room


def test_a_packed_block_goes_with_its_last_frame(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk()
    fill(tier, range(64), 2048)
    (segment,) = {tier._segments[tier._index.place(tier._index.find(shard_key(n).packed))] for n in range(64)}
    full = segment.used
    tier.remove([shard_key(number) for number in range(0, 64, 2)])
    for number in range(1, 64, 2):
        assert load_one(tier, shard_key(number), 2048) == (OK, payload_of(shard_key(number), 2048))
    tier.remove([shard_key(number) for number in range(1, 64)])
    assert full == 34 * 4096 and segment.used == 0
    assert segment.path.stat().st_blocks == 0


def test_one_call_is_few_writes(disk: Callable[..., DiskTier]) -> None:
    class Counting(Filesystem):
        writes: list[int] = []  # noqa: RUF012

        def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            self.writes.append(sum(one.nbytes for one in buffers))
            return super().pwritev(fd, buffers, offset)

    tier = disk(max_bytes=64 * MIB, filesystem=Counting())
    Counting.writes.clear()
    fill(tier, range(500), 2048)
    assert len(Counting.writes) == 2 * 2  # two groups, of as many as a buffer takes, and what the journal says of each
    Counting.writes.clear()
    aligned = np.zeros(33 * 131072 + 4096, np.uint8)
    start = -aligned.ctypes.data % 4096
    memory = memoryview(aligned.data)[start : start + 32 * 131072]
    shards = [Shard(shard_key(1000 + n), bytes(16), memory[n * 131072 : (n + 1) * 131072]) for n in range(32)]
    assert tier.store(shards) == [OK] * 32
    assert len(Counting.writes) <= 4


def test_a_lower_cap_is_kept_from_the_start(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk(max_bytes=32 * MIB)
    fill(tier, range(28), MIB)
    tier.close()
    tier = disk(max_bytes=8 * MIB)
    assert filesystem_bytes(tmp_path / "tier") <= tier.usage().stored_bytes <= 8 * MIB
    left = there(tier, range(28))
    assert left == list(range(28 - len(left), 28)) and len(left) >= 6


def test_the_cap_holds_at_every_instant(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    cap, most, done = 12 * MIB, 0, threading.Event()
    tier = disk(max_bytes=cap)

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, filesystem_bytes(tmp_path / "tier"))

    def write(seed: int) -> None:
        dice = random.Random(seed)
        for number in range(40):
            size = dice.choice((900, 20_000, 100_000, 900_000))
            tier.store([shard_of(shard_key(seed * 1000 + number * 4 + one), size) for one in range(3)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    done.set()
    watcher.join()
    assert cap // 2 < most <= cap


def test_the_index_stays_small_however_often_things_are_used(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk(max_bytes=2 * MIB)
    fill(tier, range(20), 3000)
    for _ in range(1500):
        assert load_one(tier, shard_key(3), 3000)[0] == OK
    size = (tmp_path / "tier" / "index").stat().st_size
    assert size < 45_000  # 1,500 entries of 40 bytes were written
    tier.close()
    tier = disk(max_bytes=2 * MIB)
    assert there(tier, range(20)) == list(range(20))
    oldest_first = [bytes(key)[16:] for key in tier._index.records()["key"]]
    assert oldest_first[-1] == shard_key(3).packed[16:]


# ---- a start


def test_a_cut_journal_loses_only_what_was_cut(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk()
    for number in range(10):
        fill(tier, range(number, number + 1), 70_000)
    end = tier._journal.end
    content = (tmp_path / "tier" / "index").read_bytes()
    copy = tmp_path / "copy"
    for cut in (end - 1, end - 50, end - 97, end - 200):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "tier", copy)
        (copy / "index").write_bytes(content[:cut])
        other = disk(at=copy)
        left = there(other, range(10))
        assert left == list(range(10 - (1 + (end - 1 - cut) // 96)))
        for number in left:
            assert load_one(other, shard_key(number), 70_000)[0] == OK
        assert filesystem_bytes(copy) <= len(left) * 78_000 + 60_000  # what the journal no longer knows was given back
        other.close()


def test_files_that_are_gone_or_cut_are_misses(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = disk()
    fill(tier, range(4), 200_000)
    fill(tier, range(4, 8), 2000)
    large, packed = where(tier, shard_key(0))[0], where(tier, shard_key(4))[0]
    tier.close()
    os.truncate(large, where_cut := 300_000)
    packed.unlink()
    tier = disk()
    assert load_one(tier, shard_key(0), 200_000)[0] == OK, where_cut
    for number in (1, 2, 3):
        assert load_one(tier, shard_key(number), 200_000)[0] in frame.DAMAGE
    for number in (4, 5, 6, 7):
        assert load_one(tier, shard_key(number), 2000)[0] in frame.DAMAGE
    assert there(tier, range(8)) == [0]
    assert fill(tier, range(8), 2000) == [OK] * 8


def test_many_records_open_fast_and_take_little(tmp_path: Path) -> None:
    """A tenth of what benchmarks/tiers.py opens, with room for a busy machine."""
    count = 100_000
    keys = np.random.default_rng(1).integers(0, 256, (count, 36), dtype=np.uint8)
    records = np.zeros(count, RECORD)
    records["key"] = keys.view("V36").ravel()
    records["payload"] = 3000
    records["place"] = (np.arange(count, dtype=np.uint64) + np.uint64(64)) * np.uint64(64) + np.uint64(1 << 32)
    records["tag"] = [tag_of(key.tobytes()) for key in keys]
    (tmp_path / "tier").mkdir(mode=0o700)
    journal = Journal(Filesystem(), tmp_path / "tier")
    journal.open()
    journal.restart(records[: count // 2], 2)
    for at in range(count // 2, count, 100):
        journal.append((PUT, records[at : at + 100].tobytes()))
    journal.close()
    tier = DiskTier(tmp_path / "tier", 1 << 40)
    tier.open()
    assert tier.usage().shards == count
    assert tier._index.memory_bytes() <= 200 * count
    assert all(tier.known([ShardKey.unpack(key.tobytes()) for key in keys[::9973]]))
    tier.close()


def test_the_index_against_a_plain_dictionary() -> None:
    dice, index, plain = random.Random(2), ShardIndex(), {}
    for _ in range(20_000):
        key = shard_key(dice.randrange(300)).packed
        row = index.find(key)
        assert (index.place(row) if row else None) == plain.get(key)
        action = dice.random()
        if not row and action < 0.6:
            index.insert(key, dice.randrange(1 << 32), place := dice.randrange(1, 1 << 63))
            plain[key] = place
        elif row and action < 0.3:
            index.remove(row)
            del plain[key]
        elif row:
            index.order.touched([row])
            plain[key] = plain.pop(key)
    assert [bytes(one) for one in index.records()["key"]] == list(plain)
    again = ShardIndex(index.records())
    assert [bytes(one) for one in again.records()["key"]] == list(plain)
    assert again.key(next(iter(again.order))) == next(iter(plain))


def test_equal_tags_of_different_keys_do_no_harm(
    disk: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lmcache.tiers.disk.shard_index.tag_of", "lmcache.tiers.disk.tier.tag_of"):
        monkeypatch.setattr(module, lambda key: key[16] % 4)
    tier = disk()
    for size in (1000, 80_000):
        for number in range(40):
            assert fill(tier, range(number, number + 1), size) == [OK]
            assert load_one(tier, shard_key(number), size) == (OK, payload_of(shard_key(number), size))
    tier.store([shard_of(shard_key(number), 500) for number in range(100, 120)])
    kept = there(tier, range(200))
    assert len(kept) <= 4
    tier.close()
    assert there(disk(), range(200)) == kept


# ---- media that fail


@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_what_is_asked_for_is_how_segments_are_opened(disk: Callable[..., DiskTier], tmp_path: Path, io: str) -> None:
    class Noting(Filesystem):
        flags: dict[str, int] = {}  # noqa: RUF012

        def open(self, path: Path, flags: int) -> int:
            self.flags[path.suffix] = flags
            return super().open(path, flags)

    try:
        os.close(os.open(tmp_path / "plain", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT here")
    tier = disk(io=io, filesystem=Noting())
    for size in (1000, 300_001):
        assert fill(tier, range(size, size + 2), size) == [OK] * 2
        assert load_one(tier, shard_key(size), size) == (OK, payload_of(shard_key(size), size))
    for kind in (".large", ".packed"):
        assert bool(Noting.flags[kind] & os.O_DIRECT) == (io != "buffered")


@pytest.mark.parametrize(("code", "reason"), [(errno.EACCES, "denied"), (errno.EROFS, "read-only")])
def test_a_directory_that_cannot_be_written_to_is_named(
    disk: Callable[..., DiskTier], tmp_path: Path, code: int, reason: str
) -> None:
    filesystem = FaultyFilesystem()
    filesystem.fail = {"open": code}
    with pytest.raises(TierError, match=f"^disk://{tmp_path}/tier: ") as caught:
        disk(filesystem=filesystem)
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    filesystem.fail.clear()
    assert fill(disk(filesystem=filesystem), range(3), 1000) == [OK] * 3


def test_no_direct_io_is_said_once(disk: Callable[..., DiskTier]) -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    class NoDirect(Filesystem):
        def open(self, path: Path, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().open(path, flags)

    disk_folder.log.addHandler(listener)
    try:
        tier = disk(filesystem=NoDirect())
    finally:
        disk_folder.log.removeHandler(listener)
    for size in (1000, 300_001):
        assert fill(tier, range(size, size + 3), size) == [OK] * 3
        assert load_one(tier, shard_key(size), size) == (OK, payload_of(shard_key(size), size))
    assert len([line for line in said if "no O_DIRECT: going through the page cache" in line]) == 1
    tier.close()
    with pytest.raises(TierError, match="use io=auto or io=buffered"):
        disk(io="direct", filesystem=NoDirect())


def test_no_holes_no_tier(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    filesystem = FaultyFilesystem()
    filesystem.fail = {"punch": errno.EOPNOTSUPP}
    with pytest.raises(TierError, match="cannot punch holes; use another one, or dir://"):
        disk(filesystem=filesystem)
    assert sorted(path.name for path in (tmp_path / "tier").iterdir()) == ["lock"]
    filesystem.fail.clear()
    disk(filesystem=filesystem)


@pytest.mark.parametrize("size", [2000, 200_000])
@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EIO, "io"), (errno.EROFS, "read-only"), (errno.EACCES, "denied")],
    ids=["EIO", "EROFS", "EACCES"],
)
def test_a_store_that_fails_is_said_and_costs_nothing(
    disk: Callable[..., DiskTier], tmp_path: Path, size: int, code: int, reason: str
) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    assert fill(tier, range(5), size) == [OK] * 5
    for operation, after in (("pwritev", 0), ("pwritev", 1), ("allocate", 0)):
        tier._journal._allocated = tier._journal.end if operation == "allocate" else tier._journal._allocated
        filesystem.fail, filesystem.after = {operation: code}, {operation: after}
        with pytest.raises(TierError) as caught:
            fill(tier, range(5, 8), size)
        assert caught.value.reason == reason and str(tmp_path) in str(caught.value)
        assert there(tier, range(10)) == [0, 1, 2, 3, 4]
        for number in range(5):
            assert load_one(tier, shard_key(number), size) == (OK, payload_of(shard_key(number), size))
    filesystem.fail.clear()
    before = tier.usage().stored_bytes
    assert fill(tier, range(5, 8), size) == [OK] * 3
    assert tier.usage().stored_bytes - before <= 3 * (size + 8192 + 200) + 8192
    tier.close()
    assert there(disk(), range(10)) == list(range(8))


def test_a_read_only_file_system_still_serves(disk: Callable[..., DiskTier]) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    fill(tier, range(5), 100_000)
    filesystem.fail = dict.fromkeys(("pwritev", "allocate", "punch", "truncate", "rename", "unlink"), errno.EROFS)
    assert load_one(tier, shard_key(2), 100_000) == (OK, payload_of(shard_key(2), 100_000))
    with pytest.raises(TierError, match="remount it writable"):
        tier.remove([shard_key(1)])
    filesystem.fail.clear()
    tier.remove([shard_key(1)])
    assert there(tier, range(5)) == [0, 2, 3, 4]


def test_blocks_that_could_not_be_given_back_are_given_back_later(
    disk: Callable[..., DiskTier], tmp_path: Path
) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    fill(tier, range(12), MIB)
    filesystem.fail = {"punch": errno.EIO}
    with pytest.raises(TierError):
        tier.remove([shard_key(number) for number in range(5)])
    assert there(tier, range(12)) == list(range(5, 12))
    assert tier.usage().stored_bytes > 12 * MIB  # they are still on the medium
    assert filesystem_bytes(tmp_path / "tier") <= tier.usage().stored_bytes
    filesystem.fail.clear()
    tier.remove([shard_key(5)])
    assert filesystem_bytes(tmp_path / "tier") <= tier.usage().stored_bytes < 7 * MIB


def test_a_clear_that_fails_is_ended_by_the_next(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    empty = tier.usage()
    for number in range(12):
        fill(tier, range(number, number + 1), MIB)
    filesystem.fail, filesystem.after = {"unlink": errno.EIO}, {"unlink": 2}
    with pytest.raises(TierError):
        tier.clear()
    assert there(tier, range(12)) == [] and tier.usage().stored_bytes > 8 * MIB
    filesystem.fail.clear()
    assert fill(tier, range(20, 34), MIB) == [OK] * 14  # what was not given back is, to make room
    assert filesystem_bytes(tmp_path / "tier") <= tier.usage().stored_bytes <= CAP
    tier.clear()
    assert tier.usage() == empty and filesystem_bytes(tmp_path / "tier") < 40_000


@pytest.mark.parametrize("size", [2000, 200_000])
def test_one_block_that_cannot_be_read_costs_one_shard(disk: Callable[..., DiskTier], size: int) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    fill(tier, range(6), size)
    _, header, payload, _ = where(tier, shard_key(2))
    bad = header if size < 4096 else payload
    filesystem.applies = lambda name, arguments: (
        name != "preadv"
        or (  # type: ignore[method-assign]
            arguments[2] <= bad < arguments[2] + sum(one.nbytes for one in arguments[1])
        )
    )
    if size < 4096:  # packed frames share blocks: what is in the bad block is lost together
        bad += 64
    filesystem.fail = {"preadv": errno.EIO}
    buffers = [bytearray(size) for _ in range(6)]
    outcomes = tier.load([shard_key(number) for number in range(6)], [memoryview(one) for one in buffers])
    assert outcomes.count(UNREADABLE) <= 3 and outcomes[2] == UNREADABLE
    for number, outcome in enumerate(outcomes):
        if outcome == OK:
            assert buffers[number] == payload_of(shard_key(number), size)
    assert there(tier, range(6)) == [number for number, outcome in enumerate(outcomes) if outcome == OK]


def test_a_dead_device_loses_nothing_that_comes_back(disk: Callable[..., DiskTier]) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    fill(tier, range(4), 200_000)
    fill(tier, range(4, 8), 2000)
    filesystem.fail = {"preadv": errno.EIO}
    keys = [shard_key(number) for number in range(8)]
    sizes = [200_000] * 4 + [2000] * 4
    with pytest.raises(TierError, match="look at the kernel's log") as caught:
        tier.load(keys, [memoryview(bytearray(size)) for size in sizes])
    assert caught.value.reason == "io"
    filesystem.fail.clear()
    assert tier.load(keys, [memoryview(bytearray(size)) for size in sizes]) == [OK] * 8


def test_the_index_is_rewritten_later_when_it_cannot_be_now(disk: Callable[..., DiskTier], tmp_path: Path) -> None:
    filesystem = FaultyFilesystem()
    tier = disk(max_bytes=2 * MIB, filesystem=filesystem)
    fill(tier, range(5), 3000)
    filesystem.fail = {"rename": errno.EIO}
    for _ in range(1500):
        assert load_one(tier, shard_key(3), 3000)[0] == OK
    assert (tmp_path / "tier" / "index").stat().st_size > 60_000
    assert not (tmp_path / "tier" / "index.new").exists()
    filesystem.fail.clear()
    for _ in range(1500):
        assert load_one(tier, shard_key(3), 3000)[0] == OK
    assert (tmp_path / "tier" / "index").stat().st_size < 45_000
    tier.close()
    assert there(disk(), range(5)) == list(range(5))


def test_a_full_file_system_lets_older_shards_make_way(
    disk: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, folders: Callable[[str], Path]
) -> None:
    """The file system is smaller than max_gb, and something else takes a part of it."""
    monkeypatch.setattr(disk_module, "_PAUSE_SECONDS", 0.0)
    mount = folders("/tmp")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    tier = DiskTier(mount / "tier", 64 * MIB)
    try:
        tier.open()
        for number in range(40):
            assert fill(tier, range(number, number + 1), MIB) == [OK], number
            assert load_one(tier, shard_key(number), MIB) == (OK, payload_of(shard_key(number), MIB))
        left = there(tier, range(40))
        assert left == list(range(40 - len(left), 40)) and len(left) >= 10
        (mount / "other").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize))
        with pytest.raises(OSError):
            (mount / "another").write_bytes(bytes(MIB))
        for number in range(40, 60):
            (outcome,) = fill(tier, range(number, number + 1), 300_000)
            assert outcome == OK
            assert load_one(tier, shard_key(number), 300_000)[0] == OK
        (mount / "other").unlink()
        (mount / "another").unlink()
        assert fill(tier, range(60, 66), MIB) == [OK] * 6
        before = there(tier, range(66))
        tier.close()
        tier.open()
        assert there(tier, range(66)) == before
        for number in before:
            size = MIB if number < 40 or number >= 60 else 300_000
            assert load_one(tier, shard_key(number), size) == (OK, payload_of(shard_key(number), size))
    finally:
        tier.close()
        subprocess.run(["umount", str(mount)], check=True)


def test_a_file_system_that_stays_full_does_not_empty_the_tier(
    disk: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.tiers.disk.tier._PAUSE_SECONDS", 3600.0)
    filesystem = FaultyFilesystem()
    tier = disk(filesystem=filesystem)
    fill(tier, range(10), MIB)
    filesystem.fail = {"pwritev": errno.ENOSPC}
    filesystem.applies = lambda name, arguments: sum(one.nbytes for one in arguments[1]) > 4096  # type: ignore[method-assign]
    for number in range(20, 40):
        assert fill(tier, range(number, number + 1), MIB) == ["full"]
    assert len(there(tier, range(10))) >= 8  # one shard made way, and then it was seen to be useless
    filesystem.fail.clear()
    tier._full_until = 0.0
    assert fill(tier, range(50, 51), MIB) == [OK]


def test_callers_of_one_shard_at_once_keep_one(disk: Callable[..., DiskTier]) -> None:
    tier = disk()
    barrier, outcomes = threading.Barrier(4), []

    def store() -> None:
        barrier.wait()
        outcomes.extend(fill(tier, range(3), 400_000))

    threads = [threading.Thread(target=store) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(OK) == 3 and outcomes.count(KEPT) == 9
    assert tier.usage().stored_bytes - DiskTier._index_bytes(tier, 3) < 3 * 420_000 + 60_000
    assert load_one(tier, shard_key(9), 10)[0] == ABSENT
