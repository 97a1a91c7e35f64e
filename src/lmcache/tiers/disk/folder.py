"""Checks of a disk tier's directory before it is used: its owner, its lock, and the features of its file system."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

from lmcache.observability.log import init_logger
from lmcache.tiers.filesystem import BLOCK_BYTES, FULL, Filesystem
from lmcache.tiers.tier import TierError

_OWN_FILES = {"index", "index.new", "lock", "probe", "lost+found"}
_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_PART_OF_FREE = 0.9
log = init_logger(__name__)


def take_folder(filesystem: Filesystem, path: Path, where: str) -> int:
    """Create or check the directory and lock it. Return the descriptor that holds the lock until it is closed.

    Raises:
        TierError: other users may write to it, it holds other files, or another process has locked it.
        OSError
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        remedy = (
            f"give it to this user (chown, and chmod 700 {path}), or name a new directory in it, such as {where}/kv"
        )
        raise TierError("denied", f"{where}: others may write to it; {remedy}")
    for file in path.iterdir():
        if file.name not in _OWN_FILES and file.suffix not in (".large", ".packed"):
            raise TierError("denied", f"{where}: {file.name!r} is not a cache file; give the tier its own directory")
    os.chmod(path, 0o700)
    fd = filesystem.open(path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        filesystem.write(fd, [f"{os.getpid():<20}".encode()], 0)
    except BlockingIOError:
        owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "of unknown number"
        os.close(fd)
        raise TierError(
            "locked", f"{where}: in use by process {owner}; end that process, or give this server another directory"
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def can_be_direct(filesystem: Filesystem, path: Path, where: str, mode: str) -> bool:
    """Return whether to bypass the page cache. Both O_DIRECT and holes are tried: some file systems fail only at the write.

    Raises:
        TierError: the file system cannot punch holes, or `mode` is "direct" and there is no O_DIRECT.
        OSError
    """
    probe = path / "probe"
    try:
        _try(filesystem, probe, 0)
        if mode == "buffered":
            return False
        try:
            _try(filesystem, probe, os.O_DIRECT)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if mode == "direct":
                raise TierError(
                    "direct", f"{where}: this file system has no O_DIRECT; use io=auto or io=buffered"
                ) from None
            log.warning("%s: this file system has no O_DIRECT: going through the page cache", where)
            return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise TierError(
                "holes", f"{where}: this file system cannot punch holes; use another one, or dir://{path}"
            ) from None
        if error.errno not in FULL:
            raise
    finally:
        filesystem.unlink(probe)
    return mode != "buffered"


def part_of_free(path: Path) -> int:
    """Return the cap where none is given: 90 % of the free space and of what the tier already holds."""
    status = os.statvfs(path)
    own = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())
    return int((status.f_bavail * status.f_frsize + own) * _PART_OF_FREE)


def _try(filesystem: Filesystem, probe: Path, flags: int) -> None:
    fd = filesystem.open(probe, os.O_RDWR | os.O_CREAT | flags)
    try:
        filesystem.write(fd, [memoryview(mmap.mmap(-1, BLOCK_BYTES))], 0)
        if not flags:
            filesystem.punch(fd, 0, BLOCK_BYTES)
    finally:
        os.close(fd)
