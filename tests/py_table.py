"""The specification of the table: `PyTable` does in plain Python what `lmcache._native.Table` does, and tests compare the two."""

from __future__ import annotations

import bisect
from collections import Counter

from lmcache.cache.table import COMPLETED, DONE, EMPTY, FILLING, RELEASED, pack, unpack
from lmcache.chunks import HASH_BYTES
from lmcache.memory.order import LRU, Policy
from lmcache.memory.slabs import NO_EXTENT

MAX_RECORDS = 2**32 - 1
MAX_SHARDS = 65535
MAX_PINS = 2**32 - 1


class _Record:
    __slots__ = ("attached", "children", "key", "parent", "pins", "sectors", "states")

    def __init__(self, key: bytes, parent: int, shards: int) -> None:
        self.key = key
        self.parent = parent
        self.attached = True
        self.pins = 0
        self.children: dict[int, None] = {}
        self.states = bytearray(shards)
        self.sectors: dict[int, int] = {}  # by shard, for those filling or done

    @property
    def filling(self) -> int:
        return self.states.count(FILLING)

    @property
    def complete(self) -> bool:
        return self.states.count(DONE) == len(self.states)

    @property
    def idle(self) -> bool:
        return not self.pins and not self.filling

    @property
    def evictable(self) -> bool:
        return self.attached and self.idle and not self.children


