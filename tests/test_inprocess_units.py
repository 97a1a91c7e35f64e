"""In-process mode's rules of planning, without vLLM: loads within the step, unfull chunks, what is stored and what is told."""

from __future__ import annotations

import logging
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.config.engine import EngineConfig
from lmcache.engine import Done
from lmcache.engine.endpoint import server_address
from lmcache.engine.settings import ServerSettings
from lmcache.integration.vllm import own_server
from lmcache.integration.vllm.plan import StepReport
from ports import free_port
from servers import unresolved
from test_vllm_units import Ranks, Request, Session, half, rank, step


def in_process(session: Session, ranks: int = 1, **settings: Any) -> Any:
    side = half(session, synchronous="always", logs=True, ranks=ranks, config=EngineConfig(**settings))
    side.transferred(report=StepReport(mapped=dict.fromkeys(range(ranks), (0, session.epoch))))
    return side


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """What our loggers have said; they do not propagate by themselves."""
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lmcache")
    return caplog


def test_a_load_is_part_of_the_step_and_its_blocks_come_with_it() -> None:
    session = Session(present=4)
    scheduler, request = in_process(session), Request("a", list(range(100)))
    assert scheduler.match(request, 0) == 64
    scheduler.allocated(request, ([],), 64)
    plan = scheduler.plan_step(step({"a": 36}, new={"a": [7]}))
    (load,) = plan.loads
    assert (load.start_token, load.end_token, load.blocks, load.request_tokens) == (0, 64, [7], 100)
    assert session.leased
    scheduler.transferred(report=StepReport(loaded={load.job_id: 1}))
    assert not session.leased


def test_a_lease_ends_when_every_rank_has_loaded_even_where_the_request_loads_again_meanwhile() -> None:
    session = Session(present=4)
    scheduler, request = in_process(session, ranks=2), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    (first,) = scheduler.plan_step(step({"a": 36}, new={"a": [7]})).loads
    scheduler.transferred(report=StepReport(loaded={first.job_id: 1}))
    assert len(session.leased) == 1
    request.num_preemptions, request.num_computed_tokens = 1, 0
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    (second,) = scheduler.plan_step(step({"a": 36}, blocks={"a": [8]}, resumed=["a"])).loads
    assert second.blocks == [8] and len(session.leased) == 2
    scheduler.transferred(report=StepReport(loaded={first.job_id: 1}))
    assert len(session.leased) == 1
    scheduler.transferred(report=StepReport(loaded={second.job_id: 2}))
    assert not session.leased


