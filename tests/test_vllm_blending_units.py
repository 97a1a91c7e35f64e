"""The scheduler's half of blending under vLLM: what is refused, which blocks are hidden, what is planned and given back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.chunks.passages import Passage
from lmcache.engine import Loading, Request
from lmcache.engine.blending import Blend, Blending, consecutive
from lmcache.engine.requests import MISS_SECONDS
from lmcache.errors import LayoutError
from lmcache.integration.vllm.blending import Blends, given_blending, hide, refuse_blending
from lmcache.integration.vllm.plan import PassageStore, StepReport
from test_layers import Copies
from test_vllm_units import Request as Asked
from test_vllm_units import Session, half, rank, step

BLOCK = 128


def served(**changes: Any) -> tuple[Any, Any]:
    """An engine whose prompts can be blended, but for these attributes, `where__name`."""
    parts: dict[str, dict[str, Any]] = {
        "config": {
            "use_v2_model_runner": False,
            "speculative_config": None,
            "lora_config": None,
            "kv_events_config": None,
        },
        "model": {
            "enforce_eager": True,
            "is_multimodal_model": False,
            "runner_type": "generate",
            "dtype": "torch.bfloat16",
        },
        "parallel": {"data_parallel_size": 1},
        "transfer": {"kv_role": "kv_both", "is_kv_consumer": True, "is_kv_producer": True},
        "device": {"device_type": "cpu"},
        "kv": {"ranks": 1, "others": (), "reach_tokens": 0, "local_tokens": 0},
        "layout": {"kind": "mha", "kv_dtype": "bfloat16"},
    }
    for name, value in changes.items():
        where, _, attribute = name.partition("__")
        parts[where][attribute] = value
    made = {name: SimpleNamespace(**values) for name, values in parts.items()}
    config = made["config"]
    config.model_config, config.parallel_config = made["model"], made["parallel"]
    config.kv_transfer_config, config.device_config = made["transfer"], made["device"]
    made["kv"].model = made["layout"]
    return config, made["kv"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device__device_type": "cuda"}, "on cuda"),
        ({"config__use_v2_model_runner": True}, "Model Runner V2"),
        ({"model__enforce_eager": False}, "--enforce-eager"),
        ({"kv__ranks": 2}, "several ranks"),
        ({"parallel__data_parallel_size": 2}, "several ranks"),
        ({"kv__others": (1,)}, "several kinds of KV"),
        ({"kv__reach_tokens": 128}, "several kinds of KV"),
        ({"layout__kind": "mla"}, "kind mla"),
        ({"config__speculative_config": SimpleNamespace()}, "speculative decoding"),
        ({"config__lora_config": SimpleNamespace()}, "LoRA"),
        ({"config__kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "KV events"),
        ({"model__is_multimodal_model": True}, "images"),
        ({"model__runner_type": "pooling"}, "pooling"),
        ({"layout__kv_dtype": "fp8_e4m3"}, "fp8_e4m3"),
        ({"model__dtype": "torch.float32"}, "bfloat16"),
        ({"transfer__is_kv_producer": False, "transfer__kv_role": "kv_consumer"}, "kv_consumer"),
    ],
)
def test_what_is_refused_is_named(change: dict[str, Any], words: str) -> None:
    refuse_blending(*served())
    with pytest.raises(LayoutError, match=words):
        refuse_blending(*served(**change))


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**extra: Any) -> Any:
        named = {f"lmcache.{name}": value for name, value in extra.items()}
        return SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=named))

    assert given_blending(config()) is None and given_blending(config(blend_min_tokens=64)) is None
    assert given_blending(config(enable_blending=True, blend_min_tokens=64)) == Blending(min_tokens=64)
    asked = given_blending(config(enable_blending=True, blend_check_layers=[2], blend_recompute_ratios=[0.2]))
    assert asked == Blending(choose="deviation", check_layer=2, recompute_ratio=0.2)
    monkeypatch.setenv("LMCACHE_ENABLE_BLENDING", "true")
    assert given_blending(config()) == Blending()


class Hashed:
    """A request of vLLM's whose hash of a block is the joined names of the blocks up to it."""

    def __init__(self, tokens: int, caches: bool = True) -> None:
        self.num_tokens, self.block_hashes = tokens, []
        self.caches = caches
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        while self.caches and (len(self.block_hashes) + 1) * BLOCK <= self.num_tokens:
            before = self.block_hashes[-1] if self.block_hashes else b"root"
            self.block_hashes.append(before + b"%d" % len(self.block_hashes))


