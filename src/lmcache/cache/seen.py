"""What has become of chunks that L1 does not have any more: a memory of fixed size, which forgets the oldest first."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

STORED, EVICTED, LOST, CLEARED = 1, 2, 3, 4
"""What happened to a chunk last: it was stored; it was evicted; it got no memory or its copy failed, so it was never complete;
it was removed with all others (only in `runs`)."""
ENTRY_BYTES = 192
"""Memory of one entry: two numbers, a place in a dictionary and a place in the ring (measured by tests/test_accounts.py)."""
_SHARDS = 256
"""Many small dictionaries, since the growth of one large dictionary would take milliseconds."""
_TENTH = 10.0
_PARENT = 1 << 2
_TIME_BITS, _SPACE_BITS = 32, 16
_TIMES, _SPACES = (1 << _TIME_BITS) - 1, (1 << _SPACE_BITS) - 1
_SPACE_AT, _CLEARS_AT = 3, 3 + _SPACE_BITS
_WHEN_AT = _CLEARS_AT + 16
_USED_AT = _WHEN_AT + _TIME_BITS
_CLEARS = 0xFFFF


class Known(NamedTuple):
    """What is known of a chunk. state: what happened last, at the time `when`. used: when it was last used before it was evicted;
    None if unknown. wanted_by: the space for which it was evicted, -1 if none. continued: whether a chunk after it was stored.
    cleared: when the cache was cleared after it had been stored; None if it was not."""

    state: int
    when: float
    used: float | None
    wanted_by: int
    continued: bool
    cleared: float | None


class Seen:
    """Remembers `most` chunks by the first eight bytes of their hashes. Times are in seconds, kept to a tenth."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._ring = array("Q")
        """All keys, in the order in which they came; `_next` is the oldest once the ring is full."""
        self._next = 0
        self._known: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self._latest: dict[int, int] = {}
        """Space -> the latest last use of the chunks that were evicted from it, in tenths of a second."""
        self._clears = 0
        self._cleared_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._ring)

    def get(self, key: int) -> Known | None:
        """Return what is known of the chunk with this key (`keys_of`)."""
        value = self._known[key & _SHARDS - 1].get(key)
        if value is None:
            return None
        used = value >> _USED_AT
        clears = (self._clears - (value >> _CLEARS_AT)) & _CLEARS
        return Known(
            value & 3,
            (value >> _WHEN_AT & _TIMES) / _TENTH,
            used / _TENTH if used else None,
            (value >> _SPACE_AT & _SPACES) - 1,
            bool(value & _PARENT),
            self._cleared_at.get(self._clears - clears + 1) if clears else None,
        )

    def runs(self, keys: Sequence[int], first: int) -> list[tuple[int, int]]:
        """Return the states of the chunks from number `first` on, up to one that is not known, each with the number of
        consecutive chunks that have it."""
        found: list[tuple[int, int]] = []
        known, clears, last, begin = self._known, self._clears & _CLEARS, 0, first
        for number in range(first, len(keys)):
            key = keys[number]
            value = known[key & _SHARDS - 1].get(key)
            state = 0 if value is None else value & 3
            if state == STORED and value is not None and value >> _CLEARS_AT & _CLEARS != clears:
                state = CLEARED
            if state != last:
                if last:
                    found.append((last, number - begin))
                last, begin = state, number
            if not state:
                return found
        return found + [(last, len(keys) - begin)] * (len(keys) > begin)

    def stored(self, now: float, hashes: bytes, parents: bytes) -> None:
        """Note that these chunks are complete. parents: the hashes of the chunks before them."""
        value = self._value(now, STORED, used=now)
        for key, parent in zip(keys_of(hashes), keys_of(parents), strict=True):
            known = self._known[key & _SHARDS - 1]
            former = known.get(key)
            if former is None:
                self._add(key)
                known[key] = value
            else:
                known[key] = value | (former & _PARENT)
            above = self._known[parent & _SHARDS - 1]
            if (former := above.get(parent)) is not None and not former & _PARENT:
                above[parent] = former | _PARENT

    def used(self, now: float, key: int) -> None:
        """Note that a lookup has used the prefix that ends with this chunk."""
        known = self._known[key & _SHARDS - 1]
        value = known.get(key)
        if value is not None:
            known[key] = value & (1 << _USED_AT) - 1 | _tenths(now) << _USED_AT

    def evicted(self, now: float, space: int, hashes: bytes, wanted_by: int) -> None:
        """Note that these chunks of a space were evicted for the space `wanted_by`.

        Only the last chunk of a prefix knows when the prefix was used. It is evicted first, and those before it follow: in
        the order in which chunks are evicted, their last uses never go back (LRU). So a chunk's last use is the latest so far.
        """
        latest, tables, last, kept = self._latest.get(space, 0), self._known, _SHARDS - 1, _PARENT
        value = (fresh := self._value(now, EVICTED, wanted_by)) | latest << _USED_AT
        for key in keys_of(hashes):
            known = tables[key & last]
            former = known.get(key)
            if former is None:
                self._add(key)
                known[key] = value
                continue
            if former & 3 == STORED and former >> _USED_AT > latest:
                latest = former >> _USED_AT
                value = fresh | latest << _USED_AT
            known[key] = value | (former & kept)
        self._latest[space] = latest

    def lost(self, now: float, hashes: bytes) -> None:
        """Note that these chunks were not stored after all."""
        value, clears = self._value(now, LOST), self._clears & _CLEARS
        for key in keys_of(hashes):
            former = self._known[key & _SHARDS - 1].get(key)
            if former is None or former & 3 != STORED or former >> _CLEARS_AT & _CLEARS != clears:
                self._put(key, value)

    def cleared(self, now: float) -> None:
        """Note that L1 was emptied."""
        self._clears += 1
        self._cleared_at[self._clears] = now
        self._cleared_at.pop(self._clears - _CLEARS + 1, None)

    def _value(self, now: float, state: int, wanted_by: int = -1, used: float = 0.0) -> int:
        times = _tenths(used) << _USED_AT | _tenths(now) << _WHEN_AT
        return times | (self._clears & _CLEARS) << _CLEARS_AT | (wanted_by + 1 & _SPACES) << _SPACE_AT | state

    def _put(self, key: int, value: int) -> None:
        known = self._known[key & _SHARDS - 1]
        former = known.get(key)
        if former is None:
            self._add(key)
        known[key] = value | ((former or 0) & _PARENT)

    def _add(self, key: int) -> None:
        """Make a place for a new key; the oldest one loses its place if the memory is full."""
        if len(self._ring) < self.most:
            self._ring.append(key)
            return
        oldest, self._ring[self._next] = self._ring[self._next], key
        self._known[oldest & _SHARDS - 1].pop(oldest, None)
        self._next = (self._next + 1) % self.most


def _tenths(seconds: float) -> int:
    return int(seconds * _TENTH) & _TIMES


def keys_of(hashes: bytes) -> array[int]:
    """Return the key of each of these 16-byte hashes: its first eight bytes as a number."""
    return array("Q", hashes)[::2]
