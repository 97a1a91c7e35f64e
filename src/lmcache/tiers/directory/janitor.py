"""The janitor of a directory that several machines share: the process that counts its shards and removes the least recently used.

Each process that uses the directory is a candidate. One at a time is elected: it holds the *janitor lease*, a file that names its
holder and expires if nobody touches it for a minute. (This is no lease of extents.)

    FOLDER/SPACE/XX/CHUNK-SHARD-SHARDS   the shards; XX are the first two digits of CHUNK
    FOLDER/tmp/                          files being written
    FOLDER/janitor                       the janitor lease
    FOLDER/wanted                        the bytes that a process which is not elected needs
    FOLDER/usage                         the janitor's last count: bytes, shards, whether it left in order, and a stamp

Times are those of the file system, so the machines' clocks may differ. If two processes take the lease in the same instant, both
remove shards; then more is removed than necessary, and nothing worse happens.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
import uuid
from array import array
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers.filesystem import Filesystem

log = init_logger(__name__)
LEASE_SECONDS = 60.0
LEFTOVER_SECONDS = 3600.0
"""A file in tmp/ that has not been written to for so long was left by a crashed writer."""
MAX_STUCK = 1000
"""A trim gives up once so many shards could not be removed: then the trouble is not with single files."""
_RENEW_SECONDS = 10.0
"""Interval at which the janitor touches its lease during a long count or removal."""
_SPACE, _FAN, _SHARD = (re.compile(one) for one in ("[0-9a-f]{32}", "[0-9a-f]{2}", "[0-9a-f]{32}-[0-9a-f]+-[0-9a-f]+"))
_BYTES, _PROCESS = re.compile(rb"[0-9]{1,18}"), re.compile("[0-9]{1,9}")
"""The form of numbers in files that other processes write. Their length is bounded, so that system calls accept them."""


class Count(NamedTuple):
    """stored_bytes: the blocks of all files and directories. shards: how many shards there are."""

    stored_bytes: int
    shards: int


class Published(NamedTuple):
    """A janitor's count. in_order: it was published when the janitor left, so it still holds. stamp: unique to this count."""

    counted: Count
    in_order: bool
    stamp: str


