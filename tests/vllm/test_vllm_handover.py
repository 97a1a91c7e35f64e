"""Disaggregated prefill on one host: what one engine computes, another one decodes, and no parameter is needed or trusted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import Engine, Server

from prompts import assert_same, tokens

CHUNK = 16
LENGTHS = [300, 304, 305, 303, 128, 129, 5, 17, 2]
"""Of prompts: with a tail, without one, with one of a token, of all but one, by blocks of 128, shorter than a chunk."""
PROMPTS = [tokens(length, 200 + length) for length in LENGTHS]
LONG = [tokens(1200, 300 + number) for number in range(8)]
Outputs = list[dict[str, Any]]


def engine_of(folder: Path, model: Path, server: Server, role: str, name: str, **options: Any) -> Engine:
    made = Engine(
        folder,
        name,
        model,
        kv_transfer_config={**server.config(), "kv_role": role},
        max_num_batched_tokens=256,
        max_model_len=2048,
        **options,
    )
    made.connected()
    return made


@pytest.fixture(scope="module")
def prefill(folder: Path, model: Path, server: Server) -> Iterator[Engine]:
    made = engine_of(folder, model, server, "kv_producer", "prefill")
    yield made
    made.end()


@pytest.fixture(scope="module")
def decode(folder: Path, model: Path, server: Server) -> Iterator[Engine]:
    made = engine_of(folder, model, server, "kv_consumer", "decode")
    yield made
    made.end()


@pytest.fixture(scope="module")
def both(folder: Path, model: Path, server: Server) -> Iterator[Engine]:
    """An engine that loads and stores, and hands over, or is handed, what a request's parameters say."""
    made = engine_of(folder, model, server, "kv_both", "both")
    yield made
    made.end()


@pytest.fixture(scope="module")
def expected(decode: Engine) -> dict[str, Outputs]:
    """What an engine answers by itself: nobody has stored anything yet, and a consumer stores nothing."""
    answers = {"prompts": decode.generate(PROMPTS), "long": decode.generate(LONG)}
    decode.forget()
    return answers


def at_rest(server: Server) -> None:
    """Nothing is leased, promised or being filled, and nobody waits."""

    def rests() -> bool:
        found = server.status()["counters"]
        return not any(found[name] for name in ("leases", "promised_chunks", "reservations", "fetches_open"))

    server.wait_until(rests, "the server is at rest", 60)


def all_but_the_last(prompts: list[list[int]]) -> list[int]:
    """How many tokens of each prompt another engine has computed, where the last one is computed by the decode engine."""
    return [len(prompt) - 1 for prompt in prompts]


def test_the_decode_engine_computes_the_last_token_only(
    prefill: Engine, decode: Engine, server: Server, expected: dict[str, Outputs]
) -> None:
    for prompt, output in zip(PROMPTS, expected["prompts"], strict=True):
        (first,) = prefill.generate([prompt], max_tokens=1)
        assert first["tokens"] == output["tokens"][:1] and first["transfer"] is None
        (second,) = decode.generate([prompt])  # at once, while the first engine's stores may still be running
        assert_same([second], [output])
        assert second["cached"] == len(prompt) - 1
    at_rest(server)


def test_many_prompts_at_once(prefill: Engine, decode: Engine, server: Server, expected: dict[str, Outputs]) -> None:
    prefill.generate(LONG, max_tokens=1)
    found = decode.generate(LONG)
    assert_same(found, expected["long"])
    assert [one["cached"] for one in found] == all_but_the_last(LONG)
    decode.forget()
    again = decode.generate(LONG[:2])
    assert_same(again, expected["long"][:2])
    assert [one["cached"] for one in again] == all_but_the_last(LONG[:2]), "the same request twice"
    at_rest(server)


def test_a_producer_loads_nothing_and_a_consumer_stores_nothing(
    prefill: Engine, decode: Engine, server: Server
) -> None:
    prompt, counters = tokens(400, 640), server.status()["counters"]
    decode.generate([prompt])
    at_rest(server)
    assert server.status()["counters"]["stored_chunks_total"] == counters["stored_chunks_total"]
    for _ in range(2):
        (first,) = prefill.generate([prompt], max_tokens=1)
        assert first["cached"] == 0
        prefill.forget()
    at_rest(server)
    after = server.status()["counters"]
    assert after["stored_chunks_total"] == counters["stored_chunks_total"] + 25
    assert after["hit_chunks_total"] == counters["hit_chunks_total"], "what is only announced counts as no hit"