def test_blocks_that_are_not_exact_are_found_by_nobody() -> None:
    plain, one, other = Hashed(700), Hashed(700), Hashed(700)
    hide(one, 300, BLOCK)
    hide(other, 300, BLOCK)
    assert len(one.block_hashes) == len(plain.block_hashes) == 5
    assert one.block_hashes[:2] == plain.block_hashes[:2]
    hidden = one.block_hashes[2:] + other.block_hashes[2:]
    assert len({*hidden, *plain.block_hashes}) == 11, "and not by each other"
    one.num_tokens += BLOCK
    one.update_block_hashes()
    assert one.block_hashes[-1].startswith(one.block_hashes[2]), "nor are those of the answer"
    short, off = Hashed(100), Hashed(700, caches=False)
    hide(short, 0, BLOCK)
    hide(off, 0, BLOCK)
    assert short.block_hashes == off.block_hashes == []


class Server:
    """`Requests` whose server has so many tokens of each passage, in chunks of 16, by the passage's first token."""

    def __init__(self, **has: int) -> None:
        self.has = {int(name[1:]): tokens for name, tokens in has.items()}
        self.open: dict[str, Any] = {}
        self.given_back: list[Any] = []
        self.told: list[Any] = []
        self.session = SimpleNamespace(blended=lambda *told: self.told.append(told))
        self.coming: set[int] = set()
        self.now = 0.0
        self.runtime = SimpleNamespace(now=lambda: self.now)

    def find(self, request: Any, tokens: list[int]) -> Any:
        assert request.passage and request.stores_tail and request.salt == "salt"
        first = tokens[0]
        if first in self.coming:
            return Loading(0, 1)
        request.hit = object() if self.has.get(first) else None
        request.first, request.has = first, self.has.get(first, 0)
        return request.hit

    def give_back(self, request: Any) -> None:
        self.given_back.append(request)
        request.hit = None

    def load(self, request: Any, start: int, end: int, total: int = 0) -> Any:
        assert request.hit is not None
        request.hit = None
        return SimpleNamespace(start=start, end=end, request_id=request.id, blocks=[7])

    def store(self, request: Any, tokens: list[int], computed: int, *, ends: bool) -> Any:
        assert ends and computed == len(tokens) and len(request.blocks) * BLOCK >= computed
        return SimpleNamespace(first=tokens[0], blocks=request.blocks)


class One(Request):
    """A request of the scheduler's. first: the first token of the passage. has: so many tokens of it are at the server."""

    first = has = 0

    @property
    def found_tokens(self) -> int:
        return self.has if self.hit is not None else 0


PROMPT = [1, *([0, *range(1000, 1040)]), *([0, *range(2000, 2050)]), *([0, *range(3000, 3010)]), 0, 5, 6]
"""Passages at 2 (40 tokens), 43 (50) and 94 (10, too short), and a question at 105."""


def blends(server: Server) -> tuple[Blends, Any]:
    made = Blends(server, Blending(separator=(0,), min_tokens=20), BLOCK, One)  # type: ignore[arg-type]
    request = SimpleNamespace(num_tokens=len(PROMPT), num_prompt_tokens=len(PROMPT), kv_transfer_params=None)
    tracker = SimpleNamespace(id="r", salt="salt", adapter=("", ""), hit=None, blocks=[4, 5], request=request)
    server.open["r"] = tracker
    return made, tracker


