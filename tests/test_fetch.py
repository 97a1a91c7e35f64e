"""What is fetched from tiers, and how long anybody waits: on a made-up clock, with made-up tiers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from lmcache.cache.events import Event
from lmcache.cache.fetch import KEPT_RECORDS, Ask, Ended, Fetches
from lmcache.cache.load_cost import SLACK_SECONDS, Pace, slack_seconds
from lmcache.cache.promises import Asker
from lmcache.cache.waits import ASK_SECONDS, FetchRecord, Load, TierTraits, Wanted
from lmcache.cache.writeback import Batch, WriteQueue
from lmcache.tiers.breaker import FAILURES_TO_OPEN, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Breaker

CHUNK_BYTES = 1 << 20
SPACE = 3


def chain(chunks: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


def keys(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + 16] for at in range(0, len(hashes), 16)]


class World:
    """Tiers with a latency and a rate, an L1, and a clock that a test moves.

    ask_seconds None: the tier tells at once what it has. rate: bytes a second of one call at a time; 0: nothing ever comes.
    """

    def __init__(self, *tiers: tuple[float | None, float], always: bool = False, batch_chunks: int = 2) -> None:
        self.now = 100.0
        self.tiers = tiers
        self.has: list[set[bytes]] = [set() for _ in tiers]
        self.serving = [True] * len(tiers)
        self.l1: set[bytes] = set()
        self.happens: list[tuple[float, int, Callable[[], None]]] = []
        self.loads: list[Load] = []
        self.asks: list[Ask] = []
        self.free_at = [0.0] * len(tiers)
        self.order = 0
        traits = [
            TierTraits(batch_chunks * CHUNK_BYTES, 2, lambda now, tier=tier: self.serving[tier], 512)
            for tier in range(len(tiers))
        ]
        self.fetches = Fetches(traits, always)

    def knower(self, tier: int) -> Callable[[bytes], Sequence[bool] | None]:
        def known(hashes: bytes) -> Sequence[bool] | None:
            if self.tiers[tier][0] is not None:
                return None
            return [key in self.has[tier] for key in keys(hashes)]

        return known

    def poll(self, hashes: bytes, prefill_seconds: float = 0.0, request: str = "") -> int:
        wait = self.fetches.poll(
            self.now,
            Wanted(SPACE, hashes, CHUNK_BYTES, 1, prefill_seconds, Asker(0, request)),
            self.leading(hashes),
            [self.knower(tier) for tier in range(len(self.tiers))],
        )
        self.carry_out()
        return wait

    def leading(self, hashes: bytes) -> int:
        return next((at for at, key in enumerate(keys(hashes)) if key not in self.l1), len(hashes) // 16)

    def carry_out(self) -> None:
        effects, self.fetches.effects = self.fetches.effects, []
        for effect in effects:
            if isinstance(effect, (FetchRecord, Ended)):
                continue
            latency, rate = self.tiers[effect.tier]
            if isinstance(effect, Ask):
                self.asks.append(effect)
                self.later(latency or 0.0, lambda effect=effect, took=latency or 0.0: self.answer(effect, took))
                continue
            self.loads.append(effect)
            if rate:
                size = len(effect.hashes) // 16 * CHUNK_BYTES
                self.free_at[effect.tier] = max(self.now, self.free_at[effect.tier]) + size / rate
                self.later(
                    self.free_at[effect.tier] - self.now, lambda effect=effect, size=size: self.end(effect, size)
                )

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self.order += 1
        self.happens.append((self.now + seconds, self.order, what))

    def answer(self, ask: Ask, seconds: float) -> None:
        present = [key in self.has[ask.tier] for key in keys(ask.hashes)] if self.serving[ask.tier] else None
        self.fetches.answered(self.now, ask.fetch, ask.tier, present, seconds)

    def end(self, load: Load, size: int) -> None:
        good = [key for key in keys(load.hashes) if key in self.has[load.tier]]
        self.l1.update(good)
        self.fetches.loaded(self.now, load, len(good) * CHUNK_BYTES)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = min((one for one in self.happens if one[0] <= end), default=None)
            if due is None:
                break
            self.happens.remove(due)
            self.now = max(self.now, due[0])
            due[2]()
            self.carry_out()
        self.now = end

    def wait_for(self, hashes: bytes, prefill_seconds: float = 0.0, most: float = 60.0, request: str = "") -> float:
        """As an engine does: ask again until told to go; seconds waited."""
        begin = self.now
        while self.poll(hashes, prefill_seconds, request):
            assert self.now - begin < most, "an engine would hang"
            self.pass_time(0.001)
        return self.now - begin


def test_a_full_hit_asks_nobody() -> None:
    world, prompt = World((0.01, 1e9)), chain(4)
    world.l1.update(keys(prompt))
    assert world.poll(prompt) == 0 and not world.asks and not world.loads


def test_what_no_tier_has_is_not_waited_for() -> None:
    world, prompt = World((None, 1e9), (0.02, 1e9)), chain(4)
    assert world.wait_for(prompt) == pytest.approx(0.02, abs=0.002)
    local, other = World((None, 1e9)), chain(4)
    assert local.poll(other) == 0, "a tier that knows at once costs nothing"


def test_chunks_come_from_the_nearest_tier_that_has_them_in_order() -> None:
    world, prompt = World((None, 1e9), (0.01, 1e9)), chain(7)
    names = keys(prompt)
    world.l1.update(names[:1])
    world.has[0].update(names[1:3])
    world.has[1].update([*names[1:5], names[6]])
    world.wait_for(prompt)
    assert [(load.tier, keys(load.hashes)) for load in world.loads] == [(0, names[1:3]), (1, names[3:5])]
    assert [(load.parent, load.root) for load in world.loads] == [(names[0], False), (names[2], False)]
    assert world.leading(prompt) == 5, "after the first gap nothing is reachable"
    fresh = World((None, 1e9))
    fresh.has[0].update(names)
    fresh.wait_for(prompt)
    assert fresh.loads[0].root and fresh.loads[0].parent == b""


def test_a_chunk_is_loaded_once_whoever_wants_it() -> None:
    world = World((None, 100e6))
    stem, ends = chain(6, 1), [chain(2, 2), chain(2, 3)]
    prompts = [stem + end for end in ends]
    world.has[0].update(keys(b"".join([stem, *ends])))
    assert world.poll(prompts[0]) == 8 and world.poll(prompts[1]) == 8
    while sum(world.poll(one) for one in prompts):
        world.pass_time(0.001)
    loaded = [key for load in world.loads for key in keys(load.hashes)]
    assert sorted(loaded) == sorted(set(loaded)) and len(loaded) == 10
    assert [world.leading(one) for one in prompts] == [8, 8]


def test_a_load_that_is_slower_than_computing_is_not_started() -> None:
    world, first, second = World((None, 10e6)), chain(4, 1), chain(4, 2)
    world.has[0].update(keys(first + second))
    world.wait_for(first)  # 0.42 s for 4 MiB: now the tier's pace is known
    loads = len(world.loads)
    assert world.wait_for(second, prefill_seconds=0.05) == 0.0 and len(world.loads) == loads
    assert world.fetches.counters["fetches:not worth it"] == 1
    last = world.fetches.last
    assert last is not None and (last.requests, last.prompt, last.decision) == ((), second[-16:], "not worth it")
    assert (last.expected_seconds, last.recompute_seconds) == (pytest.approx(0.419, abs=0.01), 0.2)
    third = chain(4, 3)
    world.has[0].update(keys(third))
    assert world.wait_for(third, prefill_seconds=0.5) == pytest.approx(0.42, abs=0.01), "computing takes 2 s"


def test_a_slow_tier_that_becomes_fast_is_noticed() -> None:
    world = World((None, 1e6))
    slow = chain(4, 1)
    world.has[0].update(keys(slow))
    world.wait_for(slow)
    world.tiers = ((None, 1e9),)
    for number in range(2, 30):
        prompt = chain(4, number)
        world.has[0].update(keys(prompt))
        assert world.wait_for(prompt, prefill_seconds=0.1) < 0.1, "nobody waits for a probe"
        world.pass_time(2.0)
        world.fetches.tick(world.now)
    assert 1 <= world.fetches.counters["probes"] < 10
    assert world.leading(prompt) == 4, "in the end it is worth loading again"


def test_a_tier_that_fails_says_nothing_of_its_pace() -> None:
    world = World((None, 1e6))
    prompt = chain(4, 1)
    world.has[0].update(keys(prompt))
    world.poll(prompt)
    for load in world.loads:
        world.fetches.loaded(world.now + 5, load, None)
    assert world.fetches.paces[0].bytes_per_second is None


def test_always_loads_whatever_is_there() -> None:
    world, first, second = World((None, 10e6), always=True), chain(4, 1), chain(4, 2)
    world.has[0].update(keys(first + second))
    world.wait_for(first)
    assert world.wait_for(second, prefill_seconds=0.01) == pytest.approx(0.42, abs=0.01)
    assert world.leading(second) == 4


@pytest.mark.parametrize("prefill_seconds", [0.002, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_no_request_is_slower_than_computing_by_more_than_the_slack(seed: int, prefill_seconds: float) -> None:
    """Tiers that are fast, slow, stalled or lying, measured before: waiting and then computing the rest costs at most 5 % (or
    10 ms) more than computing everything, and what the loads that run side by side were to take."""
    dice = random.Random(seed)
    rate = CHUNK_BYTES / prefill_seconds * dice.choice([0.3, 0.9, 1.5, 5, 50])
    world = World((dice.choice([None, 0.001]), rate))
    warm = chain(8, 1000 + seed)
    world.has[0].update(keys(warm))
    world.wait_for(warm)
    for number in range(20):
        prompt = chain(dice.randint(1, 32), 7 * seed + 1 + number * 1000)
        world.has[0].update(keys(prompt)[: dice.randint(0, 32)])
        turn = dice.choice(["as before", "stalled", "slower", "lies"])
        latency, before = world.tiers[0]
        if turn != "as before":
            world.tiers = ((latency, {"stalled": 0.0, "slower": before / 10, "lies": before}[turn]),)
        if turn == "lies":
            gone = dice.sample(keys(prompt), 1)
            known = world.knower(0)(prompt)
            world.has[0].difference_update(gone if known is None else [])
        chunks = len(prompt) // 16
        planned = world.fetches.paces[0].expected_seconds(min(4, chunks) * CHUNK_BYTES)
        waited = world.wait_for(prompt, prefill_seconds)
        computed = (chunks - world.leading(prompt)) * prefill_seconds
        alone = chunks * prefill_seconds
        assert planned is not None
        assert waited + computed <= alone + slack_seconds(alone) + planned + 0.003
        world.tiers = ((latency, before),)
        world = _again(world)


def _again(world: World) -> World:
    """The same tiers with the same pace, nothing under way."""
    fresh = World(*world.tiers)
    fresh.fetches.paces.update(world.fetches.paces)
    for pace in fresh.fetches.paces.values():
        pace._running = 0
    fresh.has = world.has
    return fresh


def test_a_stalled_tier_is_left_out_and_its_late_chunks_still_come() -> None:
    world, prompt = World((0.001, 1e9), (10.0, 1e9)), chain(6)
    world.has[0].update(keys(prompt)[:4])
    world.has[1].update(keys(prompt))
    assert world.wait_for(prompt) == pytest.approx(ASK_SECONDS, abs=0.02), "nobody knows what computing costs"
    fresh = World((0.001, 1e9), (10.0, 1e9))
    fresh.has[0].update(keys(prompt)[:4])
    assert fresh.wait_for(prompt, prefill_seconds=0.02) <= 0.25 * 0.12 + SLACK_SECONDS + 0.01, "120 ms of computing"
    fresh.pass_time(10.0)
    other = chain(6, 99)
    fresh.has[0].update(keys(other)[:4])
    assert fresh.wait_for(other, prefill_seconds=0.02) < 0.015, "it takes 10 s to answer: it is not asked again"
    assert fresh.leading(other) == 4
    slow = World((None, 5e6))
    slow.has[0].update(keys(prompt))
    slow.wait_for(prompt, prefill_seconds=0.05)
    assert slow.leading(prompt) < 6
    slow.pass_time(2.0)
    assert slow.leading(prompt) == 4, "what had begun (two calls of two chunks) has come; what had not was dropped"
    assert slow.fetches.counters["fetches:late"] == 1


def test_damage_ends_a_fetch_with_what_came_before_it() -> None:
    world, prompt = World((0.001, 1e9)), chain(6)
    names = keys(prompt)
    world.has[0].update(names)
    assert world.poll(prompt) == 6
    world.pass_time(0.0015)
    world.has[0].remove(names[3])
    world.wait_for(prompt)
    assert world.leading(prompt) == 3 and world.fetches.counters["failed"] == 3


def test_a_tier_that_fails_is_not_waited_for() -> None:
    world, prompt = World((0.001, 1e9), (0.002, 1e9)), chain(4)
    world.has[1].update(keys(prompt))
    world.serving[0] = False
    world.poll(prompt)
    assert [ask.tier for ask in world.asks] == [1], "a tier in trouble is not asked"
    world.serving[0] = True
    other = chain(4, 9)
    world.has[1].update(keys(other))
    world.poll(other)
    world.serving[0] = False
    world.wait_for(other)
    assert world.leading(other) == 4


def test_what_came_and_was_evicted_is_fetched_again() -> None:
    world, prompt = World((0.001, 1e9)), chain(4)
    world.has[0].update(keys(prompt))
    for number in range(1, 4):
        world.wait_for(prompt)
        assert world.leading(prompt) == 4 and world.fetches.counters["arrived"] == 4 * number
        world.l1.clear()
    assert world.fetches.open == 0


def test_the_same_request_asked_again_is_not_fetched_again_at_once() -> None:
    world, prompt = World((0.001, 1e9)), chain(4)
    world.wait_for(prompt)
    assert len(world.asks) == 1
    for _ in range(20):
        assert world.poll(prompt) == 0
    assert len(world.asks) == 1
    world.pass_time(2.0)
    world.fetches.tick(world.now)
    world.poll(prompt)
    assert len(world.asks) == 2


def test_fetches_that_nobody_asks_about_end() -> None:
    world, prompt = World((None, 0.0)), chain(4)
    world.has[0].update(keys(prompt))
    assert world.poll(prompt) == 4 and world.fetches.open == 1
    world.pass_time(11.0)
    world.fetches.tick(world.now)
    assert world.fetches.open == 0
    world.pass_time(2.0)
    world.fetches.tick(world.now)
    assert not world.fetches._fetches and not world.fetches._by_request


def test_a_fetch_leaves_a_record_with_the_decision_and_both_its_numbers() -> None:
    world, first, second, third = World((None, 10e6), (0.002, 1e9)), chain(4, 1), chain(4, 2), chain(4, 3)
    world.l1.update(keys(first)[:1])
    world.has[0].update(keys(first + second)[:7])
    world.wait_for(first, request="one")
    (record,) = world.fetches.records
    assert (record.requests, record.prompt, record.space) == (("one",), first[-16:], SPACE)
    assert (record.asked_chunks, record.l1_chunks, record.planned, record.left_out) == (4, 1, {0: 3}, {})
    assert (record.decision, record.outcome, record.arrived_chunks) == ("load", "arrived", 3)
    assert record.expected_seconds is None and record.recompute_seconds is None, "both paces are unknown so far"
    assert record.waited_seconds == pytest.approx(3 * CHUNK_BYTES / 10e6, abs=0.01) and record.ended == world.now
    world.wait_for(second, prefill_seconds=0.05, request="two")
    record = world.fetches.records[-1]
    assert (record.decision, record.outcome, record.planned) == ("not worth it", "not worth it", {0: 3})
    assert (record.expected_seconds, record.recompute_seconds) == (pytest.approx(0.32, abs=0.01), pytest.approx(0.15))
    assert record.arrived_chunks == 0 and record.waited_seconds == pytest.approx(0.002, abs=0.002), "the other's answer"
    world.serving[0] = False
    world.wait_for(third, prefill_seconds=0.05)
    record = world.fetches.records[-1]
    assert (record.requests, record.decision, record.outcome) == ((), "", "absent")
    assert record.left_out == {0: "not serving"} and record.expected_seconds is None
    world.l1.update(keys(third))
    world.poll(third)
    assert len(world.fetches.records) == 3, "what L1 answers in full is no fetch"


def test_a_record_says_why_a_tier_had_no_say_and_a_wait_ended() -> None:
    world, prompt = World((10.0, 1e9)), chain(4)
    world.wait_for(prompt, prefill_seconds=0.02)
    assert world.fetches.records[-1].left_out == {0: "late answer"}
    world.pass_time(10.0)
    world.wait_for(chain(4, 2), prefill_seconds=0.02)
    record = world.fetches.records[-1]
    assert (record.left_out, record.outcome) == ({0: "too slow to ask"}, "not worth it")
    assert (record.expected_seconds, record.recompute_seconds) == (10.0, 0.08)
    stalled, prompt = World((None, 0.0), (0.001, 1e9)), chain(6)
    stalled.has[0].update(keys(prompt)[2:])
    stalled.has[1].update(keys(prompt)[:2])
    stalled.wait_for(prompt, prefill_seconds=0.02, request="waits")
    record = stalled.fetches.records[-1]
    assert (record.outcome, record.planned, record.arrived_chunks) == ("late", {0: 4, 1: 2}, 2)
    gone, prompt = World((0.001, 1e9)), chain(6)
    gone.has[0].update(keys(prompt))
    gone.poll(prompt)
    gone.pass_time(0.0015)
    gone.has[0].remove(keys(prompt)[3])
    gone.wait_for(prompt)
    assert (gone.fetches.records[-1].outcome, gone.fetches.records[-1].arrived_chunks) == ("failed", 3)


def test_what_a_tier_lacked_is_asked_for_again_once_it_has_it() -> None:
    world, prompt = World((0.001, 1e9)), chain(4)
    world.l1.update(keys(prompt)[:1])
    assert world.wait_for(prompt) > 0 and world.fetches.records[-1].outcome == "absent"
    world.has[0].update(keys(prompt))
    assert world.poll(prompt) == 0, "the same request, a moment later"
    world.fetches.kept(SPACE, prompt[32:])
    world.fetches.kept(SPACE + 1, prompt)
    assert world.poll(prompt) == 0, "what is stored is not what it waits for first"
    world.fetches.kept(SPACE, prompt[16:])
    assert world.poll(prompt) == 3
    world.fetches.kept(SPACE, prompt[16:])
    assert world.poll(prompt) == 3, "the fetch that is under way goes on"
    world.wait_for(prompt)
    assert (world.fetches.records[-1].outcome, len(world.fetches.records)) == ("arrived", 2)


def test_requests_for_the_same_prompt_share_a_record_and_one_that_asks_no_more_is_told_of() -> None:
    world, prompt = World((None, 0.0)), chain(4)
    world.has[0].update(keys(prompt))
    for request in ("a", "b", "a"):
        world.poll(prompt, request=request)
        world.pass_time(0.5)
    world.pass_time(10.0)
    world.fetches.tick(world.now)
    (record,) = world.fetches.records
    assert (record.requests, record.outcome) == (("a", "b"), "patience")
    assert record.waited_seconds == 1.0, "until it was asked last"
    once = chain(4, 2)
    world.has[0].update(keys(once))
    world.poll(once, prefill_seconds=0.5)
    world.pass_time(11.0)
    world.fetches.tick(world.now)
    assert world.fetches.records[-1].waited_seconds == 0.0


def test_a_lookup_beyond_the_most_that_may_be_open_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.cache.fetch.MAX_FETCHES", 1)
    world = World((0.001, 1e9))
    world.poll(chain(4, 1), request="first")
    assert world.poll(chain(4, 2), request="second") == 0 and len(world.asks) == 1
    assert (world.fetches.records[-1].requests, world.fetches.records[-1].outcome) == (("second",), "too many")
    assert world.fetches.counters["too_many"] == 1


def test_only_so_many_records_are_kept() -> None:
    world = World((None, 1e9))
    for number in range(KEPT_RECORDS + 5):
        world.poll(chain(1, number), request=str(number))
    assert [world.fetches.records[at].requests for at in (0, -1)] == [("5",), (str(KEPT_RECORDS + 4),)]


def test_records_follow_only_so_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.cache.fetch.FOLLOWED_CHUNKS", 3)
    world, prompts = World((None, 1e9)), [chain(2, 1), chain(2, 2)]
    for prompt in prompts:
        world.has[0].update(keys(prompt))
        world.wait_for(prompt)
    for prompt in prompts:
        world.fetches.heard(Event("evicted", SPACE, 2, "room", hashes=prompt))
    assert [record.events for record in world.fetches.records] == [{"evicted:room": 1}, {"evicted:room": 2}]


@pytest.mark.parametrize("there", [True, False])
def test_an_answer_after_the_end_of_its_fetch_changes_nothing(there: bool) -> None:
    world, prompt = World((11.0, 1e9), always=True), chain(8)
    world.has[0].update(keys(prompt) if there else ())
    world.poll(prompt, request="gone")
    world.pass_time(10.5)
    world.fetches.tick(world.now)
    world.pass_time(0.6)
    assert [record.outcome for record in world.fetches.records] == ["patience"]
    assert world.fetches.counters["fetches"] == 1 and not world.loads


def test_loads_that_have_not_begun_are_not_begun_for_a_fetch_that_l1_has_answered() -> None:
    world, prompt = World((None, 1e6)), chain(12)
    world.has[0].update(keys(prompt))
    world.poll(prompt)
    assert len(world.loads) == 2, "as many as run side by side"
    world.l1.update(keys(prompt))  # the engine computed it meanwhile, and stored it
    assert world.poll(prompt) == 0
    world.pass_time(60.0)
    assert len(world.loads) == 2


def test_chunks_of_a_load_that_hangs_come_from_another_tier_and_nobody_waits_for_it_for_ever() -> None:
    world, prompt = World((None, 0.0), (None, 1e9), always=True), chain(2)
    for has in world.has:
        has.update(keys(prompt))
    world.wait_for(prompt)
    assert [load.tier for load in world.loads] == [0] and world.fetches.records[-1].outcome == "late"
    world.serving[0] = False  # as the server judges a tier with a call that does not return
    world.pass_time(2.0)
    world.fetches.tick(world.now)
    assert world.wait_for(prompt) < 0.1 and world.leading(prompt) == 2
    assert [load.tier for load in world.loads] == [0, 1]
    (hung, _) = world.loads
    world.l1.clear()
    world.tiers = ((None, 0.0), (None, 1e6))
    world.poll(prompt)
    world.has[0].clear()
    world.end(hung, 0)
    assert world.poll(prompt) == 2, "its late return takes nothing from the load that is under way now"


def test_what_a_detached_tier_was_asked_for_is_missing_and_it_is_never_asked_again() -> None:
    prompts = [chain(8, seed) for seed in (1, 2)]
    world = World((None, None), (1.0, 1e9), always=True, batch_chunks=2)
    for prompt in prompts:
        world.has[0].update(keys(prompt))
        world.has[1].update(keys(prompt))
    assert world.poll(prompts[0], request="asks") == 8, "the second tier has not answered"
    world.fetches.detach(world.now, 1)
    world.carry_out()
    assert len(world.fetches._running[0]) == 2 and world.fetches._queues[0], "the first tier loads what it can"
    world.fetches.detach(world.now, 0)
    loads = list(world.loads)
    assert not any(one for one in world.fetches._queues.values())
    for load in loads:
        world.end(load, 0)
    assert world.poll(prompts[0], request="asks") == 0
    record = world.fetches.records[-1]
    assert record.left_out == {0: "removed", 1: "removed"}
    assert not world.fetches._tiers and not world.fetches._running and not world.fetches.paces
    asks = len(world.asks)
    assert world.poll(prompts[1]) == 0 and (len(world.asks), len(world.loads)) == (asks, len(loads))
    assert world.fetches.attach(TierTraits(1 << 20, 2, lambda now: True, 512)) == 2, "no number is used again"


def test_chunks_of_a_load_that_is_late_come_from_another_tier() -> None:
    world, prompt = World((None, 0.0), (None, 1e9), always=True), chain(2)
    for has in world.has:
        has.update(keys(prompt))
    assert world.poll(prompt) == 2
    (hung,) = world.loads
    world.fetches.late(hung)
    assert world.poll(prompt) == 0 and world.fetches.records[-1].outcome == "failed"
    world.serving[0] = False
    assert world.wait_for(prompt) < 0.1 and world.leading(prompt) == 2
    world.end(hung, 0)
    assert not any(world.fetches._running.values())


def test_a_load_has_no_more_shards_than_its_tier_takes() -> None:
    """However small they are; a chunk is not divided."""
    for most, chunks in ((6, [2, 2, 1]), (2, [1] * 5)):
        fetches = Fetches([TierTraits(1 << 30, 9, lambda now: True, most)])
        fetches.poll(0.0, Wanted(SPACE, chain(5), 3 * 4096, 3), 0, [lambda hashes: [True] * 5])
        loads = [len(effect.hashes) // 16 for effect in fetches.effects if isinstance(effect, Load)]
        assert loads == chunks


@pytest.mark.parametrize("seed", range(40))
def test_a_fetch_has_one_record_and_leaves_nothing_behind_whatever_its_tiers_do(seed: int) -> None:
    """Answers and loads that come in any order, late, as failures or never; prompts that share their beginnings."""
    dice, fetches, now = (
        random.Random(seed),
        Fetches([TierTraits(2 * CHUNK_BYTES, 2, lambda now: True, 512)] * 2),
        100.0,
    )
    fetches.records = deque()
    stem = chain(4, 1)
    prompts = [stem[: 16 * dice.randint(0, 4)] + chain(dice.randint(1, 5), 2 + number) for number in range(6)]
    l1, asks, loads = set[bytes](), list[Ask](), list[Load]()
    begun, open_prompts, told = set[int](), set[bytes](), 0

    def carry_out(probes: int) -> None:
        nonlocal told
        effects, fetches.effects = fetches.effects, []
        for effect in effects:
            if isinstance(effect, Ask):
                begun.add(effect.fetch)
                asks.append(effect)
            elif isinstance(effect, Load):
                wanted = {key for prompt in open_prompts for key in keys(prompt)}
                assert wanted & set(keys(effect.hashes)) or fetches.counters["probes"] > probes, "nobody wants it"
                loads.append(effect)
        ended = [record.prompt for record in list(fetches.records)[told:]]
        told += len(ended)
        assert len(ended) == len(set(ended)), "a fetch has ended twice"
        open_prompts.difference_update(one for one in list(open_prompts) if one[-16:] in ended)
        for tier in range(2):
            assert len(fetches._queues[tier]) <= sum(len(one) // 16 for one in open_prompts), "nobody waits for it"
            assert fetches._queued_chunks[tier] == sum(
                len(one.load.hashes) // 16 for one in fetches._queues[tier].values()
            )

    def poll(prompt: bytes) -> None:
        in_l1 = next((at for at, key in enumerate(keys(prompt)) if key not in l1), len(prompt) // 16)
        prefill_seconds = dice.choice([0.0, 10.0])
        if in_l1 < len(prompt) // 16:
            open_prompts.add(prompt)
        asker = Asker(0, dice.choice(["", "a", "b"]))
        wanted = Wanted(SPACE, prompt, CHUNK_BYTES, 1, prefill_seconds, asker)
        fetches.poll(now, wanted, in_l1, [lambda hashes: None] * 2)

    def end(load: Load) -> None:
        good = [key for key in keys(load.hashes) if dice.random() < 0.9]
        l1.update(good)
        fetches.loaded(now, load, dice.choice([None, len(good) * CHUNK_BYTES]))

    for _ in range(600):
        now += dice.choice([0.0, 0.001, 0.1, 0.5, 3.0])
        probes, turn = fetches.counters["probes"], dice.random()
        if turn < 0.4:
            poll(dice.choice(prompts))
        elif turn < 0.6 and asks:
            ask = asks.pop(dice.randrange(len(asks)))
            has = [dice.random() < 0.8 for _ in keys(ask.hashes)]
            fetches.answered(now, ask.fetch, ask.tier, dice.choice([None, has, has]), dice.random())
        elif turn < 0.75 and loads:
            end(loads.pop(dice.randrange(len(loads))))
        elif turn < 0.85:
            fetches.tick(now)
        elif turn < 0.9:
            l1.difference_update(dice.sample(sorted(l1), len(l1) // 2))
        elif turn < 0.93:
            fetches.kept(SPACE, dice.choice(prompts))
        elif turn < 0.96:
            fetches.withdraw(now, 0, dice.choice("ab"))
        carry_out(probes)
        open_prompts.intersection_update(
            one for one in prompts if (found := fetches._by_request.get((SPACE, one[-16:]))) and found.is_open
        )
    for seconds in (11.0, 2.0):  # longer than any patience; the loads that are left never return
        now += seconds
        fetches.tick(now)
    assert not (fetches._fetches or fetches._by_request or fetches._under_way or any(fetches._queues.values()))
    assert not fetches._waited_for
    assert fetches.counters["fetches"] == len(fetches.records) == len(begun)
    assert fetches.counters["arrived"] == sum(record.arrived_chunks for record in fetches.records)
    ends = sum(count for name, count in fetches.counters.items() if name.startswith("fetches:"))
    assert ends + sum(record.outcome in ("arrived", "failed") for record in fetches.records) == len(begun)
    for load in loads:
        end(load)
    assert not any(fetches._running.values())


def test_the_end_of_a_request_looks_at_no_fetch_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message may name 65,536 requests, and there may be 4096 fetches."""
    monkeypatch.setattr("lmcache.cache.fetch.MAX_FETCHES", 5)
    looked: list[int] = []

    class Askers(set[tuple[int, str]]):
        def __contains__(self, one: object) -> bool:
            looked.append(1)
            return super().__contains__(one)

        def discard(self, one: tuple[int, str]) -> None:
            looked.append(1)
            super().discard(one)

    fetches = Fetches([TierTraits(1 << 20, 4, lambda now: True, 64)])
    for seed in range(9):  # the last ones are too many
        wanted = Wanted(SPACE, chain(3, seed), CHUNK_BYTES, asker=Asker(1, f"request {seed}"))
        fetches.poll(0.0, wanted, 0, [lambda hashes: None])
    for fetch in fetches._fetches.values():
        fetch.askers = Askers(fetch.askers)
    for seed in range(1, 100):
        fetches.withdraw(0.0, 1, f"request {seed}")
        fetches.withdraw(0.0, 2, "request 0")
    assert len(looked) == 4 and fetches.open == 1
    fetches.withdraw(0.0, 1, "request 0")
    assert not fetches.open and not fetches._waited_for


