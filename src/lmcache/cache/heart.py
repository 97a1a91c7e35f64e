"""The heart of the server: index, leases, reservations, and what becomes of them.

The rules of this file:
- A chunk is *whole* when all its shards are committed, and only whole chunks are answered. A lookup answers with a prefix.
- A *lease* (right to read) belongs to an engine instance; a *reservation* (right to fill) to one of its processes. Both end
  by release or commit, or when every process that may still touch the extents is known to be gone. A deadline ends the claim
  only: the extents stay out of use (quarantine) until then, are counted, and an instance with too many gets nothing new.
- An expired lease keeps its chunks, which others may go on reading, and can be renewed. An expired reservation keeps its extents
  but not its chunks: whoever computes these next fills them, in other extents, and what the late writer commits is refused.
- An extent is reused only when nobody may touch it: its chunk is not leased, and it is not being filled.
- A chunk that is leased or being filled is never evicted, nor is one that it needs to be reachable (`room` says what is).
- A shard that could not be filled leaves a gap in its chunk, which whoever computes it next fills: what hangs on it stays.
- New data is refused only when nothing may be evicted for it; every refusal has a reason and is counted.
- Clearing changes the index for an empty one. Claims on the old one keep it, and their extents, until they end.
- The server itself reads and fills extents on behalf of the tiers, as the process `SERVER`. It is always there and counts as no
  user of a space. Its claims expire like all others, and no extent is freed under an I/O thread: what a tier that hangs may still
  touch is that tier's quarantine, and no other's.
- The work of a call is bounded by what it is given, or by what it ends; that of a tick by `EXPIRED_A_TICK`.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.allocator import Allocator, Space
from lmcache.cache.table import COMPLETED, EMPTY, RELEASED, ChunkTable, Table
from lmcache.chunks import HASH_BYTES
from lmcache.errors import LMCacheError
from lmcache.memory.slabs import NO_EXTENT, Slabs

SERVER = 0
"""The process that is the server itself. Engines' processes have numbers above."""
_OWN_INSTANCE = "\0server"
"""No engine is called so: what engines say of themselves is printable."""
MAX_SPACES = 1024
MAX_SPACES_OF_INSTANCE = 64
"""Of one engine instance, which needs one for each model that it serves."""
MAX_SHARDS = 1024
"""The most shards that a chunk may have. The index keeps 5 bytes a shard for each chunk, however few of them are there."""
QUARANTINE_SHARE = 4
"""An instance (or tier) whose expired claims hold more than 1/4 of the arena gets no new extents."""
MAX_LEASES = 4096
"""The most leases that one engine instance may hold at a time: several times the requests that an engine runs at once."""
EXPIRED_A_TICK = 16384
"""Chunks. A tick ends claims until it has ended claims on so many; the next tick goes on."""


class Refusal(LMCacheError):
    """A request that the heart declines: unknown space, lease or reservation, or too much in quarantine."""


class TooSmall(Refusal):
    """L1 has no room for a single chunk of this layout."""


class Event(NamedTuple):
    """What happened to chunks, told once.

    hit, missed    of a lookup.
    stored         they are whole now. evicted, cleared: they were whole and are gone. So stored - evicted - cleared are there.
    reserved       a rank got extents for its shards of them. committed, dropped: it has filled them, or did not.
    incomplete     they were evicted before all ranks had stored their shards, though some had.
    refused        they got no extents.
    expired        the claim on them has passed its deadline. Those of a reservation are dropped with that.
    """

    kind: str
    space: int
    chunks: int
    reason: str = ""


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


class Committed(NamedTuple):
    """Effect: these extents hold what their keys say from now on. `keys` and `parents` are 16 bytes each, zeros for no parent."""

    fingerprint: bytes
    shards: int
    shard: int
    shard_bytes: int
    sectors: list[int]
    keys: bytes
    parents: bytes


class Freed(NamedTuple):
    """Effect: these extents hold nothing of ours any more, and may be given away by the answer that follows."""

    sectors: list[int]