class Janitor:
    """One process as a candidate. Two threads must not call `elected`, `count`, `trim` or `clear` at the same time."""

    def __init__(
        self, filesystem: Filesystem, folder: Path, stop: threading.Event | None = None, runtime: Runtime = RUNTIME
    ) -> None:
        """stop: once it is set, `count`, `trim` and `clear` end with an InterruptedError."""
        self._stop, self._now = stop or runtime.event(), runtime.now
        self._filesystem, self._folder = filesystem, folder
        self._lease, self._usage, self._wanted = folder / "janitor", folder / "usage", folder / "wanted"
        self._name = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._renewed = 0.0
        self._told = False

    def elected(self) -> bool:
        """Renew the lease, or take it if it is free, expired, or held by a dead process of this host.

        Return whether this process holds the lease now. Raises OSError.
        """
        try:
            self._write(self._lease, self._name, os.O_EXCL)
            return True
        except FileExistsError:
            pass
        holder, touched = self._holder()
        if holder == self._name:
            self._filesystem.touch(self._lease)
            self._renewed = self._now()
            return True
        if self._file_system_time() - touched < LEASE_SECONDS and not _is_gone(holder):
            return False
        aside = self._folder / "tmp" / uuid.uuid4().hex
        try:
            self._filesystem.rename(self._lease, aside)  # only one of several processes succeeds
            self._filesystem.unlink(aside)
            self._write(self._lease, self._name, os.O_EXCL)
        except (FileNotFoundError, FileExistsError):
            return False
        return self.holds()

    def holds(self) -> bool:
        """Return whether this process holds the lease now. Raises OSError."""
        return self._holder()[0] == self._name

    def leave(self, count: Count) -> None:
        """Publish the count and release the lease, if this process holds it. Raises OSError."""
        if self.holds():
            self.publish(count, in_order=True)
            self._filesystem.unlink(self._lease)

    def publish(self, count: Count, in_order: bool = False) -> None:
        """Publish the count for the processes that are not elected and for the next janitor. Raises OSError."""
        stamp = uuid.uuid4().hex
        aside = self._folder / "tmp" / stamp
        self._write(aside, f"{count.stored_bytes} {count.shards} {int(in_order)} {stamp}", os.O_EXCL)
        self._filesystem.rename(aside, self._usage)

    def published(self) -> Published | None:
        """Return the count that was published last; None if there is none or it cannot be read."""
        try:
            stored, shards, in_order, stamp = self._usage.read_bytes().split()
        except (OSError, ValueError):
            return None
        if not (_BYTES.fullmatch(stored) and _BYTES.fullmatch(shards)):
            return None
        return Published(Count(int(stored), int(shards)), in_order == b"1", stamp.decode("utf-8", "replace"))

    def request_bytes(self, wanted_bytes: int) -> None:
        """Ask the elected process to make so many bytes free. A later request replaces an earlier one. Raises OSError."""
        self._write(self._wanted, str(wanted_bytes), os.O_TRUNC)

    def requested_bytes(self) -> int:
        """Return and delete the last request of another process: 0 if there is none, 1 if it is invalid. Raises OSError."""
        try:
            text = self._wanted.read_bytes()
        except FileNotFoundError:
            return 0
        self._filesystem.unlink(self._wanted)
        return int(text) if _BYTES.fullmatch(text) else 1

    def count(self) -> Count:
        """Count all files, and remove those that crashed writers have left. Any process may count. Raises OSError."""
        now = self._file_system_time()
        total = shards = 0
        for entry in self._steps(self._folder / "tmp"):
            status = _stat(entry)
            if status and (now - status.st_mtime <= LEFTOVER_SECONDS or self._cannot_remove(entry)):
                total += status.st_blocks * 512
        for _, status in self._shards():
            total += status.st_blocks * 512
            shards += 1
        for folder in (self._folder, self._folder / "tmp", *_folders(self._folder)):
            try:
                total += folder.stat().st_blocks * 512
            except FileNotFoundError:
                pass
        return Count(total, shards)

    def trim(self, count: Count, to_bytes: int) -> Count:
        """Remove the least recently used shards until `to_bytes` are left. Return the new count.

        count: the result of `count`. This method reads the directory twice, so that no list of all names is needed: first to
        find the time of last use up to which shards must go, then to remove them. It does so again without the shards that could
        not be removed, until enough others are.

        Raises:
            OSError: the directory cannot be read, or no shard or too many of them could not be removed.
        """
        stuck: dict[str, OSError] = {}
        known, left = -1, count
        while left.stored_bytes > to_bytes and known < len(stuck):
            known, newest = len(stuck), self._last_to_go(left.stored_bytes - to_bytes, stuck)
            for entry, status in self._shards():
                if status.st_mtime <= newest and left.stored_bytes > to_bytes and entry.path not in stuck:
                    error = self._cannot_remove(entry)
                    if error is None:
                        left = Count(left.stored_bytes - status.st_blocks * 512, left.shards - 1)
                        continue
                    stuck[entry.path] = error
                    if len(stuck) == MAX_STUCK:
                        raise error
        for path, error in stuck.items():
            if left == count:
                raise error
            if not self._told:
                log.warning("%s cannot be removed, and others are in its place: %s", path, error.strerror)
            self._told = True
        return left

    def _last_to_go(self, excess: int, stuck: Container[str]) -> float:
        """Return the time of last use up to which shards, without those that are `stuck`, have `excess` bytes."""
        times, sizes = array("d"), array("q")  # "q" could not hold times after the year 2262 in nanoseconds
        for entry, status in self._shards():
            if entry.path not in stuck:
                times.append(status.st_mtime)
                sizes.append(status.st_blocks * 512)
        if not times:
            return 0.0
        order = np.argsort(np.frombuffer(times, np.float64), kind="stable")
        freed = np.cumsum(np.frombuffer(sizes, np.int64)[order])
        last = int(np.searchsorted(freed, excess))
        return times[int(order[min(last, len(order) - 1)])]

    def _cannot_remove(self, entry: os.DirEntry[str]) -> OSError | None:
        """Remove a file, and return the error if that is impossible, as it is where another user owns the directory."""
        try:
            self._filesystem.unlink(Path(entry.path))
        except OSError as error:
            return error.with_traceback(None)
        return None

    def clear(self) -> None:
        """Remove all shards, all files being written, and the directories that are then empty. Raises OSError, after all that can
        be removed has been."""
        files = chain((entry for entry, _ in self._shards()), self._steps(self._folder / "tmp"))
        trouble = None
        for entry in files:
            trouble = self._cannot_remove(entry) or trouble
        for folder in sorted(_folders(self._folder), reverse=True):
            try:
                folder.rmdir()
            except OSError:
                pass  # another process is storing there, or the directory holds a file of another kind
        if trouble is not None:
            raise trouble

    def _shards(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        for folder in _folders(self._folder):
            if len(folder.name) == 2:
                for entry in self._steps(folder):
                    status = _stat(entry) if _SHARD.fullmatch(entry.name) else None
                    if status:
                        yield entry, status

    def _steps(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        """Yield the entries of a directory one by one, and renew the lease between them."""
        self._renew_when_due()
        for entry in _scan(folder):
            self._renew_when_due()
            yield entry

    def _renew_when_due(self) -> None:
        """Renew the lease if `_RENEW_SECONDS` have passed. Raises OSError, or InterruptedError once the tier is closed."""
        if self._stop.is_set():
            raise InterruptedError(errno.EINTR, "the tier is closed")
        if self._now() - self._renewed > _RENEW_SECONDS:
            self._renewed = self._now()
            if self.holds():
                self._filesystem.touch(self._lease)

    def _holder(self) -> tuple[str, float]:
        """Return the holder of the lease ("" if none) and the time of its last touch. Invalid text matches no process."""
        try:
            return self._lease.read_text("utf-8", "replace"), self._lease.stat().st_mtime
        except FileNotFoundError:
            return "", 0.0

    def _file_system_time(self) -> float:
        path = self._folder / "tmp" / uuid.uuid4().hex
        self._write(path, "", os.O_EXCL)
        try:
            return path.stat().st_mtime
        finally:
            self._filesystem.unlink(path)

    def _write(self, path: Path, text: str, flags: int) -> None:
        fd = self._filesystem.open(path, os.O_WRONLY | os.O_CREAT | flags)
        try:
            self._filesystem.write(fd, [text.encode()] if text else [], 0)
        finally:
            self._filesystem.close(fd)


def _is_gone(holder: str) -> bool:
    """Return whether the holder of a lease is a process of this host that has ended."""
    host, _, rest = holder.partition(" ")
    number = rest.partition(" ")[0]
    if host != socket.gethostname() or not _PROCESS.fullmatch(number):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process has this number
    return False


def _folders(root: Path) -> Iterator[Path]:
    """Yield the directories of spaces and their subdirectories."""
    for space in _scan(root):
        if _SPACE.fullmatch(space.name) and space.is_dir(follow_symlinks=False):
            yield Path(space.path)
            for fan in _scan(Path(space.path)):
                if _FAN.fullmatch(fan.name) and fan.is_dir(follow_symlinks=False):
                    yield Path(fan.path)


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries while the directory is read, which takes little memory. Removals meanwhile hide no other entry."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except FileNotFoundError:
        pass


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