def test_a_step_that_does_not_tell_the_blocks_is_an_error_and_no_wrong_answer() -> None:
    scheduler, request = in_process(Session(present=4)), Request("a", list(range(100)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    with pytest.raises(RuntimeError, match="has not given the blocks of request a"):
        scheduler.plan_step(step({"a": 36}))


def test_the_last_token_is_computed_whatever_is_there() -> None:
    scheduler = in_process(Session(present=40))
    assert scheduler.match(Request("whole chunks", list(range(64))), 0) == 63
    assert scheduler.match(Request("with a tail", list(range(70))), 0) == 69
    assert scheduler.match(Request("all but one is in the engine", list(range(65))), 64) == 0
    assert scheduler.match(Request("a few", list(range(70))), 64) == 5, "no step is lost, so a few are worth it"


def test_the_tail_of_a_prompt_is_stored_once_and_generated_tokens_are_not() -> None:
    scheduler, request = in_process(Session()), Request("a", list(range(70)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 0)
    assert not scheduler.plan_step(step({"a": 10}, new={"a": [3]})).stores, "no chunk is full, and it goes on"
    request.num_computed_tokens = 10
    (store,) = scheduler.plan_step(step({"a": 60})).stores
    assert (store.first_chunk, len(store.hashes) // 16, store.end_token, store.start, store.end) == (0, 5, 70, 0, 70)
    request.num_computed_tokens, request.all_token_ids = 70, list(range(90))
    for _ in range(2):
        assert not scheduler.plan_step(step({"a": 20})).stores


def test_a_chunk_that_becomes_full_hangs_on_the_full_one_before_it_not_on_the_tail() -> None:
    scheduler, request = in_process(Session(), save_decode_cache=True), Request("a", list(range(20)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 0)
    (first,) = scheduler.plan_step(step({"a": 20}, new={"a": [3]})).stores
    request.num_computed_tokens, request.all_token_ids = 20, list(range(32))
    (second,) = scheduler.plan_step(step({"a": 12})).stores
    assert second.first_chunk == 1 and second.parent == first.hashes[:16] and second.end_token == 0
    assert second.hashes != first.hashes[16:]


def test_a_prompt_shorter_than_a_chunk_is_a_tail_alone() -> None:
    session = Session()
    scheduler, request = in_process(session), Request("a", list(range(5)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 0)
    (store,) = scheduler.plan_step(step({"a": 5}, new={"a": [3]})).stores
    assert (store.first_chunk, len(store.hashes), store.start, store.end) == (0, 16, 0, 5)
    session.present = 1
    again = Request("b", list(range(5)))
    assert scheduler.match(again, 0) == 4
    scheduler.allocated(again, ([],), 4)
    plan = scheduler.plan_step(step({"b": 1}, new={"b": [4]}))
    assert (plan.loads[0].end_token, plan.stores) == (4, []), "what was a hit is not stored again"


def test_without_unfull_chunks_only_full_ones_are_stored() -> None:
    scheduler, request = in_process(Session(), save_unfull_chunk=False), Request("a", list(range(70)))
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 0)
    (store,) = scheduler.plan_step(step({"a": 70}, new={"a": [3]})).stores
    assert (len(store.hashes) // 16, store.end_token) == (4, 0)


def test_small_hits_and_low_priorities_are_left_alone_where_the_settings_say_so() -> None:
    scheduler = in_process(Session(present=2), min_retrieve_tokens=40, priority_limit=3)
    assert scheduler.match(Request("a", list(range(100))), 0) == 0
    assert in_process(Session(present=2)).match(Request("a", list(range(100))), 0) == 32
    late = Request("b", list(range(100)), priority=4)
    scheduler.match(late, 0)
    scheduler.allocated(late, ([],), 0)
    assert not scheduler.plan_step(step({"b": 100}, new={"b": [3]})).stores


def test_each_answer_is_told_once(said: Any) -> None:
    scheduler, request = in_process(Session(present=3)), Request("a", list(range(64)))
    for _ in range(3):
        scheduler.match(request, 32)
    assert [record.getMessage() for record in said.records] == [
        "Reqid: a, Total tokens 64, LMCache hit tokens: 48, need to load: 16"
    ]


def test_a_rank_waits_for_its_loads_and_tells_what_they_cost(said: Any) -> None:
    ranks = Ranks()
    scheduler, request = in_process(Session(present=4)), Request("a", list(range(100)))
    worker = rank(ranks, logs=True)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    request.num_computed_tokens = 64
    plan = scheduler.plan_step(step({"a": 36}, new={"a": [7]}))
    worker.start_loads(plan)
    ranks.done = [Done(plan.loads[0].job_id, "load", True, 64, 0.025)]
    worker.wait_loaded()
    assert worker.finished(plan) == (set(), set()), "vLLM asserts that nobody waits for this load"
    report = worker.take_report()
    assert (report.loaded, report.seconds) == ({plan.loads[0].job_id: 1}, {plan.loads[0].job_id: 0.025})
    worker.start_stores(plan)
    ranks.done = [Done(plan.stores[0].job_id, "store", True, 36, 0.009, 0.001)]
    worker.finished(plan)
    lines = [record.getMessage() for record in said.records]
    assert lines[1:] == [
        "Retrieved 64 out of 64 required tokens (from 100 total tokens)."
        " size: 0.0625 gb, cost 25.00 ms, throughput: 2.50 GB/s",
        "Storing KV cache for 36 out of 100 tokens (skip_leading_tokens=64) for request a",
        "Stored 36 out of total 36 tokens. size: 0.0352 gb, cost 10.00 ms, throughput: 3.52 GB/s;"
        " offload_time: 9.00 ms, put_time: 1.00 ms",
    ]


def test_a_failed_load_is_told_in_its_own_step_and_not_tried_again() -> None:
    session, ranks = Session(present=4), Ranks()
    scheduler, request = in_process(session), Request("a", list(range(100)))
    worker = rank(ranks)
    scheduler.match(request, 0)
    scheduler.allocated(request, ([],), 64)
    plan = scheduler.plan_step(step({"a": 36}, new={"a": [7]}))
    worker.start_loads(plan)
    ranks.done = [Done(plan.loads[0].job_id, "load", False, 0, 0.0)]
    worker.wait_loaded()
    invalid = worker.take_invalid_blocks()
    assert invalid == {7}
    scheduler.transferred(invalid_blocks=invalid, report=worker.take_report())
    assert not session.leased
    assert scheduler.match(request, 0) == 0


def test_reports_of_ranks_add_up() -> None:
    report = StepReport(loaded={"load-1": 1}, seconds={"load-1": 0.2}, mapped={0: (0, b"one")})
    report.merge(StepReport(loaded={"load-1": 1, "load-2": 1}, seconds={"load-1": 0.3}, mapped={1: (0, b"two")}))
    assert report and report.loaded == {"load-1": 2, "load-2": 1}
    assert report.seconds == {"load-1": 0.3}, "the slowest rank's"
    assert report.mapped == {0: (0, b"one"), 1: (0, b"two")}


def test_an_engine_says_why_it_starts_a_server_of_its_own(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That nobody is there is as it should be; that a name does not resolve is a mistake."""
    monkeypatch.setattr(own_server, "start_own_server", lambda *_: None)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_offloading_backend="lmcache", kv_offloading_size=0.5),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
    )
    kv: Any = SimpleNamespace(chunk_tokens=lambda tokens: tokens)
    for host, level, why in (
        ("127.0.0.1", logging.INFO, "refused"),
        ("no.such.host", logging.WARNING, "does not resolve: Name or service not known"),
    ):
        said.clear()
        assert own_server.server_for_offloading(
            "engine", config, ServerSettings(server_address(host, free_port())), kv
        ) == (None, "")
        (record,) = said.records
        assert record.levelno == level and why in record.message and "starting one of 0.5 GiB" in record.message
