"""The order of eviction: the interface of policies, and LRU. The learned policy is in C (`native/learned.c`).

There are two indexes: `cache.table` has a row for each chunk in memory, `tiers.disk.shard_index` for each shard on a disk. Each
index notifies a policy of changes to its *rows*, and asks it which row to evict next. Rows are numbered from 1; 0 means none.
Only the index decides which rows are evictable: those that have no reader, no writer and no child. A child of a row is a chunk
that follows its chunk in a prompt; a disk's index knows no children.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence


class Policy(ABC):
    """Takes the notifications of one index, and decides its order of eviction. Each index has a policy of its own.

    The methods run inside the calls of the index, in its thread. They must be quick and must not raise. The only function of the
    index that they may call is `evictable`. A policy must not keep a reference to its index.
    """

    @abstractmethod
    def inserted(self, row: int, key: bytes, parent: int) -> None:
        """Note a new row. Its number is new, or the row with this number has been removed.

        Args:
            key: identifies the content: the chunk hash (16 bytes) in memory, the packed `ShardKey` (36 bytes) on a disk. If the
                same content is inserted again, in any row, it has the same key.
            parent: the row of the preceding chunk of the prompt; 0 for a first chunk, or if the index does not know prompts.
        """

    def restored(self, count: int, key: Callable[[int], bytes]) -> None:
        """Note that the index, which was empty, has restored the rows 1 to `count`. Row 1 is the one to be evicted first."""
        for row in range(1, count + 1):
            self.inserted(row, key(row), 0)

    @abstractmethod
    def touched(self, rows: Sequence[int]) -> None:
        """Note that the rows were used together, the last of `rows` most recently.

        The index of the memory passes a prompt's chunks in reverse order, so that the end of a prompt is evicted before its
        beginning, without which nothing of the prompt could be found.
        """

    def asked(self, now: float, keys: bytes) -> None:  # noqa: B027 (LRU goes by touches)
        """Note that somebody has looked up a prompt of these keys, one after the other, whether or not they have rows. The
        touches of those that have follow. The index of a disk knows no prompts."""

    def unblocked(self, row: int) -> None:  # noqa: B027 (most policies need not know)
        """Note that the row is evictable again, since it has lost its last reader, writer or child.

        A new row is evictable from the start. There is no notification when a row stops being evictable. There can be several
        notifications when it becomes evictable.
        """

    @abstractmethod
    def removed(self, row: int) -> None:
        """Note that the index has removed the row. Its number may be used again."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """Iterate over all rows in the order of eviction. The index does not change during the iteration."""

    def victim(self, evictable: Callable[[int], bool]) -> int:
        """Return the row to evict next, for which `evictable` must be true, or 0 if there is none."""
        return next(filter(evictable, self), 0)

    @abstractmethod
    def memory_bytes(self) -> int:
        """Return the bytes of memory that the policy takes."""


class LRU(Policy):
    """Evicts the least recently used row first. Two flat arrays form a doubly linked ring, with 8 bytes for each row.

    Row 0 stands between the newest and the oldest row. The table in C (`native/lru.c`) keeps the same ring in its records.
    """

    def __init__(self) -> None:
        self._older, self._newer = array("I", [0]), array("I", [0])

    def inserted(self, row: int, key: bytes, parent: int) -> None:
        missing = row + 1 - len(self._older)
        if missing > 0:
            self._older.extend([0] * missing)
            self._newer.extend([0] * missing)
        newest = self._older[0]
        self._older[row], self._newer[row] = newest, 0
        self._newer[newest] = self._older[0] = row

    def restored(self, count: int, key: Callable[[int], bytes]) -> None:
        around = array("I", range(count + 1))
        self._older, self._newer = around[-1:] + around[:-1], around[1:] + around[:1]

    def touched(self, rows: Sequence[int]) -> None:
        older, newer = self._older, self._newer
        for row in rows:
            before, after = older[row], newer[row]
            newer[before], older[after] = after, before
            newest = older[0]
            older[row], newer[row] = newest, 0
            newer[newest] = older[0] = row

    def removed(self, row: int) -> None:
        older, newer = self._older[row], self._newer[row]
        self._newer[older], self._older[newer] = newer, older

    def __iter__(self) -> Iterator[int]:
        newer = self._newer
        row = newer[0]
        while row:
            yield row
            row = newer[row]

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._older) + sys.getsizeof(self._newer)
