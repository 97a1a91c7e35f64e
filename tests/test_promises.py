"""Lookups that wait for what other engines compute: who is told what, and for how long, on a made-up clock."""

from __future__ import annotations

import random
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.cache import L1, SERVER
from lmcache.cache import promises as module
from lmcache.cache.announcing import FILL_SECONDS
from lmcache.cache.fetch import ENDED_SECONDS, Ask, Fetches
from lmcache.cache.load_cost import (
    AWAIT_SLACK,
    AWAIT_TOLERANCE,
    UNPACED_QUIET_SECONDS,
    UNPACED_WAIT_SECONDS,
    slack_seconds,
)
from lmcache.cache.promises import (
    MAX_PROMISED,
    NOTHING,
    STALL_SECONDS,
    UNPACED_SECONDS,
    Asker,
    Coming,
    Key,
    Promises,
    keys_of,
)
from lmcache.cache.waits import AWAITED, TierTraits, Wanted
from lmcache.chunks import Split
from lmcache.memory.arena import Arena
from lmcache.memory.slabs import NO_EXTENT
from lmcache.runtime import Runtime
from lmcache.server.loop import Loop
from lmcache.server.tiering import Tiering

SECTOR, CHUNK, RATE = 4096, 16, 160.0
PACE = CHUNK / RATE
"""Seconds for one chunk, of each engine."""
FULL, WINDOW = b"f" * 16, b"w" * 16


