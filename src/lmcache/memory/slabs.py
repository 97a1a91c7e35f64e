"""The assignment of the arena to spaces: regions are cut from free memory, extents are cut from regions.

All extents of a *space* have one size. (The allocator opens a space here for each class of extents, so one space of the cache
may be several spaces of this module.) The space owns *regions*, each of which consists of adjacent extents. It allocates the
free extent with the lowest address, so that memory which has been used before is used again before memory that the kernel would
have to provide first. Sizes are counted in sectors of 4096 bytes, and a region has no unused sectors. A *hole* is a run of
sectors that belong to no region. Only holes that are smaller than an extent are lost. When no hole is large enough for a space
that needs memory, `window` chooses the regions of other spaces to empty.

There is no Python object for an extent: a region keeps one byte for each extent up to the highest one that it has ever
allocated. This module does the accounting only and never touches the arena's memory.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Set

SECTOR_BYTES = 4096
NO_EXTENT = 2**32 - 1
"""In place of an extent's first sector: there is no extent. All sector numbers are smaller, so they fit in 32 bits."""

# A region should be large, so that there are few of them, and small beside the arena, so that several spaces can share it.
_REGION_BYTES = 64 << 20
_REGION_PART = 64
_REGION_PART_SMALL_ARENA = 16
_WASTE = 0.03
"""A window wastes little if extents fill all of it but this fraction. The rest at its end would be a hole, which may be lost."""


class Region:
    """Adjacent extents of one space, in sectors [first_sector, end_sector). Only `Slabs` changes it; others may read it."""

    __slots__ = ("_hint", "_taken", "end_sector", "extent_sectors", "extents", "first_sector", "space", "used")

    def __init__(self, space: int, first_sector: int, extent_sectors: int, extents: int) -> None:
        self.space = space
        self.first_sector = first_sector
        self.extent_sectors = extent_sectors
        self.extents = extents
        self.end_sector = first_sector + extents * extent_sectors
        self.used = 0  # extents that are allocated
        self._taken = bytearray()  # one byte for each extent that was ever allocated: 1 allocated, 0 free again
        self._hint = 0  # no extent before this one is free

    def __repr__(self) -> str:
        return f"Region(space={self.space}, sectors={self.first_sector}..{self.end_sector}, used={self.used}/{self.extents})"

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
        if self.used == len(self._taken):
            extent = self.used
            self._taken.append(1)
        else:
            extent = self._taken.find(0, self._hint)
            self._taken[extent] = 1
        self._hint = extent + 1
        self.used += 1
        return self.first_sector + extent * self.extent_sectors

    def _free(self, sector: int) -> None:
        extent, remainder = divmod(sector - self.first_sector, self.extent_sectors)
        if remainder or extent >= len(self._taken) or not self._taken[extent]:
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
    __slots__ = ("extent_sectors", "held", "used", "with_free")

    def __init__(self, extent_sectors: int) -> None:
        self.extent_sectors = extent_sectors
        self.used = 0  # extents that are allocated
        self.held = 0  # sectors of all its regions
        self.with_free: list[int] = []  # first sectors of its regions that have a free extent, ascending


class Slabs:
    """The allocation map of one arena of `total_bytes`, rounded down to complete sectors. The caller numbers the spaces."""

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
        """Add a space, whose extents have `shard_bytes`, rounded up to complete sectors. It holds no memory until `grow`."""
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
        """Return the standard size of a region of this space. `grow` chooses it where free memory allows."""
        extent_sectors = self._space(space).extent_sectors
        return max(1, self._region_sectors // extent_sectors) * extent_sectors * SECTOR_BYTES

    def used_extents(self, space: int) -> int:
        """Return how many extents of the space are allocated."""
        return self._space(space).used

    def extent_sectors(self, space: int) -> int:
        """Return the number of sectors in one extent of the space."""
        return self._space(space).extent_sectors

    # Extents

    def alloc(self, space: int) -> int | None:
        """Allocate the space's lowest free extent and return its first sector; None if it has no free extent (then `grow`)."""
        own = self._space(space)
        if not own.with_free:
            return None
        region = self._regions[own.with_free[0]]
        sector = region._alloc()
        own.used += 1
        if region.used == region.extents:
            del own.with_free[0]
        return sector

    def free(self, space: int, sector: int) -> Region:
        """Free an extent and return its region. Raises ValueError when `sector` begins no allocated extent of that space."""
        own = self._space(space)
        region = self.region_of(sector)
        if region is None or region.space != space:
            raise ValueError(f"sector {sector} is in no region of space {space}; free it with the space it came from")
        was_full = region.used == region.extents
        region._free(sector)
        own.used -= 1
        if was_full:
            bisect.insort(own.with_free, region.first_sector)
        return region

    def vacate(self, space: int, keep: Set[int]) -> None:
        """Free all extents of the space at once, except those whose first sector is in `keep`. Its regions stay its own."""
        own = self._space(space)
        own.used, own.with_free = 0, []
        for region in self.regions(space):
            region._vacate(keep)
            own.used += region.used
            if region.used < region.extents:
                own.with_free.append(region.first_sector)

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
        if not self._holes:
            return None
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
        bisect.insort(own.with_free, sector)
        own.held += region.end_sector - sector
        self._find_holes()
        return region

    def take(self, region: Region) -> None:
        """Make an empty region free memory. Raises ValueError when an extent is allocated or the region is unknown."""
        if self._regions.get(region.first_sector) is not region:
            raise ValueError(f"{region!r} is not a region of this arena; it may have been taken already")
        if region.used:
            raise ValueError(f"{region!r} has extents in use; free them first")
        del self._regions[region.first_sector]
        del self._starts[bisect.bisect_left(self._starts, region.first_sector)]
        own = self._spaces[region.space]
        own.held -= region.end_sector - region.first_sector
        del own.with_free[bisect.bisect_left(own.with_free, region.first_sector)]
        self._find_holes()

    def window(self, space_needing: int, cost: Callable[[Region], float | None], most_bytes: int = 0) -> list[Region]:
        """Choose adjacent regions. Once the caller has emptied and taken them, `grow(space_needing)` succeeds.

        Call this after `grow` has returned None. A window consists of adjacent regions and the holes between and beside them. It
        is large enough for a region of standard size or, where no such window exists, for a single extent. Windows that waste
        little (`_WASTE`) are preferred, and among these the one whose most expensive region costs least. The list is empty if
        no window exists.

        cost: returns the cost of emptying a region, in any unit and of any sign; None for a region that must not be emptied.
        most_bytes: a window may have more regions than it needs, up to so many bytes of them, where it then wastes less.
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
            chosen: list[Region] = []
            highest_cost, emptied = 0.0, 0
            for _, end, region in itertools.islice(parts, first, None):
                if region is not None:
                    region_cost = costs[region.first_sector]
                    enough = region.first_sector - start >= need_sectors
                    if region_cost is None or (enough and emptied + end - region.first_sector > most_sectors):
                        break
                    chosen.append(region)
                    highest_cost = max(highest_cost, region_cost) if emptied else region_cost
                    emptied += end - region.first_sector
                length = end - start
                if length >= need_sectors:
                    total = length % extent_sectors > _WASTE * length, highest_cost, emptied
                    if best_cost is None or total < best_cost:
                        best, best_cost = list(chosen), total
        return best

    def _by_address(self) -> Iterator[tuple[int, int, Region | None]]:
        """Yield all holes and regions by address as (first sector, end sector, region or None). Together they cover the arena."""
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
