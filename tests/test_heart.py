"""The heart against a model that knows only what it was answered: after every step of a random life the promises hold."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import pytest

from lmcache.cache import KINDS, SERVER, Event, Grant, Heart, Hit, Refusal, TooSmall
from lmcache.cache.claims import MAX_LEASES
from lmcache.cache.claims import Reservation as Held
from lmcache.cache.table import Habits, Table, unpack
from lmcache.chunks import Split
from lmcache.memory.slabs import NO_EXTENT
from policies import TwoQueues
from py_table import PyTable

SECTOR = 4096
CLAIM_SECONDS = 10.0
TIERS = ("near", "far")
NewTable = Callable[[int], Table]


# The model: chunks as objects, the arena as a dictionary of pages


@dataclass(eq=False)
class Chunk:
    """One chunk of one space, from its first reservation until nobody touches its slots any more."""

    key: bytes
    parent: Chunk | None
    shards: int
    sectors: dict[int, int] = field(default_factory=dict)
    """First page of each shard's slot, filling or filled."""
    filling: set[int] = field(default_factory=set)
    readers: int = 0
    attached: bool = True
    used: float = 0.0

    @property
    def whole(self) -> bool:
        return self.attached and len(self.sectors) == self.shards and not self.filling

    @property
    def idle(self) -> bool:
        return not self.readers and not self.filling


LOST = Chunk(b"", None, 0, attached=False)
"""Owns what was given up."""


@dataclass(eq=False)
class ModelSpace:
    number: int
    fingerprint: bytes
    shards: int
    shard_bytes: list[int]
    reach: int = 0
    """In chunks, of a group of a model; 0 for everything."""
    family: bytes = b""
    """Spaces of one family are sisters: the same layout with other splits."""
    chunks: OrderedDict[bytes, Chunk] = field(default_factory=OrderedDict)
    """Attached, the oldest first."""
    instances: set[str] = field(default_factory=set)

    def touch(self, path: list[Chunk], now: float) -> None:
        """Tail first; then what comes before the first one. With a reach, in order: the last one is needed for longest."""
        for chunk in path if self.reach else reversed(path):
            self.chunks.move_to_end(chunk.key)
            chunk.used = now
        above = path[0].parent if path else None
        while above is not None:
            self.chunks.move_to_end(above.key)
            above.used, above = now, above.parent

    def parents(self) -> set[Chunk | None]:
        return {chunk.parent for chunk in self.chunks.values()}

    def busy(self) -> set[Chunk | None]:
        """Chunks that are read or filled, and those that they need."""
        found: set[Chunk | None] = {None}
        for chunk in self.chunks.values():
            above: Chunk | None = None if chunk.idle else chunk
            while above not in found:
                found.add(above)
                above = above.parent if above else None
        return found


@dataclass(eq=False)
class Lease:
    process: int
    instance: str
    parts: list[tuple[ModelSpace, list[Chunk]]]
    deadline: float
    expired: bool = False


@dataclass(eq=False)
class Reservation:
    process: int
    instance: str
    space: ModelSpace
    shard: int
    chunks: list[Chunk]
    sectors: list[int]
    deadline: float
    expired: bool = False
    """Then the chunks are somebody else's to fill, and only the slots are this one's."""
    owner: Chunk = field(default_factory=lambda: Chunk(b"", None, 0, attached=False))
    """Who has the slots then."""


class NotingHeart(Heart):
    """Keeps the slots' headers as the heart notes them. By page: fingerprint, shard, key, parent."""

    def __init__(self, total_bytes: int, new_table: NewTable) -> None:
        super().__init__(total_bytes, CLAIM_SECONDS, new_table)
        self.headers: dict[int, tuple[bytes, int, bytes, bytes]] = {}

    def _note_committed(self, held: Held, sectors: list[int], keys: bytes, parents: bytes) -> None:
        assert len(keys) == len(parents) == 16 * len(sectors)
        for number, sector in enumerate(sectors):
            at = slice(16 * number, 16 * number + 16)
            self.headers[sector] = held.space.fingerprint, held.shard, keys[at], parents[at]

    def _note_freed(self, sectors: Iterable[int]) -> None:
        for sector in sectors:
            self.headers.pop(sector, None)

    def _note_cleared(self) -> None:
        self.headers.clear()


