"""The heart of L1 decides about processes, lookups, leases, expiry and clears.

The rules of this file, and of `letting_go`, `filling` and `announcing`, on which it stands:
- A chunk is *complete* when all its shards are committed. A lookup finds only complete chunks, and only a prefix of those asked.
- An expired lease keeps its chunks, which others may go on reading, and it can be renewed. An expired reservation keeps its
  extents but not its chunks: another process may fill these in other extents, and a late commit is refused.
- An extent is reused only when no process may touch it: its chunk is not leased, and it is not being filled (`cache.claims`).
- A chunk that is leased or being filled is never evicted, nor are its ancestors (`allocator` decides what is evicted).
- If a shard could not be filled, its chunk becomes incomplete and keeps its descendants. A later reservation can fill the shard.
- New data is refused only when nothing may be evicted for it; every refusal has a reason and is counted.
- What a fleeting tier has loaded is evicted when an engine has read it, soon after nobody else reads it and no chunk follows it.
- Clearing replaces the index by an empty one. Claims on the old index keep it and their extents until they end.
- The server fills and reads for the tiers as the process `SERVER`, which does not count as a user of a space.
- A chunk that an engine has promised or is filling is a miss, but others are told that it comes (`cache.promises`).
- The work of a call is bounded by its arguments or by the claims that it ends, and the work of a tick by `EXPIRED_A_TICK`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from lmcache.cache.allocator import Space
from lmcache.cache.claims import SERVER, AnyClaim, Held, Instance, Lease, Refusal, Reservation
from lmcache.cache.events import NOBODY, By, Event
from lmcache.cache.groups import Found, Part, parts_of, usable_prefix
from lmcache.cache.index import MAX_SISTERS, names_of, of_lookup, of_records, pack_ids
from lmcache.cache.letting_go import LettingGo
from lmcache.cache.table import Table
from lmcache.chunks import HASH_BYTES, Split, split_hashes

MAX_SPACES_OF_INSTANCE = 64
"""The most spaces that one engine instance may open. An instance needs one for each model that it serves."""
MAX_SHARDS = 1024
"""The most shards that a chunk may have. The index keeps 5 bytes for each shard of each chunk, stored or not."""
EXPIRED_A_TICK = 16384
"""Chunks. A tick expires claims until these cover so many chunks; the next tick goes on."""


class TooSmall(Refusal):
    """One chunk of this layout is larger than L1."""


class Foreign(NamedTuple):
    """Leased chunks of a group, from chunk `first` on: in a sister of the group's space, or behind chunks that are in one."""

    group: int
    first: int
    space: Space
    extents: bytes


class Hit(NamedTuple):
    """The first `chunks` chunks of the prompt can be used from L1. One lease holds those that are needed, which are the last ones
    before the end of the hit. `extents`: u32 sectors of the first of them, [chunk][shard], as many as the engine's own space has.
    `groups`: the same in each further space of a model with several groups. `foreign`: what follows them in each group."""

    chunks: int
    lease: int
    extents: bytes
    groups: tuple[bytes, ...] = ()
    foreign: tuple[Foreign, ...] = ()


class Lent(NamedTuple):
    """What a peer gets of one shard: (hash, hash of the chunk before or zeros, sector) of each chunk that is complete, under one
    lease; 0 if there is none. chunk_bytes: of all shards of a chunk, which stay for one."""

    lease: int
    shard_bytes: int
    found: list[tuple[bytes, bytes, int]]
    chunk_bytes: int = 0


