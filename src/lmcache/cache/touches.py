"""Admission by second touch: which chunks a tier has been offered once, and is to be given when they are wanted again.

A chunk is touched when it becomes complete in L1 and when a lookup finds it there. Most chunks are never wanted again, so a tier
that gets them at the second touch only is written to less. The memory is of fixed size, and forgets the older half at once.
"""

from __future__ import annotations

MOST_CHUNKS = 1 << 18
"""Chunks that are remembered for one tier, half of them at least. An entry takes about 150 bytes."""


class Touches:
    """The touches of the chunks of one tier. A chunk's name is its space and its hash."""

    def __init__(self, most: int = MOST_CHUNKS) -> None:
        self._most = most // 2
        self._young: dict[tuple[int, bytes], bool] = {}
        self._old: dict[tuple[int, bytes], bool] = {}
        """Name -> whether it was touched a second time."""

    def touch(self, space: int, chunk: bytes) -> bool:
        """Note a touch. Return whether the chunk has been touched before."""
        name = space, chunk
        before = self._young.get(name, self._old.get(name))
        if len(self._young) >= self._most:
            self._young, self._old = {}, self._young
        self._young[name] = before is not None
        return before is not None

    def is_wanted(self, space: int, chunk: bytes) -> bool:
        """Return whether the chunk has been touched twice, so that the tier was given it."""
        name = space, chunk
        return self._young.get(name, False) or self._old.get(name, False)