class Cleared(NamedTuple):
    """Effect: no extent at all holds anything of ours any more."""


class Completed(NamedTuple):
    """Effect: these chunks can be read from now on, by the last commit of `process`. `keys` and `parents` as in `Committed`."""

    space: int
    process: int
    keys: bytes
    parents: bytes


Effect = Committed | Freed | Cleared | Completed


@dataclass(slots=True)
class _Claim:
    process: int
    instance: str
    space: Space
    table: Table
    """The space's, or the one that it had before it was cleared."""
    deadline: float
    expired: bool = field(default=False, init=False)


@dataclass(slots=True)
class _Lease(_Claim):
    ids: bytes

    @property
    def chunks(self) -> int:
        return len(self.ids) // 4


@dataclass(slots=True)
class _Reservation(_Claim):
    shard: int
    ids: list[int]
    """The chunks' numbers in `table`. They mean nothing once the reservation has expired."""
    sectors: list[int]

    @property
    def chunks(self) -> int:
        return len(self.ids)

    @property
    def shard_bytes(self) -> int:
        return self.space.shard_bytes[self.shard]


_AnyClaim = _Lease | _Reservation


class _Quarantine:
    """Bytes of the extents of expired claims. A chunk that several leases hold counts once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._leases: Counter[int] = Counter()
        """First sector of a chunk -> expired leases on it."""

    def add(self, claim: _AnyClaim) -> None:
        """The work is that of the claim's own chunks, however many other claims have expired."""
        if isinstance(claim, _Reservation):
            self.bytes += len(claim.sectors) * claim.shard_bytes
            return
        before = len(self._leases)
        self._leases.update(_first_sectors(claim))
        self.bytes += (len(self._leases) - before) * sum(claim.space.shard_bytes)

    def remove(self, claim: _AnyClaim) -> None:
        if isinstance(claim, _Reservation):
            self.bytes -= len(claim.sectors) * claim.shard_bytes
            return
        leases, before = self._leases, len(self._leases)
        for sector in _first_sectors(claim):
            leases[sector] -= 1
            if not leases[sector]:
                del leases[sector]
        self.bytes -= (before - len(leases)) * sum(claim.space.shard_bytes)


@dataclass(slots=True)
class _Process:
    instance: str
    reservations: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Instance:
    processes: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    spaces: set[int] = field(default_factory=set)
    quarantine: _Quarantine = field(default_factory=_Quarantine)


