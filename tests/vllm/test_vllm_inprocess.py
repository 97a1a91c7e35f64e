"""In-process mode with real vLLM: a server of the engine's own, loads within the step, and the lines that users look for."""

from __future__ import annotations

import json
import os
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from routers import Router, publishing
from vllm_processes import Api, Engine, Process, Server

from ports import free_port
from prompts import assert_same, mixed, tokens

IN_PROCESS = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
WALK = [tokens(63, 200), [*tokens(63, 200), 17]]
"""The documentation's 31 and 32 tokens on 16-token blocks; vLLM-CPU has blocks of 32 at least."""
COST = r"size: \d+\.\d{4} gb, cost \d+\.\d\d ms, throughput: \d+\.\d\d GB/s"
TIMES = r"offload_time: \d+\.\d\d ms, put_time: \d+\.\d\d ms"
LONG = [tokens(500, 210 + number) for number in range(8)]
PUBLISHING = publishing()
Outputs = list[dict[str, Any]]


def start(folder: Path, name: str, model: Path, environ: dict[str, str] | None = None, **options: Any) -> Engine:
    small = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", **(environ or {})}
    own = {"kv_transfer_config": IN_PROCESS, "max_model_len": 2048, **options}
    engine = Engine(folder, name, model, small, **own)
    if own["kv_transfer_config"] is IN_PROCESS:
        engine.connected(1 + options.get("tensor_parallel_size", 1))
    return engine


def find(log: str, *patterns: str) -> None:
    """Each pattern is in the log, behind the one before."""
    at = 0
    for pattern in patterns:
        found = re.search(pattern, log[at:])
        assert found, f"{pattern!r} is not in the rest of the log\n{log[-4000:]}"
        at += found.end()


def server_of(engine: Process) -> int:
    """The pid of the one server that this engine has started."""
    (pid,) = re.findall(r"Starting this engine's own LMCache server: pid (\d+)", engine.text())
    return int(pid)


