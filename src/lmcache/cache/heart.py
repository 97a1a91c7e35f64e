"""The heart of the server: index, leases, reservations, and what becomes of them.

The rules of this file:
- A chunk is *whole* when all its shards are committed, and only whole chunks are answered. A lookup answers with a prefix.
- A *lease* (right to read) belongs to an engine instance; a *reservation* (right to fill) to one of its processes. Both end
  by release or commit, or when every process that may still touch the slots is known to be gone. A deadline ends the claim
  only: the slots stay out of use (quarantine) until then, are counted, and an instance with too many gets nothing new.
- A slot is reused only when nobody may touch it: its chunk is not leased, and it is not being filled.
- A chunk that is leased or being filled is never evicted, nor is one that it needs to be reachable (`room` says what is).
- A shard that could not be filled leaves a gap in its chunk, which whoever computes it next fills: what hangs on it stays.
- New data is refused only when nothing may be evicted for it; every refusal has a reason and is counted.
- Clearing changes the index for an empty one. Claims on the old one keep it, and their slots, until they end.
- The server itself reads and fills slots on behalf of the tiers, as the process `SERVER`. It is always there, counts as no
  user of a space, and its claims have no deadline: tiers have time-outs of their own, and no slot is freed under an I/O thread.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.room import Room, Space
from lmcache.cache.table import COMPLETED, EMPTY, NO_PAGE, RELEASED, ChunkTable, Table
from lmcache.chunks import HASH_BYTES
from lmcache.errors import LMCacheError
from lmcache.memory.slabs import Slabs

NO_SLOT = NO_PAGE
SERVER = 0
"""The process that is the server itself. Engines' processes have numbers above."""
_OWN_INSTANCE = "\0server"
"""No engine is called so: what engines say of themselves is printable."""
MAX_SPACES = 1024
QUARANTINE_SHARE = 4
"""An instance whose expired claims hold more than 1/4 of the arena gets no new slots."""


class Refusal(LMCacheError):
    """A request that the heart declines: unknown space, lease or reservation, or too much in quarantine."""


class Event(NamedTuple):
    """What happened to chunks, told once.

    hit, missed    of a lookup.
    stored         they are whole now. evicted, cleared: they were whole and are gone. So stored - evicted - cleared are there.
    reserved       a rank got slots for its shards of them. committed, dropped: it has filled them, or did not.
    incomplete     they were evicted before all ranks had stored their shards, though some had.
    refused        they got no slots.
    expired        the claim on them has passed its deadline.
    """

    kind: str
    space: int
    chunks: int
    reason: str = ""


class Hit(NamedTuple):
    """`chunks` from the prompt's start are there; `slots` (u32 pages, [chunk][shard]) are those of the leased ones."""

    chunks: int
    lease: int
    slots: bytes


class Grant(NamedTuple):
    """A reservation: one page a chunk, `NO_SLOT` where nothing is to be filled; `refused` chunks got no room."""

    reservation: int
    slots: bytes
    refused: int
    reason: str


class Committed(NamedTuple):
    """Effect: these slots hold what their keys say from now on. `keys` and `parents` are 16 bytes each, zeros for no parent."""

    fingerprint: bytes
    shards: int
    shard: int
    slot_bytes: int
    pages: list[int]
    keys: bytes
    parents: bytes


class Freed(NamedTuple):
    """Effect: these slots hold nothing of ours any more, and may be given away by the answer that follows."""

    pages: list[int]


class Cleared(NamedTuple):
    """Effect: no slot at all holds anything of ours any more."""


class Whole(NamedTuple):
    """Effect: these chunks can be read from now on, by the last commit of `process`. `keys` and `parents` as in `Committed`."""

    space: int
    process: int
    keys: bytes
    parents: bytes


Effect = Committed | Freed | Cleared | Whole


@dataclass(slots=True)
class _Lease:
    process: int
    instance: str
    space: Space
    table: Table
    """The space's, or the one that it had before it was cleared."""
    ids: bytes
    deadline: float
    expired: bool = False


@dataclass(slots=True)
class _Reservation:
    process: int
    instance: str
    space: Space
    table: Table
    shard: int
    ids: list[int]
    pages: list[int]
    deadline: float
    expired: bool = False