class Life:
    """Random operations on a heart, each foretold by the model or checked against it."""

    def __init__(self, seed: int, new_table: NewTable, lru: bool) -> None:
        self.dice = random.Random(seed)
        self.exact = self.dice.random() < 0.4
        """One space with one size of slots: then every eviction is foretold, if the policy is LRU."""
        self.lru = lru
        self.sectors_total = self.dice.choice([7, 40, 100, 250])
        self.heart = NotingHeart(self.sectors_total * SECTOR + self.dice.choice([0, 100]), new_table)
        self.events: list[Event] = []
        """Of this step."""
        self.heart.events.listen(KINDS, self.events.append, timed=True)
        self.now = 0.0
        self.spaces: list[ModelSpace] = []
        self.processes: dict[int, str] = {}
        self.next_process = 1
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reservation] = {}
        self.owner: dict[int, tuple[Chunk, int]] = {}
        """Who has each page of the arena."""
        self.frozen: set[int] = set()
        """Leases and reservations of which nothing is heard until the end of this life, or of their process."""
        self.ended: list[int] = [0, 999_999]
        self.lost: set[int] = set()
        """Pages of slots that were given up."""
        self.told: Counter[tuple[str, bytes]] = Counter()
        """What has to have happened in this step: kinds of events, and keys of chunks."""
        self.became_whole: set[tuple[int, Chunk]] = set()
        """By whose commit, in this step."""
        self.gone: dict[bytes, list[float]] = {}
        """When chunks that were evicted in this step were used last."""
        self.steps = 0
        self.kinds = self.plans()

    def plans(self) -> list[tuple[bytes, int, list[int], int, bytes]]:
        """(fingerprint, shards, slot sizes, reach, family) of the layouts in this life."""
        plans: list[tuple[bytes, int, list[int], int, bytes]] = []
        for number in range(1 if self.exact else self.dice.randint(2, 4)):
            shards = self.dice.choice([1, 1, 2, 3])
            widest = max(1, min(5, self.sectors_total // 8))
            sizes = [self.dice.randint(1, widest * SECTOR) for _ in range(shards)]
            reach, family = self.dice.choice([0, 0, 0, 1, 2, 3]), self.dice.choice([b"", bytes([number])])
            if plans and self.dice.random() < 0.5:
                *_, reach, family = plans[-1]
            plans.append((bytes([number]) * 16, shards, sizes[:1] * shards if self.exact else sizes, reach, family))
        return plans

    # One step, and what must hold after it

    def step(self) -> None:
        deeds: list[tuple[int, Callable[[], None]]] = [
            (20, self.lookup),
            (16, self.release),
            (20, self.reserve),
            (22, self.commit),
            (2, self.join),
            (1, self.leave),
            (2, self.lose_connection),
            (1, self.give_up),
            (1, self.freeze),
            (4, self.renew),
            (1, self.forget_leases),
            (4, self.hold),
            (4, self.tick),
        ]
        if self.dice.random() < 0.004:
            deeds = [(1, self.clear), (1, self.clear_when_nobody_is_there)]
        if not self.processes or not self.spaces:
            deeds = [(1, self.join)]
        self.dice.choices([deed for _, deed in deeds], [weight for weight, _ in deeds])[0]()
        self.steps += 1
        self.check()

    def check(self) -> None:
        events: Counter[tuple[str, bytes]] = Counter()
        for event in self.events:
            keys = [event.hashes[at : at + 16] for at in range(0, len(event.hashes), 16)]
            assert len(keys) == event.chunks > 0
            events.update((event.kind, key) for key in keys)
            assert event.reason or event.kind in ("hit", "stored", "reserved", "committed", "cleared")
            assert (event.tier in TIERS or not event.tier) if event.process == SERVER else not event.tier
            if event.kind == "evicted":
                assert event.wanted_by in [one.number for one in self.spaces]
                assert all(used in self.gone[key] for key, used in zip(keys, event.last_used, strict=True))
            if event.kind == "stored":
                self.check_whole(event)
        self.events.clear()
        self.gone.clear()
        assert not self.became_whole, "the heart did not tell of them"
        assert events == +self.told
        self.told.clear()
        assert self.heart.used_bytes() == len(self.owner) * SECTOR <= self.heart.total_bytes
        assert self.heart.chunks == sum(len(space.chunks) for space in self.spaces)
        assert (self.heart.open_leases, self.heart.open_reservations) == (len(self.leases), len(self.reservations))
        assert self.heart.quarantined_bytes == self.quarantined(None)
        if self.steps % 16 == 0:
            self.check_all()

    def tell(self, kind: str, chunks: Iterable[Chunk | bytes]) -> None:
        self.told.update((kind, one if isinstance(one, bytes) else one.key) for one in chunks)

    def check_whole(self, event: Event) -> None:
        """What the heart tells of chunks that can be read from now on is true, and said once."""
        (space,) = [one for one in self.spaces if one.number == event.space]
        for at in range(0, len(event.hashes), 16):
            chunk = space.chunks[event.hashes[at : at + 16]]
            assert event.parents[at : at + 16] == (chunk.parent.key if chunk.parent else bytes(16))
            self.became_whole.remove((event.process, chunk))

    def check_all(self) -> None:
        """Every chunk, as the heart's tables and the slots' headers have it."""
        headers = {
            sector: (space.fingerprint, shard, chunk.key, chunk.parent.key if chunk.parent else bytes(16))
            for space in self.spaces
            for chunk in space.chunks.values()
            for shard, sector in chunk.sectors.items()
            if shard not in chunk.filling
        }
        assert self.heart.headers == headers
        known = {space.number: space for space in self.heart.spaces}
        for space in self.spaces:
            if space.number not in known:
                assert not space.chunks and not space.instances
                continue
            table = known[space.number].table
            for key, chunk in space.chunks.items():
                record = table.get(key)
                assert record >= 0
                assert (table.pins(record), table.filling(record)) == (chunk.readers, len(chunk.filling))
                assert list(unpack(table.extents(record.to_bytes(4, "little")))) == [
                    chunk.sectors.get(shard, NO_EXTENT) for shard in range(space.shards)
                ]
        counters = self.heart.events.counters
        whole = sum(chunk.whole for space in self.spaces for chunk in space.chunks.values())
        assert counters["stored"] - counters["evicted"] - counters["cleared"] == whole
        assert counters["reserved"] - counters["committed"] - counters["dropped"] == sum(
            len(held.chunks) for held in self.reservations.values() if not held.expired
        )
        for kind in ("missed", "evicted", "dropped", "refused", "expired"):
            reasons = sum(number for name, number in counters.items() if name.startswith(f"{kind}:"))
            assert reasons == counters[kind]

    # Who is there

    def join(self) -> None:
        if len(self.processes) < 6:
            process, self.next_process = self.next_process, self.next_process + 1
            self.processes[process] = self.dice.choice("abc")
            self.heart.join(process, self.processes[process])
        process = self.dice.choice(list(self.processes))
        fingerprint, shards, sizes, reach, family = self.dice.choice(self.kinds)
        more, split = {"family": family}, Split((), shards)
        for shard in range(-1, shards):
            size = sizes[shard] if shard >= 0 else 0
            number = self.heart.open_space(process, fingerprint, shards, shard, size, reach, split=split, **more)
        space = next((one for one in self.spaces if one.number == number), None)
        if space is None:
            space = ModelSpace(number, fingerprint, shards, sizes, reach, family)
            self.spaces.append(space)
        space.instances.add(self.processes[process])
        with pytest.raises(Refusal):
            self.heart.open_space(process, fingerprint, shards, 0, sizes[0] + 1)
        with pytest.raises(TooSmall):
            self.heart.open_space(process, bytes(16), 1, 0, self.sectors_total * SECTOR + SECTOR)
        with pytest.raises(Refusal):
            self.heart.open_space(-1, fingerprint, shards)

    def leave(self, process: int = 0) -> None:
        process = process or self.dice.choice(list(self.processes))
        instance = self.processes.pop(process)
        for number in [one for one, held in self.reservations.items() if held.process == process]:
            self.end_reservation(number, ok=False)
        if instance not in self.processes.values():
            for number in [one for one, lease in self.leases.items() if lease.instance == instance]:
                self.end_lease(number)
            for space in self.spaces:
                space.instances.discard(instance)
        self.heart.leave(process)
        self.heart.leave(process)

    def lose_connection(self) -> None:
        process = self.dice.choice(list(self.processes))
        for number in [one for one, held in self.reservations.items() if held.process == process]:
            self.end_reservation(number, ok=False)
        self.heart.leave_reservations(process)

    # Reading

    def pick(self) -> tuple[int, ModelSpace] | None:
        """A process and a space that it may use; everything else is refused."""
        process, space = self.dice.choice(list(self.processes)), self.dice.choice(self.spaces)
        if self.dice.random() < 0.15:
            return SERVER, space
        if self.processes[process] in space.instances:
            return process, space
        for call in (
            lambda: self.heart.lookup(self.now, process, space.number, bytes(16)),
            lambda: self.heart.reserve(self.now, process, space.number, 0, b"", True, bytes(16)),
            lambda: self.heart.lookup(self.now, process, 4711, bytes(16)),
        ):
            with pytest.raises(Refusal):
                call()
        return None

    def lookup(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        process, space = picked
        keys, sisters = self.prompt(), self.dice.random() < 0.7
        if self.dice.random() < 0.2:
            parts = self.parts(space, keys, sisters)
            found = sum(len(chunks) for _, _, chunks in parts)
            assert self.heart.peek(self.now, process, space.number, b"".join(keys), sisters) == found
            for one, _, chunks in parts:
                one.touch(chunks, self.now)
        skip = self.dice.choice([0, 0, 0, 1, 3, 20])
        others = [one for one in self.spaces if one is not space and self.may_use(process, one)]
        others = self.dice.sample(others, self.dice.randint(0, len(others)))
        asked = self.now, process, space.number, b"".join(keys), skip, "", [one.number for one in others], sisters
        hit, usable = Hit(0, 0, b""), longest_usable([self.family(one, sisters) for one in (space, *others)], keys)
        if self.dice.random() < 0.5:
            events = len(self.events)
            hit = self.heart.lookup(*asked, partly=False)
            over = self.why_no_lease(self.instance(process))
            assert hit.chunks == (usable if usable == len(keys) and not over else 0)
            assert hit.chunks or len(self.events) == events
        if not hit.chunks:
            hit = self.heart.lookup(*asked)
        if reason := self.why_no_lease(self.instance(process)):
            assert hit == Hit(0, 0, b"") and self.events[-1].reason == reason
            self.tell("missed", keys)
            return
        assert hit.chunks == usable
        if usable < len(keys):
            assert self.events[-1].reason == why_missed([space, *others], keys[usable])
        self.tell("hit", keys[:usable])
        self.tell("missed", keys[usable:])
        self.check_lease(process, [space, *others], keys[:usable], skip, sisters, hit)

    def may_use(self, process: int, space: ModelSpace) -> bool:
        return process == SERVER or self.processes[process] in space.instances

    def family(self, space: ModelSpace, sisters: bool) -> list[ModelSpace]:
        """The space, and if the engine can use them its sisters, the oldest first."""
        known = [one for one in self.spaces if sisters and space.family and one.family == space.family]
        return [space, *(one for one in known if one is not space)]

    def parts(
        self, space: ModelSpace, keys: list[bytes], sisters: bool, first: int = 0
    ) -> list[tuple[ModelSpace, int, list[Chunk]]]:
        """Who has which of these chunks, from the first on: as many as possible of the space's own, then of whoever has most."""
        found: list[tuple[ModelSpace, int, list[Chunk]]] = []
        at = first
        while at < len(keys):
            runs = [(one, leading_whole(one, keys[at:])) for one in self.family(space, sisters)]
            best = runs[0] if at == first and runs[0][1] else max(runs, key=lambda run: len(run[1]))
            if not best[1]:
                break
            found.append((best[0], at, best[1]))
            at += len(best[1])
        return found

    def check_lease(
        self, process: int, spaces: list[ModelSpace], keys: list[bytes], skip: int, sisters: bool, hit: Hit
    ) -> None:
        """A hit leases, of each group, what the engine needs and does not have."""
        foreign = [(one.group, one.first, one.space.number, one.extents) for one in hit.foreign]
        own, further = [], []
        for group, (space, extents) in enumerate(zip(spaces, [hit.extents, *hit.groups], strict=True)):
            first = max(0, len(keys) - space.reach) if space.reach else 0
            of_group: list[Chunk] = []
            for number, (one, begin, chunks) in enumerate(self.parts(space, keys, sisters, first)):
                one.touch(chunks, self.now)
                wanted, begin = chunks[max(0, skip - begin) :], max(skip, begin)
                if one is space and not number:
                    of_group = wanted
                elif wanted:
                    told = foreign.pop(0)
                    assert told == (group, begin, one.number, sectors_of_chunks(one, wanted))
                    further.append((one, wanted))
            assert extents == sectors_of_chunks(space, of_group)
            own.append((space, of_group))
        parts = [*own, *further]
        assert not foreign and bool(hit.lease) == any(chunks for _, chunks in parts) and hit.lease not in self.leases
        if hit.lease:
            self.leases[hit.lease] = Lease(process, self.instance(process), parts, self.now + CLAIM_SECONDS)
            for _, chunks in parts:
                for chunk in chunks:
                    chunk.readers += 1
            self.check_payload(process, hit.lease)

    def check_payload(self, process: int, number: int) -> None:
        lease = self.leases[number]
        part = self.dice.randrange(len(lease.parts))
        space, chunks = lease.parts[part]
        shard = self.dice.randrange(space.shards)
        sectors, size = self.heart.leased_sectors(process, number, shard, 0, len(chunks), part)
        assert size == space.shard_bytes[shard]
        assert sectors == [chunk.sectors[shard] for chunk in chunks]
        for first, count, one in ((0, len(sectors) + 1, part), (-1, 1, part), (0, 0, len(lease.parts)), (0, 0, -1)):
            with pytest.raises(Refusal):
                self.heart.leased_sectors(process, number, shard, first, count, one)
        for stranger in [one for one in self.processes if self.processes[one] != lease.instance]:
            with pytest.raises(Refusal):
                self.heart.leased_sectors(stranger, number, shard, 0, 1)

    def release(self) -> None:
        number = self.some(self.leases)
        lease = self.leases.get(number)
        process = self.dice.choice([SERVER, *self.processes])
        if self.may_read(process, lease):
            self.end_lease(number)
        self.heart.release(process, number)
        self.heart.release(process, number)

    def hold(self) -> None:
        """The server reads chunks wherever they stand, for a tier."""
        space = self.dice.choice(self.spaces)
        keys = [key for key in {*self.prompt(), *self.prompt()} if self.dice.random() < 0.8]
        whole = [key for key in keys if key in space.chunks and space.chunks[key].whole]
        tier = self.dice.choice(TIERS)
        number, found, extents = self.heart.hold(self.now, space.number, b"".join(keys), tier)
        assert (bool(number), found) == (bool(whole), b"".join(whole))
        chunks = [space.chunks[key] for key in whole]
        assert list(unpack(extents)) == [chunk.sectors[shard] for chunk in chunks for shard in range(space.shards)]
        if number:
            parts = [(space, chunks)]
            self.leases[number] = Lease(SERVER, self.instance(SERVER, tier), parts, self.now + CLAIM_SECONDS)
            for chunk in chunks:
                chunk.readers += 1
        assert self.heart.hold(self.now, 4711, b"".join(keys)) == (0, b"", b"")

    def renew(self) -> None:
        """A process tells which leases it goes on reading; some have ended, some are another engine's, some have expired."""
        process = self.dice.choice(list(self.processes))
        named = [self.some(self.leases) for _ in range(self.dice.randint(0, 6))]
        if self.dice.random() < 0.3:
            named += list(self.leases)
        held = [self.leases[number] for number in named if self.may_read(process, self.leases.get(number))]
        for lease in held:
            lease.deadline, lease.expired = self.now + CLAIM_SECONDS, False
        assert self.heart.renew(self.now, process, named) == len(held)

    def may_read(self, process: int, lease: Lease | None) -> bool:
        return lease is not None and (lease.process == process or lease.instance == self.processes.get(process))

    def freeze(self) -> None:
        """An engine's thread that hangs in a copy, a tier's load that does not return, an answer that got lost."""
        self.frozen |= {one for one in (*self.leases, *self.reservations) if self.dice.random() < 0.2}

    def instance(self, process: int, tier: str = "") -> str:
        return f"the server's {tier}" if process == SERVER else self.processes[process]

    def forget_leases(self) -> None:
        """A process tells which leases it knows of; some of its answers got lost."""
        process = self.dice.choice(list(self.processes))
        known = [number for number in self.leases if self.dice.random() < 0.7]
        lost = [one for one, lease in self.leases.items() if lease.process == process and one not in known]
        for number in lost:
            self.end_lease(number)
        assert self.heart.keep_leases(process, known) == len(lost)

    def end_lease(self, number: int) -> None:
        lease = self.leases.pop(number)
        self.ended.append(number)
        for space, chunks in lease.parts:
            for chunk in chunks:
                chunk.readers -= 1
                self.free_if_nobody_cares(chunk, space)

    # Filling

    def reserve(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        process, space = picked
        keys = self.prompt()
        first = self.dice.choice([0, 0, 1, 2, 5])
        parent = keys[first - 1] if 0 < first < len(keys) else None
        keys = keys[first:] if parent else keys
        shard = self.dice.randrange(space.shards)
        tier = self.dice.choice(TIERS) if process == SERVER else ""
        quota = self.over_quota(self.instance(process, tier))
        grant = self.heart.reserve(
            self.now, process, space.number, shard, parent or b"", parent is None, b"".join(keys), tier
        )
        sectors = list(unpack(grant.extents))
        parent = None if space.reach else parent
        family = self.family(space, sisters=True)
        if quota or (parent is not None and not any(parent in one.chunks for one in family)):
            assert grant == Grant(0, b"\xff" * 4 * len(keys), len(keys), "quarantine" if quota else "no parent")
            self.tell("refused", keys)
            return
        if process == SERVER and not any(one.instances for one in family):
            assert grant == Grant(0, b"\xff" * 4 * len(keys), len(keys), "no engine")
            self.tell("refused", keys)
            return
        above = space.chunks.get(parent) if parent else None  # a sister may have it
        foretold = self.foretell(space, shard, above, keys) if self.exact and self.lru else None
        space.touch(([above] if above else []) + [space.chunks[key] for key in keys if key in space.chunks], self.now)
        vanished = self.vanished(space, shard, keys, sectors)
        if foretold is not None:
            assert (vanished, grant.refused) == foretold
        self.evict(vanished)
        granted = self.grant(space, shard, above, keys[: len(keys) - grant.refused], sectors)
        assert bool(grant.reservation) == bool(granted) and grant.reservation not in self.reservations
        self.tell("refused", keys[len(keys) - grant.refused :])
        if grant.refused:
            assert grant.reason == "no room" and set(sectors[len(keys) - grant.refused :]) == {NO_EXTENT}
            self.check_nothing_may_go(space, shard, above, keys[: len(keys) - grant.refused + 1])
        if granted:
            filled = [sector for sector in sectors if sector != NO_EXTENT]
            self.reservations[grant.reservation] = Reservation(
                process, self.instance(process, tier), space, shard, granted, filled, self.now + CLAIM_SECONDS
            )
            assert self.heart.reserved_sectors(process, grant.reservation) == (filled, space.shard_bytes[shard])

    def grant(
        self, space: ModelSpace, shard: int, above: Chunk | None, keys: list[bytes], sectors: list[int]
    ) -> list[Chunk]:
        """Take note of a grant; its chunks that are to be filled."""
        granted: list[Chunk] = []
        path = [above] if above else []
        parent = above
        for key, sector in zip(keys, sectors, strict=False):
            chunk = space.chunks.setdefault(key, Chunk(key, None if space.reach else parent, space.shards))
            assert (sector == NO_EXTENT) == (shard in chunk.sectors)
            if sector != NO_EXTENT:
                self.own(chunk, shard, sector, space.shard_bytes[shard])
                chunk.filling.add(shard)
                granted.append(chunk)
            path.append(chunk)
            parent = chunk
        space.touch(path, self.now)
        self.tell("reserved", granted)
        return granted

    def own(self, chunk: Chunk, shard: int, sector: int, size: int) -> None:
        taken = range(sector, sector - (-size // SECTOR))
        assert taken[-1] < self.sectors_total
        for one in taken:
            assert one not in self.owner, "a slot was given to two"
            self.owner[one] = chunk, shard
        chunk.sectors[shard] = sector

    def disown(self, chunk: Chunk, shards: Iterable[int], space: ModelSpace) -> None:
        """What has been given up, or is in quarantine, is the chunk's no more."""
        for shard in shards:
            for one in self.sectors_of(space, shard, chunk.sectors.pop(shard)):
                if self.owner[one] == (chunk, shard):
                    del self.owner[one]

    @staticmethod
    def sectors_of(space: ModelSpace, shard: int, sector: int) -> range:
        """Those of a slot."""
        return range(sector, sector - (-space.shard_bytes[shard] // SECTOR))

    def vanished(self, space: ModelSpace, shard: int, keys: list[bytes], sectors: list[int]) -> set[Chunk]:
        """Chunks that are gone, by what the heart's tables say, or that it gave new slots for."""
        gone = set()
        tables = {one.number: one.table for one in self.heart.spaces}
        for one in self.spaces:
            table = tables[one.number]
            for key, chunk in one.chunks.items():
                record = table.get(key)
                if record < 0 or any(table.extent(record, other) != sector for other, sector in chunk.sectors.items()):
                    gone.add(chunk)
        for key, sector in zip(keys, sectors, strict=True):
            asked = space.chunks.get(key)
            if asked is not None and sector != NO_EXTENT and shard in asked.sectors:
                gone.add(asked)
        return gone

    def evict(self, gone: set[Chunk]) -> None:
        for space in self.spaces:
            chunks = set(space.chunks.values())
            lost = gone & chunks
            assert not lost & space.busy(), "a chunk in use was evicted"
            assert not any(chunk.parent in lost for chunk in chunks - lost), "a chunk went before one that needs it"
            for chunk in lost:
                self.tell("evicted" if chunk.whole else "incomplete", [chunk] if chunk.sectors else [])
                self.gone.setdefault(chunk.key, []).append(chunk.used)
                del space.chunks[chunk.key]
                self.disown(chunk, list(chunk.sectors), space)
                chunk.attached = False

    def foretell(
        self, space: ModelSpace, shard: int, above: Chunk | None, keys: list[bytes]
    ) -> tuple[set[Chunk], int] | None:
        """Exact LRU: who must go, and how many chunks get no room. None where a chunk that goes is also asked for."""
        order = list(space.chunks.values())
        path = ([above] if above else []) + [space.chunks[key] for key in keys if key in space.chunks]
        touched = [*path]
        up = path[0].parent if path else None
        while up is not None:
            touched.insert(0, up)
            up = up.parent
        order = [chunk for chunk in order if chunk not in touched] + (path if space.reach else touched[::-1])
        width = -(-space.shard_bytes[0] // SECTOR)
        free = self.sectors_total // width - len(self.owner) // width
        safe = {above}
        gone: set[Chunk] = set()
        for at, key in enumerate(keys):
            chunk = space.chunks.get(key)
            if chunk in gone:
                return None
            safe.add(chunk)
            if chunk is not None and shard in chunk.sectors:
                continue
            while not free:
                needed = {one.parent for one in order if one not in gone} | safe
                victim = next((one for one in order if one not in gone | needed and one.idle), None)
                if victim is None:
                    return gone, len(keys) - at
                gone.add(victim)
                free += len(victim.sectors)
            free -= 1
        return gone, 0

    def check_nothing_may_go(self, space: ModelSpace, shard: int, above: Chunk | None, keys: list[bytes]) -> None:
        """What was refused had to be (the last of `keys`): nothing of its own space may go, nor enough that no engine uses."""
        path = {above, *map(space.chunks.get, keys)}
        busy = space.busy() | path
        parents = space.parents()
        assert all(chunk in busy or chunk in parents for chunk in space.chunks.values())
        width = -(-space.shard_bytes[shard] // SECTOR)
        slabs = self.heart.slabs
        free = [sector for start, end in slabs.holes() for sector in range(start, end)]
        for heart_space in self.heart.spaces:
            if not heart_space.instances:
                model = next(one for one in self.spaces if one.number == heart_space.number)
                busy = model.busy() | path  # the space that is stored into may be one without engines
                for own in set(heart_space.classes) - {-1}:
                    for region in slabs.regions(own):
                        sectors = range(region.first_sector, region.end_sector)
                        owners = {self.owner[sector][0] for sector in sectors if sector in self.owner}
                        if not any(chunk in busy or not chunk.attached for chunk in owners):
                            free += sectors
        longest = run = 0
        for sector in range(self.sectors_total):
            run = run + 1 if sector in set(free) else 0
            longest = max(longest, run)
        assert longest < width

    def commit(self) -> None:
        number = self.some(self.reservations)
        process = self.dice.choice(list(self.processes))
        held = self.reservations.get(number)
        if held is not None and self.dice.random() < 0.8:
            process = held.process
        self.commit_it(process, number, ok=self.dice.random() < 0.85)

    def commit_it(self, process: int, number: int, ok: bool, failing: float = 0.1) -> None:
        held = self.reservations.get(number)
        if held is None or held.process != process:
            with pytest.raises(Refusal):
                self.heart.commit(self.now, process, number, ok)
        elif self.now > held.deadline:
            self.end_reservation(number, ok=False)
            with pytest.raises(Refusal):
                self.heart.commit(self.now, process, number, ok)
        else:
            failed = {sector for sector in held.sectors if self.dice.random() < failing}
            kept = self.end_reservation(number, ok, failed)
            assert self.heart.commit(self.now, process, number, ok, failed) == kept

    def give_up(self) -> None:
        """As when the memory file system is full: nobody gets these slots until the cache is cleared."""
        number = self.some(self.reservations)
        held = self.reservations.get(number)
        if held is None or held.expired or len(self.lost) > self.sectors_total // 8:
            return
        lost = {sector for sector in held.sectors if self.dice.random() < 0.5}
        for sector in lost:
            for one in self.sectors_of(held.space, held.shard, sector):
                self.lost.add(one)
                self.owner[one] = LOST, 0
        self.end_reservation(number, ok=False)
        self.heart.give_up(held.process, number, lost)
        for process in (held.process, -1):
            with pytest.raises(Refusal):
                self.heart.give_up(process, number, lost)

    def end_reservation(self, number: int, ok: bool, failed: Container[int] = ()) -> int:
        held = self.reservations.pop(number)
        self.ended.append(number)
        if held.expired:
            for sector in held.sectors:
                for one in self.sectors_of(held.space, held.shard, sector):
                    del self.owner[one]
            return 0
        return self.end_fills(held, ok, failed)

    def end_fills(self, held: Reservation, ok: bool, failed: Container[int] = ()) -> int:
        kept = 0
        for chunk in reversed(held.chunks):
            chunk.filling.remove(held.shard)
            good = ok and chunk.sectors[held.shard] not in failed
            if not good:
                self.disown(chunk, [held.shard], held.space)
            stays = good and chunk.attached
            kept += stays
            self.tell("committed" if stays else "dropped", [chunk])
            if chunk.whole:
                self.tell("stored", [chunk])
                self.became_whole.add((held.process, chunk))
            self.free_if_nobody_cares(chunk, held.space)
            above: Chunk | None = chunk
            while above and above.attached and not above.sectors and above not in held.space.parents():
                del held.space.chunks[above.key]
                above.attached, above = False, above.parent
        return kept

    def free_if_nobody_cares(self, chunk: Chunk, space: ModelSpace) -> None:
        if not chunk.attached and chunk.idle:
            self.disown(chunk, list(chunk.sectors), space)

    # Time, and emptying

    def tick(self) -> None:
        self.now += self.dice.choice([0.1, 1.0, 3.0, 11.0])
        for lease in self.leases.values():
            if not lease.expired and self.now > lease.deadline:
                lease.expired = True
                for _, chunks in lease.parts:
                    self.tell("expired", chunks)
        for held in self.reservations.values():
            if not held.expired and self.now > held.deadline:
                held.expired = True
                self.tell("expired", held.chunks)
                for sector in held.sectors:
                    for one in self.sectors_of(held.space, held.shard, sector):
                        self.owner[one] = held.owner, held.shard
                self.end_fills(held, ok=False)
        self.heart.tick(self.now)
        for number, lease in self.leases.items():
            reader = next((one for one in self.processes if self.processes[one] == lease.instance), None)
            if lease.expired and reader is not None:
                self.check_payload(reader, number)
        numbers, before = {space.number for space in self.heart.spaces}, self.spaces
        self.spaces = [space for space in self.spaces if space.number in numbers or space.chunks]
        assert len(self.spaces) == len(numbers)
        assert all(one.number in numbers for one in before if any(other.instances for other in self.family(one, True)))

    def clear(self) -> None:
        whole = 0
        for space in self.spaces:
            for chunk in space.chunks.values():
                whole += chunk.whole
                self.tell("cleared", [chunk] if chunk.whole else [])
                chunk.attached = False
                self.free_if_nobody_cares(chunk, space)
            space.chunks.clear()
        for sector in self.lost:
            del self.owner[sector]
        self.lost.clear()
        assert self.heart.clear() == whole

    def clear_when_nobody_is_there(self) -> None:
        for process in list(self.processes):
            self.leave(process)
        for number in [one for one, held in self.reservations.items() if held.process == SERVER]:
            self.commit_it(SERVER, number, ok=False)
        for number in [one for one, held in self.leases.items() if held.process == SERVER]:
            self.end_lease(number)
            self.heart.release(SERVER, number)
        self.clear()
        assert self.heart.used_bytes() == 0 and self.heart.slabs.free_bytes == self.heart.slabs.total_bytes
        assert self.heart.quarantined_bytes == 0 and not self.owner

    def quarantined(self, instance: str | None) -> int:
        """Bytes of the slots of expired claims, of one instance or of all."""
        extents: dict[int, int] = {}
        for lease in self.leases.values():
            if lease.expired and instance in (None, lease.instance):
                for space, chunks in lease.parts:
                    for chunk in chunks:
                        extents |= {sector: space.shard_bytes[shard] for shard, sector in chunk.sectors.items()}
        for held in self.reservations.values():
            if held.expired and instance in (None, held.instance):
                extents |= dict.fromkeys(held.sectors, held.space.shard_bytes[held.shard])
        return sum(extents.values())

    def over_quota(self, instance: str) -> bool:
        return self.quarantined(instance) > self.heart.total_bytes // 4

    def why_no_lease(self, instance: str) -> str:
        if self.over_quota(instance):
            return "quarantine"
        leases = sum(lease.instance == instance for lease in self.leases.values())
        return "too many leases" if leases >= MAX_LEASES else ""

    # Dice

    def prompt(self) -> list[bytes]:
        """Keys of a prompt: few first chunks, many ways to go on; now and then longer than the arena."""
        length = self.dice.randint(1, 6) if self.dice.random() < 0.97 else self.dice.randint(1, self.sectors_total + 5)
        keys, key = [], b""
        for _ in range(length):
            key = hashlib.blake2b(key + bytes([self.dice.choice([0, 0, 0, 1, 2])]), digest_size=16).digest()
            keys.append(key)
        return keys

    def some(self, live: dict[int, Lease] | dict[int, Reservation]) -> int:
        """A number of something live, mostly, or of something that has ended, or of nothing."""
        known = [number for number in live if number not in self.frozen]
        if known and self.dice.random() < 0.9:
            return self.dice.choice(known)
        return self.dice.choice(self.ended)

    # What time and answers bring back

    def check_liveness(self) -> None:
        """Once time has passed, nothing is being filled any more, whoever has frozen; and an engine that comes then may fill
        and hit every chunk for which there is room. Once everybody has answered or died, nothing is out of use."""
        self.now += CLAIM_SECONDS + 1
        self.tick()
        self.check()
        assert not any(chunk.filling for space in self.spaces for chunk in space.chunks.values())
        process = self.newcomer()
        for kind in self.kinds:
            self.store_and_hit(process, kind, room_for_all=False)
        for number, lease in list(self.leases.items()):
            if lease.process == SERVER or self.dice.random() < 0.5:
                self.end_lease(number)
                reader = (one for one in self.processes if self.processes[one] == lease.instance)
                self.heart.release(next(reader, SERVER), number)
        for number, held in list(self.reservations.items()):
            if held.process == SERVER or self.dice.random() < 0.5:
                self.commit_it(held.process, number, ok=self.dice.random() < 0.5)
        self.check()
        for one in [one for one in self.processes if one != process]:
            self.leave(one)
        self.check()
        assert self.heart.open_leases == self.heart.open_reservations == self.heart.quarantined_bytes == 0
        for kind in self.kinds:
            self.store_and_hit(process, kind, room_for_all=True)

    def newcomer(self) -> int:
        process, self.next_process = self.next_process, self.next_process + 1
        self.processes[process] = f"newcomer {process}"
        self.heart.join(process, self.processes[process])
        return process

    def store_and_hit(self, process: int, kind: tuple[bytes, int, list[int], int, bytes], room_for_all: bool) -> None:
        """Every first chunk of a prompt, and one behind it."""
        fingerprint, shards, sizes, reach, family = kind
        more, split = {"family": family}, Split((), shards)
        for shard, size in enumerate(sizes):
            number = self.heart.open_space(process, fingerprint, shards, shard, size, reach, split=split, **more)
        if not any(one.number == number for one in self.spaces):
            self.spaces.append(ModelSpace(number, fingerprint, shards, sizes, reach, family))
        (space,) = [one for one in self.spaces if one.number == number]
        space.instances.add(self.processes[process])
        for first in (0, 1, 2):
            if room_for_all:
                self.clear()  # what was given up comes back, too
                assert self.heart.used_bytes() == 0
            key = hashlib.blake2b(bytes([first]), digest_size=16).digest()
            keys = [key, hashlib.blake2b(key + b"\0", digest_size=16).digest()]
            refused = 0
            for shard in range(shards):
                grant = self.heart.reserve(self.now, process, number, shard, b"", True, b"".join(keys))
                sectors = list(unpack(grant.extents))
                above = [space.chunks[key] for key in keys if key in space.chunks]
                space.touch(above, self.now)
                self.evict(self.vanished(space, shard, keys, sectors))
                granted = self.grant(space, shard, None, keys[: 2 - grant.refused], sectors)
                refused += grant.refused
                self.tell("refused", keys[2 - grant.refused :])
                if granted:
                    self.reservations[grant.reservation] = Reservation(
                        process, self.instance(process), space, shard, granted,
                        [sector for sector in sectors if sector != NO_EXTENT], self.now + CLAIM_SECONDS,
                    )  # fmt: skip
                    self.commit_it(process, grant.reservation, ok=True, failing=0.0)
                self.check()
            assert not refused or not room_for_all
            hit = self.heart.lookup(self.now, process, number, b"".join(keys))
            usable = longest_usable([[space]], keys)
            first = max(0, usable - space.reach) if space.reach else 0
            space.touch([space.chunks[key] for key in keys[first:usable]], self.now)
            assert hit.chunks == usable and (usable == 2 or not room_for_all)
            self.tell("hit", keys[:usable])
            self.tell("missed", keys[hit.chunks :])
            self.heart.release(process, hit.lease)
            self.check()


def leading_whole(space: ModelSpace, keys: list[bytes]) -> list[Chunk]:
    found = []
    for key in keys:
        chunk = space.chunks.get(key)
        if chunk is None or not chunk.whole:
            break
        found.append(chunk)
    return found


def longest_usable(groups: list[list[ModelSpace]], keys: list[bytes]) -> int:
    """By trying each length: full groups need everything before, the others what is in reach; from any space of theirs."""

    def has(spaces: list[ModelSpace], needed: list[bytes]) -> bool:
        return all(any(key in one.chunks and one.chunks[key].whole for one in spaces) for key in needed)

    return next(
        length
        for length in range(len(keys), -1, -1)
        if all(has(one, keys[max(0, length - one[0].reach) if one[0].reach else 0 : length]) for one in groups)
    )


def sectors_of_chunks(space: ModelSpace, chunks: list[Chunk]) -> bytes:
    sectors = [chunk.sectors[shard] for chunk in chunks for shard in range(space.shards)]
    return struct.pack(f"<{len(sectors)}I", *sectors)


def why_missed(spaces: list[ModelSpace], key: bytes) -> str:
    for space in spaces:
        missing = space.chunks.get(key)
        if missing is None or not missing.whole:
            return "absent" if missing is None else "being filled" if missing.filling else "incomplete"
    return "other groups"


def live(seed: int, steps: int, new_table: NewTable, lru: bool = True) -> None:
    life = Life(seed, new_table, lru)
    for _ in range(steps):
        life.step()
    life.check_liveness()
    life.clear_when_nobody_is_there()
    life.check()


@pytest.mark.parametrize("seed", range(50))
def test_the_promises_hold_after_every_step(seed: int) -> None:
    live(seed, 2_000, Table)


@pytest.mark.parametrize("seed", range(10))
def test_they_hold_with_the_table_in_python(seed: int) -> None:
    live(seed, 500, PyTable)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("table_type", [PyTable, Table])
def test_they_hold_with_another_policy(seed: int, table_type: Callable[..., Table]) -> None:
    live(seed, 500, lambda shards: table_type(shards, TwoQueues()), lru=False)


@pytest.mark.parametrize("seed", range(10))
def test_they_hold_with_the_learned_policy(seed: int) -> None:
    habits = Habits()
    live(seed, 1_000, lambda shards: Table(shards, habits), lru=False)
