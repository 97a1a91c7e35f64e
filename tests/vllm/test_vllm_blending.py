"""Passages are blended into prompts of a real vLLM: near the exact answer by plan, exact where they must be, never stored."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import PYTHON, Engine, Server, environment

from prompts import assert_same, differs, tokens
from real_engines import ROOT

OFF = {"lmcache.blend": False}
BEGINNING = tokens(40, 900)
BLOCK = 128
"""Tokens of a block of vLLM-CPU."""
PLANS: list[dict[str, Any]] = [
    {"choose": "none", "links": 0},
    {"choose": "none", "links": 4},
    {"choose": "query", "recompute_ratio": 0.13},
    {"choose": "deviation", "recompute_ratio": 0.15, "check_layer": 2},
]


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path, server: Server) -> Iterator[Engine]:
    """An engine that blends passages of 32 tokens and more."""
    settings = {"lmcache.enable_blending": True, "lmcache.blend_min_tokens": 32}
    made = Engine(folder, "blending", model, max_model_len=2048, kv_transfer_config=server.config(**settings))
    made.connected(3)
    yield made
    made.end()


class Texts:
    """Prompts of documents between separators. Each document has 70 tokens or a few more."""

    def __init__(self, engine: Engine) -> None:
        self.separator: list[int] = engine.ask("encode", text=" # # ")["tokens"]

    def document(self, number: int) -> list[int]:
        return tokens(70 + number % 10, 1000 + number)

    def prompt(self, documents: list[int], beginning: list[int] = BEGINNING, question: int = 30) -> list[int]:
        parts = [token for number in documents for token in (*self.separator, *self.document(number))]
        return [*beginning, *parts, *self.separator, *tokens(question, 901)]

    def context(self, documents: list[int], beginning: list[int] = BEGINNING) -> int:
        """How many tokens are before the question."""
        return len(self.prompt(documents, beginning, 0))

    def of(self, documents: list[int]) -> int:
        return sum(len(self.document(number)) for number in documents)


@pytest.fixture(scope="module")
def texts(engine: Engine) -> Texts:
    return Texts(engine)


def get(server: Server, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=60) as answer:
        body: str = answer.read().decode()
    return body


def counted(server: Server) -> list[int]:
    """Requests into which something was blended so far, tokens of that, and those that were computed again."""
    lines = get(server, "/metrics").splitlines()
    names = "lmcache_blended_requests_total", "lmcache_blended_tokens_total", "lmcache_blend_recomputed_tokens_total"
    return [sum(int(float(line.split()[-1])) for line in lines if line.startswith(name)) for name in names]


def since(server: Server, before: list[int]) -> list[int]:
    return [now - then for now, then in zip(counted(server), before, strict=True)]


def settle(engine: Engine) -> None:
    """Once what is being stored has been stored: prompts, whose blocks are held meanwhile, and passages."""
    engine.forget()
    assert engine.ask("wait_for_passages")["ok"]


def test_all_computed_again_is_a_cold_run(engine: Engine, server: Server, texts: Texts) -> None:
    """With every blended token computed again nothing of the passages is left, so places, blocks and passes are right."""
    engine.ask("blend", choose="query", recompute_ratio=1.0)
    first = engine.generate([texts.prompt([1, 2, 3])])
    assert first[0]["cached"] == 0 and counted(server) == [0, 0, 0]
    settle(engine)
    documents = [4, 3, 1]
    cold = engine.generate([texts.prompt(documents)], salts=["alone"])
    blended = engine.generate([texts.prompt(documents)])
    assert cold[0]["cached"] == 0 and blended[0]["cached"] == texts.context(documents)
    assert_same(blended, cold)
    engine.wait_until(lambda: counted(server) == [1, texts.of([3, 1]), texts.of([3, 1])], "what was blended", 60)
    (record,) = [one for one in json.loads(get(server, "/requests"))["requests"] if one.get("blended")]
    assert record["blended"] == {"passages": 2, "recomputed": texts.of([3, 1])} and record["request"]


def test_answers_are_those_of_another_implementation(engine: Engine, server: Server, texts: Texts, model: Path) -> None:
    """Transformers' blending, with the same weights: masks, caches and attention of its own."""
    before, documents, salts = texts.prompt([11, 12, 13]), [13, 11, 12], ["reference"]
    asked = {"model": str(model), "separator": texts.separator, "before": [before]}
    asked |= {"prompt": texts.prompt(documents), "settings": [{"min_tokens": 32, **plan} for plan in PLANS]}
    command = [PYTHON, str(Path(__file__).with_name("blended_reference.py")), json.dumps(asked)]
    told = environment(PYTHONPATH=os.environ.get("PYTHONPATH", str(ROOT / "src")), OMP_NUM_THREADS="1")
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=told, cwd=ROOT).stdout
    expected = json.loads(said.rpartition("ANSWER ")[2])
    engine.generate([before], salts=salts)
    settle(engine)
    cold = engine.generate([texts.prompt(documents)], salts=["reference, alone"], transfer=OFF)
    for plan, one in zip(PLANS, expected, strict=True):
        engine.ask("blend", **plan)
        had = counted(server)
        found = engine.generate([texts.prompt(documents)], salts=salts)
        assert found[0]["cached"] == texts.context(documents)
        assert_same(found, [one])
        assert differs(found, cold), "or the plan would not matter"
        told_by = [1, one["blended"], one["recomputed"]]
        engine.wait_until(lambda had=had, told_by=told_by: since(server, had) == told_by, f"{plan}: {told_by}", 60)
    engine.ask("blend", choose="query", recompute_ratio=0.13, links=4)