def wait_for_end(pid: int, kill: int = 0) -> None:
    """Until the process has ended, all of its threads included."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if kill:
            os.kill(pid, kill)
        assert select.select([pidfd], [], [], 60)[0], f"process {pid} still runs"
    finally:
        os.close(pidfd)


@pytest.fixture(scope="module")
def expected(folder: Path, model: Path) -> dict[str, Outputs]:
    """What vLLM answers without LMCache."""
    engine = Engine(folder, "inprocess-reference", model, max_model_len=2048, block_size=32)
    try:
        walk = [engine.generate([prompt])[0] for prompt in WALK]
        return {"walk": walk, "mixed": engine.generate(mixed()), "long": engine.generate(LONG, max_tokens=30)}
    finally:
        engine.end()


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path) -> Iterator[Engine]:
    """Little KV space and few tokens a step, so that prompts are computed in parts and requests are preempted."""
    made = start(
        folder,
        "in-process",
        model,
        {"LMCACHE_CHUNK_SIZE": "8"},
        block_size=32,
        num_gpu_blocks_override=136,
        max_num_batched_tokens=256,
        kv_events_config=PUBLISHING,
    )
    yield made
    made.end()


def test_the_documented_walk_through(engine: Engine, expected: dict[str, Outputs]) -> None:
    first = engine.generate([WALK[0]])
    second = engine.generate([WALK[1]])
    assert_same(first + second, expected["walk"])
    assert [first[0]["cached"], second[0]["cached"]] == [0, 56]
    engine.forget()  # returns when the stores have ended
    find(
        engine.text(),
        r"Reqid: \S+, Total tokens 63, LMCache hit tokens: 0, need to load: 0",
        r"Storing KV cache for 63 out of 63 tokens \(skip_leading_tokens=0\)",
        rf"Stored 63 out of total 63 tokens\. {COST}; {TIMES}",
        r"Reqid: \S+, Total tokens 64, LMCache hit tokens: 56, need to load: 24",
        rf"Retrieved 24 out of 56 required tokens \(from 64 total tokens\)\. {COST}",
        r"Storing KV cache for 8 out of 64 tokens \(skip_leading_tokens=56\)",
        rf"Stored 8 out of total 8 tokens\. {COST}; {TIMES}",
    )


def test_a_whole_prompt_is_a_hit_but_for_the_token_that_must_be_computed(
    engine: Engine, expected: dict[str, Outputs]
) -> None:
    engine.forget()
    again = [engine.generate([prompt])[0] for prompt in WALK]
    assert_same(again, expected["walk"])
    assert [output["cached"] for output in again] == [62, 63], "the unfull chunk of the first one is part of it"
    find(engine.text(), r"Total tokens 63, LMCache hit tokens: 63, need to load: 62")


def test_answers_do_not_change(engine: Engine, expected: dict[str, Outputs]) -> None:
    assert_same(engine.generate(mixed()), expected["mixed"])
    engine.forget()
    warm = engine.generate(mixed())
    assert_same(warm, expected["mixed"])
    assert [output["cached"] for output in warm] == [len(prompt) - 1 for prompt in mixed()]
    engine.forget()
    engine.generate([mixed()[0][:400]], max_tokens=1)
    assert_same(engine.generate(mixed()), expected["mixed"])


def test_preemption_under_a_tiny_kv_space(engine: Engine, expected: dict[str, Outputs]) -> None:
    before = engine.ask("metrics")["vllm:num_preemptions"]
    for _ in range(2):
        engine.forget()
        assert_same(engine.generate(LONG, max_tokens=30), expected["long"])
    assert engine.ask("metrics")["vllm:num_preemptions"] > before


def test_aborted_requests(engine: Engine, expected: dict[str, Outputs]) -> None:
    engine.forget()
    engine.ask("abort", prompts=[*mixed()[:5], tokens(700, 60)], after_steps=[0, 1, 1, 2, 2, 3])
    assert_same(engine.generate(mixed()), expected["mixed"])
    engine.forget()
    assert_same(engine.generate(mixed()), expected["mixed"])


def test_each_layer_is_waited_for_and_no_more_than_that(engine: Engine, expected: dict[str, Outputs]) -> None:
    """Every layer comes late, into blocks that held something else; and one prompt alone, so that its waits can be told."""
    assert_same(engine.generate(mixed()), expected["mixed"])
    for prompt, wanted in (([mixed()[0]], expected["mixed"][:1]), (mixed(), expected["mixed"])):
        engine.forget()
        engine.ask("digests", wipe=True)
        engine.ask("slow_layers", seconds=0.02)
        assert_same(engine.generate(prompt), wanted)
        waits = engine.ask("slow_layers", seconds=0)["waits"]
        assert [planes for planes in range(2, 18, 2) if planes not in waits] == [], "8 layers of two planes"
        if len(prompt) == 1:
            assert waits == list(range(2, 18, 2)), "the forward has begun before the load had ended"


def test_a_layer_that_vllm_does_not_call_for_is_a_failed_load_and_computed(
    engine: Engine, expected: dict[str, Outputs]
) -> None:
    engine.forget()
    engine.ask("digests", wipe=True)
    engine.ask("slow_layers", seconds=0.02, forget="model.layers.5.self_attn.attn")
    for turn in range(2):
        assert_same(engine.generate([mixed()[0]]), expected["mixed"][:1])
        assert bool(engine.ask("slow_layers", seconds=0, forget="model.layers.5.self_attn.attn")["waits"]) == (not turn)
        engine.forget()
        engine.ask("digests", wipe=True)
    assert engine.text().count("vLLM did not wait for the layers of 1 loads") == 1, "loads end before such forwards now"
    assert engine.text().count("Recovered from KV load failure") == 1
    engine.ask("slow_layers", seconds=0)
    assert_same(engine.generate(mixed()), expected["mixed"])


def test_a_router_has_followed_all_of_it(engine: Engine) -> None:
    """By the blocks that preemptions, aborts, failed loads and resets have left, of chunks of eight tokens."""
    router, prompt = Router(engine, PUBLISHING, 32), mixed()[0]
    engine.generate([prompt])
    router.until(lambda: router.prefix(prompt, "CPU") == len(prompt) // 32 * 32, "the last prompt's blocks")
    assert not router.media["STORAGE"] and "publishes no KV events any more" not in engine.text()


def test_a_killed_engine_leaves_nothing(engine: Engine) -> None:
    server = server_of(engine)
    arena = arena_of(server)
    engine.send(signal.SIGKILL)
    wait_for_end(server)
    assert arena not in {where for _, where in mappings()}, "and its file had no name"


def test_a_file_odd_chunks_whole_loads_and_no_prefix_caching(
    folder: Path, model: Path, expected: dict[str, Outputs]
) -> None:
    """And then the server is killed: the engine goes on without."""
    file = folder / "lmcache.yaml"
    file.write_text(
        "chunk_size: 100\nmax_local_cpu_size: 0.25\nsave_unfull_chunk: false\nsave_decode_cache: true\n"
        "use_layerwise: false\n"
    )
    environ = {"LMCACHE_CONFIG_FILE": str(file)}
    engine = start(
        folder, "odd", model, environ, block_size=32, enable_prefix_caching=False, max_num_batched_tokens=256
    )
    try:
        assert_same(engine.generate(mixed()), expected["mixed"])
        warm = engine.generate(mixed())
        assert_same(warm, expected["mixed"])
        assert [output["cached"] for output in warm] == [len(prompt) // 100 * 100 for prompt in mixed()]
        longer = [tokens(95, 230)]
        (output,) = engine.generate(longer, max_tokens=8)
        (again,) = engine.generate([longer[0] + output["tokens"]], max_tokens=1)
        assert again["cached"] == 100, "generated tokens are stored where save_decode_cache says so"
        wait_for_end(server_of(engine), signal.SIGKILL)
        after = engine.generate(mixed())
        assert_same(after, expected["mixed"])
        assert [output["cached"] for output in after] == [0] * len(mixed())
    finally:
        engine.end()


def test_tensor_parallel_ranks_share_one_memory(folder: Path, model: Path, expected: dict[str, Outputs]) -> None:
    engine = start(
        folder,
        "in-process-tp2",
        model,
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "LMCACHE_CHUNK_SIZE": "8"},
        block_size=32,
        tensor_parallel_size=2,
    )
    try:
        first, second = engine.generate([WALK[0]]), engine.generate([WALK[1]])
        assert_same(first + second, expected["walk"])
        assert second[0]["cached"] == 56
        engine.forget()
        assert engine.text().count("Stored 63 out of total 63 tokens") == 2, "each rank its own heads"
        assert engine.text().count("Retrieved 24 out of 56 required tokens") == 2
        server = server_of(engine)
        mapped = {one for one in mappings() if one[1] == arena_of(server)}
        assert len(mapped) == 3, f"the server and both ranks map the same file: {mapped}"
    finally:
        engine.end()
    wait_for_end(server)


def mappings() -> Iterator[tuple[int, tuple[str, str]]]:
    """(pid, (device, inode)) of every arena that some process maps."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        yield from {(int(maps.parent.name), arena(line)) for line in lines if ".arena" in line}


