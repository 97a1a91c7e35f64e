"""Hand-overs under vLLM: what is announced, stored and looked up for whom, and what routers are told. And with a real server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

from engine_process import Engine
from lmcache.engine import Hit, Loading
from lmcache.integration.vllm import handover
from lmcache.integration.vllm.handover import HandOver, answer, asked
from servers import Server, eventually
from test_engine import prompt
from test_requests import CHUNK, Bed
from test_vllm_units import Request, Session, half, step

ASKED = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
Servers, Engines = Callable[..., Server], Callable[..., Engine]


@pytest.mark.parametrize(
    ("params", "loads", "stores", "wanted"),
    [
        (None, True, True, HandOver()),
        (None, False, True, HandOver(gives=True)),
        (None, True, False, HandOver(takes=True)),
        ({"do_remote_decode": True}, True, True, HandOver(gives=True)),
        ({"do_remote_prefill": True}, True, True, HandOver(takes=True)),
        ({"lmcache": None}, True, True, HandOver(takes=True)),
        ({"do_remote_prefill": True}, False, True, HandOver(gives=True)),
        ({"do_remote_decode": True}, True, False, HandOver(takes=True)),
        ({"do_remote_decode": True, "do_remote_prefill": True}, True, True, HandOver(gives=True)),
        ({"ret_first_tok": True}, True, True, HandOver(gives=True, first_token=True)),
        ([1], True, True, HandOver()),
        ("do_remote_decode", True, True, HandOver()),
    ],
)
def test_what_roles_and_parameters_ask_for(params: Any, loads: bool, stores: bool, wanted: HandOver) -> None:
    found = asked(params, loads=loads, stores=stores)
    assert found == wanted
    assert found.tail_leaves == (None if found == HandOver() else 0 if found.gives and found.first_token else 1)


def test_what_routers_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    told = {"lmcache": {"v": 1, "tokens": 9}}
    assert answer(None, 9, [5]) is None and answer({}, 9, [5]) is None and answer(7, 9, [5]) is None
    assert answer(ASKED, 9, [5]) == {**told, "do_remote_prefill": True, "do_remote_decode": False}
    assert answer({"ret_first_tok": True}, 9, [5]) == {"first_tok": 5}
    assert answer({"ret_first_tok": True}, 9, []) is None
    assert "ret_first_tok" in caplog.text
    # Beside another connector, whose keys vLLM does not let us return again.
    monkeypatch.setitem(sys.modules, handover._MULTI, sys)
    assert answer(ASKED, 9, [5]) == told


def test_where_the_public_projects_proxies_send_kv_is_ignored_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(handover, "_told", set())
    for _ in range(3):
        asked({"ret_first_tok": True, "disagg_spec": {"receiver_host": "192.0.2.1"}}, loads=True, stores=True)
    assert caplog.text.count("disagg_spec is ignored") == 1


def test_a_producer_announces_its_prompt_with_the_tail_and_loads_nothing() -> None:
    session = Session(present=40)
    scheduler, request = half(session, can_load=False), Request("a", list(range(700)))
    assert scheduler.match(request, 0) == 0
    assert session.engines[-1] and session.tails == [(True, True)] and not session.leased
    scheduler.allocated(request, (list(range(11)),), 0)
    (store,) = scheduler.plan_step(step({"a": 700})).stores
    assert (store.first_chunk, store.chunks, store.end) == (0, 44, 699), "all but the last token"
    request.output_token_ids.append(7)
    assert scheduler.handed_over(request) is None, "nobody has asked"
    request.kv_transfer_params = ASKED
    told = scheduler.handed_over(request)
    assert told is not None and told["lmcache"] == {"v": 1, "tokens": 700}
    scheduler.finished(request)
    assert not session.withdrawn, "what the running stores bring is still promised"
    scheduler.requests.stored(store.job_id)
    assert session.withdrawn == ["a"], "a rank may have failed to store it"


@pytest.mark.parametrize(("length", "tail"), [(699, True), (701, True), (704, False), (705, False), (9, True)])
def test_a_tail_leaves_out_the_last_token(length: int, tail: bool) -> None:
    session = Session()
    scheduler, request = half(session, can_load=False), Request("a", list(range(length)))
    scheduler.match(request, 0)
    scheduler.allocated(request, (list(range(12)),), 0)
    (store,) = scheduler.plan_step(step({"a": length})).stores
    assert session.tails == [(tail, tail)]
    assert store.end == (length - 1 if tail else length // 16 * 16)


def test_with_the_first_token_told_the_tail_is_the_whole_prompt() -> None:
    """The decode engine's prompt is then one token longer, and it computes that one."""
    session = Session()
    scheduler, request = half(session), Request("a", list(range(705)))
    request.kv_transfer_params = {"ret_first_tok": True}
    scheduler.match(request, 0)
    scheduler.allocated(request, (list(range(12)),), 0)
    (store,) = scheduler.plan_step(step({"a": 705})).stores
    assert store.end == 705
    taken = Session(present=45)
    consumer = half(taken, can_store=False)
    assert consumer.match(Request("b", list(range(706))), 0) == 705
    assert taken.tails == [(True, False)] and taken.engines == [""]