@pytest.mark.parametrize("beginning", [40, 300])
def test_a_prompt_after_a_blended_one_is_cold_bit_for_bit(
    engine: Engine, server: Server, texts: Texts, beginning: int
) -> None:
    """Neither vLLM's own prefix cache nor the server has anything blended. The exact part of the prompt is in both."""
    start, documents, answers = tokens(beginning, 910 + beginning), [23, 21, 22], []
    prompt, other = texts.prompt(documents, start), texts.prompt([21, 22, 23], start)
    engine.ask("blend", choose="query", recompute_ratio=0.13)
    for salt in ("blended", "not"):
        salts = [f"{salt} {beginning}"]
        engine.generate([other], salts=salts, transfer=OFF)  # whose passages are stored all the same
        settle(engine)
        if salt == "blended":
            had = counted(server)
            blended = engine.generate([prompt], salts=salts)
            assert blended[0]["cached"] == texts.context(documents, start)
            engine.wait_until(lambda had=had: since(server, had)[0] == 1, "what was blended", 60)
        answers.append(engine.generate([prompt], salts=salts, transfer=OFF)[0])
        settle(engine)
        answers.append(engine.generate([prompt], salts=salts, transfer=OFF)[0])
    exact = (beginning + len(texts.separator)) // 16 * 16
    assert [one["cached"] for one in answers[::2]] == [exact, exact], "nothing of what was blended"
    assert [one["cached"] >= len(prompt) - 16 for one in answers[1::2]] == [True, True]
    for one, other_salt in zip(answers[:2], answers[2:], strict=True):
        assert one["logprobs"] == other_salt["logprobs"] and one["tokens"] == other_salt["tokens"]
    assert differs(blended, answers[:1])


def test_keys_turn_as_vllms_rope_has_them(engine: Engine) -> None:
    found = engine.ask("turn_keys")
    for kind in ("default", "partial", "llama3", "yarn"):
        for pairs in ("halves", "neighbours"):
            told, error = found[f"{kind} {pairs}"]
            assert told == pairs and error < 1e-6, found
    assert "DynamicNTKScalingRotaryEmbedding" in found["dynamic halves"]


def test_what_is_not_blended(engine: Engine, server: Server, texts: Texts) -> None:
    """Too short, without separators, by wish, of another salt, or found as a prefix."""
    engine.generate([texts.prompt([31, 32, 33])], salts=["a"])
    settle(engine)
    had, shuffled = counted(server), texts.prompt([33, 31, 32])
    cold = engine.generate([shuffled], salts=["b"])
    assert cold[0]["cached"] == 0, "passages of another salt"
    assert_same(engine.generate([shuffled], salts=["a"], transfer=OFF), cold)
    plain = [*BEGINNING, *texts.document(32), *texts.document(31), *tokens(30, 901)]
    assert engine.generate([plain], salts=["a"])[0]["cached"] <= len(BEGINNING)
    engine.ask("blend", min_tokens=100)
    assert engine.generate([texts.prompt([32, 31], question=40)], salts=["a"])[0]["cached"] <= len(BEGINNING)
    engine.ask("blend", min_tokens=32)
    assert since(server, had) == [0, 0, 0]
    assert engine.generate([texts.prompt([32, 33, 31])], salts=["a"])[0]["cached"] == texts.context([32, 33, 31])


def test_requests_at_once(engine: Engine, server: Server, texts: Texts) -> None:
    """Blended ones, exact ones and new ones together answer as each does alone."""
    engine.ask("blend", choose="query", recompute_ratio=0.13)
    engine.generate([texts.prompt([41, 42, 43, 44])])
    settle(engine)
    blended = [texts.prompt(order) for order in ([44, 41], [43, 42, 41], [42, 44], [41, 43, 44, 42])]
    plain = [tokens(200, 920), tokens(17, 921)]
    alone = [engine.generate([prompt])[0] for prompt in blended] + engine.generate(plain, transfer=OFF)
    engine.forget()
    had = counted(server)
    together = engine.generate([*blended, *plain])
    assert_same(together, alone)
    engine.wait_until(lambda: since(server, had)[0] == len(blended), "what was blended", 60)