def test_pace_is_bytes_over_busy_time_and_old_measurements_fade() -> None:
    pace = Pace()
    assert pace.expected_seconds(100) is None
    pace.began(0.0)
    pace.began(0.0)
    pace.ended(1.0, 100)
    pace.ended(2.0, 100)
    assert pace.bytes_per_second == 100.0
    pace.began(50.0)
    pace.ended(51.0, 100)
    assert pace.bytes_per_second == pytest.approx(100.0), "idle time does not count"
    pace.answered(0.5)
    assert pace.expected_seconds(1000) == pytest.approx(10.5)
    for at in range(60, 100):
        pace.began(float(at))
        pace.ended(at + 1.0, 1000)
    assert pace.bytes_per_second > 950
    broken = Pace()
    broken.began(0.0)
    broken.ended(1.0, 0)
    assert broken.expected_seconds(1) == float("inf")


# Write-back


def test_what_is_to_be_written_again_is_never_lost() -> None:
    queue = WriteQueue(100, 100, 512, 1000)
    again, other = chain(5, 1), chain(9, 2)

    def fill() -> Batch:
        queue.add_again(1, again, chain(5, 3), 10, 1)
        batch = queue.take()
        assert batch is not None and batch.again and batch.hashes == again
        return batch

    assert queue.still_there(fill(), again[:16]).hashes == again[:16]
    queue.put_back(fill())
    assert len(queue) == 0
    queue.add_again(1, again, chain(5, 3), 10, 1)
    queue.clear()
    queue.add(2, other, chain(9, 4), 10)
    batch = queue.take()
    assert batch is not None and not batch.again
    queue.add_again(1, again, chain(5, 3), 10, 1)
    queue.put_back(batch)  # 140 bytes in a queue of 100
    assert not any(name.startswith("lost") for name in queue.counters) and queue.queued_bytes == 100
    queue.make_all_ready()
    assert (len(queue), queue.queued_bytes) == (9, 90)


