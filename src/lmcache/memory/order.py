"""The order of eviction: the policy that an index asks for it, and LRU, which is the one in use.

`cache.table` keeps the chunks in memory and `tiers.shard_index` the shards on a disk. Each index notifies a policy of what
happens to its *rows*, and asks the policy which row goes first. Rows are numbered from 1; 0 stands for none. The index alone
decides which rows may be evicted at the moment: those that nobody reads or fills and that no other row hangs on.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence


class Policy(ABC):
    """The notifications and questions of one index, which has one policy of its own.

    The methods run inside the calls of the index, in its thread. They must be quick, must not raise, and may call nothing of
    the index but `evictable`. A policy must not keep a reference to its index.
    """

    @abstractmethod
    def inserted(self, row: int, key: bytes, parent: int) -> None:
        """The index has a new row, which was not there before or has been removed since.

        Args:
            key: names the content. A content that comes back later, in whichever row, has the same key.
            parent: the row before this one in the prompt; 0 for the first one, and where the index knows no prompts.
        """

    def restored(self, count: int, key: Callable[[int], bytes]) -> None:
        """The index, which was empty, has the rows 1 to `count` from an earlier life. They were last used in this order."""
        for row in range(1, count + 1):
            self.inserted(row, key(row), 0)

    @abstractmethod
    def touched(self, rows: Sequence[int]) -> None:
        """The rows were used together. The last one counts as the most recent: it is the first one of the prompt."""

    def unblocked(self, row: int) -> None:  # noqa: B027 (most policies need not know)
        """The row may be evicted again: what forbade it (a reader, a shard being filled, a row that hung on it) has gone.

        A new row may be evicted from the start. There is no notification when a row may no longer be evicted, and there can be
        more than one when it may.
        """

    @abstractmethod
    def removed(self, row: int) -> None:
        """The index has the row no more. Its number may be used again."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """All rows, in the order in which they would be evicted; none is left out. Nothing changes during the iteration."""

    def victim(self, evictable: Callable[[int], bool]) -> int:
        """The row to evict next, for which `evictable` must be true, or 0 when there is none."""
        return next(filter(evictable, self), 0)

    @abstractmethod
    def memory_bytes(self) -> int:
        """What the policy itself takes."""


class LRU(Policy):
    """The row that was used longest ago goes first: a ring through two flat arrays, 8 bytes a row.

    Row 0 is the end of the ring. The table in C (`native/table.c`) does the same inside its records.
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
