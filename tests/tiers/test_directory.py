"""What is the shared directory's own: several processes at one store, the janitor, leftovers, times of use."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from disk_files import filesystem_bytes
from filesystems import FaultyFilesystem

from lmcache.errors import ConfigError
from lmcache.testing.conformance import load_one, payload_of, shard_key, shard_of
from lmcache.tiers import ABSENT, KEPT, OK, TierError, frame
from lmcache.tiers.directory import janitor as janitor_module
from lmcache.tiers.directory import tier as directory_module
from lmcache.tiers.directory.janitor import LEASE_SECONDS, LEFTOVER_SECONDS, Count, Janitor
from lmcache.tiers.directory.tier import DirectoryTier
from lmcache.tiers.filesystem import Filesystem
from lmcache.tiers.frame_io import UNREADABLE
from lmcache.tiers.registry import make_tier
from servers import PATIENCE, beside, eventually

MIB = 1 << 20
T = TypeVar("T")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Callable[..., DirectoryTier]]:
    """Open tiers over one folder, as of several machines; closed at the end."""
    made: list[DirectoryTier] = []

    def make(
        max_bytes: int | None = None, filesystem: Filesystem | None = None, touch_seconds: float = 60.0
    ) -> DirectoryTier:
        made.append(DirectoryTier(tmp_path / "tier", max_bytes, filesystem=filesystem, touch_seconds=touch_seconds))
        made[-1].open()
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def fill(tier: DirectoryTier, numbers: range, size: int) -> list[str]:
    return tier.store([shard_of(shard_key(number), size) for number in numbers])


def there(tier: DirectoryTier, numbers: range) -> list[int]:
    return [number for number, yes in zip(numbers, tier.contains([*map(shard_key, numbers)]), strict=True) if yes]


def file_of(tier: DirectoryTier, number: int) -> Path:
    return tier._file(shard_key(number))


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_one_stores_the_other_finds_at_once(directory: Callable[..., DirectoryTier]) -> None:
    one, two = directory(), directory()
    assert two.known([shard_key(1)]) is None
    assert fill(one, range(4), 70_000) == [OK] * 4
    assert load_one(two, shard_key(1), 70_000) == (OK, payload_of(shard_key(1), 70_000))
    assert fill(two, range(4), 70_000) == [KEPT] * 4
    two.remove([shard_key(1)])
    assert load_one(one, shard_key(1), 70_000)[0] == ABSENT
    assert fill(one, range(1, 2), 70_000) == [OK]


def test_files_are_this_users_and_lie_where_the_page_says(
    directory: Callable[..., DirectoryTier], tmp_path: Path
) -> None:
    old = os.umask(0)
    try:
        fill(directory(), range(1, 2), 1000)
    finally:
        os.umask(old)
    space, name = shard_key(1).text.split("/")
    path = tmp_path / "tier" / space / name[:2] / name
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in path.parents[:2])
    assert path.read_bytes()[128:] == payload_of(shard_key(1), 1000)


def test_a_cut_or_lengthened_file_is_a_miss_and_goes(directory: Callable[..., DirectoryTier]) -> None:
    tier = directory()
    fill(tier, range(4), 9 * MIB)
    for number, size in enumerate((0, 100, 5 * MIB, 9 * MIB + 129)):
        os.truncate(file_of(tier, number), size)
        assert load_one(tier, shard_key(number), 9 * MIB)[0] in frame.DAMAGE
        assert not file_of(tier, number).exists()


def test_a_damaged_file_that_was_replaced_meanwhile_stays(directory: Callable[..., DirectoryTier]) -> None:
    other = directory()

    class Slow(Filesystem):
        """Another machine stores the shard anew while this one reads the damaged file."""

        replaced = False

        def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            got = super().preadv(fd, buffers, offset)
            if not self.replaced:
                self.replaced = True
                other.remove([shard_key(1)])
                assert fill(other, range(1, 2), 5000) == [OK]
            return got

    tier = directory(filesystem=Slow())
    fill(tier, range(1, 2), 5000)
    content = bytearray(file_of(tier, 1).read_bytes())
    content[1000] ^= 1
    file_of(tier, 1).write_bytes(content)
    assert load_one(tier, shard_key(1), 5000)[0] == frame.CHECKSUM
    assert load_one(tier, shard_key(1), 5000) == (OK, payload_of(shard_key(1), 5000))


def test_the_time_of_use_is_brought_up_once_a_minute(directory: Callable[..., DirectoryTier]) -> None:
    class Counting(Filesystem):
        touched: list[Path] = []  # noqa: RUF012

        def touch(self, path: Path) -> None:
            if path.name != "janitor":  # the lease, whenever it is due
                self.touched.append(path)
            super().touch(path)

    tier = directory(filesystem=Counting())
    fill(tier, range(2), 5000)
    age(file_of(tier, 0), 30)
    for _ in range(3):
        load_one(tier, shard_key(0), 5000)
    assert Counting.touched == []
    age(file_of(tier, 0), 90)
    now = time.time()
    for _ in range(3):
        load_one(tier, shard_key(0), 5000)
    assert Counting.touched == [file_of(tier, 0)]
    assert file_of(tier, 0).stat().st_mtime > now - 1


def test_what_was_used_longest_ago_goes_first(directory: Callable[..., DirectoryTier]) -> None:
    tier = directory(max_bytes=16 * MIB)
    fill(tier, range(12), MIB)
    order = [3, 1, 4, 11, 5, 9, 2, 6, 10, 8, 7, 0]
    for place, number in enumerate(order):
        age(file_of(tier, number), 1000 - place)
    assert load_one(tier, shard_key(4), MIB)[0] == OK  # used now
    order.remove(4)
    assert fill(tier, range(20, 24), MIB) == [OK] * 4
    left = there(tier, range(12))
    assert 4 in left and 4 <= len(left) < 12
    assert sorted(left) == sorted([4, *order[len(order) - len(left) + 1 :]])


def test_one_is_elected_and_makes_room_for_the_others(
    directory: Callable[..., DirectoryTier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "ASK_SECONDS", 0.2)
    cap = 16 * MIB
    first, second = directory(cap), directory(cap)
    assert first._janitor.elected() and not second._janitor.elected()
    with first._counting:  # the janitor is busy
        outcomes = [outcome for number in range(40) for outcome in fill(second, range(number, number + 1), MIB)]
    assert outcomes.index("full") in (13, 14, 15) and "full" in outcomes[-1:]
    assert filesystem_bytes(tmp_path / "tier") <= cap
    eventually(lambda: fill(second, range(50, 51), MIB) != ["full"])
    assert load_one(first, shard_key(50), MIB)[0] == OK
    assert filesystem_bytes(tmp_path / "tier") <= cap


def test_both_writing_stay_within_the_cap_and_what_one_wrote_unseen(
    directory: Callable[..., DirectoryTier], tmp_path: Path
) -> None:
    cap = 16 * MIB
    first, second = directory(cap), directory(cap)
    fill(first, range(12), MIB)
    fill(second, range(20, 32), MIB)  # it has not heard of the others yet
    assert filesystem_bytes(tmp_path / "tier") <= 2 * cap
    for _ in range(2):  # what the second wrote may be in the first count or not, so it counts on the safe side
        with first._counting:
            first._tidy(cap // 20)
        assert filesystem_bytes(tmp_path / "tier") <= cap
        with second._counting:
            second._tidy(0)
        assert second.usage().stored_bytes >= first.usage().stored_bytes
    assert second.usage() == first.usage()


def test_the_lease_of_the_dead_and_of_the_silent_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    one, two = Janitor(Filesystem(), tmp_path), Janitor(Filesystem(), tmp_path)
    assert one.elected() and one.elected() and not two.elected()
    age(tmp_path / "janitor", LEASE_SECONDS - 20)
    assert not two.elected()
    now = time.time()
    assert one.elected() and (tmp_path / "janitor").stat().st_mtime > now - 1  # renewed
    age(tmp_path / "janitor", LEASE_SECONDS + 5)
    assert two.elected() and not one.elected()
    two.leave(Count(5, 1))
    assert not (tmp_path / "janitor").exists() and (one.published() or (None,))[:2] == (Count(5, 1), True)
    script = (
        "import sys; from pathlib import Path; from lmcache.tiers.directory.janitor import Janitor;"
        "from lmcache.tiers.filesystem import Filesystem; assert Janitor(Filesystem(), Path(sys.argv[1])).elected()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert one.elected()  # that process is gone, so nobody waits for its minute to end
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("content", ["²".encode(), b"\xff\xfe", b"9" * 5000], ids=["superscript", "bytes", "long"])
@pytest.mark.parametrize("name", ["wanted", "janitor"])
def test_nonsense_in_a_file_that_machines_share_leaves_room_to_be_made(
    directory: Callable[..., DirectoryTier], tmp_path: Path, name: str, content: bytes
) -> None:
    tier = directory(16 * MIB)
    fill(tier, range(12), MIB)
    (tmp_path / "tier" / name).write_bytes(content)
    age(tmp_path / "tier" / name, LEASE_SECONDS + 5)
    ended = tier._ended
    tier._wake.set()
    eventually(lambda: tier._ended > ended or not tier._watch.is_alive())
    assert fill(tier, range(20, 28), MIB) == [OK] * 8
    assert filesystem_bytes(tmp_path / "tier") <= 16 * MIB


@pytest.mark.parametrize("process", ["²", str(10**30)])
def test_a_lease_of_no_process_ends_as_any_other(tmp_path: Path, process: str) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "janitor").write_text(f"{socket.gethostname()} {process} x", "utf-8")
    janitor = Janitor(Filesystem(), tmp_path)
    assert not janitor.elected()
    age(tmp_path / "janitor", LEASE_SECONDS + 5)
    assert janitor.elected()


@pytest.mark.parametrize("usage", [b"-99999999999 1 1 x", b"1 -1 1 x", b"1 1 1", b"\xff 1 1 x"])
def test_a_count_that_cannot_be_read_is_taken_anew(
    directory: Callable[..., DirectoryTier], tmp_path: Path, usage: bytes
) -> None:
    tier = directory()
    fill(tier, range(3), 5000)
    tier.close()
    (tmp_path / "tier/usage").write_bytes(usage)
    assert directory(16 * MIB).usage().shards == 3


def test_an_unforeseen_fault_does_not_end_the_janitors_thread(
    directory: Callable[..., DirectoryTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier, count = directory(16 * MIB), Janitor.count
    fill(tier, range(14), MIB)

    def fail(self: Janitor) -> Count:
        raise RuntimeError("out of tune")

    monkeypatch.setattr(Janitor, "count", fail)
    for _ in range(2):
        with pytest.raises(TierError, match="out of tune"):
            fill(tier, range(20, 24), MIB)
    assert [record.getMessage().count("out of tune") for record in caplog.records] == [1]
    monkeypatch.setattr(Janitor, "count", count)
    assert fill(tier, range(30, 34), MIB) == [OK] * 4


def test_a_file_from_the_far_future_does_not_keep_room_from_being_made(
    directory: Callable[..., DirectoryTier], tmp_path: Path
) -> None:
    tier = directory(16 * MIB)
    fill(tier, range(12), MIB)
    os.utime(file_of(tier, 0), (1 << 34, 1 << 34))
    if file_of(tier, 0).stat().st_mtime_ns < 1 << 63:
        pytest.skip("this file system writes no such time down")
    assert fill(tier, range(20, 28), MIB) == [OK] * 8


class Stuck(FaultyFilesystem):
    """These files cannot be removed, as if another user owned their directories."""

    def __init__(self) -> None:
        super().__init__()
        self.fail["unlink"] = errno.EACCES
        self.paths: set[Path] | None = set()
        """None: all files."""

    def applies(self, name: str, arguments: Sequence[object]) -> bool:
        return self.paths is None or arguments[0] in self.paths


def test_files_that_cannot_be_removed_are_stepped_over(
    directory: Callable[..., DirectoryTier], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem, leftover = Stuck(), tmp_path / "tier/tmp/left"
    tier = directory(16 * MIB, filesystem)
    fill(tier, range(12), MIB)
    leftover.write_bytes(b"")
    age(leftover, LEFTOVER_SECONDS + 60)
    for number in range(2):  # they are to go first
        age(file_of(tier, number), 1000 - number)
    filesystem.paths = {file_of(tier, 0), file_of(tier, 1), leftover}
    assert [fill(tier, range(number, number + 1), MIB) for number in range(20, 50)] == [[OK]] * 30
    assert filesystem_bytes(tmp_path / "tier") <= 16 * MIB and there(tier, range(12)) == [0, 1]
    assert [record.getMessage().count("Permission denied") for record in caplog.records] == [1]
    os.truncate(file_of(tier, 0), 100)
    assert load_one(tier, shard_key(0), MIB)[0] in frame.DAMAGE
    with pytest.raises(TierError, match="permission denied"):
        tier.clear()
    assert there(tier, range(50)) == [0, 1]


@pytest.mark.parametrize("most", [1, 1000])
def test_where_nothing_can_be_removed_the_trouble_is_told(
    directory: Callable[..., DirectoryTier], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(janitor_module, "MAX_STUCK", most)
    filesystem = Stuck()
    tier = directory(16 * MIB, filesystem)
    fill(tier, range(14), MIB)
    filesystem.paths = None
    with pytest.raises(TierError, match="permission denied"):
        fill(tier, range(20, 24), MIB)
    filesystem.paths = set()
    assert fill(tier, range(30, 34), MIB) == [OK] * 4


def test_leftovers_of_crashed_writers_are_swept_and_those_of_live_ones_are_not(
    directory: Callable[..., DirectoryTier], tmp_path: Path
) -> None:
    tier = directory(64 * MIB)
    old, new = tmp_path / "tier/tmp/old", tmp_path / "tier/tmp/new"
    for path in (old, new):
        path.write_bytes(bytes(MIB))
    age(old, LEFTOVER_SECONDS + 60)
    age(new, LEFTOVER_SECONDS - 600)
    with tier._counting:
        tier._tidy(0)
    assert not old.exists() and new.exists()
    assert tier.usage().stored_bytes >= MIB


def test_after_a_crash_the_count_is_taken_anew(directory: Callable[..., DirectoryTier], tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from lmcache.tiers.directory.tier import DirectoryTier;"
        "from lmcache.testing.conformance import shard_key, shard_of;"
        "t = DirectoryTier(Path(sys.argv[1]), 1 << 24); t.open();"
        "t.store([shard_of(shard_key(n), 700_000) for n in range(9)]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "tier")], check=False)
    tier = directory(16 * MIB)
    assert tier.usage().shards == 9 and tier.usage().stored_bytes >= 9 * 700_000
    assert there(tier, range(9)) == list(range(9))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every count waits for this, as it does for a file system with very many files."""
    count, go_on = Janitor.count, threading.Event()
    go_on.set()

    def wait_and_count(self: Janitor) -> Count:
        assert go_on.wait(PATIENCE)
        return count(self)

    monkeypatch.setattr(Janitor, "count", wait_and_count)
    monkeypatch.setattr(directory_module, "ROOM_SECONDS", 0.1, raising=False)
    yield go_on
    go_on.set()