@dataclass(slots=True)
class _Instance:
    processes: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    expired: set[int] = field(default_factory=set)
    """Leases and reservations in quarantine."""
    quarantined_bytes: int = 0


class Heart:
    """All decisions about one arena of `total_bytes`. See the rules at the head of this file.

    Args:
        total_bytes: size of the arena.
        claim_seconds: how long a lease or reservation is a claim; afterwards its slots are in quarantine until given back.
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
        self.events: list[Event] = []
        self.effects: list[Effect] = []
        """What to do to the slots' headers. Both lists are drained by the server: effects before the next answer goes out."""
        self.counters: Counter[str] = Counter()
        self._new_table = new_table
        self._room = Room(total_bytes, self._evict)
        self._spaces: dict[int, Space] = {}
        self._space_of: dict[tuple[bytes, int], Space] = {}
        self._instances: dict[str, _Instance] = {_OWN_INSTANCE: _Instance({SERVER})}
        self._process_instance: dict[int, str] = {SERVER: _OWN_INSTANCE}
        self._leases: dict[int, _Lease] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._next = first_number
        self._next_space = 0

    # Who is there

    def join(self, process: int, instance: str) -> None:
        """A process of an engine instance has connected (again)."""
        if self._process_instance.get(process, instance) != instance:
            self.leave(process)
        self._process_instance[process] = instance
        self._instances.setdefault(instance, _Instance()).processes.add(process)

    def leave(self, process: int) -> None:
        """A process is gone for good and touches no slot any more: its reservations end; with the last one, the leases."""
        name = self._process_instance.get(process)
        if name is None:
            return
        self._drop_reservations(process, "owner died")
        del self._process_instance[process]
        instance = self._instances[name]
        instance.processes.discard(process)
        if not instance.processes:
            for number in list(instance.leases):
                self._end_lease(number)
            del self._instances[name]
            for space in self._spaces.values():
                space.instances.discard(name)
            self._room.stir(self._spaces.values())

    def leave_reservations(self, process: int) -> None:
        """A process says that it fills no slot any more, though it did not commit."""
        self._drop_reservations(process, "connection lost")

    def _drop_reservations(self, process: int, reason: str) -> None:
        for number in [n for n, held in self._reservations.items() if held.process == process]:
            self._end_reservation(number, ok=False, reason=reason)

    def open_space(self, process: int, fingerprint: bytes, shards: int, shard: int = -1, slot_bytes: int = 0) -> int:
        """The number of the space for this layout and split; a rank also tells its shard's slot size.

        Raises:
            Refusal: the slot does not fit in the arena, another rank told another size for this shard, or too many layouts.
        """
        if not 1 <= shards <= 0xFFFF or not -1 <= shard < shards:
            raise Refusal(f"shard {shard} of {shards} makes no sense")
        if slot_bytes > self.total_bytes:
            raise Refusal(f"a chunk's shard takes {slot_bytes} bytes, all of L1 {self.total_bytes}: raise --l1-size-gb")
        name, _ = self._instance(process)
        space = self._space_of.get((fingerprint, shards)) or self._new_space(fingerprint, shards)
        if shard >= 0:
            self._open_shard(space, shard, slot_bytes)
        space.instances.add(name)
        self._room.stir(self._spaces.values())
        return space.number

    def _new_space(self, fingerprint: bytes, shards: int) -> Space:
        if len(self._spaces) >= MAX_SPACES:
            raise Refusal(f"{MAX_SPACES} layouts are open already: close some engines, or clear the cache")
        number, self._next_space = self._next_space, self._next_space + 1
        space = Space(number, fingerprint, shards, self._new_table(shards), [-1] * shards, [0] * shards)
        self._space_of[fingerprint, shards] = self._spaces[number] = space
        return space

    def _open_shard(self, space: Space, shard: int, slot_bytes: int) -> None:
        if slot_bytes < 1:
            raise Refusal(f"slot size {slot_bytes} of shard {shard} makes no sense")
        if space.slot_bytes[shard] not in (0, slot_bytes):
            raise Refusal(f"shard {shard} has slots of {space.slot_bytes[shard]} bytes, not {slot_bytes}")
        if not space.slot_bytes[shard]:
            self._room.open(space, shard, slot_bytes)

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
            Refusal: unknown space or process, or the instance holds too much in quarantine.
        """
        admitted = space, _, instance = self._admit(process, space_number)
        asked = len(hashes) // HASH_BYTES
        if self._over_quota(instance):
            self._tell("missed", space, asked, "quarantine")
            return Hit(0, 0, b"")
        ids = space.table.match(hashes)
        hit = self._lease(now, process, admitted, ids, first_wanted)
        if hit.chunks < asked:
            self._tell("missed", space, asked - hit.chunks, self._why_missed(space, hashes, hit.chunks))
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
        if len(ids) // 4 < len(hashes) // HASH_BYTES or self._over_quota(instance):
            return None
        return self._lease(now, process, admitted, ids, first_wanted)

    def _lease(
        self, now: float, process: int, admitted: tuple[Space, str, _Instance], ids: bytes, first_wanted: int
    ) -> Hit:
        """Touch and count the chunks that were found, and lease those from `first_wanted` on."""
        (space, name, instance), chunks = admitted, len(ids) // 4
        if chunks:
            space.table.touch(ids)
            self._tell("hit", space, chunks)
        leased = ids[4 * first_wanted :]
        if not leased:
            return Hit(chunks, 0, b"")
        space.table.pin(leased)
        number = self._number()
        self._leases[number] = _Lease(process, name, space, space.table, leased, self._deadline(now, process))
        instance.leases.add(number)
        return Hit(chunks, number, space.table.slots(leased))

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

    def hold(self, space_number: int, hashes: bytes) -> tuple[int, bytes, bytes]:
        """For the server: lease those of these chunks that are whole, wherever they stand, and neither touch nor count them.

        Returns (lease, their hashes, their slots as u32 pages [chunk][shard]); lease 0 when none is there.
        """
        space = self._spaces.get(space_number)
        if space is None:
            return 0, b"", b""
        table, keys = space.table, [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        found = [(key, one) for key in keys if (one := table.get(key)) >= 0 and table.complete(one)]
        if not found:
            return 0, b"", b""
        ids = _ids([one for _, one in found])
        table.pin(ids)
        number = self._number()
        self._leases[number] = _Lease(SERVER, _OWN_INSTANCE, space, table, ids, math.inf)
        self._instances[_OWN_INSTANCE].leases.add(number)
        return number, b"".join(key for key, _ in found), table.slots(ids)

    def release(self, process: int, lease: int) -> None:
        """The instance reads these slots no more. An unknown lease is nothing to worry about: it has ended already."""
        held = self._leases.get(lease)
        if held is not None and held.instance == self._process_instance.get(process):
            self._end_lease(lease)

    def keep_leases(self, process: int, known: Iterable[int]) -> int:
        """End the leases that this process took and does not know of: their answers never reached it. Returns how many."""
        kept = set(known)
        _, instance = self._instance(process)
        lost = [n for n in instance.leases if n not in kept and self._leases[n].process == process]
        for number in lost:
            self._end_lease(number)
        return len(lost)

    def leased_pages(self, process: int, lease: int, shard: int, first: int, count: int) -> list[int]:
        """Pages of a lease's chunks, for payload frames.

        Raises:
            Refusal: not a lease of this process's instance, or not inside it.
        """
        held = self._leases.get(lease)
        if held is None or held.expired or held.instance != self._process_instance.get(process):
            raise Refusal(f"lease {lease} is unknown or has ended")
        pages = array("I", held.table.slots(held.ids))[shard :: held.space.shards]
        if not 0 <= shard < held.space.shards or not 0 <= first <= first + count <= len(pages):
            raise Refusal(f"chunks {first}..{first + count} of shard {shard} are outside lease {lease}")
        return list(pages[first : first + count])

    # Filling

    def reserve(
        self, now: float, process: int, space_number: int, shard: int, parent: bytes, root: bool, hashes: bytes
    ) -> Grant:
        """Slots for this rank's shard of the chunks after `parent`; what is there already or under way is skipped.

        Raises:
            Refusal: unknown space, process or shard.
        """
        space, name, instance = self._admit(process, space_number)
        if not 0 <= shard < space.shards or space.classes[shard] < 0:
            raise Refusal(f"shard {shard} was not registered")
        table, asked = space.table, len(hashes) // HASH_BYTES
        parent_id = -1 if root else table.get(parent)
        reason = ""
        if self._over_quota(instance):
            reason = "quarantine"
        elif parent_id < 0 and not root:
            reason = "no parent"
        elif process == SERVER and not space.instances:
            reason = "no engine"  # a tier's load for one that has gone: nothing in use makes room for it
        if reason:
            self._tell("refused", space, asked, reason)
            return Grant(0, _no_slots(asked), asked, reason)
        ids, pages = self._fill_chain(space, shard, parent_id, hashes)
        refused = asked - len(pages)
        if refused:
            reason = "no room"
            self._tell("refused", space, refused, reason)
        number = 0
        if ids:
            number = self._number()
            filled = [page for page in pages if page != NO_SLOT]
            deadline = self._deadline(now, process)
            self._reservations[number] = _Reservation(process, name, space, table, shard, ids, filled, deadline)
            self._tell("reserved", space, len(ids))
        slots = array("I", pages).tobytes() + _no_slots(refused)
        return Grant(number, slots, refused, reason)

    def _fill_chain(self, space: Space, shard: int, parent: int, hashes: bytes) -> tuple[list[int], list[int]]:
        """Ids that are now being filled, and one page a chunk until the memory ran out."""
        table = space.table
        keys = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        known = [number for number in map(table.get, keys) if number >= 0]
        # First of all, so that what goes for the new ones is something else.
        self._touch(table, known if parent < 0 else [parent, *known])
        ids: list[int] = []
        pages: list[int] = []
        path = [parent] if parent >= 0 else []
        table.pin(_ids(path))
        for key in keys:
            number = table.get(key)
            if number >= 0:
                table.pin(_ids([number]))
                path.append(number)
            page = NO_SLOT  # there, or under way by somebody else
            if number < 0 or table.state(number, shard) == EMPTY:
                found = self._room.find(space, shard)
                if found is None:
                    break
                page = found
            if number < 0:
                number = table.insert(key, parent)
                table.pin(_ids([number]))
                path.append(number)
            if page != NO_SLOT:
                table.begin_fill(number, shard, page)
                ids.append(number)
            pages.append(page)
            parent = number
        table.unpin(_ids(path))
        self._touch(table, path)
        return ids, pages

    @staticmethod
    def _touch(table: Table, path: list[int]) -> None:
        """Touch chunks that follow each other, and all before them."""
        if path:
            table.touch(_ids(path))
            table.touch_path(path[0])

    def commit(self, now: float, process: int, reservation: int, ok: bool, failed: Container[int] = ()) -> int:
        """The slots are filled (`ok`), but those at the pages in `failed`, or given back. Returns how many chunks' shards
        count as stored.

        Raises:
            Refusal: the reservation is unknown, or its claim had ended; the slots are free then, and nothing is stored.
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
        """Nothing will be filled: the memory behind the slots at the pages in `lost` cannot be had. These stay out of use until
        the cache is cleared, so that the next reservation gets others, in the end those of older chunks.

        Raises:
            Refusal: the reservation is unknown.
        """
        held = self._reservations.get(reservation)
        if held is None or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        self._end_reservation(reservation, False, "no memory", lost)

    def reserved_pages(self, process: int, reservation: int) -> list[int]:
        """Pages of a reservation's slots, for payload frames.

        Raises:
            Refusal: not a live reservation of this process.
        """
        held = self._reservations.get(reservation)
        if held is None or held.expired or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        return held.pages

    def slot_bytes(self, reservation: int = 0, lease: int = 0, shard: int = 0) -> int:
        """Raw bytes of one slot of a reservation, or of a lease's shard."""
        if reservation:
            held = self._reservations[reservation]
            return held.space.slot_bytes[held.shard]
        return self._leases[lease].space.slot_bytes[shard]

    # Time, and emptying

    def tick(self, now: float) -> None:
        """End claims whose deadline has passed. Their slots go to quarantine, not back into use."""
        for number, lease in self._leases.items():
            if not lease.expired and now > lease.deadline:
                self._expire(number, lease)
                self._tell("expired", lease.space, len(lease.ids) // 4, "lease")
        for number, reservation in self._reservations.items():
            if not reservation.expired and now > reservation.deadline:
                self._expire(number, reservation)
                self._tell("expired", reservation.space, len(reservation.ids), "reservation")
        for space in [one for one in self._spaces.values() if not one.instances and not len(one.table)]:
            if not self._room.used_by(space):
                self._room.close(space)
                del self._spaces[space.number], self._space_of[space.fingerprint, space.shards]
        self._room.stir(self._spaces.values())

    def clear(self) -> int:
        """Forget every chunk; returns how many. Slots that somebody may still read or fill are freed when that has ended."""
        gone = 0
        for space in self._spaces.values():
            keep: set[int] = set()
            for claim in self._claims():
                if claim.space is space:
                    keep.update(self._leave_index(claim))
            self._room.vacate(space, keep)
            self._tell("cleared", space, space.whole)
            gone += space.whole
            space.table, space.whole = self._new_table(space.shards), 0
        self.effects.append(Cleared())
        self._room.stir(self._spaces.values())
        return gone

    def _leave_index(self, claim: _Lease | _Reservation) -> array[int]:
        """Detach a claim's chunks from its index, which is about to go. Returns the pages of all their slots."""
        ids = _claimed(claim)
        for one in array("I", ids):
            if claim.table.attached(one):
                claim.table.detach(one)
        return array("I", claim.table.slots(ids))

    # What there is

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    def space(self, number: int) -> Space | None:
        return self._spaces.get(number)

    @property
    def slabs(self) -> Slabs:
        """The map of the arena; for looking only."""
        return self._room.slabs

    @property
    def chunks(self) -> int:
        """Chunks in the index, those being filled included."""
        return sum(len(space.table) for space in self._spaces.values())

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of slots whose claim has ended and that somebody may still touch."""
        return self._bytes_of(number for instance in self._instances.values() for number in instance.expired)

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    @property
    def open_reservations(self) -> int:
        return len(self._reservations)

    def used_bytes(self) -> int:
        """Bytes of slots that hold something or are being filled."""
        return self._room.used_bytes()

    def index_bytes(self) -> int:
        tables = {id(one.table): one.table for one in (*self._spaces.values(), *self._claims())}
        return sum(table.memory_bytes() for table in tables.values())

    # Ends

    def _evict(self, space: Space, record: int) -> array[int]:
        """Take an idle chunk, and what hangs on it, out of the index and out of memory."""
        table = space.table
        ids = table.detach(record)
        gone = array("I", ids)
        whole = sum(map(table.complete, gone))
        space.whole -= whole
        self._tell("evicted", space, whole, "room")
        if whole < len(gone):
            begun = (_holds(table, one, space.shards) for one in gone)
            self._tell("incomplete", space, sum(begun) - whole, "room")
        self._free(space, table, ids)
        return gone

    def _free(self, space: Space, table: Table, ids: bytes) -> None:
        """Free detached records that nobody touches, and their slots."""
        pages = array("I", table.slots(ids))
        self._room.free(space, pages)
        self.effects.append(Freed([page for page in pages if page != NO_PAGE]))
        for one in array("I", ids):
            table.free(one)

    def _end_lease(self, number: int) -> None:
        lease = self._leases[number]
        self._end_quarantine(number, lease)
        del self._leases[number]
        self._instances[lease.instance].leases.discard(number)
        released = lease.table.unpin(lease.ids)
        if released:
            self._free(lease.space, lease.table, released)

    def _end_reservation(
        self, number: int, ok: bool, reason: str, lost: Container[int] = (), failed: Container[int] = ()
    ) -> int:
        """Shards that are in the index now; `reason` is for the others. Slots that were not filled are freed unless lost."""
        held = self._reservations[number]
        self._end_quarantine(number, held)
        del self._reservations[number]
        table, space = held.table, held.space
        pairs = list(zip(held.ids, held.pages, strict=True))
        filled = [(one, page) for one, page in pairs if ok and page not in failed and table.attached(one)]
        whole: list[int] = []
        for one, page in reversed(pairs):
            good = ok and page not in failed
            outcome = table.end_fill(one, held.shard, good)
            if not good and page not in lost:
                self._room.free_one(space, held.shard, page)
            if outcome == COMPLETED:
                whole.append(one)
            elif outcome == RELEASED:  # it was cleared meanwhile, and nobody reads it
                self._free(space, table, _ids([one]))
            elif not good and self._is_bare(table, one, space.shards):
                self._free(space, table, table.detach(one))
        space.whole += len(whole)
        self._tell("stored", space, len(whole))
        self._tell("committed", space, len(filled))
        self._tell("dropped", space, len(pairs) - len(filled), reason)
        if filled:
            self.effects.append(_committed(held, filled))
        if whole:
            self.effects.append(Whole(space.number, held.process, *_names(table, whole[::-1])))
        return len(filled)

    @staticmethod
    def _is_bare(table: Table, record: int, shards: int) -> bool:
        """Whether nothing would be lost with it."""
        idle = table.attached(record) and not table.pins(record) and not table.children(record)
        return idle and not _holds(table, record, shards)

    def _expire(self, number: int, claim: _Lease | _Reservation) -> None:
        claim.expired = True
        instance = self._instances[claim.instance]
        instance.expired.add(number)
        instance.quarantined_bytes = self._bytes_of(instance.expired)

    def _end_quarantine(self, number: int, claim: _Lease | _Reservation) -> None:
        if claim.expired:
            instance = self._instances[claim.instance]
            instance.expired.discard(number)
            instance.quarantined_bytes = self._bytes_of(instance.expired)

    def _over_quota(self, instance: _Instance) -> bool:
        return instance.quarantined_bytes > self.total_bytes // QUARANTINE_SHARE

    def _claims(self) -> list[_Lease | _Reservation]:
        return [*self._leases.values(), *self._reservations.values()]

    def _bytes_of(self, numbers: Iterable[int]) -> int:
        """Bytes of all slots that these claims touch; a slot counts once."""
        slots: dict[int, int] = {}
        for number in numbers:
            reservation = self._reservations.get(number)
            if reservation is not None:
                size = reservation.space.slot_bytes[reservation.shard]
                slots.update(dict.fromkeys(reservation.pages, size))
            else:
                lease = self._leases[number]
                pages = array("I", lease.table.slots(lease.ids))
                slots.update(zip(pages, itertools.cycle(lease.space.slot_bytes)))
        return sum(slots.values())

    # Small things

    def _admit(self, process: int, space_number: int) -> tuple[Space, str, _Instance]:
        name, instance = self._instance(process)
        space = self._spaces.get(space_number)
        if space is None or (process != SERVER and name not in space.instances):
            raise Refusal(f"space {space_number} is not one that this engine has registered")
        return space, name, instance

    def _instance(self, process: int) -> tuple[str, _Instance]:
        name = self._process_instance.get(process)
        if name is None:
            raise Refusal("say hello first")
        return name, self._instances[name]

    def _why_missed(self, space: Space, hashes: bytes, chunks: int) -> str:
        missing = space.table.get(hashes[chunks * HASH_BYTES : (chunks + 1) * HASH_BYTES])
        if missing < 0:
            return "absent"
        return "being filled" if space.table.filling(missing) else "incomplete"

    def _deadline(self, now: float, process: int) -> float:
        return math.inf if process == SERVER else now + self.claim_seconds

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _tell(self, kind: str, space: Space, chunks: int, reason: str = "") -> None:
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


def _claimed(claim: _Lease | _Reservation) -> bytes:
    return claim.ids if isinstance(claim, _Lease) else _ids(claim.ids)


def _committed(held: _Reservation, filled: list[tuple[int, int]]) -> Committed:
    space, names = held.space, _names(held.table, [one for one, _ in filled])
    size = space.slot_bytes[held.shard]
    return Committed(space.fingerprint, space.shards, held.shard, size, [page for _, page in filled], *names)


def _names(table: Table, records: list[int]) -> tuple[bytes, bytes]:
    """(hashes, hashes of the parents) of attached records, 16 bytes each; zeros where there is no parent."""
    parents = [table.parent(one) for one in records]
    return (
        b"".join(map(table.key, records)),
        b"".join(table.key(one) if one >= 0 else bytes(HASH_BYTES) for one in parents),
    )


def _no_slots(count: int) -> bytes:
    return b"\xff\xff\xff\xff" * count
