"""The index of L1 inserts, touches and evicts the chunks of all spaces, and frees their extents.

`cache.heart` decides which process may read or fill which extents.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lmcache.cache.allocator import Allocator, Space, in_use
from lmcache.cache.claims import Refusal
from lmcache.cache.events import By, Event, Events
from lmcache.cache.table import EMPTY, Table
from lmcache.chunks import HASH_BYTES, Split, split_hashes
from lmcache.memory.slabs import NO_EXTENT, Slabs
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
MAX_SPACES = 1024
MAX_SISTERS = 8
"""The most sisters of a space: in the worst case a lookup looks for all of its chunks in each of them."""
_NO_PARENT = bytes(HASH_BYTES)


class Index:
    """All spaces of an arena of `total_bytes`. `new_table` makes the table of a space from its number of shards,
    and `group_table` does so for a group of a model with several kinds of KV."""

    def __init__(
        self, total_bytes: int, new_table: Callable[[int], Table], group_table: Callable[[int], Table] | None = None
    ) -> None:
        self.total_bytes = total_bytes
        self.events = Events()
        self._new_table, self._group_table = new_table, group_table or new_table
        self._allocator = Allocator(total_bytes, self._evict)
        self._evicted: defaultdict[tuple[str, int], tuple[list[bytes], list[float | None]]]
        self._evicted = defaultdict(lambda: ([], []))
        """(kind of event, space) -> hashes and times of last use of the chunks that the current reservation has evicted. Hashes
        are empty, and times are missing, if no listener needs them."""
        self.fleeting_tiers: set[str] = set()
        """Tiers whose chunks are let go after their use (`cache.letting_go`)."""
        self._fleeting: dict[tuple[int, bytes], bool] = {}
        """(space, chunk hash) of each chunk in the index that came from such a tier -> whether an engine has read it."""
        self._spaces: dict[int, Space] = {}
        self._space_of: dict[tuple[bytes, int], Space] = {}
        self._next_space = 0

    # State

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    def space(self, number: int) -> Space | None:
        return self._spaces.get(number)

    def named(self, fingerprint: bytes, shards: int) -> Space | None:
        return self._space_of.get((fingerprint, shards))

    @property
    def slabs(self) -> Slabs:
        """The map of the arena. Callers must not change it."""
        return self._allocator.slabs

    @property
    def chunks(self) -> int:
        """How many chunks are in the index, including those that are being filled."""
        return sum(len(space.table) for space in self._spaces.values())

    def used_bytes(self) -> int:
        """Return the bytes of extents that hold shards or are being filled."""
        return self._allocator.used_bytes()

    # Spaces

    def _new_space(
        self, fingerprint: bytes, shards: int, reach_chunks: int, share: float, family: bytes, split: Split | None
    ) -> Space:
        if len(self._spaces) >= MAX_SPACES:
            raise Refusal(f"{MAX_SPACES} layouts are open already: close some engines, or clear the cache")
        number, self._next_space = self._next_space, self._next_space + 1
        if family and not self._make_place(family):
            family, split = b"", None
        table = self._new_empty(shards, reach_chunks, share)
        space = Space(
            *(number, fingerprint, shards, table, [-1] * shards, [0] * shards, reach_chunks),
            split=split,
            family=family,
            share=share,
        )
        self._space_of[fingerprint, shards] = self._spaces[number] = space
        self._note_family(family)
        return space

    def _new_empty(self, shards: int, reach_chunks: int, share: float) -> Table:
        """Return an empty table. A hit needs what all groups of a model have, and a policy that judges each group by itself would
        keep in one what it evicts in another."""
        grouped = reach_chunks > 0 or share < 1
        return (self._group_table if grouped else self._new_table)(shards)

    def settle(self, space_number: int) -> None:
        """Do what the space's order of eviction has put off until nobody waits."""
        space = self._spaces.get(space_number)
        if space is not None:
            space.table.settle()

    def _make_place(self, family: bytes) -> bool:
        """Return whether one more space can join this family. From a full one the oldest space that no engine uses goes."""
        members = [one for one in self._spaces.values() if one.family == family]
        if len(members) <= MAX_SISTERS:
            return True
        idle = next((one for one in members if not one.instances), None)
        if idle is not None:
            self._leave_family(idle)
        self.events.counters["spaces_without_sisters"] += 1
        logger.warning(
            "%d splits of one model are open (parallel sizes): engines load no KV across more, so %s shares none with them",
            *(len(members), "the newest one" if idle is None else "the oldest one that no engine uses"),
        )
        return idle is not None

    def _note_family(self, family: bytes) -> None:
        """Tell the spaces of a family who their sisters are."""
        members = [one for one in self._spaces.values() if family and one.family == family]
        for space in members:
            space.sisters = tuple(one for one in members if one is not space)

    def _leave_family(self, space: Space) -> None:
        family, space.family, space.split, space.sisters = space.family, b"", None, ()
        self._note_family(family)

    def _open_shard(self, space: Space, shard: int, shard_bytes: int) -> None:
        if shard_bytes < 1:
            raise Refusal(f"shard {shard} has {shard_bytes} bytes: a shard has at least 1 byte")
        if space.shard_bytes[shard] not in (0, shard_bytes):
            raise Refusal(f"shard {shard} is registered with {space.shard_bytes[shard]} bytes, not {shard_bytes}")
        if not space.shard_bytes[shard]:
            self._allocator.open(space, shard, shard_bytes)

    def _close_spaces(self) -> None:
        """Remove spaces that no engine uses and that have no extent in use. An engine uses the sisters of its spaces, too: it
        reads what tiers have of them."""
        for space in [one for one in self._spaces.values() if not in_use(one) and not len(one.table)]:
            if not self._allocator.used_by(space):
                self._allocator.close(space)
                del self._spaces[space.number], self._space_of[space.fingerprint, space.shards]
                self._leave_family(space)
                for one in self._spaces.values():
                    one.main = None if one.main is space else one.main

    def _complete_keys(self, space: Space) -> bytes:
        """Return the hashes of the space's complete chunks, or nothing if no listener needs the hashes of cleared chunks."""
        if "cleared" not in self.events.named:
            return b""
        stored = array("I", space.table.in_sectors(0, NO_EXTENT))
        return b"".join(space.table.key(one) for one in stored if space.table.complete(one))

    # Inserting and touching

    def _fill_chain(
        self, now: float, space: Space, shard: int, parent: int, hashes: bytes
    ) -> tuple[list[int], list[int]]:
        """Begin to fill this shard of the chunks. Returns the ids that are filled, and the sector of each chunk until allocation
        fails; NO_EXTENT if the chunk's shard is stored or being filled already."""
        table = space.table
        keys = split_hashes(hashes)
        known = [number for number in map(table.get, keys) if number >= 0]
        # Touch the known chunks first, so that the new chunks evict others.
        self._touch_path(now, space, known if parent < 0 else [parent, *known])
        ids: list[int] = []
        sectors: list[int] = []
        path = [parent] if parent >= 0 else []
        above = len(path)
        if path:
            table.pin(pack_ids(path))
        for key in keys:
            number = table.get(key)
            if number >= 0:
                table.pin(number.to_bytes(4, "little"))
                path.append(number)
            sector = NO_EXTENT
            if number < 0 or table.state(number, shard) == EMPTY:
                found = self._allocator.find(space, shard)
                if found is None:
                    break
                sector = found
            if number < 0:
                number = table.insert(key, parent)
                table.pin(number.to_bytes(4, "little"))
                path.append(number)
            if sector != NO_EXTENT:
                table.begin_fill(number, shard, sector)
                ids.append(number)
            sectors.append(sector)
            parent = -1 if space.reach_chunks else number
        table.unpin(pack_ids(path))
        self._touch_path(now, space, path[: above + len(sectors)])
        return ids, sectors

    def _touch_path(self, now: float, space: Space, path: list[int]) -> None:
        """Touch consecutive chunks and all ancestors of the first one."""
        if path:
            self._touch(now, space, pack_ids(path))
            if not space.reach_chunks:
                space.table.touch_path(path[0])
            if self.events.timed:
                above = path[0]
                while (above := space.table.parent(above)) >= 0:
                    space.last_used[above] = now

    def _touch(self, now: float, space: Space, ids: bytes) -> None:
        """Update the order of use, and the times of use if a listener needs them. In a space with a reach, the last chunk becomes
        the most recently used one, because more of the prefixes that are yet to come need it."""
        space.table.touch(pack_ids(list(array("I", ids))[::-1]) if space.reach_chunks else ids)
        if self.events.timed:
            space.last_used.update(dict.fromkeys(array("I", ids), now))

    # Evicting

    def _evict(self, space: Space, record: int) -> array[int]:
        """Remove an idle chunk and its descendants from the index, and free their extents. Returns their records."""
        table = space.table
        ids = table.detach(record)
        gone = array("I", ids)
        complete = [one for one in gone if table.complete(one)]
        space.complete -= len(complete)
        if self._fleeting:
            for one in complete:
                self._fleeting.pop((space.number, table.key(one)), None)
        self._collect("evicted", space, complete)
        if len(complete) < len(gone):
            begun = [one for one in gone if not table.complete(one) and _holds(table, one, space.shards)]
            self._collect("incomplete", space, begun)
        self._free(space, table, ids)
        return gone

    def _collect(self, kind: str, space: Space, records: list[int]) -> None:
        """Add evicted chunks to the event of this kind that `_emit_evicted` emits."""
        hashes, last_used = self._evicted[kind, space.number]
        hashes += map(space.table.key, records) if kind in self.events.named else [b""] * len(records)
        if self.events.timed:
            last_used += [space.last_used.pop(one, None) for one in records]

    def _emit_evicted(self, by: By, wanted_by: int, reason: str = "room") -> None:
        """Emit one event for each kind and space of the chunks that were evicted for this reason: by a reservation of the space
        `wanted_by`, or after their use (-1)."""
        if not self._evicted:
            return
        for (kind, space), (hashes, last_used) in self._evicted.items():
            detail = partial(Event._replace, hashes=b"".join(hashes), wanted_by=wanted_by, last_used=tuple(last_used))
            self.events.emit(kind, space, len(hashes), reason, by, detail)
        self._evicted.clear()

    def _free(self, space: Space, table: Table, ids: bytes) -> None:
        """Free detached records that no process touches, and their extents."""
        sectors = array("I", table.extents(ids))
        self._allocator.free(space, sectors)
        self._note_freed(sectors)
        for one in array("I", ids):
            table.free(one)

    def _remove_bare(self, space: Space, table: Table, record: int) -> None:
        """Remove the chunk from the index if none of its shards is stored or being filled, and then its ancestors likewise."""
        while record >= 0 and self._is_bare(table, record, space.shards):
            parent = table.parent(record)
            self._free(space, table, table.detach(record))
            record = parent

    @staticmethod
    def _is_bare(table: Table, record: int, shards: int) -> bool:
        """Return whether removing the chunk would lose no shard, no descendant and no lease."""
        idle = table.attached(record) and not table.pins(record) and not table.children(record)
        return idle and not _holds(table, record, shards)

    def _why_missed(self, spaces: Sequence[Space], hashes: bytes, chunks: int) -> str:
        """Return why the first chunk after a hit is missing: in the first of these spaces that lacks it."""
        key = hashes[chunks * HASH_BYTES : (chunks + 1) * HASH_BYTES]
        for one in spaces:
            missing = one.table.get(key)
            if missing < 0:
                return "absent"
            if not one.table.complete(missing):
                return "being filled" if one.table.filling(missing) else "incomplete"
        return "other groups"  # all spaces have this chunk, and one of them lacks a chunk that its window reaches

    def indexed(self, space_number: int, hashes: bytes, first: int) -> tuple[str, int]:
        """Return how many of these chunks, from number `first` on, the space's index holds, complete or not, and why the first of
        them is not complete: being filled or incomplete; "" if it is complete, or not in the index."""
        space, end = self._spaces.get(space_number), len(hashes) // HASH_BYTES
        if space is None:
            return "", 0
        get = space.table.get

        def lacks(chunk: int) -> bool:
            return get(hashes[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES]) < 0

        if first >= end or lacks(first):
            return "", 0
        # A chunk is in the index only with the one before it.
        count = bisect_left(range(end), True, lo=first + 1, key=lacks) - first
        why = self._why_missed([space], hashes, first)
        return "" if why == "other groups" else why, count

    def _note_freed(self, sectors: Iterable[int]) -> None:
        """Record that the extents at these sectors hold no shard any more and may be reused. NO_EXTENT entries are skipped."""