def chain(chunks: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


def wanted(prompt: bytes, request: str) -> Wanted:
    return Wanted(0, prompt, SECTOR, 1, PACE, Asker(0, request))


def places(space: int, hashes: bytes) -> dict[Key, int]:
    return {key: at for at, key in enumerate(keys_of(space, hashes))}


class Engines:
    """Engines of one server without tiers, of two groups if `reach` is given. Its parts are called as the service calls them."""

    def __init__(self, arena: Arena, reach: int = 0) -> None:
        self.now, self.l1 = 100.0, L1(arena)
        self.loop = Loop(Runtime(now=lambda: self.now))
        options: dict[str, Any] = {"always": False, "patience_seconds": 60.0, "queue_bytes": 1 << 20}
        self.tiering = Tiering(self.loop, self.l1, [], chunk_tokens=CHUNK, **options)
        self.spaces: list[int] = []
        for process in range(1, 9):
            self.l1.join(process, f"instance {process}", 0)
            self.spaces = [
                self.l1.open_space(process, name, 1, 0, SECTOR, reach_chunks=length)
                for name, length in [(FULL, 0), (WINDOW, reach)][: 2 if reach else 1]
            ]

    def ask(
        self, process: int, hashes: bytes, request: str = "", rate: float = RATE, engine: str | None = None, **more: Any
    ) -> int:
        """What a lookup of this engine is told: how many chunks to wait for."""
        asker = Asker(
            process, request or f"request {process}", engine if engine is not None else f"engine {process}", **more
        )
        if any(self.tiering.sources):
            _, coming = self.tiering.wait_for(asker, self.spaces, hashes, rate)
            if coming:
                return coming
        space, *others = self.spaces
        hit = self.l1.lookup(self.now, process, space, hashes, 0, asker.request, others)
        if hit.lease:
            self.l1.release(process, hit.lease)
        self.tiering.answered(asker, self.spaces, hashes, hit.chunks, rate)
        return 0

    def have(self, hashes: bytes) -> int:
        return self.l1.peek(self.now, 1, self.spaces[0], hashes)

    def reserve(self, engine: int, hashes: bytes, first: int = 0, space: int = 0) -> int:
        parent = hashes[16 * (first - 1) : 16 * first] if first else b""
        grant = self.l1.reserve(
            self.now, engine, self.spaces[space], 0, parent, not first, hashes[16 * first :], "", f"request {engine}"
        )
        assert NO_EXTENT not in array("I", grant.extents) or not grant.reservation
        return grant.reservation

    def store(self, engine: int, hashes: bytes, first: int = 0) -> None:
        for space in range(len(self.spaces)):
            self.l1.commit(self.now, engine, self.reserve(engine, hashes, first, space), True)

    def waited(self, process: int, hashes: bytes, **more: Any) -> float:
        """Seconds that an engine waits if nothing happens."""
        began = self.now
        while self.ask(process, hashes, **more):
            assert self.now - began < 60.0, "it would wait for ever"
            self.later(0.01)
        return self.now - began

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.l1.tick(self.now)
        self.tiering._tick()

    @property
    def outcomes(self) -> list[str]:
        return [record.outcome for record in self.tiering.fetches.records]


@pytest.fixture
def arena() -> Iterator[Arena]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        arena = Arena(Path(folder), 256 * SECTOR)
        yield arena
        arena.close()


@pytest.fixture
def engines(arena: Arena) -> Iterator[Engines]:
    made = Engines(arena)
    yield made
    made.loop.close()


def test_the_second_to_ask_waits_for_what_the_first_one_computes(engines: Engines) -> None:
    prompt = chain(10)
    assert engines.ask(1, prompt) == 0 and engines.ask(2, prompt) == 10
    engines.later(5 * PACE)
    engines.store(1, prompt[: 16 * 5])
    assert engines.ask(2, prompt) == 5 and engines.have(prompt) == 5
    engines.later(5 * PACE)
    engines.store(1, prompt, first=5)
    assert engines.ask(2, prompt) == 0 and engines.have(prompt) == 10
    assert engines.outcomes == ["arrived"] and engines.tiering.fetches.counters["awaited"] == 10
    (record,) = engines.tiering.fetches.records
    assert record.planned == {AWAITED: 10} and record.decision == "load" and record.requests == ("request 2",)
    assert record.expected_seconds == record.recompute_seconds == pytest.approx(10 * PACE)
    assert engines.tiering.report.describe(record)["from"] == {"other engines": 10}
    assert not engines.l1.promises.by_chunk and not len(engines.l1.promises)


def test_a_longer_prompt_waits_for_its_shared_part_only(engines: Engines) -> None:
    shared = chain(10)
    engines.ask(1, shared + chain(5, 2))
    longer = shared + chain(20, 3)
    assert engines.ask(2, longer) == 10
    engines.store(1, shared)
    assert engines.ask(2, longer) == 0
    assert engines.ask(3, longer) == 20, "the second one has announced what it computes itself"


@pytest.mark.parametrize("what", ["engine", "request"])
def test_nobody_waits_for_an_engine_that_stores_nothing(engines: Engines, what: str) -> None:
    prompt = chain(10)
    if what == "engine":
        engines.ask(1, prompt, engine="")
    else:
        engines.tiering.answered(Asker(1, "", "engine 1"), engines.spaces, prompt, 0, RATE)
    assert engines.ask(2, prompt) == 0


def test_what_is_being_filled_is_waited_for_without_an_announcement(engines: Engines) -> None:
    prompt = chain(10)
    reservation = engines.reserve(1, prompt)
    assert engines.ask(2, prompt) == 10
    engines.l1.commit(engines.now, 1, reservation, True)
    assert engines.ask(2, prompt) == 0 and engines.have(prompt) == 10
    engines.l1.reserve(engines.now, SERVER, engines.spaces[0], 0, b"", True, chain(3, 5), "tier")
    assert engines.ask(2, chain(3, 5)) == 0, "what tiers load is the business of fetches from tiers"


ENDS = {
    "the engine dies": lambda one, prompt: one.l1.leave(1),
    "the request ends": lambda one, prompt: one.l1.promises.end("instance 1", "request 1"),
    "the request asks for something else": lambda one, prompt: one.ask(1, chain(3, 7)),
    "the cache is cleared": lambda one, prompt: one.l1.clear(),
    "the copy fails": lambda one, prompt: one.l1.commit(one.now, 1, one.reserve(1, prompt), False),
    "its chunks have no parent": lambda one, prompt: one.reserve(1, chain(1, 8) + prompt, first=1),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_wait_ends_with_the_promise(engines: Engines, what: str) -> None:
    prompt = chain(10)
    engines.ask(1, prompt)
    assert engines.ask(2, prompt) == engines.ask(3, prompt) == 10
    ENDS[what](engines, prompt)
    assert engines.ask(2, prompt) == 0 and engines.outcomes == ["promise ended"]
    assert engines.ask(3, prompt) == 10, "the next one waits for the one that computes now"
    assert engines.tiering.fetches.counters["awaits:promise ended"] == 1


def test_a_wait_takes_no_longer_than_computing_even_for_several_promises(engines: Engines) -> None:
    prompt, compute = chain(10), 10 * PACE
    slack = AWAIT_SLACK * slack_seconds(compute)
    engines.ask(1, prompt)
    assert engines.waited(2, prompt) == pytest.approx(compute + slack, abs=0.02)
    assert engines.outcomes == ["late"]
    assert engines.ask(3, prompt) == 0, "nobody begins to wait where another wait has just ended in vain"
    engines.later(2.0)
    engines.store(1, chain(1, 9))
    engines.ask(1, prompt := chain(10, 2))
    assert engines.ask(2, prompt) == engines.ask(3, prompt) == 10
    engines.later(0.8 * compute)
    engines.l1.leave(1)
    assert engines.ask(2, prompt) == 0
    assert engines.waited(3, prompt) == pytest.approx(0.2 * compute + slack, abs=0.02)


def test_only_time_spent_waiting_for_engines_counts(engines: Engines) -> None:
    fetches, prompt, coming = Fetches([]), chain(10), Coming(10, 10 * PACE)

    def ask(now: float, found: Coming = coming) -> int:
        return fetches.poll(now, wanted(prompt, ""), 0, [], found)

    assert ask(100.0, NOTHING) == 0, "no tier has it, and so its engine announces it"
    assert ask(100.9) == ask(101.8) == 10 and ask(102.1) == 0
    assert [record.outcome for record in fetches.records] == ["absent", "late"]


def test_a_long_prompt_is_waited_for_as_long_as_somebody_asks(engines: Engines) -> None:
    one, two, rate = chain(10), chain(10, 2), RATE / 100
    engines.ask(1, one, rate=rate)
    engines.ask(1, two, "other", rate=rate)
    for _ in range(60):
        assert engines.ask(2, one, rate=rate) == 10
        engines.later(1.6)  # a step of an engine that computes something else
    engines.store(1, one)
    assert engines.ask(2, one, rate=rate) == 0 and engines.outcomes == ["arrived"]
    assert engines.ask(2, two, rate=rate) == 10
    engines.later(30.0)
    engines.later(31.0)
    assert engines.outcomes == ["arrived", "patience"]


def test_a_stopped_engine_holds_up_no_later_request(engines: Engines) -> None:
    prompt = chain(10)
    engines.reserve(1, prompt)
    assert engines.waited(2, prompt) <= 10 * PACE + 0.2
    engines.later(FILL_SECONDS)
    assert engines.ask(3, prompt) == 0 and engines.ask(4, chain(3, 2)) == 0


@pytest.mark.parametrize("rate", [RATE, 0.0], ids=["pace known", "pace unknown"])
def test_an_engine_that_never_stores_is_waited_for_once(engines: Engines, rate: float) -> None:
    engines.ask(1, first := chain(10), "other ranks", engine="both")
    engines.ask(2, other := chain(10, 2), rate=rate, engine="both")
    assert engines.waited(3, other, engine="") > 0
    engines.later(ENDED_SECONDS + 0.01)
    for seed in range(3, 6):
        engines.ask(2, prompt := chain(10, seed), f"request {seed}", rate=rate, engine="both")
        assert engines.ask(4, prompt, engine="") == 0
    engines.store(1, first)
    engines.ask(2, prompt := chain(10, 7), rate=rate, engine="both")
    assert engines.ask(4, prompt, engine="") == 10, "it has stored something"


def test_an_engine_that_computes_faster_does_not_wait(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 2)
    assert engines.ask(2, prompt) == 0 and engines.outcomes == ["not worth it"]
    assert engines.ask(3, prompt, rate=RATE / 2) == 10, "and is waited for by slower ones"
    assert engines.ask(4, prompt, rate=1.2 * RATE) == 10, "and by equal ones, whose paces never measure quite the same"


def test_who_decides_not_to_wait_asks_no_tier_again(engines: Engines) -> None:
    fetches, prompt = Fetches([TierTraits(1 << 20, 1, lambda now: True, 64)]), chain(10)

    def ask(request: str) -> int:
        coming = fetches.poll(100.0, wanted(prompt, request), 0, [lambda hashes: None], Coming(10, 100 * PACE))
        for effect in fetches.effects:
            if isinstance(effect, Ask):
                asked.append(request)
                fetches.answered(100.0, effect.fetch, 0, [False] * 10, 0.001)
        fetches.effects.clear()
        return coming

    asked: list[str] = []
    assert ask("one") == 10 and ask("one") == ask("one") == 0 and asked == ["one"]
    assert ask("two") == 10 and asked == ["one", "two"], "its engine may be slower"


def test_an_engine_that_is_faster_than_it_said_is_waited_for(engines: Engines) -> None:
    """As at the end of a hand-over: a step of 16 chunks is stored, and the rest of the prompt is computed at this moment."""
    prompt = chain(19)
    engines.ask(1, prompt, rate=RATE / 10)
    assert engines.ask(3, prompt, engine="") == 0 and engines.outcomes == ["not worth it"], "nothing else is known yet"
    engines.later(16 * PACE / 2)
    engines.store(1, prompt[: 16 * 16])
    assert engines.ask(2, prompt) == 3
    assert engines.tiering.fetches.last is not None
    assert engines.tiering.fetches.last.expected_seconds == pytest.approx(3 * PACE / 2)
    engines.later(3 * PACE / 2)
    engines.store(1, prompt, first=16)
    assert engines.ask(2, prompt) == 0 and engines.outcomes[-1] == "arrived"


def test_chunks_that_are_being_filled_show_the_pace_as_well(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 10)
    engines.later(4 * PACE)
    reservation = engines.reserve(1, prompt[: 16 * 4])
    assert engines.ask(2, prompt) == 10
    engines.l1.commit(engines.now, 1, reservation, True)
    assert engines.ask(2, prompt) == 6


def test_an_engine_without_a_pace_gets_one_by_what_it_stores(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=0.0)
    engines.later(4 * PACE)
    engines.store(1, prompt[: 16 * 4])
    assert engines.ask(2, prompt) == 6
    assert engines.tiering.fetches.last is not None
    assert engines.tiering.fetches.last.expected_seconds == pytest.approx(6 * PACE)


def test_an_engine_that_is_slower_than_it_said_is_not_waited_for(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt)
    for at in range(5):
        engines.later(2 * PACE)
        engines.store(1, prompt[: 16 * (at + 1)], first=at)
    assert engines.ask(2, prompt) == 0 and engines.outcomes == ["not worth it"], "ten more against five of its own"
    assert engines.ask(3, prompt, rate=RATE / 2) == 5


def test_a_request_that_was_queued_for_long_is_not_taken_for_a_slow_one(engines: Engines) -> None:
    prompt = chain(19)
    engines.ask(1, prompt)
    engines.later(4.0)
    for first in (0, 8):  # one step, stored in two parts
        engines.store(1, prompt[: 16 * (first + 8)], first=first)
    assert engines.ask(2, prompt) == 3
    assert engines.tiering.fetches.last is not None
    assert engines.tiering.fetches.last.expected_seconds == pytest.approx(3 * PACE)


@pytest.mark.parametrize("engine", ["", "its rank"])
def test_an_engine_that_was_faster_than_it_said_is_expected_to_be_so_again(engines: Engines, engine: str) -> None:
    """Prompts of one step show nothing before they are stored."""
    name = engine or "engine 1"

    def compute(prompt: bytes, seconds: float) -> None:
        engines.ask(1, prompt, rate=RATE / 2, engine=name)
        engines.later(seconds)
        engines.store(1, prompt)

    for seed in range(3):
        compute(chain(10, seed), 10 * PACE)
    engines.ask(1, prompt := chain(10, 7), rate=RATE / 2, engine=name)
    assert engines.ask(2, prompt) == 10
    engines.store(1, prompt)
    for seed in range(10, 16):
        compute(chain(10, seed), 20 * PACE)
    engines.ask(1, prompt := chain(10, 8), rate=RATE / 2, engine=name)
    assert engines.ask(2, prompt) == 0, "its own pace was right for a while"
    engines.l1.leave(1)
    assert not engines.l1.promises._haste, "what is known of an engine ends with it"


def test_what_is_known_of_an_engine_goes_with_its_name(engines: Engines) -> None:
    promises = engines.l1.promises
    for number in range(5):
        prompt = chain(4, number)
        engines.ask(1, prompt, f"request {number}", engine=f"name {number}")
        engines.later(PACE)
        engines.store(1, prompt)
    assert promises._haste.keys() == {"name 4"}
    engines.l1.leave(1)
    assert not promises._haste


def test_no_estimate_makes_a_wait_longer_than_computing(engines: Engines) -> None:
    """A pause of an engine that was fast so far is waited for until computing would be over, and no longer."""
    prompt, left = chain(19), 3 * PACE
    engines.ask(1, prompt)
    engines.later(16 * PACE / 4)
    engines.store(1, prompt[: 16 * 16])
    assert engines.waited(2, prompt) == pytest.approx(left + AWAIT_SLACK * slack_seconds(left), abs=0.02)
    assert engines.outcomes == ["late"]


def test_nobody_waits_longer_than_computing_because_others_do(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 10)
    assert engines.ask(2, prompt, rate=RATE / 10) == 10
    assert engines.ask(3, prompt, engine="") == 0, "it computes them in a tenth of the time"
    assert engines.ask(4, prompt, rate=RATE / 10, have=9, engine="") == 0, "it computes one chunk"
    assert engines.ask(5, prompt, rate=0.0, have=10, engine="") == 0, "it has them all"
    engines.later(9.95)
    assert engines.ask(6, prompt, have=9, engine="") == 10
    assert engines.ask(2, prompt, rate=RATE / 10) == 10
    engines.later(0.05 + AWAIT_TOLERANCE * PACE + AWAIT_SLACK * slack_seconds(PACE) + 0.01)
    assert engines.ask(6, prompt, have=9, engine="") == 0 and not engines.outcomes
    assert engines.ask(2, prompt, rate=RATE / 20) == 10, "which ends no other's wait"


def test_who_must_not_wait_for_an_engine_waits_for_tiers_before_it(engines: Engines) -> None:
    tiers = [TierTraits(1 << 20, 1, lambda now: True, 64, "tier")]
    fetches, prompt, barred = Fetches(tiers), chain(10), Coming(barred=True)
    known = [lambda hashes: [True] * 5 + [False] * (len(hashes) // 16 - 5)]
    assert fetches.poll(100.0, wanted(prompt, "one"), 0, known, Coming(10, PACE)) == 10
    assert fetches.poll(100.0, wanted(prompt, "two"), 0, known, barred) == 10
    assert fetches.poll(100.1, wanted(prompt, "two"), 5, known, barred) == 0
    assert fetches.open == 1


def test_without_a_known_pace_a_wait_lasts_while_chunks_arrive(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=0.0)
    for at in range(5):
        assert engines.ask(2, prompt, rate=0.0) == 10 - at
        engines.later(0.9 * UNPACED_WAIT_SECONDS)
        engines.store(1, prompt[: 16 * (at + 1)], first=at)
    assert engines.waited(2, prompt, rate=0.0) == pytest.approx(UNPACED_WAIT_SECONDS, abs=0.02)
    assert engines.outcomes == ["late"]


def test_an_engine_that_only_decodes_waits_at_the_other_ones_pace(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 10)  # a second for each chunk
    assert engines.waited(2, prompt, rate=0.0) == pytest.approx(20.0 + UNPACED_WAIT_SECONDS, abs=0.02)
    assert engines.outcomes == ["late"]


def test_an_engine_that_only_decodes_does_not_wait_for_silence_at_a_pace_that_cannot_be(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 1e6)  # a day for each chunk
    assert engines.ask(2, prompt, rate=0.0) == 10
    engines.later(0.9 * UNPACED_QUIET_SECONDS)
    engines.store(1, prompt[:16])
    bound = UNPACED_QUIET_SECONDS + UNPACED_WAIT_SECONDS
    assert engines.waited(2, prompt, rate=0.0) == pytest.approx(bound, abs=0.02)
    assert engines.outcomes == ["late"]


def test_an_engine_that_only_decodes_leaves_a_prefill_that_trickles(engines: Engines) -> None:
    """It waits for chunks that come late for twice the time that the other one's pace suggests, and then for steady ones only."""
    prompt = chain(10)
    engines.ask(1, prompt, rate=RATE / 10)  # a second for each chunk
    began, stored = engines.now, 0
    while engines.ask(2, prompt, rate=0.0):
        assert engines.now < began + 60.0, "it would wait for all of them"
        engines.later(0.1)
        if engines.now > began + 6.0 * (stored + 1):
            stored += 1
            engines.store(1, prompt[: 16 * stored], first=stored - 1)
    assert engines.now - began == pytest.approx(20.0 + UNPACED_WAIT_SECONDS, abs=0.2)
    assert engines.outcomes == ["late"] and engines.have(prompt) == stored == 3, "what has come is used"


def test_what_the_engine_has_itself_is_not_waited_for(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt)
    assert engines.ask(2, prompt, have=10) == 0
    assert engines.ask(3, prompt + chain(10, 2), have=10) == 0
    engines.later(30.0)
    engines.ask(1, prompt := chain(10, 4))
    assert engines.waited(2, prompt, have=8) <= 2 * PACE + 0.1, "it would compute two chunks"


def test_no_two_requests_wait_for_each_other(engines: Engines) -> None:
    one, two = chain(10), chain(10, 2)
    engines.ask(1, one, "a")
    engines.ask(2, two, "b")
    assert engines.ask(1, two, "c") == engines.ask(2, one, "d") == 10, "others of engines that go on meanwhile"
    # A request that waits has promised nothing: here it had announced one prompt, and asks for the other now.
    assert engines.ask(1, two, "a") == 10
    assert engines.ask(2, one, "b") == 0
    assert engines.ask(1, one, "a") == 10 and engines.ask(2, two, "b") == 0


def test_an_engine_that_computes_nothing_while_it_waits_does_not_wait_while_it_has_promised(engines: Engines) -> None:
    one, two = chain(10), chain(10, 2)
    engines.ask(1, one, "a", halts=True)
    engines.ask(2, two + chain(1, 3), "b", halts=True)
    assert engines.ask(1, two, "c", halts=True) == engines.ask(2, one, "d", halts=True) == 0
    engines.l1.promises.clear()
    engines.ask(3, one, "e")
    assert engines.ask(1, one, "f", halts=True) == 10, "it waits when it has promised nothing"


def test_random_engines_never_wait_in_a_circle(engines: Engines) -> None:
    """Every engine halts while one of its requests waits. Follow who waits for whom after each step."""
    rng, prompts = random.Random(5), [chain(6, seed) for seed in range(4)]
    waits: dict[int, bytes] = {}
    waited = 0
    for step in range(3000):
        engine = rng.randrange(1, 9)
        if engine in waits or rng.random() < 0.6:
            prompt = waits.get(engine) or rng.choice(prompts)[: 16 * rng.randrange(1, 7)]
            coming = engines.ask(
                engine, prompt, f"{engine} {rng.randrange(3)}" if engine not in waits else "", halts=True
            )
            waits.pop(engine, None)
            if coming:
                waits[engine], waited = prompt, waited + 1
        elif rng.random() < 0.2:
            engines.l1.promises.leave(f"instance {engine}")
        if rng.random() < 0.02:
            engines.l1.clear()
        engines.later(0.001)
        promises = engines.l1.promises
        makers = {promise.instance for promise in promises.by_chunk.values()}
        assert {name for at in range(9) if promises.of_engine(name := f"instance {at}", "")} == makers
        for waiter, prompt in waits.items():
            key = engines.spaces[0], prompt[:16]
            promise = engines.l1.promises.by_chunk.get(key)
            assert promise is None or promise.asker.process not in waits, f"step {step}: {waiter} waits for a waiter"
    assert waited > 100


def test_ranks_of_one_engine_do_not_wait_for_each_other(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt, "r", engine="sglang")
    assert engines.ask(2, prompt, "r", engine="sglang") == 0
    assert engines.ask(3, prompt) == 10
    assert engines.ask(1, prompt, "r", engine="sglang") == 0, "nor does the first one join a wait for itself"
    assert engines.ask(3, prompt) == 10 and not engines.outcomes, "which goes on"


def test_a_request_waits_once_for_a_chunk(engines: Engines) -> None:
    prompt = chain(10)
    engines.ask(1, prompt)
    engines.waited(2, prompt, engine="")
    engines.later(ENDED_SECONDS + 0.01)
    assert len(engines.l1.promises) == 1 and engines.ask(2, prompt, engine="") == 0
    assert engines.ask(3, prompt) > 0


def test_promises_are_bounded_and_end_when_nothing_is_stored() -> None:
    promises = Promises()
    for number in range(10):
        promises.make(100.0, "one", Asker(1, f"r{number}", "e"), 0.0, places(0, chain(MAX_PROMISED // 4, number)))
    assert len(promises) == 4 and len(promises.by_chunk) == MAX_PROMISED
    promises.make(101.0, "one", Asker(1, "long", "e"), 0.1, places(0, chain(2 * MAX_PROMISED, 77)))
    assert len(promises) == 1 and len(promises.by_chunk) == MAX_PROMISED
    promises.clear()
    hashes = chain(10)
    promises.make(100.0, "one", Asker(1, "r", "e"), 0.1, places(0, hashes))
    promises.make(100.0, "two", Asker(2, "r", "f"), 0.0, places(1, hashes))
    promises.tick(102.9)
    promises.kept(0, hashes[:16])
    promises.tick(102.9)
    promises.tick(102.9 + 2 * 0.9 + STALL_SECONDS - 0.01)
    assert len(promises) == 2
    promises.tick(102.9 + 2 * 0.9 + STALL_SECONDS + 0.01)
    assert [key[0] for key in promises.by_chunk] == [1] * 10
    promises.tick(100.0 + UNPACED_SECONDS + 0.01)
    assert not promises.by_chunk
    for number in range(module.MAX_GIVEN_UP + 5):
        promises.give_up(100.0, "one", str(number), (0, b"k"))
    assert promises.given_up("one", "0") is None and promises.given_up("one", str(number)) == (0, b"k")


def test_what_an_engine_with_another_split_computes_is_waited_for(engines: Engines) -> None:
    one, two, family = Split((), 1), Split((), 2), b"family".ljust(16)
    wide = engines.l1.open_space(1, family, 1, 0, 2 * SECTOR, family=family, split=one)
    halves = [engines.l1.open_space(2, family, 2, shard, SECTOR, family=family, split=two) for shard in range(2)]
    prompt, asker = chain(6), Asker(1, "r", "engine 1")
    engines.tiering.answered(Asker(2, "r", "engine 2"), halves[:1], prompt, 0, RATE)
    assert engines.tiering.wait_for(asker, [wide], prompt, RATE, sisters=True) == (0, 6)
    for shard in range(2):
        grant = engines.l1.reserve(engines.now, 2, halves[0], shard, b"", True, prompt)
        assert engines.tiering.wait_for(asker, [wide], prompt, RATE, sisters=True)[1] == 6
        engines.l1.commit(engines.now, 2, grant.reservation, True)
    assert engines.tiering.wait_for(asker, [wide], prompt, RATE, sisters=True) == (6, 0)
    assert engines.outcomes == ["arrived"]


def test_all_groups_are_waited_for_together(arena: Arena) -> None:
    engines, prompt = Engines(arena, reach=2), chain(10)
    engines.ask(1, prompt)
    assert engines.ask(2, prompt) == 10
    assert engines.ask(3, prompt[: 16 * 6] + chain(4, 2)) == 0, "at that end the window need not be stored"
    engines.l1.commit(engines.now, 1, engines.reserve(1, prompt), True)
    assert engines.ask(1, prompt) == 0, "who computes does not wait for itself"
    assert engines.ask(2, prompt) == 2, "of the window"
    engines.l1.commit(engines.now, 1, engines.reserve(1, prompt, 8, 1), True)
    assert engines.ask(2, prompt) == 0
    engines.loop.close()


def test_all_groups_of_a_chunk_are_computed_at_once(arena: Arena) -> None:
    engines, prompt = Engines(arena, reach=10), chain(10)
    engines.ask(1, prompt)
    engines.l1.commit(engines.now, 3, engines.reserve(3, prompt), True)
    assert engines.ask(2, prompt) == 10, "of the window"
    assert engines.tiering.fetches.last is not None
    assert engines.tiering.fetches.last.expected_seconds == pytest.approx(10 * PACE)
    engines.loop.close()


def test_a_wait_for_what_nobody_fills_yet_goes_through_no_reservations(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, filled = chain(10), chain(10, 2), engines.l1._filled
    engines.reserve(1, other)
    engines.ask(1, one)
    looked: list[int] = []
    monkeypatch.setattr(engines.l1, "_filled", lambda *asked: looked.append(1) or filled(*asked))
    assert engines.ask(2, one) == engines.ask(2, one) == 10 and not looked
    assert engines.ask(3, other) == 10 and looked


def test_an_announcement_in_many_spaces_is_bounded(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []
    monkeypatch.setattr(
        "lmcache.cache.announcing.keys_of",
        lambda space, hashes: named.append(len(hashes) // 16) or keys_of(space, hashes),
    )
    engines.spaces *= 33
    engines.tiering.answered(Asker(1, "r", "e"), engines.spaces, chain(MAX_PROMISED - 100), 0, RATE)
    assert sum(named) == MAX_PROMISED and len(engines.l1.promises.by_chunk) == MAX_PROMISED - 100


def test_ends_at_which_nothing_is_coming_are_not_tried(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, history = Engines(arena, reach=2), chain(60)
    engines.l1.commit(engines.now, 1, engines.reserve(1, history), True)
    engines.l1.commit(engines.now, 1, engines.reserve(1, history[: 16 * 3], 1, 1), True)
    engines.ask(3, chain(4, 7))
    peeks, peek = list[int](), engines.l1.peek
    monkeypatch.setattr(engines.l1, "peek", lambda *asked: peeks.append(len(asked[3])) or peek(*asked))
    assert engines.ask(2, history + chain(2, 3)) == 0
    assert len(peeks) < 10
    engines.loop.close()