def arena(line: str) -> tuple[str, str]:
    words = line.split()
    return words[3], words[4]


def arena_of(pid: int) -> tuple[str, str]:
    (found,) = {where for process, where in mappings() if process == pid}
    return found


def test_offloading_without_a_server_starts_one(folder: Path, model: Path) -> None:
    """`vllm serve MODEL --kv-offloading-backend lmcache --kv-offloading-size N`, away from the default port."""
    port = json.dumps({"kv_connector_extra_config": {"lmcache.mp.port": free_port()}})
    options = ["--kv-offloading-backend", "lmcache", "--kv-offloading-size", "0.5"]
    environ = {"LMCACHE_CHUNK_SIZE": "16"}
    api = Api(folder, "offloading", model, *options, "--kv-transfer-config", port, **environ)
    try:
        server = server_of(api)
        api.complete(tokens(40, 239))  # ranks learn of the server with the first step
        api.connected()
        prompt = tokens(300, 240)
        cold = api.complete(prompt)
        api.post("/reset_prefix_cache")
        warm = api.complete(prompt)
        assert warm["tokens"] == cold["tokens"]
        assert max(abs(a - b) for a, b in zip(warm["logprobs"], cold["logprobs"], strict=True)) < 1e-3
        find(
            api.text(),
            r"No LMCache server at tcp://localhost:\d+ for this engine \(.*refused\): starting one of 0\.5 GiB for it alone",
        )
        assert api.metric("vllm:external_prefix_cache_hits_total") == 288
    finally:
        api.end()
    wait_for_end(server)


def test_offloading_with_a_server_uses_that_one(folder: Path, model: Path, server: Server) -> None:
    where = {"kv_connector_extra_config": {"lmcache.mp.port": server.port}}
    engine = start(
        folder,
        "offloading-with-server",
        model,
        kv_transfer_config=where,
        kv_offloading_backend="lmcache",
        kv_offloading_size=0.5,
        disable_hybrid_kv_cache_manager=True,
    )
    try:
        engine.generate([tokens(40, 249)])
        engine.connected()
        prompt = [tokens(300, 250)]
        cold = engine.generate(prompt)
        engine.forget()
        warm = engine.generate(prompt)
        assert_same(warm, cold)
        assert warm[0]["cached"] == 288
        assert "Stored 288 tokens" in server.text()
        assert "Starting this engine's own" not in engine.text()
        find(engine.text(), rf"using the one at tcp://localhost:{server.port}, whose own size counts")
    finally:
        engine.end()
