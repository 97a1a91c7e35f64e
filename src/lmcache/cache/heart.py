"""The heart of L1: index, leases, reservations, and what becomes of them.

The rules of this file:
- A chunk is *complete* when all its shards are committed, and only complete chunks are answered. A lookup answers with a prefix.
- An expired lease keeps its chunks, which others may go on reading, and can be renewed. An expired reservation keeps its extents
  but not its chunks: whoever computes these next fills them, in other extents, and what the late writer commits is refused.
- An extent is reused only when nobody may touch it: its chunk is not leased, and it is not being filled (`cache.claims`).
- A chunk that is leased or being filled is never evicted, nor is one that it needs to be reachable (`room` says what is).
- A shard that could not be filled leaves a gap in its chunk, which whoever computes it next fills: what hangs on it stays.
- New data is refused only when nothing may be evicted for it; every refusal has a reason and is counted.
- Clearing changes the index for an empty one. Claims on the old one keep it, and their extents, until they end.
- The server fills and reads for the tiers as the process `SERVER`, which counts as no user of a space.
- The work of a call is bounded by what it is given, or by what it ends; that of a tick by `EXPIRED_A_TICK`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

from lmcache.cache.allocator import Space
from lmcache.cache.claims import SERVER, AnyClaim, Claims, Instance, Lease, Refusal, Reservation
from lmcache.cache.events import NOBODY, By
from lmcache.cache.index import Index, names_of, of_last, of_new, of_records, pack_ids
from lmcache.cache.table import COMPLETED, RELEASED, ChunkTable, Table
from lmcache.chunks import HASH_BYTES
from lmcache.memory.slabs import NO_EXTENT

MAX_SPACES_OF_INSTANCE = 64
"""Of one engine instance, which needs one for each model that it serves."""
MAX_SHARDS = 1024
"""The most shards that a chunk may have. The index keeps 5 bytes a shard for each chunk, however few of them are there."""
EXPIRED_A_TICK = 16384
"""Chunks. A tick ends claims until it has ended claims on so many; the next tick goes on."""


class TooSmall(Refusal):
    """L1 has no room for a single chunk of this layout."""


class Hit(NamedTuple):
    """`chunks` from the prompt's start are there; `extents` (u32 sectors, [chunk][shard]) are those of the leased ones."""

    chunks: int
    lease: int
    extents: bytes


class Grant(NamedTuple):
    """A reservation: one sector a chunk, `NO_EXTENT` where nothing is to be filled; `refused` chunks got no room."""

    reservation: int
    extents: bytes
    refused: int
    reason: str


