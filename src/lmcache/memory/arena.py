"""The arena: one file in a memory file system, owned by the server, mapped by engines that got its descriptor.

Pages are reserved (`posix_fallocate`) before a slot in them is handed out, so a full tmpfs gives an error and never SIGBUS;
a background thread then touches them, since the first touch of a shared page costs more than ten copies into it.
Nothing that decides is kept in the arena: an engine may overwrite any byte of it, and only KV would be wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import threading
from pathlib import Path

from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

ARENA_ID_BYTES = 16
_PREFIX, _SUFFIX = "lmcache-", ".arena"
_STEP_BYTES = 64 << 20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # uapi/asm-generic/mman-common.h; POPULATE needs Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class ArenaFull(LMCacheError):
    """The memory file system has no page left, whatever `--l1-size-gb` says."""


class Mapping:
    """The arena mapped into this process. `address` is where byte 0 of it lies here."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        _libc.madvise(
            ctypes.c_void_p(self.address), ctypes.c_size_t(size_bytes), _MADV_HUGEPAGE
        )  # a wish: may be refused

    def populate(self, offset: int, length: int) -> None:
        """Touch pages ahead of use, so that copies into them do not fault. A kernel without it faults later, no more."""
        _libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for payload frames."""
        return memoryview(self._map)[offset : offset + length]

    def close(self) -> None:
        """Unmap. Nobody may use `address` afterwards."""
        del self._anchor
        self._map.close()


def populate_all(mapping: Mapping, stop: threading.Event, step_bytes: int = _STEP_BYTES) -> None:
    """Touch the whole mapping, step by step and with the least priority; for a thread of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux: this thread only
    except OSError as error:
        logger.debug("pre-faulting runs at normal priority: %s", error)
    for offset in range(0, mapping.size_bytes, step_bytes):
        if stop.is_set():
            return
        mapping.populate(offset, min(step_bytes, mapping.size_bytes - offset))


class Arena:
    """The server's side: creates, reserves, touches and at last removes the file.

    Raises:
        ConfigError: the file cannot be created there.
    """

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.id = secrets.token_bytes(ARENA_ID_BYTES)
        self.path = directory / f"{_PREFIX}{os.getuid()}-{self.id.hex()}{_SUFFIX}"
        self.size_bytes = size_bytes
        self.backed_bytes = 0
        """Bytes from the start that have pages: slots below this may be handed out."""
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--arena-dir {directory}: cannot create the arena there: {error.strerror}") from error
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells the next server that this one is alive
            os.ftruncate(self.descriptor, size_bytes)
            self.mapping = Mapping(self.descriptor, size_bytes)
        except (OSError, ValueError) as error:
            os.unlink(self.path)
            raise ConfigError(f"--l1-size-gb: cannot map {size_bytes} bytes in {directory}: {error}") from error
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prefault, name="lmcache-prefault", daemon=True)

    def start_prefault(self) -> None:
        """Reserve and touch everything in the background, lowest addresses first."""
        self._thread.start()

    def back(self, upto_bytes: int) -> None:
        """Make sure that bytes [0, upto_bytes) have pages. 64 MiB take about 20 ms where nothing was reserved yet.

        Raises:
            ArenaFull: the file system is full; what was reserved before stays.
        """
        if upto_bytes <= self.backed_bytes:
            return
        with self._lock:
            while self.backed_bytes < min(upto_bytes, self.size_bytes):
                step = min(_STEP_BYTES, self.size_bytes - self.backed_bytes)
                try:
                    os.posix_fallocate(self.descriptor, self.backed_bytes, step)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                        raise
                    room = f"{self.path.parent} has no room beyond {self.backed_bytes >> 20} MiB of the arena"
                    raise ArenaFull(f"{room}: free some, or start with a smaller --l1-size-gb") from error
                self.backed_bytes += step

    def close(self) -> None:
        """Remove the file; its pages are freed once the last engine has unmapped it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.path.unlink(missing_ok=True)
        self.mapping.close()
        os.close(self.descriptor)

    def _prefault(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        except OSError as error:
            logger.debug("pre-faulting runs at normal priority: %s", error)
        for offset in range(0, self.size_bytes, _STEP_BYTES):
            if self._stop.is_set():
                return
            try:
                self.back(offset + _STEP_BYTES)
            except ArenaFull as error:
                logger.warning("L1 stops growing: %s", error)
                return
            self.mapping.populate(offset, min(_STEP_BYTES, self.size_bytes - offset))


def reclaim_stale(directory: Path) -> int:
    """Remove the arenas of this user's dead servers; return their bytes. A live server holds a lock on its own.

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
            if status.st_uid == os.getuid():
                path.unlink(missing_ok=True)
                freed += status.st_blocks * 512
                logger.info("Reclaimed the arena of a dead server: %s (%d MiB)", path, status.st_blocks >> 11)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return freed
