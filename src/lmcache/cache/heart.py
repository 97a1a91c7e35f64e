"""The heart of the server: index, leases, reservations, eviction.

The rules of this file:
- A chunk is visible when all its shards are committed, and only then. A lookup answers with a prefix of visible chunks.
- A *lease* (right to read) belongs to an engine instance; a *reservation* (right to fill) to one of its processes. Both end
  by release or commit, or when every process that may still touch the slots is known to be gone. A deadline ends the claim
  only: the slots stay out of use (quarantine) until then, are counted, and an instance with too many gets nothing new.
- A slot is reused only when nobody may touch it: not pinned by a lease, not being filled.
- A chunk is never evicted before the chunks that need it to be reachable; among those that may go, the least recently used goes.
- New data is refused only when nothing may be evicted for it; every refusal has a reason and is counted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.table import ChunkTable, Table
from lmcache.chunks import HASH_BYTES
from lmcache.errors import LMCacheError
from lmcache.memory.slabs import Slabs

NO_SLOT = 0xFFFFFFFF
PAGE_BYTES = 4096
QUARANTINE_SHARE = 4
"""An instance whose expired claims hold more than 1/4 of the arena gets no new slots."""


class Refusal(LMCacheError):
    """A request that the heart declines: unknown space, lease or reservation, or too much in quarantine."""


class Event(NamedTuple):
    """What happened to chunks, told once: stored, hit, missed, evicted, cleared, dropped, expired or refused."""

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
    end_byte: int
    """The arena must have pages up to here before the slots are handed out."""


@dataclass(slots=True)
class Space:
    """One layout with one parallel split: its own index, LRU and memory."""

    number: int
    shards: int
    table: Table
    slabs: list[int]
    """For each shard, the slab class its slots come from (-1 until a rank has told its slot size)."""
    slot_bytes: list[int]
    instances: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Lease:
    instance: str
    space: Space
    ids: bytes
    deadline: float
    expired: bool = False


@dataclass(slots=True)
class _Reservation:
    process: int
    instance: str
    space: Space
    shard: int
    ids: list[int]
    pages: list[int]
    deadline: float
    expired: bool = False


@dataclass(slots=True)
class _Instance:
    processes: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    quarantined_bytes: int = 0


class Heart:
    """All decisions about one arena of `total_bytes`. See the rules at the head of this file.

    Args:
        total_bytes: size of the arena.
        claim_seconds: how long a lease or reservation is a claim; afterwards its slots are in quarantine until given back.
    """

    def __init__(self, total_bytes: int, claim_seconds: float = 30.0) -> None:
        self.total_bytes = total_bytes
        self.claim_seconds = claim_seconds
        self.slabs = Slabs(total_bytes)
        self.spaces: list[Space] = []
        self.events: list[Event] = []
        """Drained by the server; each event is appended once."""
        self.counters: Counter[str] = Counter()
        self._space_of: dict[tuple[bytes, int], Space] = {}
        self._slab_of: dict[tuple[int, int], int] = {}
        self._slab_owner: list[Space] = []
        self._instances: dict[str, _Instance] = {}
        self._process_instance: dict[int, str] = {}
        self._leases: dict[int, _Lease] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._next = 1

    # Who is there

    def join(self, process: int, instance: str) -> None:
        """A process of an engine instance has connected (again)."""
        self._process_instance[process] = instance
        self._instances.setdefault(instance, _Instance()).processes.add(process)

    def leave(self, process: int) -> None:
        """A process is gone for good and touches no slot any more: its reservations end; with the last one, the leases."""
        name = self._process_instance.pop(process, None)
        if name is None:
            return
        self._drop_reservations(process, "owner died")
        instance = self._instances[name]
        instance.processes.discard(process)
        if not instance.processes:
            for number in list(instance.leases):
                self._end_lease(number)
            del self._instances[name]
            for space in self.spaces:
                space.instances.discard(name)

    def leave_reservations(self, process: int) -> None:
        """A process says that it fills no slot any more, though it did not commit."""
        self._drop_reservations(process, "connection lost")

    def _drop_reservations(self, process: int, reason: str) -> None:
        for number in [n for n, held in self._reservations.items() if held.process == process]:
            self._end_reservation(number, ok=False, reason=reason)

    def open_space(self, process: int, fingerprint: bytes, shards: int, shard: int = -1, slot_bytes: int = 0) -> int:
        """The number of the space for this layout and split; a rank also tells its shard's slot size.

        Raises:
            Refusal: the slot does not fit in the arena, or another rank told another size for this shard.
        """
        if not 1 <= shards <= 0xFFFF or not -1 <= shard < shards:
            raise Refusal(f"shard {shard} of {shards} makes no sense")
        if slot_bytes > self.total_bytes:
            raise Refusal(f"one chunk's shard takes {slot_bytes} bytes, the whole L1 {self.total_bytes}: raise --l1-size-gb")
        space = self._space_of.get((fingerprint, shards))
        if space is None:
            space = Space(len(self.spaces), shards, ChunkTable(shards), [-1] * shards, [0] * shards)
            self._space_of[fingerprint, shards] = space
            self.spaces.append(space)
        if shard >= 0:
            self._open_shard(space, shard, slot_bytes)
        instance = self._process_instance.get(process)
        if instance is not None:
            space.instances.add(instance)
        return space.number

    def _open_shard(self, space: Space, shard: int, slot_bytes: int) -> None:
        if slot_bytes < 1:
            raise Refusal(f"slot size {slot_bytes} of shard {shard} makes no sense")
        if space.slot_bytes[shard] not in (0, slot_bytes):
            raise Refusal(f"shard {shard} has slots of {space.slot_bytes[shard]} bytes, not {slot_bytes}")
        space.slot_bytes[shard] = slot_bytes
        pages = -(-slot_bytes // PAGE_BYTES)
        slab = self._slab_of.get((space.number, pages))
        if slab is None:
            slab = len(self._slab_owner)
            self._slab_of[space.number, pages] = slab
            self._slab_owner.append(space)
            self.slabs.open(slab, pages * PAGE_BYTES)
        space.slabs[shard] = slab

    # Reading

    def lookup(self, now: float, process: int, space_number: int, hashes: bytes, first_wanted: int = 0) -> Hit:
        """How many of these chunks are visible, from the first on; those from `first_wanted` on are leased.

        Raises:
            Refusal: unknown space or process, or the instance holds too much in quarantine.
        """
        space = self._space(space_number)
        name, instance = self._instance(process)
        asked = len(hashes) // HASH_BYTES
        if self._over_quota(instance):
            self._tell("missed", space, asked, "quarantine")
            return Hit(0, 0, b"")
        ids = space.table.match(hashes)
        chunks = len(ids) // 4
        if chunks:
            space.table.touch(ids)
            self._tell("hit", space, chunks)
        if chunks < asked:
            self._tell("missed", space, asked - chunks, self._why_missed(space, hashes, chunks))
        leased = ids[4 * first_wanted :]
        if not leased:
            return Hit(chunks, 0, b"")
        space.table.pin(leased)
        number = self._number()
        self._leases[number] = _Lease(name, space, leased, now + self.claim_seconds)
        instance.leases.add(number)
        return Hit(chunks, number, space.table.slots(leased))

    def release(self, process: int, lease: int) -> None:
        """The instance reads these slots no more. An unknown lease is nothing to worry about: it has ended already."""
        held = self._leases.get(lease)
        if held is not None and held.instance == self._process_instance.get(process):
            self._end_lease(lease)

    def leased_pages(self, process: int, lease: int, shard: int, first: int, count: int) -> list[int]:
        """Pages of a lease's chunks, for payload frames.

        Raises:
            Refusal: not a lease of this process's instance, or not inside it.
        """
        held = self._leases.get(lease)
        if held is None or held.expired or held.instance != self._process_instance.get(process):
            raise Refusal(f"lease {lease} is unknown or has ended")
        pages = array("I", held.space.table.slots(held.ids))[shard :: held.space.shards]
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
        space = self._space(space_number)
        name, instance = self._instance(process)
        if not 0 <= shard < space.shards or space.slabs[shard] < 0:
            raise Refusal(f"shard {shard} was not registered")
        table, asked = space.table, len(hashes) // HASH_BYTES
        parent_id = -1 if root else table.get(parent)
        reason = ""
        if self._over_quota(instance):
            reason = "quarantine"
        elif parent_id < 0 and not root:
            reason = "no parent"
        if reason:
            self._tell("refused", space, asked, reason)
            return Grant(0, _no_slots(asked), asked, reason, 0)
        ids, pages = self._fill_chain(space, shard, parent_id, hashes)
        refused = asked - len(pages)
        if refused:
            reason = "no room"
            self._tell("refused", space, refused, reason)
        number = 0
        if ids:
            number = self._number()
            filled = [page for page in pages if page != NO_SLOT]
            self._reservations[number] = _Reservation(process, name, space, shard, ids, filled, now + self.claim_seconds)
        slots = array("I", pages).tobytes() + _no_slots(refused)
        end = max((page for page in pages if page != NO_SLOT), default=-1)
        end_byte = end * PAGE_BYTES + space.slot_bytes[shard] if end >= 0 else 0
        return Grant(number, slots, refused, reason, end_byte)

    def _fill_chain(self, space: Space, shard: int, parent: int, hashes: bytes) -> tuple[list[int], list[int]]:
        """Ids that are now being filled, and one page a chunk until the memory ran out."""
        table, ids, pages = space.table, [], []
        path = [parent] if parent >= 0 else []
        table.pin(_ids(path))  # making room must not evict what the new chunks hang on
        for at in range(0, len(hashes), HASH_BYTES):
            key = hashes[at : at + HASH_BYTES]
            number = table.get(key)
            if number >= 0:
                table.pin(_ids([number]))
                path.append(number)
                if table.state(number, shard):
                    pages.append(NO_SLOT)  # there, or under way by somebody else
                    parent = number
                    continue
            page = self._slot(space, shard)
            if page is None:
                break
            if number < 0:
                number = table.insert(key, parent)
                table.pin(_ids([number]))
                path.append(number)
            table.begin_fill(number, shard, page)
            ids.append(number)
            pages.append(page)
            parent = number
        table.unpin(_ids(path))
        table.touch(_ids(path))
        if path:
            table.touch_path(path[0])
        return ids, pages

    def commit(self, now: float, process: int, reservation: int, ok: bool) -> int:
        """The slots are filled (`ok`) or given back. Returns how many chunks' shards count as stored.

        Raises:
            Refusal: the reservation is unknown, or its claim had ended; the slots are free then, and nothing is stored.
        """
        held = self._reservations.get(reservation)
        if held is None or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        if held.expired or now > held.deadline:
            self._end_reservation(reservation, ok=False, reason="too late")
            raise Refusal(f"reservation {reservation} took longer than {self.claim_seconds} s")
        return self._end_reservation(reservation, ok, reason="" if ok else "copy failed")

    def reserved_pages(self, process: int, reservation: int, first: int, count: int) -> list[int]:
        """Pages of a reservation's slots, for payload frames.

        Raises:
            Refusal: not a live reservation of this process, or not inside it.
        """
        held = self._reservations.get(reservation)
        if held is None or held.expired or held.process != process:
            raise Refusal(f"reservation {reservation} is unknown or has ended")
        if not 0 <= first <= first + count <= len(held.pages):
            raise Refusal(f"slots {first}..{first + count} are outside reservation {reservation}")
        return held.pages[first : first + count]

    def slot_bytes(self, reservation: int = 0, lease: int = 0, shard: int = 0) -> int:
        """Raw bytes of one slot of a reservation, or of a lease's shard."""
        if reservation:
            held = self._reservations[reservation]
            return held.space.slot_bytes[held.shard]
        return self._leases[lease].space.slot_bytes[shard]

    # Time, and emptying

    def tick(self, now: float) -> None:
        """End claims whose deadline has passed. Their slots go to quarantine, not back into use."""
        for lease in self._leases.values():
            if not lease.expired and now > lease.deadline:
                lease.expired = True
                self._quarantine(lease, 1)
                self._tell("expired", lease.space, len(lease.ids) // 4, "lease")
        for reservation in self._reservations.values():
            if not reservation.expired and now > reservation.deadline:
                reservation.expired = True
                self._quarantine(reservation, 1)
                self._tell("expired", reservation.space, len(reservation.ids), "reservation")

    def clear(self) -> int:
        """Forget every chunk. Slots that somebody may still read or fill are freed when that has ended."""
        gone = 0
        for space in self.spaces:
            while (number := space.table.oldest()) >= 0:
                gone += self._detach(space, number)
            self._give_back_regions(space)
        self.events.append(Event("cleared", -1, gone))
        self.counters["cleared"] += gone
        return gone

    # What there is

    @property
    def chunks(self) -> int:
        """Chunks in the index, those being filled included."""
        return sum(len(space.table) for space in self.spaces)

    @property
    def quarantined_bytes(self) -> int:
        """Bytes in slots whose claim has ended and that somebody may still touch."""
        return sum(instance.quarantined_bytes for instance in self._instances.values())

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    @property
    def open_reservations(self) -> int:
        return len(self._reservations)

    def used_bytes(self) -> int:
        """Bytes of slots that hold something or are being filled."""
        return sum(
            self.slabs.used_slots(slab) * pages * PAGE_BYTES for (_, pages), slab in self._slab_of.items()
        )

    def index_bytes(self) -> int:
        return sum(space.table.memory_bytes() for space in self.spaces)

    # Making room

    def _slot(self, space: Space, shard: int) -> int | None:
        """A free slot for this shard: from what the space holds, from free memory, from who has more than a fair share,
        or from the space's own least recently used chunk. None: nothing may go."""
        slab = space.slabs[shard]
        while True:
            page = self.slabs.alloc(slab)
            if page is not None:
                return page
            if self.slabs.grow(slab) is not None:
                continue
            if self._held(space) < self._fair_share() and self._take_from_others(space, slab):
                continue
            victim = space.table.victim()
            if victim >= 0:
                self._evict(space, victim)
                if not self.slabs.held_bytes(slab):  # uneven pipeline ranks: what went was in regions of another slot size
                    self._give_back_regions(space)
            elif not self._take_from_others(space, slab):
                return None

    def _evict(self, space: Space, number: int) -> None:
        self._tell("evicted", space, self._detach(space, number), "room")

    def _take_from_others(self, space: Space, slab: int) -> bool:
        """Empty regions of spaces above their fair share until a slot of `slab` fits. False: they may not be emptied."""
        fair = self._fair_share()
        eligible = {
            other
            for other, owner in enumerate(self._slab_owner)
            if owner is not space and self._held(owner) > (fair if owner.instances else 0)
        }
        if not eligible:
            return False
        regions = self.slabs.window(slab, eligible)
        doomed = [(self._slab_owner[region.space], region) for region in regions]
        listed = [(owner, owner.table.in_pages(region.first_page, region.end_page)) for owner, region in doomed]
        if not regions or any(self.slabs.used_in(region) and not ids for (_, ids), region in zip(listed, regions)):
            return False
        if any(owner.table.pins(one) or owner.table.filling(one) for owner, ids in listed for one in array("I", ids)):
            return False
        for owner, ids in listed:
            for number in array("I", ids):
                if owner.table.attached(number):
                    self._evict(owner, number)
        if any(self.slabs.used_in(region) for region in regions):
            return False  # detached chunks that a lease still holds
        for region in regions:
            self.slabs.take(region)
        return True

    def _fair_share(self) -> int:
        return self.total_bytes // max(1, sum(bool(space.instances) for space in self.spaces))

    def _held(self, space: Space) -> int:
        return sum(self.slabs.held_bytes(slab) for slab in set(space.slabs) if slab >= 0)

    def _detach(self, space: Space, number: int) -> int:
        """Take a chunk and all that hang on it out of the index; free what nobody touches. Returns how many went."""
        ids = array("I", space.table.detach(number))
        for one in ids:
            if not space.table.pins(one) and not space.table.filling(one):
                self._free(space, one)
        return len(ids)

    def _free(self, space: Space, number: int) -> None:
        for shard in range(space.shards):
            page = space.table.slot(number, shard)
            if page >= 0:
                self.slabs.free(space.slabs[shard], page)
        space.table.free(number)

    def _give_back_regions(self, space: Space) -> None:
        for slab in set(space.slabs):
            if slab >= 0:
                for region in self.slabs.regions(slab):
                    if not self.slabs.used_in(region):
                        self.slabs.take(region)

    # Ends

    def _end_lease(self, number: int) -> None:
        lease = self._leases.pop(number)
        if lease.expired:
            self._quarantine(lease, -1)
        self._instances[lease.instance].leases.discard(number)
        for one in array("I", lease.space.table.unpin(lease.ids)):
            self._free(lease.space, one)

    def _end_reservation(self, number: int, ok: bool, reason: str) -> int:
        held = self._reservations.pop(number)
        if held.expired:
            self._quarantine(held, -1)
        table, space, stored, dropped = held.space.table, held.space, 0, 0
        for one, page in zip(held.ids, held.pages):
            outcome = table.end_fill(one, held.shard, ok)
            if not ok:
                self.slabs.free(space.slabs[held.shard], page)
            stored += outcome == 1
            if outcome == 2:  # was cleared or lost its parent meanwhile
                self._free(space, one)
            elif not ok and table.attached(one) and not table.filling(one) and not table.complete(one):
                dropped += self._detach(space, one)
        if stored:
            self._tell("stored", space, stored)
        if not ok:
            self._tell("dropped", space, max(dropped, len(held.ids)), reason)
        return len(held.ids) if ok else 0

    def _quarantine(self, claim: _Lease | _Reservation, sign: int) -> None:
        if isinstance(claim, _Lease):
            size = len(claim.ids) // 4 * sum(claim.space.slot_bytes)
        else:
            size = len(claim.ids) * claim.space.slot_bytes[claim.shard]
        self._instances[claim.instance].quarantined_bytes += sign * size

    def _over_quota(self, instance: _Instance) -> bool:
        return instance.quarantined_bytes > self.total_bytes // QUARANTINE_SHARE

    # Small things

    def _space(self, number: int) -> Space:
        if not 0 <= number < len(self.spaces):
            raise Refusal(f"space {number} is unknown: register first")
        return self.spaces[number]

    def _instance(self, process: int) -> tuple[str, _Instance]:
        name = self._process_instance.get(process)
        if name is None:
            raise Refusal("say hello first")
        return name, self._instances[name]

    def _why_missed(self, space: Space, hashes: bytes, chunks: int) -> str:
        first_missing = hashes[chunks * HASH_BYTES : (chunks + 1) * HASH_BYTES]
        return "being filled" if space.table.get(first_missing) >= 0 else "absent"

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _tell(self, kind: str, space: Space, chunks: int, reason: str = "") -> None:
        self.events.append(Event(kind, space.number, chunks, reason))
        self.counters[kind] += chunks
        if reason:
            self.counters[f"{kind}:{reason}"] += chunks


def _ids(numbers: list[int]) -> bytes:
    return array("I", numbers).tobytes()


def _no_slots(count: int) -> bytes:
    return b"\xff\xff\xff\xff" * count