class Heart(Index):
    """All decisions about one arena of `total_bytes`. See the rules at the head of this file.

    The decisions are pure: there is no memory behind them. `L1` has it, and gives the methods that note what is in an extent
    something to do.

    Args:
        total_bytes: size of the arena.
        claim_seconds: how long a lease or reservation is a claim, unless a lease is renewed; afterwards its extents are in
            quarantine until given back.
        new_table: makes the index of a space with so many shards.
        first_number: of leases and reservations.
    """

    def __init__(
        self,
        total_bytes: int,
        claim_seconds: float = 30.0,
        new_table: Callable[[int], Table] = ChunkTable,
        first_number: int = 1,
    ) -> None:
        super().__init__(total_bytes, new_table)
        self.claim_seconds = claim_seconds
        self._claims = Claims(total_bytes, claim_seconds, first_number)

    # Who is there

    def join(self, process: int, instance: str) -> None:
        """A process of an engine instance has connected (again)."""
        known = self._claims.known(process)
        if known is not None and known.name != instance:
            self.leave(process)
        self._claims.join(process, instance)

    def leave(self, process: int) -> None:
        """A process is gone for good and touches no extent any more: its reservations end; with the last one, the leases."""
        if self._claims.known(process) is None:
            return
        self._drop_reservations(process, "owner died")
        instance = self._claims.leave(process)
        if instance is not None:
            for number in list(instance.leases):
                self._end_lease(number)
            for space in instance.spaces:
                self._allocator.leave(self._spaces[space], instance.name)

    def leave_reservations(self, process: int) -> None:
        """A process says that it fills no extent any more, though it did not commit."""
        self._drop_reservations(process, "connection lost")

    def _drop_reservations(self, process: int, reason: str) -> None:
        for number in self._claims.reservations_of(process):
            self._end_reservation(number, ok=False, reason=reason)

    def open_space(self, process: int, fingerprint: bytes, shards: int, shard: int = -1, shard_bytes: int = 0) -> int:
        """The number of the space for this layout and split; a rank also tells its shard's extent size.

        Raises:
            TooSmall: a chunk of so many bytes, as far as its shards are known, does not fit in the arena.
            Refusal: another rank told another size for this shard, or too many layouts.
        """
        if not 1 <= shards <= MAX_SHARDS or not -1 <= shard < shards:
            raise Refusal(f"shard {shard} of {shards} makes no sense: a chunk has 1 to {MAX_SHARDS} shards")
        known = self._space_of.get((fingerprint, shards))
        others = sum(size for number, size in enumerate(known.shard_bytes) if number != shard) if known else 0
        if shard_bytes + others > self.total_bytes:
            raise TooSmall(_too_small(shard_bytes + others, self.total_bytes))
        instance = self._claims.instance_of(process)
        if (known is None or known.number not in instance.spaces) and len(instance.spaces) >= MAX_SPACES_OF_INSTANCE:
            raise Refusal(f"this engine has {MAX_SPACES_OF_INSTANCE} layouts open already: restart it to close them")
        space = known or self._new_space(fingerprint, shards)
        if shard >= 0:
            self._open_shard(space, shard, shard_bytes)
        instance.spaces.add(space.number)
        self._allocator.join(space, instance.name)
        return space.number

    def _admit(self, process: int, space_number: int, tier: str = "") -> tuple[Space, Instance]:
        instance, space = self._claims.instance_of(process, tier), self._spaces.get(space_number)
        if space is None or (process != SERVER and instance.name not in space.instances):
            raise Refusal(f"space {space_number} is not one that this engine has registered")
        return space, instance

    # Reading

    def shards(self, process: int, space_number: int) -> int:
        """How many shards a chunk of this space has.

        Raises:
            Refusal: unknown space or process.
        """
        return self._admit(process, space_number)[0].shards

    def lookup(
        self, now: float, process: int, space_number: int, hashes: bytes, first_wanted: int = 0, request: str = ""
    ) -> Hit:
        """How many of these chunks are visible, from the first on; those from `first_wanted` on are leased.

        request: the engine's id of the request, for events.

        Raises:
            Refusal: unknown space or process.
        """
        space, instance = self._admit(process, space_number)
        asked, by = len(hashes) // HASH_BYTES, (process, instance.tier, request)
        reason = self._claims.why_no_lease(instance)
        if reason:
            self.events.emit("missed", space.number, asked, reason, by, lambda event: event._replace(hashes=hashes))
            return Hit(0, 0, b"")
        hit = self._lease(now, by, instance, space, hashes, space.table.match(hashes), first_wanted)
        missed = asked - hit.chunks
        if missed:
            reason = self._why_missed(space, hashes, hit.chunks)
            self.events.emit("missed", space.number, missed, reason, by, lambda event: of_last(event, hashes))
        return hit

    def lookup_all(
        self, now: float, process: int, space_number: int, hashes: bytes, first_wanted: int = 0, request: str = ""
    ) -> Hit | None:
        """As `lookup` where all of these chunks are visible. Else None: nothing is touched, leased or counted.

        Raises:
            Refusal: unknown space or process.
        """
        space, instance = self._admit(process, space_number)
        ids = space.table.match(hashes)
        if len(ids) // 4 < len(hashes) // HASH_BYTES or self._claims.why_no_lease(instance):
            return None
        return self._lease(now, (process, instance.tier, request), instance, space, hashes, ids, first_wanted)

    def _lease(
        self, now: float, by: By, instance: Instance, space: Space, hashes: bytes, ids: bytes, first_wanted: int
    ) -> Hit:
        """Touch and count the chunks that were found, the first ones of `hashes`, and lease those from `first_wanted` on."""
        chunks = len(ids) // 4
        if chunks:
            self._touch(now, space, ids)
            self.events.emit(
                "hit", space.number, chunks, "", by, lambda event: event._replace(hashes=hashes[: chunks * HASH_BYTES])
            )
        leased = ids[4 * first_wanted :]
        if not leased:
            return Hit(chunks, 0, b"")
        lease = Lease(by, instance, space, space.table, now + self.claim_seconds, leased)
        return Hit(chunks, self._new_lease(lease), space.table.extents(leased))

    def _new_lease(self, lease: Lease) -> int:
        lease.table.pin(lease.ids)
        return self._claims.add(lease)

    def peek(self, now: float, process: int, space_number: int, hashes: bytes) -> int:
        """How many of these chunks are there from the first on. Touched, but neither leased nor counted: more are on their way.

        Raises:
            Refusal: unknown space or process.
        """
        space, _ = self._admit(process, space_number)
        ids = space.table.match(hashes)
        if ids:
            self._touch(now, space, ids)
        return len(ids) // 4

    def hold(self, now: float, space_number: int, hashes: bytes, tier: str = "") -> tuple[int, bytes, bytes]:
        """For the server: lease those of these chunks that are complete, wherever they stand, and neither touch nor count them.

        tier: on whose behalf. Returns (lease, their hashes, their extents as u32 sectors [chunk][shard]); lease 0 when none is there.
        """
        space = self._spaces.get(space_number)
        if space is None:
            return 0, b"", b""
        table, keys = space.table, [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        found = [(key, one) for key in keys if (one := table.get(key)) >= 0 and table.complete(one)]
        if not found:
            return 0, b"", b""
        ids, instance = pack_ids([one for _, one in found]), self._claims.instance_of(SERVER, tier)
        number = self._new_lease(Lease((SERVER, tier, ""), instance, space, table, now + self.claim_seconds, ids))
        return number, b"".join(key for key, _ in found), table.extents(ids)

    def release(self, process: int, lease: int) -> None:
        """The instance reads these extents no more. An unknown lease is nothing to worry about: it has ended already."""
        if self._claims.lease(process, lease) is not None:
            self._end_lease(lease)

    def renew(self, now: float, process: int, leases: Iterable[int]) -> int:
        """The instance goes on reading these: their claims begin anew, also those that have expired, since the extents of a
        lease stay as they are until it ends. Returns how many there are; the others have ended, or are somebody else's."""
        return self._claims.renew(now, process, leases)

    def keep_leases(self, process: int, known: Iterable[int]) -> int:
        """End the leases that this process took and does not know of: their answers never reached it. Returns how many."""
        lost = self._claims.unknown_leases(process, known)
        for number in lost:
            self._end_lease(number)
        return len(lost)

    def leased_sectors(self, process: int, lease: int, shard: int, first: int, count: int) -> tuple[list[int], int]:
        """(sectors, bytes of each) of a lease's chunks, for payload frames. One that has expired still keeps its extents as they
        were.

        Raises:
            Refusal: not a lease of this process's instance, or not inside it.
        """
        held = self._claims.lease(process, lease)
        if held is None:
            raise Refusal(f"lease {lease} is unknown or has ended")
        sectors = array("I", held.table.extents(held.ids))[shard :: held.space.shards]
        if not 0 <= shard < held.space.shards or not 0 <= first <= first + count <= len(sectors):
            raise Refusal(f"chunks {first}..{first + count} of shard {shard} are outside lease {lease}")
        return list(sectors[first : first + count]), held.space.shard_bytes[shard]

    # Filling

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
        """Extents for this rank's shard of the chunks after `parent`; what is there already or under way is skipped.

        tier: where the server reserves, on whose behalf. request: the engine's id of the request, for events.

        Raises:
            Refusal: unknown space, process or shard.
        """
        space, instance = self._admit(process, space_number, tier)
        if not 0 <= shard < space.shards or space.classes[shard] < 0:
            raise Refusal(f"shard {shard} was not registered")
        table, asked, by = space.table, len(hashes) // HASH_BYTES, (process, instance.tier, request)
        parent_id = -1 if root else table.get(parent)
        reason = ""
        if self._claims.over_quota(instance):
            reason = "quarantine"
        elif parent_id < 0 and not root:
            reason = "no parent"
        elif process == SERVER and not space.instances:
            reason = "no engine"  # a tier's load for one that has gone: nothing in use makes room for it
        if reason:
            self.events.emit(
                "refused", space.number, asked, reason, by, lambda event: event._replace(hashes=hashes), shard
            )
            return Grant(0, pack_ids([NO_EXTENT] * asked), asked, reason)
        self._room_for = by, space.number
        ids, sectors = self._fill_chain(now, space, shard, parent_id, hashes)
        refused = asked - len(sectors)
        if refused:
            reason = "no room"
            self.events.emit("refused", space.number, refused, reason, by, lambda event: of_last(event, hashes), shard)
        number = 0
        if ids:
            filled = [sector for sector in sectors if sector != NO_EXTENT]
            held = Reservation(by, instance, space, table, now + self.claim_seconds, shard, ids, filled)
            number = self._claims.add(held)
            self._note_opened(number, held)
            self._emit("reserved", held, ids)
        extents = pack_ids(sectors + [NO_EXTENT] * refused)
        return Grant(number, extents, refused, reason)

    def commit(self, now: float, process: int, reservation: int, ok: bool, failed: Container[int] = ()) -> int:
        """The extents are filled (`ok`), but those at the sectors in `failed`, or given back. Returns how many chunks' shards
        count as stored.

        Raises:
            Refusal: the reservation is unknown, or its claim had ended; the extents are free then, and nothing is stored.
        """
        held = self._claims.reservation(process, reservation)
        if held.expired or now > held.deadline:
            self._end_reservation(reservation, ok=False, reason="too late")
            raise Refusal(f"reservation {reservation} took longer than {self.claim_seconds} s")
        reason = "copy failed" if failed or not ok else "cleared"
        return self._end_reservation(reservation, ok, reason, failed=failed)

    def give_up(self, process: int, reservation: int, lost: Container[int]) -> None:
        """Nothing will be filled: the memory behind the extents at the sectors in `lost` cannot be had. These stay out of use
        until the cache is cleared, so that the next reservation gets others, in the end those of older chunks.

        Raises:
            Refusal: the reservation is unknown.
        """
        self._claims.reservation(process, reservation)
        self._end_reservation(reservation, False, "no memory", lost)

    def reserved_sectors(self, process: int, reservation: int) -> tuple[list[int], int]:
        """(sectors, bytes of each) of a reservation's extents, for payload frames.

        Raises:
            Refusal: not a live reservation of this process.
        """
        held = self._claims.reservation(process, reservation)
        if held.expired:
            raise Refusal(f"reservation {reservation} has expired")
        return held.sectors, held.shard_bytes

    # Time, and emptying

    def tick(self, now: float) -> None:
        """End claims whose deadline has passed, as many as `EXPIRED_A_TICK` allows. Their extents go to quarantine, not back
        into use."""
        left = EXPIRED_A_TICK
        while left > 0 and (claim := self._claims.next_expired(now)) is not None:
            left -= claim.chunks
            self._expired(claim)
        self._close_spaces()
        self._allocator.retry_shares()

    def _expired(self, claim: AnyClaim) -> None:
        if isinstance(claim, Reservation):
            self._emit("expired", claim, claim.ids, "reservation")
            self._end_fills(claim, set(claim.sectors), "too late")
        else:
            self._emit("expired", claim, array("I", claim.ids), "lease")

    def clear(self) -> int:
        """Forget every chunk; returns how many. Extents that somebody may still read or fill are freed when that has ended."""
        kept: dict[int, set[int]] = {number: set() for number in self._spaces}
        keys = {number: self._complete_keys(space) for number, space in self._spaces.items()}
        for claim in self._claims.leases.values():
            kept[claim.space.number].update(_leave_index(claim.table, claim.ids))
        for held in self._claims.reservations.values():
            sectors = held.sectors if held.expired else _leave_index(held.table, pack_ids(held.ids))
            kept[held.space.number].update(sectors)
        gone = 0
        for space in self._spaces.values():
            self._allocator.vacate(space, kept[space.number])
            self._emit_cleared(space, keys[space.number])
            gone += space.whole
            space.table, space.whole = self._new_table(space.shards), 0
            space.last_used.clear()
        self._note_cleared()
        self._allocator.retry_shares()
        return gone

    def _emit_cleared(self, space: Space, hashes: bytes) -> None:
        self.events.emit("cleared", space.number, space.whole, "", NOBODY, lambda event: event._replace(hashes=hashes))

    # What there is

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of extents whose claim has ended and that somebody may still touch."""
        return self._claims.quarantine.bytes

    def index_bytes(self) -> int:
        """Of the tables of all spaces, and of those that were cleared while somebody had a claim on their chunks."""
        tables = {space.table for space in self._spaces.values()} | self._claims.tables()
        return sum(table.memory_bytes() for table in tables)

    @property
    def open_leases(self) -> int:
        return len(self._claims.leases)

    @property
    def open_reservations(self) -> int:
        return len(self._claims.reservations)

    # Ends

    def _end_lease(self, number: int) -> None:
        lease = self._claims.end_lease(number)
        released = lease.table.unpin(lease.ids)
        if released:
            self._free(lease.space, lease.table, released)

    def _end_reservation(
        self, number: int, ok: bool, reason: str, lost: Container[int] = (), failed: Container[int] = ()
    ) -> int:
        """Shards that are in the index now; `reason` is for the others. Extents that were not filled are freed unless lost."""
        held = self._claims.end_reservation(number)
        empty = set(held.sectors if held.expired or not ok else [sector for sector in held.sectors if sector in failed])
        filled = 0 if held.expired else self._end_fills(held, empty, reason)
        for sector in empty:
            if sector not in lost:
                self._allocator.free_one(held.space, held.shard, sector)
        self._note_ended(number)
        return filled

    def _end_fills(self, held: Reservation, empty: Container[int], reason: str) -> int:
        """The chunks are this reservation's no more: their shards are there, but those that were to get the extents in `empty`.
        These are anybody's to fill, and the extents the caller's to free. Returns how many are in the index now; `reason` is for
        the others."""
        table, space = held.table, held.space
        pairs = list(zip(held.ids, held.sectors, strict=True))
        filled = [(one, sector) for one, sector in pairs if sector not in empty and table.attached(one)]
        if len(filled) < len(pairs):
            kept = {one for one, _ in filled}
            dropped = [one for one in held.ids if one not in kept]
            self._emit("dropped", held, dropped, reason)
        whole: list[int] = []
        for one, sector in reversed(pairs):
            stays = sector not in empty
            outcome = table.end_fill(one, held.shard, stays)
            if outcome == COMPLETED:
                whole.append(one)
            elif outcome == RELEASED:  # it was cleared meanwhile, and nobody reads it
                self._free(space, table, pack_ids([one]))
            elif not stays:
                self._remove_bare(space, table, one)
        space.whole += len(whole)
        if filled:
            ids = [one for one, _ in filled]
            self._note_committed(held, [sector for _, sector in filled], *names_of(table, ids))
            self._emit("committed", held, ids)
        if whole:
            whole.reverse()
            self.events.emit("stored", space.number, len(whole), "", held.by, lambda event: of_new(event, table, whole))
        return len(filled)

    def _emit(self, kind: str, claim: AnyClaim, records: Sequence[int], reason: str = "") -> None:
        """Something has happened to these of the claim's chunks."""
        self.events.emit(
            kind, claim.space.number, len(records), reason, claim.by,
            lambda event: of_records(event, claim.table, records), claim.shard,
        )  # fmt: skip

    # What is in the extents, for the memory behind them

    def _note_opened(self, number: int, held: Reservation) -> None:
        """The reservation's process may write to its extents from now on."""

    def _note_ended(self, number: int) -> None:
        """Nobody writes to the extents of this reservation any more."""

    def _note_committed(self, held: Reservation, sectors: list[int], keys: bytes, parents: bytes) -> None:
        """The reservation's extents at these sectors hold what their keys say from now on. `keys` and `parents` are 16 bytes each,
        zeros for no parent."""

    def _note_cleared(self) -> None:
        """No extent at all holds anything of ours any more."""


def _leave_index(table: Table, ids: bytes) -> array[int]:
    """Detach the chunks of a claim from an index that is about to go. Returns the sectors of all their extents."""
    for one in array("I", ids):
        if table.attached(one):
            table.detach(one)
    return array("I", table.extents(ids))


def _too_small(chunk_bytes: int, total_bytes: int) -> str:
    least = -(-chunk_bytes * 1000 // 2**30) / 1000
    return (
        f"L1 has {total_bytes / 2**20:.1f} MiB, and one chunk of this model takes {chunk_bytes / 2**20:.1f} MiB: start the "
        f"server with --l1-size-gb (in process: max_local_cpu_size) well above {least:g}, or with a smaller --chunk-size"
    )
