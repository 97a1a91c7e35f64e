"""Whose the memory is: extents for shards, and what goes when there are none left.

All extents of one size in one space are a *class*; the slabs know it by its number. The rules of this file:
- Free memory is anybody's, and a region without an extent in use is free memory. When there is none, a space replaces its own
  chunks, exactly in their order of eviction (`memory.order`), which is LRU.
- A class's *share* is the arena divided by the spaces that engines use now, times the class's part of its space's chunks.
  Nobody has a share in a space that no engine uses, so what it holds is taken first.
- A class takes a region from another when that one, measured in shares, holds more than it will itself with the region. So
  memory moves towards equal holdings and never back again. One that can evict nothing of its own takes from its equals too.
- Of the regions that could be taken, the region goes whose last chunk in the order of eviction has the lowest place there. What
  hangs on its chunks has a lower place still under LRU.
  A region is left alone while a chunk in it, or one that hangs on a chunk in it, is being read or filled.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmcache.cache.table import Table
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES, Region, Slabs


@dataclass(slots=True, eq=False)
class Space:
    """One layout with one parallel split: its own index, order of eviction and memory."""

    number: int
    fingerprint: bytes
    shards: int
    table: Table
    classes: list[int]
    """For each shard, the class its extents come from (-1 until a rank has told its extent size)."""
    shard_bytes: list[int]
    instances: set[str] = field(default_factory=set)
    """Engine instances that use it now."""
    whole: int = 0
    """Chunks that have all their shards."""
    last_used: dict[int, float] = field(default_factory=dict)
    """Record -> when; kept only while a listener asks for it."""

    @property
    def chunk_bytes(self) -> int:
        """Of the arena, for all shards known so far."""
        return sum(-(-size // SECTOR_BYTES) * SECTOR_BYTES for size in self.shard_bytes)


class Allocator:
    """The extents of an arena of `total_bytes`.

    `evict(space, record)` is called to make room: it must free the extents of the chunk, and of all that hang on it. It
    returns their records.
    """

    def __init__(self, total_bytes: int, evict: Callable[[Space, int], Iterable[int]]) -> None:
        self.slabs = Slabs(total_bytes)
        self._evict = evict
        self._classes: dict[int, Space] = {}
        self._next_class = 0
        self._active = 0
        """Spaces that an engine uses."""
        self._settled: set[int] = set()
        """Classes that looked in vain for something to take, since the last `retry_shares`."""

    def retry_shares(self) -> None:
        """Something may be idle that was not: fair shares are looked at again."""
        self._settled.clear()

    def join(self, space: Space, instance: str) -> None:
        """An engine instance uses the space from now on."""
        self._active += not space.instances
        space.instances.add(instance)
        self.retry_shares()

    def leave(self, space: Space, instance: str) -> None:
        """It does not any more."""
        space.instances.remove(instance)
        self._active -= not space.instances
        self.retry_shares()

    def open(self, space: Space, shard: int, shard_bytes: int) -> None:
        """From now on there are extents for this shard."""
        sectors = -(-shard_bytes // SECTOR_BYTES)
        space.shard_bytes[shard] = shard_bytes
        for known in set(space.classes) - {-1}:
            if self.slabs.extent_sectors(known) == sectors:
                space.classes[shard] = known
                return
        space.classes[shard] = self._next_class
        self._classes[self._next_class] = space
        self.slabs.open(self._next_class, shard_bytes)
        self._next_class += 1

    def close(self, space: Space) -> None:
        """Forget a space that has no extent in use."""
        for own in set(space.classes) - {-1}:
            self.slabs.close(own)
            del self._classes[own]

    def used_bytes(self) -> int:
        """Bytes of all extents in use."""
        return (
            sum(self.slabs.used_extents(own) * self.slabs.extent_sectors(own) for own in self._classes) * SECTOR_BYTES
        )

    def used_by(self, space: Space) -> int:
        """Extents in use."""
        return sum(self.slabs.used_extents(own) for own in set(space.classes) - {-1})

    def find(self, space: Space, shard: int) -> int | None:
        """The sector of an extent that is now in use, whatever has to go for it. None: nothing may go."""
        own = space.classes[shard]
        while True:
            sector = self.slabs.alloc(own)
            if sector is not None:
                return sector
            if self.slabs.grow(own) is not None or self._take_fairly(own):
                continue
            victim = space.table.victim()
            if victim >= 0:
                self._evict(space, victim)
            elif not self._take(own, self._holding(own)):
                return None

    def free(self, space: Space, sectors: Iterable[int]) -> None:
        """Give back extents of a record: [record][shard], NO_EXTENT where there is none."""
        shards = space.shards
        for at, sector in enumerate(sectors):
            if sector != NO_EXTENT:
                self.free_one(space, at % shards, sector)

    def free_one(self, space: Space, shard: int, sector: int) -> None:
        """Give back one extent, and its region with the last one."""
        region = self.slabs.free(space.classes[shard], sector)
        if not region.used:
            self.slabs.take(region)

    def vacate(self, space: Space, keep: set[int]) -> None:
        """Free all extents of the space but those at these sectors."""
        for own in set(space.classes) - {-1}:
            self.slabs.vacate(own, keep)
            for region in self.slabs.regions(own):
                if not region.used:
                    self.slabs.take(region)

    # Sharing

    def _take_fairly(self, own: int) -> bool:
        if own in self._settled:
            return False
        taken = self._take(own, self._holding(own, self.slabs.region_bytes(own)), more_than=True)
        if not taken:
            self._settled.add(own)
        return taken

    def _take(self, own: int, least: float, more_than: bool = False) -> bool:
        """Empty regions of classes that hold `least` shares or more, until `own` can grow. False: there are none."""
        givers = {}
        for other, space in self._classes.items():
            holding = self._holding(other)
            if other != own and (holding > least or (holding == least and not more_than and holding > 0)):
                givers[other] = space
        if not givers:
            return False
        costs = self._costs(givers)
        spare = min(map(self._holding, givers)) - self._holding(own)  # shares that could change hands and not come back
        most_bytes = int(min(spare * self._share(own), self.slabs.total_bytes // 8)) if more_than else 0
        regions = self.slabs.window(own, lambda region: costs.get(region.first_sector), most_bytes)
        for region in regions:
            space = self._classes[region.space]
            gone: set[int] = set()
            for record in array("I", space.table.in_sectors(region.first_sector, region.end_sector)):
                if record not in gone:
                    gone.update(self._evict(space, record))
        return bool(regions)

    def _costs(self, givers: dict[int, Space]) -> dict[int, float]:
        """For regions that may be emptied, by first sector: which part of their space's order of eviction goes with them; less
        than 0 where no engine uses the space."""
        costs = {}
        for space in set(givers.values()):
            regions: list[Region] = []
            for own in set(space.classes) & givers.keys():
                regions += self.slabs.regions(own)
            regions.sort(key=lambda region: region.first_sector)
            bounds = array("I", [sector for region in regions for sector in (region.first_sector, region.end_sector)])
            found = array("I", space.table.survey(bounds.tobytes()))
            for region, extents, depth in zip(regions, found[::2], found[1::2], strict=True):
                if extents == region.used and depth != NO_EXTENT:
                    costs[region.first_sector] = depth / max(1, len(space.table)) - (not space.instances)
        return costs

    def _holding(self, own: int, more_bytes: int = 0) -> float:
        """Bytes of a class in shares."""
        held, share = self.slabs.held_bytes(own) + more_bytes, self._share(own)
        return held / share if share else float("inf") if held else 0.0

    def _share(self, own: int) -> float:
        """Bytes that a class may hold when all want more than there is."""
        space = self._classes[own]
        if not space.instances:
            return 0.0
        class_bytes = self.slabs.extent_sectors(own) * SECTOR_BYTES * space.classes.count(own)
        return self.slabs.total_bytes / self._active * class_bytes / space.chunk_bytes