class Heart:
    """All decisions about one arena of `total_bytes`. See the rules at the head of this file.

    Args:
        total_bytes: size of the arena.
        claim_seconds: how long a lease or reservation is a claim, unless a lease is renewed; afterwards its extents are in
            quarantine until given back.
        new_table: makes the index of a space with so many shards.
        first_number: of leases and reservations. Each server's begin elsewhere, so that one of a server that has gone means
            nothing to the next, however late it is released there.
    """

    def __init__(
        self,
        total_bytes: int,
        claim_seconds: float = 30.0,
        new_table: Callable[[int], Table] = ChunkTable,
        first_number: int = 1,
    ) -> None:
        self.total_bytes = total_bytes
        self.claim_seconds = claim_seconds
        self._quota = total_bytes // QUARANTINE_SHARE
        self.events: list[Event] = []
        self.effects: list[Effect] = []
        """What to do to the extents' headers. Both lists are drained by the server: effects before the next answer goes out."""
        self.counters: Counter[str] = Counter()
        self._new_table = new_table
        self._allocator = Allocator(total_bytes, self._evict)
        self._spaces: dict[int, Space] = {}
        self._space_of: dict[tuple[bytes, int], Space] = {}
        self._instances: dict[str, _Instance] = {_OWN_INSTANCE: _Instance({SERVER})}
        self._processes: dict[int, _Process] = {SERVER: _Process(_OWN_INSTANCE)}
        self._leases: dict[int, _Lease] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._due: OrderedDict[int, _AnyClaim] = OrderedDict()
        """Claims that have not expired, the next one to do so first: all last equally long."""
        self._quarantine = _Quarantine()
        """The extents that are in quarantine, of all instances together."""
        self._cleared: list[Table] = []
        """Tables that were cleared while somebody had a claim on their chunks."""
        self._next = first_number
        self._next_space = 0

    # Who is there

    def join(self, process: int, instance: str) -> None:
        """A process of an engine instance has connected (again)."""
        known = self._processes.get(process)
        if known is not None and known.instance != instance:
            self.leave(process)
        self._processes.setdefault(process, _Process(instance))
        self._instances.setdefault(instance, _Instance()).processes.add(process)

    def leave(self, process: int) -> None:
        """A process is gone for good and touches no extent any more: its reservations end; with the last one, the leases."""
        known = self._processes.get(process)
        if known is None:
            return
        self._drop_reservations(process, "owner died")
        del self._processes[process]
        instance = self._instances[known.instance]
        instance.processes.discard(process)
        if not instance.processes:
            for number in list(instance.leases):
                self._end_lease(number)
            for space in instance.spaces:
                self._allocator.leave(self._spaces[space], known.instance)
            del self._instances[known.instance]

    def leave_reservations(self, process: int) -> None:
        """A process says that it fills no extent any more, though it did not commit."""
        self._drop_reservations(process, "connection lost")

    def _drop_reservations(self, process: int, reason: str) -> None:
        known = self._processes.get(process)
        for number in list(known.reservations) if known is not None else ():
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
        name, instance = self._instance(process)
        if (known is None or known.number not in instance.spaces) and len(instance.spaces) >= MAX_SPACES_OF_INSTANCE:
            raise Refusal(f"this engine has {MAX_SPACES_OF_INSTANCE} layouts open already: restart it to close them")
        space = known or self._new_space(fingerprint, shards)
        if shard >= 0:
            self._open_shard(space, shard, shard_bytes)
        instance.spaces.add(space.number)
        self._allocator.join(space, name)
        return space.number

    def _new_space(self, fingerprint: bytes, shards: int) -> Space:
        if len(self._spaces) >= MAX_SPACES:
            raise Refusal(f"{MAX_SPACES} layouts are open already: close some engines, or clear the cache")
        number, self._next_space = self._next_space, self._next_space + 1
        space = Space(number, fingerprint, shards, self._new_table(shards), [-1] * shards, [0] * shards)
        self._space_of[fingerprint, shards] = self._spaces[number] = space
        return space

    def _open_shard(self, space: Space, shard: int, shard_bytes: int) -> None:
        if shard_bytes < 1:
            raise Refusal(f"extent size {shard_bytes} of shard {shard} makes no sense")
        if space.shard_bytes[shard] not in (0, shard_bytes):
            raise Refusal(f"shard {shard} has extents of {space.shard_bytes[shard]} bytes, not {shard_bytes}")
        if not space.shard_bytes[shard]:
            self._allocator.open(space, shard, shard_bytes)

    # Reading

    def shards(self, process: int, space_number: int) -> int:
        """How many shards a chunk of this space has.

        Raises:
            Refusal: unknown space or process.
        """
        return self._admit(process, space_number)[0].shards

    def lookup(self, now: float, process: int, space_number: int, hashes: bytes, first_wanted: int = 0) -> Hit:
        """How many of these chunks are visible, from the first on; those from `first_wanted` on are leased.

        Raises:
            Refusal: unknown space or process.
        """
        admitted = space, _, instance = self._admit(process, space_number)
        asked = len(hashes) // HASH_BYTES
        reason = self._why_no_lease(instance)
        if reason:
            self._emit("missed", space, asked, reason)
            return Hit(0, 0, b"")
        ids = space.table.match(hashes)
        hit = self._lease(now, process, admitted, ids, first_wanted)
        if hit.chunks < asked:
            self._emit("missed", space, asked - hit.chunks, self._why_missed(space, hashes, hit.chunks))
        return hit

    def lookup_all(
        self, now: float, process: int, space_number: int, hashes: bytes, first_wanted: int = 0
    ) -> Hit | None:
        """As `lookup` where all of these chunks are visible. Else None: nothing is touched, leased or counted.

        Raises:
            Refusal: unknown space or process.
        """
        admitted = space, _, instance = self._admit(process, space_number)
        ids = space.table.match(hashes)
        if len(ids) // 4 < len(hashes) // HASH_BYTES or self._why_no_lease(instance):
            return None
        return self._lease(now, process, admitted, ids, first_wanted)

    def _lease(
        self, now: float, process: int, admitted: tuple[Space, str, _Instance], ids: bytes, first_wanted: int
    ) -> Hit:
        """Touch and count the chunks that were found, and lease those from `first_wanted` on."""
        (space, name, instance), chunks = admitted, len(ids) // 4
        if chunks:
            space.table.touch(ids)
            self._emit("hit", space, chunks)
        leased = ids[4 * first_wanted :]
        if not leased:
            return Hit(chunks, 0, b"")
        lease = _Lease(process, name, space, space.table, now + self.claim_seconds, leased)
        return Hit(chunks, self._new_lease(lease, instance), space.table.extents(leased))

    def _new_lease(self, lease: _Lease, instance: _Instance) -> int:
        lease.table.pin(lease.ids)
        number = self._number()
        self._leases[number] = self._due[number] = lease
        instance.leases.add(number)
        return number

    def peek(self, process: int, space_number: int, hashes: bytes) -> int:
        """How many of these chunks are there from the first on. Touched, but neither leased nor counted: more are on their way.

        Raises:
            Refusal: unknown space or process.
        """
        space, _, _ = self._admit(process, space_number)
        ids = space.table.match(hashes)
        if ids:
            space.table.touch(ids)
        return len(ids) // 4

    def hold(self, now: float, space_number: int, hashes: bytes, tier: str = "") -> tuple[int, bytes, bytes]:
        """For the server: lease those of these chunks that are whole, wherever they stand, and neither touch nor count them.

        tier: on whose behalf. Returns (lease, their hashes, their extents as u32 sectors [chunk][shard]); lease 0 when none is there.
        """
        space = self._spaces.get(space_number)
        if space is None:
            return 0, b"", b""
        table, keys = space.table, [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        found = [(key, one) for key in keys if (one := table.get(key)) >= 0 and table.complete(one)]
        if not found:
            return 0, b"", b""
        ids = _ids([one for _, one in found])
        name, instance = self._account(tier)
        number = self._new_lease(_Lease(SERVER, name, space, table, now + self.claim_seconds, ids), instance)
        return number, b"".join(key for key, _ in found), table.extents(ids)

    def release(self, process: int, lease: int) -> None:
        """The instance reads these extents no more. An unknown lease is nothing to worry about: it has ended already."""
        held = self._leases.get(lease)
        if held is not None and self._may_read(process, held):
            self._end_lease(lease)

    def renew(self, now: float, process: int, leases: Iterable[int]) -> int:
        """The instance goes on reading these: their claims begin anew, also those that have expired, since the extents of a
        lease stay as they are until it ends. Returns how many there are; the others have ended, or are somebody else's."""
        count = 0
        for number in leases:
            held = self._leases.get(number)
            if held is None or not self._may_read(process, held):
                continue
            count += 1
            if held.expired:
                self._end_quarantine(held)
            held.deadline, self._due[number] = now + self.claim_seconds, held
            self._due.move_to_end(number)
        return count

    def keep_leases(self, process: int, known: Iterable[int]) -> int:
        """End the leases that this process took and does not know of: their answers never reached it. Returns how many."""
        kept = set(known)
        _, instance = self._instance(process)
        lost = [n for n in instance.leases if n not in kept and self._leases[n].process == process]
        for number in lost:
            self._end_lease(number)
        return len(lost)

    def leased_sectors(self, process: int, lease: int, shard: int, first: int, count: int) -> list[int]:
        """Sectors of a lease's chunks, for payload frames. One that has expired still keeps its extents as they were.

        Raises:
            Refusal: not a lease of this process's instance, or not inside it.
        """
        held = self._leases.get(lease)
        if held is None or not self._may_read(process, held):
            raise Refusal(f"lease {lease} is unknown or has ended")
        sectors = array("I", held.table.extents(held.ids))[shard :: held.space.shards]
        if not 0 <= shard < held.space.shards or not 0 <= first <= first + count <= len(sectors):
            raise Refusal(f"chunks {first}..{first + count} of shard {shard} are outside lease {lease}")
        return list(sectors[first : first + count])

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
    ) -> Grant:
        """Extents for this rank's shard of the chunks after `parent`; what is there already or under way is skipped.

        tier: where the server reserves, on whose behalf.

        Raises:
            Refusal: unknown space, process or shard.
        """
        space, name, instance = self._admit(process, space_number, tier)
        if not 0 <= shard < space.shards or space.classes[shard] < 0:
            raise Refusal(f"shard {shard} was not registered")
        table, asked = space.table, len(hashes) // HASH_BYTES
        parent_id = -1 if root else table.get(parent)
        reason = ""
        if instance.quarantine.bytes > self._quota:
            reason = "quarantine"
        elif parent_id < 0 and not root:
            reason = "no parent"
        elif process == SERVER and not space.instances:
            reason = "no engine"  # a tier's load for one that has gone: nothing in use makes room for it
        if reason:
            self._emit("refused", space, asked, reason)
            return Grant(0, _ids([NO_EXTENT] * asked), asked, reason)
        ids, sectors = self._fill_chain(space, shard, parent_id, hashes)
        refused = asked - len(sectors)
        if refused:
            reason = "no room"
            self._emit("refused", space, refused, reason)
        number = 0
        if ids:
            number = self._number()
            filled = [sector for sector in sectors if sector != NO_EXTENT]
            held = _Reservation(process, name, space, table, now + self.claim_seconds, shard, ids, filled)
            self._reservations[number] = self._due[number] = held
            self._processes[process].reservations.add(number)
            self._emit("reserved", space, len(ids))
        return Grant(number, _ids(sectors + [NO_EXTENT] * refused), refused, reason)

    def _fill_chain(self, space: Space, shard: int, parent: int, hashes: bytes) -> tuple[list[int], list[int]]:
        """Ids that are now being filled, and one sector a chunk until the memory ran out."""
        table = space.table
        keys = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        known = [number for number in map(table.get, keys) if number >= 0]
        # First of all, so that what goes for the new ones is something else.
        self._touch(table, known if parent < 0 else [parent, *known])
        ids: list[int] = []
        sectors: list[int] = []
        path = [parent] if parent >= 0 else []
        table.pin(_ids(path))
        for key in keys:
            number = table.get(key)
            if number >= 0:
                table.pin(_ids([number]))
                path.append(number)
            sector = NO_EXTENT  # there, or under way by somebody else
            if number < 0 or table.state(number, shard) == EMPTY:
                found = self._allocator.find(space, shard)
                if found is None:
                    break
                sector = found
            if number < 0:
                number = table.insert(key, parent)
                table.pin(_ids([number]))
                path.append(number)
            if sector != NO_EXTENT:
                table.begin_fill(number, shard, sector)
                ids.append(number)
            sectors.append(sector)
            parent = number
        table.unpin(_ids(path))
        self._touch(table, path)
        return ids, sectors

    @staticmethod
    def _touch(table: Table, path: list[int]) -> None:
        """Touch chunks that follow each other, and all before them."""
        if path:
            table.touch(_ids(path))
            table.touch_path(path[0])

    def commit(self, now: float, process: int, reservation: int, ok: bool, failed: Container[int] = ()) -> int:
        """The extents are filled (`ok`), but those at the sectors in `failed`, or given back. Returns how many chunks' shards
        count as stored.

        Raises:
            Refusal: the reservation is unknown, or its claim had ended; the extents are free then, and nothing is stored.
        """
        held = self._reservations.get(reservation)
        if held is None or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        if held.expired or now > held.deadline:
            self._end_reservation(reservation, ok=False, reason="too late")
            raise Refusal(f"reservation {reservation} took longer than {self.claim_seconds} s")
        reason = "copy failed" if failed or not ok else "cleared"
        return self._end_reservation(reservation, ok, reason, failed=failed)

    def give_up(self, process: int, reservation: int, lost: Container[int]) -> None:
        """Nothing will be filled: the memory behind the extents at the sectors in `lost` cannot be had. These stay out of use until
        the cache is cleared, so that the next reservation gets others, in the end those of older chunks.

        Raises:
            Refusal: the reservation is unknown.
        """
        held = self._reservations.get(reservation)
        if held is None or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        self._end_reservation(reservation, False, "no memory", lost)

    def reserved_sectors(self, process: int, reservation: int) -> list[int]:
        """Sectors of a reservation's extents, for payload frames.

        Raises:
            Refusal: not a live reservation of this process.
        """
        held = self._reservations.get(reservation)
        if held is None or held.expired or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        return held.sectors

    def shard_bytes(self, reservation: int = 0, lease: int = 0, shard: int = 0) -> int:
        """Raw bytes of one extent of a reservation, or of a lease's shard."""
        if reservation:
            held = self._reservations[reservation]
            return held.space.shard_bytes[held.shard]
        return self._leases[lease].space.shard_bytes[shard]

    # Time, and emptying

    def tick(self, now: float) -> None:
        """End claims whose deadline has passed, as many as `EXPIRED_A_TICK` allows. Their extents go to quarantine, not back into
        use."""
        left = EXPIRED_A_TICK
        while left > 0 and self._due:
            number, claim = next(iter(self._due.items()))
            if now <= claim.deadline:
                break
            del self._due[number]
            left -= claim.chunks
            self._expire(claim)
        self._close_spaces()
        self._cleared = [table for table in self._cleared if table.detached()]
        self._allocator.retry_shares()

    def _expire(self, claim: _AnyClaim) -> None:
        claim.expired = True
        if isinstance(claim, _Reservation):
            self._emit("expired", claim.space, claim.chunks, "reservation")
            self._end_fills(claim, set(claim.sectors), "too late")
        else:
            self._emit("expired", claim.space, claim.chunks, "lease")
        self._quarantine.add(claim)
        self._instances[claim.instance].quarantine.add(claim)

    def _end_quarantine(self, claim: _AnyClaim) -> None:
        claim.expired = False
        self._quarantine.remove(claim)
        self._instances[claim.instance].quarantine.remove(claim)

    def _close_spaces(self) -> None:
        """Forget spaces that no engine uses and that have nothing in memory."""
        for space in [one for one in self._spaces.values() if not one.instances and not len(one.table)]:
            if not self._allocator.used_by(space):
                self._allocator.close(space)
                del self._spaces[space.number], self._space_of[space.fingerprint, space.shards]

    def clear(self) -> int:
        """Forget every chunk; returns how many. Extents that somebody may still read or fill are freed when that has ended."""
        kept: dict[int, set[int]] = {number: set() for number in self._spaces}
        for claim in self._leases.values():
            kept[claim.space.number].update(_leave_index(claim.table, claim.ids))
        for held in self._reservations.values():
            sectors = held.sectors if held.expired else _leave_index(held.table, _ids(held.ids))
            kept[held.space.number].update(sectors)
        gone = 0
        for space in self._spaces.values():
            self._allocator.vacate(space, kept[space.number])
            self._emit("cleared", space, space.whole)
            gone += space.whole
            if space.table.detached():
                self._cleared.append(space.table)
            space.table, space.whole = self._new_table(space.shards), 0
        self.effects.append(Cleared())
        self._allocator.retry_shares()
        return gone

    # What there is

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    def space(self, number: int) -> Space | None:
        return self._spaces.get(number)

    @property
    def slabs(self) -> Slabs:
        """The map of the arena; for looking only."""
        return self._allocator.slabs

    @property
    def chunks(self) -> int:
        """Chunks in the index, those being filled included."""
        return sum(len(space.table) for space in self._spaces.values())

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of extents whose claim has ended and that somebody may still touch."""
        return self._quarantine.bytes

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    @property
    def open_reservations(self) -> int:
        return len(self._reservations)

    def used_bytes(self) -> int:
        """Bytes of extents that hold something or are being filled."""
        return self._allocator.used_bytes()

    def index_bytes(self) -> int:
        return sum(table.memory_bytes() for table in (*(one.table for one in self._spaces.values()), *self._cleared))

    # Ends

    def _evict(self, space: Space, record: int) -> array[int]:
        """Take an idle chunk, and what hangs on it, out of the index and out of memory."""
        table = space.table
        ids = table.detach(record)
        gone = array("I", ids)
        whole = sum(map(table.complete, gone))
        space.whole -= whole
        self._emit("evicted", space, whole, "room")
        if whole < len(gone):
            begun = (_holds(table, one, space.shards) for one in gone)
            self._emit("incomplete", space, sum(begun) - whole, "room")
        self._free(space, table, ids)
        return gone

    def _free(self, space: Space, table: Table, ids: bytes) -> None:
        """Free detached records that nobody touches, and their extents."""
        sectors = array("I", table.extents(ids))
        self._allocator.free(space, sectors)
        self.effects.append(Freed([sector for sector in sectors if sector != NO_EXTENT]))
        for one in array("I", ids):
            table.free(one)

    def _end_lease(self, number: int) -> None:
        lease = self._leases.pop(number)
        self._instances[lease.instance].leases.discard(number)
        self._due.pop(number, None)
        if lease.expired:
            self._end_quarantine(lease)
        released = lease.table.unpin(lease.ids)
        if released:
            self._free(lease.space, lease.table, released)

    def _end_reservation(
        self, number: int, ok: bool, reason: str, lost: Container[int] = (), failed: Container[int] = ()
    ) -> int:
        """Shards that are in the index now; `reason` is for the others. Extents that were not filled are freed unless lost."""
        held = self._reservations.pop(number)
        self._processes[held.process].reservations.discard(number)
        empty = set(held.sectors if held.expired or not ok else [sector for sector in held.sectors if sector in failed])
        filled = 0 if held.expired else self._end_fills(held, empty, reason)
        self._due.pop(number, None)
        if held.expired:
            self._end_quarantine(held)
        for sector in empty:
            if sector not in lost:
                self._allocator.free_one(held.space, held.shard, sector)
        return filled

    def _end_fills(self, held: _Reservation, empty: Container[int], reason: str) -> int:
        """The chunks are this reservation's no more: their shards are there, but those that were to get the extents in `empty`.
        These are anybody's to fill, and the extents the caller's to free. Returns how many are in the index now; `reason` is for
        the others."""
        table, space = held.table, held.space
        pairs = list(zip(held.ids, held.sectors, strict=True))
        filled = [(one, sector) for one, sector in pairs if sector not in empty and table.attached(one)]
        whole: list[int] = []
        for one, sector in reversed(pairs):
            stays = sector not in empty
            outcome = table.end_fill(one, held.shard, stays)
            if outcome == COMPLETED:
                whole.append(one)
            elif outcome == RELEASED:  # it was cleared meanwhile, and nobody reads it
                self._free(space, table, _ids([one]))
            elif not stays:
                self._remove_bare(space, table, one)
        space.whole += len(whole)
        self._emit("stored", space, len(whole))
        self._emit("committed", space, len(filled))
        self._emit("dropped", space, len(pairs) - len(filled), reason)
        if filled:
            self.effects.append(_committed(held, filled))
        if whole:
            self.effects.append(Completed(space.number, held.process, *_names(table, whole[::-1])))
        return len(filled)

    def _remove_bare(self, space: Space, table: Table, record: int) -> None:
        """Take the chunk out of the index if nothing is there of it, and then those before it of which that is true as well."""
        while record >= 0 and self._is_bare(table, record, space.shards):
            parent = table.parent(record)
            self._free(space, table, table.detach(record))
            record = parent

    @staticmethod
    def _is_bare(table: Table, record: int, shards: int) -> bool:
        """Whether nothing would be lost with it."""
        idle = table.attached(record) and not table.pins(record) and not table.children(record)
        return idle and not _holds(table, record, shards)

    # Small things

    def _admit(self, process: int, space_number: int, tier: str = "") -> tuple[Space, str, _Instance]:
        name, instance = self._account(tier) if process == SERVER else self._instance(process)
        space = self._spaces.get(space_number)
        if space is None or (process != SERVER and name not in space.instances):
            raise Refusal(f"space {space_number} is not one that this engine has registered")
        return space, name, instance

    def _instance(self, process: int) -> tuple[str, _Instance]:
        known = self._processes.get(process)
        if known is None:
            raise Refusal("say hello first")
        return known.instance, self._instances[known.instance]

    def _account(self, tier: str) -> tuple[str, _Instance]:
        """The instance that holds the server's claims for this tier: each tier has a quarantine of its own."""
        name = f"{_OWN_INSTANCE} {tier}"
        return name, self._instances.setdefault(name, _Instance({SERVER}))

    def _may_read(self, process: int, lease: _Lease) -> bool:
        known = self._processes.get(process)
        return lease.process == process or (known is not None and lease.instance == known.instance)

    def _why_no_lease(self, instance: _Instance) -> str:
        if instance.quarantine.bytes > self._quota:
            return "quarantine"
        return "too many leases" if len(instance.leases) >= MAX_LEASES else ""

    def _why_missed(self, space: Space, hashes: bytes, chunks: int) -> str:
        missing = space.table.get(hashes[chunks * HASH_BYTES : (chunks + 1) * HASH_BYTES])
        if missing < 0:
            return "absent"
        return "being filled" if space.table.filling(missing) else "incomplete"

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _emit(self, kind: str, space: Space, chunks: int, reason: str = "") -> None:
        if not chunks:
            return
        self.events.append(Event(kind, space.number, chunks, reason))
        self.counters[kind] += chunks
        if reason:
            self.counters[f"{kind}:{reason}"] += chunks


