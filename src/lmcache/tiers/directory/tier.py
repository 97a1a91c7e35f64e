"""`dir:///mnt/shared?max_gb=200`: one file a shard in a directory that several machines may mount.

A shard is written under a temporary name and renamed, so it is there whole or not at all. No index is kept, since another
machine would make it wrong: the file system is asked. Each process counts what it writes on top of what the janitor counted
(`janitor`) and stores nothing above the cap, so the whole is bounded by the cap and what others wrote since that count.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lmcache.config.options import integer
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.tiers import frame
from lmcache.tiers.directory.janitor import Count, Janitor
from lmcache.tiers.filesystem import BLOCK_BYTES, FULL, Filesystem, blocks, tier_error
from lmcache.tiers.frame_io import UNREADABLE
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

TOUCH_SECONDS = 60.0
"""A file's time of use is brought up to date at most so often."""
COUNT_SECONDS = 60.0
"""How often the janitor counts, and the others read what it counted."""
ASK_SECONDS = 5.0
"""How often the janitor looks whether somebody wants room."""
_COUNTING_SHARE = 0.05
"""At most this part of the janitor's time goes into counting."""
ROOM_SECONDS = 5.0
"""A call to store waits so long for room, and an opening for the first count; both go on in the background after that."""
_PIECE_BYTES = 4 << 20
_TRIM_SHARE = 20
"""Trimming goes 1/20 of the cap below it, so that it is not done for every shard."""
_TRIES = 3
_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})
log = init_logger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class DirectoryTier(Tier):
    """Shards as files. Any number of processes and machines at a time."""

    scheme = "dir"
    concurrency = 8

    def __init__(
        self,
        path: Path,
        max_bytes: int | None,
        secret: bytes = b"",
        threads: int = 8,
        filesystem: Filesystem | None = None,
        touch_seconds: float = TOUCH_SECONDS,
    ) -> None:
        """max_bytes: None for no cap. threads: files that are read or written at once."""
        self._path, self._max_bytes, self._secret, self._threads = path, max_bytes, secret, threads
        self._touch_seconds = touch_seconds
        self._where = f"dir://{path}"
        self._filesystem = filesystem or Filesystem()
        self._life = threading.Lock()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        """Over the janitor."""
        self._counted = threading.Event()
        """Somebody has counted what is there; until then nothing is stored under a cap."""
        self._wake = threading.Event()
        """The janitor's thread has something to do."""
        self._passed = threading.Condition(self._lock)
        """The janitor's thread has looked after what was wanted when it began."""
        self._wanted_bytes = 0
        """What stores wait for at this moment."""
        self._begun = self._ended = 0
        """Looks of the janitor's thread: the last that has read `_wanted_bytes` to make room for, and the last that has ended."""
        self._trouble: OSError | None = None
        """What the last of its looks came to."""
        self._opened = False
        self._count = Count(0, 0)
        self._in_flight = 0
        """Bytes that are counted and may not be there yet."""
        self._stamp = ""
        """Of what the janitor published, when this process last took it over."""
        self._since = 0
        """Bytes that this process has added since."""

    @classmethod
    def from_url(cls, url: TierURL) -> DirectoryTier:
        if url.host or not url.path.strip("/"):
            raise ConfigError(f"{url.redacted}: write an absolute path behind three slashes: dir:///mnt/shared")
        return cls(
            Path(os.path.normpath(url.path)),
            url.take_max_bytes(),
            url.take_frame_key(),
            url.take("connections", integer(1, 256), 8),
        )

    # ---- the protocol

    def open(self) -> None:
        with self._life:
            if self._opened:
                return
            with self._named_errors():
                _make_folders(self._path / "tmp")
                self._stop = threading.Event()
                self._janitor = Janitor(self._filesystem, self._path, self._stop)
                elected, published = self._janitor.elected(), self._janitor.published()
                self._counted.clear()
                if published and (published.in_order or not elected):
                    self._count, self._stamp = published.counted, published.stamp
                    self._counted.set()
                    if elected:
                        self._janitor.publish(self._count)
                self._since = 0
            self._pool = ThreadPoolExecutor(self._threads, "lmcache-dir")
            self._watch = threading.Thread(target=self._keep_counting, name="lmcache-dir-janitor", daemon=True)
            self._opened = True
            self._watch.start()
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
        seen: set[ShardKey] = set()
        later = [shard.key in seen or bool(seen.add(shard.key)) for shard in shards]  # type: ignore[func-returns-value]
        deadline = time.monotonic() + ROOM_SECONDS
        outcomes = self._each(
            lambda shard: self._store_one(shard, deadline),
            [one for one, again in zip(shards, later, strict=True) if not again],
        )
        said = iter(outcomes)
        outcomes = [KEPT if again else next(said) for again in later]
        for one in outcomes:
            if isinstance(one, OSError):
                raise tier_error(self._where, one) from one
        return [one for one in outcomes if isinstance(one, str)]

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._check_open()
        with self._named_errors():
            self._each(lambda key: self._unlink(self._file(key)), keys)

    def clear(self) -> None:
        self._check_open()
        with self._counting, self._named_errors():
            self._janitor.clear()
            count = self._janitor.count()
            with self._lock:
                self._count = count
            if self._janitor.elected():
                self._janitor.publish(count)

    def usage(self) -> Usage:
        """As counted last by the janitor, and by this process since."""
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
                log.warning("%s: the janitor's lease was not given back: %s", self._where, error.strerror)

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
                self._unlink(path, status.st_ino)
            elif time.time() - status.st_mtime >= self._touch_seconds:
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
        checksum.update(into[:_PIECE_BYTES])
        for at in range(_PIECE_BYTES, into.nbytes, _PIECE_BYTES):
            piece = into[at : at + _PIECE_BYTES]
            if self._filesystem.read(fd, [piece], frame.HEADER_BYTES + at) < piece.nbytes:
                return frame.TRUNCATED
            checksum.update(piece)
        return checksum.check(header, key)

    def _store_one(self, shard: Shard, deadline: float) -> str | OSError:
        path, payload = self._file(shard.key), shard.payload.cast("B")
        size = frame.HEADER_BYTES + payload.nbytes
        try:
            before = _stat(path)
            if before and before.st_size == size:
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
        header = frame.make_header(shard.key, shard.parent, payload, self._secret)
        fd = self._filesystem.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                self._filesystem.write(fd, [header, payload], 0)
            finally:
                self._filesystem.close(fd)  # where NFS says that it could not
            for attempt in (1, 2):
                _make_folders(path.parent)
                try:
                    self._filesystem.rename(aside, path)
                    break
                except FileNotFoundError:  # a clear took the folder away
                    if attempt == 2:
                        raise
        except OSError:
            try:
                self._filesystem.unlink(aside)
            except OSError:
                pass  # the janitor sweeps it
            raise

    def _unlink(self, path: Path, inode: int | None = None) -> None:
        """`inode`: only while it is that file, and not one that another machine stored meanwhile."""
        status = _stat(path)
        if status and inode in (None, status.st_ino):
            self._filesystem.unlink(path)
            self._add(-status.st_blocks * 512, -1)

    def _touch(self, path: Path) -> None:
        try:
            self._filesystem.touch(path)
        except OSError as error:
            log.debug("%s: the time of use was not written down: %s", self._where, error.strerror)

    # ---- room

    def _add(self, stored_bytes: int, shards: int) -> None:
        with self._lock:
            self._count = Count(max(0, self._count.stored_bytes + stored_bytes), max(0, self._count.shards + shards))
            self._since += stored_bytes

    def _make_room(self, cost: int, deadline: float) -> str:
        """OK, and the bytes are counted as taken; or why not. `deadline`: after it nobody waits for room. Raises OSError."""
        if self._max_bytes is not None and cost > self._max_bytes:
            return "too large"
        if self._max_bytes is not None and not self._counted.is_set():
            return "not ready"
        with self._passed:
            if self._taken(cost):
                return OK
            self._wanted_bytes += cost  # once, however often it tries, and only for as long as it waits
            try:
                for _ in range(_TRIES):
                    self._wait_for_room(deadline)
                    if self._taken(cost):
                        return OK
            finally:
                self._wanted_bytes -= cost
        return "full"

    def _wait_for_room(self, deadline: float) -> None:
        """Wait until the janitor's thread has looked after what is wanted, or until the deadline. Call with `_passed` held.

        Raises:
            OSError: what its look came to.
        """
        awaited = self._begun + 1
        self._wake.set()
        self._passed.wait_for(lambda: self._ended >= awaited, max(0.0, deadline - time.monotonic()))
        if self._ended >= awaited and self._trouble:
            raise self._trouble.with_traceback(None)

    def _taken(self, cost: int) -> bool:
        """Whether so much is free; it is counted then. Call with `_passed` held."""
        if self._max_bytes is not None and self._count.stored_bytes + cost > self._max_bytes:
            return False
        self._count = self._count._replace(stored_bytes=self._count.stored_bytes + cost)
        self._in_flight += cost
        self._since += cost
        return True

    def _tidy(self, asked: int) -> None:
        """As janitor count and trim, else read what the janitor counted. Under `_counting`. Raises OSError.

        asked: bytes that other processes want room for.
        """
        with self._lock:
            before, flying = self._count, self._in_flight  # what flies is seen by the look that follows, or not
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
                self._janitor.ask_for_room(room)
            published = self._janitor.published()
            if published is not None and published.stamp != self._stamp:
                with self._lock:  # some of what was added since is in that count already: too much, until the next one
                    self._count = published.counted._replace(
                        stored_bytes=published.counted.stored_bytes + max(0, self._since)
                    )
                    self._since, self._stamp = 0, published.stamp

    def _room_to_make(self, asked: int) -> int:
        """For all stores that wait at this moment, and for other processes; in bytes. Who waits later waits for the next look."""
        spare = (self._max_bytes or 0) // _TRIM_SHARE
        with self._lock:
            self._begun = self._ended + 1
            return self._wanted_bytes + (asked + spare if asked or not self._wanted_bytes else 0)

    def _keep_counting(self) -> None:
        """The janitor's thread. It leaves some room, since others who are not elected can make none."""
        due, told = time.monotonic() + COUNT_SECONDS, ""
        while not self._stop.is_set():
            trouble: OSError | None = None
            try:
                due = self._look(due)
            except OSError as error:
                trouble = error
            except Exception as error:  # the edge of the thread: without it nobody would make room any more
                trouble = OSError(f"the janitor failed: {error!r}")
                trouble.__cause__ = error
            if trouble:
                due = time.monotonic() + COUNT_SECONDS
            told = self._log(trouble, told)
            with self._passed:
                self._begun = self._ended = self._ended + 1
                self._trouble = trouble
                self._passed.notify_all()
            self._wake.wait(ASK_SECONDS)
            self._wake.clear()

    def _log(self, trouble: OSError | None, told: str) -> str:
        """Log it, unless that was told the last time; what is told now."""
        said = "" if trouble is None else trouble.strerror or str(trouble)
        if trouble and said != told and not self._stop.is_set():
            log.warning(
                "%s: could not count what is there, later again: %s", self._where, said, exc_info=trouble.__cause__
            )
        return said

    def _look(self, due: float) -> float:
        """Count and make room where that is due or wanted, here or elsewhere; when it is due again. Raises OSError."""
        began = time.monotonic()
        if not self._counted.is_set():
            with self._counting:
                count = self._janitor.count()
                if self._janitor.holds():
                    self._janitor.publish(count)
            with self._lock:
                self._count = count
            self._counted.set()
        asked = self._janitor.asked_for_room() if self._janitor.holds() else 0
        with self._lock:
            if not (self._wanted_bytes or asked or began >= due):
                self._begun += 1
                return due
        with self._counting:
            self._tidy(asked)
        return time.monotonic() + max(COUNT_SECONDS, (time.monotonic() - began) / _COUNTING_SHARE)

    # ---- calls

    def _each(self, call: Callable[[T], R], of: Sequence[T]) -> list[R]:
        """Side by side, in order."""
        if len(of) <= 1:
            return [call(one) for one in of]
        try:
            results = self._pool.map(call, of)
        except RuntimeError:  # the pool takes nothing more
            raise TierError("closed", f"{self._where}: it was closed meanwhile") from None
        return list(results)

    def _check_open(self) -> None:
        if not self._opened:
            raise TierError("closed", f"{self._where}: it is not open")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise tier_error(self._where, error) from error


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _make_folders(path: Path) -> None:
    """With their parents, each for this user only."""
    if not path.is_dir():
        _make_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
