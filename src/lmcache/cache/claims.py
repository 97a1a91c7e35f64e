"""Claims on extents: the registered processes, the leases and reservations that they hold, and the quarantine.

- A *lease* is the right of an engine instance to read extents; a *reservation* is the right of one process to fill extents. Each
  ends by release or commit, or when every process that may still touch the extents has ended. Passing the deadline expires
  only the claim: the extents are in quarantine until the end, and an instance with too many bytes there gets no new extents.
- The server reads and fills extents for the tiers as the process `SERVER`, which always exists. Each tier has an `Instance` of
  its own, so the extents that a hanging tier may still touch count against the quarantine of that tier only.

`cache.heart` decides what the end of a claim does to the index.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.cache.allocator import Space
from lmcache.cache.events import By
from lmcache.cache.table import Table
from lmcache.errors import LMCacheError

SERVER = 0
"""The number of the server's own process. The processes of engines have greater numbers."""
_OWN_INSTANCE = "\0server"
"""The server's instance. No engine can have this name, since the names of engines are printable."""
QUARANTINE_SHARE = 4
"""An instance (or tier) whose expired claims hold more than 1/4 of the arena gets no new extents."""
MAX_LEASES = 4096
"""The most leases that one engine instance may hold at a time: several times the requests that an engine runs at once."""


class Refusal(LMCacheError):
    """L1 declines a request, because it names an unknown space, lease or reservation, or has arguments that L1 cannot use."""


@dataclass(slots=True)
class Claim:
    by: By
    instance: Instance
    deadline: float
    expired: bool = field(default=False, init=False)

    @property
    def process(self) -> int:
        return self.by[0]


class Held(NamedTuple):
    """Leased chunks of one space. table: that of the space when the lease was given: clearing the cache gives the space a new
    one."""

    space: Space
    table: Table
    ids: bytes

    def first_sectors(self) -> array[int]:
        """Return the sector of the first shard of each leased chunk, which identifies the chunk in the arena."""
        return array("I", self.table.extents(self.ids))[:: self.space.shards]


@dataclass(slots=True)
class Lease(Claim):
    """The right to read all shards of chunks in one or several spaces."""

    parts: Sequence[Held]

    @property
    def chunks(self) -> int:
        return sum(len(part.ids) for part in self.parts) // 4


@dataclass(slots=True)
class Reservation(Claim):
    space: Space
    table: Table
    """The table of the space when the claim was made. Clearing the cache gives the space a new table."""
    shard: int
    ids: list[int]
    """The records of the chunks in `table`; not valid once the reservation has expired."""
    sectors: list[int]

    @property
    def chunks(self) -> int:
        return len(self.ids)

    @property
    def shard_bytes(self) -> int:
        return self.space.shard_bytes[self.shard]


AnyClaim = Lease | Reservation


