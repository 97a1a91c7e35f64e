"""L1 joins the decisions of the heart, with the verbs of operators, with an arena and its extent headers.

When a method returns, all its effects have happened: the extents that it grants have memory, the headers describe the contents of
the extents, and the listeners have been called. One thread owns L1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec

from lmcache.cache.claims import SERVER, Refusal, Reservation
from lmcache.cache.managing import Managing
from lmcache.cache.table import Table
from lmcache.memory.arena import Arena, ArenaFull
from lmcache.memory.headers import Writer
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
P = ParamSpec("P")
MAX_GIVEN_UP = 16
"""Reservations that may fail for lack of memory before a request is refused."""
_NUMBERS = 1 << 36
"""How many leases and reservations one server can number."""


def first_number(arena_id: bytes, epoch: int) -> int:
    """Return the first number of a lease or reservation in this epoch of the arena. Two epochs of one arena share no number, so a
    server ignores the late release of a lease that a previous server granted. Two arenas are very unlikely to share one."""
    block = int.from_bytes(arena_id[:4], "little") + epoch
    return block % ((1 << 63) // _NUMBERS) * _NUMBERS + 1


class L1(Managing):
    """The heart of one arena, with its memory. `Heart` describes the arguments."""

    def __init__(
        self,
        arena: Arena,
        claim_seconds: float = 30.0,
        new_table: Callable[[int], Table] = Table,
        group_table: Callable[[int], Table] | None = None,
    ) -> None:
        number = first_number(arena.id, arena.headers.epoch)
        super().__init__(arena.size_bytes, claim_seconds, new_table, number, group_table)
        self.arena = arena
        self._writers = {SERVER: Writer.of()}

    @property
    def epoch(self) -> bytes:
        """Identifies the period in which one server owns one arena. A server that takes the arena over begins another epoch."""
        return self.arena.id + self.arena.headers.epoch.to_bytes(8, "little")

    def join(self, process: int, instance: str, pid: int | None = None) -> None:
        """Do the same as `Heart.join`. pid: the process that will fill extents; 0 if unknown, None for the server itself."""
        super().join(process, instance)
        self._writers[process] = Writer.of(pid)

    def leave(self, process: int) -> None:
        super().leave(process)
        self._writers.pop(process, None)

    def view(self, sector: int, size_bytes: int) -> memoryview:
        """Return the bytes of an extent, for the holder of a lease or reservation of it."""
        return self.arena.mapping.view(sector * SECTOR_BYTES, size_bytes)

    def _back(self, process: int, reservation: int, tries: int) -> bool:
        if self.arena.backed_bytes == self.arena.size_bytes:
            return True
        sectors, size = self.reserved_sectors(process, reservation)
        try:
            self.arena.back((sector * SECTOR_BYTES for sector in sectors), size)
        except ArenaFull as error:
            counters = self.events.counters
            if not counters["given_up_extents"]:
                logger.warning("L1 stays smaller than configured until it is cleared: %s", error)
            lost = {sector for sector in sectors if not self.arena.has_sectors(sector * SECTOR_BYTES, size)}
            counters["given_up_extents"] += len(lost)
            self.give_up(process, reservation, lost)
            if tries < MAX_GIVEN_UP:
                return False
            raise Refusal(
                f"{self.arena.path.parent} gives no memory for the arena: free some there, or pass a smaller --l1-size-gb"
            ) from None
        return True

    # Extent headers

    def _note_opened(self, number: int, held: Reservation) -> None:
        writer = self._writers[held.process]
        self._note("opened", self.arena.headers.opened, number, held.shard_bytes, held.sectors, writer)

    def _note_ended(self, number: int) -> None:
        self._note("ended", self.arena.headers.ended, number)

    def _note_committed(self, held: Reservation, sectors: list[int], keys: bytes, parents: bytes) -> None:
        space, write = held.space, self.arena.headers.committed
        shard = space.fingerprint, space.shards, held.shard, held.shard_bytes
        self._note("committed", write, *shard, sectors, keys, parents)

    def _note_freed(self, sectors: Iterable[int]) -> None:
        self._note("freed", self.arena.headers.freed, [sector for sector in sectors if sector != NO_EXTENT])

    def _note_cleared(self) -> None:
        self._note("cleared", self.arena.headers.cleared)

    def _note(self, kind: str, write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Write to the headers. A failure is counted and makes the headers void; it does not fail this request or later ones."""
        try:
            write(*args, **kwargs)
        except Exception:  # a bug in the writing of headers
            self.events.failed(kind)
            self.arena.headers.void()