def test_chunks_are_written_in_the_order_in_which_they_became_whole() -> None:
    queue = WriteQueue(100, 25, 512, 1000)
    first, second = chain(3, 1), chain(2, 2)
    queue.add(1, first, chain(3, 3), 10)
    queue.add(2, second, chain(2, 4), 10)
    assert len(queue) == 5 and queue.queued_bytes == 50
    batches = [queue.take() for _ in range(4)]
    assert [batch and (batch.space, batch.hashes) for batch in batches] == [
        (1, first[:32]), (1, first[32:]), (2, second), None
    ]  # fmt: skip
    assert batches[0] and batches[0].parents == chain(3, 3)[:32] and queue.queued_bytes == 0


def test_a_batch_has_no_more_shards_than_its_tier_takes() -> None:
    """However small they are, also when it is tried again; a chunk is not divided."""
    for most, chunks in ((6, 2), (2, 1)):
        queue, prompt = WriteQueue(1000, 1000, most, 1000), chain(5)
        queue.add(1, prompt, prompt, 10, 3)
        for _ in range(2):
            batch = queue.take()
            assert batch and batch.hashes == prompt[: 16 * chunks] and batch.size_bytes == 10 * chunks
            queue.put_back(batch)


def test_a_full_queue_keeps_the_beginnings_of_prompts() -> None:
    queue = WriteQueue(30, 100, 512, 1000)
    prompt = chain(5)
    queue.add(1, prompt, prompt, 10)
    assert queue.counters["lost:queue full"] == 2 and len(queue) == 3 and queue.counters["lost_bytes:queue full"] == 20
    batch = queue.take()
    assert batch and batch.hashes == prompt[:48]
    queue.add(1, chain(2, 2), chain(2, 2), 10)
    queue.put_back(batch)
    assert len(queue) == 3 and queue.counters["lost:queue full"] == 4, "what waits longest stays"
    assert queue.counters["lost_bytes:queue full"] == 40
    again = queue.take()
    assert again and again.hashes == prompt[:48]


