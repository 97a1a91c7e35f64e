"""The allocator assigns extents to shards, and decides which chunks are evicted when no extent is free.

All extents of one size in one space form a *class*, which the slabs identify by a number. The rules:
- Any class may take free memory, and a region without an extent in use is free memory. When no memory is free, a space evicts
  its own chunks, exactly in their order of eviction (`memory.order`), which is LRU.
- The *share* of a class is the size of the arena, divided by the number of models that engines use now, times the fraction of a
  chunk's bytes that the class holds. A group of a model with several groups has a part of the model's share. A class of a space
  that no engine uses has the share 0, so its memory is taken first. If engines use a sister of the space, such a class may take
  memory as if it had their share: a tier loads into it what they are about to read.
- Holdings are measured in shares. A class takes a region from another class that holds more than the taker will hold with the
  region, so memory moves towards equal holdings and never back. A class that can evict nothing takes from equal holders too.
- Among the regions that can be taken, the allocator picks the one whose last chunk to be evicted has the lowest place in the
  order of eviction. Under LRU, the descendants of that region's chunks have still lower places.
- A region is not taken while a chunk in it, or a descendant of one, is being read or filled.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lmcache.cache.table import Table
from lmcache.chunks import Split
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES, Region, Slabs

_PASSED, _WALKED = 64, 256
"""How many chunks in reach of an end are passed at most in the search for a victim, and how many chunks behind them are looked at
in order to find that end."""


@dataclass(slots=True, eq=False)
class Space:
    """One layout with one parallel split, with an index, an order of eviction and memory of its own."""

    number: int
    fingerprint: bytes
    shards: int
    table: Table
    classes: list[int]
    """The class of the extents of each shard; -1 until a rank has registered the shard's size."""
    shard_bytes: list[int]
    reach_chunks: int = 0
    """How many chunks before the end of a prefix are needed to go on from there; 0 for all of them. Chunks of a space with a
    reach are evicted one by one, the least recently used first, since no chunk needs the ones before it."""
    main: Space | None = None
    """For a group with a reach: the group of the same model that has everything."""
    split: Split | None = None
    """How the layout is split; None if that is unknown, and then the space has no sisters."""
    family: bytes = b""
    """What identifies the space and its sisters: the layout, and the group. It is also the fingerprint of those among them that
    are not split by layers."""
    expected: Sequence[Split] = ()
    """Splits of the layout that sisters may have whose chunks are in tiers, from before this server's start."""
    sisters: tuple[Space, ...] = ()
    """The spaces of the same layout and group with other splits."""
    kv_dtype: str = ""
    """The dtype of the KV, as in the layout; "" if that is unknown."""
    rounded_row: int = 0
    """As in the layout; 0: the KV is exact."""
    share: float = 1.0
    """How much of the memory of one model this space may hold when memory is short; less than 1 for a group of a model."""
    instances: set[str] = field(default_factory=set)
    """Engine instances that use the space now."""
    complete: int = 0
    """How many chunks are complete."""
    last_used: dict[int, float] = field(default_factory=dict)
    """Record -> time of its last use; kept only if a listener needs it."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the arena that one chunk takes, for all shards registered so far."""
        return sum(-(-size // SECTOR_BYTES) * SECTOR_BYTES for size in self.shard_bytes)


class Allocator:
    """Allocates the extents of an arena of `total_bytes`.

    The allocator calls `evict(space, record)` to free memory. The call must free the extents of the chunk and of all its
    descendants, and return their records.
    """

    def __init__(self, total_bytes: int, evict: Callable[[Space, int], Iterable[int]]) -> None:
        self.slabs = Slabs(total_bytes)
        self._evict = evict
        self._classes: dict[int, Space] = {}
        self._next_class = 0
        self._active: set[Space] = set()
        """The spaces that engines use now."""
        self._shares = 0.0
        """The sum of their shares."""
        self._settled: set[int] = set()
        """Classes that have found no region to take since the last `retry_shares`."""

    def retry_shares(self) -> None:
        """Let every class look for regions to take again, since some may have become idle."""
        self._settled.clear()

    def _count_shares(self) -> None:
        self._shares = sum(one.share for one in self._active)
        self.retry_shares()

    def join(self, space: Space, instance: str) -> None:
        """Note that an engine instance uses the space from now on."""
        self._active.add(space)
        space.instances.add(instance)
        self._count_shares()

    def leave(self, space: Space, instance: str) -> None:
        """Note that an engine instance no longer uses the space."""
        space.instances.remove(instance)
        if not space.instances:
            self._active.discard(space)
        self._count_shares()

    def open(self, space: Space, shard: int, shard_bytes: int) -> None:
        """Assign this shard to a class of extents of `shard_bytes`, rounded up to complete sectors."""
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
        """Remove the classes of a space that has no extent in use."""
        for own in set(space.classes) - {-1}:
            self.slabs.close(own)
            del self._classes[own]

    def used_bytes(self) -> int:
        return (
            sum(self.slabs.used_extents(own) * self.slabs.extent_sectors(own) for own in self._classes) * SECTOR_BYTES
        )

    def used_by(self, space: Space) -> int:
        """Return how many extents of the space are in use."""
        return sum(self.slabs.used_extents(own) for own in set(space.classes) - {-1})

    def find(self, space: Space, shard: int) -> int | None:
        """Allocate an extent, evicting chunks if necessary; return its sector, or None if nothing may be evicted."""
        own = space.classes[shard]
        while True:
            sector = self.slabs.alloc(own)
            if sector is not None:
                return sector
            if self.slabs.grow(own) is not None or (own not in self._settled and self._take_fairly(own)):
                continue
            victim = _victim(space)
            if victim >= 0:
                self._evict(space, victim)
            elif not self._take(own, self._holding(own, taking=True)):
                return None

    def free(self, space: Space, sectors: Iterable[int]) -> None:
        """Free extents of records, given by sector as [record][shard]; NO_EXTENT entries are skipped."""
        shards = space.shards
        for at, sector in enumerate(sectors):
            if sector != NO_EXTENT:
                self.free_one(space, at % shards, sector)

    def free_one(self, space: Space, shard: int, sector: int) -> None:
        """Free one extent, and its region too if no other extent in the region is in use."""
        region = self.slabs.free(space.classes[shard], sector)
        if not region.used:
            self.slabs.take(region)

    def vacate(self, space: Space, keep: set[int]) -> None:
        """Free all extents of the space except those at the sectors in `keep`."""
        for own in set(space.classes) - {-1}:
            self.slabs.vacate(own, keep)
            for region in self.slabs.regions(own):
                if not region.used:
                    self.slabs.take(region)

    # Sharing

    def _take_fairly(self, own: int) -> bool:
        taken = self._take(own, self._holding(own, self.slabs.region_bytes(own), taking=True), more_than=True)
        if not taken:
            self._settled.add(own)
        return taken

    def _take(self, own: int, least: float, more_than: bool = False) -> bool:
        """Evict chunks from regions of classes that hold at least (`more_than`: more than) `least` shares, until `own` can grow.
        Returns False if no region can be taken."""
        givers = {}
        for other, space in self._classes.items():
            holding = self._holding(other)
            if other != own and (holding > least or (holding == least and not more_than and holding > 0)):
                givers[other] = space
        if not givers:
            return False
        costs = self._costs(givers)
        # Shares that can move without moving back later.
        spare = min(map(self._holding, givers)) - self._holding(own, taking=True)
        most_bytes = int(min(spare * self._share(own, taking=True), self.slabs.total_bytes // 8)) if more_than else 0
        regions = self.slabs.window(own, lambda region: costs.get(region.first_sector), most_bytes)
        for region in regions:
            space = self._classes[region.space]
            gone: set[int] = set()
            for record in array("I", space.table.in_sectors(region.first_sector, region.end_sector)):
                if record not in gone:
                    gone.update(self._evict(space, record))
        return bool(regions)

    def _costs(self, givers: dict[int, Space]) -> dict[int, float]:
        """Return what taking each region would cost, by first sector: the fraction of the space's order of eviction up to the
        region's last chunk, less 1 if no engine uses the space. Regions that must not be emptied are absent."""
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

    def _holding(self, own: int, more_bytes: int = 0, taking: bool = False) -> float:
        """Return the bytes that a class holds, measured in shares; `taking`: as in `_share`."""
        held, share = self.slabs.held_bytes(own) + more_bytes, self._share(own, taking)
        return held / share if share else float("inf") if held else 0.0

    def _share(self, own: int, taking: bool = False) -> float:
        """Return the bytes that a class may hold when the demand of all classes exceeds the arena. taking: may take, to be read
        at once by engines that use a sister of its space."""
        space = self._classes[own]
        if not (in_use(space) if taking else space.instances):
            return 0.0
        class_bytes = self.slabs.extent_sectors(own) * SECTOR_BYTES * space.classes.count(own)
        return self.slabs.total_bytes * space.share / self._shares * class_bytes / space.chunk_bytes


def in_use(space: Space) -> bool:
    """Return whether an engine uses this space or a sister of it now."""
    return bool(space.instances) or any(one.instances for one in space.sisters)


def _victim(space: Space) -> int:
    """Return the record to evict next, or -1. In a group with a reach, chunks in the middle of prompts go before those that an
    end or a fork needs, where later prompts go on. The search is bounded; chunks that it passes count as used."""
    victim, left = space.table.victim(), _WALKED
    for _ in range(_PASSED if space.main is not None else 0):
        most = min(left, space.reach_chunks)
        steps = _steps_to_an_end(space, victim, most)
        if steps == most:
            break
        space.table.touch(victim.to_bytes(4, "little"))
        victim, left = space.table.victim(), left - steps
    return victim


def _steps_to_an_end(space: Space, record: int, most: int) -> int:
    """Return how many chunks follow this one until a prompt ends or prompts part; at most `most`, also if it cannot be known."""
    if space.main is None or record < 0:
        return most
    main = space.main.table
    at = main.get(space.table.key(record))
    for steps in range(most if at >= 0 else 0):
        following = main.only_child(at)
        if following < 0:
            return steps
        at = following
    return most
