"""The index of a disk tier: which shards it has, where they lie, and in which order they are evicted.

It takes 56 bytes for each shard in flat arrays (with LRU), and one dict. Each shard has a *row*; rows are numbered from 1. The
dict maps a 60-bit hash of the key to the row, since that takes half the memory of the key itself. The row holds the complete
key, so collisions are detected.
"""

from __future__ import annotations

import sys
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lmcache.memory.order import LRU, Policy

KEY_BYTES = 36
UNIT_BYTES = 64
"""The unit of offsets in places (see `segments`), which therefore fit in 64 bits."""
MAX_PAYLOAD_BYTES = (1 << 32) - 1
RECORD = np.dtype(
    [("key", f"V{KEY_BYTES}"), ("zero", "<u4"), ("payload", "<u8"), ("place", "<u8"), ("tag", "<u8")], align=False
)
"""A shard's record in the journal, 64 bytes."""
Records = npt.NDArray[Any]


def tag_of(key: bytes) -> int:
    """Return 60 bits of xxh3 of the packed key."""
    return xxhash.xxh3_64_intdigest(key) >> 4


class ShardIndex:
    """The index. Not thread-safe, except `find`, which any thread may call; at worst it misses a concurrent change."""

    def __init__(self, records: Records | None = None, policy: Policy | None = None) -> None:
        """records: shards without duplicates, the one to be evicted first at the beginning. policy: decides on that order; LRU
        unless given."""
        if records is None:
            records = np.empty(0, RECORD)
        count = len(records)
        self._rows: dict[int, int] = dict(zip(records["tag"].tolist(), range(1, count + 1), strict=True))
        self._keys = bytearray(KEY_BYTES) + records["key"].tobytes()
        self._payload = array("I", bytes(4)) + _array("I", records["payload"].astype(np.uint32))
        self._place = array("Q", bytes(8)) + _array("Q", records["place"])
        self.order = LRU() if policy is None else policy
        """The policy, which knows the order of eviction of all rows."""
        self.order.restored(count, self.key)
        self._free = array("I")

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: bytes) -> int:
        """Return the row of a packed key, 0 when there is none."""
        row = self._rows.get(tag_of(key), 0)
        return row if row and self.key(row) == key else 0

    def key(self, row: int) -> bytes:
        return bytes(self._keys[row * KEY_BYTES : (row + 1) * KEY_BYTES])

    def payload(self, row: int) -> int:
        """Return the bytes of the shard's payload."""
        return self._payload[row]

    def place(self, row: int) -> int:
        return self._place[row]

    def in_the_way(self, key: bytes) -> int:
        """Return the row to remove before `key` can be inserted: that of the key or of another one with its tag; 0 if none."""
        return self._rows.get(tag_of(key), 0)

    def insert(self, key: bytes, payload: int, place: int) -> int:
        """Add a shard that is not in the index, and return its row."""
        if self._free:
            row = self._free.pop()
            self._keys[row * KEY_BYTES : (row + 1) * KEY_BYTES] = key
            self._payload[row], self._place[row] = payload, place
        else:
            row = len(self._place)
            self._keys += key
            self._payload.append(payload)
            self._place.append(place)
        self.order.inserted(row, key, 0)
        self._rows[tag_of(key)] = row
        return row

    def remove(self, row: int) -> None:
        del self._rows[tag_of(self.key(row))]
        self.order.removed(row)
        self._place[row] = 0
        self._free.append(row)

    def records(self) -> Records:
        """Return the records of all shards, the one to be evicted first at the beginning."""
        rows = np.fromiter(self.order, np.uint32, len(self))
        keys = np.frombuffer(self._keys, f"V{KEY_BYTES}")[rows]
        made = np.zeros(len(rows), RECORD)
        made["key"] = keys
        made["payload"] = np.frombuffer(self._payload, np.uint32)[rows]
        made["place"] = np.frombuffer(self._place, np.uint64)[rows]
        packed = keys.tobytes()
        made["tag"] = [tag_of(packed[at : at + KEY_BYTES]) for at in range(0, len(packed), KEY_BYTES)]
        return made

    def memory_bytes(self) -> int:
        """Return the memory in use, including Python's objects: 32 bytes each for a tag and a row's number."""
        flat = (self._keys, self._payload, self._place, self._free, self._rows)
        return sum(sys.getsizeof(one) for one in flat) + self.order.memory_bytes() + 64 * len(self._rows)


def _array(code: str, values: npt.NDArray[Any]) -> array[int]:
    made: array[int] = array(code)
    made.frombytes(np.ascontiguousarray(values).tobytes())
    return made
