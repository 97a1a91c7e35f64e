"""The parts of vLLM's connector that need no vLLM: planning, shapes, identity, settings."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from lmcache.chunks import Shard, TokenChain, chunk_root
from lmcache.chunks.hashing import Extras
from lmcache.engine import Done, Hit, Load, Loading, Store, identity
from lmcache.engine.identity import path_identity
from lmcache.engine.requests import HIT_SECONDS, GroupTable
from lmcache.engine.served import NOT_SERVED, refusal_of, stores_its_shard
from lmcache.errors import ConfigError, LayoutError
from lmcache.integration.vllm import settings as settings_of_vllm
from lmcache.integration.vllm import vllm_multi_process_adapter as adapter
from lmcache.integration.vllm import weights as weights_of_vllm
from lmcache.integration.vllm.identity import config_digest, model_identity
from lmcache.integration.vllm.model import describe_model, needs_ranks, zeroes_first
from lmcache.integration.vllm.paged import Registered, Shape, describe_tensors, own_scales, refuse_other_numbers
from lmcache.integration.vllm.plan import StepPlan, StepReport
from lmcache.integration.vllm.resets import empty as empty_vllms_cache
from lmcache.integration.vllm.resets import watch_resets
from lmcache.integration.vllm.rules import names_items
from lmcache.integration.vllm.scheduler import SchedulerSide, _trace_of
from lmcache.integration.vllm.settings import parse_host, read_settings, recompute_failed_loads
from lmcache.integration.vllm.worker import WorkerSide
from lmcache.transfer.fitted import fit_strides
from servers import eventually

CHUNK, BLOCK = 16, 128


class Session:
    """A scheduler's session whose server has the first `present` chunks of every prompt."""

    def __init__(self, present: int = 0) -> None:
        self.present, self.epoch = present, b"server 1"
        self.now = 100.0
        self.runtime = SimpleNamespace(now=lambda: self.now, sleep=lambda seconds: None)
        self.chunk_tokens: int | None = CHUNK
        self.forgone_tokens = 0
        self.claim_seconds = 30.0
        self.coming = 0
        """Chunks that a tier is bringing."""
        self.lookups: list[int] = []
        self.rates: list[float] = []
        self.salts: list[str] = []
        self.requests: list[str] = []
        self.engines: list[str] = []
        """Under which each lookup has announced what it does not find."""
        self.tails: list[tuple[bool, bool]] = []
        """Whether each lookup has named a tail, and whether the request stores it."""
        self.traces: list[str] = []
        self.withdrawn: list[str] = []
        self.leased: set[int] = set()
        self.closed = False

    def new_chain(
        self,
        cache_salt: str = "",
        lora_name: str = "",
        lora_id: str = "",
        extras: Extras | None = None,
        passage: str = "",
        tenant: bytes = b"",
    ) -> TokenChain | None:
        self.salts.append(cache_salt)
        if self.chunk_tokens is None:
            return None
        return TokenChain(chunk_root(b"f" * 16, cache_salt, lora_name, lora_id, passage), self.chunk_tokens, extras)

    def poll(
        self,
        chain: TokenChain,
        skip_tokens: int = 0,
        prefill_rate: float = 0.0,
        tail: bytes = b"",
        request_id: str = "",
        chunks: int | None = None,
        any_split: bool = False,
        engine: str = "",
        again: bool = False,
        stores_tail: bool = True,
        tokens: int = 0,
        loads: bool = True,
        trace: str = "",
        passage: bool = False,
    ) -> Hit | Loading | None:
        self.traces.append(trace)
        self.tails.append((bool(tail), bool(tail) and stores_tail))
        self.engines.append(engine)
        self.requests.append(request_id)
        self.lookups.append(len(chain))
        self.rates.append(prefill_rate)
        if self.coming:
            return Loading(self.present, self.coming)
        first, chunks = skip_tokens // chain.chunk_tokens, min(self.present, len(chain) + bool(tail))
        if chunks <= first or not loads:
            return None
        self.leased.add(len(self.lookups))
        slots = struct.pack(f"<{chunks - first}I", *range(first, chunks))
        return Hit(chunks, first, len(self.lookups), slots, 1, self.epoch)

    def differs(self, token: int, request_id: str) -> None:
        """What the server's records are told of prompts that part."""

    def too_short(self, tokens: int, request_id: str) -> None:
        """What the server's accounts are told of prompts that it is not asked about."""

    def release(self, hit: Hit) -> None:
        self.leased.remove(hit.lease)

    @property
    def identified(self) -> bool:
        return self.chunk_tokens is not None

    def forgone(self, tokens: int) -> None:
        self.forgone_tokens += tokens

    def withdraw(self, request_id: str) -> None:
        self.withdrawn.append(request_id)

    def close(self) -> None:
        self.closed = True