class PyTable:
    """A table as `lmcache.cache.table` describes it; `_native.pyi` documents each method."""

    def __init__(self, shards: int, policy: Policy | None = None, /) -> None:
        if not 1 <= shards <= MAX_SHARDS:
            raise ValueError(f"{shards} shards a chunk; give 1 to {MAX_SHARDS}")
        self._shards = shards
        self._records: dict[int, _Record] = {}
        self._by_key: dict[bytes, int] = {}
        self._policy = LRU() if policy is None else policy  # of attached records
        self._free: list[int] = []  # ids to reuse, last in, first out
        self._next_id = 1

    def _record(self, record: int) -> _Record:
        found = self._records.get(record)
        if found is None:
            raise ValueError(f"no record has the id {record}; it was freed or never made")
        return found

    def _shard(self, record: int, shard: int) -> _Record:
        found = self._record(record)
        if not 0 <= shard < self._shards:
            raise ValueError(f"shard {shard} is not one of the {self._shards} of this table")
        return found

    # The index

    def match(self, hashes: bytes, /) -> bytes:
        if len(hashes) % HASH_BYTES:
            raise ValueError(f"{len(hashes)} bytes of hashes; each hash takes {HASH_BYTES}")
        found = []
        for start in range(0, len(hashes), HASH_BYTES):
            record = self._by_key.get(hashes[start : start + HASH_BYTES])
            if record is None or not self._records[record].complete:
                break
            found.append(record)
        return pack(found)

    def get(self, key: bytes, /) -> int:
        _check_key(key)
        return self._by_key.get(key, -1)

    def insert(self, key: bytes, parent: int, /) -> int:
        _check_key(key)
        if key in self._by_key:
            raise ValueError(f"hash {key.hex()} is in the table already; get it instead")
        if parent != -1 and not self._record(parent).attached:
            raise ValueError(f"parent {parent} is detached; insert it anew first")
        if not self._free and self._next_id == MAX_RECORDS:
            raise ValueError(f"the table is full: {MAX_RECORDS} records; free some first")
        if self._free:
            record = self._free.pop()
        else:
            record, self._next_id = self._next_id, self._next_id + 1
        self._records[record] = _Record(key, parent, self._shards)
        self._by_key[key] = record
        if parent != -1:
            self._records[parent].children[record] = None
        self._policy.inserted(record, key, max(parent, 0))
        return record

    def detach(self, record: int, /) -> bytes:
        if not self._record(record).attached:
            raise ValueError(f"record {record} is detached already")
        family = [record]
        for member in family:  # grows while it is walked: parents before children, the newest child first
            family.extend(reversed(self._records[member].children))
        parent = self._records[record].parent
        for member in reversed(family):
            found = self._records[member]
            found.attached, found.parent = False, -1
            found.children.clear()
            del self._by_key[found.key]
            self._policy.removed(member)
        if parent != -1:
            del self._records[parent].children[record]
            self._unblock(parent)
        return pack(reversed(family))

    def free(self, record: int, /) -> None:
        found = self._record(record)
        if found.attached or not found.idle:
            raise ValueError(
                f"record {record} cannot be freed yet: "
                f"attached {found.attached}, pins {found.pins}, filling {found.filling}"
            )
        del self._records[record]
        self._free.append(record)

    # The order of eviction

    def touch(self, ids: bytes, /) -> None:
        records = unpack(ids)
        self._policy.touched([one for one in reversed(records) if self._record(one).attached])

    def asked(self, now: float, hashes: bytes, /) -> None:
        if len(hashes) % HASH_BYTES:
            raise ValueError(f"{len(hashes)} bytes of hashes; each hash takes {HASH_BYTES}")
        self._policy.asked(now, hashes)

    def answered(self, now: float, key: bytes, tokens: int, /) -> None:
        _check_key(key)

    def settle(self) -> None:
        pass

    def follows_lru(self) -> bool:
        return isinstance(self._policy, LRU)

    def touch_path(self, record: int, /) -> None:
        if not self._record(record).attached:
            return
        path = [record]
        while (above := self._records[path[-1]].parent) != -1:
            path.append(above)
        self._policy.touched(path)

    def victim(self) -> int:
        row = self._policy.victim(self.evictable)
        if row and not (row in self._records and self.evictable(row)):
            raise ValueError(f"the policy chose record {row} as victim, which is not evictable now")
        return row or -1

    def evictable(self, record: int, /) -> bool:
        return self._record(record).evictable

    def _unblock(self, record: int) -> None:
        """Report the record to the policy if it has become evictable."""
        if self._records[record].evictable:
            self._policy.unblocked(record)

    # Readers and writers

    def pin(self, ids: bytes, /) -> None:
        records = unpack(ids)
        for record in records:
            if self._record(record).pins > MAX_PINS - len(records):
                raise ValueError(f"record {record} has {self._records[record].pins} pins, which is too many")
        for record in records:
            self._records[record].pins += 1

    def unpin(self, ids: bytes, /) -> bytes:
        records = unpack(ids)
        for record, count in Counter(records).items():
            if self._record(record).pins < count:
                raise ValueError(f"record {record} has no pin left to remove; unpin what was pinned, once")
        released = []
        for record in records:
            found = self._records[record]
            found.pins -= 1
            if not found.attached and found.idle:
                released.append(record)
            self._unblock(record)
        return pack(released)

    def begin_fill(self, record: int, shard: int, sector: int, /) -> None:
        found = self._shard(record, shard)
        if not 0 <= sector < NO_EXTENT:
            raise ValueError(f"sector {sector} is out of range; sectors are 0 to {NO_EXTENT - 1}")
        if not found.attached or found.states[shard] != EMPTY:
            raise ValueError(
                f"shard {shard} of record {record} cannot be filled: "
                f"attached {found.attached}, state {found.states[shard]}"
            )
        found.states[shard] = FILLING
        found.sectors[shard] = sector

    def end_fill(self, record: int, shard: int, ok: bool, /) -> int:
        found = self._shard(record, shard)
        if found.states[shard] != FILLING:
            raise ValueError(f"shard {shard} of record {record} is not being filled: state {found.states[shard]}")
        found.states[shard] = DONE if ok else EMPTY
        if not ok:
            del found.sectors[shard]
        if found.attached:
            self._unblock(record)
            return COMPLETED if found.complete else 0
        return RELEASED if found.idle else 0

    # Reading

    def state(self, record: int, shard: int, /) -> int:
        return self._shard(record, shard).states[shard]

    def extent(self, record: int, shard: int, /) -> int:
        return self._shard(record, shard).sectors.get(shard, -1)

    def extents(self, ids: bytes, /) -> bytes:
        shards = range(self._shards)
        sectors = [self._record(record).sectors for record in unpack(ids)]
        return pack(own.get(shard, NO_EXTENT) for own in sectors for shard in shards)

    def in_sectors(self, first_sector: int, end_sector: int, /) -> bytes:
        found = (
            record
            for record in self._by_key.values()
            if any(first_sector <= sector < end_sector for sector in self._records[record].sectors.values())
        )
        return pack(sorted(found))

    def numbered(self, first: int, count: int, /) -> tuple[bytes, int]:
        first = min(max(first, 1), self._next_id)
        end = min(first + max(count, 0), self._next_id)
        found = sorted(record for record in self._by_key.values() if first <= record < end)
        return pack(found), end if end < self._next_id else 0

    def survey(self, bounds: bytes, /) -> bytes:
        edges = unpack(bounds)
        if len(edges) % 2 or list(edges) != sorted(edges):
            raise ValueError(f"{len(edges)} bounds of ranges; give pairs, ascending")
        held: set[int] = set()
        for record in self._by_key.values():
            if not self._records[record].idle:
                while record != -1 and record not in held:
                    held.add(record)
                    record = self._records[record].parent
        found = [0] * len(edges)
        order = list(self._policy)
        if sorted(order) != sorted(self._by_key.values()):
            raise ValueError(f"the policy does not order exactly the {len(self)} attached records")
        for place, record in enumerate(order, 1):
            for sector in self._records[record].sectors.values():
                edge = bisect.bisect_right(edges, sector) - 1
                if edge % 2 == 0:
                    found[edge] += 1
                    found[edge + 1] = NO_EXTENT if record in held else max(place, found[edge + 1])
        return pack(found)

    def key(self, record: int, /) -> bytes:
        return self._record(record).key

    def parent(self, record: int, /) -> int:
        return self._record(record).parent

    def children(self, record: int, /) -> int:
        return len(self._record(record).children)

    def only_child(self, record: int, /) -> int:
        children = self._record(record).children
        return next(iter(children)) if len(children) == 1 else -1

    def pins(self, record: int, /) -> int:
        return self._record(record).pins

    def filling(self, record: int, /) -> int:
        return self._record(record).filling

    def complete(self, record: int, /) -> bool:
        return self._record(record).complete

    def attached(self, record: int, /) -> bool:
        return self._record(record).attached

    def __len__(self) -> int:
        return len(self._by_key)

    def memory_bytes(self) -> int:
        """Estimated, with CPython 3.11."""
        return len(self._records) * (700 + 100 * self._shards) + 4 * len(self._free) + self._policy.memory_bytes()


def _check_key(key: bytes) -> None:
    if len(key) != HASH_BYTES:
        raise ValueError(f"the hash has {len(key)} bytes; a hash has {HASH_BYTES}")
