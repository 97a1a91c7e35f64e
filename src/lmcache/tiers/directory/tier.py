"""`dir:///mnt/shared?max_gb=200`: one file a shard in a directory that several machines may mount.

A shard is written under a temporary name and renamed, so it is visible complete or not at all. No index is kept, because other
machines would make it wrong: each call asks the file system. Each process adds what it writes to what the janitor counted last
(`janitor`) and stores nothing above the cap. So the total is bounded by the cap and what others wrote since that count.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lmcache.config.options import integer
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers import frame
from lmcache.tiers.directory.janitor import Count, Janitor
from lmcache.tiers.filesystem import BLOCK_BYTES, FULL, Filesystem, blocks, named_errors, tier_error
from lmcache.tiers.frame_io import UNREADABLE
from lmcache.tiers.threads import each_in_pool, started_pool
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

TOUCH_SECONDS = 60.0
"""A file's time of use is updated at most once in so many seconds."""
COUNT_SECONDS = 60.0
"""Interval at which the janitor counts, and the other processes read its count."""
ASK_SECONDS = 5.0
"""Interval at which the janitor checks whether another process needs space."""
_COUNTING_SHARE = 0.05
"""The most of the janitor's time that it spends on counting."""
ROOM_SECONDS = 5.0
"""How long a store waits for free space, and `open` for the first count. Both continue in the background after that."""
_PIECE_BYTES = 4 << 20
_TRIM_SHARE = 20
"""Trimming removes 1/20 of the cap more than needed, so that it does not run for every shard."""
_TRIES = 3
_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})
log = init_logger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class DirectoryTier(Tier):
    """Stores shards as files. Any number of processes and machines may use the directory at the same time."""

    scheme = "dir"
    concurrency = 8
    codecs = True

    def __init__(
        self,
        path: Path,
        max_bytes: int | None,
        secret: bytes = b"",
        threads: int = 8,
        filesystem: Filesystem | None = None,
        touch_seconds: float = TOUCH_SECONDS,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """max_bytes: the cap, None for no cap. threads: how many files are read or written at once."""
        self._path, self._max_bytes, self._secret, self._threads = path, max_bytes, secret, threads
        self._touch_seconds, self._runtime, self._now = touch_seconds, runtime, runtime.now
        self._where = f"dir://{path}"
        self._filesystem = filesystem or Filesystem()
        self._life = threading.Lock()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        """Protects the janitor."""
        self._counted = runtime.event()
        """Set once a process has counted the stored bytes. Until then a tier with a cap stores nothing."""
        self._wake = runtime.event()
        """Wakes the janitor's thread."""
        self._passed = runtime.condition(self._lock)
        """Notified when a pass of the janitor's thread has ended."""
        self._wanted: Counter[int] = Counter()
        """Bytes that stores wait for now, by the number of the pass that makes room for them."""
        self._begun = self._ended = 0
        """Numbers of passes of the janitor's thread: the last one that has read `_wanted`, and the last one that has ended."""
        self._trouble: OSError | None = None
        """The error of the last pass."""
        self._opened = False
        self._count = Count(0, 0)
        self._in_flight = 0
        """Bytes that are counted but may not be written yet."""
        self._stamp = ""
        """Stamp of the janitor's published count that this process adopted last."""
        self._since = 0
        """Bytes that this process has added since that count."""

    @classmethod
    def from_url(cls, url: TierURL) -> DirectoryTier:
        return cls(
            url.folder("/mnt/shared"),
            url.take_max_bytes(),
            url.take_frame_key(),
            url.take("connections", integer(1, 256), 8),
            runtime=url.runtime,
        )

    # ---- the protocol

    def open(self) -> None:
        with self._life:
            if self._opened:
                return
            with named_errors(self._where):
                _make_folders(self._path / "tmp")
                self._stop = self._runtime.event()
                self._janitor = Janitor(self._filesystem, self._path, self._stop, self._runtime)
                elected, published = self._janitor.elected(), self._janitor.published()
                self._counted.clear()
                if published and (published.in_order or not elected):
                    self._count, self._stamp = published.counted, published.stamp
                    self._counted.set()
                    if elected:
                        self._janitor.publish(self._count)
                self._since = 0
            self._pool = started_pool(self._runtime, self._threads, "lmcache-dir")
            self._opened = True
            self._watch = self._runtime.start(self._keep_counting, "lmcache-dir-janitor")
            self._counted.wait(ROOM_SECONDS)

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._check_open()
        return self._each(lambda key: os.path.exists(self._file(key)), keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        self._check_open()
        outcomes = self._each(self._load_one, list(zip(keys, into, strict=True)))
        failed = [one for one in outcomes if isinstance(one, OSError)]
        if failed and len(failed) == len(outcomes) - outcomes.count(ABSENT):
            raise tier_error(self._where, failed[0]) from failed[0]
        return [UNREADABLE if isinstance(one, OSError) else one for one in outcomes]

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._check_open()
        first: dict[ShardKey, Shard] = {}
        for shard in shards:
            first.setdefault(shard.key, shard)
        deadline = self._now() + ROOM_SECONDS
        said: dict[ShardKey, str] = {}
        for key, one in zip(
            first, self._each(lambda shard: self._store_one(shard, deadline), [*first.values()]), strict=True
        ):
            if isinstance(one, OSError):
                raise tier_error(self._where, one) from one
            said[key] = one
        return [said.pop(shard.key, KEPT) for shard in shards]

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._check_open()
        with named_errors(self._where):
            self._each(lambda key: self._unlink(self._file(key)), keys)

    def clear(self) -> None:
        self._check_open()
        with self._counting, named_errors(self._where):
            self._janitor.clear()
            count = self._janitor.count()
            with self._lock:
                self._count = count
            if self._janitor.elected():
                self._janitor.publish(count)

    def usage(self) -> Usage:
        """Return the janitor's last count plus what this process has added since."""
        return Usage(*self._count, self._max_bytes)

    def close(self) -> None:
        with self._life:
            if not self._opened:
                return
            self._opened = False
            self._stop.set()
            self._wake.set()
            self._watch.join()
            self._pool.shutdown()
            try:
                self._janitor.leave(self._count)
            except OSError as error:
                log.warning("%s: the janitor lease could not be released, and ends in a minute: %s", self._where, error)

    # ---- one shard

    def _file(self, key: ShardKey) -> Path:
        space, name = key.text.split("/")
        return self._path / space / name[:2] / name

    def _load_one(self, asked: tuple[ShardKey, memoryview]) -> str | OSError:
        key, into = asked
        path = self._file(key)
        try:
            fd = self._filesystem.open(path, os.O_RDONLY)
        except OSError as error:
            return ABSENT if error.errno in _GONE else error.with_traceback(None)
        try:
            status = os.fstat(fd)
            outcome = self._read(fd, status.st_size, key, into.cast("B"))
            if outcome != OK:
                with suppress(OSError):  # what is damaged is a miss, though this user may not be able to remove it
                    self._unlink(path, status.st_ino)
            elif self._runtime.wall() - status.st_mtime >= self._touch_seconds:
                self._touch(path)
            return outcome
        except OSError as error:
            return ABSENT if error.errno in _GONE else error.with_traceback(None)
        finally:
            os.close(fd)

    def _read(self, fd: int, size: int, key: ShardKey, into: memoryview) -> str:
        header = memoryview(bytearray(frame.HEADER_BYTES))
        checksum = frame.Checksum(self._secret)
        got = self._filesystem.read(fd, [header, into[:_PIECE_BYTES]], 0)
        wrong = frame.check_stored(header[:got], size, key, into.nbytes, self._secret)
        if wrong:
            return wrong
        payload = into[: frame.payload_bytes(header)]
        if got < frame.HEADER_BYTES + min(_PIECE_BYTES, payload.nbytes):
            return frame.TRUNCATED
        checksum.update(payload[:_PIECE_BYTES])
        for at in range(_PIECE_BYTES, payload.nbytes, _PIECE_BYTES):
            piece = payload[at : at + _PIECE_BYTES]
            if self._filesystem.read(fd, [piece], frame.HEADER_BYTES + at) < piece.nbytes:
                return frame.TRUNCATED
            checksum.update(piece)
        return checksum.check(header, key, into.nbytes) or frame.unfold(header, into, self.decoded)

    def _store_one(self, shard: Shard, deadline: float) -> str | OSError:
        path, payload = self._file(shard.key), shard.payload.cast("B")
        size = frame.HEADER_BYTES + payload.nbytes
        try:
            before = _stat(path)
            if before and shard.is_kept(before.st_size - frame.HEADER_BYTES):
                self._touch(path)
                return KEPT
            cost = blocks(size) + (0 if path.parent.exists() else 2 * BLOCK_BYTES)
            refused = self._make_room(cost, deadline)
            if refused:
                return refused
            try:
                self._write(path, shard, payload)
            except OSError as error:
                self._add(-cost, 0)
                if error.errno not in FULL:
                    raise
                return "full"
            finally:
                with self._lock:
                    self._in_flight -= cost
            self._add(-blocks(before.st_size) if before else 0, 0 if before else 1)
            return OK
        except OSError as error:
            return error.with_traceback(None)

    def _write(self, path: Path, shard: Shard, payload: memoryview) -> None:
        aside = self._path / "tmp" / uuid.uuid4().hex
        header = frame.make_header(shard.key, shard.parent, payload, self._secret, shard.coding)
        fd = self._filesystem.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                self._filesystem.write(fd, [header, payload], 0)
            finally:
                self._filesystem.close(fd)  # NFS reports failed writes here
            for attempt in (1, 2):
                _make_folders(path.parent)
                try:
                    self._filesystem.rename(aside, path)
                    break
                except FileNotFoundError:  # a clear removed the directory meanwhile
                    if attempt == 2:
                        raise
        except OSError:
            try:
                self._filesystem.unlink(aside)
            except OSError:
                pass  # the janitor removes the file later
            raise

    def _unlink(self, path: Path, inode: int | None = None) -> None:
        """Remove a file. `inode`: only if the file still has it, and another machine has not replaced it meanwhile."""
        status = _stat(path)
        if status and inode in (None, status.st_ino):
            self._filesystem.unlink(path)
            self._add(-status.st_blocks * 512, -1)

    def _touch(self, path: Path) -> None:
        try:
            self._filesystem.touch(path)
        except OSError as error:
            log.debug("%s: could not update a file's time of use: %s", self._where, error.strerror)

    # ---- space

    def _add(self, stored_bytes: int, shards: int) -> None:
        with self._lock:
            self._count = Count(max(0, self._count.stored_bytes + stored_bytes), max(0, self._count.shards + shards))
            self._since += stored_bytes

    def _make_room(self, cost: int, deadline: float) -> str:
        """Reserve `cost` bytes and return OK, or return the reason of a refusal at the deadline at the latest. Raises OSError."""
        if self._max_bytes is not None and cost > self._max_bytes:
            return "too large"
        if self._max_bytes is not None and not self._counted.is_set():
            return "not ready"
        with self._passed:
            if self._taken(cost):
                return OK
            for _ in range(_TRIES):
                self._wait_for_room(cost, deadline)
                if self._taken(cost):
                    return OK
        return "full"

    def _wait_for_room(self, cost: int, deadline: float) -> None:
        """Wait until a pass of the janitor's thread has made room for `cost` bytes, or until the deadline. `_passed` is held.

        Raises:
            OSError: the pass failed.
        """
        awaited = self._begun + 1
        self._wanted[awaited] += cost
        self._wake.set()
        if not self._passed.wait_for(lambda: self._ended >= awaited, max(0.0, deadline - self._now())):
            self._wanted[awaited] -= cost
        if self._ended >= awaited and self._trouble:
            raise self._trouble.with_traceback(None)

    def _taken(self, cost: int) -> bool:
        """Reserve `cost` bytes if they are free, and return whether they are. Call with `_passed` held."""
        if self._max_bytes is not None and self._count.stored_bytes + cost > self._max_bytes:
            return False
        self._count = self._count._replace(stored_bytes=self._count.stored_bytes + cost)
        self._in_flight += cost
        self._since += cost
        return True

    def _tidy(self, asked: int) -> None:
        """If this process is elected, count and trim; otherwise read the janitor's count. Raises OSError.

        Call with `_counting` held. asked: bytes that another process has requested.
        """
        with self._lock:
            before, flying = self._count, self._in_flight  # bytes in flight may or may not be in the count below
        if self._janitor.elected():
            count = self._janitor.count()
            room = self._room_to_make(asked)
            if self._max_bytes is not None and count.stored_bytes + flying + room > self._max_bytes:
                below = self._max_bytes - flying - room - self._max_bytes // _TRIM_SHARE
                count = self._janitor.trim(count, max(0, below))
            self._janitor.publish(count)
            with self._lock:
                meanwhile = max(0, self._count.stored_bytes - before.stored_bytes)
                self._count = Count(count.stored_bytes + flying + meanwhile, count.shards)
                self._since = meanwhile
        else:
            room = self._room_to_make(asked)
            if self._max_bytes is not None and before.stored_bytes + room > self._max_bytes:
                self._janitor.request_bytes(room)
            published = self._janitor.published()
            if published is not None and published.stamp != self._stamp:
                with self._lock:  # the count includes some of `_since`, so the sum is too high until the next count
                    self._count = published.counted._replace(
                        stored_bytes=published.counted.stored_bytes + max(0, self._since)
                    )
                    self._since, self._stamp = 0, published.stamp

    def _room_to_make(self, asked: int) -> int:
        """Return the bytes to free for all stores that wait now and for other processes. Later stores wait for the next pass."""
        spare = (self._max_bytes or 0) // _TRIM_SHARE
        with self._lock:
            self._begun = self._ended + 1
            wanted = self._wanted.total()
            return wanted + (asked + spare if asked or not wanted else 0)

    def _keep_counting(self) -> None:
        """Run the janitor's thread. It keeps some space free, because processes that are not elected cannot free any."""
        due, told = self._now() + COUNT_SECONDS, ""
        while not self._stop.is_set():
            trouble: OSError | None = None
            planned = due
            try:
                due = self._look(due)
            except OSError as error:
                trouble = error
            except Exception as error:  # the thread must go on: without it nobody would free space
                trouble = OSError(f"the janitor failed: {error!r}")
                trouble.__cause__ = error
            if trouble:
                due = self._now() + COUNT_SECONDS
            if trouble or due != planned:  # a pass that had nothing to do does not show that an earlier trouble is over
                told = self._log(trouble, told)
            with self._passed:
                self._begun = self._ended = self._ended + 1
                self._trouble = trouble
                self._wanted.pop(
                    self._ended, None
                )  # those stores have their room, though their threads may not run yet
                self._passed.notify_all()
            if not self._stop.is_set():
                self._wake.wait(ASK_SECONDS)
                self._wake.clear()

    def _log(self, trouble: OSError | None, told: str) -> str:
        """Log the trouble unless `told` is the same, and return the text for the next call."""
        said = "" if trouble is None else trouble.strerror or str(trouble)
        if trouble and said != told and not self._stop.is_set():
            log.warning(
                "%s: could not count or trim, will try again: %s", self._where, said, exc_info=trouble.__cause__
            )
        return said

    def _look(self, due: float) -> float:
        """Count and free space if that is due or a store waits for space. Return when it is due again. Raises OSError."""
        began = self._now()
        if not self._counted.is_set():
            with self._counting:
                count = self._janitor.count()
                if self._janitor.holds():
                    self._janitor.publish(count)
            with self._lock:
                self._count = count
            self._counted.set()
        asked = self._janitor.requested_bytes() if self._janitor.holds() else 0
        with self._lock:
            if not (self._wanted.total() or asked or began >= due):
                self._begun += 1
                return due
        with self._counting:
            self._tidy(asked)
        return self._now() + max(COUNT_SECONDS, (self._now() - began) / _COUNTING_SHARE)

    # ---- calls

    def _each(self, call: Callable[[T], R], of: Sequence[T]) -> list[R]:
        """Make the calls in parallel and return their results in order."""
        if len(of) <= 1:
            return [call(one) for one in of]
        try:
            return each_in_pool(self._pool, call, of)
        except RuntimeError:  # the pool has been shut down
            raise TierError("closed", f"{self._where}: it was closed during the call") from None

    def _check_open(self) -> None:
        if not self._opened:
            raise TierError("closed", f"{self._where}: it is not open")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _make_folders(path: Path) -> None:
    """Create a directory and its parents, each accessible to this user only."""
    if not path.is_dir():
        _make_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