def pack_ids(numbers: list[int]) -> bytes:
    return array("I", numbers).tobytes()


def _holds(table: Table, record: int, shards: int) -> bool:
    """Return whether any shard of the record is stored or being filled."""
    return any(table.state(record, shard) != EMPTY for shard in range(shards))


def names_of(table: Table, records: list[int]) -> tuple[bytes, bytes]:
    """Return (hashes, hashes of the parents) of attached records, 16 bytes each; zeros for no parent."""
    parents = [table.key(one) if one >= 0 else _NO_PARENT for one in map(table.parent, records)]
    return b"".join(map(table.key, records)), b"".join(parents)


def of_records(event: Event, table: Table, records: Iterable[int]) -> Event:
    return event._replace(hashes=b"".join(map(table.key, records)))


def of_new(event: Event, table: Table, records: list[int]) -> Event:
    hashes, parents = names_of(table, records)
    return event._replace(hashes=hashes, parents=parents)


def of_last(event: Event, hashes: bytes) -> Event:
    """Add the last of these hashes to the event, one for each of its chunks."""
    return event._replace(hashes=hashes[-HASH_BYTES * event.chunks :])


def of_lookup(event: Event, prompt: bytes, first: int) -> Event:
    """Add to the event of a lookup its chunks, from chunk `first` of the prompt on."""
    return event._replace(hashes=prompt[first * HASH_BYTES : (first + event.chunks) * HASH_BYTES])