def test_no_more_than_a_forward_is_computed_between_two_steps(engine: Engine, server: Server, texts: Texts) -> None:
    """A prompt with little to blend and much to compute holds up the other requests no longer than any prompt."""
    engine.ask("blend", choose="query", recompute_ratio=1.0)
    prompt = [*texts.prompt([71], question=0), *tokens(600, 930), *texts.separator, *tokens(30, 901)]
    found, steps = [], list[list[int]]()
    for salt, at_once in (("whole", 1024), ("parts", 64)):
        engine.generate([texts.prompt([72, 71])], salts=[salt])
        settle(engine)
        engine.ask("watch_blends", at_once=at_once)
        found.append(engine.generate([prompt], salts=[salt]))
        steps.append(engine.ask("watch_blends", at_once=1024)["steps"])
    assert_same(found[1], found[0])
    assert len(steps[0]) == 1, "what is little is computed at once"
    assert len(steps[1]) > 10 and max(steps[1]) <= 64 and sum(steps[1]) == sum(steps[0]) > 600


def test_a_passage_that_waits_for_room_gets_it_before_what_would_be_stored() -> None:
    command = [PYTHON, str(Path(__file__).with_name("room.py"))]
    told = environment(PYTHONPATH=os.environ.get("PYTHONPATH", str(ROOT / "src")), OMP_NUM_THREADS="1")
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=told, cwd=ROOT).stdout
    assert json.loads(said.rpartition("ANSWER ")[2]) == {"steps": 2, "dropped": ["queue full"] * 2}


def test_failures_are_computed(engine: Engine, server: Server, texts: Texts) -> None:
    salts, had = ["failures"], counted(server)
    engine.generate([texts.prompt([51, 52, 53])], salts=salts)
    settle(engine)
    for order, how in (([53, 51], "copy"), ([52, 53], "forward")):
        prompt = texts.prompt(order)
        cold = engine.generate([prompt], salts=["failures, alone"], transfer=OFF)
        engine.ask("break_blends", how=how)
        assert_same(engine.generate([prompt], salts=salts), cold)
        why = engine.ask("mend_blends")["refusal"]
        assert why == ("broken by a test" if how == "forward" else "")
        settle(engine)
        assert_same(engine.generate([prompt], salts=salts, transfer=OFF), cold)
    assert since(server, had) == [0, 0, 0]
    assert "Nothing is blended any more: broken by a test" in engine.text()
    assert engine.generate([texts.prompt([52, 51])], salts=salts)[0]["cached"] == texts.context([52, 51])


def test_aborted_and_preempted_requests(engine: Engine, server: Server, texts: Texts) -> None:
    engine.generate([texts.prompt([61, 62, 63])])
    settle(engine)
    orders = [[63, 61], [62, 61], [63, 62], [62, 63, 61]]
    engine.ask("abort", prompts=[texts.prompt(order) for order in orders], after_steps=[0, 1, 2, 4])
    had = counted(server)
    engine.ask("abort", prompts=[texts.prompt(order) for order in orders], after_steps=[1, 1, 1, 1])
    engine.generate([texts.prompt([63, 61, 62])])  # the server hears of it after all that was blended before
    assert since(server, had)[0] <= 2, "one in the first step, and the last prompt"
    engine.wait_until(lambda: not server.status()["index"]["leases"], "the ends of all leases", 60)
    had = counted(server)
    prompt = texts.prompt([63, 62, 61])
    told = engine.ask("preempt", prompt=prompt, steps=5)
    assert told["computed"] >= texts.context([63, 62, 61]) and told["preemptions"] and told["tokens"] == [8]
    engine.wait_until(lambda: since(server, had)[0] == 1, "what was blended", 60)
    cold = engine.generate([prompt], salts=["cold"], transfer=OFF)
    assert_same(engine.generate([prompt], transfer=OFF), cold)
    engine.forget()
    assert_same(engine.generate([prompt], transfer=OFF), cold)
    assert engine.generate([texts.prompt([61, 63])])[0]["cached"] == texts.context([61, 63])


def test_in_process_and_in_bfloat16(folder: Path, model: Path, server: Server) -> None:
    """With a server of the engine's own. Everything is computed again, which leaves rounding only."""
    settings = {"ENABLE_BLENDING": "true", "BLEND_MIN_TOKENS": "32", "BLEND_RECOMPUTE_RATIOS": "[1.0]"}
    settings |= {"MAX_LOCAL_CPU_SIZE": "0.5", "CHUNK_SIZE": "16"}
    environ = {f"LMCACHE_{name}": value for name, value in settings.items()}
    config = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    one = Engine(folder, "own", model, environ, kv_transfer_config=config, max_model_len=1024, dtype="bfloat16")
    try:
        one.connected(3)
        texts = Texts(one)
        one.generate([texts.prompt([1, 2, 3])])
        settle(one)
        cold = one.generate([texts.prompt([3, 1])], salts=["alone"])
        blended = one.generate([texts.prompt([3, 1])])
        assert (cold[0]["cached"], blended[0]["cached"]) == (0, texts.context([3, 1]))
        assert blended[0]["tokens"][0] == cold[0]["tokens"][0]
        assert abs(blended[0]["logprobs"][0] - cold[0]["logprobs"][0]) < 0.1
        assert "no effect" not in one.text() and "Nothing is blended" not in one.text()
    finally:
        one.end()
