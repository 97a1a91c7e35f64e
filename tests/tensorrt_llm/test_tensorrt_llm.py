"""The connectors of TensorRT-LLM's two presets, called in its executor's order, over a real server (see tensorrt_executor.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashing import Turns
from servers import Server, eventually

Starts = Callable[..., Any]
Servers = Callable[..., Server]
Models = Callable[..., str]


def right(answers: list[dict[str, Any]]) -> bool:
    return all(answer["right"] and answer["state"] == "done" for answer in answers)


@pytest.mark.parametrize("ranks, flat", [(1, True), (2, True), (2, False), (4, True)])
def test_stored_by_one_loaded_by_the_other(
    server: Servers, process: Any, model: Models, ranks: int, flat: bool
) -> None:
    """Chunks of 12 tokens, blocks of 8: a hit ends with a block, in the middle of a chunk."""
    one, folder = server(chunk=12), model()
    options = {"model": folder, "url": one.address, "ranks": ranks, "flat": flat}
    process.ask("engine", "first", **options)
    cold = process.ask("ask", "first", prompts=[[101, 1], [12, 2], [7, 3]], new=3)
    assert right(cold) and [answer["matched"] for answer in cold] == [0, 0, 0]
    process.ask("engine", "second", **options)
    warm = process.ask("ask", "second", prompts=[[101, 1], [12, 2], [7, 3]], new=3)
    assert right(warm) and [answer["matched"] for answer in warm] == [96, 8, 0]
    assert [answer["answer"] for answer in warm] == [answer["answer"] for answer in cold]
    again = process.ask("ask", "first", prompts=[[101, 1], [12, 2], [7, 3]], new=3)
    assert right(again) and [answer["matched"] for answer in again] == [96, 8, 0]
    assert eventually(lambda: one.status()["index"]["leases"] == 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_large_weights_are_hashed_while_the_engine_runs(
    server: Servers, engines: Starts, model: Models, tmp_path: Path, ranks: int
) -> None:
    one, folder = server(chunk=12), model()
    with Path(folder, "notes.txt").open("wb") as file:
        file.truncate(300 << 20)
    turns, process = Turns(tmp_path / "cache" / "lmcache"), engines(XDG_CACHE_HOME=str(tmp_path / "cache"))
    try:
        process.ask("engine", model=folder, url=one.address, ranks=ranks)
        for _ in range(2):
            cold = process.ask("ask", prompts=[[101, 1]], new=3)
            assert right(cold) and cold[0]["matched"] == 0
        assert process.said("nothing is served or stored until it is done")
    finally:
        turns.give()
    assert eventually(lambda: process.said("Hashed 0.3 GB"))
    dropped = 'engine_dropped_chunks_total{reason="identity not known yet"}'
    assert eventually(lambda: one.counters().get(dropped) == 2 * 103 // 12)
    assert eventually(lambda: process.ask("ask", prompts=[[101, 1]], new=3)[0]["matched"] == 96)
    assert right(process.ask("ask", prompts=[[101, 1]], new=3))


def test_heads_that_several_ranks_hold(server: Servers, process: Any, model: Models) -> None:
    """Two KV heads on four ranks: two ranks hold the same part, and one of them stores it."""
    one = server(chunk=16)
    folder = model(num_key_value_heads=2)
    process.ask("engine", model=folder, url=one.address, ranks=4, heads=2)
    assert right(process.ask("ask", prompts=[[90, 1]]))
    warm = process.ask("ask", prompts=[[90, 1]])
    assert right(warm) and warm[0]["matched"] == 80


def test_latent_attention(server: Servers, process: Any, model: Models) -> None:
    """MLA: one latent instead of keys and values, the same on both ranks."""
    one = server(chunk=16)
    folder = model(kv_lora_rank=6, qk_rope_head_dim=2)
    process.ask("engine", model=folder, url=one.address, ranks=2, parts=1, heads=1)
    assert right(process.ask("ask", prompts=[[90, 1]]))
    warm = process.ask("ask", prompts=[[90, 1]])
    assert right(warm) and warm[0]["matched"] == 80


def test_two_processes_with_different_hash_seeds(server: Servers, engines: Starts, model: Models) -> None:
    one, folder = server(chunk=16), model()
    first, second = engines(PYTHONHASHSEED="1"), engines(PYTHONHASHSEED="2")
    first.ask("engine", model=folder, url=one.address)
    assert right(first.ask("ask", prompts=[[100, 1]]))
    second.ask("engine", model=folder, url=one.address)
    hit = second.ask("ask", prompts=[[100, 1]])
    assert right(hit) and hit[0]["matched"] == 96
    assert right(second.ask("ask", prompts=[[100, 2]]))
    back = first.ask("ask", prompts=[[100, 2]])
    assert right(back) and back[0]["matched"] == 96


@pytest.mark.parametrize("chunk_tokens", [8, 20, 56])
@pytest.mark.parametrize("grouped, tells", [(False, True), (True, True), (True, False)])
def test_prompts_computed_in_parts(
    server: Servers, process: Any, model: Models, chunk_tokens: int, grouped: bool, tells: bool
) -> None:
    """Chunked prefill; with blocks given out for each part (KVCacheManagerV2) only what they cover of a hit is taken."""
    one, folder = server(chunk=12), model()
    options = {"model": folder, "url": one.address, "chunk_tokens": chunk_tokens, "grouped": grouped, "ranks": 2}
    options["tells"] = tells
    process.ask("engine", **options)
    prompts = [[150, 1, 60], [90, 2, 60], [61, 3, 60]]
    for _ in range(3):
        assert right(process.ask("ask", prompts=prompts, new=9))
    matched = [answer["matched"] for answer in process.ask("ask", prompts=prompts, new=9)]
    covered = [-(-min(tokens, chunk_tokens) // 8) * 8 for tokens, *_ in prompts] if grouped else [1000] * 3
    assert matched == [min(whole, most) for whole, most in zip([144, 80, 56], covered, strict=True)]


def test_beside_the_engines_own_reuse(server: Servers, process: Any, model: Models) -> None:
    """What the engine has itself is not loaded; what it has forgotten is. Little room, so that it forgets."""
    one, folder = server(chunk=12), model()
    process.ask("engine", model=folder, url=one.address, reuse=True, blocks=40)
    first = process.ask("ask", prompts=[[100, 1, 50]])
    branch = process.ask("ask", prompts=[[100, 2, 50]])
    assert right(first) and right(branch)
    assert branch[0]["local"] == 48 and branch[0]["matched"] == 0
    for seed in range(3, 12):
        assert right(process.ask("ask", prompts=[[100, seed, 50], [120, 100 + seed]]))
    back = process.ask("ask", prompts=[[100, 1, 50]])
    assert right(back) and back[0]["local"] + back[0]["matched"] == 96 and back[0]["matched"] >= 48


def test_answers_are_stored_with_a_daemon(server: Servers, process: Any, model: Models) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address)
    assert right(process.ask("ask", prompts=[[30, 1]], new=50))
    assert eventually(lambda: one.status()["index"]["chunks"]) == 79 // 16


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_requests_that_are_cancelled(server: Servers, process: Any, model: Models, steps: int) -> None:
    """Before they run, between the parts of their prompt, behind a load: what they have stored by then is right."""
    one = server(chunk=12)
    process.ask("engine", model=model(), url=one.address, chunk_tokens=40, ranks=2)
    prompts = [[100, 1], [130, 2]]
    for _ in range(2):
        assert process.ask("abort", prompts=prompts, steps=steps) == {"right": True, "free": 64}
        assert right(process.ask("ask", prompts=prompts))
    assert [answer["matched"] for answer in process.ask("ask", prompts=prompts)] == [96, 120]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_requests_whose_blocks_are_taken_away(server: Servers, process: Any, model: Models, steps: int) -> None:
    one = server(chunk=12)
    process.ask("engine", model=model(), url=one.address, chunk_tokens=40, blocks=40)
    for seed in range(4):
        prompts = [[100, seed], [130, 50 + seed]]
        assert process.ask("abort", prompts=prompts, steps=steps, again=True) == {"right": True, "free": 40}
        assert right(process.ask("ask", prompts=prompts))


def test_what_tokens_do_not_decide(server: Servers, process: Any, model: Models) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address)
    assert right(process.ask("ask", prompts=[[100, 1]], cache_salt="a tenant"))
    for attributes, matched in (
        ({"cache_salt": "another"}, 0),
        ({"cache_salt": None}, 0),
        ({"cache_salt": None, "cache_salt_id": 5}, 0),
        ({"lora_task_id": 3}, 0),
        ({"multimodal_hashes": [[1]]}, 0),
        ({"cache_salt": "a tenant"}, 96),
    ):
        answer = process.ask("ask", prompts=[[100, 1]], **attributes)
        assert right(answer) and answer[0]["matched"] == matched, attributes
    assert process.said("LoRA adapters are not cached") and process.said("multimodal_hashes")


def test_another_model_shares_nothing(server: Servers, process: Any, model: Models) -> None:
    one = server(chunk=16)
    for name, changes in (("a", {}), ("b", {"weights": b"other weights"}), ("c", {"rope_theta": 5e5})):
        process.ask("engine", name, model=model(name, **changes), url=one.address)
        answer = process.ask("ask", name, prompts=[[100, 1]])
        assert right(answer) and answer[0]["matched"] == 0
    process.ask("engine", "copy", model=model("copy"), url=one.address)
    assert process.ask("ask", "copy", prompts=[[100, 1]])[0]["matched"] == 96
    process.ask("engine", "fp8", model=model("fp8"), url=one.address, args={"quant_config": {"quant_algo": "FP8"}})
    assert process.ask("ask", "fp8", prompts=[[100, 1]])[0]["matched"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_server_is_killed_and_comes_back(server: Servers, process: Any, model: Models, ranks: int) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address, ranks=ranks)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    one.kill()
    assert right(process.ask("ask", prompts=[[100, 1], [100, 2]]))
    other = server(chunk=32, port=one.port)
    # In this order: who has said hello to the new server is connected only when it is ready for it.
    assert eventually(lambda: len(other.status()["engines"]) > ranks and process.ask("ready")["ready"])
    assert right(process.ask("ask", prompts=[[100, 1]]))
    back = process.ask("ask", prompts=[[100, 1]])
    assert right(back) and back[0]["matched"] == 96


def test_a_frozen_server_costs_a_deadline(server: Servers, process: Any, model: Models) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address, ranks=2)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    process.ask("deadline", seconds=0.5)
    one.freeze()
    assert right(process.ask("ask", prompts=[[100, 1], [100, 2]]))
    process.ask("deadline", seconds=3000.0)  # of which nothing is waited for: the server is known to be frozen
    assert right(process.ask("ask", prompts=[[100, 1], [100, 3]]))
    one.thaw()


def test_no_server_at_all(process: Any, model: Models) -> None:
    process.ask("engine", model=model(), url="tcp://127.0.0.1:1", ranks=2, connected=False)
    assert right(process.ask("ask", prompts=[[100, 1], [100, 1]]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_fails_fails_its_step_on_all_ranks(
    server: Servers, process: Any, model: Models, ranks: int
) -> None:
    """The engine was promised the KV and knows no way back: the request gets an error, never an answer out of nothing."""
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address, ranks=ranks)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    process.ask("miss_arena")
    process.ask("deadline", seconds=0.5)  # of a rank that waits for its arena, for which the others wait
    (failed,) = process.ask("ask", prompts=[[100, 1]])
    assert failed["matched"] == 96 and failed["state"] == "failed"
    assert process.said("could not load KV that it had promised")
    process.ask("deadline", seconds=60.0)
    assert right(process.ask("ask", prompts=[[100, 2]]))


@pytest.mark.parametrize("what", ["match", "allocated", "plan_step", "start_stores"])
def test_a_bug_of_ours_costs_no_answer(server: Servers, process: Any, model: Models, what: str) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address)
    process.ask("break", what=what)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    assert process.said("ZeroDivisionError")


def test_a_promise_that_cannot_be_planned_fails_its_step(server: Servers, process: Any, model: Models) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address, ranks=2)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    process.ask("break", what="plan_step")
    (failed,) = process.ask("ask", prompts=[[100, 1]])
    assert failed["matched"] == 96 and failed["state"] == "failed"


@pytest.mark.parametrize(
    "changes, args, why",
    [
        ({}, {"attn_backend": "FLASHINFER"}, "attn_backend FLASHINFER is not supported"),
        ({}, {"enable_attention_dp": True}, "enable_attention_dp is not supported"),
        ({}, {"max_beam_width": 2}, "beam search is not supported"),
        ({"num_key_value_heads": 3}, {}, "does not hold blocks"),
        ({"sliding_window": 16}, {}, "a sliding window of 16 tokens"),
        ({"layer_types": ["full_attention", "linear_attention"]}, {}, "linear_attention are not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, {}, "'longrope'"),
    ],
)
def test_what_is_refused(
    server: Servers, process: Any, model: Models, changes: dict[str, Any], args: dict[str, Any], why: str
) -> None:
    one = server(chunk=16)
    process.ask("engine", model=model(**changes), url=one.address, args=args)
    for _ in range(2):
        answer = process.ask("ask", prompts=[[100, 1]])
        assert right(answer) and answer[0]["matched"] == 0
    assert process.said("LMCache serves nothing for this engine") and process.said(why)


def test_windows_of_several_sizes_are_refused(server: Servers, process: Any, model: Models) -> None:
    """The engine starts and runs without LMCache, whose scheduler has the forms of callbacks that it asks for."""
    one = server(chunk=16)
    process.ask("engine", model=model(), url=one.address, ranks=2, windows=[None, 128])
    for _ in range(2):
        answer = process.ask("ask", prompts=[[100, 1]])
        assert right(answer) and answer[0]["matched"] == 0
    assert process.said("LMCache serves nothing for this engine: attention windows of 128 tokens and full attention")


def test_in_process(engines: Starts, model: Models) -> None:
    """Preset `lmcache`: a server of the engine's own, as LMCACHE_* says; it ends with the engine."""
    process = engines(LMCACHE_CHUNK_SIZE="12", LMCACHE_MAX_LOCAL_CPU_SIZE="0.0625")
    folder = model()
    process.ask("engine", preset="lmcache", model=folder, ranks=2, connected=False)
    assert process.ask("ready")["ready"], "an own server is waited for longer than a stranger's, for which 0 s are set"
    cold = process.ask("ask", prompts=[[101, 1]], new=30)
    warm = process.ask("ask", prompts=[[101, 1]], new=30)
    assert right(cold) and right(warm) and warm[0]["matched"] == 96 and warm[0]["answer"] == cold[0]["answer"]
    longer = process.ask("ask", prompts=[[140, 1]])
    assert longer[0]["matched"] == 96  # answers are kept only with LMCACHE_SAVE_DECODE_CACHE
    process.ask("drop")
    process.ask("engine", preset="lmcache", model=folder, connected=False)
    assert process.ask("ready")["ready"]
    fresh = process.ask("ask", prompts=[[101, 1]])
    assert right(fresh) and fresh[0]["matched"] == 0


def test_a_setting_that_cannot_be(engines: Starts, model: Models) -> None:
    process = engines(LMCACHE_CHUNK_SIZE="none")
    process.ask("engine", preset="lmcache", model=model())
    assert right(process.ask("ask", prompts=[[100, 1]]))
    assert process.said("chunk_size")


def test_the_classes_at_their_place_in_earlier_releases(server: Servers, engines: Starts, model: Models) -> None:
    one, process = server(chunk=16), engines("old")
    process.ask("engine", model=model(), url=one.address)
    assert right(process.ask("ask", prompts=[[100, 1]]))
    assert process.ask("ask", prompts=[[100, 1]])[0]["matched"] == 96
