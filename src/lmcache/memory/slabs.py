"""Which part of the arena belongs to which space: regions cut from free memory, slots cut from regions.

All slots of a *space* have one size. It owns *regions*, each a whole number of slots laid end to end, and gives slots
out lowest address first, so that memory which was touched (and faulted in) before is used before memory which never
was. Everything is counted in pages of 4096 bytes and sized exactly: a region wastes nothing, and all that can be lost
is holes between regions that are smaller than a slot. `window` names the regions to empty when another space needs
room and free memory has no hole large enough.

There is no Python object a slot: a region keeps one byte for each slot it ever handed out, and a frontier behind them.
This is bookkeeping only; nothing here touches the memory itself.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Set

PAGE_BYTES = 4096
_MAX_PAGES = 1 << 32  # a page number travels as u32

# A region should be large, so that there are few, and small beside the arena, so that several spaces can share it.
_REGION_BYTES = 64 << 20
_REGION_PART = 64
_REGION_PART_SMALL_ARENA = 16
_WASTE = 0.03
"""Part of a run of pages that may be left over at its end when a window is chosen; the rest is lost between regions."""


class Region:
    """A run of equal slots of one space: pages [first_page, end_page). Read it, but change it through `Slabs` only."""

    __slots__ = ("_hint", "_taken", "first_page", "slot_pages", "slots", "space", "used")

    def __init__(self, space: int, first_page: int, slot_pages: int, slots: int) -> None:
        self.space = space
        self.first_page = first_page
        self.slot_pages = slot_pages
        self.slots = slots
        self.used = 0  # slots in use
        self._taken = bytearray()  # one byte a slot before the frontier: 1 in use, 0 free again
        self._hint = 0  # no slot below this one is free

    def __repr__(self) -> str:
        return f"Region(space={self.space}, pages={self.first_page}..{self.end_page}, used={self.used}/{self.slots})"

    @property
    def end_page(self) -> int:
        return self.first_page + self.slots * self.slot_pages

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_pages * PAGE_BYTES

    @property
    def used_bytes(self) -> int:
        return self.used * self.slot_pages * PAGE_BYTES

    def pages_in_use(self) -> list[int]:
        """The pages of its slots in use, ascending."""
        return [self.first_page + slot * self.slot_pages for slot in itertools.compress(range(self.slots), self._taken)]

    def _alloc(self) -> int:
        frontier = len(self._taken)
        if self.used == frontier:
            slot = frontier
            self._taken.append(1)
        else:
            slot = self._taken.find(0, self._hint)
            self._taken[slot] = 1
        self._hint = slot + 1
        self.used += 1
        return self.first_page + slot * self.slot_pages

    def _free(self, page: int) -> None:
        slot, odd = divmod(page - self.first_page, self.slot_pages)
        if odd or slot >= len(self._taken) or not self._taken[slot]:
            raise ValueError(f"page {page} is not a slot in use of {self!r}; free each slot once")
        self._taken[slot] = 0
        self._hint = min(self._hint, slot)
        self.used -= 1

    def _vacate(self, keep: Set[int]) -> None:
        kept = [page for page in self.pages_in_use() if page in keep] if keep else []
        self._taken = bytearray(len(self._taken))
        self._hint, self.used = 0, len(kept)
        for page in kept:
            self._taken[(page - self.first_page) // self.slot_pages] = 1


class _Space:
    __slots__ = ("held", "room", "slot_pages", "used")

    def __init__(self, slot_pages: int) -> None:
        self.slot_pages = slot_pages
        self.used = 0  # slots
        self.held = 0  # pages
        self.room: list[int] = []  # first pages of its regions that have a free slot, ascending


class Slabs:
    """The map of one arena of `total_bytes` (rounded down to whole pages)."""

    def __init__(self, total_bytes: int) -> None:
        pages = total_bytes // PAGE_BYTES
        if not 0 < pages <= _MAX_PAGES:
            raise ValueError(f"an arena of {total_bytes} bytes is impossible; give between 4 KiB and 16 TiB")
        self.total_bytes = pages * PAGE_BYTES
        small = self.total_bytes // _REGION_PART_SMALL_ARENA
        self._region_pages = min(max(_REGION_BYTES, self.total_bytes // _REGION_PART), small) // PAGE_BYTES
        self._spaces: dict[int, _Space] = {}
        self._regions: dict[int, Region] = {}  # by first page
        self._starts: list[int] = []  # first pages of all regions, ascending
        self._hole_starts: list[int] = [0]  # free runs, ascending, never adjacent
        self._hole_ends: list[int] = [pages]
        self._free_pages = pages

    @property
    def free_bytes(self) -> int:
        """Bytes that belong to no region."""
        return self._free_pages * PAGE_BYTES

    def holes(self) -> list[tuple[int, int]]:
        """The free runs as (first page, end page), ascending."""
        return list(zip(self._hole_starts, self._hole_ends, strict=True))

    # Spaces

    def open(self, space: int, slot_bytes: int) -> None:
        """Make a space known; its slots are `slot_bytes` rounded up to whole pages. It holds no memory until `grow`."""
        if space in self._spaces:
            raise ValueError(f"space {space} is open already; close it first")
        if slot_bytes < 1:
            raise ValueError(f"a slot of {slot_bytes} bytes is impossible; give at least 1")
        self._spaces[space] = _Space(-(-slot_bytes // PAGE_BYTES))

    def close(self, space: int) -> None:
        """Forget a space that holds no region; ValueError otherwise."""
        held = self.held_bytes(space)
        if held:
            raise ValueError(f"space {space} still holds {held} bytes; empty its regions and take them first")
        del self._spaces[space]

    def regions(self, space: int) -> list[Region]:
        """The space's regions by ascending address."""
        self._space(space)
        return [region for region in map(self._regions.__getitem__, self._starts) if region.space == space]

    def held_bytes(self, space: int) -> int:
        """Bytes of all its regions, used or not."""
        return self._space(space).held * PAGE_BYTES

    def region_bytes(self, space: int) -> int:
        """What it gets at once, where free memory allows."""
        slot_pages = self._space(space).slot_pages
        return max(1, self._region_pages // slot_pages) * slot_pages * PAGE_BYTES

    def used_slots(self, space: int) -> int:
        return self._space(space).used

    def slot_pages(self, space: int) -> int:
        """Pages of one of its slots."""
        return self._space(space).slot_pages

    def used_in(self, region: Region) -> int:
        """Slots of this region that are in use."""
        return region.used

    # Slots

    def alloc(self, space: int) -> int | None:
        """The page of the space's lowest free slot, which is in use now; None when it has none (then `grow`)."""
        own = self._space(space)
        if not own.room:
            return None
        region = self._regions[own.room[0]]
        page = region._alloc()
        own.used += 1
        if region.used == region.slots:
            del own.room[0]
        return page

    def free(self, space: int, page: int) -> Region:
        """Give a slot back; the region that it lies in. ValueError when `page` is not a slot in use of that space."""
        own = self._space(space)
        region = self.region_of(page)
        if region is None or region.space != space:
            raise ValueError(f"page {page} is in no region of space {space}; free it with the space it came from")
        was_full = region.used == region.slots
        region._free(page)
        own.used -= 1
        if was_full:
            bisect.insort(own.room, region.first_page)
        return region

    def vacate(self, space: int, keep: Set[int]) -> None:
        """Free all its slots but those at the pages in `keep`, in one go."""
        own = self._space(space)
        own.used, own.room = 0, []
        for region in self.regions(space):
            region._vacate(keep)
            own.used += region.used
            if region.used < region.slots:
                own.room.append(region.first_page)

    # Regions

    def region_of(self, page: int) -> Region | None:
        """The region that a page lies in, or None when it is free memory (or outside the arena)."""
        at = bisect.bisect_right(self._starts, page) - 1
        if at < 0:
            return None
        region = self._regions[self._starts[at]]
        return region if page < region.end_page else None

    def grow(self, space: int) -> Region | None:
        """Give the space one more region out of free memory; None when no hole has room for one of its slots.

        The lowest hole that has room for a region of standard size serves, else the largest. What would remain of it is
        taken along where it is too small for another such region.
        """
        own = self._space(space)
        slots = max(1, self._region_pages // own.slot_pages)
        at = self._hole_for(slots * own.slot_pages, own.slot_pages)
        if at is None:
            return None
        page, hole_slots = self._hole_starts[at], (self._hole_ends[at] - self._hole_starts[at]) // own.slot_pages
        region = Region(space, page, own.slot_pages, slots if hole_slots >= 2 * slots else hole_slots)
        self._shrink_hole(at, region.end_page)
        self._regions[page] = region
        bisect.insort(self._starts, page)
        bisect.insort(own.room, page)
        own.held += region.end_page - page
        return region

    def take(self, region: Region) -> None:
        """Return an empty region to free memory; ValueError when it is in use, or not (or no longer) one of ours."""
        if self._regions.get(region.first_page) is not region:
            raise ValueError(f"{region!r} is not a region of this arena; it may have been taken before")
        if region.used:
            raise ValueError(f"{region!r} has slots in use; free them first")
        del self._regions[region.first_page]
        del self._starts[bisect.bisect_left(self._starts, region.first_page)]
        own = self._spaces[region.space]
        own.held -= region.end_page - region.first_page
        del own.room[bisect.bisect_left(own.room, region.first_page)]
        self._add_hole(region.first_page, region.end_page)

    def window(self, space_needing: int, cost: Callable[[Region], float | None], most_bytes: int = 0) -> list[Region]:
        """The regions to empty and take so that `grow(space_needing)` finds room.

        Neighbours that leave little over for want of another slot come first, and among such those whose dearest one costs
        least. A region without a cost (None) is never named. Room for a region of standard size is sought first, and room for
        a single slot where that is impossible; `most_bytes` of regions may be named where that makes less waste. [] when
        neither can be had, or when it is there already.
        """
        costs = {start: cost(region) for start, region in self._regions.items()}
        slot_pages = self._space(space_needing).slot_pages
        for need in (self.region_bytes(space_needing) // PAGE_BYTES, slot_pages):
            best = self._cheapest(need, slot_pages, most_bytes // PAGE_BYTES, costs)
            if best is not None:
                return best
        return []

    def _cheapest(
        self, need_pages: int, slot_pages: int, most_pages: int, costs: Mapping[int, float | None]
    ) -> list[Region] | None:
        """Of the runs of holes and regions with a cost that are `need_pages` long, or longer to waste less: the best."""
        best: list[Region] | None = None
        best_cost: tuple[bool, float, int] | None = None
        parts = list(self._by_address())
        for first, (start, _, _) in enumerate(parts):
            named: list[Region] = []
            dearest, emptied = 0.0, 0
            for _, end, region in itertools.islice(parts, first, None):
                if region is not None:
                    price = costs[region.first_page]
                    enough = region.first_page - start >= need_pages
                    if price is None or (enough and emptied + end - region.first_page > most_pages):
                        break
                    named.append(region)
                    dearest, emptied = max(dearest, price) if emptied else price, emptied + end - region.first_page
                length = end - start
                if length >= need_pages:
                    total = length % slot_pages > _WASTE * length, dearest, emptied
                    if best_cost is None or total < best_cost:
                        best, best_cost = list(named), total
        return best

    def _by_address(self) -> Iterator[tuple[int, int, Region | None]]:
        """Regions and holes by address as (first page, end page, region or None); together they are the whole arena."""
        items: list[tuple[int, int, Region | None]] = [(start, end, None) for start, end in self.holes()]
        items += [(region.first_page, region.end_page, region) for region in self._regions.values()]
        return iter(sorted(items, key=lambda item: item[0]))

    def _space(self, space: int) -> _Space:
        found = self._spaces.get(space)
        if found is None:
            raise ValueError(f"space {space} is not open; open it first")
        return found

    # Free memory

    def _hole_for(self, wanted: int, least: int) -> int | None:
        largest, largest_pages = None, least - 1
        for at, (start, end) in enumerate(zip(self._hole_starts, self._hole_ends, strict=True)):
            if end - start >= wanted:
                return at
            if end - start > largest_pages:
                largest, largest_pages = at, end - start
        return largest

    def _shrink_hole(self, at: int, start: int) -> None:
        self._free_pages -= start - self._hole_starts[at]
        if start == self._hole_ends[at]:
            del self._hole_starts[at], self._hole_ends[at]
        else:
            self._hole_starts[at] = start

    def _add_hole(self, start: int, end: int) -> None:
        self._free_pages += end - start
        at = bisect.bisect_left(self._hole_starts, start)
        if at < len(self._hole_starts) and self._hole_starts[at] == end:
            end = self._hole_ends[at]
            del self._hole_starts[at], self._hole_ends[at]
        if at and self._hole_ends[at - 1] == start:
            self._hole_ends[at - 1] = end
        else:
            self._hole_starts.insert(at, start)
            self._hole_ends.insert(at, end)
