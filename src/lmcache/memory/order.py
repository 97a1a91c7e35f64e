"""Exact LRU: the order in which entries were last used, as a doubly linked ring in two flat arrays of 4 bytes an entry each.

This object decides what is evicted first from L1's index (`cache.table`; the C twin links its records instead) and from a disk
tier (`tiers.shard_index`). Entries are rows 1, 2, ... of the owner's table; row 0 is the ring's end and stands for no entry.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator


class OrderOfUse:
    """An LRU order that begins with rows 1 to `rows`, row 1 the oldest. Its owner knows which rows are in it."""

    def __init__(self, rows: int = 0) -> None:
        around = array("I", range(rows + 1))
        self._older, self._newer = around[-1:] + around[:-1], around[1:] + around[:1]

    def insert(self, row: int) -> None:
        """Insert a row that is not in the order as the most recently used one. Memory grows with the highest row."""
        missing = row + 1 - len(self._older)
        if missing > 0:
            self._older.extend([0] * missing)
            self._newer.extend([0] * missing)
        newest = self._older[0]
        self._older[row], self._newer[row] = newest, 0
        self._newer[newest] = self._older[0] = row

    def touch(self, row: int) -> None:
        """Make a row the most recently used one. (The code is inlined, since it runs for every chunk of every lookup.)"""
        older, newer = self._older, self._newer
        before, after = older[row], newer[row]
        newer[before], older[after] = after, before
        newest = older[0]
        older[row], newer[row] = newest, 0
        newer[newest] = older[0] = row

    def remove(self, row: int) -> None:
        """Remove a row from the order."""
        older, newer = self._older[row], self._newer[row]
        self._newer[older], self._older[newer] = newer, older

    def oldest(self) -> int:
        """Return the least recently used row, 0 when the order is empty."""
        return self._newer[0]

    def newer(self, row: int) -> int:
        """Return the row used next after this one, 0 after the newest."""
        return self._newer[row]

    def __iter__(self) -> Iterator[int]:
        """Iterate from the oldest row to the newest. The order may not change meanwhile."""
        newer = self._newer
        row = newer[0]
        while row:
            yield row
            row = newer[row]

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._older) + sys.getsizeof(self._newer)
