"""L1: the heart's decisions with an arena and its extent headers behind them.

Every verb is complete when it returns: what it hands out has memory behind it, the headers say what is in the extents, and
those who listen to its events have heard of them. One thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lmcache.cache.claims import SERVER, Refusal, Reservation
from lmcache.cache.heart import Grant, Heart
from lmcache.cache.table import ChunkTable, Table
from lmcache.memory.arena import Arena, ArenaFull
from lmcache.memory.headers import Writer
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
MAX_GIVEN_UP = 16
"""Reservations that are given up for want of memory before a request is refused."""
_NUMBERS = 1 << 36
"""Of leases and reservations, for one server."""


def first_number(arena_id: bytes, epoch: int) -> int:
    """The first number of a lease or reservation in this epoch of the arena. Two epochs of one arena share no number, so a lease
    of a server that has gone means nothing to the next one, however late it is released there. Two arenas hardly ever do."""
    block = int.from_bytes(arena_id[:4], "little") + epoch
    return block % ((1 << 63) // _NUMBERS) * _NUMBERS + 1


class L1(Heart):
    """What one arena holds, and who may read or fill it. See `Heart` for the arguments."""

    def __init__(
        self, arena: Arena, claim_seconds: float = 30.0, new_table: Callable[[int], Table] = ChunkTable
    ) -> None:
        number = first_number(arena.id, arena.headers.epoch)
        super().__init__(arena.size_bytes, claim_seconds, new_table, number)
        self.arena = arena
        self._writers = {SERVER: Writer.of()}

    @property
    def epoch(self) -> bytes:
        """Names one server's time with one arena. A server that takes the arena over begins another epoch."""
        return self.arena.id + self.arena.headers.epoch.to_bytes(8, "little")

    def join(self, process: int, instance: str, pid: int | None = None) -> None:
        """As `Heart.join`. pid: the process that fills what is reserved; 0 where it is unknown, None for the server itself."""
        super().join(process, instance)
        self._writers[process] = Writer.of(pid)

    def leave(self, process: int) -> None:
        super().leave(process)
        self._writers.pop(process, None)

    def view(self, sector: int, size_bytes: int) -> memoryview:
        """The bytes of an extent, for whoever has a lease or reservation of it."""
        return self.arena.mapping.view(sector * SECTOR_BYTES, size_bytes)

    def reserve(
        self,
        now: float,
        process: int,
        space_number: int,
        shard: int,
        parent: bytes,
        root: bool,
        hashes: bytes,
        tier: str = "",
        request: str = "",
    ) -> Grant:
        """As `Heart.reserve`; there is memory behind all extents that it grants.

        Raises:
            Refusal: unknown space, process or shard, or the memory file system is full and nothing older can go for it.
        """
        for _ in range(MAX_GIVEN_UP):
            grant = super().reserve(now, process, space_number, shard, parent, root, hashes, tier, request)
            if not grant.reservation or self._back(process, grant.reservation):
                return grant
        raise Refusal(f"{self.arena.path.parent} has no room for the arena: free some, or pass a smaller --l1-size-gb")

    def _back(self, process: int, reservation: int) -> bool:
        """Whether there is memory behind the extents. If not they are given up; the next ones may be those of older chunks."""
        if self.arena.backed_bytes == self.arena.size_bytes:
            return True
        sectors, size = self.reserved_sectors(process, reservation)
        try:
            self.arena.back((sector * SECTOR_BYTES for sector in sectors), size)
        except ArenaFull as error:
            counters = self.events.counters
            if not counters["given_up_slots"]:
                logger.warning("L1 stays smaller than it was to be, until it is cleared: %s", error)
            lost = {sector for sector in sectors if not self.arena.has_sectors(sector * SECTOR_BYTES, size)}
            counters["given_up_slots"] += len(lost)
            self.give_up(process, reservation, lost)
            return False
        return True

    # What the headers say

    def _note_opened(self, number: int, held: Reservation) -> None:
        writer = self._writers[held.process]
        self._note("opened", lambda: self.arena.headers.opened(number, held.shard_bytes, held.sectors, writer))

    def _note_ended(self, number: int) -> None:
        self._note("ended", lambda: self.arena.headers.ended(number))

    def _note_committed(self, held: Reservation, sectors: list[int], keys: bytes, parents: bytes) -> None:
        space = held.space
        self._note(
            "committed",
            lambda: self.arena.headers.committed(
                space.fingerprint, space.shards, held.shard, held.shard_bytes, sectors, keys, parents
            ),
        )

    def _note_freed(self, sectors: Iterable[int]) -> None:
        self._note("freed", lambda: self.arena.headers.freed(sector for sector in sectors if sector != NO_EXTENT))

    def _note_cleared(self) -> None:
        self._note("cleared", self.arena.headers.cleared)

    def _note(self, kind: str, write: Callable[[], None]) -> None:
        """A failure is counted, and fails neither the request at hand nor those to come; the headers are void then."""
        try:
            write()
        except Exception:  # a fault of ours
            self.events.failed(kind)
            self.arena.headers.void()