def soon(work: Callable[[], list[str]]) -> list[str]:
    """What it answers, without waiting for a count."""
    answers: list[str] = []
    worker = threading.Thread(target=lambda: answers.extend(work()), daemon=True)
    worker.start()
    worker.join(PATIENCE / 2)
    assert not worker.is_alive(), "it waits for what is there to be counted"
    return answers


def test_a_store_and_a_load_do_not_wait_while_everything_is_counted(
    directory: Callable[..., DirectoryTier], counting: threading.Event
) -> None:
    tier = directory(16 * MIB)
    fill(tier, range(14), MIB)
    counting.clear()
    assert "full" in soon(lambda: fill(tier, range(20, 24), MIB))
    assert load_one(tier, shard_key(13), MIB)[0] == OK
    counting.set()
    eventually(lambda: fill(tier, range(30, 31), MIB) == [OK])


def test_stores_that_gave_up_are_made_no_room_for(
    directory: Callable[..., DirectoryTier], counting: threading.Event
) -> None:
    tier = directory(16 * MIB)
    fill(tier, range(14), MIB)
    counting.clear()
    refused = [outcome for _ in range(10) for outcome in fill(tier, range(20, 24), MIB) if outcome == "full"]
    assert len(refused) >= 30  # more than the cap in all
    begun = tier._begun
    counting.set()
    eventually(lambda: tier._ended > begun + 1)  # the look that was held up, and the next one
    assert len(there(tier, range(14))) >= 8