def test_parameters_are_hints(both: Engine, decode: Engine, server: Server, expected: dict[str, Outputs]) -> None:
    """As routers for NIXL give them to engines, and whatever else they may bring."""
    prompt, other, answer = tokens(301, 600), tokens(330, 601), {"do_remote_decode": True, "do_remote_prefill": False}
    (alone,) = decode.generate([prompt])
    decode.forget()
    (first,) = both.generate([prompt], max_tokens=1, transfer={**answer, "ret_first_tok": True, "disagg_spec": {}})
    assert first["transfer"] == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "lmcache": {"v": 1, "tokens": 301},
        "first_tok": alone["tokens"][0],
        "remote_prefill_cached_tokens": 0,
    }
    # The prompt with the first token, as the public project's proxies ask for it: its last token alone is computed.
    (second,) = decode.generate([[*prompt, first["transfer"]["first_tok"]]], max_tokens=7)
    assert second["tokens"] == alone["tokens"][1:] and second["cached"] == 301
    (first,) = both.generate([other], max_tokens=1, transfer=answer)
    both.forget()
    foreign = {"remote_block_ids": [[1, 2, 3]], "remote_host": "192.0.2.1", "remote_port": 9, "tp_size": 3}
    wrong: list[Any] = [None, {}, {"do_remote_prefill": True, **foreign}, {"lmcache": {"v": 99, "tokens": 1 << 40}}]
    wrong += [{"lmcache": "?"}, {**first["transfer"], "lmcache": [1]}, {"do_remote_prefill": "yes", "disagg_spec": 7}]
    for number, params in enumerate(wrong):
        told = both.generate([PROMPTS[number]], transfer=params)
        assert_same(told, expected["prompts"][number : number + 1])
        both.forget()
    at_rest(server)
    loaded = server.status()["counters"]["retrieved_tokens_total"] + 329
    (told,) = both.generate([other], transfer=first["transfer"])
    assert told["cached"] == 0, "vLLM reports what the first engine had found in its caches"
    server.wait_until(lambda: server.status()["counters"]["retrieved_tokens_total"] == loaded, "all but one token", 60)
    at_rest(server)


def test_a_preempted_prefill(prefill: Engine, decode: Engine, server: Server) -> None:
    prompt, other = tokens(900, 610), tokens(300, 611)
    alone = decode.generate([prompt])
    decode.forget()
    prefill.ask("empty", prompt=prompt, other=other, abort=False)
    assert_same(decode.generate([prompt]), alone)
    decode.forget()
    at_rest(server)


def test_a_decode_engine_that_waits(prefill: Engine, decode: Engine, server: Server) -> None:
    """The prefill engine stands still in the middle of a prompt. A request that waits for it is aborted, another one goes on when
    the prefill engine is killed. How long they wait follows from the paces of both engines, which are made up: hours, and always
    less for what the prefill engine still has to compute, however much it has stored before it stands still."""
    prompt = tokens(1500, 620)
    alone = decode.generate([prompt])
    decode.forget()
    at_rest(server)
    prefill.ask("compute_slowly", tokens_per_second=1.0)
    decode.ask("compute_slowly", tokens_per_second=0.1)
    prefill.ask("stop_after", steps=3)
    prefill.tell("generate", prompts=[prompt], max_tokens=1)
    server.wait_until(lambda: 0 < server.status()["counters"]["promised_chunks"] < 90, "a part of the prompt", 120)
    assert decode.ask("abort_waiting", prompt=prompt, polls=20)["waited"]
    server.wait_until(lambda: server.status()["counters"]["fetches_open"] == 0, "nobody waits", 60)
    assert server.status()["counters"]["promised_chunks"]
    decode.tell("generate", prompts=[prompt])
    server.wait_until(lambda: server.status()["counters"]["fetches_open"] == 1, "the decode engine waits", 120)
    prefill.end(signal.SIGKILL)
    found = decode.hear()["outputs"]
    assert_same(found, alone)
    assert 0 < found[0]["cached"] < 1499, "what had been stored is used"
    assert server.status()["fetches"][0]["outcome"] == "promise ended"
    at_rest(server)


def test_a_server_that_is_killed(both: Engine, decode: Engine, server: Server) -> None:
    prompt = tokens(600, 630)
    alone = decode.generate([prompt])
    decode.forget()
    both.generate([prompt], max_tokens=1, transfer={"do_remote_decode": True})
    for engine in (both, decode):
        engine.ask("deadline", seconds=1.0)
    server.send(signal.SIGKILL)
    assert_same(decode.generate([prompt]), alone)
    (first,) = both.generate([prompt], max_tokens=1, transfer={"do_remote_decode": True})
    assert first["tokens"] == alone[0]["tokens"][:1]
