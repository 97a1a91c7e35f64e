"""The assignment of the arena to spaces: regions are cut from free memory, extents are cut from regions.

All extents of a *space* have one size. The space owns *regions*, each an integral number of adjacent extents, and allocates
the extent with the lowest address first, so that memory which was touched (and faulted in) before is reused before memory that
never was. All sizes are counted in sectors of 4096 bytes and are exact: a region wastes nothing, and only holes between regions
that are smaller than an extent are lost. `window` names the regions to empty when another space needs memory and no hole of free
memory is large enough.

There is no Python object for an extent: a region keeps one byte for each extent that it ever handed out, and a frontier behind
them. This module does bookkeeping only and never touches the arena's memory.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Set

SECTOR_BYTES = 4096
NO_EXTENT = 2**32 - 1
"""Stands for no extent where an extent is named by its first sector. Sector numbers are u32 below this value."""

# A region should be large, so that there are few of them, and small beside the arena, so that several spaces can share it.
_REGION_BYTES = 64 << 20
_REGION_PART = 64
_REGION_PART_SMALL_ARENA = 16
_WASTE = 0.03
"""Largest fraction of a window that may be left over at its end; what is left over is lost between regions."""


class Region:
    """Adjacent extents of one space, in sectors [first_sector, end_sector). Callers may read it; only `Slabs` changes it."""

    __slots__ = ("_hint", "_taken", "extent_sectors", "extents", "first_sector", "space", "used")

    def __init__(self, space: int, first_sector: int, extent_sectors: int, extents: int) -> None:
        self.space = space
        self.first_sector = first_sector
        self.extent_sectors = extent_sectors
        self.extents = extents
        self.used = 0  # extents in use
        self._taken = bytearray()  # one byte for each extent before the frontier: 1 in use, 0 free again
        self._hint = 0  # no extent below this one is free

    def __repr__(self) -> str:
        return f"Region(space={self.space}, sectors={self.first_sector}..{self.end_sector}, used={self.used}/{self.extents})"

    @property
    def end_sector(self) -> int:
        return self.first_sector + self.extents * self.extent_sectors

    @property
    def bytes(self) -> int:
        return self.extents * self.extent_sectors * SECTOR_BYTES

    @property
    def used_bytes(self) -> int:
        return self.used * self.extent_sectors * SECTOR_BYTES

    def sectors_in_use(self) -> list[int]:
        """Return the first sector of each extent in use, ascending."""
        return [
            self.first_sector + extent * self.extent_sectors
            for extent in itertools.compress(range(self.extents), self._taken)
        ]

    def _alloc(self) -> int:
        frontier = len(self._taken)
        if self.used == frontier:
            extent = frontier
            self._taken.append(1)
        else:
            extent = self._taken.find(0, self._hint)
            self._taken[extent] = 1
        self._hint = extent + 1
        self.used += 1
        return self.first_sector + extent * self.extent_sectors

    def _free(self, sector: int) -> None:
        extent, odd = divmod(sector - self.first_sector, self.extent_sectors)
        if odd or extent >= len(self._taken) or not self._taken[extent]:
            raise ValueError(f"sector {sector} does not begin an extent in use of {self!r}; free each extent once")
        self._taken[extent] = 0
        self._hint = min(self._hint, extent)
        self.used -= 1

    def _vacate(self, keep: Set[int]) -> None:
        kept = [sector for sector in self.sectors_in_use() if sector in keep] if keep else []
        self._taken = bytearray(len(self._taken))
        self._hint, self.used = 0, len(kept)
        for sector in kept:
            self._taken[(sector - self.first_sector) // self.extent_sectors] = 1


class _Space:
    __slots__ = ("extent_sectors", "held", "room", "used")

    def __init__(self, extent_sectors: int) -> None:
        self.extent_sectors = extent_sectors
        self.used = 0  # extents
        self.held = 0  # sectors
        self.room: list[int] = []  # first sectors of its regions that have a free extent, ascending


class Slabs:
    """The allocation map of one arena of `total_bytes`, rounded down to complete sectors."""

    def __init__(self, total_bytes: int) -> None:
        sectors = total_bytes // SECTOR_BYTES
        if not 0 < sectors <= NO_EXTENT:
            raise ValueError(f"an arena of {total_bytes} bytes is impossible; give between 4 KiB and 16 TiB")
        self.total_bytes = sectors * SECTOR_BYTES
        small = self.total_bytes // _REGION_PART_SMALL_ARENA
        self._region_sectors = min(max(_REGION_BYTES, self.total_bytes // _REGION_PART), small) // SECTOR_BYTES
        self._spaces: dict[int, _Space] = {}
        self._regions: dict[int, Region] = {}  # by first sector
        self._starts: list[int] = []  # first sectors of all regions, ascending
        self._holes = [(0, sectors)]  # what `holes` returns, found anew when a region is cut or taken

    @property
    def free_bytes(self) -> int:
        """Bytes of the arena that belong to no region."""
        return self.total_bytes - sum(own.held for own in self._spaces.values()) * SECTOR_BYTES

    def holes(self) -> list[tuple[int, int]]:
        """Return the runs of free sectors as (first sector, end sector), ascending."""
        return list(self._holes)

    # Spaces

    def open(self, space: int, shard_bytes: int) -> None:
        """Add a space, whose extents are `shard_bytes` rounded up to complete sectors. It holds no memory until `grow`."""
        if space in self._spaces:
            raise ValueError(f"space {space} is already open; close it first")
        if shard_bytes < 1:
            raise ValueError(f"an extent of {shard_bytes} bytes is not possible; give at least 1")
        self._spaces[space] = _Space(-(-shard_bytes // SECTOR_BYTES))

    def close(self, space: int) -> None:
        """Remove a space that holds no region. Raises ValueError when it holds one."""
        held = self.held_bytes(space)
        if held:
            raise ValueError(f"space {space} still holds {held} bytes; empty its regions and take them first")
        del self._spaces[space]

    def regions(self, space: int) -> list[Region]:
        """Return the space's regions by ascending address."""
        self._space(space)
        return [region for region in map(self._regions.__getitem__, self._starts) if region.space == space]

    def held_bytes(self, space: int) -> int:
        """Return the bytes of all regions of the space, used or not."""
        return self._space(space).held * SECTOR_BYTES

    def region_bytes(self, space: int) -> int:
        """Return the standard size of a region of this space, which `grow` takes where free memory allows."""
        extent_sectors = self._space(space).extent_sectors
        return max(1, self._region_sectors // extent_sectors) * extent_sectors * SECTOR_BYTES

    def used_extents(self, space: int) -> int:
        return self._space(space).used

    def extent_sectors(self, space: int) -> int:
        """Return the number of sectors in one extent of the space."""
        return self._space(space).extent_sectors

    # Extents

    def alloc(self, space: int) -> int | None:
        """Take the space's lowest free extent and return its first sector; None when there is none (then call `grow`)."""
        own = self._space(space)
        if not own.room:
            return None
        region = self._regions[own.room[0]]
        sector = region._alloc()
        own.used += 1
        if region.used == region.extents:
            del own.room[0]
        return sector

    def free(self, space: int, sector: int) -> Region:
        """Free an extent and return its region. Raises ValueError when `sector` begins no extent in use of that space."""
        own = self._space(space)
        region = self.region_of(sector)
        if region is None or region.space != space:
            raise ValueError(f"sector {sector} is in no region of space {space}; free it with the space it came from")
        was_full = region.used == region.extents
        region._free(sector)
        own.used -= 1
        if was_full:
            bisect.insort(own.room, region.first_sector)
        return region

    def vacate(self, space: int, keep: Set[int]) -> None:
        """Free all extents of the space at once, except those whose first sector is in `keep`."""
        own = self._space(space)
        own.used, own.room = 0, []
        for region in self.regions(space):
            region._vacate(keep)
            own.used += region.used
            if region.used < region.extents:
                own.room.append(region.first_sector)

    # Regions

    def region_of(self, sector: int) -> Region | None:
        """Return the region that contains a sector, or None when the sector is free or outside the arena."""
        at = bisect.bisect_right(self._starts, sector) - 1
        if at < 0:
            return None
        region = self._regions[self._starts[at]]
        return region if sector < region.end_sector else None

    def grow(self, space: int) -> Region | None:
        """Give the space one more region of free memory. Return None when no hole is large enough for one of its extents.

        The lowest hole that can hold a region of standard size is used, else the largest hole. The region takes all extents
        of the hole when the rest would be too small for another region of standard size.
        """
        own = self._space(space)
        extents = max(1, self._region_sectors // own.extent_sectors)
        sector, sectors = 0, own.extent_sectors - 1
        for start, end in self._holes:
            if end - start > sectors:
                sector, sectors = start, end - start
                if sectors >= extents * own.extent_sectors:
                    break
        hole_extents = sectors // own.extent_sectors
        if not hole_extents:
            return None
        region = Region(space, sector, own.extent_sectors, extents if hole_extents >= 2 * extents else hole_extents)
        self._regions[sector] = region
        bisect.insort(self._starts, sector)
        bisect.insort(own.room, sector)
        own.held += region.end_sector - sector
        self._find_holes()
        return region

    def take(self, region: Region) -> None:
        """Return an empty region to free memory. Raises ValueError when it is in use or not a region of this arena."""
        if self._regions.get(region.first_sector) is not region:
            raise ValueError(f"{region!r} is not a region of this arena; it may have been taken already")
        if region.used:
            raise ValueError(f"{region!r} has extents in use; free them first")
        del self._regions[region.first_sector]
        del self._starts[bisect.bisect_left(self._starts, region.first_sector)]
        own = self._spaces[region.space]
        own.held -= region.end_sector - region.first_sector
        del own.room[bisect.bisect_left(own.room, region.first_sector)]
        self._find_holes()

    def window(self, space_needing: int, cost: Callable[[Region], float | None], most_bytes: int = 0) -> list[Region]:
        """Choose the adjacent regions to empty and take so that `grow(space_needing)` succeeds.

        Windows that leave little behind that is too small for an extent are preferred; among these the one whose most expensive
        region costs least. A region whose cost is None is never chosen. The window is large enough for a region of standard
        size, or for a single extent where that is impossible; it may grow to `most_bytes` of regions where that wastes less.
        The list is empty when no window exists, or when free memory is already large enough.
        """
        costs = {start: cost(region) for start, region in self._regions.items()}
        extent_sectors = self._space(space_needing).extent_sectors
        for need in (self.region_bytes(space_needing) // SECTOR_BYTES, extent_sectors):
            best = self._cheapest(need, extent_sectors, most_bytes // SECTOR_BYTES, costs)
            if best is not None:
                return best
        return []

    def _cheapest(
        self, need_sectors: int, extent_sectors: int, most_sectors: int, costs: Mapping[int, float | None]
    ) -> list[Region] | None:
        """Return the cheapest window of at least `need_sectors` sectors; it may be longer where that wastes less."""
        best: list[Region] | None = None
        best_cost: tuple[bool, float, int] | None = None
        parts = list(self._by_address())
        for first, (start, _, _) in enumerate(parts):
            named: list[Region] = []
            dearest, emptied = 0.0, 0
            for _, end, region in itertools.islice(parts, first, None):
                if region is not None:
                    price = costs[region.first_sector]
                    enough = region.first_sector - start >= need_sectors
                    if price is None or (enough and emptied + end - region.first_sector > most_sectors):
                        break
                    named.append(region)
                    dearest, emptied = max(dearest, price) if emptied else price, emptied + end - region.first_sector
                length = end - start
                if length >= need_sectors:
                    total = length % extent_sectors > _WASTE * length, dearest, emptied
                    if best_cost is None or total < best_cost:
                        best, best_cost = list(named), total
        return best

    def _by_address(self) -> Iterator[tuple[int, int, Region | None]]:
        """Yield holes and regions by address as (first sector, end sector, region or None). Together they are the arena."""
        items: list[tuple[int, int, Region | None]] = [(start, end, None) for start, end in self._holes]
        items += [(region.first_sector, region.end_sector, region) for region in self._regions.values()]
        return iter(sorted(items, key=lambda item: item[0]))

    def _find_holes(self) -> None:
        starts = [0, *(self._regions[start].end_sector for start in self._starts)]
        ends = [*self._starts, self.total_bytes // SECTOR_BYTES]
        self._holes = [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]

    def _space(self, space: int) -> _Space:
        found = self._spaces.get(space)
        if found is None:
            raise ValueError(f"space {space} is not open; open it first")
        return found
