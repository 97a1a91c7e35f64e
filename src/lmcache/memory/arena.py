"""The arena: one file in a memory file system. The server owns it; engines that got its descriptor map it.

The server touches and allocates memory pages (`posix_fallocate`) before it hands out an extent in them, so a full tmpfs raises an
error and never SIGBUS. They are touched first, because tmpfs gives huge pages to mappings that ask for them, but not to an
allocation. A background thread does this for the complete arena, because the first touch of a shared page costs more than ten
copies into it. The arena holds only KV and no state that the server decides by: an engine that overwrites any byte of it damages
only KV.
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

from lmcache.errors import ConfigError, LMCacheError, plainly
from lmcache.memory import headers, huge_pages
from lmcache.memory.numa import place
from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)

ARENA_ID_BYTES = 16
_PREFIX, _SUFFIX = "lmcache-", ".arena"
_STEP_BYTES = huge_pages.HUGE_BYTES
"""Pages are allocated and touched in steps of this size. Touching holds the process's memory map lock: steps of 64 MiB stalled
the process's other threads for tens of milliseconds, steps of this size stall them for one."""
_HELD_UP_SECONDS, _PAUSE, _LONGEST_PAUSE_SECONDS = 0.0005, 20.0, 0.25
"""A step that waited longer than the first value for a core or a lock is followed by a pause of `_PAUSE` times its wait, at most
the last value. Beside as many busy threads as there are cores, the thread then takes some 5 % of one core."""
_STARTING_SECONDS = 10.0
"""An empty arena file younger than this belongs to a server that is starting and has not locked it yet."""
_MADV_REMOVE, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = 9, 14, 15, 23
"""From uapi/asm-generic/mman-common.h. POPULATE needs Linux 5.14."""
_libc = ctypes.CDLL(None, use_errno=True)


class ArenaFull(LMCacheError):
    """The file system gives no more memory, although the arena has not reached `--l1-size-gb`."""


class Mapping:
    """The arena mapped into this process. `address` is the address of its byte 0 in this process. `huge`: whether to ask for huge
    pages. Where the file system gives them, the kernel puts byte 0 at a multiple of their size.

    Raises:
        OSError: the kernel refuses. ValueError: the file is shorter than `size_bytes`; access beyond its end would kill.
    """

    def __init__(self, descriptor: int, size_bytes: int, huge: bool = True) -> None:
        self.size_bytes = size_bytes
        if not 0 < size_bytes <= os.fstat(descriptor).st_size:
            raise ValueError(
                f"the server announced an arena of {size_bytes} bytes, but its file has {os.fstat(descriptor).st_size}"
            )
        self._map = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        # Huge pages are optional: the kernel may refuse them.
        self._advise(0, size_bytes, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)

    def populate(self, offset: int, length: int) -> None:
        """Touch pages ahead of use, so that copies into them do not fault. A kernel without the call lets them fault later."""
        self._advise(offset, length, _MADV_POPULATE_WRITE)

    def discard(self, offset: int, length: int) -> None:
        """Give the memory of these bytes back to the file system; they read as zeros afterwards."""
        self._advise(offset, length, _MADV_REMOVE)

    def view(self, offset: int, length: int) -> memoryview:
        """Return the bytes [offset, offset + length) without a copy, for payload frames."""
        return memoryview(self._map)[offset : offset + length]

    def close(self) -> None:
        """Unmap the arena; nobody may use `address` afterwards. Parts with open views stay mapped until the process ends."""
        del self._anchor
        try:
            self._map.close()
        except BufferError:
            gc.collect()  # a caught exception may have kept its frames, and these their views
            with suppress(BufferError):
                self._map.close()

    def _advise(self, offset: int, length: int, advice: int) -> None:
        _libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length), advice)


def populate_all(mapping: Mapping, stop: threading.Event) -> None:
    """Touch the complete mapping, step by step. The caller runs this in a thread of its own."""
    for offset, length in _patient_steps(mapping.size_bytes, stop):
        mapping.populate(offset, length)