@dataclass
class Request:
    """What we read of vLLM's request."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    priority: int = 0
    num_prompt_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: Any = None
    output_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def step(
    scheduled: dict[str, int] | None = None,
    blocks: dict[str, list[int]] | None = None,
    resumed: Sequence[str] = (),
    drafts: dict[str, list[int]] | None = None,
    new: dict[str, list[int]] | None = None,
) -> Any:
    """A SchedulerOutput. new, blocks: block tables of new requests, and what known ones have got in addition."""
    blocks = blocks or {}
    cached = SimpleNamespace(
        req_ids=list(blocks), new_block_ids=[(ids,) for ids in blocks.values()], resumed_req_ids=set(resumed)
    )
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=(ids,)) for name, ids in (new or {}).items()],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=scheduled or {},
        total_num_scheduled_tokens=sum((scheduled or {}).values()),
        scheduled_spec_decode_tokens=drafts or {},
    )


def half(session: Session, **options: Any) -> SchedulerSide:
    return SchedulerSide(session, [GroupTable(BLOCK)], options.pop("ranks", 1), **options)  # type: ignore[arg-type]


def test_a_hit_is_loaded_and_its_lease_released_when_all_ranks_are_done() -> None:
    session = Session(present=40)
    scheduler, request = half(session), Request("a", list(range(700)))
    assert scheduler.match(request, 0) == 640
    scheduler.allocated(request, (list(range(10, 16)),), 640)
    plan = pickle.loads(pickle.dumps(scheduler.plan_step(step())))
    (load,) = plan.loads
    assert (load.start_token, load.end_token, load.blocks, load.hit.first_chunk) == (0, 640, list(range(10, 16)), 0)
    assert not plan.forward and session.leased
    scheduler.transferred(["a"])
    assert not session.leased
    request.num_computed_tokens = 640
    plan = scheduler.plan_step(step({"a": 60}))
    (store,) = plan.stores
    assert (store.first_chunk, len(store.hashes)) == (40, 3 * 16), "what was a hit is not stored again"
    assert store.blocks == list(range(10, 16))


def test_only_what_lies_beyond_the_local_hit_is_leased_and_loaded() -> None:
    session = Session(present=40)
    scheduler, request = half(session), Request("a", list(range(700)))
    assert scheduler.match(request, 256) == 384
    scheduler.allocated(request, (list(range(6)),), 384)
    (load,) = scheduler.plan_step(step()).loads
    assert (load.hit.first_chunk, load.start_token, load.end_token) == (16, 256, 640)


def test_a_gain_that_is_computed_sooner_than_loaded_is_left_alone() -> None:
    session = Session(present=5)
    session.chunk_tokens = 3
    scheduler = half(session)
    assert scheduler.match(Request("a", list(range(20))), 0) == 15, "any hit counts when there is nothing else"
    assert scheduler.match(Request("b", list(range(20))), 12) == 0


def test_a_waiting_request_is_looked_up_once_until_its_hit_is_old() -> None:
    session = Session(present=4)
    scheduler, request = half(session), Request("a", list(range(100)))
    assert [scheduler.match(request, 0) for _ in range(5)] == [64] * 5
    assert len(session.lookups) == 1
    session.now += HIT_SECONDS
    assert scheduler.match(request, 0) == 64
    assert len(session.lookups) == 2 and session.leased == {2}
    session.epoch = b"server 2"
    assert scheduler.match(request, 0) == 64
    assert len(session.lookups) == 3
    scheduler.finished(request)
    assert not session.leased - {2}, "the old server's lease died with it; none of the new one's is left"


def test_a_request_waits_for_a_tier_and_then_gets_what_came() -> None:
    session = Session(present=2)
    scheduler, request = half(session), Request("a", list(range(100)))
    session.coming = 3
    assert scheduler.match(request, 0) is None
    assert scheduler.match(request, 0) is None and len(session.lookups) == 2, "asked at every step, until it is there"
    scheduler.plan_step(step())
    session.coming, session.present = 0, 5
    assert scheduler.match(request, 0) == 80
    assert scheduler.finished(request) is False and not session.leased


def test_the_prefill_rate_that_was_seen_is_told_and_whose_lookup_it_is() -> None:
    session = Session()
    scheduler = half(session)
    scheduler.match(Request("a", list(range(100))), 0)
    for seconds, scheduled in ((0.0, 1000), (0.5, 8), (9.0, 400), (0.8, 1)):
        session.now += seconds
        scheduler.plan_step(step({"other": scheduled}))
    scheduler.match(Request("b", list(range(100))), 0)
    assert session.rates == [0.0, pytest.approx(2000 - 0.05 * (2000 - 500))], "decodes and pauses count little"
    assert session.requests == ["a", "b"]


def test_the_trace_that_a_request_has_come_with_is_told() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert _trace_of(SimpleNamespace(trace_headers={"traceparent": parent, "tracestate": "x"})) == parent
    assert _trace_of(SimpleNamespace(trace_headers=None)) == _trace_of(SimpleNamespace()) == ""
    session = Session()
    scheduler = half(session)
    for headers in (None, {"traceparent": parent}):
        request = Request(f"with {headers}", list(range(100)))
        request.trace_headers = headers  # type: ignore[attr-defined]
        scheduler.match(request, 0)
    assert session.traces == ["", parent]


def test_a_lease_that_starts_behind_a_shrunken_local_hit_is_not_used() -> None:
    session = Session(present=40)
    scheduler, request = half(session), Request("a", list(range(700)))
    assert scheduler.match(request, 256) == 384
    assert scheduler.match(request, 128) == 512
    scheduler.allocated(request, (list(range(6)),), 512)
    (load,) = scheduler.plan_step(step()).loads
    assert load.hit.first_chunk * CHUNK <= load.start_token == 128


def test_a_request_that_gets_no_external_tokens_gives_its_lease_back() -> None:
    session = Session(present=4)
    scheduler, request = half(session), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    assert not session.leased and not scheduler.plan_step(step()).loads


def test_chunks_are_stored_as_they_fill_and_drafts_do_not_count() -> None:
    session = Session()
    scheduler, request = half(session), Request("a", list(range(200)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1, 2],), 0)
    (store,) = scheduler.plan_step(step({"a": 100})).stores
    assert (store.first_chunk, len(store.hashes) // 16, store.blocks) == (0, 6, [1])
    request.num_computed_tokens = 100
    (store,) = scheduler.plan_step(step({"a": 100})).stores
    assert (store.first_chunk, len(store.hashes) // 16, store.blocks) == (6, 6, [1, 2])
    request.num_computed_tokens = 200
    request.all_token_ids += range(7)
    assert not scheduler.plan_step(step({"a": 8}, drafts={"a": [1] * 7})).stores, "207 known, but drafts are not"
    request.num_computed_tokens = 207
    request.all_token_ids += [5]
    (store,) = scheduler.plan_step(step({"a": 1}, blocks={"a": [3]})).stores
    assert (store.first_chunk, len(store.hashes) // 16) == (12, 1)


def test_tokens_that_are_not_known_yet_are_not_stored() -> None:
    """With asynchronous scheduling a step is planned before the last one's token is known."""
    scheduler, request = half(Session()), Request("a", list(range(31)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    assert len(scheduler.plan_step(step({"a": 31})).stores[0].hashes) == 16
    request.num_computed_tokens = 31
    assert not scheduler.plan_step(step({"a": 1})).stores


def test_a_finished_request_keeps_its_blocks_while_a_rank_still_stores() -> None:
    scheduler, request = half(Session(), ranks=2), Request("a", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    (store,) = scheduler.plan_step(step({"a": 64})).stores
    scheduler.transferred(report=StepReport(stored={store.job_id: 1}))
    assert scheduler.finished(request), "one of two ranks is done"
    assert scheduler.plan_step(step()).closing == ["a"]
    other = Request("b", list(range(64)))
    scheduler.match(other, 0)
    scheduler.allocated(other, ([1],), 0)
    (store,) = scheduler.plan_step(step({"b": 64})).stores
    scheduler.transferred(report=StepReport(stored={store.job_id: 2}))
    assert not scheduler.finished(other)


def test_a_request_that_ends_while_it_loads_is_reported_by_its_load_alone() -> None:
    session = Session(present=4)
    scheduler, request = half(session), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 64)
    scheduler.plan_step(step())
    assert not scheduler.finished(request)
    assert session.leased, "ranks may still read"
    scheduler.transferred(["a"])
    assert not session.leased


def test_stores_of_a_preempted_request_are_settled_first() -> None:
    session = Session()
    scheduler, request = half(session), Request("a", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    (store,) = scheduler.plan_step(step({"a": 64})).stores
    request.num_preemptions, request.num_computed_tokens = 1, 0
    assert scheduler.plan_step(step()).settle == [store.job_id]
    session.present = 4
    assert scheduler.match(request, 0) == 64, "and it comes back with what was stored"


@pytest.mark.parametrize(
    ("reach", "zeroes", "held"),
    [(0, False, ()), (0, True, (1, 2, 3, 4, 11, 12, 13, 14)), (8, False, (1, 2, 3, 4, 12, 14))],
)
def test_vllm_reuses_no_block_that_a_store_reads_and_that_it_may_overwrite_first(
    reach: int, zeroes: bool, held: Sequence[int]
) -> None:
    """Blocks that leave a window are free at once. Those of a preempted request are zeroed before ranks settle its stores."""
    taken: Counter[int] = Counter()
    pool = SimpleNamespace(blocks=range(100), touch=taken.update, free_blocks=taken.subtract)
    groups = [GroupTable(8), GroupTable(8, reach)]
    scheduler = SchedulerSide(Session(), groups, 1, numbers=(0, 1), zeroes=zeroes)  # type: ignore[arg-type]
    scheduler.bind_pool(pool)
    request = Request("a", list(range(32)))
    scheduler.allocated(request, ([1, 2, 3, 4], [11, 12, 13, 14]), 0)
    (store,) = scheduler.plan_step(step({"a": 32})).stores
    request.num_preemptions += 1
    assert +taken == Counter(held)
    assert scheduler.plan_step(step()).settle == [store.job_id] and +taken == Counter(held), "until the ranks report"
    scheduler.transferred(report=StepReport(stored={store.job_id: 1}))
    assert not +taken


def test_stores_of_a_request_preempted_outside_a_step_and_then_aborted_are_settled() -> None:
    scheduler, request = half(Session()), Request("a", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    (store,) = scheduler.plan_step(step({"a": 64})).stores
    request.num_preemptions = 1
    assert not scheduler.finished(request)
    assert store.job_id in scheduler.plan_step(step()).settle


class Pool:
    """vLLM's block pool: which blocks are held."""

    def __init__(self) -> None:
        self.blocks = list(range(16))
        self.held: list[int] = []

    def touch(self, blocks: list[int]) -> None:
        self.held += blocks

    def free_blocks(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.held.remove(block)


def test_which_engines_write_zeros_before_ranks_settle() -> None:
    newer, older, unknown = (
        SimpleNamespace(**one) for one in ({"use_v2_model_runner": True}, {"use_v2_model_runner": False}, {})
    )
    for vllm_config, zeroes in ((newer, True), (older, False), (unknown, True)):
        assert zeroes_first(vllm_config, SimpleNamespace(needs_kv_cache_zeroing=True)) == zeroes
        assert not zeroes_first(vllm_config, SimpleNamespace(needs_kv_cache_zeroing=False))
        assert not zeroes_first(vllm_config, SimpleNamespace())


@pytest.mark.parametrize("zeroes", [False, True])
def test_blocks_that_stores_read_are_given_back_when_vllm_empties_its_cache(zeroes: bool) -> None:
    """And when their request was preempted and is then aborted. In both cases the ranks settle these stores first, and if vLLM
    writes zeros before that, the blocks are held until the ranks report."""
    pool, engine = Pool(), SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id="with groups"))
    groups = [GroupTable(BLOCK), GroupTable(BLOCK, BLOCK)]
    scheduler = SchedulerSide(Session(), groups, 1, numbers=(0, 1), zeroes=zeroes)  # type: ignore[arg-type]
    scheduler.bind_pool(pool)
    watch_resets("with groups", scheduler)
    jobs = []
    for name in ("a", "b"):
        request = Request(name, list(range(BLOCK)))
        scheduler.match(request, 0)
        scheduler.allocated(request, ([1], [2]), 0)
        (store,) = scheduler.plan_step(step({name: BLOCK})).stores
        assert pool.held[-2:] == [1, 2]
        jobs.append(store.job_id)
        if name == "a":
            request.num_preemptions = 1
            assert not scheduler.finished(request)
            assert bool(pool.held) == zeroes, "nobody has to wait for a step"
        else:
            vllm = SimpleNamespace(vllm_config=engine)
            assert not empty_vllms_cache(lambda of: not pool.held, vllm), "vLLM may try again"
            assert empty_vllms_cache(lambda of, running: bool(pool.held) == zeroes, vllm, True)
        assert store.job_id in scheduler.plan_step(step()).settle
    scheduler.transferred(report=StepReport(stored=dict.fromkeys(jobs, 1)))
    assert not pool.held


def test_a_failed_load_is_not_tried_again() -> None:
    session = Session(present=4)
    scheduler, request = half(session), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([7],), 64)
    scheduler.plan_step(step())
    scheduler.transferred(["a"], invalid_blocks=[7])
    assert scheduler.match(request, 0) == 0 and not session.leased


def test_a_new_server_is_sent_everything_from_the_first_chunk() -> None:
    session = Session()
    scheduler, request = half(session), Request("a", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    scheduler.plan_step(step({"a": 64}))
    session.epoch, session.chunk_tokens = b"server 2", 10
    request.num_computed_tokens = 64
    request.all_token_ids += [1]
    (store,) = scheduler.plan_step(step({"a": 1})).stores
    assert (store.first_chunk, len(store.hashes) // 16, store.chunk_tokens) == (0, 6, 10)


def test_roles_embeddings_and_unknown_adapters() -> None:
    session = Session(present=4)
    assert half(session, can_load=False).match(Request("a", list(range(100))), 0) == 0
    consumer, request = half(session, can_store=False), Request("a", list(range(100)))
    assert consumer.match(request, 0) == 64
    consumer.allocated(request, ([1],), 64)
    assert not consumer.plan_step(step({"a": 100})).stores
    scheduler = half(session)
    lora = SimpleNamespace(lora_name="x", lora_path="/nowhere", lora_int_id=1)
    for other in (
        Request("b", list(range(100)), prompt_embeds=object()),
        Request("c", list(range(100)), lora_request=lora),
    ):
        assert scheduler.match(other, 0) == 0
        scheduler.allocated(other, ([1],), 0)
        assert not scheduler.plan_step(step({other.request_id: 100})).stores
    # of prompt log probabilities
    assert scheduler.match(Request("d", list(range(100)), skip_reading_prefix_cache=True), 0) == 0
    assert scheduler.match(Request("e", list(range(100))), 0) == 64


def test_only_an_engine_that_stores_announces_and_an_aborted_request_withdraws() -> None:
    session = Session(present=2)
    consumer, scheduler = half(session, can_store=False), half(session)
    request, other = Request("a", list(range(100))), Request("b", list(range(100)))
    for side in (consumer, scheduler):
        assert side.match(request, 0) == 32
        side.finished(request)
    assert scheduler.match(other, 0) == 32
    scheduler.allocated(other, ([1, 2, 3, 4, 5, 6, 7],), 0)
    assert scheduler.plan_step(step({"b": 100})).stores
    scheduler.finished(other)
    assert not session.engines[0] and session.engines[1] == session.engines[2] != ""
    assert session.withdrawn == ["a"], "the other one stores what it has announced"


def test_an_adapter_whose_files_may_not_be_the_loaded_ones_is_not_cached(
    tmp_path: Path, loras: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM answers with what it has loaded, whatever has been saved over it since."""
    one, two = loras
    connection = tmp_path / "live"
    connection.symlink_to(one)
    session = Session(present=4)
    scheduler = half(session)

    numbers = {connection: 1, one: 2, two: 3}

    def cached(name: str, path: Path) -> bool:
        lora = SimpleNamespace(lora_name="x", lora_path=str(path), lora_int_id=numbers[path])
        request = Request(name, list(range(100)), lora_request=lora)
        hit = scheduler.match(request, 0)
        scheduler.allocated(request, ([1],), hit or 0)
        return bool(hit) or bool(scheduler.plan_step(step({name: 100})).stores)

    assert cached("a", one) and cached("b", connection)
    connection.unlink()
    connection.symlink_to(two)
    assert not cached("c", connection), "another folder, whose files are older than the engine"
    (one / "adapter_model.safetensors").write_bytes(b"new")
    os.utime(one / "adapter_model.safetensors", (0, 0))
    assert not cached("d", one) and not cached("f", one) and cached("e", two)
    gone = [line.getMessage() for line in caplog.records if "no longer cached" in line.getMessage()]
    assert len(gone) == 2, "one line for each adapter"
    for line, path in zip(gone, (connection, one), strict=True):
        assert f"adapter 'x' (number {numbers[path]}, first loaded from {path})" in line
        assert "its files have changed since" in line and "under another number" in line


@pytest.fixture
def loras(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return one, two


def test_an_adapter_under_the_number_of_another_is_not_cached(
    loras: tuple[Path, Path], core: Core, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM goes on answering with the adapter that it has loaded under the number."""
    one, two = loras

    def lora(number: int, path: Path) -> Any:
        return SimpleNamespace(lora_name="x", lora_path=str(path), lora_int_id=number)

    def hit(name: str, number: int, path: Path) -> bool:
        return bool(core.connector.match(Request(name, list(range(700)), lora_request=lora(number, path)), 0))

    core.add_lora(lora(1, one))
    assert hit("a", 1, one) and hit("b", 2, two)
    assert not hit("c", 1, two), "what is loaded is the other one"
    assert not hit("d", 1, one), "and now it is not known what is"
    assert f"are no longer cached: a request wants it from {two}" in caplog.text
    assert hit("e", 2, two)


def test_images_salts_and_adapters_change_the_hashes_that_follow(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")

    def hashes(**more: Any) -> bytes:
        scheduler, request = half(Session()), Request("a", list(range(64)), **more)
        scheduler.match(request, 0)
        scheduler.allocated(request, ([1],), 0)
        return scheduler.plan_step(step({"a": 64})).stores[0].hashes

    def image(name: str, offset: int) -> Any:
        return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=10))

    plain = hashes()
    assert hashes() == plain
    assert hashes(cache_salt="s")[:16] != plain[:16]
    lora = SimpleNamespace(lora_name="x", lora_path=str(tmp_path), lora_int_id=1)
    fused = SimpleNamespace(**vars(lora) | {"lora_int_id": 2, "is_3d_lora_weight": True})
    assert len({plain[:16], hashes(lora_request=lora)[:16], hashes(lora_request=fused)[:16]}) == 3
    one, two = hashes(mm_features=[image("one", 30)]), hashes(mm_features=[image("two", 30)])
    assert one[:16] == two[:16] == plain[:16], "the chunk before the image"
    assert one[16:32] != two[16:32] and one[32:48] != two[32:48], "both chunks that it lies in"
    assert hashes(mm_features=[image("one", 31)])[16:] != one[16:]


def test_images_that_vllm_only_numbers_are_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    """Without both of its caches vLLM calls the first image of every engine alike, so its name says nothing about its content."""
    image = SimpleNamespace(identifier="renderer0-mm-0-image-0", mm_position=SimpleNamespace(offset=30, length=10))

    def is_cached(cache_gb: float, prefixes: bool, items: Sequence[Any]) -> bool:
        config = SimpleNamespace(
            model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=cache_gb)),
            cache_config=SimpleNamespace(enable_prefix_caching=prefixes),
        )
        scheduler, request = (
            half(Session(), names_items=names_items(config)),
            Request("a", list(range(64)), mm_features=list(items)),
        )
        scheduler.match(request, 0)
        scheduler.allocated(request, ([1],), 0)
        return bool(scheduler.plan_step(step({"a": 64})).stores)

    assert is_cached(4, False, [image]) and is_cached(0, True, [image]) and is_cached(0, False, [])
    assert not caplog.messages
    assert not is_cached(0, False, [image])
    assert "--mm-processor-cache-gb 0" in caplog.text


def test_reset_serves_nothing_older() -> None:
    session = Session()
    scheduler, request = half(session), Request("a", list(range(64)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    (before,) = scheduler.plan_step(step({"a": 64})).stores
    scheduler.requests.reset()
    request.num_computed_tokens = 64
    request.all_token_ids += range(32)
    assert not scheduler.plan_step(step({"a": 32})).stores, "computed in part by the old weights"
    fresh = Request("b", list(range(64)))
    scheduler.match(fresh, 0)
    scheduler.allocated(fresh, ([1],), 0)
    (after,) = scheduler.plan_step(step({"b": 64})).stores
    assert before.hashes != after.hashes


def stored(scheduler: SchedulerSide, name: str, local_tokens: int) -> int:
    """Chunks of a request of 256 tokens that are stored, where so many tokens lie in vLLM's own cache."""
    request = Request(name, list(range(256)), num_computed_tokens=local_tokens)
    scheduler.match(request, local_tokens)
    scheduler.allocated(request, ([1, 2],), 0)
    return sum(len(store.hashes) // 16 for store in scheduler.plan_step(step({name: 256 - local_tokens})).stores)


def test_what_vllms_own_cache_holds_from_before_a_reset_is_not_stored() -> None:
    scheduler = half(Session())
    assert stored(scheduler, "a", 128) == 16
    scheduler.requests.reset()
    assert stored(scheduler, "b", 128) == 0, "vLLM's own cache could not be emptied, or was not"
    assert stored(scheduler, "c", 0) == 16
    scheduler.requests.own_cache_emptied()
    assert stored(scheduler, "d", 128) == 16


def test_ranks_tell_whether_vllms_own_cache_was_emptied_after_the_last_step_of_the_old_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = 0
    monkeypatch.setattr("lmcache.integration.vllm.worker.weight_changes", lambda: changes)
    scheduler, worker = half(Session()), rank(Ranks())

    def run_step() -> None:
        plan = scheduler.plan_step(step())
        worker.start_loads(plan)
        worker.start_stores(plan)
        scheduler.transferred(report=worker.take_report())

    run_step()
    changes += 1
    run_step()
    assert stored(scheduler, "a", 128) == 0, "a block of the old weights"
    for emptied, changed in ((1, 2), (2, 1)):
        for _ in range(2):
            run_step()
            for order in (1, 2):
                if order == emptied:
                    scheduler.requests.own_cache_emptied()
                if order == changed:
                    changes += 1
            run_step()
        assert stored(scheduler, f"b{emptied}", 128) == 16, (
            "no step of the old weights came after vLLM's cache was emptied"
        )
    scheduler.requests.own_cache_emptied()
    run_step()
    changes += 1
    run_step()
    assert stored(scheduler, "c", 128) == 0, "it was emptied before a step of the old weights"


IMAGE = SimpleNamespace(identifier="image", mm_position=SimpleNamespace(offset=30, length=10))


def stores_image(scheduler: SchedulerSide, name: str, lora: Any = None) -> bool:
    """Whether what is computed of a prompt with an image is stored."""
    request = Request(name, list(range(64)), mm_features=[IMAGE], lora_request=lora)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    return bool(scheduler.plan_step(step({name: 64})).stores)


def test_what_encoders_of_the_old_weights_have_made_of_images_is_not_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM keeps that in a cache of its own, which it empties only if it is told to, or when it reloads weights by itself."""

    class GPUModelRunner:
        def reload_weights(self, empties: bool) -> None:
            if empties:
                self.reset_encoder_cache()

        def reset_encoder_cache(self) -> None: ...

    made = SimpleNamespace(GPUModelRunner=GPUModelRunner)
    for name in ("vllm", "vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", made)
    weights_of_vllm.watch_weights(vllm_config(""))
    runner = GPUModelRunner()
    scheduler, worker = half(Session()), rank(Ranks())

    def run_step() -> None:
        plan = scheduler.plan_step(step({"other": 1}))
        worker.start_loads(plan)
        worker.start_stores(plan)
        scheduler.transferred(report=worker.take_report())

    run_step()
    assert stores_image(scheduler, "a")
    runner.reload_weights(empties=False)
    run_step()
    assert not stores_image(scheduler, "b") and stored(scheduler, "text", 0)
    assert "/reset_encoder_cache" in caplog.text
    runner.reset_encoder_cache()
    run_step()
    assert stores_image(scheduler, "c")
    runner.reload_weights(empties=True)
    run_step()
    assert stores_image(scheduler, "d")
    runner.reset_encoder_cache()
    runner.reload_weights(empties=False)
    run_step()
    assert stores_image(scheduler, "e"), "nothing was computed between"


def test_an_image_seen_through_another_adapter_of_the_same_name_is_not_stored(tmp_path: Path) -> None:
    """vLLM keeps what the encoders have made of it under the name of the adapter."""

    def lora(number: int) -> Any:
        path = tmp_path / str(number)
        path.mkdir(exist_ok=True)
        (path / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
        return SimpleNamespace(lora_name="x", lora_path=str(path), lora_int_id=number)

    one, two = lora(1), lora(2)
    assert stores_image(half(Session()), "a", one) and stores_image(half(Session()), "b", two)
    for adapts_items in (False, True):
        scheduler = half(Session(), adapts_items=adapts_items)
        assert stores_image(scheduler, "a", one) and stores_image(scheduler, "b")
        assert stores_image(scheduler, "c", two) is not adapts_items
        scheduler.items_emptied()
        assert stores_image(scheduler, "d", two)


def test_weights_that_are_woken_up_leave_nothing_in_a_cache_that_was_emptied_before(core: Core) -> None:
    """vLLM empties its prefix cache before it sleeps, and computes nothing between that and the new weights."""
    side = core.connector
    side.requests.session.present = 0  # type: ignore[union-attr]
    assert stored(side, "a", 0) == 16
    side.requests.own_cache_emptied()
    core.sleep(level=2)
    core.wake_up(tags=["weights"])
    core.wake_up(tags=["kv_cache"])
    assert salt_of(core) and stored(side, "c", 128) == 16
    core.wake_up(tags=["weights"])
    assert stored(side, "e", 128) == 0, "something was computed since"


class Core:
    """vLLM's `EngineCore` as far as it goes to sleep: it resets its connector first, at once or when no request runs any more."""

    def __init__(self, connector: SchedulerSide, engine_id: str = "engine") -> None:
        self.vllm_config = SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id=engine_id))
        self.connector = connector
        self.waiting: list[Future[None]] = []

    def sleep(self, level: int = 1, mode: str = "abort") -> Future[None] | None:
        if mode == "wait":
            self.waiting.append(Future())
            return self.waiting[-1]
        if level:
            self.connector.reset()
        return None

    def release_kv_cache_memory(self) -> None:
        self.connector.reset()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        return tags is None

    def add_lora(self, lora_request: Any) -> bool:
        return bool(lora_request.lora_int_id)

    def collective_rpc(self, method: str) -> list[None]:
        return [None]

    def drain(self) -> None:
        self.connector.reset()
        self.waiting.pop().set_result(None)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    """A core whose connector's half is watched, as vLLM's own class is."""
    made = type("Core", (Core,), dict(vars(Core)))(half(Session(present=40), synchronous="auto"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", SimpleNamespace(EngineCore=type(made)))
    watch_resets("engine", made.connector)
    return made


def salt_of(core: Core) -> str:
    """What the next request's chunks are named by, besides its tokens."""
    request = Request(f"request {len(core.connector.requests.session.salts)}", list(range(700)))  # type: ignore[union-attr]
    core.connector.match(request, 0)
    return str(core.connector.requests.session.salts[-1])  # type: ignore[union-attr]


def test_a_sleep_that_keeps_the_weights_keeps_the_cache(core: Core) -> None:
    assert salt_of(core) == ""
    core.sleep()
    core.wake_up()
    assert salt_of(core) == ""
    core.sleep(level=0)
    core.wake_up(tags=["scheduling"])
    assert salt_of(core) == ""
    core.release_kv_cache_memory()
    core.wake_up(tags=["kv_cache"])
    assert salt_of(core) == ""
    core.connector.reset()
    own = salt_of(core)
    core.sleep(level=1)
    assert salt_of(core) == own != "", "what the user has reset stays reset"
    core.sleep(level=2)
    assert salt_of(core) not in ("", own)


def test_a_sleep_that_waits_for_requests_keeps_the_cache_unless_somebody_else_resets_it(core: Core) -> None:
    core.sleep(1, "wait")
    core.drain()
    assert salt_of(core) == ""
    core.sleep(mode="wait")
    core.connector.reset()
    core.drain()
    assert salt_of(core) != ""


@pytest.mark.parametrize("level", [0, 1])
def test_weights_that_change_while_a_sleep_waits_for_requests_are_new(core: Core, level: int) -> None:
    """vLLM itself resets nothing before it sleeps at level 0, and a release of it may not before level 1 either."""
    core.sleep(level, "wait")
    core.connector.transferred(report=StepReport(weights=1))
    changed = salt_of(core)
    core.waiting.pop().set_result(None)
    assert salt_of(core) == changed != ""


def test_weights_that_are_awake_before_the_kv_may_be_written_into(core: Core) -> None:
    core.sleep()
    core.wake_up(tags=["weights"])
    assert salt_of(core) != ""


def test_the_sleep_of_another_engine_takes_nothing_back(core: Core) -> None:
    other = type(core)(core.connector, "another engine")
    other.sleep()
    assert salt_of(core) != ""


def test_a_rank_that_cannot_serve_ends_the_service() -> None:
    session = Session(present=4)
    scheduler = half(session)
    scheduler.transferred(report=StepReport(refusal="unknown order"))
    assert session.closed and scheduler.match(Request("a", list(range(100))), 0) == 0


def test_leases_end_when_a_rank_refuses_those_that_others_load_from_after_the_load() -> None:
    session = Session(present=40)
    scheduler, loads, waits = half(session), Request("a", list(range(700))), Request("b", list(range(700)))
    assert scheduler.match(loads, 0) == scheduler.match(waits, 0) == 640
    scheduler.allocated(loads, (list(range(44)),), 640)
    scheduler.plan_step(step())
    scheduler.transferred(report=StepReport(refusal="unknown order"))
    assert session.leased == {1} and not session.closed
    scheduler.transferred(finished_loads=["a"])
    assert session.leased == set() and session.closed


class Ranks:
    """A worker's session that finishes what it is told to."""

    runtime = SimpleNamespace(now=lambda: 100.0)
    mapped_epoch = b"server 1"

    def __init__(self) -> None:
        self.loads: dict[str, Load] = {}
        self.stores: dict[str, Store] = {}
        self.done: list[Done] = []
        self.waited: list[str] = []

    def count_on_arena(self) -> bytes:
        return self.mapped_epoch

    def count_on_nothing(self) -> None: ...

    def load(self, job_id: str, load: Load) -> None:
        self.loads[job_id] = load

    def store(self, job_id: str, store: Store) -> None:
        self.stores[job_id] = store

    def finished(self) -> list[Done]:
        done, self.done = self.done, []
        return done

    def wait_finished(self, timeout_seconds: float) -> bool:
        return bool(self.done)

    def wait(self, job_ids: Any, timeout_seconds: float | None = None) -> set[str]:
        self.waited += job_ids
        return set()

    def close(self) -> None: ...


def rank(session: Ranks, shard: int = 0, **options: Any) -> WorkerSide:
    paged = SimpleNamespace(block_tokens=BLOCK, device="cpu", token_bytes=1 << 20)
    return WorkerSide(session, [Registered(paged, 1)], [shard], **options)  # type: ignore[arg-type]


def test_each_rank_takes_its_own_slots_and_reports_its_blocks() -> None:
    session, ranks = Session(present=40), Ranks()
    scheduler, request = half(session), Request("a", list(range(700)))
    scheduler.match(request, 256)
    scheduler.allocated(request, (list(range(20, 26)),), 384)
    plan = scheduler.plan_step(step())
    (load,) = plan.loads
    two = struct.pack("<48I", *range(48))
    load.hit = load.hit._replace(extents=two, shards=2)
    worker = rank(ranks, shard=1)
    worker.start_loads(plan)
    (sent,) = ranks.loads.values()
    assert struct.unpack("<24I", sent.extents) == tuple(range(1, 48, 2))
    assert (sent.first_chunk, sent.lease_chunk, sent.start_token, sent.end_token) == (16, 0, 256, 640)
    ranks.done = [Done(load.job_id, "load", False, 0, 0.0)]
    assert worker.finished(plan) == (set(), {"a"})
    assert worker.take_invalid_blocks() == {22, 23, 24}


def test_a_closing_request_is_reported_once_its_stores_are_done() -> None:
    session, ranks = Session(), Ranks()
    scheduler, request, worker = half(session), Request("a", list(range(64))), rank(ranks)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    plan = scheduler.plan_step(step({"a": 64}))
    worker.start_stores(plan)
    assert scheduler.finished(request)
    closing = scheduler.plan_step(step())
    assert worker.finished(closing) == (set(), set())
    ranks.done = [Done(plan.stores[0].job_id, "store", True, 64, 0.001)]
    assert worker.finished(scheduler.plan_step(step())) == ({"a"}, set())
    assert worker.take_report().stored == {plan.stores[0].job_id: 1}


def test_a_rank_that_shares_its_part_leaves_storing_to_the_first() -> None:
    session, ranks = Session(), Ranks()
    scheduler, request, worker = half(session), Request("a", list(range(64))), rank(ranks, stores=False)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    plan = scheduler.plan_step(step({"a": 64}))
    worker.start_stores(plan)
    assert not ranks.stores and worker.take_report().stored == {plan.stores[0].job_id: 1}


def test_settling_waits_for_this_ranks_jobs_only() -> None:
    session, ranks = Session(), Ranks()
    scheduler, request, worker = half(session), Request("a", list(range(64))), rank(ranks)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([1],), 0)
    plan = scheduler.plan_step(step({"a": 64}))
    worker.start_stores(plan)
    plan.settle = [plan.stores[0].job_id, "store-of-another"]
    worker.settle(plan)
    assert ranks.waited == [plan.stores[0].job_id]


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> tuple[Session, Any]:
    """The adapter for vLLM's own class, and the session that it made."""
    session = Session(present=40)
    engine = SimpleNamespace(
        kv=SimpleNamespace(block_tokens=BLOCK, layout=None, shards=1, stages=()),
        scheduler_session=lambda: session,
        vllm_config=SimpleNamespace(kv_transfer_config=SimpleNamespace()),
    )
    monkeypatch.setattr(adapter, "_engine_of_caller", lambda: engine)
    return session, adapter.LMCacheMPSchedulerAdapter("tcp://localhost:5555", None, "model", vllm_block_size=BLOCK)


def test_vllms_own_class_is_told_whole_blocks_once(adapters: tuple[Session, Any]) -> None:
    session, endpoint = adapters
    assert endpoint.num_blocks_per_chunk() == 1, "eight chunks of 16 make a block"
    endpoint.maybe_submit_lookup_request("a", token_ids=list(range(700)), cache_salt="")
    endpoint.maybe_submit_lookup_request("a", token_ids=list(range(700)), cache_salt="")
    assert len(session.lookups) == 1 and endpoint.check_lookup_result("a") == 640
    endpoint.cleanup_lookup_result("a")
    assert endpoint.check_lookup_result("a") == 0, "after a failed load it is asked again, and would wait for ever"
    assert session.leased, "the ranks have still to take their own"
    endpoint.end_session("a")
    assert not session.leased
    endpoint.maybe_submit_lookup_request("b", token_ids=list(range(31)))
    assert endpoint.check_lookup_result("b") == 0, "31 tokens are no whole block"
    assert session.requests[0] == "a"


@pytest.mark.parametrize(("told", "kept"), [(5.0, {"b"}), (50.0, {"a", "b"}), (0.0, {"a", "b"})])
def test_vllms_own_class_keeps_a_lease_for_as_long_as_the_server_says(
    adapters: tuple[Session, Any], told: float, kept: set[str]
) -> None:
    """One that does not say gets its leases back when the requests end."""
    session, endpoint = adapters
    session.claim_seconds = told
    leases = {}
    for request_id in "ab":
        before = set(session.leased)
        endpoint.maybe_submit_lookup_request(request_id, token_ids=list(range(700)))
        leases[request_id] = session.leased - before
        session.now += 6.0
    assert session.leased == set().union(*(leases[one] for one in kept))
    for request_id in "ab":
        endpoint.end_session(request_id)
    assert not session.leased


def test_vllms_own_class_keeps_its_unit_when_the_chunk_size_changes(adapters: tuple[Session, Any]) -> None:
    session, endpoint = adapters
    assert endpoint.num_blocks_per_chunk() == 1
    session.chunk_tokens = 256
    endpoint.maybe_submit_lookup_request("a", token_ids=list(range(700)))
    assert endpoint.check_lookup_result("a") == 0 and endpoint.num_blocks_per_chunk() == 1


def test_vllms_own_class_asks_later_while_a_tier_loads(adapters: tuple[Session, Any]) -> None:
    session, endpoint = adapters
    session.coming = 4
    for _ in range(2):
        endpoint.maybe_submit_lookup_request("a", token_ids=list(range(700)))
        assert endpoint.check_lookup_result("a") is None
    session.coming = 0
    endpoint.maybe_submit_lookup_request("a", token_ids=list(range(700)))
    assert endpoint.check_lookup_result("a") == 640
    session.coming = 4
    endpoint.maybe_submit_lookup_request("b", token_ids=list(range(700)))
    endpoint.end_session("b")
    assert endpoint.check_lookup_result("b") == 0


class Tensor:
    """An ndarray with the part of torch's face that we use."""

    device = "cpu:0"

    def __init__(self, array: np.ndarray[Any, Any], device: str = "cuda:0") -> None:
        self.array, self.device, self.shape, self.dtype = array, device, array.shape, array.dtype

    def stride(self, axis: int | None = None) -> Any:
        steps = tuple(step // self.array.itemsize for step in self.array.strides)
        return steps if axis is None else steps[axis]

    def element_size(self) -> int:
        return self.array.itemsize

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def unbind(self, axis: int) -> list[Tensor]:
        return [Tensor(part, self.device) for part in np.moveaxis(self.array, axis, 0)]

    def chunk(self, count: int, axis: int) -> list[Tensor]:
        return [Tensor(part, self.device) for part in np.split(self.array, count, axis)]


def read(plane: Any, array: np.ndarray[Any, Any], block: int, token: int, head: int, dim: int) -> float:
    at = plane.address + block * plane.block_stride + head * plane.head_stride
    at += (token // plane.token_group) * plane.group_stride + (token % plane.token_group) * plane.token_stride
    at += (dim // plane.dim_group) * plane.dim_group_stride + (dim % plane.dim_group) * plane.dim_stride
    base = array.base if array.base is not None else array
    flat = np.frombuffer(base.data, dtype=array.dtype) if base.flags.c_contiguous else base.reshape(-1)
    return float(flat[(at - base.ctypes.data) // array.itemsize])


@pytest.mark.parametrize("order", ["split first", "split second", "heads first", "keys before values", "mla"])
def test_planes_of_plain_tensors(order: str) -> None:
    blocks, tokens, heads, dims = 5, 4, 3, 8
    if order == "split first":
        array = np.arange(2 * blocks * tokens * heads * dims, dtype=np.float32).reshape(2, blocks, tokens, heads, dims)
        expected = [lambda b, t, h, d, p=p: array[p, b, t, h, d] for p in (0, 1)]
    elif order == "split second":
        array = np.arange(2 * blocks * tokens * heads * dims, dtype=np.float32).reshape(blocks, 2, tokens, heads, dims)
        expected = [lambda b, t, h, d, p=p: array[b, p, t, h, d] for p in (0, 1)]
    elif order == "heads first":
        whole = np.arange(2 * blocks * tokens * heads * dims, dtype=np.float32).reshape(2, blocks, heads, tokens, dims)
        array = whole.transpose(0, 1, 3, 2, 4)
        expected = [lambda b, t, h, d, p=p: array[p, b, t, h, d] for p in (0, 1)]
    elif order == "keys before values":
        array = np.arange(2 * blocks * tokens * heads * dims, dtype=np.float32).reshape(blocks, heads, tokens, 2 * dims)
        expected = [lambda b, t, h, d, p=p: array[b, h, t, p * dims + d] for p in (0, 1)]
    else:
        heads = 1
        array = np.arange(blocks * tokens * dims, dtype=np.float32).reshape(blocks, tokens, dims)
        expected = [lambda b, t, h, d: array[b, t, d]]
    shape = Shape(heads, dims, tokens, order == "mla")
    registered = describe_tensors([Tensor(array)], shape, blocks)
    assert registered.paged.block_tokens == tokens and len(registered.paged.planes) == len(expected)
    for plane, value in zip(registered.paged.planes, expected, strict=True):
        for index in np.ndindex(blocks, tokens, heads, dims):
            assert read(plane, array, *index) == value(*index)


def test_smaller_blocks_of_the_kernel() -> None:
    array = np.zeros((10, 3, 4, 16), dtype=np.float16)
    registered = describe_tensors([Tensor(array)], Shape(3, 8, 8, False), num_blocks=5)
    assert registered.paged.block_tokens == 4 and registered.paged.num_blocks == 10
    assert registered.blocks([0, 3]) == [0, 1, 6, 7]


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(LayoutError, match="unknown order"):
        describe_tensors([Tensor(np.zeros((5, 7, 4, 16), dtype=np.float32))], Shape(3, 8, 4, False), 5)
    with pytest.raises(LayoutError, match="do not hold"):
        describe_tensors([Tensor(np.zeros((5, 3, 4, 16), dtype=np.float32))], Shape(3, 8, 4, False), 4)
    shared = Tensor(np.zeros((5, 3, 4, 16), dtype=np.float32))
    with pytest.raises(LayoutError, match="share one"):
        describe_tensors([shared, shared], Shape(3, 8, 4, False), 5)


def test_strides_of_pairs_kept_together_are_found_and_others_refused() -> None:
    tokens, heads, dims = 32, 2, 64
    token, head, dim = np.meshgrid(np.arange(tokens), np.arange(heads), np.arange(dims), indexing="ij")
    pairs_of_dims = head * tokens * dims + (dim // 2) * (tokens * 2) + token * 2 + dim % 2
    fit = fit_strides(pairs_of_dims)
    assert (fit.token_group, fit.group_stride, fit.dim_group, fit.dim_group_stride, fit.dim_stride) == (1, 2, 2, 64, 1)
    pairs_of_tokens = head * tokens * dims + (token // 2) * (dims * 2) + dim * 2 + token % 2
    fit = fit_strides(pairs_of_tokens)
    assert (fit.token_group, fit.group_stride, fit.token_stride, fit.dim_group, fit.dim_group_stride) == (
        2,
        128,
        1,
        1,
        2,
    )
    with pytest.raises(LayoutError, match="cannot describe"):
        fit_strides(np.random.default_rng(0).permutation(tokens * heads * dims).reshape(tokens, heads, dims))


def vllm_config(model: str, **more: Any) -> Any:
    hf = SimpleNamespace(to_dict=lambda: {"rope_theta": 1e6, "layers": 2} | more.get("hf", {}), _commit_hash=None)
    model_config = SimpleNamespace(
        model=model,
        dtype=more.get("dtype", "torch.float32"),
        hf_config=hf,
        model_weights="",
        hf_overrides={},
        quantization=None,
        get_total_num_kv_heads=lambda: 4,
        get_total_num_hidden_layers=lambda: 2,
    )
    return SimpleNamespace(
        model_config=model_config,
        cache_config=SimpleNamespace(cache_dtype=more.get("cache_dtype", "auto")),
        parallel_config=SimpleNamespace(tensor_parallel_size=more.get("tp", 1), pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format=more.get("load_format", "auto")),
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
    )


class FullAttentionSpec(SimpleNamespace): ...


class MambaSpec(SimpleNamespace):
    mamba_cache_mode = "none"


def cache_config(*specs: Any) -> Any:
    names = [f"model.layers.{number}.attn" for number in (10, 2)]
    groups = [SimpleNamespace(layer_names=names, kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=5)


FULL = FullAttentionSpec(block_size=128, head_size=64, head_size_v=64, dtype="torch.float32")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    write_weights(tmp_path / "model.safetensors", 1)
    return tmp_path


def write_weights(path: Path, value: int) -> None:
    """Two tensors of 100 kB, the second one full of `value`."""
    header = json.dumps(
        {"a": {"dtype": "U8", "data_offsets": [0, 100_000]}, "b": {"dtype": "U8", "data_offsets": [100_000, 200_000]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100_000) + bytes([value]) * 100_000)


def test_a_models_layout(weights: Path) -> None:
    kv = describe_model(vllm_config(str(weights), tp=2), cache_config(FULL))
    assert kv.layer_names == ("model.layers.2.attn", "model.layers.10.attn")
    assert (kv.shards, kv.ranks) == (2, 2)
    assert kv.layout(16).fingerprint != kv.layout(17).fingerprint
    assert kv.shard(1, 0).first_head == 2 and stores_its_shard(kv.model, 1, 2)
    shared = describe_model(vllm_config(str(weights), tp=8), cache_config(FULL))
    stores = [stores_its_shard(shared.model, rank, shared.tp_size) for rank in range(4)]
    assert shared.shards == 4 and stores == [True, False, True, False]


def test_kv_that_may_be_rounded_has_a_name_of_its_own(weights: Path) -> None:
    config = vllm_config(str(weights))
    config.speculative_config = None
    exact = describe_model(config, cache_config(FULL)).layout(16)
    lossy = describe_model(config, cache_config(FULL), lossy_kv="int8").layout(16)
    assert (exact.lossy_kv, lossy.lossy_kv) == ("none", "int8") and exact.fingerprint != lossy.fingerprint
    assert read_settings(transfer()).lossy_kv == "none" and read_settings(transfer(lossy_kv="int8")).lossy_kv == "int8"


def test_a_draft_models_weights_count_and_speculation_without_one_shares_the_kv(weights: Path, tmp_path: Path) -> None:
    def fingerprint(speculative: Any, model_id: str = "", engine: str = "engine") -> bytes:
        config = vllm_config(str(weights))
        config.kv_transfer_config.engine_id = engine
        config.speculative_config = speculative and speculative(config.model_config)
        return describe_model(config, cache_config(FULL), model_id).layout(16).fingerprint

    def ngram(target: Any) -> Any:
        return SimpleNamespace(method="ngram", draft_model_config=target, target_model_config=target)

    def eagle(model: object, commit: str | None = None) -> Any:
        wrapped = SimpleNamespace(_commit_hash=None, model=SimpleNamespace(_commit_hash=commit))
        draft = SimpleNamespace(model=str(model), hf_config=wrapped)
        return lambda target: SimpleNamespace(method="eagle", draft_model_config=draft, target_model_config=target)

    assert fingerprint(None) == fingerprint(ngram) != fingerprint(None, "mine")
    drafts = []
    for value in (1, 2):
        folder = tmp_path / f"draft {value}"
        folder.mkdir()
        write_weights(folder / "model.safetensors", value)
        drafts.append(eagle(folder))
    drafts += [eagle("org/drafter", "c" * 40), eagle("org/drafter", "d" * 40), eagle("org/drafter")]
    others = [fingerprint(draft, model_id) for draft in drafts for model_id in ("", "mine")]
    assert len({fingerprint(None), *others}) == 11
    assert fingerprint(drafts[0]) == fingerprint(drafts[0], engine="other")
    assert fingerprint(drafts[-1]) != fingerprint(drafts[-1], engine="other"), "which drafter it is, nobody knows"


@pytest.mark.parametrize(
    ("model", "scheduler", "caching", "words"),
    [
        ({"is_prefix_caching_supported": False, "attn_type": "encoder_only"}, {}, True, "encoder_only"),
        ({"use_mla": True}, {"enable_chunked_prefill": False}, False, "for MLA on this CPU"),
        ({}, {"enable_chunked_prefill": False}, False, "for this model or platform"),
        ({}, {"enable_chunked_prefill": False}, True, ""),
        ({}, {"enable_chunked_prefill": True}, False, ""),
        ({"is_prefix_caching_supported": True}, {}, True, ""),
    ],
)
def test_where_vllm_rules_prefixes_out_nothing_is_served(
    model: dict[str, Any], scheduler: dict[str, Any], caching: bool, words: str, weights: Path
) -> None:
    """The user's --no-enable-prefix-caching alone is about vLLM's own cache."""
    config = vllm_config(str(weights))
    vars(config.model_config).update(model)
    config.scheduler_config = SimpleNamespace(**scheduler)
    config.device_config = SimpleNamespace(device_type="cpu")
    config.cache_config.enable_prefix_caching = caching
    if not words:
        assert describe_model(config, cache_config(FULL)).layer_names
        return
    with pytest.raises(LayoutError, match=words):
        describe_model(config, cache_config(FULL))


class UpdatedWorker:
    """A worker of vLLM whose weights change while it runs."""

    cache_config = SimpleNamespace(cache_dtype="auto")

    def init_fp8_kv_scales(self) -> None: ...

    def reload_weights(self) -> str:
        return "reloaded"

    def sleep(self, level: int = 1) -> int:
        return level


def test_calls_that_change_the_weights_of_a_rank_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, however often a connector is made; a sleep at level 1 keeps the weights, and waking up from it keeps those of
    KV without scales."""
    methods = "reload_weights", "sleep", "init_fp8_kv_scales", "a method of another release"
    watched = {f"{__name__}.UpdatedWorker": methods}
    assert "init_fp8_kv_scales" in itertools.chain(*weights_of_vllm._OWNERS.values())
    monkeypatch.setattr(weights_of_vllm, "_OWNERS", watched)
    for _ in range(2):
        weights_of_vllm.watch_weights(SimpleNamespace(model_config=None))
    worker, before = UpdatedWorker(), weights_of_vllm.weight_changes()
    assert worker.reload_weights() == "reloaded" and weights_of_vllm.weight_changes() == before + 1
    assert [worker.sleep(), worker.sleep(1), worker.sleep(level=1)] == [1, 1, 1]
    assert weights_of_vllm.weight_changes() == before + 1
    assert [worker.sleep(2), worker.sleep(level=2)] == [2, 2] and weights_of_vllm.weight_changes() == before + 3
    worker.init_fp8_kv_scales()
    assert weights_of_vllm.weight_changes() == before + 3
    worker.cache_config = SimpleNamespace(cache_dtype="fp8")
    worker.init_fp8_kv_scales()
    assert weights_of_vllm.weight_changes() == before + 4


def test_ranks_with_new_weights_end_what_was_cached() -> None:
    session = Session(present=40)
    scheduler = half(session)
    request, later = Request("a", list(range(700))), Request("b", list(range(700)))
    assert scheduler.match(request, 0) == 640
    assert scheduler.plan_step(step()).weights == 0
    scheduler.transferred(report=StepReport(weights=1))
    assert not session.leased, "the hit is given back"
    assert scheduler.match(request, 0) == 0, "some of its tokens may be of the old weights"
    assert scheduler.plan_step(step()).weights == 1
    assert session.salts[-1] == "" and scheduler.match(later, 0) == 640
    assert session.salts[-1].startswith("\0reset"), "a name that no other engine has"
    scheduler.transferred(report=StepReport(weights=1))
    assert session.leased, "the same change once more is no news"


def test_a_session_that_goes_on_is_not_cached() -> None:
    session = Session(present=40)
    request = Request("a", list(range(700)))
    vars(request)["resumable"] = True
    assert half(session).match(request, 0) == 0 and not session.lookups


def test_whatever_changes_the_numbers_changes_the_layout(weights: Path, tmp_path: Path) -> None:
    def fingerprint(engine: str = "engine", **more: Any) -> bytes:
        config = vllm_config(str(weights), **more)
        config.kv_transfer_config.engine_id = engine
        return describe_model(config, cache_config(FULL)).layout(16).fingerprint

    plain = fingerprint()
    assert fingerprint() == fingerprint("another") == fingerprint(tp=2) == plain
    half = FullAttentionSpec(**{**vars(FULL), "dtype": "torch.bfloat16"})
    others = [
        fingerprint(dtype="torch.float16"),
        fingerprint(hf={"rope_theta": 1e4}),
        fingerprint(load_format="dummy"),
        fingerprint("another", load_format="dummy"),
        fingerprint(load_format="pt"),
        describe_model(vllm_config(str(weights)), cache_config(half)).layout(16).fingerprint,
    ]
    write_weights(weights / "model.safetensors", 2)
    others.append(fingerprint())
    assert len({plain, *others}) == 8


READ_ALIKE = ("auto", "hf", "safetensors", "runai_streamer")
"""Formats that read the same files of a directory with one set of safetensors."""


def digests_by_format(model: str, **more: Any) -> list[str]:
    configs = [vllm_config(model, load_format=load_format) for load_format in READ_ALIKE]
    for config in configs:
        config.load_config.download_dir = more.get("download_dir")
        config.model_config.hf_config._commit_hash = more.get("commit")
    return [config_digest(config) for config in configs]


@pytest.mark.parametrize("second", ["consolidated.safetensors", "adapter.safetensors", "original/model.safetensors"])
def test_formats_that_may_read_different_files_of_a_directory_are_told_apart(weights: Path, second: str) -> None:
    """vLLM's `auto` reads `consolidated*.safetensors` where there are any, `safetensors` what the index names."""
    one = set(digests_by_format(str(weights)))
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    assert one == set(digests_by_format(str(weights))) and len(one) == 1
    (weights / second).parent.mkdir(exist_ok=True)
    write_weights(weights / second, 2)
    assert len(one | set(digests_by_format(str(weights)))) == 1 + len(READ_ALIKE)


def test_formats_share_a_repository_whose_snapshot_has_one_set_of_weights(weights: Path, tmp_path: Path) -> None:
    commit = "c" * 40
    hub = {"download_dir": str(tmp_path / "hub"), "commit": commit}
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    assert len(set(digests_by_format("org/model", **hub))) == len(READ_ALIKE), "nobody knows which files there are"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(weights / "model.safetensors")
    one = set(digests_by_format("org/model", **hub))
    assert len(one) == 1 and one == set(digests_by_format(str(snapshot))), "and with engines that have it by its path"
    (snapshot / "consolidated.safetensors").symlink_to(weights / "model.safetensors")
    assert len(one | set(digests_by_format("org/model", **hub))) == 1 + len(READ_ALIKE)


def test_a_draft_models_files_are_those_of_its_own_load_format(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    write_weights(tmp_path / "draft" / "model.safetensors", 1)
    write_weights(tmp_path / "draft" / "consolidated.safetensors", 2)

    def digest(load_format: str | None) -> str:
        config = vllm_config(str(weights))
        load = load_format and SimpleNamespace(load_format=load_format)
        config.speculative_config = SimpleNamespace(
            method="draft_model",
            draft_model_config=SimpleNamespace(model=str(tmp_path / "draft")),
            target_model_config=config.model_config,
            draft_load_config=load,
        )
        return config_digest(config)

    assert digest(None) == digest("auto") != digest("safetensors")


@pytest.mark.parametrize("options", [{"mm_processor_kwargs": {"max_pixels": 9}}, {"video_pruning_rate": 0.5}])
def test_how_images_are_processed_changes_the_layout(weights: Path, options: dict[str, Any]) -> None:
    """vLLM's name of an image counts the options of its request, and not those of the engine."""

    def digest(**more: Any) -> str:
        config = vllm_config(str(weights))
        config.model_config.multimodal_config = SimpleNamespace(**more)
        return config_digest(config)

    assert digest() == config_digest(vllm_config(str(weights))) != digest(**options)


def test_what_a_model_writes_into_its_configuration_is_not_seen(weights: Path) -> None:
    """The scheduler's process has the configuration as it was before the ranks made the model."""
    written = {"dtype": "float32", "max_model_len": 4096, "text_config": {"dtype": "float32"}}
    read = {"dtype": "bfloat16", "text_config": {}}
    assert config_digest(vllm_config(str(weights), hf=written)) == config_digest(vllm_config(str(weights), hf=read))


def test_weights_that_may_come_from_anywhere_need_a_name(weights: Path) -> None:
    for load_format in ("tensorizer", "modelexpress", "a plugin's own"):
        config = vllm_config(str(weights), load_format=load_format)
        with pytest.raises(LayoutError, match=rf"--load-format {load_format} .*lmcache\.mp\.model_id"):
            describe_model(config, cache_config(FULL))
        assert describe_model(config, cache_config(FULL), "mine").layout(1).model_id == "mine"


def test_what_is_computed_before_the_weights_are_known_is_counted() -> None:
    session, request = Session(present=40), Request("a", list(range(700)))
    session.epoch, session.chunk_tokens = b"", None
    scheduler = half(session)
    assert scheduler.match(request, 0) == 0 and not session.lookups
    scheduler.allocated(request, (list(range(6)),), 0)
    request.num_computed_tokens = 700
    assert not scheduler.plan_step(step({"a": 1})).stores
    assert not scheduler.finished(request) and session.forgone_tokens == 700
    later = Request("b", list(range(700)))
    assert scheduler.match(later, 0) == 0
    session.epoch, session.chunk_tokens = b"server 1", CHUNK
    assert scheduler.match(later, 0) == 640, "as soon as they are"
    assert not scheduler.finished(later) and session.forgone_tokens == 700


def test_a_rank_whose_weights_have_no_identity_ends_what_is_served() -> None:
    reasons = ["", "it has changed"]
    scheduler, ranks = half(Session(present=40)), rank(Ranks(), refusal=lambda: reasons[0])
    assert not ranks.take_report()
    del reasons[0]
    scheduler.transferred(report=ranks.take_report())
    assert scheduler.match(Request("a", list(range(700))), 0) == 0


@pytest.fixture
def release_with_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of vLLM whose connectors hear of all groups."""
    base = SimpleNamespace(KVConnectorTransferResults=1, KVConnectorBase_V1=SimpleNamespace(bind_gpu_block_pool=1))
    path = "vllm.distributed.kv_transfer.kv_connector.v1"
    for at in range(1, 6):
        monkeypatch.setitem(sys.modules, ".".join(path.split(".")[:at]), SimpleNamespace(base=base))


@pytest.mark.usefixtures("release_with_groups")
def test_layers_of_a_group_may_have_another_number_of_heads(weights: Path) -> None:
    """As in Gemma 4, or in a draft model. The specs have the heads of a rank."""
    config = vllm_config(str(weights))
    few = FullAttentionSpec(**vars(FULL) | {"num_kv_heads": 2})
    usual = FullAttentionSpec(**vars(FULL) | {"num_kv_heads": 4})
    assert [one.model.num_kv_heads for one in describe_model(config, cache_config(usual, few)).groups] == [4, 2]
    config.parallel_config.tensor_parallel_size = 2
    halves = [FullAttentionSpec(**vars(FULL) | {"num_kv_heads": heads}) for heads in (2, 1)]
    assert [one.model.num_kv_heads for one in describe_model(config, cache_config(*halves)).groups] == [4, 2]


def test_ranks_share_a_head_only_if_all_layers_have_as_many(weights: Path) -> None:
    """With more ranks than heads each rank has one head, in layers with 4 heads and in layers with 8."""
    one = FullAttentionSpec(**vars(FULL) | {"num_kv_heads": 1})

    def heads(speculative: Any = None, **hf: Any) -> int:
        config = vllm_config(str(weights), tp=8, hf=hf)
        config.speculative_config = speculative
        return int(describe_model(config, cache_config(one)).model.num_kv_heads)

    def drafts(number: int) -> Any:
        draft = SimpleNamespace(model=str(weights), get_total_num_kv_heads=lambda: number)
        return SimpleNamespace(method="eagle", draft_model_config=draft)

    assert heads(num_key_value_heads=4, swa_num_key_value_heads=4) == 4
    assert heads(num_key_value_heads=4, swa_num_key_value_heads=8) == 8
    assert heads(blocks=[{"attention": {"n_heads_in_group": number}} for number in (8, 4, None)]) == 8
    assert [heads(drafts(number), num_key_value_heads=4) for number in (4, 8)] == [4, 8]


def uniform(specs: dict[str, Any]) -> Any:
    """The spec of a group of vLLM whose layers differ, as ranks get it."""
    return type("UniformTypeKVCacheSpecs", (), {"kv_cache_specs": specs, "block_size": 128})()


def test_layers_of_one_group_that_differ_are_groups_of_ours(weights: Path) -> None:
    few, many = [FullAttentionSpec(**vars(FULL) | {"num_kv_heads": heads}) for heads in (2, 4)]
    specs = {"l.0": many, "l.1": few, "l.2": many, "l.10": few}

    def caches(names: Iterable[str], told: bool = True, apart: bool = True) -> Any:
        """apart: in which tensors vLLM has the layers, which its scheduler knows, too."""
        held = {name: specs[name] for name in names}
        spec = uniform(held) if told else next(iter(held.values()))
        found = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(held), kv_cache_spec=spec)])
        if apart:
            kinds = {id(spec): [name for name in held if held[name] is spec] for spec in held.values()}
            found.kv_cache_tensors = [SimpleNamespace(layers=layers) for layers in kinds.values()]
        return found

    config = vllm_config(str(weights))
    both = [needs_ranks(config, caches(specs, told)) for told in (True, False)]
    assert both == [True, True] and not needs_ranks(config, caches(["l.0", "l.2"]))
    stages = [[specs]]
    rank, scheduler = [describe_model(config, caches(specs, told), stages=stages) for told in (True, False)]
    assert [one.model for one in rank.groups] == [one.model for one in scheduler.groups]
    assert [(one.model.num_kv_heads, one.layer_names, one.group.layers, one.number) for one in rank.groups] == [
        (4, ("l.0", "l.2"), (0, 2), 0),
        (2, ("l.1", "l.10"), (1, 3), 0),
    ]
    assert not rank.fails_by_request, "there is one block table"
    plain, alone = describe_model(config, cache_config(many)), describe_model(config, caches(["l.0", "l.2"]))
    assert (alone.layout(16), alone.group) == (plain.layout(16), None), (
        "a group whose layers do not differ is as before"
    )
    for apart in (True, False):
        with pytest.raises(LayoutError, match="whose layers differ in the shape of their KV"):
            describe_model(config, caches(specs, apart=apart))

    config.parallel_config.pipeline_parallel_size = 2
    parts = ["l.0", "l.2"], ["l.1", "l.10"]
    stages = [[{name: specs[name] for name in names}] for names in parts]
    assert needs_ranks(config, caches(parts[1])), "all ranks of a pipeline ask each other, or none"
    kv = describe_model(config, caches(parts[1]), stages=stages)
    assert [(one.model, one.group) for one in kv.groups] == [(one.model, one.group) for one in rank.groups]
    assert [(one.layer_names, one.counts) for one in kv.groups] == [((), (2, 0)), (("l.1", "l.10"), (0, 2))]


@pytest.mark.usefixtures("release_with_groups")
def test_kinds_of_kv_that_are_not_served_are_named(weights: Path) -> None:
    config, aligned = vllm_config(str(weights)), {**vars(FULL), "mamba_cache_mode": "align"}
    local = type("ChunkedLocalAttentionSpec", (), {**vars(FULL), "attention_chunk_size": 256})()
    assert [one.local_tokens for one in describe_model(config, cache_config(FULL, local)).groups] == [0, 256]
    local.attention_chunk_size = 200
    with pytest.raises(LayoutError, match="of attention of 200 tokens do not end where blocks of 128 do"):
        describe_model(config, cache_config(FULL, local))
    with pytest.raises(LayoutError, match="KV of kind CircularBufferSpec"):
        describe_model(config, cache_config(FULL, type("CircularBufferSpec", (), vars(FULL))()))
    config.speculative_config = SimpleNamespace(method="ngram")
    with pytest.raises(LayoutError, match="with speculative decoding the states of Mamba layers"):
        describe_model(config, cache_config(FULL, MambaSpec(**aligned)))
    local.attention_chunk_size = 256
    assert len(describe_model(config, cache_config(FULL, local)).groups) == 2
    config.speculative_config = SimpleNamespace(method="dflash", draft_model_config=SimpleNamespace())
    with pytest.raises(
        LayoutError, match=r"not supported with drafts of method 'dflash' yet; use one of ngram, .*, eagle3"
    ):
        describe_model(config, cache_config(FULL, local))
    config.speculative_config = SimpleNamespace(
        method="eagle3", draft_model_config=SimpleNamespace(model=str(weights), hf_config=None)
    )
    assert len(describe_model(config, cache_config(FULL, local)).groups) == 2


@pytest.mark.usefixtures("release_with_groups")
def test_an_engines_own_server_has_chunks_that_the_model_can_be_served_with(weights: Path) -> None:
    state = MambaSpec(**vars(FULL), mamba_cache_mode="align", mamba_type="m", shapes=(), dtypes=())
    state.block_size, state.state_content_size_bytes = 528, 64
    window = type("SlidingWindowSpec", (), {**vars(FULL), "sliding_window": 128})()
    local = type("ChunkedLocalAttentionSpec", (), {**vars(FULL), "attention_chunk_size": 512})()

    def fitting(least: int, *specs: Any) -> int:
        return describe_model(vllm_config(str(weights)), cache_config(FULL, *specs)).chunk_tokens(least)

    assert fitting(100) == 100
    assert fitting(256, state) == 528
    assert [fitting(least, window) for least in (16, 256, 257)] == [128, 256, 384]
    assert [fitting(least, window, local) for least in (256, 257, 513)] == [256, 512, 1024]


@pytest.mark.usefixtures("release_with_groups")
def test_each_stage_of_a_pipeline_has_its_layers_of_each_group(weights: Path) -> None:
    """Groups that lie on one stage have the names of an engine without stages."""
    window = type("SlidingWindowSpec", (), {**vars(FULL), "sliding_window": 128})()

    def described(*stages: list[list[str]], own: int = 0) -> Any:
        config = vllm_config(str(weights))
        config.parallel_config.pipeline_parallel_size = len(stages)
        caches = cache_config(FULL, window)
        for group, names in zip(caches.kv_cache_groups, stages[own], strict=True):
            group.layer_names = names
        assert needs_ranks(config, caches) == (len(stages) > 1)
        told = [[dict.fromkeys(names, spec) for names, spec in zip(one, (FULL, window), strict=True)] for one in stages]
        return describe_model(config, caches, stages=told)

    full, windows = described([["l.2", "l.5"], ["l.0", "l.1", "l.3", "l.4"]]).groups
    for own in (0, 1):
        kv = described([["l.2"], ["l.0", "l.1"]], [["l.5"], ["l.3", "l.4"]], own=own)
        assert [one.layout(16) for one in kv.groups] == [full.layout(16), windows.layout(16)]
        assert [one.group for one in kv.groups] == [full.group, windows.group]
        assert [(one.stages, one.shards) for one in kv.groups] == [((1, 2), 2), ((2, 4), 2)]
        assert [one.shard(0, own) for one in kv.groups] == [
            Shard(own, 2, own, own + 1, 0, 4),
            Shard(own, 2, *(2 * own, 2 * own + 2), 0, 4),
        ]
    kv = described([["l.2"], ["l.0", "l.1"]], [["l.5"], []], own=1)
    assert [(one.stages, one.shards, one.ranks) for one in kv.groups] == [((1, 2), 2, 2), ((), 1, 2)]
    assert [one.layer_names for one in kv.groups] == [("l.5",), ()]
    assert kv.groups[1].shard(0, 0) == Shard(0, 1, 0, 2, 0, 4)
    alone = described([["l.2", "l.5"], ["l.0", "l.1"]]).groups[1]
    assert alone.group == kv.groups[1].group and alone.stages == kv.groups[1].stages


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch, weights: Path) -> Iterator[Callable[..., Any]]:
    """The scheduler's connector of an engine with a window on two stages, in a release of vLLM with these calls."""
    path, name = "vllm.distributed.kv_transfer.kv_connector.v1", "lmcache.integration.vllm.connector"
    calls = SimpleNamespace()
    base = SimpleNamespace(
        **dict.fromkeys(("KVConnectorMetadata", "KVConnectorWorkerMetadata", "KVConnectorHandshakeMetadata"), object),
        KVConnectorTransferResults=lambda *a: SimpleNamespace(failed_recving=a[2]),
        KVConnectorBase_V1=calls,
        KVConnectorRole=SimpleNamespace(SCHEDULER=1),
    )
    for at in range(1, 7):
        monkeypatch.setitem(sys.modules, ".".join([*path.split("."), "base"][:at]), SimpleNamespace(base=base))
    monkeypatch.setitem(sys.modules, path + ".base", base)
    window = type("SlidingWindowSpec", (), {**vars(FULL), "sliding_window": 128})()

    def made(*known: str) -> Any:
        vars(calls).update(dict.fromkeys(known, 1))
        one = importlib.import_module(name).Connector()
        one._vllm_config, one._kv_cache_config, one._role = vllm_config(str(weights)), cache_config(FULL, window), 1
        one._vllm_config.parallel_config.pipeline_parallel_size = 2
        one._vllm_config.cache_config.block_size = BLOCK
        one._start = lambda: None
        one._describe(SimpleNamespace(model_id="", lossy_kv="none"))
        return one

    yield made
    sys.modules.pop(name, None)


def test_only_our_own_ranks_tell_the_layers_of_all_stages(connector: Any, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's `MultiConnector` passes on what the first of its connectors has reported, on engines with one stage, too."""
    one = connector("bind_gpu_block_pool", "set_xfer_handshake_metadata_pp_aware")
    handshake = vars(sys.modules[type(one).__module__])["LMCacheHandshake"]
    assert one._kv is None and not caplog.messages
    one.set_xfer_handshake_metadata_pp_aware({(0, 0): SimpleNamespace(agent="another's")})
    assert "the first place in MultiConnector" in caplog.text
    window = one._kv_cache_config.kv_cache_groups[1].kv_cache_spec
    stages = [[{full: FULL}, {sliding: window}] for full, sliding in (("l.2", "l.0"), ("l.5", "l.3"))]
    one.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake(stages), (1, 0): handshake(stages)})
    assert one._kv is not None and len(one._kv.groups) == 2
    one._vllm_config.parallel_config.pipeline_parallel_size = 1
    caplog.clear()
    one.set_xfer_handshake_metadata_pp_aware({(0, 0): SimpleNamespace(agent="another's")})
    assert not caplog.messages


@pytest.mark.parametrize("drafts", [False, True])
def test_with_a_draft_model_no_forward_waits_layer_by_layer(
    connector: Any, monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    """A forward that does not call for a drafter's layers would make the load fail."""
    one, made = connector("bind_gpu_block_pool"), []
    module = type(one).__module__
    registered = [SimpleNamespace(paged=SimpleNamespace(planes=[0, 1]))]
    monkeypatch.setattr(f"{module}.describe_rank", lambda *_: (0, [], registered))
    monkeypatch.setattr(f"{module}.WorkerSession", lambda *_: None)
    monkeypatch.setattr(f"{module}.WorkerSide", lambda *_, **more: made.append(more["layers"]))
    one._vllm_config.speculative_config = SimpleNamespace(draft_model_config=object()) if drafts else None
    one._kv = SimpleNamespace(groups=[], others=(), layer_names=["l.0"], fails_by_request=False)
    one._settings = SimpleNamespace(endpoint=lambda *_: None, config=SimpleNamespace(use_layerwise=True))
    one._instance, one._synchronous = "engine", "auto"
    one._attach({})
    assert (made[0] is None) is drafts


def test_a_scheduler_that_took_layers_for_alike_stops(connector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first stage are, and it is told of no others."""
    one, stopped = connector("bind_gpu_block_pool", "set_xfer_handshake_metadata_pp_aware"), []
    handshake = vars(sys.modules[type(one).__module__])["LMCacheHandshake"]
    indices = SimpleNamespace(get_pp_indices=lambda layers, stage, size: (stage, stage + 1))
    monkeypatch.setitem(sys.modules, "vllm.distributed.utils", indices)
    one._kv_cache_config = cache_config(FULL)
    one._describe(one._settings)
    assert one._kv is not None
    one._scheduler = SimpleNamespace(requests=SimpleNamespace(stop=stopped.append))
    one.set_xfer_handshake_metadata_pp_aware({(0, 0): SimpleNamespace(agent="another's")})
    assert not stopped
    one.set_xfer_handshake_metadata_pp_aware({(1, 0): handshake([[{"l.0": FULL}], [{"l.1": FULL}]])})
    assert "use other stages" in stopped[0]


def test_a_release_that_passes_no_layers_of_stages_on_is_refused(
    connector: Any, caplog: pytest.LogCaptureFixture
) -> None:
    connector("bind_gpu_block_pool")
    assert "need a later release of vLLM" in caplog.text


@pytest.mark.parametrize(("synchronous", "groups"), [(True, 1), (False, 1), (False, 2)])
def test_a_rank_whose_weights_are_unknown_fails_loads_as_the_scheduler_expects(
    connector: Any, synchronous: bool, groups: int
) -> None:
    """vLLM ends if it is told of a load within a step that it has arrived, or of blocks of a model with several groups."""
    session = Session(present=4)
    tables = [GroupTable(BLOCK), GroupTable(BLOCK, BLOCK)][:groups]
    scheduler = SchedulerSide(session, tables, 1, numbers=range(groups), synchronous="auto" if synchronous else "never")  # type: ignore[arg-type]
    scheduler.transferred(report=StepReport(mapped={0: (0, session.epoch)}))
    request, poll = Request("a", list(range(100))), session.poll
    session.poll = lambda *a, **more: (hit := poll(*a, **more)) and hit._replace(others=(hit,) * (groups - 1))  # type: ignore
    gain = scheduler.match(request, 0)
    scheduler.allocated(request, ([7],) * groups, gain or 0)
    rank = connector("bind_gpu_block_pool", "set_xfer_handshake_metadata_pp_aware")  # it knows of no weights
    rank._role, metadata = 0, vars(sys.modules[type(rank).__module__])["LMCacheMetadata"]
    rank._connector_metadata = metadata(scheduler.plan_step(step()))
    received, blocks = rank.get_finished(set())[1], rank.get_block_ids_with_load_errors()
    assert received == (None if synchronous else {"a"})
    assert blocks == ({7} if groups == 1 else set())
    assert rank.get_transfer_results(set()).failed_recving == (set() if groups == 1 else {"a"})
    report = rank.build_connector_worker_meta()
    assert (report.report.loaded if report is not None else {}) == ({"load-1": 1} if synchronous else {})


def test_models_that_are_not_served_are_named(weights: Path) -> None:
    config = vllm_config(str(weights))
    state = MambaSpec(**vars(FULL))
    with pytest.raises(LayoutError, match="Mamba states kept in mode 'none'"):
        describe_model(config, cache_config(FULL, state))
    with pytest.raises(LayoutError, match="nvfp4"):
        describe_model(vllm_config(str(weights), cache_dtype="nvfp4"), cache_config(FULL))
    with pytest.raises(LayoutError, match=r"lmcache\.mp\.model_id"):
        describe_model(vllm_config("some/repository"), cache_config(FULL))
    assert describe_model(vllm_config("some/repository"), cache_config(FULL), "mine").layout(1).model_id == "mine"
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(LayoutError, match="decode_context_parallel_size=2"):
        describe_model(config, cache_config(FULL))
    config = vllm_config(str(weights))
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(LayoutError, match="--calculate-kv-scales"):
        describe_model(config, cache_config(FULL))
    config = vllm_config(str(weights))
    config.model_config.model_weights = "s3://bucket/weights"
    with pytest.raises(LayoutError, match=r"streamed from .*lmcache\.mp\.model_id"):
        describe_model(config, cache_config(FULL))


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's platform, of a GPU whose e4m3 is that of the OCP."""
    made = SimpleNamespace(is_fp8_fnuz=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=made))
    return made


def test_each_kv_dtype_is_another_layout(weights: Path, platform: SimpleNamespace) -> None:
    def layout(cache_dtype: str, dtype: str = "torch.uint8") -> Any:
        spec = FullAttentionSpec(block_size=128, head_size=64, head_size_v=64, dtype=dtype)
        config = vllm_config(str(weights), cache_dtype=cache_dtype)
        return structs.replace(describe_model(config, cache_config(spec), "mine").layout(16), config_digest="")

    layouts = [layout(one) for one in ("fp8", "fp8_e5m2", "fp8_per_token_head", "int4_per_token_head")]
    layouts += [layout("int8_per_token_head", "torch.int8"), layout("auto", "torch.bfloat16")]
    assert [one.head_size for one in layouts] == [64, 64, 68, 36, 68, 64], "a scale lies behind each head"
    assert [bool(one.kv_scales) for one in layouts] == [False, False, True, True, True, False]
    assert len({one.fingerprint for one in layouts}) == len(layouts)
    before = layouts[0].fingerprint, layouts[2].fingerprint
    platform.is_fp8_fnuz = lambda: True
    after = layout("fp8").fingerprint, layout("fp8_per_token_head").fingerprint
    assert len({*before, *after}) == 4, "the same bits are other numbers there"


def test_layers_that_are_exempt_from_quantization_have_their_own_dtype(
    weights: Path, platform: SimpleNamespace
) -> None:
    config = vllm_config(str(weights), cache_dtype="fp8")
    plain = FullAttentionSpec(block_size=128, head_size=64, head_size_v=64, dtype="torch.bfloat16")
    with pytest.raises(LayoutError, match=r"'fp8' \(kept as bfloat16\)"):
        describe_model(config, cache_config(plain))
    config.cache_config.kv_cache_dtype_skip_layers = ["sliding_window"]
    assert describe_model(config, cache_config(plain)).model.kv_dtype == "bfloat16"


def layers_with(**more: Any) -> Any:
    """Layer a, and one that shares its KV."""
    layers = {name: SimpleNamespace(**more, kv_sharing_target_layer_name=of) for name, of in (("a", None), ("b", "a"))}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_kernels_that_keep_other_numbers_under_the_name_of_a_dtype_are_refused() -> None:
    def layer(backend: str) -> Any:
        return layers_with(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend))

    refuse_other_numbers(layer("FLASHINFER"), ["a"])
    with pytest.raises(LayoutError, match=r"TRITON_ATTN .*e5m2"):
        refuse_other_numbers(layer("TRITON_ATTN"), ["a"])
    both = layer("FLASHINFER")  # of the draft model's layer
    both.compilation_config.static_forward_context |= {
        "b": layer("TRITON_ATTN").compilation_config.static_forward_context["a"]
    }
    with pytest.raises(LayoutError, match=r"TRITON_ATTN .*e5m2"):
        refuse_other_numbers(both, ["a", "b"])


def test_scales_that_lie_elsewhere_are_refused() -> None:
    """vLLM 0.25 with VLLM_KV_CACHE_LAYOUT=HND takes the memory of its blocks for one of another order."""
    blocks, heads, tokens, dims = 5, 3, 4, 12
    array = np.zeros((blocks, 2, heads, tokens, dims), dtype=np.int8)
    whole = Tensor(array.transpose(0, 1, 3, 2, 4))
    paged = replace(describe_tensors([whole], Shape(heads, dims, tokens, False), blocks).paged, device="cpu")
    scales = array[..., dims - 4 :].view(np.float32)[..., 0]  # [block, K and V, head, token]
    keys, values = (Tensor(scales[:, part].transpose(0, 2, 1)) for part in (0, 1))
    made: list[Any] = []

    def own(keys: Any) -> None:
        kernel = SimpleNamespace(_k_scale_cache=keys, _v_scale_cache=values, _ensure_scale_caches=made.append)
        own_scales(layers_with(impl=kernel), ["a"], [whole], paged)

    own(keys)
    assert made == [whole, whole], "each layer has views of its own"
    with pytest.raises(LayoutError, match="VLLM_KV_CACHE_LAYOUT=NHD"):
        own(Tensor(scales[:, 0]))


def name_of(path: object) -> str:
    found = path_identity(str(path))
    assert found is not None
    return found.name


def test_identity_of_a_directory_is_its_content(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    for file in weights.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert name_of(copy) == name_of(weights) != ""
    (copy / "config.json").write_text('{"a": 1}')
    assert name_of(copy) != name_of(weights)
    assert path_identity("no/such/directory") is None
    copied = copy / "model.safetensors"
    for place in (0, 17, 50_001, copied.stat().st_size - 1):
        shutil.copy(weights / "model.safetensors", copied)
        before = name_of(copy)
        with copied.open("r+b") as file:
            file.seek(place)
            changed = bytes([file.read(1)[0] ^ 1])
            file.seek(place)
            file.write(changed)
        identity._finding.cache_clear()  # the clock of a file system may not have moved since
        assert name_of(copy) != before, f"byte {place} counts"


def test_identity_of_a_snapshot_is_its_commit(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--org--name" / "snapshots" / ("a" * 40),
        tmp_path / "models--org--name" / "blobs",
    )
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "b10b").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / "b10b")
    assert name_of(snapshot) == "org/name@" + "a" * 40
    own = snapshot / "config.json"
    own.write_text("{}")
    assert name_of(snapshot).startswith("files:"), "somebody's own file is none of the commit's"
    own.unlink()
    config = SimpleNamespace(model="org/name", model_weights="", hf_config=SimpleNamespace(_commit_hash="a" * 40))
    assert model_identity(config, "auto", "e").name == "org/name@" + "a" * 40
    config.hf_config_path = "another/repository"
    with pytest.raises(LayoutError, match="commit"):
        model_identity(config, "auto", "e")


@pytest.mark.parametrize(
    ("served", "other"),
    [
        (".", "modeling_x.py"),
        (".", "model.safetensors.index.json"),
        (".", "preprocessor_config.json"),
        (".", "vision/model.safetensors"),
        ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"),
    ],
)
def test_whatever_else_an_engine_reads_counts(tmp_path: Path, served: str, other: str) -> None:
    names = set()
    for content in ("one", "two", "two"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / other).parent.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "m-00001-of-00002.gguf").write_bytes(b"weights")
        (folder / other).write_text(content)
        (folder / ".git").write_text(folder.name)
        names.add(name_of(folder / served))
    assert len(names) == 2, "another content is another model, and a copy is the same"


def test_digest_of_the_configuration_has_no_addresses(weights: Path) -> None:
    one, two = (vllm_config(str(weights), hf={"object": object()}) for _ in range(2))
    assert config_digest(one) == config_digest(two)


def transfer(**extra: Any) -> Any:
    return SimpleNamespace(
        get_from_extra_config=lambda name, default: extra.get(name.removeprefix("lmcache.mp."), default)
    )


@pytest.mark.parametrize(
    ("value", "host"),
    [("tcp://localhost", "localhost"), ("localhost", "localhost"), ("10.0.0.5", "10.0.0.5"), ("tcp://[::1]", "[::1]")],
)
def test_hosts(value: str, host: str) -> None:
    assert parse_host(value) == host


def test_settings() -> None:
    settings = read_settings(transfer(host="example", port="6555", mq_timeout="1.5", mp_transfer_mode="lmcache_driven"))
    endpoint = settings.endpoint("engine", "worker", 3)
    assert (endpoint.address, endpoint.deadline_seconds) == ("tcp://example:6555", 1.5)
    assert (settings.transfer_mode, settings.synchronous_loads) == ("auto", "auto")
    assert read_settings(transfer(synchronous_loads="never")).synchronous_loads == "never"
    assert read_settings(transfer()).endpoint("e", "scheduler").address == "tcp://localhost:5555"


def test_a_heartbeat_is_never_slower_than_a_server_is_patient() -> None:
    for told, used in ((1, 1.0), (10, 10.0), (60, 10.0)):
        assert read_settings(transfer(heartbeat_interval=told)).endpoint("e", "worker").heartbeat_seconds == used


def test_a_setting_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(settings_of_vllm.logger, "warning", lambda text, *words: told.append(text % words))
    config = transfer()
    config.kv_connector_extra_config = {"lmcache.mp.prt": 5, "lmcache.mp.port": 5, "lmcache.chunk_size": 8, "other": 1}
    read_settings(config)
    assert told == [
        "kv_connector_extra_config lmcache.mp.prt is not a setting and is ignored: did you mean lmcache.mp.port?"
    ]


@pytest.mark.parametrize(
    "extra",
    [
        {"port": "x"},
        {"port": 0},
        {"host": "ipc:///x"},
        {"host": "a:1"},
        {"mq_timeout": -1},
        {"mq_timeout": 3600},
        {"mp_transfer_mode": "fast"},
        {"synchronous_loads": "always"},
    ],
)
def test_settings_that_cannot_be_used_are_named(extra: dict[str, Any]) -> None:
    (name, value), *_ = extra.items()
    with pytest.raises(ConfigError, match=rf"lmcache\.mp\.{name} is .*{value}"):
        read_settings(transfer(**extra))


def test_vllms_own_class_does_not_start_with_a_setting_that_cannot_be_used() -> None:
    vllm_config, kv_cache_config = SimpleNamespace(kv_transfer_config=transfer(port="x")), object()
    with pytest.raises(ConfigError, match=r"lmcache\.mp\.port is 'x'"):
        adapter.LMCacheMPWorkerAdapter("tcp://localhost:5555")
    assert vllm_config and kv_cache_config, "the adapter takes both from this frame"


def test_failed_loads_are_recomputed() -> None:
    config = SimpleNamespace(kv_load_failure_policy="fail")
    recompute_failed_loads(config)
    assert config.kv_load_failure_policy == "recompute"


def test_an_engine_that_is_not_understood_is_refused_with_a_reason() -> None:
    try:
        describe_model(SimpleNamespace(), cache_config(FULL))
    except NOT_SERVED as error:
        assert "not understood" in refusal_of(error, "vLLM")
    assert refusal_of(LayoutError("so it is"), "vLLM") == "so it is"


# Which loads are part of a step


def mapped(session: Session, ranks: int = 1) -> SchedulerSide:
    """A scheduler of a daemon's engine whose ranks have mapped the arena."""
    scheduler = half(session, ranks=ranks, synchronous="auto")
    scheduler.transferred(report=StepReport(mapped=dict.fromkeys(range(ranks), (0, session.epoch))))
    return scheduler


def decode(scheduler: SchedulerSide, name: str = "decode") -> Request:
    """A request that runs, of a prompt that nobody has."""
    session: Any = scheduler.requests.session
    present, session.present = session.present, 0
    request = Request(name, list(range(20)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([90],), 0)
    scheduler.plan_step(step({name: 20}))
    session.present = present
    return request


def offered(scheduler: SchedulerSide, request: Request) -> tuple[int | None, bool]:
    """Tokens that the request can load, and whether its first step does so."""
    return scheduler.match(request, 0), scheduler.is_synchronous(request)


def load(scheduler: SchedulerSide, request: Request, seconds: float) -> None:
    """Load the request's hit, which takes so long, and end the request."""
    scheduler.allocated(request, (list(range(50)),), scheduler.match(request, 0) or 0)
    (planned,) = scheduler.plan_step(step({request.request_id: 1} if scheduler.is_synchronous(request) else {})).loads
    report = StepReport({}, {planned.job_id: 1} if planned.synchronous else {}, {planned.job_id: seconds})
    scheduler.transferred([] if planned.synchronous else [request.request_id], report=report)
    scheduler.finished(request)


def test_the_load_of_a_request_that_is_alone_is_part_of_its_first_step() -> None:
    session, ranks = Session(present=40), Ranks()
    scheduler, request, worker = mapped(session), Request("a", list(range(640))), rank(ranks)
    assert offered(scheduler, request) == (639, True), "the last token is computed in the same step"
    scheduler.allocated(request, (list(range(5)),), 639)
    plan = scheduler.plan_step(step({"a": 1}))
    worker.start_loads(plan)
    ranks.done = [Done(plan.loads[0].job_id, "load", True, 639, 0.001)]
    worker.wait_before_forward(object())
    assert worker.finished(plan) == (set(), set()), "vLLM asserts that nobody waits for this load"
    scheduler.transferred(report=worker.take_report())
    assert not session.leased


def test_a_long_load_beside_a_decode_and_behind_another_load_is_not_part_of_a_step() -> None:
    session, ranks = Session(present=40), Ranks()
    scheduler, worker = mapped(session), rank(ranks)
    first = Request("first", list(range(640)))
    assert offered(scheduler, first) == (639, True)
    scheduler.allocated(first, (list(range(5)),), 639)
    second = Request("second", list(range(700)))
    assert offered(scheduler, second) == (640, False), "the first one's forward would wait for both"
    scheduler.allocated(second, (list(range(5, 11)),), 640)
    plan = scheduler.plan_step(step({"first": 1}))
    assert [one.synchronous for one in plan.loads] == [True, False]
    worker.start_loads(plan)
    ranks.done = [Done(plan.loads[0].job_id, "load", True, 639, 0.1)]
    ranks.wait_finished = lambda seconds: pytest.fail("the forward waits for the second load")  # type: ignore[assignment]
    worker.wait_before_forward(object())
    assert not ranks.done, "the forward has waited for the first load"
    scheduler.transferred(report=worker.take_report())
    ranks.done = [Done(plan.loads[1].job_id, "load", True, 640, 0.1)]
    assert worker.finished(plan) == (set(), {"second"})
    scheduler.transferred(["second"], report=worker.take_report())
    assert offered(scheduler, Request("third", list(range(700)))) == (640, False), "the first one runs"
    scheduler.finished(first)
    assert offered(scheduler, Request("fourth", list(range(700)))) == (640, True)


def test_a_long_load_does_not_hold_up_a_prompt_that_begins_in_the_same_step() -> None:
    session = Session()
    scheduler, new = mapped(session), Request("new", list(range(700)))
    assert scheduler.match(new, 0) == 0
    scheduler.allocated(new, (list(range(6)),), 0)
    session.present = 40
    assert offered(scheduler, Request("hit", list(range(1, 701)))) == (640, False)


def test_a_short_load_is_part_of_a_step_even_beside_a_decode() -> None:
    session = Session(present=40)
    scheduler = mapped(session)
    running = decode(scheduler)
    assert offered(scheduler, Request("unknown pace", list(range(700)))) == (640, False)
    scheduler.finished(running)
    load(scheduler, Request("slow", list(range(700))), 0.003)
    running = decode(scheduler)
    assert offered(scheduler, Request("too long", list(range(700)))) == (640, False)
    scheduler.finished(running)
    load(scheduler, Request("fast", list(range(700))), 0.001)
    decode(scheduler)
    request = Request("short", list(range(700)))
    assert offered(scheduler, request) == (640, True)
    scheduler.allocated(request, (list(range(6)),), 640)
    assert offered(scheduler, Request("short, twice", list(range(700)))) == (640, True)
    session.present = 80
    assert offered(scheduler, Request("with the other", list(range(1300)))) == (1280, False)


def test_no_load_is_part_of_a_step_unless_all_ranks_have_mapped_its_arena() -> None:
    """vLLM's newer model runner does not recover from such a load that fails."""
    session = Session(present=40)
    scheduler = half(session, ranks=2, synchronous="auto")
    workers = [rank(Ranks(), number=number) for number in range(2)]

    def answer(asked: int) -> None:
        plan = scheduler.plan_step(step())
        assert plan.asked == asked
        for worker in workers:
            worker.start_loads(plan)
            scheduler.transferred(report=worker.take_report())

    assert offered(scheduler, Request("a", list(range(700)))) == (640, False)
    workers[0].start_loads(scheduler.plan_step(step()))
    scheduler.transferred(report=workers[0].take_report())
    assert offered(scheduler, Request("b", list(range(700)))) == (640, False), "one of two"
    answer(0)
    assert offered(scheduler, Request("c", list(range(700)))) == (640, True)
    scheduler.ask_ranks()
    assert offered(scheduler, Request("d", list(range(700)))) == (640, False)
    scheduler.transferred(report=StepReport(mapped=dict.fromkeys(range(2), (0, session.epoch))))
    assert offered(scheduler, Request("e", list(range(700)))) == (640, False), "an answer from before"
    answer(1)
    assert offered(scheduler, Request("f", list(range(700)))) == (640, True)
    workers[1]._session.mapped_epoch = b""  # type: ignore[misc]
    answer(1)
    assert offered(scheduler, Request("g", list(range(700)))) == (640, False)
    answer(2)
    workers[1]._session.mapped_epoch = session.epoch = b"server 2"  # type: ignore[misc]
    answer(2)
    assert offered(scheduler, Request("h", list(range(700)))) == (640, False), "the other one has the old arena"


def test_ranks_that_are_called_are_asked_again(core: Core) -> None:
    """Such a call may have given them other weights, with which they fail the load of the next step."""
    asked = core.connector.plan_step(step()).asked
    core.collective_rpc("reload_weights")
    assert core.connector.plan_step(step()).asked == asked + 1


def test_a_step_that_waits_for_a_load_does_not_measure_prefill() -> None:
    session = Session(present=40)
    scheduler, request = mapped(session), Request("a", list(range(1000)))
    assert offered(scheduler, request) == (640, True)
    scheduler.allocated(request, (list(range(8)),), 640)
    scheduler.plan_step(step({"a": 360}))
    session.now += 3.6
    scheduler.plan_step(step({"a": 1}))
    assert scheduler.requests.prefill.tokens_per_second == 0


def test_a_forward_waits_on_ranks_that_have_layers_of_a_further_group_only() -> None:
    """Layers of one table of blocks whose KV differs in shape are several groups, and a pipeline's stage may lack the first."""
    session, stage = Session(present=4), Ranks()
    tables = [GroupTable(BLOCK), GroupTable(BLOCK)]
    scheduler = SchedulerSide(session, tables, 1, numbers=(0, 0), synchronous="auto")  # type: ignore[arg-type]
    scheduler.transferred(report=StepReport(mapped={0: (0, session.epoch)}))
    request, poll = Request("a", list(range(100))), session.poll
    session.poll = lambda *a, **more: (hit := poll(*a, **more)) and hit._replace(others=(hit,))  # type: ignore
    assert offered(scheduler, request) == (64, True)
    scheduler.allocated(request, ([7],), 64)
    plan = pickle.loads(pickle.dumps(scheduler.plan_step(step({"a": 36}))))
    worker = rank(stage, held=[1])
    worker.start_loads(plan)
    stage.done = [Done(plan.loads[0].job_id, "load", True, 64, 0.001)]
    worker.wait_before_forward(object())
    assert not stage.done, "the forward has waited"
    assert worker.finished(plan) == (set(), set()), "vLLM asserts that nobody waits for this load"
    assert worker.take_report().loaded == {plan.loads[0].job_id: 1}


def test_a_load_within_a_step_outlasts_its_server(server: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before may take longer than a server's restart, and vLLM does not recover from a load that fails."""
    monkeypatch.setattr("lmcache.engine.worker.GONE_SECONDS", 3000.0)
    cache, ids = server(), list(range(7, 648))
    one = engine(cache)
    one.store(ids[:640])
    paged = SimpleNamespace(block_tokens=16, device="cpu", token_bytes=1)
    worker = WorkerSide(one.worker, [Registered(paged, 1)], [0])  # type: ignore[arg-type]
    scheduler = SchedulerSide(one.scheduler, [GroupTable(16)], 1, synchronous="auto")

    def run(scheduled: dict[str, int] | None = None) -> StepPlan:
        plan = scheduler.plan_step(step(scheduled))
        worker.start_loads(plan)
        worker.wait_before_forward(object())
        scheduler.transferred(invalid_blocks=worker.take_invalid_blocks(), report=worker.take_report())
        return plan

    run()
    request = Request("a", ids)
    assert offered(scheduler, request) == (640, True)
    epoch = one.worker.mapped_epoch
    scheduler.allocated(request, (one.table(640),), 640)
    one.poison()
    cache.kill()
    server(port=cache.port)
    eventually(lambda: one.worker.mapped_epoch != epoch)
    assert [load.synchronous for load in run({"a": 1}).loads] == [True]
    assert not worker.failed_loads and one.right(ids, 0, 640)
    scheduler.finished(request)
    run()
    eventually(lambda: one.worker.mapped_epoch)
    run()
    assert scheduler._mapped == {0: one.worker.mapped_epoch}


def test_ranks_whose_loads_may_fail_keep_no_arena_mapped() -> None:
    ranks, kept = Ranks(), []
    ranks.count_on_arena = lambda: kept.append(True) or b"server 1"  # type: ignore[method-assign, return-value]
    worker, scheduler = rank(ranks), half(Session(), synchronous="never")
    scheduler.ask_ranks()
    worker.start_loads(scheduler.plan_step(step()))
    assert not worker.take_report() and not kept


def test_a_rank_keeps_its_arena_through_a_step_without_a_plan() -> None:
    """vLLM begins it without the scheduler's metadata."""
    ranks, released, session = Ranks(), [], Session()
    ranks.count_on_nothing = lambda: released.append(True)  # type: ignore[method-assign]
    worker, scheduler = rank(ranks), mapped(session)
    worker.start_loads(scheduler.plan_step(step()))
    scheduler.transferred(report=worker.take_report())
    worker.start_loads(StepPlan())
    assert not worker.take_report() and not released
    scheduler.ask_ranks()
    worker.start_loads(scheduler.plan_step(step()))
    assert released
