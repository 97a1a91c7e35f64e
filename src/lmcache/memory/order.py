"""Exact LRU: in which order things were used, as a ring through two flat arrays, 8 bytes a thing.

What goes first is decided by this object in L1's index (`cache.table`; its C twin links the records themselves) and in a disk
tier (`tiers.shard_index`). Things are rows 1, 2, ... of their owner's; row 0 is the end of the ring, and stands for none.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator


class OrderOfUse:
    """Rows 1 to `rows` to begin with, 1 used longest ago. Which rows are in it is their owner's to know."""

    def __init__(self, rows: int = 0) -> None:
        around = array("I", range(rows + 1))
        self._older, self._newer = around[-1:] + around[:-1], around[1:] + around[:1]

    def insert(self, row: int) -> None:
        """A row that is not there; it is the most recently used one. Memory grows with the highest row."""
        missing = row + 1 - len(self._older)
        if missing > 0:
            self._older.extend([0] * missing)
            self._newer.extend([0] * missing)
        newest = self._older[0]
        self._older[row], self._newer[row] = newest, 0
        self._newer[newest] = self._older[0] = row

    def touch(self, row: int) -> None:
        """Used now. (Written out: it is done for every chunk of every lookup.)"""
        older, newer = self._older, self._newer
        before, after = older[row], newer[row]
        newer[before], older[after] = after, before
        newest = older[0]
        older[row], newer[row] = newest, 0
        newer[newest] = older[0] = row

    def remove(self, row: int) -> None:
        """It is there no more."""
        older, newer = self._older[row], self._newer[row]
        self._newer[older], self._older[newer] = newer, older

    def oldest(self) -> int:
        """The row used longest ago, 0 when there is none."""
        return self._newer[0]

    def newer(self, row: int) -> int:
        """The row used right after this one, 0 behind the last."""
        return self._newer[row]

    def __iter__(self) -> Iterator[int]:
        """Oldest first; nothing may change meanwhile."""
        newer = self._newer
        row = newer[0]
        while row:
            yield row
            row = newer[row]

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._older) + sys.getsizeof(self._newer)