class Heart(LettingGo):
    """Decides about one arena of `total_bytes`, by the rules at the head of this file.

    Args:
        total_bytes: size of the arena.
        claim_seconds: time until a lease or reservation expires, unless a lease is renewed. Its extents are then in quarantine
            until the lease is released or the reservation committed.
        new_table: makes the table of a space from its number of shards.
        first_number: the number of the first lease or reservation.
        group_table: makes the table of a group of a model with several kinds of KV; None for `new_table`.
    """

    # Processes

    def join(self, process: int, instance: str) -> None:
        """Register a process of an engine instance, which has connected for the first time or again."""
        known = self._claims.known(process)
        if known is not None and known.name != instance:
            self.leave(process)
        self._claims.join(process, instance)

    def leave(self, process: int) -> None:
        """Remove a process that has ended. Its reservations end, and with the last process of an instance its leases too."""
        known = self._claims.known(process)
        if known is None:
            return
        self.promises.leave(known.name)
        self._drop_reservations(process, "owner died")
        instance = self._claims.leave(process)
        if instance is not None:
            for number in list(instance.leases):
                self._end_lease(number)
            for space in instance.spaces:
                self._allocator.leave(self._spaces[space], instance.name)

    def leave_reservations(self, process: int) -> None:
        """End the reservations of a process that has reported that it no longer fills extents."""
        self._drop_reservations(process, "connection lost")

    def _drop_reservations(self, process: int, reason: str) -> None:
        for number in self._claims.reservations_of(process):
            self._end_reservation(number, ok=False, reason=reason)

    def open_space(
        self,
        process: int,
        fingerprint: bytes,
        shards: int,
        shard: int = -1,
        shard_bytes: int = 0,
        reach_chunks: int = 0,
        share: float = 1.0,
        family: bytes = b"",
        split: Split | None = None,
        expected: Sequence[Split] = (),
        main: int = -1,
        kv_dtype: str = "",
        rounded_row: int = 0,
    ) -> int:
        """Return the number of the space for this layout and split. A rank also gives its shard and the size of its extents.

        The others as in `Space`; `reach_chunks` is a part of what the fingerprint stands for, and `share` counts for a new space.
        A space for which `family` and `split` are missing once has no sisters from then on. main: the number of that space.

        Raises:
            TooSmall: one chunk, with the shards registered so far, is larger than the arena.
            Refusal: another rank registered another size for this shard, or too many layouts are open.
        """
        if not 1 <= shards <= MAX_SHARDS or not -1 <= shard < shards:
            raise Refusal(f"shard {shard} of {shards} is invalid: a chunk has 1 to {MAX_SHARDS} shards, counted from 0")
        known = self._space_of.get((fingerprint, shards))
        others = sum(size for number, size in enumerate(known.shard_bytes) if number != shard) if known else 0
        if shard_bytes + others > self.total_bytes:
            raise TooSmall(_too_small(shard_bytes + others, self.total_bytes))
        instance = self._claims.instance_of(process)
        if (known is None or known.number not in instance.spaces) and len(instance.spaces) >= MAX_SPACES_OF_INSTANCE:
            raise Refusal(f"this engine has {MAX_SPACES_OF_INSTANCE} layouts open already: restart it to close them")
        space = known or self._new_space(fingerprint, shards, reach_chunks, share, family, split)
        if shard >= 0:
            self._open_shard(space, shard, shard_bytes)
        if not family and space.family:
            self._leave_family(space)
        space.expected = expected if space.family else ()
        group = self._spaces.get(main)
        if group is not None and space.reach_chunks and not group.reach_chunks:
            space.main = group
        space.kv_dtype, space.rounded_row = kv_dtype, rounded_row
        instance.spaces.add(space.number)
        self._allocator.join(space, instance.name)
        return space.number

    def open_sister(self, number: int, split: Split) -> None:
        """Open the sister of a space with this split, which is not by layers. No engine uses it.

        Raises:
            Refusal: too many layouts are open, or the space of this name is no sister.
        """
        space = self._spaces[number]
        known = self._space_of.get((space.family, split.count))
        if known is not None:
            if known.family != space.family:
                raise Refusal(f"the shards of space {known.number} are not the KV heads and layers that its split has")
            return
        if len(space.sisters) >= MAX_SISTERS:
            raise Refusal(f"{MAX_SISTERS} other splits of this model are open already")
        size = sum(space.shard_bytes) // split.count
        sister = self._new_space(space.family, split.count, space.reach_chunks, space.share, space.family, split)
        sister.kv_dtype, sister.rounded_row = space.kv_dtype, space.rounded_row
        for shard in range(split.count):
            self._open_shard(sister, shard, size)

    # Reading

    def lookup(
        self,
        now: float,
        process: int,
        space_number: int,
        hashes: bytes,
        first_wanted: int = 0,
        request: str = "",
        others: Sequence[int] = (),
        sisters: bool = False,
        partly: bool = True,
        again: bool = False,
    ) -> Hit:
        """Count how many of these chunks, from the first on, can be used; lease those that are needed from `first_wanted` on.

        hashes: 16 bytes a chunk. request: the engine's id of the request, for events. others: the spaces of the model's other
        groups, if it has several; a prefix can be used if all groups have what they need of it (`cache.groups`). sisters: whether
        the engine can use what sisters of its spaces have. partly: if false, and not all these chunks can be used, return a hit
        of no chunks, and touch, lease and count nothing. again: the request has had an answer, which has been counted.

        Raises:
            Refusal: unknown space or process.
        """
        space, instance = self._admit(process, space_number)
        asked, by = len(hashes) // HASH_BYTES, (process, instance.tier, request)
        reason = self._claims.why_no_lease(instance)
        if reason:
            if partly and not again:
                self.events.emit("missed", space_number, asked, reason, by, lambda event: of_lookup(event, hashes, 0))
            return Hit(0, 0, b"")
        found: Found | bytes
        spaces: Sequence[Space] = (space,)
        if not others and not space.reach_chunks and not (sisters and space.sisters):
            found = space.table.match(hashes)  # nearly all models have one group, and their engines one split
            chunks = len(found) // 4
        else:
            spaces = [space, *(self._admit(process, number)[0] for number in others)]
            chunks, found = usable_prefix(spaces, hashes, sisters)
        missed = asked - chunks
        if missed and not partly:
            return Hit(0, 0, b"")
        if not again:
            space.table.asked(now, hashes)
        if chunks and not again:
            self._count_hit(by, spaces, hashes, chunks, found)
        if isinstance(found, bytes):
            hit = self._lease_own(now, by, instance, space, found, first_wanted)
        else:
            hit = self._lease(now, by, instance, spaces, chunks, found, first_wanted)
        if missed and not again:
            reason = self._why_missed(spaces, hashes, chunks)
            self.events.emit("missed", space_number, missed, reason, by, lambda event: of_lookup(event, hashes, chunks))
        return hit

    def answered(self, now: float, process: int, space_number: int, last: bytes, tokens: int) -> None:
        """Note how many tokens a prompt was answered with, for an order of eviction that learns. last: its last hash.

        Raises:
            Refusal: unknown space or process.
        """
        self._admit(process, space_number)[0].table.answered(now, last, tokens)

    def _count_hit(self, by: By, spaces: Sequence[Space], hashes: bytes, chunks: int, found: Found | bytes) -> None:
        """Count the chunks that can be used, which are the first ones of `hashes`, and those of them that sisters have."""
        detail = partial(of_lookup, prompt=hashes, first=0)
        self.events.emit("hit", spaces[0].number, chunks, "", by, detail)
        for group, parts in enumerate(() if isinstance(found, bytes) else found):
            for part in parts:
                if part.space is not spaces[group]:
                    self.events.counters["hit:other split"] += len(part.ids) // 4

    def _lease(
        self,
        now: float,
        by: By,
        instance: Instance,
        spaces: Sequence[Space],
        chunks: int,
        found: Found,
        first_wanted: int,
    ) -> Hit:
        """Touch the first `chunks` chunks, which can be used, and lease those that are needed from `first_wanted` on."""
        own, foreign = [Held(space, space.table, b"") for space in spaces], []
        for group, parts in enumerate(found):
            for part in parts:
                self._touch_part(now, part)
                first = max(part.first, first_wanted)
                held = Held(part.space, part.space.table, part.ids[4 * (first - part.first) :])
                if held.ids and part.space is spaces[group] and part is parts[0]:
                    own[group] = held
                elif held.ids:
                    foreign.append((group, first, held))
        leased = [*own, *(held for _, _, held in foreign)]
        if not any(held.ids for held in leased):
            return Hit(chunks, 0, b"", (b"",) * len(own[1:]))
        number = self._new_lease(Lease(by, instance, now + self.claim_seconds, leased))
        extents = [held.table.extents(held.ids) for held in leased]
        further = [
            Foreign(group, first, held.space, sectors)
            for (group, first, held), sectors in zip(foreign, extents[len(own) :], strict=True)
        ]
        return Hit(chunks, number, extents[0], tuple(extents[1 : len(own)]), tuple(further))

    def _lease_own(self, now: float, by: By, instance: Instance, space: Space, ids: bytes, first_wanted: int) -> Hit:
        """Do the same as `_lease` for a prefix that is in the only group's own space."""
        leased, table, chunks = ids[4 * first_wanted :], space.table, len(ids) // 4
        if ids:
            self._touch(now, space, ids)
        if not leased:
            return Hit(chunks, 0, b"")
        table.pin(leased)
        number = self._claims.add(Lease(by, instance, now + self.claim_seconds, (Held(space, table, leased),)))
        return Hit(chunks, number, table.extents(leased))

    def _touch_part(self, now: float, part: Part) -> None:
        if part.first and not part.space.reach_chunks:
            self._touch_path(now, part.space, list(array("I", part.ids)))
        elif part.ids:
            self._touch(now, part.space, part.ids)

    def _new_lease(self, lease: Lease) -> int:
        for part in lease.parts:
            part.table.pin(part.ids)
        return self._claims.add(lease)

    def peek(self, now: float, process: int, space_number: int, hashes: bytes, sisters: bool = False) -> int:
        """Count how many of these chunks, from the first on, are complete; touch them, but neither lease them nor count hits.
        sisters: as in `lookup`.

        Raises:
            Refusal: unknown space or process.
        """
        space, _ = self._admit(process, space_number)
        parts = parts_of(space, hashes, sisters)
        for part in parts:
            self._touch_part(now, part)
        return parts[-1].end

    def hold(self, now: float, space_number: int, hashes: bytes, tier: str = "") -> tuple[int, bytes, bytes]:
        """Lease for the server, on behalf of `tier`, all complete chunks among these, without touching or counting them.

        Returns (lease, hashes of the leased chunks, their extents as u32 sectors [chunk][shard]); lease 0 if none is complete.
        """
        space = self._spaces.get(space_number)
        if space is None:
            return 0, b"", b""
        table, keys = space.table, split_hashes(hashes)
        found = [(key, one) for key in keys if (one := table.get(key)) >= 0 and table.complete(one)]
        if not found:
            return 0, b"", b""
        ids, instance = pack_ids([one for _, one in found]), self._claims.instance_of(SERVER, tier)
        number = self._new_lease(
            Lease((SERVER, tier, ""), instance, now + self.claim_seconds, [Held(space, table, ids)])
        )
        return number, b"".join(key for key, _ in found), table.extents(ids)

    def having(self, fingerprint: bytes, shards: int, hashes: bytes) -> bytes:
        """Return one byte for each of these chunks: 1 if it is complete in the space of this name. Nothing is touched."""
        space = self._space_of.get((fingerprint, shards))
        if space is None:
            return bytes(len(hashes) // HASH_BYTES)
        table = space.table
        first = len(table.match(hashes)) // 4  # nearly always a prefix
        rest = map(table.get, split_hashes(hashes[first * HASH_BYTES :]))
        return b"\1" * first + bytes([one >= 0 and table.complete(one) for one in rest])

    def lend(self, now: float, process: int, fingerprint: bytes, shards: int, shard: int, hashes: bytes) -> Lent:
        """Lease for a peer all complete chunks among these, without touching or counting them. The process needs no space.

        Raises:
            Refusal: unknown process, a shard that no chunk of this split has, or too many claims of this process.
        """
        instance, space = self._claims.instance_of(process), self._space_of.get((fingerprint, shards))
        if not 0 <= shard < shards:
            raise Refusal(f"shard {shard} of {shards} is invalid")
        reason = self._claims.why_no_lease(instance)
        if reason:
            raise Refusal(f"no more chunks can be lent to this peer: {reason}")
        if space is None:
            return Lent(0, 0, [])
        table = space.table
        ids = [one for one in map(table.get, split_hashes(hashes)) if one >= 0 and table.complete(one)]
        if not ids:
            return Lent(0, 0, [])
        names, parents = names_of(table, ids)
        sectors = array("I", table.extents(pack_ids(ids)))[shard :: space.shards]
        lease = Lease((process, "", ""), instance, now + self.claim_seconds, [Held(space, table, pack_ids(ids))])
        found = list(zip(split_hashes(names), split_hashes(parents), sectors, strict=True))
        return Lent(self._new_lease(lease), space.shard_bytes[shard], found, space.chunk_bytes)

    def release(self, process: int, lease: int) -> None:
        """End a lease whose extents the instance no longer reads. An unknown lease is ignored, because it has ended before."""
        if self._claims.lease(process, lease) is not None:
            self._end_lease(lease)

    def renew(self, now: float, process: int, leases: Iterable[int]) -> int:
        """Restart the time of these leases, including expired ones, since the extents of a lease do not change until it ends.
        Returns how many were renewed; the others have ended, or belong to another instance."""
        return self._claims.renew(now, process, leases)

    def keep_leases(self, process: int, known: Iterable[int]) -> int:
        """End the leases of this process that are not in `known`, whose answers the process did not receive. Returns how many."""
        lost = self._claims.unknown_leases(process, known)
        for number in lost:
            self._end_lease(number)
        return len(lost)

    def leased_sectors(
        self, process: int, lease: int, shard: int, first: int, count: int, part: int = 0
    ) -> tuple[list[int], int]:
        """Return (sectors, bytes of each) of `count` chunks from `first` on, for payload frames. part: of which part of the
        lease; the groups are counted first, and then the `foreign` parts of the hit. The lease may have expired.

        Raises:
            Refusal: the process's instance has no such lease, or the part, the chunks or the shard are outside it.
        """
        claim = self._claims.lease(process, lease)
        if claim is None:
            raise Refusal(f"lease {lease} is unknown or has ended")
        if not 0 <= part < len(claim.parts):
            raise Refusal(f"part {part} is outside lease {lease}, which has {len(claim.parts)}")
        held = claim.parts[part]
        sectors = array("I", held.table.extents(held.ids))[shard :: held.space.shards]
        if not 0 <= shard < held.space.shards or not 0 <= first <= first + count <= len(sectors):
            raise Refusal(f"chunks {first}..{first + count} of shard {shard} are outside lease {lease}")
        return list(sectors[first : first + count]), held.space.shard_bytes[shard]

    # Expiry, and clearing

    def tick(self, now: float) -> None:
        """Expire claims whose deadline has passed, as many as `EXPIRED_A_TICK` allows. Their extents are put into quarantine and
        not reused."""
        self.promises.tick(now)
        left = EXPIRED_A_TICK
        while left > 0 and (claim := self._claims.next_expired(now)) is not None:
            left -= claim.chunks
            self._expired(claim)
        self.let_go()
        self._close_spaces()
        self._allocator.retry_shares()

    def _expired(self, claim: AnyClaim) -> None:
        if isinstance(claim, Reservation):
            self._emit("expired", claim, claim.ids, "reservation")
            self._end_fills(claim, set(claim.sectors), "too late")
            return
        for space, table, ids in claim.parts:
            detail = partial(of_records, table=table, records=array("I", ids))
            self.events.emit("expired", space.number, len(ids) // 4, "lease", claim.by, detail)

    def clear(self) -> int:
        """Remove all chunks; return how many were complete. Extents under a claim are freed when the claim ends."""
        self._stop_letting_go()
        kept: dict[int, set[int]] = {number: set() for number in self._spaces}
        keys = {number: self._complete_keys(space) for number, space in self._spaces.items()}
        for claim in self._claims.leases.values():
            for part in claim.parts:
                kept[part.space.number].update(_leave_index(part.table, part.ids))
        for held in self._claims.reservations.values():
            sectors = held.sectors if held.expired else _leave_index(held.table, pack_ids(held.ids))
            kept[held.space.number].update(sectors)
        gone = 0
        for space in self._spaces.values():
            self._allocator.vacate(space, kept[space.number])
            detail = partial(Event._replace, hashes=keys[space.number])
            self.events.emit("cleared", space.number, space.complete, "", NOBODY, detail)
            gone += space.complete
            space.table = self._new_empty(space.shards, space.reach_chunks, space.share)
            space.complete = 0
            space.last_used.clear()
        self._fleeting.clear()
        self.promises.clear()
        self._note_cleared()
        self._allocator.retry_shares()
        return gone

    # State

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of extents whose claim has expired and that a process may still touch."""
        return self._claims.quarantine.bytes

    def index_bytes(self) -> int:
        """Of the tables of all spaces, and of those that were cleared while somebody had a claim on their chunks."""
        tables = {space.table for space in self._spaces.values()} | self._claims.tables()
        return sum(table.memory_bytes() for table in tables)

    @property
    def open_leases(self) -> int:
        return len(self._claims.leases)


def _leave_index(table: Table, ids: bytes) -> array[int]:
    """Detach the chunks of a claim from a table that is about to be replaced. Returns the sectors of all their extents."""
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
