"""All file operations of the tiers on file systems, one method an operation, so that tests can fail or truncate each.

Nothing here makes decisions. Errors are OSError; `tier_error` names them for people and counters.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lmcache.compiled import native
from lmcache.tiers.tier import TierError

BLOCK_BYTES = 4096
"""Unit of direct I/O and of allocation in a file system. No device in use needs a larger one."""
_IOV_MAX = 1024
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_FRAME, _READ = struct.Struct("=qqQ"), struct.Struct("=q128s16s")
"""The request for one frame to `native/frames.c`, and its outcome."""
_REASONS = {
    errno.ENOSPC: ("full", "no space left; free some, or set a smaller max_gb"),
    errno.EDQUOT: ("full", "the quota is used up; raise it, or set a smaller max_gb"),
    errno.EROFS: ("read-only", "the file system is read-only; remount it writable"),
    errno.EACCES: ("denied", "permission denied; give this user the directory"),
    errno.EPERM: ("denied", "not permitted; give this user the directory"),
    errno.EIO: ("io", "input/output error; look at the kernel's log and at the device"),
    errno.ENOENT: ("gone", "a file or folder is gone; was it deleted or unmounted?"),
}
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def tier_error(where: str, error: OSError) -> TierError:
    """Return the error of the tier `where` (its redacted URL), with a reason for counters and a remedy for people."""
    reason, text = _REASONS.get(error.errno or 0, ("io", error.strerror or str(error)))
    return TierError(reason, f"{where}: {text}")


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Raise each OSError of the tier `where` as a TierError."""
    try:
        yield
    except OSError as error:
        raise tier_error(where, error) from error


def blocks(size: int) -> int:
    """Return `size` bytes rounded up to complete blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def is_aligned(memory: memoryview) -> bool:
    """Return whether direct I/O may use this memory without a copy."""
    return address_of(memory) % BLOCK_BYTES == 0


def address_of(memory: memoryview) -> int:
    """Return the address of the first byte. It must not be used after the memory is released."""
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


class Bounces:
    """A pool of aligned bounce buffers, for memory or sizes that do not suit direct I/O. It grows to as many as are in use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: list[mmap.mmap] = []

    def take(self) -> mmap.mmap:
        try:
            return self._idle.pop()
        except IndexError:
            return mmap.mmap(-1, self.size)

    def give(self, buffer: mmap.mmap) -> None:
        self._idle.append(buffer)


class Filesystem:
    """The file operations, each so small that a crash cannot split it. Raises OSError."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file and return its descriptor. Created files are accessible to this user only."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Close a file that was written. Network file systems report failed writes here."""
        os.close(fd)

    def write(self, fd: int, buffers: Sequence[memoryview | bytes], offset: int) -> None:
        """Write all buffers, one after another."""
        left = [memoryview(one).cast("B") for one in buffers]
        while left:
            done = self.pwritev(fd, left[:_IOV_MAX], offset)
            offset += done
            left = _behind(left, done)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill the buffers and return the bytes read; fewer than asked for where the file ends."""
        left, total = [one.cast("B") for one in buffers], 0
        while left:
            done = self.preadv(fd, left[:_IOV_MAX], offset + total)
            if not done:
                break
            total += done
            left = _behind(left, done)
        return total

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def read_frames(
        self, fd: int, frames: Sequence[tuple[int, int, int]], piece_bytes: int
    ) -> list[tuple[int, bytes, bytes]]:
        """Read large frames, given as (offset, payload bytes, target address), `piece_bytes` at a time.

        Return for each 0, -1 where the file ends too early, or errno; its header; its digest.
        """
        asked = b"".join(_FRAME.pack(*one) for one in frames)
        return list(_READ.iter_unpack(native.read_frames(fd, asked, piece_bytes)))

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Allocate space without changing the file's size. Does nothing where the file system cannot."""
        try:
            _fallocate(fd, _KEEP_SIZE, offset, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise

    def punch(self, fd: int, offset: int, size: int) -> None:
        """Free the blocks of a range."""
        _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, replacing `new` atomically."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def touch(self, path: Path) -> None:
        """Set a file's time of last use to now."""
        os.utime(path)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    while _libc.fallocate(fd, mode, offset, size):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _behind(buffers: list[memoryview], done: int) -> list[memoryview]:
    """Return the rest of the buffers after `done` bytes."""
    first = 0
    while first < len(buffers) and done >= buffers[first].nbytes:
        done -= buffers[first].nbytes
        first += 1
    left = buffers[first:]
    if left and done:
        left[0] = left[0][done:]
    return left