def test_what_is_found_is_planned() -> None:
    server = Server(p1000=48, p2000=32)
    made, tracker = blends(server)
    blend = made.find(tracker, PROMPT, 16)
    assert isinstance(blend, Blend)
    assert (blend.have, blend.end, blend.blended) == (16, 105, (Passage(16, 42), Passage(43, 75)))
    made.plan(tracker, PROMPT, blend, 0)
    (plan,) = made.take_plans()
    assert not made.take_plans() and made.running == {"r": plan}
    assert plan.filled(BLOCK) == [4] and plan.filled(64) == [4, 5]
    told = [(passage, load.start, load.end, load.request_id, load.blocks) for passage, load in plan.passages]
    assert told == [(Passage(2, 42), 14, 40, "r", []), (Passage(43, 93), 0, 32, "r", [])]
    made.transferred({"r"}, StepReport(blended={"r": (2, 58, 9)}))
    assert server.told == [("r", 2, 58, 9)] and not made.running
    made.transferred((), StepReport(no_blending="memory"))
    assert made.find(tracker, PROMPT, 16) is None


def test_who_is_blended() -> None:
    """Who does not ask for the contrary, and has computed nothing yet. Passages of the others can be stored."""
    for params, computed, blended in (
        (None, 0, True),
        ({"lmcache.blend": True, "x": 1}, 0, True),
        ({"lmcache.blend": False}, 0, False),
        ({"lmcache.blend": "false"}, 0, False),
        ({"lmcache.blend": None}, 0, False),
        (None, 1, False),
    ):
        made, tracker = blends(Server(p1000=48))
        tracker.request.kv_transfer_params, tracker.request.num_tokens = params, len(PROMPT) + computed
        assert (made.find(tracker, PROMPT, 0) is not None) == blended
        assert [one.passage for one in made.stores(tracker, 93)] == [Passage(2, 42), Passage(43, 93)]


def test_too_little_is_given_back() -> None:
    server = Server(p1000=16)
    made, tracker = blends(server)
    assert made.find(tracker, PROMPT, 0) is None and all(one.hit is None for one in server.given_back)
    server.has, server.coming, server.now = {1000: 48}, {2000}, 1.0
    assert isinstance(made.find(tracker, PROMPT, 0), Loading)
    server.coming, server.given_back = set(), []
    assert made.find(tracker, PROMPT, 0) is not None
    made.ended("r")
    assert {one.first for one in server.given_back} == {1000, 2000}


def test_passages_are_stored_as_far_as_the_prompt_is_exact() -> None:
    server = Server()
    made, tracker = blends(server)
    assert made.find(tracker, PROMPT, 0) is None and made.stores(tracker, 41) == []
    (store,) = made.stores(tracker, 92)
    assert (store.passage, store.plan.first, store.plan.blocks, store.blocks) == (Passage(2, 42), 1000, [], [4])
    assert [one.passage for one in made.stores(tracker, 93)] == [Passage(2, 42), Passage(43, 93)]
    made.ended("r")
    assert made.stores(tracker, 93) == []


def test_consecutive_tokens() -> None:
    numbers = Blending(links=2)
    blend = Blend(0, 30, (Passage(3, 10), Passage(20, 25)), numbers)
    assert consecutive(blend.first()) == [Passage(0, 5), Passage(10, 22), Passage(25, 30)]
    assert consecutive(blend.first()[:0]) == []


# Both halves, with sessions that say what the server has

SEPARATOR = 9999
BLENDING = Blending(separator=(SEPARATOR,), min_tokens=32)


def texts(*first: int, tokens: int = 40, beginning: int = 64) -> list[int]:
    """A beginning, texts of `tokens` tokens that begin with these, and a question."""
    parts = [token for one in first for token in (SEPARATOR, *range(one, one + tokens))]
    return [*range(beginning), *parts, SEPARATOR, 5, 6]


