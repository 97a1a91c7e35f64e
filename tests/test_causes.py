"""Every cause of a miss, produced on purpose with real servers and sessions: the record must name it, for 99 requests of 100."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine_process import Engine
from lmcache.engine import Hit, Loading
from lmcache.wire import messages as m
from proxy import Proxy
from servers import Raw, Server, eventually
from stores import RedisServer, binary_of
from test_requests import CHUNK, Bed

Servers, Engines = Callable[..., Server], Callable[..., Engine]
REQUESTS = 1000
FULL = 60
"""Chunks that fill nearly all of an L1 of 65."""


class Told(NamedTuple):
    """What a record says: the reason of the first missing chunk, and its number."""

    reason: str
    chunk: int


class Causes:
    """Two engines on a server with room for 65 chunks. `expected`: what each request's record must say."""

    def __init__(self, cache: Server, beds: list[Bed], raw: list[Raw]) -> None:
        self.cache, self.beds, self.raw, self.dice = cache, beds, raw, random.Random(7)
        self.expected: dict[str, Told] = {}
        self.parted: dict[str, int] = {}
        """Request -> the token at which it differs from the nearest one."""
        self.asked = 0

    def fresh(self, chunks: int, rest: int = 3) -> list[int]:
        return [self.dice.randrange(1 << 30) for _ in range(chunks * CHUNK + rest)]

    def ask(self, ids: list[int], reason: str, chunk: int, bed: Bed | None = None, **how: Any) -> None:
        """A request that stores nothing."""
        bed, name = bed or self.dice.choice(self.beds), self.next(reason, chunk)
        request = bed.open(name, **how)
        while isinstance(bed.requests.find(request, ids), Loading):
            bed.now += 1.0
        bed.requests.finish(name)

    def next(self, reason: str, chunk: int) -> str:
        self.asked += 1
        name = f"cmpl-{self.asked}-0-{self.dice.randrange(1 << 32):08x}"
        self.expected[name] = Told(reason, chunk)
        return name

    def stored(self, ids: list[int]) -> list[int]:
        """A request for a new prompt that stores it."""
        bed, name = self.dice.choice(self.beds), self.next("never_seen", 0)
        request = bed.open(name)
        bed.requests.find(request, ids)
        bed.store(request, ids)
        bed.requests.finish(name)
        return ids

    def ask_raw(self, hashes: bytes, reason: str) -> None:
        """A request of an engine that waits for nobody, since it has no scheduler that could."""
        name, raw = self.next(reason, 0), self.raw[1]
        found = raw.ask(m.Lookup(raw.space, hashes, request=name))
        if found.loading:  # the first answer is not the last one
            raw.ask(m.Release([], [name]))
            raw.ask(m.Lookup(raw.space, hashes))
            del self.expected[name]
        else:
            raw.ask(m.Release([found.lease]))

    # The causes

    def never_seen(self) -> None:
        self.ask(self.fresh(self.dice.randrange(1, 9)), "never_seen", 0)

    def differs(self) -> None:
        ids, at = self.stored(self.fresh(6)), self.dice.randrange(CHUNK, 6 * CHUNK)
        self.ask([*ids[:at], ids[at] + 1, *ids[at + 1 :]], "differs", at // CHUNK)
        self.parted[list(self.expected)[-1]] = at

    def longer(self) -> None:
        ids = self.stored(self.fresh(4, 0))
        self.ask(ids + self.fresh(2), "longer", 4)

    def found(self) -> None:
        ids = self.stored(self.fresh(5))
        self.ask(ids, "below_chunk", 5)

    def short(self) -> None:
        self.ask(self.fresh(0, self.dice.randrange(1, CHUNK)), "below_chunk", 0)

    def evicted(self) -> None:
        ids = self.stored(self.fresh(3))
        for _ in range(2):
            self.stored(self.fresh(FULL))
        self.ask(ids, "evicted", 0)

    def cleared(self) -> None:
        ids = self.stored(self.fresh(3))
        self.cache.clear()
        self.ask(ids, "cleared", 0)

    def not_stored(self) -> None:
        hashes = self.dice.randbytes(3 * 16)
        self.raw[0].ask(m.Commit(self.raw[0].reserve(hashes).reservation, False))
        self.ask_raw(hashes, "not_stored")

    def other_salt(self) -> None:
        ids = self.stored(self.fresh(3))
        self.ask(ids, "other_identity", 0, salt="another tenant")

    def awaited_in_vain(self) -> None:
        """The first engine promises the prompt, the second waits for it, and the first gives up."""
        ids, (one, two) = self.fresh(3), self.beds
        first, second = self.next("never_seen", 0), self.next("awaited_in_vain", 0)
        one.requests.find(one.open(first), ids)
        waits = two.open(second)
        assert isinstance(two.requests.find(waits, ids), Loading)
        one.requests.finish(first)
        two.now += 1.0
        assert eventually(lambda: not isinstance(two.requests.find(waits, ids, wait=True), Loading))
        two.requests.finish(second)


def records(server: Server) -> dict[str, Any]:
    """All records by the id of the request."""
    found, before = [], 0
    while True:
        page = server.get(f"/requests?limit=1000&before={before}")
        found += page["requests"]
        before = page["next"]
        if not before:
            return {one["request"]: one for one in found}


def test_what_happened_to_a_thousand_requests(server: Servers, engine: Engines) -> None:
    cache = server(l1=1.03, chunk=CHUNK)
    beds = [Bed(engine(cache, name, layers=8), name=name) for name in ("one", "two")]
    raw = [Raw(cache, name, shard_bytes=1 << 14) for name in ("raw", "reader")]
    for bed in beds:
        bed.requests.prefill.tokens_per_second = 1.0
    causes = Causes(cache, beds, raw)
    often = (causes.never_seen, causes.differs, causes.longer, causes.found, causes.short, causes.other_salt)
    rare = (causes.evicted, causes.cleared, causes.not_stored, causes.awaited_in_vain)
    while causes.asked < REQUESTS:
        causes.dice.choice(often if causes.dice.random() < 0.9 else rare)()
    told = records(cache)
    wrong = {
        name: (expected, Told(told[name]["reason"], told[name]["chunk"]) if name in told else None)
        for name, expected in causes.expected.items()
        if name not in told or Told(told[name]["reason"], told[name]["chunk"]) != expected
    }
    produced = Counter(one.reason for one in causes.expected.values())
    assert set(produced) == {
        *("never_seen", "differs", "longer", "below_chunk", "evicted", "cleared", "not_stored", "other_identity"),
        "awaited_in_vain",
    }
    assert len(wrong) <= len(causes.expected) // 100, (len(wrong), Counter(wrong.values()), produced)
    places = Counter(
        told[name]["differs_at"] - at if told[name]["differs_at"] >= 0 else None for name, at in causes.parted.items()
    )
    assert places[0] > 0.3 * places.total(), "half of them are asked by the engine that knows the other prompt"
    assert places[0] + places[None] >= 0.97 * places.total(), places
    for one in raw:
        one.close()


class Tiered:
    """An engine on a server with room for 65 chunks and a tier."""

    def __init__(self, cache: Server, bed: Bed) -> None:
        self.cache, self.bed, self.number, self.dice = cache, bed, 0, random.Random(3)

    def kept(self, chunks: int = 4) -> list[int]:
        """A prompt that the tier has, and L1 not any more."""
        ids = [self.dice.randrange(1 << 30) for _ in range(chunks * CHUNK)]
        self.store(ids)
        for _ in range(2):
            self.store([self.dice.randrange(1 << 30) for _ in range(FULL * CHUNK)])
        return ids

    def store(self, ids: list[int]) -> None:
        name = self.name()
        request = self.bed.open(name)
        self.find(name, ids)
        self.bed.store(request, ids)
        self.bed.requests.finish(name)
        eventually(lambda: not self.cache.status()["tiers"][0]["queued_chunks"])

    def name(self) -> str:
        self.number += 1
        return f"t{self.number}"

    def find(self, name: str, ids: list[int]) -> Hit | None:
        request = self.bed.requests.open[name]
        while isinstance(found := self.bed.requests.find(request, ids, wait=True), Loading):
            pass
        self.bed.requests.give_back(request)
        return found

    def told(self, ids: list[int]) -> Any:
        """The record of a request for this prompt."""
        name = self.name()
        self.bed.open(name)
        self.find(name, ids)
        self.bed.requests.finish(name)
        return self.cache.get(f"/requests?request={name}")["requests"][0]


@pytest.fixture
def tiered(server: Servers, engine: Engines) -> Callable[..., Tiered]:
    def make(url: str, *flags: str, rate: float = 0.0) -> Tiered:
        cache = server(l1=1.03, chunk=CHUNK, flags=("--l2", url, *flags))
        bed = Bed(engine(cache, layers=8), name="one")
        bed.requests.prefill.tokens_per_second = rate
        return Tiered(cache, bed)

    return make


def test_what_a_tier_loads_is_its_own_source_and_damage_is_a_reason(
    tiered: Callable[..., Tiered], folders: Callable[[str], Path]
) -> None:
    folder = folders("/tmp")
    one = tiered(f"disk://{folder}?max_gb=1", "--worth", "always")
    record = one.told(ids := one.kept())
    assert record["sources"] == {"disk": 64} and not record["missed"] and record["waited_seconds"] > 0
    assert one.told(ids)["sources"] == {"l1": 64}
    ids = one.kept()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 16:
            kept = bytearray(path.read_bytes())
            kept[4096:] = bytes(byte ^ 0x55 for byte in kept[4096:])
            path.write_bytes(kept)
    record = one.told(ids)
    assert record["missed"] == {"damaged": 64}, record


def test_a_tier_that_computes_no_gain_is_a_reason_with_both_times(
    tiered: Callable[..., Tiered], folders: Callable[[str], Path]
) -> None:
    one = tiered(f"disk://{folders('/tmp')}?max_gb=1")
    one.bed.requests.prefill.tokens_per_second = 1.0
    assert one.told(one.kept())["sources"] == {"disk": 64}, "its pace is known from now on"
    one.bed.requests.prefill.tokens_per_second = 1e12
    record = one.told(one.kept())
    assert record["missed"] == {"tier_not_worth": 64}, record
    assert record["fetch"]["expected_seconds"] is not None or record["fetch"]["left_out"]
    assert record["fetch"]["recompute_seconds"] < 1e-6


def test_a_tier_that_does_not_answer_or_is_gone_is_a_reason(
    tiered: Callable[..., Tiered], folders: Callable[[str], Path]
) -> None:
    store = RedisServer(binary_of("valkey"), folders("/tmp"))
    proxy = Proxy(store.port)
    try:
        url = store.url("?timeout=3600", port=proxy.port)
        one = tiered(url, "--worth", "always", "--l2-patience-seconds", "0.5")
        assert one.told(one.kept())["sources"] == {"redis": 64}
        ids, other = one.kept(), one.kept()
        proxy.freeze()
        assert one.told(ids)["missed"] == {"tier_slow": 64}
    finally:
        proxy.close()
        store.end()
    # The frozen question may still be under way, or its failure may be the first: a few lookups more ask the dead store again.
    eventually(lambda: one.told(other)["missed"] == {"tier_down": 64})