def _patient_steps(size_bytes: int, stop: threading.Event) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each step, with a pause after a step that had to wait, so that a busy machine keeps its cores.

    A lower thread priority would not do: a thread that hardly ever runs may be preempted while it holds the interpreter lock or
    the process's memory map lock, and the process then waits for it (0.9 s on two busy cores, against 0.03 s with pauses).
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
    `numa` is a policy of `memory.numa`, `huge` the value of --huge-pages: auto, always or never.

    Raises:
        ConfigError: the file cannot be created in `directory`, or its pages cannot be placed by the `numa` policy.
    """

    def __init__(
        self, directory: Path, size_bytes: int, numa: str = "auto", huge: str = "auto", runtime: Runtime = RUNTIME
    ) -> None:
        size_bytes -= size_bytes % (_STEP_BYTES if huge_pages.mount_of(directory).is_hugetlbfs else SECTOR_BYTES)
        self.id = secrets.token_bytes(ARENA_ID_BYTES)
        self.path = directory / f"{_PREFIX}{os.getuid()}-{self.id.hex()}{_SUFFIX}"
        self.size_bytes = size_bytes
        self.backed_bytes = 0
        """Bytes that have memory pages. The server hands out only extents in these."""
        self.named = True
        """Whether `path` still names the file (False after `unlink`)."""
        self.huge = huge
        self.pages = "The arena is not touched completely yet"
        """One sentence: which kind of pages the arena has got."""
        self.huge_bytes = 0
        """Bytes in huge pages, as of when all was touched."""
        self._backed = bytearray(-(-size_bytes // _STEP_BYTES))  # one byte a step
        self._lock = threading.Lock()
        self._stop, self._start, self._now = runtime.event(), runtime.start, runtime.now
        self._thread: threading.Thread | None = None
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--arena-dir {directory}: cannot create the arena there: {error.strerror}") from error
        try:
            self._claim = _claim(self.path, self.descriptor)
            os.ftruncate(self.descriptor, size_bytes)
            self.mapping = Mapping(self.descriptor, size_bytes, huge != "never")
        except (OSError, ValueError) as error:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            raise ConfigError(
                f"--l1-size-gb: cannot map {size_bytes} bytes in {directory}: {plainly(error)}"
            ) from error
        try:
            self.nodes = place(self.mapping.address, size_bytes, numa)
            """Numbers of the memory nodes on which the pages are placed; empty where the kernel chooses."""
            self.headers = headers.Headers(headers.beside(self.path), self.id, size_bytes)
        except ConfigError:
            self._remove()
            raise

    def unlink(self) -> None:
        """Remove the names of both files. Their memory is freed with the last process that holds a descriptor or mapping.

        This is for an arena that no later server is to adopt."""
        self.named = False
        self.path.unlink(missing_ok=True)
        self.headers.path.unlink(missing_ok=True)

    def start_prefault(self) -> None:
        """Touch and allocate all pages in a background thread, lowest addresses first; it logs which kind of pages they are."""
        self._thread = self._start(self._prefault, "lmcache-prefault")

    def back(self, offsets: Iterable[int], length: int) -> None:
        """Allocate memory pages for the `length` bytes at each of these byte offsets.

        Raises:
            ArenaFull: the file system is full. Pages that were allocated before stay.
        """
        if self.backed_bytes == self.size_bytes:
            return
        wanted = {step for at in offsets for step in range(at // _STEP_BYTES, (at + length - 1) // _STEP_BYTES + 1)}
        for step in sorted(wanted):
            if not self._backed[step]:
                self._back_step(step)

    def has_sectors(self, offset: int, length: int) -> bool:
        """Return whether these bytes have memory pages, as after `back`."""
        return all(self._backed[offset // _STEP_BYTES : (offset + length - 1) // _STEP_BYTES + 1])

    def close(self) -> None:
        """Remove the file. Its memory is freed once the last engine has unmapped it."""
        self._stop.set()
        if self._thread is not None:
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
        # Outside of the lock: allocating pages that exist is quick, so the main thread hardly ever waits for the lock.
        self.mapping.populate(first, length)
        with self._lock:
            if self._backed[step]:
                return
            try:
                os.posix_fallocate(self.descriptor, first, length)
            except OSError as error:
                self.mapping.discard(first, length)  # the headers may need what was touched of it
                is_full = error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)
                why = "is full" if is_full else f"gives no more memory ({error.strerror})"
                held = f"{self.path.parent} {why}: it holds only {self.backed_bytes >> 20} MiB of the arena"
                raise ArenaFull(f"{held}: free some memory there, or start with a smaller --l1-size-gb") from error
            self._backed[step] = 1
            self.backed_bytes += length

    def _prefault(self) -> None:
        began = self._now()
        try:
            for first, _ in _patient_steps(self.size_bytes, self._stop):
                self._back_step(first // _STEP_BYTES)
        except ArenaFull as error:
            logger.warning("L1 stays smaller than --l1-size-gb: %s", error)
        if not self._stop.is_set():
            self._note_pages(self._now() - began)

    def _note_pages(self, seconds: float) -> None:
        """Log which pages the kernel has given, now that all are touched, and keep it for /status."""
        if self.huge != "never" and not huge_pages.why_none(self.path.parent):  # small pages would take long to look at
            self.huge_bytes = huge_pages.mapped_bytes(self.mapping.address, self.size_bytes)
        self.pages = huge_pages.describe(self.path.parent, self.huge, self.huge_bytes, self.backed_bytes)
        logger.info("%s. %.2f GiB were touched in %.1f s", self.pages, self.backed_bytes / 2**30, seconds)


def _claim(path: Path, descriptor: int) -> int:
    """Lock the file and return the locked descriptor. The lock shows the next server that this one is alive; closing ends it.

    The lock needs a descriptor of its own: engines get the arena's, and their mappings would keep its lock alive.

    Raises:
        OSError: another server started at the same moment and took the file for the arena of a dead server.
    """
    claim = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "another server removed it during the start; try again", str(path))
    except OSError:
        os.close(claim)
        raise
    return claim


def reclaim_stale(directory: Path, runtime: Runtime = RUNTIME) -> int:
    """Remove the arenas of this user's dead servers with their extent headers. Return the bytes of these arenas.

    A live server holds a lock on its arena. It creates the arena before its headers and removes it after them.

    Engines that still map a removed arena keep its pages until they unmap it; unlinking takes no memory from under them.
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
            just_made = not status.st_size and runtime.wall() - status.st_mtime < _STARTING_SECONDS
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
