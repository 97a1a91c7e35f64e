"""The arena: one file in a memory file system, owned by the server, mapped by engines that got its descriptor.

Pages are reserved (`posix_fallocate`) before an extent in them is handed out, so a full tmpfs gives an error and never SIGBUS;
a background thread then touches them, since the first touch of a shared page costs more than ten copies into it.
Nothing that decides is kept in the arena: an engine may overwrite any byte of it, and only KV would be wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from lmcache.errors import ConfigError, LMCacheError
from lmcache.memory import headers
from lmcache.memory.numa import place
from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

ARENA_ID_BYTES = 16
_PREFIX, _SUFFIX = "lmcache-", ".arena"
_STEP_BYTES = 2 << 20
"""Pages are reserved and touched in steps of this size. Touching holds the process's memory map: steps of 64 MiB were seen to
stall its other threads for tens of milliseconds, these for one."""
_HELD_UP_SECONDS, _PAUSE, _LONGEST_PAUSE_SECONDS = 0.0005, 20.0, 0.25
"""A step that waited for so long, for a core or a lock, is followed by a pause of so many times that, up to the last one.
Beside as many busy threads as there are cores it takes some 5 % of one core then."""
_STARTING_SECONDS = 10.0
"""An empty file younger than this belongs to a server that is about to lock it."""
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # uapi/asm-generic/mman-common.h; POPULATE needs Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class ArenaFull(LMCacheError):
    """The memory file system has no page left, whatever `--l1-size-gb` says."""


class Mapping:
    """The arena mapped into this process. `address` is where byte 0 of it lies here.

    Raises:
        OSError: the kernel refuses. ValueError: the file is shorter than `size_bytes`, so that touching its end would kill.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        if not 0 < size_bytes <= os.fstat(descriptor).st_size:
            raise ValueError(
                f"an arena of {size_bytes} bytes is announced, its file has {os.fstat(descriptor).st_size}"
            )
        self._map = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        # Huge pages are a wish: the kernel may refuse.
        _libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(size_bytes), _MADV_HUGEPAGE)

    def populate(self, offset: int, length: int) -> None:
        """Touch pages ahead of use, so that copies into them do not fault. A kernel without it faults later, no more."""
        _libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for payload frames."""
        return memoryview(self._map)[offset : offset + length]

    def close(self) -> None:
        """Unmap. Nobody may use `address` afterwards. What somebody still has a view of stays mapped until the process ends."""
        del self._anchor
        try:
            self._map.close()
        except BufferError:
            gc.collect()  # an exception that was caught may have kept its frames, and they their views
            with suppress(BufferError):
                self._map.close()


def populate_all(mapping: Mapping, stop: threading.Event) -> None:
    """Touch the whole mapping, step by step; for a thread of its own."""
    for offset, length in _patient_steps(mapping.size_bytes, stop):
        mapping.populate(offset, length)


def _patient_steps(size_bytes: int, stop: threading.Event) -> Iterator[tuple[int, int]]:
    """(offset, length) of each step. A step that others held up is followed by a pause, so that a busy machine keeps its cores.

    Less priority would not do: a thread that hardly ever runs may be preempted while it holds the interpreter or the process's
    memory map, and the whole process then waits for it; 0.9 s were seen on two busy cores, 0.03 s in this way.
    """
    for offset in range(0, size_bytes, _STEP_BYTES):
        if stop.is_set():
            return
        began, worked = time.perf_counter(), time.thread_time()
        yield offset, min(_STEP_BYTES, size_bytes - offset)
        held_up = (time.perf_counter() - began) - (time.thread_time() - worked)
        if held_up > _HELD_UP_SECONDS:
            stop.wait(min(_PAUSE * held_up, _LONGEST_PAUSE_SECONDS))


class Arena:
    """The server's side: creates, reserves, touches and at last removes the file, of `size_bytes` less what is not a full page.
    `numa` is a policy of `memory.numa`.

    Raises:
        ConfigError: the file cannot be created there, or the pages cannot be placed so.
    """

    def __init__(self, directory: Path, size_bytes: int, numa: str = "auto") -> None:
        size_bytes -= size_bytes % SECTOR_BYTES
        self.id = secrets.token_bytes(ARENA_ID_BYTES)
        self.path = directory / f"{_PREFIX}{os.getuid()}-{self.id.hex()}{_SUFFIX}"
        self.size_bytes = size_bytes
        self.backed_bytes = 0
        """Bytes that have pages: only extents in these may be handed out."""
        self.named = True
        """Whether the file is to be found at `path`."""
        self._backed = bytearray(-(-size_bytes // _STEP_BYTES))  # one byte a step
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prefault, name="lmcache-prefault", daemon=True)
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--arena-dir {directory}: cannot create the arena there: {error.strerror}") from error
        try:
            self._claim = _claim(self.path, self.descriptor)
            os.ftruncate(self.descriptor, size_bytes)
            self.mapping = Mapping(self.descriptor, size_bytes)
        except (OSError, ValueError) as error:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            raise ConfigError(f"--l1-size-gb: cannot map {size_bytes} bytes in {directory}: {error}") from error
        try:
            self.nodes = place(self.mapping.address, size_bytes, numa)
            """Memory nodes that the pages were told to lie on; empty where the kernel decides."""
            self.headers = headers.Headers(headers.beside(self.path), self.id, size_bytes)
        except ConfigError:
            self._remove()
            raise

    def unlink(self) -> None:
        """Take the names of both files away: they are reached by descriptor only, and go with the last process that has one.

        For an arena that no later server is to adopt."""
        self.named = False
        self.path.unlink(missing_ok=True)
        self.headers.path.unlink(missing_ok=True)

    def start_prefault(self) -> None:
        """Reserve and touch everything in the background, lowest addresses first."""
        self._thread.start()

    def back(self, offsets: Iterable[int], length: int) -> None:
        """Make sure that the `length` bytes at each of these offsets have pages.

        Raises:
            ArenaFull: the file system is full; what was reserved before stays.
        """
        if self.backed_bytes == self.size_bytes:
            return
        wanted = {step for at in offsets for step in range(at // _STEP_BYTES, (at + length - 1) // _STEP_BYTES + 1)}
        for step in sorted(wanted):
            if not self._backed[step]:
                self._back_step(step)

    def has_sectors(self, offset: int, length: int) -> bool:
        """Whether `back` has succeeded for these bytes."""
        return all(self._backed[offset // _STEP_BYTES : (offset + length - 1) // _STEP_BYTES + 1])

    def close(self) -> None:
        """Remove the file; its pages are freed once the last engine has unmapped it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.headers.close()
        self._remove()

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.mapping.close()
        os.close(self.descriptor)
        os.close(self._claim)

    def _back_step(self, step: int) -> None:
        first = step * _STEP_BYTES
        length = min(_STEP_BYTES, self.size_bytes - first)
        with self._lock:
            if self._backed[step]:
                return
            try:
                os.posix_fallocate(self.descriptor, first, length)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                    raise
                room = f"{self.path.parent} has no room beyond {self.backed_bytes >> 20} MiB of the arena"
                raise ArenaFull(f"{room}: free some, or start with a smaller --l1-size-gb") from error
            self._backed[step] = 1
            self.backed_bytes += length

    def _prefault(self) -> None:
        for first, length in _patient_steps(self.size_bytes, self._stop):
            # Touched first and reserved then: reserving pages that are there is quick, and so the main thread hardly ever
            # waits for the lock.
            self.mapping.populate(first, length)
            try:
                self._back_step(first // _STEP_BYTES)
            except ArenaFull as error:
                logger.warning("L1 stops growing: %s", error)
                return


def _claim(path: Path, descriptor: int) -> int:
    """Lock the file, which tells the next server that this one is alive; the lock lives and dies with what is returned.

    Not through the arena's own descriptor: engines get that one, and what they map keeps it, and its locks, alive.

    Raises:
        OSError: a server that starts at the same moment took the file for a dead one's.
    """
    claim = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "replaced while it was made; try again", str(path))
    except OSError:
        os.close(claim)
        raise
    return claim


def reclaim_stale(directory: Path) -> int:
    """Remove the arenas of this user's dead servers, and their extent headers; return the arenas' bytes.

    A live server holds a lock on its arena, which is made before its headers and removed after them.

    Engines that still map one keep its pages until they let go; unlinking never takes memory from under them.
    """
    freed = 0
    for path in directory.glob(f"{_PREFIX}{os.getuid()}-*{_SUFFIX}"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            just_made = not status.st_size and time.time() - status.st_mtime < _STARTING_SECONDS
            if status.st_uid == os.getuid() and not just_made:
                headers.beside(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                freed += status.st_blocks * 512
                logger.info("Reclaimed the arena of a dead server: %s (%d MiB)", path, status.st_blocks >> 11)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    for path in directory.glob(f"{_PREFIX}{os.getuid()}-*{_SUFFIX}{headers.SUFFIX}"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)
    return freed