def _ids(numbers: list[int]) -> bytes:
    return array("I", numbers).tobytes()


def _holds(table: Table, record: int, shards: int) -> bool:
    """Whether any of its shards is there or being filled."""
    return any(table.state(record, shard) != EMPTY for shard in range(shards))


def _first_sectors(lease: _Lease) -> array[int]:
    """The sector of each leased chunk's first shard, which identifies the chunk in the arena."""
    return array("I", lease.table.extents(lease.ids))[:: lease.space.shards]


def _leave_index(table: Table, ids: bytes) -> array[int]:
    """Detach the chunks of a claim from an index that is about to go. Returns the sectors of all their extents."""
    for one in array("I", ids):
        if table.attached(one):
            table.detach(one)
    return array("I", table.extents(ids))


def _committed(held: _Reservation, filled: list[tuple[int, int]]) -> Committed:
    space, names = held.space, _names(held.table, [one for one, _ in filled])
    size = space.shard_bytes[held.shard]
    return Committed(space.fingerprint, space.shards, held.shard, size, [sector for _, sector in filled], *names)


def _names(table: Table, records: list[int]) -> tuple[bytes, bytes]:
    """(hashes, hashes of the parents) of attached records, 16 bytes each; zeros where there is no parent."""
    parents = [table.parent(one) for one in records]
    return (
        b"".join(map(table.key, records)),
        b"".join(table.key(one) if one >= 0 else bytes(HASH_BYTES) for one in parents),
    )


def _too_small(chunk_bytes: int, total_bytes: int) -> str:
    least = -(-chunk_bytes * 1000 // 2**30) / 1000
    return (
        f"L1 has {total_bytes / 2**20:.1f} MiB, and one chunk of this model takes {chunk_bytes / 2**20:.1f} MiB: start the "
        f"server with --l1-size-gb (in process: max_local_cpu_size) well above {least:g}, or with a smaller --chunk-size"
    )
