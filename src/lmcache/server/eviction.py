"""Which policy of eviction the server runs, and where it keeps what the learned one has learned from one start to the next.

The file is written when the server stops, and read when it starts. Whatever is wrong with it, the server starts afresh. It holds
counts by kinds of chunks and by ages: no hash, no token.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from lmcache.cache.table import Habits, Table
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_HEAD = f"LMCache habits 1 {sys.byteorder}\n".encode()
_SUM_BYTES = 16
_MOST_BYTES = 16 << 20


class Eviction:
    """The policy `name` of all spaces. path: the file, or None to keep nothing.

    Groups of a model with several kinds of KV are always evicted by LRU.
    """

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self._path = name, path
        self.answers = 0
        """So many times an engine has reported the length of an answer."""
        self.habits = Habits() if name == "learned" else None
        if self.habits is not None and path is not None:
            _read(path, self.habits)

    def new_table(self, shards: int) -> Table:
        return Table(shards, self.habits)

    def group_table(self, shards: int) -> Table:
        return Table(shards)

    @property
    def learns(self) -> bool:
        return self.habits is not None

    @property
    def prompts(self) -> int:
        """The policy has learned from so many prompts since the start."""
        return self.habits.prompts() if self.habits is not None else 0

    def save(self) -> None:
        """Write the file. If that fails, the log says so, and the file stays as it was."""
        if self.habits is None or self._path is None:
            return
        saved = self.habits.saved()
        try:
            _replace(self._path, _HEAD + _sum(saved) + saved)
        except OSError as error:
            logger.warning("%s: what the eviction has learned is not kept: %s", self._path, error.strerror)


def _sum(saved: bytes) -> bytes:
    return blake2b(saved, digest_size=_SUM_BYTES).digest()


def _read(path: Path, habits: Habits) -> None:
    """Go on from the file, if there is one that this server can trust."""
    try:
        saved = _trusted(path)
        habits.restore(saved)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        logger.warning("%s: cannot be used, so the eviction learns from the beginning: %s", path, why)
        return
    logger.info("%s: the eviction goes on from what an earlier server has learned", path)


def _trusted(path: Path) -> bytes:
    """Return what `save` has written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of this user, or it is damaged, or of another version.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError("it is no file of this user")
        content = file.read(_MOST_BYTES)
    head, rest = content[: len(_HEAD)], content[len(_HEAD) :]
    if head != _HEAD:
        raise ValueError("it is of another version, or no file of LMCache")
    if _sum(rest[_SUM_BYTES:]) != rest[:_SUM_BYTES]:
        raise ValueError("it is damaged")
    return rest[_SUM_BYTES:]


def _replace(path: Path, content: bytes) -> None:
    """Write the file (0600) at once or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
