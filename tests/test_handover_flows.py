"""Flows of routers, replayed: what each sends with a prompt to the first and to the second engine, and how much KV is handed over
by a real server. Their messages come through the connector's functions for request parameters, as under vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine_process import Engine
from lmcache.engine import Hit, Loading
from lmcache.integration.vllm.handover import answer, asked
from servers import PATIENCE, Server, eventually
from test_engine import prompt
from test_requests import CHUNK, Bed

Servers, Engines = Callable[..., Server], Callable[..., Engine]
TOKENS = 6 * CHUNK + 9
FULL, ALL = 6 * CHUNK, TOKENS - 1
"""Full chunks, and all tokens but the one that the second engine computes in any case."""
PRODUCER, CONSUMER, BOTH = {"loads": False}, {"stores": False}, dict[str, bool]()

NIXL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What `vllm-router`, and llm-d's sidecar with its connector `nixlv2`, add to the first engine's request."""
OF_NIXL = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[4, 5, 6]],
    "remote_engine_id": "9b4b4ff2-dd2b-4a1c-8f6d-2b8f8a5c8a7f",
    "remote_request_id": "cmpl-1",
    "remote_host": "192.0.2.9",
    "remote_port": 5600,
    "tp_size": 2,
    "remote_num_tokens": 105,
    "transfer_mode": "read",
}
"""What vLLM's NixlConnector, beside ours in a MultiConnector, answers and the router passes on."""


def verbatim(told: dict[str, Any] | None) -> Any:
    """Routers pass on what the first engine has answered, as JSON."""
    return json.loads(json.dumps(told))


def nothing(told: dict[str, Any] | None) -> Any:
    return None


def empty(told: dict[str, Any] | None) -> Any:
    return {}


def beside_nixl(told: dict[str, Any] | None) -> Any:
    """MultiConnector joins the answers of its connectors."""
    return verbatim((told or {}) | OF_NIXL)


def stale(told: dict[str, Any] | None) -> Any:
    """The answer to another request, of another engine and version."""
    return OF_NIXL | {"lmcache": {"v": 7, "tokens": 1 << 40, "server": "192.0.2.1:1", "peer": ["?"]}}


FLOWS: dict[str, tuple[Any, Callable[[dict[str, Any] | None], Any]]] = {
    "llm-d nixlv2": (NIXL, verbatim),
    "llm-d nixlv2, MultiConnector": (NIXL, beside_nixl),
    "llm-d nixlv2, the answer's parameters are lost": (NIXL, nothing),
    "llm-d shared storage": (None, nothing),
    "Dynamo": ({}, empty),
    "a stale answer": (NIXL, stale),
}
ROLES = {"one role each": (PRODUCER, CONSUMER), "both": (BOTH, BOTH)}
ONLY_FULL = {
    ("both", "llm-d nixlv2, the answer's parameters are lost"),
    ("both", "llm-d shared storage"),
    ("both", "Dynamo"),
}
"""Engines of both roles store and look for the tail only when they are told to."""


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("roles", ROLES)
def test_a_router_hands_a_prompt_over(server: Servers, engine: Engines, roles: str, flow: str) -> None:
    one = server(chunk=CHUNK)
    first_role, second_role = ROLES[roles]
    params, passed_on = FLOWS[flow]
    gives = Bed(engine(one, instance="first"), name="first", **first_role)
    takes = Bed(engine(one, instance="second"), name="second", **second_role)
    ids = prompt(3, TOKENS)

    wanted = asked(verbatim(params), loads=first_role.get("loads", True), stores=True)
    request = gives.open("p", tail_leaves=wanted.tail_leaves, stores_tail=wanted.gives)
    gives.requests.find(request, ids)
    gives.store(request, ids, ends=True)
    gives.requests.finish("p")
    told = answer(verbatim(params), TOKENS, [7])
    assert (told is not None) == (params is NIXL)

    wanted = asked(passed_on(told), loads=True, stores=second_role.get("stores", True))
    request = takes.open("d", tail_leaves=wanted.tail_leaves, stores_tail=wanted.gives)

    def found() -> Any:
        takes.now += 0.05
        hit = takes.requests.find(request, ids)
        return None if isinstance(hit, Loading) else hit

    assert isinstance(eventually(found, PATIENCE), Hit)
    takes.engine.poison()
    end = min(request.found_tokens, TOKENS - 1)
    assert end == (FULL if (roles, flow) in ONLY_FULL else ALL)
    copy = takes.copies.load(takes.requests.load(request, 0, end), takes.engine.table(TOKENS))
    assert takes.copies.settle([copy], PATIENCE) and copy.ok and takes.engine.right(ids, 0, end)
    takes.requests.finish("d")
    assert answer(passed_on(told), TOKENS, [7]) is None, "the second engine tells the router nothing"
    eventually(lambda: not any(one.counters()[name] for name in ("leases", "promised_chunks", "fetches_open")))


def test_llm_ds_sidecar_falls_back_to_the_second_engine(server: Servers, engine: Engines) -> None:
    """The first engine has failed, so the second one gets the request as the client sent it."""
    one = server(chunk=CHUNK)
    takes = Bed(engine(one), name="second", stores=False)
    wanted = asked(None, loads=True, stores=False)
    request = takes.open("d", tail_leaves=wanted.tail_leaves)
    assert takes.requests.find(request, prompt(3, TOKENS)) is None, "it computes at once"
    takes.requests.finish("d")
    eventually(lambda: not one.counters()["fetches_open"])
