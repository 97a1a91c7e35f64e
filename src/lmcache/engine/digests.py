"""BLAKE3 digests of files, over every byte, kept on disk for later processes.

A digest is found by the file's device, inode, size, mtime and ctime, never by its name: a file that was replaced, or written to
by `write` and the like, is hashed again. A write through a mapping (`mmap`) changes the times at most with the first write to a
memory page since that page was last written back, so later writes may leave a digest that is no longer the file's. If the kept
digests cannot be used, the files are only hashed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from blake3 import blake3

from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)

_PIECE_BYTES = 16 << 20
"""Bytes read at a time. Between two reads the thread waits for Python's lock, 5 ms where the engine computes in Python."""
_MAX_THREADS = 4
_NICENESS = 10
"""A thread of this niceness gets about a tenth of a core that an engine's thread also wants. At 19 it would get a sixtieth:
hashing would take hours beside an engine that keeps all cores busy."""
_MAX_REMEMBERED = 4096
_MAX_MEMORY_BYTES = 4 << 20
_TURNS = 8
"""Number of lock files: enough that two models rarely wait for each other, few enough for a small folder."""
_PATIENCE_SECONDS = 300.0
"""A process that keeps a lock for longer is stopped, or hashes more than is worth waiting for."""
_LOOK_SECONDS = 0.1


class Stamp(NamedTuple):
    """What changes when a file is replaced, or written to without a mapping. Times are in nanoseconds since the epoch."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    stamp: Stamp
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


_entries = msgspec.json.Decoder(list[_Entry])


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hash_threads() -> int:
    """Return how many threads may hash beside an engine: half of the cores, and 4 at most."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // 2))


def be_nice() -> None:
    """Lower the priority of this thread, and of those it starts, below the engine's threads, for the cores and the disk."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def digest_file(path: Path, stamp: Stamp) -> str:
    """Return the BLAKE3 of a file, 64 hex digits. The file is read, not mapped: truncating a mapped file kills the process.

    Raises:
        LayoutError: the file does not have that stamp before or after it was read.
        OSError: the file cannot be read.
    """
    digest, piece = blake3(max_threads=hash_threads()), bytearray(min(_PIECE_BYTES, max(1, stamp.size)))
    with path.open("rb", buffering=0) as file, memoryview(piece) as view:
        before = stamp_of(os.fstat(file.fileno()))
        while count := file.readinto(piece):
            digest.update(view[:count])
        if not before == stamp == stamp_of(os.fstat(file.fileno())):
            raise LayoutError(f"{path} has changed while it was read")
    return digest.hexdigest()


class DigestMemory:
    """Digests of files, kept in one file of a folder for all processes of a user. No method raises."""

    def __init__(self, folder: Path, runtime: Runtime = RUNTIME) -> None:
        self._folder, self._file, self._runtime = folder, folder / "digests", runtime

    def find(self, stamps: Iterable[Stamp]) -> dict[Stamp, str]:
        """Return the kept digests of the files with these stamps."""
        known = self._read()
        return {stamp: known[stamp] for stamp in stamps if stamp in known}

    def add(self, digests: Mapping[Stamp, str]) -> None:
        """Keep these digests as the newest, and delete the oldest beyond the limit."""
        with self._locked("lock-write"):
            known = {stamp: digest for stamp, digest in self._read().items() if stamp not in digests} | dict(digests)
            kept = list(known.items())[-_MAX_REMEMBERED:]
            body = msgspec.json.encode([_Entry(stamp, digest) for stamp, digest in kept])
            try:
                self._replace(blake3(body).hexdigest().encode() + b"\n" + body)
            except OSError as error:
                logger.warning(
                    "The digests of weights cannot be kept in %s (%s): every process hashes them anew",
                    self._folder,
                    error,
                )

    def turn(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Let one process at a time hash the files of this number, so that the others find its digests. A process that has
        waited for five minutes goes on without the lock."""
        return self._locked(f"lock-{number % _TURNS}")

    def _read(self) -> dict[Stamp, str]:
        try:
            with self._file.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.getuid() or status.st_mode & 0o022:
                    logger.warning("%s can be written to by others, and is not used; delete it", self._file)
                    return {}
                checksum, _, body = file.read(_MAX_MEMORY_BYTES).partition(b"\n")
            if checksum != blake3(body).hexdigest().encode():
                return {}
            return {entry.stamp: entry.digest for entry in _entries.decode(body)}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.debug("No digests in %s: %s", self._file, error)
            return {}

    def _replace(self, content: bytes) -> None:
        """Replace the file with one of mode 0600, the mode of every temporary file."""
        descriptor, name = tempfile.mkstemp(prefix="digests-", dir=self._folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(name, self._file)
        except OSError:
            os.unlink(name)
            raise

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock file; go on without it if it cannot be made, or another process keeps it too long (work is done twice)."""
        descriptor = -1
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _lock(descriptor, self._folder / name, self._runtime)
        except OSError as error:
            logger.debug("No lock %s in %s: %s", name, self._folder, error)
        try:
            yield
        finally:
            if descriptor >= 0:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child also holds the lock
                os.close(descriptor)


def _lock(descriptor: int, path: Path, runtime: Runtime) -> None:
    deadline = runtime.now() + _PATIENCE_SECONDS
    while not _try_lock(descriptor):
        if runtime.now() >= deadline:
            logger.warning(
                "Another process of this user has kept %s locked for %.0f s and is waited for no longer: this process "
                "hashes the weights too. If the other process hangs, end it (`fuser -v %s` names it)",
                path,
                _PATIENCE_SECONDS,
                path,
            )
            return
        runtime.sleep(_LOOK_SECONDS)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