def test_a_consumer_looks_for_the_tail_and_loads_what_another_engine_has_computed() -> None:
    session = Session(present=44)
    scheduler, request = half(session, can_store=False), Request("a", list(range(700)))
    assert scheduler.match(request, 0) == 699
    scheduler.allocated(request, (list(range(11)),), 699)
    (load,) = scheduler.plan_step(step()).loads
    assert (load.start_token, load.end_token) == (0, 699), "the rest of the tail's extent holds nothing"


def test_without_a_hand_over_there_is_no_tail() -> None:
    session = Session(present=44)
    scheduler, request = half(session), Request("a", list(range(700)))
    assert scheduler.match(request, 0) == 688 and session.tails == [(False, False)]
    other = Request("b", list(range(700)), kv_transfer_params={"do_remote_prefill": True})
    assert scheduler.match(other, 0) == 699 and session.tails[-1] == (True, False)


def test_what_is_announced_is_awaited_also_after_the_request_has_ended(server: Servers, engine: Engines) -> None:
    one = server(chunk=CHUNK, flags=("--l2-patience-seconds", "60"))
    gives = Bed(engine(one, instance="first"), name="first", loads=False)
    takes = Bed(engine(one, instance="other"), name="other", stores=False)
    gives.requests.prefill.tokens_per_second = takes.requests.prefill.tokens_per_second = 1.0
    ids = prompt(3, 200)

    def count(name: str) -> float:
        return one.counters()[name]

    request = gives.open("a", tail_leaves=1, stores_tail=True)
    assert gives.requests.find(request, ids) is None and count("promised_chunks") == 13
    assert count("missed_chunks_total") == 0, "what only announces counts nothing"
    later = takes.open("b", tail_leaves=1)
    assert takes.requests.find(later, ids) == Loading(0, 13)
    gives.engine.fill(ids)
    plan = gives.requests.store(request, ids, 200, ends=True)
    assert plan is not None and (plan.chunks, plan.end) == (13, 199)
    gives.requests.finish("a")
    assert takes.requests.find(takes.open("c", tail_leaves=1), ids) == Loading(0, 13), "its store is still to come"
    assert gives.copies.wait([gives.copies.store(plan, gives.engine.table(200))], 60.0)
    takes.now += 1.0
    found = takes.requests.find(later, ids)
    assert isinstance(found, Hit) and found.chunks == 13
    takes.engine.poison()
    copy = takes.copies.load(takes.requests.load(later, 0, 199), takes.engine.table(200))
    assert takes.copies.settle([copy], 60.0) and takes.engine.right(ids, 0, 199)
    for name in ("b", "c"):
        takes.requests.finish(name)
    eventually(lambda: not (count("promised_chunks") or count("leases") or count("fetches_open")))
    assert count("hit_chunks_total") == 13


def test_a_tail_that_is_only_looked_for_is_not_promised(server: Servers, engine: Engines) -> None:
    one = server(chunk=CHUNK)
    both = Bed(engine(one), name="both")
    assert both.requests.find(both.open("a", tail_leaves=1), prompt(3, 200)) is None
    assert one.counters()["promised_chunks"] == 12
    assert both.requests.find(both.open("b", tail_leaves=1, stores_tail=True), prompt(4, 200)) is None
    assert one.counters()["promised_chunks"] == 25
    for name in "ab":
        both.requests.finish(name)
    eventually(lambda: not one.counters()["promised_chunks"])


def test_what_a_rank_could_not_store_is_promised_no_more(server: Servers, engine: Engines) -> None:
    one = server(chunk=CHUNK)
    gives, ids = Bed(engine(one), name="first", loads=False), prompt(3, 200)
    gives.requests.prefill.tokens_per_second = 0.01  # so that the promise would last
    request = gives.open("a", tail_leaves=1, stores_tail=True)
    gives.requests.find(request, ids)
    plan = gives.requests.store(request, ids, 200, ends=True)
    gives.requests.finish("a")
    assert plan is not None and one.counters()["promised_chunks"] == 13
    gives.requests.stored(plan.job_id)  # the rank reports its end without having stored anything
    eventually(lambda: not one.counters()["promised_chunks"])


def test_what_a_rank_could_not_store_before_the_request_ended_is_promised_no_more(
    server: Servers, engine: Engines
) -> None:
    one = server(chunk=CHUNK)
    gives, ids = Bed(engine(one), name="first", loads=False), prompt(3, 200)
    gives.requests.prefill.tokens_per_second = 0.01  # so that the promise would last
    request = gives.open("a", tail_leaves=1, stores_tail=True)
    gives.requests.find(request, ids)
    plan = gives.requests.store(request, ids, 200, ends=True)
    assert plan is not None and one.counters()["promised_chunks"] == 13
    gives.requests.stored(plan.job_id)  # the rank reports its end without having stored anything
    gives.requests.finish("a")
    eventually(lambda: not one.counters()["promised_chunks"])