def test_passages_behind_a_load_that_has_failed_are_not_stored() -> None:
    """They were computed from KV that had not arrived. Their names do not say what stood before them."""
    for ok in (True, False):
        copies, kept = Copies(ok), list[PassageStore]()
        passages = SimpleNamespace(begin=lambda *_: None, store=lambda stores, _, kept=kept: kept.extend(stores))
        passages.owns, passages.report = lambda _: False, StepReport()
        worker = rank(copies, passages=passages)
        session = Session(present=4)
        scheduler = half(session, synchronous="always", blending=BLENDING)
        scheduler.transferred(report=StepReport(mapped={0: (0, session.epoch)}))
        request = Asked("a", texts(1000), kv_transfer_params={"lmcache.blend": False})
        assert scheduler.match(request, 0) == 64
        scheduler.allocated(request, ([],), 64)
        request.num_computed_tokens = 64
        plan = scheduler.plan_step(step({"a": 44}, new={"a": [7]}))
        assert [one.passage for one in plan.passages] == [Passage(65, 105)]
        worker.start_loads(plan)
        worker.wait_before_forward(object())
        worker.start_stores(plan)
        assert [one.passage for one in kept] == ([Passage(65, 105)] if ok else [])
        if not ok:
            assert (2 + 1, "computed from a failed load") in copies.dropped
            assert worker.take_report().stored[plan.passages[0].plan.job_id] == 1


class Waits(Session):
    """A session whose server has so many chunks of each passage, or brings them, and nothing of prompts. asked: how many lookups
    of passages there were."""

    asked = 0

    def poll(self, *args: Any, passage: bool = False, **more: Any) -> Any:
        self.asked += passage
        had, self.present = self.present, self.present if passage else 0
        coming, self.coming = self.coming, self.coming if passage else 0
        found = super().poll(*args, passage=passage, **more)
        self.present, self.coming = had, coming
        return found


@pytest.mark.parametrize("present", [0, 1])
def test_a_request_that_waits_for_blocks_does_not_look_up_at_every_step(present: int) -> None:
    """vLLM asks at every step. What was not found, or was too little, is not asked for again for a while."""
    session = Waits(present)
    scheduler = half(session, blending=replace(BLENDING, min_tokens=200))
    request = Asked("a", texts(1000, 2000, 3000, tokens=210))
    for _ in range(20):
        assert scheduler.match(request, 0) == 0
        session.now += 0.001
    assert session.asked == 3 and not session.leased
    session.now += MISS_SECONDS
    assert scheduler.match(request, 0) == 0 and session.asked == 6


def test_tiers_load_all_passages_at_the_same_time() -> None:
    session = Waits(4)
    session.coming = 1
    scheduler, request = half(session, blending=BLENDING), Asked("a", texts(1000, 2000, 3000))
    assert scheduler.match(request, 0) is None and session.asked == 3
    session.coming, session.now = 0, 101.0
    assert scheduler.match(request, 0) == len(request.all_token_ids) - 2 and len(session.leased) == 3


def test_what_is_not_used_is_given_back() -> None:
    """As soon as the request goes on, and not when it ends, which may be much later."""
    session = Waits(4)
    scheduler, request = half(session, blending=BLENDING), Asked("a", texts(1000, 2000))
    assert scheduler.match(request, 0) == len(request.all_token_ids) - 2 and len(session.leased) == 2
    scheduler.transferred(report=StepReport(no_blending="memory"))  # while the request waited for blocks
    assert scheduler.match(request, 0) == 0
    scheduler.allocated(request, ([1],), 0)
    assert not session.leased


def test_what_differs_is_told_of_prompts_and_not_of_their_passages() -> None:
    session, told = Waits(), list[str]()
    session.differs = lambda token, request_id: told.append(request_id)  # type: ignore[method-assign]
    scheduler = half(session, blending=BLENDING)
    for number in range(1, 4):
        prompt = [number] * 20 + texts(number * 1000)
        assert scheduler.match(Asked(f"prompt {number}", prompt), 0) == 0
    assert told == ["prompt 2", "prompt 3"]


def test_nothing_is_blended_once_the_engine_is_not_served() -> None:
    """The leases have ended then, so the server may fill the extents with something else."""
    session = Waits(4)
    scheduler, request = half(session, blending=BLENDING), Asked("a", texts(1000, 2000))
    assert scheduler.match(request, 0) == len(request.all_token_ids) - 2 and len(session.leased) == 2
    scheduler.transferred(report=StepReport(refusal="these weights are unknown"))  # while the request waited for blocks
    assert session.closed and scheduler.match(request, 0) == 0 and not session.leased