def test_what_was_evicted_is_no_part_of_a_batch_any_more() -> None:
    queue = WriteQueue(100, 100, 512, 1000)
    prompt = chain(4)
    queue.add(1, prompt, bytes(16) + prompt[:-16], 10)
    batch = queue.take()
    assert batch and queue.still_there(batch, prompt) == batch and not queue.counters["lost:evicted"]
    kept = queue.still_there(batch, prompt[:16] + prompt[48:])
    assert kept == Batch(1, prompt[:16] + prompt[48:], bytes(16) + prompt[32:48], 20)
    assert queue.counters["lost:evicted"] == 2 and queue.counters["lost_bytes:evicted"] == 20
    queue.put_back(kept)
    assert queue.take() == kept and queue.queued_bytes == 0


def test_on_evict_writes_ahead_of_eviction_and_everything_at_the_end() -> None:
    queue = WriteQueue(1000, 10, 512, 100, on_evict=True)
    prompt = chain(9)
    queue.add(1, prompt, prompt, 10)
    queue.make_ready(60)
    assert len(queue) == 0 and queue.kept_back == 9
    queue.make_ready(90)
    assert len(queue) == 1 and (queue.take() or pytest.fail()).hashes == prompt[:16]
    queue.add(1, chain(4, 2), chain(4, 2), 10)
    assert queue.kept_back == 10 and queue.counters["lost:evicted"] == 2, "L1 does not hold more"
    assert queue.counters["lost_bytes:evicted"] == 20
    queue.make_all_ready()
    assert len(queue) == 10 and queue.kept_back == 0
    queue.clear()
    assert queue.take() is None and queue.queued_bytes == 0


# The breaker


def test_a_breaker_opens_tries_and_closes() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not breaker.failed(0.0, "timeout") and breaker.closed
    breaker.succeeded()
    opened = [breaker.failed(0.0, "timeout") for _ in range(FAILURES_TO_OPEN)]
    assert opened == [False] * (FAILURES_TO_OPEN - 1) + [True] and not breaker.closed
    assert not breaker.probe(FIRST_PAUSE_SECONDS - 0.01)
    pauses, now = [], 0.0
    for _ in range(8):
        now = breaker.retry_at
        assert breaker.probe(now) and not breaker.probe(now), "one probe at a time"
        assert breaker.failed(now, "still")
        pauses.append(breaker.retry_at - now)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0] and pauses[-1] == LONGEST_PAUSE_SECONDS
    assert breaker.probe(breaker.retry_at)
    breaker.succeeded()
    assert breaker.closed and breaker.reason == ""
    assert breaker.failed(0.0, "denied", at_once=True) and breaker.retry_at == FIRST_PAUSE_SECONDS
    assert not breaker.failed(0.5, "late") and breaker.retry_at == FIRST_PAUSE_SECONDS, "it had begun before"