def test_room_for_all_stores_that_wait_is_made_at_once(
    directory: Callable[..., DirectoryTier], counting: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for those that have come while everything was counted for the first of them."""
    monkeypatch.setattr(directory_module, "ROOM_SECONDS", PATIENCE)
    trimmed: list[int] = []
    trim = Janitor.trim
    monkeypatch.setattr(Janitor, "trim", lambda self, count, below: trimmed.append(below) or trim(self, count, below))
    tier = directory(16 * MIB)
    fill(tier, range(15), MIB)
    counting.clear()
    stores = []
    for number in range(20, 24):
        waited = tier._wanted.total()
        stores.append(beside(lambda number=number: fill(tier, range(number, number + 1), MIB)))
        eventually(lambda waited=waited: tier._wanted.total() > waited)
    counting.set()
    assert [store.result(PATIENCE) for store in stores] == [[OK]] * 4
    assert len(trimmed) == 1 and len(there(tier, range(15))) == 11


class Waits(threading.Condition):
    """Notes how long each of the waits may take that begin after one has ended in vain."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self.gave_up, self.later = False, list[float | None]()

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        if self.gave_up:
            self.later.append(timeout)
        found = super().wait_for(predicate, timeout)
        self.gave_up = self.gave_up or not found
        return found


def test_all_shards_of_a_store_wait_for_room_until_the_same_moment(
    directory: Callable[..., DirectoryTier], counting: threading.Event
) -> None:
    tier = directory(16 * MIB)
    fill(tier, range(15), MIB)
    tier._passed = waits = Waits(tier._lock)
    counting.clear()
    assert fill(tier, range(20, 44), MIB).count("full") >= 23
    assert waits.gave_up and set(waits.later) == {0.0}


def test_a_directory_opens_before_everything_is_counted(
    directory: Callable[..., DirectoryTier], counting: threading.Event, tmp_path: Path
) -> None:
    fill(directory(), range(3), MIB)
    other = DirectoryTier(tmp_path / "tier", 16 * MIB)
    (tmp_path / "tier/usage").unlink()
    counting.clear()
    assert soon(lambda: [other.open() or "open"]) == ["open"]  # type: ignore[func-returns-value]
    assert load_one(other, shard_key(1), MIB)[0] == OK
    assert fill(other, range(5, 6), MIB) == ["not ready"]
    counting.set()
    eventually(lambda: fill(other, range(5, 6), MIB) == [OK])
    assert other.usage().shards == 4
    other.close()


def test_a_look_at_everything_ends_when_the_tier_is_closed(
    directory: Callable[..., DirectoryTier], tmp_path: Path
) -> None:
    fill(directory(), range(5), 1000)
    stop = threading.Event()
    janitor = Janitor(Filesystem(), tmp_path / "tier", stop)
    assert janitor.count().shards == 5
    stop.set()
    for look in (janitor.count, janitor.clear):
        with pytest.raises(InterruptedError):
            look()


@pytest.mark.parametrize("folder", ["shards", "tmp"])
def test_a_clear_ends_in_the_middle_of_a_folder(tmp_path: Path, folder: str) -> None:
    place = tmp_path / (f"{0:032x}/00" if folder == "shards" else "tmp")
    place.mkdir(parents=True)
    for number in range(2000):
        (place / f"{number:032x}-0-1").touch()

    class Closing(Filesystem):
        """The tier is closed when the first file goes."""

        def unlink(self, path: Path) -> None:
            super().unlink(path)
            stop.set()

    stop = threading.Event()
    with pytest.raises(InterruptedError):
        Janitor(Closing(), tmp_path, stop).clear()
    assert len(list(place.iterdir())) == 1999
    Janitor(Filesystem(), tmp_path).clear()
    assert list(tmp_path.glob("**/*-0-1")) == []


def test_clear_leaves_what_is_not_the_caches(directory: Callable[..., DirectoryTier], tmp_path: Path) -> None:
    tier = directory()
    fill(tier, range(5), 3000)
    space = file_of(tier, 0).parents[1]
    strange = [tmp_path / "tier/notes.txt", space / "notes.txt", file_of(tier, 0).with_name("notes.txt")]
    for path in strange:
        path.write_text("mine")
    tier.clear()
    assert there(tier, range(5)) == [] and tier.usage().shards == 0
    assert all(path.read_text() == "mine" for path in strange)
    assert fill(tier, range(5), 3000) == [OK] * 5


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EIO, "io"), (errno.EROFS, "read-only"), (errno.EACCES, "denied")],
    ids=["EIO", "EROFS", "EACCES"],
)
@pytest.mark.parametrize("operation", ["pwritev", "close", "rename"])
def test_a_store_that_fails_is_said_and_leaves_nothing(
    directory: Callable[..., DirectoryTier], tmp_path: Path, operation: str, code: int, reason: str
) -> None:
    filesystem = FaultyFilesystem()
    tier = directory(filesystem=filesystem)
    fill(tier, range(3), 70_000)
    filesystem.fail = {operation: code}
    with pytest.raises(TierError) as caught:
        fill(tier, range(3, 6), 70_000)
    assert caught.value.reason == reason
    filesystem.fail.clear()
    assert there(tier, range(6)) == [0, 1, 2]
    assert list((tmp_path / "tier/tmp").iterdir()) == []
    assert fill(tier, range(3, 6), 70_000) == [OK] * 3


