"""The index of L1: the spaces with their tables, the extents of their chunks, and what happens to both.

Who may read or fill what is decided in `cache.heart`; here chunks come, are touched, and go.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from lmcache.cache.allocator import Allocator, Space
from lmcache.cache.claims import Refusal
from lmcache.cache.events import NOBODY, By, Event, Events
from lmcache.cache.table import EMPTY, Table
from lmcache.chunks import HASH_BYTES
from lmcache.memory.slabs import NO_EXTENT, Slabs

MAX_SPACES = 1024


class Index:
    """All spaces of an arena of `total_bytes`. `new_table` makes the index of a space with so many shards."""

    def __init__(self, total_bytes: int, new_table: Callable[[int], Table]) -> None:
        self.total_bytes = total_bytes
        self.events = Events()
        self._new_table = new_table
        self._allocator = Allocator(total_bytes, self._evict)
        self._room_for: tuple[By, int] = NOBODY, -1
        """Who reserves, in which space: whom the next eviction is for."""
        self._spaces: dict[int, Space] = {}
        self._space_of: dict[tuple[bytes, int], Space] = {}
        self._next_space = 0

    # What there is

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    def space(self, number: int) -> Space | None:
        return self._spaces.get(number)

    @property
    def slabs(self) -> Slabs:
        """The map of the arena; for looking only."""
        return self._allocator.slabs

    @property
    def chunks(self) -> int:
        """Chunks in the index, those being filled included."""
        return sum(len(space.table) for space in self._spaces.values())

    def used_bytes(self) -> int:
        """Bytes of extents that hold something or are being filled."""
        return self._allocator.used_bytes()

    # Spaces

    def _new_space(self, fingerprint: bytes, shards: int) -> Space:
        if len(self._spaces) >= MAX_SPACES:
            raise Refusal(f"{MAX_SPACES} layouts are open already: close some engines, or clear the cache")
        number, self._next_space = self._next_space, self._next_space + 1
        space = Space(number, fingerprint, shards, self._new_table(shards), [-1] * shards, [0] * shards)
        self._space_of[fingerprint, shards] = self._spaces[number] = space
        return space

    def _open_shard(self, space: Space, shard: int, shard_bytes: int) -> None:
        if shard_bytes < 1:
            raise Refusal(f"extent size {shard_bytes} of shard {shard} makes no sense")
        if space.shard_bytes[shard] not in (0, shard_bytes):
            raise Refusal(f"shard {shard} has extents of {space.shard_bytes[shard]} bytes, not {shard_bytes}")
        if not space.shard_bytes[shard]:
            self._allocator.open(space, shard, shard_bytes)

    def _close_spaces(self) -> None:
        """Forget spaces that no engine uses and that have nothing in memory."""
        for space in [one for one in self._spaces.values() if not one.instances and not len(one.table)]:
            if not self._allocator.used_by(space):
                self._allocator.close(space)
                del self._spaces[space.number], self._space_of[space.fingerprint, space.shards]

    def _complete_keys(self, space: Space) -> bytes:
        """The hashes of the space's complete chunks, where a listener has asked for those that are cleared."""
        if "cleared" not in self.events.named:
            return b""
        there = array("I", space.table.in_sectors(0, NO_EXTENT))
        return b"".join(space.table.key(one) for one in there if space.table.complete(one))

    # Chunks come, and are used

    def _fill_chain(
        self, now: float, space: Space, shard: int, parent: int, hashes: bytes
    ) -> tuple[list[int], list[int]]:
        """Ids that are now being filled, and one sector a chunk until the memory ran out."""
        table = space.table
        keys = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        known = [number for number in map(table.get, keys) if number >= 0]
        # First of all, so that what goes for the new ones is something else.
        self._touch_path(now, space, known if parent < 0 else [parent, *known])
        ids: list[int] = []
        sectors: list[int] = []
        path = [parent] if parent >= 0 else []
        table.pin(pack_ids(path))
        for key in keys:
            number = table.get(key)
            if number >= 0:
                table.pin(pack_ids([number]))
                path.append(number)
            sector = NO_EXTENT  # there, or under way by somebody else
            if number < 0 or table.state(number, shard) == EMPTY:
                found = self._allocator.find(space, shard)
                if found is None:
                    break
                sector = found
            if number < 0:
                number = table.insert(key, parent)
                table.pin(pack_ids([number]))
                path.append(number)
            if sector != NO_EXTENT:
                table.begin_fill(number, shard, sector)
                ids.append(number)
            sectors.append(sector)
            parent = number
        table.unpin(pack_ids(path))
        self._touch_path(now, space, path)
        return ids, sectors

    def _touch_path(self, now: float, space: Space, path: list[int]) -> None:
        """Touch chunks that follow each other, and all before them."""
        if path:
            self._touch(now, space, pack_ids(path))
            space.table.touch_path(path[0])
            if "evicted" in self.events.named:
                above = path[0]
                while (above := space.table.parent(above)) >= 0:
                    space.last_used[above] = now

    def _touch(self, now: float, space: Space, ids: bytes) -> None:
        """The table keeps the order of use; the times are kept only for who has asked for them."""
        space.table.touch(ids)
        if "evicted" in self.events.named:
            space.last_used.update(dict.fromkeys(array("I", ids), now))

    # Chunks go

    def _evict(self, space: Space, record: int) -> array[int]:
        """Take an idle chunk, and what hangs on it, out of the index and out of memory."""
        table = space.table
        ids = table.detach(record)
        gone = array("I", ids)
        whole = [one for one in gone if table.complete(one)]
        space.whole -= len(whole)
        by, wanted_by = self._room_for
        self.events.emit(
            "evicted", space.number, len(whole), "room", by,
            lambda event: of_records(event, table, whole)._replace(
                wanted_by=wanted_by, last_used=tuple(space.last_used.pop(one, None) for one in whole)
            ),
        )  # fmt: skip
        if len(whole) < len(gone):
            begun = [one for one in gone if not table.complete(one) and _holds(table, one, space.shards)]
            self.events.emit(
                "incomplete", space.number, len(begun), "room", by,
                lambda event: of_records(event, table, begun)._replace(wanted_by=wanted_by),
            )  # fmt: skip
        self._free(space, table, ids)
        return gone

    def _free(self, space: Space, table: Table, ids: bytes) -> None:
        """Free detached records that nobody touches, and their extents."""
        sectors = array("I", table.extents(ids))
        self._allocator.free(space, sectors)
        self._note_freed(sectors)
        for one in array("I", ids):
            table.free(one)

    def _remove_bare(self, space: Space, table: Table, record: int) -> None:
        """Take the chunk out of the index if nothing is there of it, and then those before it of which that is true as well."""
        while record >= 0 and self._is_bare(table, record, space.shards):
            parent = table.parent(record)
            self._free(space, table, table.detach(record))
            record = parent

    @staticmethod
    def _is_bare(table: Table, record: int, shards: int) -> bool:
        """Whether nothing would be lost with it."""
        idle = table.attached(record) and not table.pins(record) and not table.children(record)
        return idle and not _holds(table, record, shards)

    def _why_missed(self, space: Space, hashes: bytes, chunks: int) -> str:
        missing = space.table.get(hashes[chunks * HASH_BYTES : (chunks + 1) * HASH_BYTES])
        if missing < 0:
            return "absent"
        return "being filled" if space.table.filling(missing) else "incomplete"

    def _note_freed(self, sectors: Iterable[int]) -> None:
        """The extents at these sectors (`NO_EXTENT` is none) hold nothing of ours any more, and may be given away next."""


def pack_ids(numbers: list[int]) -> bytes:
    return array("I", numbers).tobytes()


def _holds(table: Table, record: int, shards: int) -> bool:
    """Whether any of its shards is there or being filled."""
    return any(table.state(record, shard) != EMPTY for shard in range(shards))


def names_of(table: Table, records: list[int]) -> tuple[bytes, bytes]:
    """(hashes, hashes of the parents) of attached records, 16 bytes each; zeros where there is no parent."""
    parents = [table.parent(one) for one in records]
    return (
        b"".join(map(table.key, records)),
        b"".join(table.key(one) if one >= 0 else bytes(HASH_BYTES) for one in parents),
    )


def of_records(event: Event, table: Table, records: Iterable[int]) -> Event:
    return event._replace(hashes=b"".join(map(table.key, records)))


def of_new(event: Event, table: Table, records: list[int]) -> Event:
    hashes, parents = names_of(table, records)
    return event._replace(hashes=hashes, parents=parents)


def of_last(event: Event, hashes: bytes) -> Event:
    """With as many of these hashes, from the end, as it has chunks."""
    return event._replace(hashes=hashes[-HASH_BYTES * event.chunks :])
