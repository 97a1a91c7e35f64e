"""Filling: the reservations of extents, by the rules of `cache.heart`, from the search for memory to the commit."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from lmcache.cache.allocator import Space, in_use
from lmcache.cache.announcing import Announcing
from lmcache.cache.claims import SERVER, Instance, Refusal, Reservation
from lmcache.cache.events import By
from lmcache.cache.index import names_of, of_last, of_new, of_records, pack_ids
from lmcache.cache.table import COMPLETED, RELEASED
from lmcache.chunks import HASH_BYTES
from lmcache.memory.slabs import NO_EXTENT


class Grant(NamedTuple):
    """A reservation. `extents`: a u32 sector for each chunk, or `NO_EXTENT`. `refused`: how many chunks got none for `reason`."""

    reservation: int
    extents: bytes
    refused: int
    reason: str


class Filling(Announcing):
    """The verbs of processes that fill extents.

    This class has no memory. `L1` adds the arena, and overrides `_back`, which allocates the memory of extents, and the `_note_`
    methods, which tell it what extents hold.
    """

    @property
    def reservations(self) -> Mapping[int, Reservation]:
        """The open reservations by number, as they change."""
        return self._claims.reservations

    @property
    def open_reservations(self) -> int:
        return len(self._claims.reservations)

    def _admit(self, process: int, space_number: int, tier: str = "") -> tuple[Space, Instance]:
        instance, space = self._claims.instance_of(process, tier), self._spaces.get(space_number)
        if space is None or (process != SERVER and instance.name not in space.instances):
            raise Refusal(f"this engine has not registered space {space_number}: register the layout first")
        return space, instance

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
        """Reserve extents for this rank's shard of the chunks after `parent`. Shards that are stored or being filled are skipped.

        tier: the tier for which the server reserves. request: the engine's id of the request, for events.

        Raises:
            Refusal: unknown space, process or shard; or there is no memory for extents, and no chunk can be evicted.
        """
        space, instance = self._admit(process, space_number, tier)
        if not 0 <= shard < space.shards or space.classes[shard] < 0:
            raise Refusal(f"shard {shard} is not registered: register it first")
        by, tries = (process, instance.tier, request), 0
        while True:
            grant = self._grant(now, by, instance, space, shard, parent, root, hashes)
            tries += 1
            if not grant.reservation or self._back(process, grant.reservation, tries):
                return grant

    def _grant(
        self, now: float, by: By, instance: Instance, space: Space, shard: int, parent: bytes, root: bool, hashes: bytes
    ) -> Grant:
        table, asked = space.table, len(hashes) // HASH_BYTES
        root = root or space.reach_chunks > 0  # such a chunk needs none of those before it
        parent_id = -1 if root else table.get(parent)
        # Behind what only a sister has, the chunks begin a path of their own.
        root = root or parent_id >= 0 or any(one.table.get(parent) >= 0 for one in space.sisters)
        reason = ""
        if self._claims.over_quota(instance):
            reason = "quarantine"
        elif not root:
            reason = "no parent"
        elif by[0] == SERVER and not in_use(space):
            reason = "no engine"  # the engine has gone: a load for it must not evict what other engines use
        ids, sectors = ([], []) if reason else self._fill_chain(now, space, shard, parent_id, hashes)
        self._emit_evicted(by, space.number)
        refused = asked - len(sectors)
        if refused:
            reason = reason or "no room"
            self.events.emit("refused", space.number, refused, reason, by, lambda event: of_last(event, hashes), shard)
            self.promises.broken(instance.name, space.number, hashes[-HASH_BYTES * refused :])
        number = 0
        if ids:
            filled = [sector for sector in sectors if sector != NO_EXTENT]
            held = Reservation(by, instance, now + self.claim_seconds, space, table, shard, ids, filled)
            number = self._claims.add(held)
            self._note_opened(number, held)
            self._emit("reserved", held, ids)
            if self.promises.by_chunk:
                self.promises.computed(now, instance.name, (space.number, table.key(ids[-1])))
        extents = pack_ids(sectors + [NO_EXTENT] * refused)
        return Grant(number, extents, refused, reason)

    def commit(self, now: float, process: int, reservation: int, ok: bool, failed: Container[int] = ()) -> int:
        """End a reservation whose extents are filled, except those at the sectors in `failed`; with `ok` false, none is filled.
        Returns how many shards are stored.

        Raises:
            Refusal: the reservation is unknown or has expired. The extents are free then, and nothing is stored.
        """
        held = self._claims.reservation(process, reservation)
        if held.expired or now > held.deadline:
            self._end_reservation(reservation, ok=False, reason="too late")
            raise Refusal(f"reservation {reservation} expired after {self.claim_seconds} s: reserve the chunks again")
        reason = "copy failed" if failed or not ok else "cleared"
        return self._end_reservation(reservation, ok, reason, failed=failed)

    def give_up(self, process: int, reservation: int, lost: Container[int]) -> None:
        """End a reservation without filling it, because no memory could be allocated for the extents at the sectors in `lost`.
        These stay out of use until the cache is cleared, so that the next reservation gets others, if need be by eviction.

        Raises:
            Refusal: the reservation is unknown.
        """
        self._claims.reservation(process, reservation)
        self._end_reservation(reservation, False, "no memory", lost)

    def reserved_sectors(self, process: int, reservation: int) -> tuple[list[int], int]:
        """Return (sectors, bytes of each) of a reservation's extents, for payload frames.

        Raises:
            Refusal: the process has no such reservation, or it has expired.
        """
        held = self._claims.reservation(process, reservation)
        if held.expired:
            raise Refusal(f"reservation {reservation} has expired")
        return held.sectors, held.shard_bytes

    # The ends of reservations

    def _end_reservation(
        self, number: int, ok: bool, reason: str, lost: Container[int] = (), failed: Container[int] = ()
    ) -> int:
        """Return how many shards were stored; the others are dropped for `reason`, and their extents freed unless in `lost`."""
        held = self._claims.end_reservation(number)
        empty = set(held.sectors if held.expired or not ok else [sector for sector in held.sectors if sector in failed])
        filled = 0 if held.expired else self._end_fills(held, empty, reason)
        for sector in empty:
            if sector not in lost:
                self._allocator.free_one(held.space, held.shard, sector)
        self._note_ended(number)
        return filled

    def _end_fills(self, held: Reservation, empty: Container[int], reason: str) -> int:
        """End the filling of a reservation's shards. Those whose extents are not in `empty` are stored. The others are dropped
        for `reason`: any process may fill them next, and the caller frees their extents. Returns how many were stored in chunks
        that are still in the index."""
        table, space = held.table, held.space
        filled, sectors, dropped = list[int](), list[int](), list[int]()
        for one, sector in zip(held.ids, held.sectors, strict=True):
            if sector not in empty and table.attached(one):
                filled.append(one)
                sectors.append(sector)
            else:
                dropped.append(one)
        if dropped:
            self._emit("dropped", held, dropped, reason)
            if self.promises.by_chunk:
                self.promises.broken(held.instance.name, space.number, names_of(table, dropped)[0])
        completed: list[int] = []
        for one, sector in zip(reversed(held.ids), reversed(held.sectors), strict=True):
            stays = sector not in empty
            outcome = table.end_fill(one, held.shard, stays)
            if outcome == COMPLETED:
                completed.append(one)
            elif outcome == RELEASED:  # the cache was cleared meanwhile, and no lease holds the chunk
                self._free(space, table, pack_ids([one]))
            elif not stays:
                self._remove_bare(space, table, one)
        space.complete += len(completed)
        if filled:
            self._note_committed(held, sectors, *names_of(table, filled))
            self._emit("committed", held, filled)
        if completed:
            completed.reverse()
            if held.instance.tier in self.fleeting_tiers:
                for one in completed:
                    self._fleeting[space.number, table.key(one)] = False
            self.promises.has_stored(held.instance.name)
            if self.promises.by_chunk:
                self.promises.kept(space.number, names_of(table, completed)[0])
            self.events.emit(
                "stored", space.number, len(completed), "", held.by, lambda event: of_new(event, table, completed)
            )
        return len(filled)

    def _emit(self, kind: str, claim: Reservation, records: Sequence[int], reason: str = "") -> None:
        """Emit an event about these chunks of the reservation."""
        self.events.emit(
            kind, claim.space.number, len(records), reason, claim.by,
            lambda event: of_records(event, claim.table, records), claim.shard,
        )  # fmt: skip

    # Memory and contents of extents, which subclasses have

    def _back(self, process: int, reservation: int, tries: int) -> bool:
        """Allocate memory for the extents of a reservation. If there is none, give the reservation up and return False, for the
        chunks to be reserved in other extents. tries: how many reservations the request has made, with this one.

        Raises:
            Refusal: enough of them have failed.
        """
        return True

    def _note_opened(self, number: int, held: Reservation) -> None:
        """Record that the reservation's process may write to its extents from now on."""

    def _note_ended(self, number: int) -> None:
        """Record that no process writes to the extents of this reservation any more."""

    def _note_committed(self, held: Reservation, sectors: list[int], keys: bytes, parents: bytes) -> None:
        """Record that the extents at these sectors hold the shards of the chunks `keys`. `keys` and `parents` hold 16 bytes a
        chunk; zeros for no parent."""

    def _note_cleared(self) -> None:
        """Record that no extent holds a stored shard any more."""