class Quarantine:
    """Counts the bytes of the extents of expired claims. A chunk that several leases hold counts once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._leases: Counter[int] = Counter()
        """First sector of a chunk -> number of expired leases on the chunk."""

    def add(self, claim: AnyClaim) -> None:
        """Add an expired claim. The cost depends on the chunks of this claim only, not on other expired claims."""
        if isinstance(claim, Reservation):
            self.bytes += len(claim.sectors) * claim.shard_bytes
            return
        for part in claim.parts:
            before = len(self._leases)
            self._leases.update(part.first_sectors())
            self.bytes += (len(self._leases) - before) * sum(part.space.shard_bytes)

    def remove(self, claim: AnyClaim) -> None:
        if isinstance(claim, Reservation):
            self.bytes -= len(claim.sectors) * claim.shard_bytes
            return
        leases = self._leases
        for part in claim.parts:
            before = len(leases)
            for sector in part.first_sectors():
                leases[sector] -= 1
                if not leases[sector]:
                    del leases[sector]
            self.bytes -= (before - len(leases)) * sum(part.space.shard_bytes)


@dataclass(slots=True, eq=False)
class Instance:
    """An engine of one or several processes, or the account of one tier."""

    name: str
    tier: str = ""
    processes: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    spaces: set[int] = field(default_factory=set)
    quarantine: Quarantine = field(default_factory=Quarantine)


@dataclass(slots=True)
class Process:
    instance: Instance
    reservations: set[int] = field(default_factory=set)


class Claims:
    """All processes and claims. A claim lasts `seconds`; the first claim gets `first_number`."""

    def __init__(self, total_bytes: int, seconds: float, first_number: int) -> None:
        self.seconds = seconds
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reservation] = {}
        self.quarantine = Quarantine()
        """The extents that are in quarantine, of all instances together."""
        self._quota = total_bytes // QUARANTINE_SHARE
        own = Instance(_OWN_INSTANCE, processes={SERVER})
        self._instances = {_OWN_INSTANCE: own}
        self._processes = {SERVER: Process(own)}
        self._due: OrderedDict[int, AnyClaim] = OrderedDict()
        """Claims that have not expired, in the order of their deadlines, since all claims last equally long."""
        self._next = first_number

    # Processes

    def join(self, process: int, instance: str) -> None:
        """Register a process, which must be unknown or belong to this instance already."""
        known = self._instances.setdefault(instance, Instance(instance))
        self._processes.setdefault(process, Process(known))
        known.processes.add(process)

    def leave(self, process: int) -> Instance | None:
        """Remove a process that has no reservations. Returns its instance if the instance is removed with its last process."""
        instance = self._processes.pop(process).instance
        instance.processes.discard(process)
        return None if instance.processes else self._instances.pop(instance.name)

    def instance_of(self, process: int, tier: str = "") -> Instance:
        """Return the instance of the process, or the account of `tier` if the process is the server.

        Raises:
            Refusal: the process has not joined.
        """
        if process == SERVER:
            name = f"{_OWN_INSTANCE} {tier}"
            return self._instances.setdefault(name, Instance(name, tier, {SERVER}))
        known = self._processes.get(process)
        if known is None:
            raise Refusal("say hello first")
        return known.instance

    def known(self, process: int) -> Instance | None:
        """Return the instance of the process, or None if the process has not joined."""
        known = self._processes.get(process)
        return known.instance if known is not None else None

    def over_quota(self, instance: Instance) -> bool:
        """Return whether the instance has too many bytes in quarantine to get new extents."""
        return instance.quarantine.bytes > self._quota

    def why_no_lease(self, instance: Instance) -> str:
        if self.over_quota(instance):
            return "quarantine"
        return "too many leases" if len(instance.leases) >= MAX_LEASES else ""

    # Leases and reservations

    def add(self, claim: AnyClaim) -> int:
        """Record a new claim and return its number."""
        number, self._next = self._next, self._next + 1
        self._due[number] = claim
        if isinstance(claim, Lease):
            self.leases[number] = claim
            claim.instance.leases.add(number)
        else:
            self.reservations[number] = claim
            self._processes[claim.process].reservations.add(number)
        return number

    def lease(self, process: int, number: int) -> Lease | None:
        """Return the lease if this process took it or is of the instance that holds it, else None."""
        held = self.leases.get(number)
        if held is None or held.by[0] == process or held.instance is self.known(process):
            return held
        return None

    def reservation(self, process: int, number: int) -> Reservation:
        """Return a reservation of this process, expired or not.

        Raises:
            Refusal: the process has no such reservation.
        """
        held = self.reservations.get(number)
        if held is None or held.process != process:
            raise Refusal(f"reservation {number} is unknown or has ended")
        return held

    def reservations_of(self, process: int) -> list[int]:
        known = self._processes.get(process)
        return list(known.reservations) if known is not None else []

    def tables(self) -> set[Table]:
        """Those that somebody has a claim on chunks of. A cleared one is kept by its claims only."""
        leased = {part.table for lease in self.leases.values() for part in lease.parts}
        return leased | {held.table for held in self.reservations.values()}

    def unknown_leases(self, process: int, known: Iterable[int]) -> list[int]:
        """Return the leases that this process took and that are not in `known`."""
        kept = set(known)
        leases = self.instance_of(process).leases
        return [number for number in leases if number not in kept and self.leases[number].process == process]

    def renew(self, now: float, process: int, numbers: Iterable[int]) -> int:
        """Restart the time of these leases, including expired ones. Returns how many of them this process may use."""
        count = 0
        for number in numbers:
            held = self.lease(process, number)
            if held is None:
                continue
            count += 1
            if held.expired:
                self._end_quarantine(held)
                held.expired = False
            held.deadline, self._due[number] = now + self.seconds, held
            self._due.move_to_end(number)
        return count

    def end_lease(self, number: int) -> Lease:
        held = self.leases.pop(number)
        held.instance.leases.discard(number)
        self._end(number, held)
        return held

    def end_reservation(self, number: int) -> Reservation:
        held = self.reservations.pop(number)
        self._processes[held.process].reservations.discard(number)
        self._end(number, held)
        return held

    def _end(self, number: int, held: AnyClaim) -> None:
        self._due.pop(number, None)
        if held.expired:
            self._end_quarantine(held)

    def _end_quarantine(self, held: AnyClaim) -> None:
        self.quarantine.remove(held)
        held.instance.quarantine.remove(held)

    def next_expired(self, now: float) -> AnyClaim | None:
        """Put the extents of one claim whose deadline has passed into quarantine. Returns the claim, or None if none is due."""
        number, held = next(iter(self._due.items()), (0, None))
        if held is None or now <= held.deadline:
            return None
        del self._due[number]
        held.expired = True
        self.quarantine.add(held)
        held.instance.quarantine.add(held)
        return held
