"""A second policy, of another kind than LRU: proof that an index asks its policy, and nothing else, for the order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from lmcache.memory.order import Policy


class TwoQueues(Policy):
    """2Q: what is new goes in the order in which it came, unless it comes back soon after it was evicted.

    It may then stay as long as LRU allows. So a use counts only for rows whose key is still remembered from an earlier time.
    """

    def __init__(self, first: int = 4, remembered: int = 30) -> None:
        self._first, self._remembered = first, remembered
        self._keys: dict[int, bytes] = {}
        self._new: dict[int, None] = {}
        self._known: OrderedDict[int, None] = OrderedDict()
        self._gone: OrderedDict[bytes, None] = OrderedDict()

    def inserted(self, row: int, key: bytes, parent: int) -> None:
        assert row and row not in self._keys and (not parent or parent in self._keys)
        self._keys[row] = bytes(key)
        if key in self._gone:
            del self._gone[key]
            self._known[row] = None
        else:
            self._new[row] = None

    def touched(self, rows: Sequence[int]) -> None:
        for row in rows:
            assert row in self._keys
            if row in self._known:
                self._known.move_to_end(row)

    def unblocked(self, row: int) -> None:
        assert row in self._keys

    def removed(self, row: int) -> None:
        key = self._keys.pop(row)
        if row in self._known:
            del self._known[row]
            return
        del self._new[row]
        self._gone[key] = None
        if len(self._gone) > self._remembered:
            self._gone.popitem(last=False)

    def __iter__(self) -> Iterator[int]:
        """New ones that are too many, then known ones, then the other new ones."""
        over = max(0, len(self._new) - self._first)
        return chain(islice(self._new, over), self._known, islice(self._new, over, None))

    def memory_bytes(self) -> int:
        return 100 * (len(self._keys) + len(self._gone))