def test_a_full_file_system_is_an_outcome(directory: Callable[..., DirectoryTier], tmp_path: Path) -> None:
    filesystem = FaultyFilesystem()
    tier = directory(filesystem=filesystem)
    fill(tier, range(2), 5000)
    before = tier.usage()
    for code in (errno.ENOSPC, errno.EDQUOT):
        filesystem.fail = {"pwritev": code}
        assert fill(tier, range(2, 4), 5000) == ["full"] * 2
        filesystem.fail = {"close": code}
        assert fill(tier, range(2, 4), 5000) == ["full"] * 2
    filesystem.fail.clear()
    assert tier.usage() == before and list((tmp_path / "tier/tmp").iterdir()) == []
    assert fill(tier, range(2, 4), 5000) == [OK] * 2


def test_reads_that_fail(directory: Callable[..., DirectoryTier]) -> None:
    filesystem = FaultyFilesystem()
    tier = directory(filesystem=filesystem)
    fill(tier, range(3), 5000)
    filesystem.fail = {"preadv": errno.EIO}
    keys, buffers = [*map(shard_key, range(3))], [memoryview(bytearray(5000)) for _ in range(3)]
    with pytest.raises(TierError, match="look at the kernel's log"):
        tier.load(keys, buffers)
    filesystem.after = {"preadv": 1}
    assert sorted(tier.load(keys, buffers)) == [OK, UNREADABLE, UNREADABLE]
    filesystem.fail = {"preadv": errno.ESTALE}
    assert tier.load(keys, buffers) == [ABSENT] * 3
    filesystem.fail.clear()
    assert tier.load(keys, buffers) == [OK] * 3


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("dir://mnt/x", "three slashes"),
        ("dir:///x?connections=0", "whole number from 1"),
        ("dir:///x?io=direct", "unknown"),
    ],
)
def test_urls_that_cannot_be_used(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_tier(url)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = make_tier(f"dir://{tmp_path}/file/tier").tier
    with pytest.raises(TierError):
        tier.open()
