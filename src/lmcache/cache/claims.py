"""Claims on extents: which processes there are, what they may read or fill, and what stays out of use after its deadline.

- A *lease* (right to read) belongs to an engine instance; a *reservation* (right to fill) to one of its processes. Both end
  by release or commit, or when every process that may still touch the extents is known to be gone. A deadline ends the claim
  only: the extents stay out of use (quarantine) until then, are counted, and an instance with too many gets nothing new.
- The server itself reads and fills extents on behalf of the tiers, as the process `SERVER`, which is always there. Each tier
  has an account of its own, which is an instance: what a tier that hangs may still touch is in that tier's quarantine only.

What the end of a claim does to the index is decided in `cache.heart`.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lmcache.cache.allocator import Space
from lmcache.cache.events import By
from lmcache.cache.table import Table
from lmcache.errors import LMCacheError

SERVER = 0
"""The process that is the server itself. Engines' processes have numbers above."""
_OWN_INSTANCE = "\0server"
"""No engine is called so: what engines say of themselves is printable."""
QUARANTINE_SHARE = 4
"""An instance (or tier) whose expired claims hold more than 1/4 of the arena gets no new extents."""
MAX_LEASES = 4096
"""The most leases that one engine instance may hold at a time: several times the requests that an engine runs at once."""


class Refusal(LMCacheError):
    """A request that L1 declines: unknown space, lease or reservation, or too much in quarantine."""


@dataclass(slots=True)
class Claim:
    by: By
    instance: Instance
    space: Space
    table: Table
    """The space's, or the one that it had before it was cleared."""
    deadline: float
    expired: bool = field(default=False, init=False)

    @property
    def process(self) -> int:
        return self.by[0]


@dataclass(slots=True)
class Lease(Claim):
    ids: bytes
    shard: int = field(default=-1, init=False)
    """Of all shards."""

    @property
    def chunks(self) -> int:
        return len(self.ids) // 4

    def first_sectors(self) -> array[int]:
        """The sector of each leased chunk's first shard, which identifies the chunk in the arena."""
        return array("I", self.table.extents(self.ids))[:: self.space.shards]


@dataclass(slots=True)
class Reservation(Claim):
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


AnyClaim = Lease | Reservation


class Quarantine:
    """Bytes of the extents of expired claims. A chunk that several leases hold counts once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._leases: Counter[int] = Counter()
        """First sector of a chunk -> expired leases on it."""

    def add(self, claim: AnyClaim) -> None:
        """The work is that of the claim's own chunks, however many other claims have expired."""
        if isinstance(claim, Reservation):
            self.bytes += len(claim.sectors) * claim.shard_bytes
            return
        before = len(self._leases)
        self._leases.update(claim.first_sectors())
        self.bytes += (len(self._leases) - before) * sum(claim.space.shard_bytes)

    def remove(self, claim: AnyClaim) -> None:
        if isinstance(claim, Reservation):
            self.bytes -= len(claim.sectors) * claim.shard_bytes
            return
        leases, before = self._leases, len(self._leases)
        for sector in claim.first_sectors():
            leases[sector] -= 1
            if not leases[sector]:
                del leases[sector]
        self.bytes -= (before - len(leases)) * sum(claim.space.shard_bytes)


@dataclass(slots=True, eq=False)
class Instance:
    """An engine, of one or several processes; or a tier's account."""

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
    """All processes and claims. `seconds`: how long a claim lasts. Numbers of claims begin at `first_number`."""

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
        """Claims that have not expired, the next one to do so first: all last equally long."""
        self._next = first_number

    # Who is there

    def join(self, process: int, instance: str) -> None:
        """A process that is not there yet, or that is of this instance already."""
        known = self._instances.setdefault(instance, Instance(instance))
        self._processes.setdefault(process, Process(known))
        known.processes.add(process)

    def leave(self, process: int) -> Instance | None:
        """Forget a process without reservations. Returns its instance if that was its last process, and is gone as well."""
        instance = self._processes.pop(process).instance
        instance.processes.discard(process)
        return None if instance.processes else self._instances.pop(instance.name)

    def instance_of(self, process: int, tier: str = "") -> Instance:
        """The process's instance; of the server, the account of this tier.

        Raises:
            Refusal: no such process has joined.
        """
        if process == SERVER:
            name = f"{_OWN_INSTANCE} {tier}"
            return self._instances.setdefault(name, Instance(name, tier, {SERVER}))
        known = self._processes.get(process)
        if known is None:
            raise Refusal("say hello first")
        return known.instance

    def known(self, process: int) -> Instance | None:
        """The process's instance, if it has joined."""
        known = self._processes.get(process)
        return known.instance if known is not None else None

    def over_quota(self, instance: Instance) -> bool:
        """Whether so much of the instance's is in quarantine that it gets nothing new."""
        return instance.quarantine.bytes > self._quota

    def why_no_lease(self, instance: Instance) -> str:
        if self.over_quota(instance):
            return "quarantine"
        return "too many leases" if len(instance.leases) >= MAX_LEASES else ""

    # What they hold

    def add(self, claim: AnyClaim) -> int:
        """A new claim's number."""
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
        """One that this process may read by."""
        held = self.leases.get(number)
        if held is None or held.by[0] == process or held.instance is self.known(process):
            return held
        return None

    def reservation(self, process: int, number: int) -> Reservation:
        """One of this process, which may have expired.

        Raises:
            Refusal: there is none.
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
        return {claim.table for claim in (*self.leases.values(), *self.reservations.values())}

    def unknown_leases(self, process: int, known: Iterable[int]) -> list[int]:
        """Those that this process took, but the ones in `known`."""
        kept = set(known)
        leases = self.instance_of(process).leases
        return [number for number in leases if number not in kept and self.leases[number].process == process]

    def renew(self, now: float, process: int, numbers: Iterable[int]) -> int:
        """Leases begin anew, those that have expired as well. Returns how many of them this process may read by."""
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
        """A claim whose deadline has passed: its extents are in quarantine from now on. None when there is no other."""
        number, held = next(iter(self._due.items()), (0, None))
        if held is None or now <= held.deadline:
            return None
        del self._due[number]
        held.expired = True
        self.quarantine.add(held)
        held.instance.quarantine.add(held)
        return held
