"""Reuse never changes an answer, and nothing that happens to the server hurts an engine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import FOR_EVER, Engine, Server

from prompts import assert_same, differs, mixed, tokens

LONG = [tokens(500, 100 + number) for number in range(8)]
PROBE = tokens(300, 50)
Outputs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def expected(folder: Path, model: Path) -> dict[str, Outputs]:
    """What vLLM answers without LMCache."""
    engine = Engine(folder, "reference", model)
    try:
        answers = {"mixed": engine.generate(mixed()), "long": engine.generate(LONG, max_tokens=30)}
        answers["probe"] = engine.generate([PROBE])
        engine.forget()
        answers["cold"] = engine.generate([PROBE])
        # The measure itself: one run of 16 tokens with the KV of another run, and the answer is not the same.
        engine.ask("mix_up", prompts=[PROBE])
        answers["mixed up"] = engine.generate([PROBE])
        return answers
    finally:
        engine.end()


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path, server: Server) -> Iterator[Engine]:
    """Little KV space and few tokens a step, so that prompts are computed in parts and requests are preempted."""
    made = Engine(
        folder,
        "engine",
        model,
        kv_transfer_config=server.config(),
        num_gpu_blocks_override=34,
        max_num_batched_tokens=256,
        max_model_len=2048,
    )
    made.connected()
    yield made
    made.end()


def test_one_wrong_run_of_sixteen_tokens_is_noticed(expected: dict[str, Outputs]) -> None:
    assert_same(expected["cold"], expected["probe"])
    assert differs(expected["mixed up"], expected["probe"])


def test_cold_warm_and_hit_within_a_block(engine: Engine, server: Server, expected: dict[str, Outputs]) -> None:
    assert_same(engine.generate(mixed()), expected["mixed"])
    engine.forget()
    warm = engine.generate(mixed())
    assert_same(warm, expected["mixed"])
    # A load within the first step leaves the last token to be computed.
    missing = [len(prompt) // 16 * 16 - output["cached"] for prompt, output in zip(mixed(), warm, strict=True)]
    assert all(not one or (one == 1 and not len(prompt) % 16) for one, prompt in zip(missing, mixed(), strict=True))
    engine.forget()
    alone = [engine.generate([prompt])[0] for prompt in mixed()]
    assert_same(alone, expected["mixed"])
    for line in ("Stored ", "Retrieved "):
        server.wait_until(lambda line=line: line in server.text(), f"no line with {line!r}", 60)
    assert "Registering kv caches!" in engine.text()
    assert 'kv_load_failure_policy is now "recompute"' in engine.text()


def test_local_and_external_hits_together(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.forget()
    engine.generate([mixed()[0][:400]], max_tokens=1)
    assert_same(engine.generate(mixed()), expected["mixed"])


def test_a_forward_waits_for_the_load_of_a_request_that_is_alone_and_for_no_other_long_one(
    engine: Engine, expected: dict[str, Outputs]
) -> None:
    hit = len(PROBE) // 16 * 16
    engine.generate([PROBE])
    engine.forget()
    engine.ask("watch_loads")
    for length in (hit, hit - 16):  # a whole prompt is a hit, too, but for its last token
        alone = engine.generate([PROBE[: length + 12]])
        engine.forget()
        assert engine.ask("watch_loads")["loads"] == [[length, True]] and alone[0]["cached"] == length
    assert_same(engine.generate([PROBE]), expected["probe"])
    engine.forget()
    engine.ask("watch_loads", tokens_per_second=1.0)
    decode = tokens(40, 70)
    _, beside = engine.generate([decode, PROBE])
    assert_same([beside], expected["probe"])
    engine.forget()
    assert engine.ask("watch_loads", tokens_per_second=1e9)["loads"] == [[hit, False]]
    _, beside = engine.generate([tokens(40, 71), PROBE])
    assert_same([beside], expected["probe"])
    assert engine.ask("watch_loads")["loads"] == [[hit, True]], "it is short now"


def test_a_failed_load_within_a_step_is_computed(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.forget()
    engine.ask("watch_loads")
    engine.ask("digests", wipe=True)
    engine.ask("spoil", group=0, fail=True)
    recovered = engine.text().count("Recovered from KV load failure")
    assert_same(engine.generate([PROBE]), expected["probe"])
    assert engine.ask("watch_loads")["loads"] == [[len(PROBE) // 16 * 16, True]]
    assert engine.text().count("Recovered from KV load failure") == recovered + 1
    engine.forget()
    assert_same(engine.generate([PROBE]), expected["probe"])


def test_preemption_under_a_tiny_kv_space(engine: Engine, expected: dict[str, Outputs]) -> None:
    before = engine.ask("metrics")["vllm:num_preemptions"]
    for _ in range(2):
        engine.forget()
        assert_same(engine.generate(LONG, max_tokens=30), expected["long"])
    assert engine.ask("metrics")["vllm:num_preemptions"] > before


def test_aborted_requests(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.forget()
    prompts = [*mixed()[:5], tokens(700, 60), tokens(900, 61)]
    for steps in ([0, 1, 1, 2, 2, 1, 3], [1, 0, 2, 1, 3, 0, 4]):
        engine.ask("abort", prompts=prompts, after_steps=steps)
        assert_same(engine.generate(mixed()), expected["mixed"])
        engine.forget()
    assert_same(engine.generate(mixed()), expected["mixed"])


def test_another_salt_is_another_cache(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.generate([PROBE])
    engine.forget()
    assert engine.generate([PROBE])[0]["cached"] == len(PROBE) // 16 * 16
    engine.forget()
    salted = engine.generate([PROBE], salts=["tenant"])
    assert salted[0]["cached"] == 0
    assert_same(salted, expected["probe"])
    engine.forget()
    assert engine.generate([PROBE], salts=["tenant"])[0]["cached"] == len(PROBE) // 16 * 16


def test_prompt_log_probabilities_need_every_token_computed(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.forget()
    assert_same(engine.generate([PROBE], prompt_logprobs=True), expected["probe"])


def test_reset_of_the_connector_serves_nothing_older(engine: Engine, expected: dict[str, Outputs]) -> None:
    assert engine.ask("reset", connector=True)["ok"]
    output = engine.generate([PROBE])
    assert output[0]["cached"] == 0
    assert_same(output, expected["probe"])
    engine.forget()
    assert engine.generate([PROBE])[0]["cached"] > 0


@pytest.fixture(scope="module")
def second(folder: Path, model: Path, server: Server, engine: Engine) -> Iterator[Engine]:
    """Another engine on the same server, started while the first one lives."""
    made = Engine(folder, "second", model, kv_transfer_config=server.config())
    made.connected()
    yield made
    made.end()


def test_two_engines_that_get_a_prompt_at_the_same_time_answer_it_alike(engine: Engine, second: Engine) -> None:
    """One may wait for what the other one computes; whether it does depends on the pace of both."""
    for one in (engine, second):
        one.generate([tokens(900, 400)], salts=[str(one.pid)])  # so that each knows its pace
    for seed in range(401, 404):
        prompt = [tokens(900, seed)]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda one, prompt=prompt: one.generate(prompt), (engine, second)))
        assert_same(*answers)
        assert_same(second.generate(prompt, salts=["computed alone"]), answers[0])


def test_a_second_engine_reuses_what_the_first_one_stored(
    engine: Engine, second: Engine, expected: dict[str, Outputs]
) -> None:
    engine.end(signal.SIGKILL)
    outputs = second.generate(mixed())
    assert_same(outputs, expected["mixed"])
    assert outputs[0]["cached"] == len(mixed()[0]) // 16 * 16


def test_a_frozen_server_costs_one_deadline(second: Engine, server: Server, expected: dict[str, Outputs]) -> None:
    second.forget()
    second.ask("deadline", seconds=1.0)
    server.send(signal.SIGSTOP)
    try:
        _compute(second, expected)
        second.ask("deadline", seconds=FOR_EVER)  # of which nothing is waited for: the server is known to be frozen
        _compute(second, expected)
    finally:
        server.send(signal.SIGCONT)
    second.ask("deadline", seconds=60.0)
    _await_hit(second, expected)


def test_a_killed_server_and_one_started_later(
    second: Engine, server: Server, folder: Path, expected: dict[str, Outputs]
) -> None:
    second.forget()
    second.ask("deadline", seconds=FOR_EVER)  # of which nothing is waited for: the connection's end tells of a death
    server.end(signal.SIGKILL)
    for _ in range(2):
        _compute(second, expected)
    second.ask("deadline", seconds=60.0)
    again = Server(folder, chunk_size=48, port=server.port, name="server-again")
    try:
        _await_hit(second, expected)
        second.forget()
        assert_same(second.generate(mixed()), expected["mixed"])
        second.forget()
        assert_same(second.generate(mixed()), expected["mixed"])
    finally:
        again.end()


def _compute(engine: Engine, expected: dict[str, Outputs]) -> None:
    """An answer without the server; returns once what it would have stored is given up."""
    output = engine.generate([PROBE])
    assert_same(output, expected["probe"])
    assert output[0]["cached"] == 0
    engine.forget()


def _await_hit(engine: Engine, expected: dict[str, Outputs]) -> None:
    """Until the engine has found the server again and reuses what it stored there."""

    def hit() -> bool:
        engine.forget()
        output = engine.generate([PROBE])
        assert_same(output, expected["probe"])
        return bool(output[0]["cached"])

    engine.wait_until(hit, "a hit", 120)
