"""The ways to start vLLM that are documented: bfloat16, tensor parallel, vLLM's own class, `vllm serve`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import FOR_EVER, PYTHON, START_SECONDS, Api, Engine, Server, environment

from hashing import Turns
from prompts import assert_same, tokens
from real_engines import ROOT

PROMPTS = [tokens(300, 70), tokens(300, 70)[:200] + tokens(90, 71)]
"""Two whole blocks and a part; the second one leaves the first within a block."""
PROMPTS_OF_TWO = [tokens(300, 75), tokens(300, 75)[:200] + tokens(90, 76)]
"""The same with other tokens."""


def test_other_weights_are_another_cache(folder: Path, model: Path, other_model: Path, server: Server) -> None:
    """The same configuration, shapes and prompts; only the numbers in the weights differ. And vLLM's own class."""
    upstream = {"LMCACHE_USE_UPSTREAM_MP": "1"}
    long = [tokens(256, 80), tokens(256, 80)[:128] + tokens(140, 81)]
    frames = server.config(**{"lmcache.mp.mp_transfer_mode": "payload"})
    own = Engine(folder, "own-class", model, kv_transfer_config=frames, max_model_len=1024)
    try:
        own.connected()
        expected = own.generate([*long, *PROMPTS])[:2]
        own.forget()
        warm = own.generate(long)
        assert_same(warm, expected)
        assert [output["cached"] for output in warm] == [256, 256], "through payload frames, as from another host"
    finally:
        own.end()
    engine = Engine(
        folder, "other-weights", other_model, upstream, kv_transfer_config=server.config(), max_model_len=1024
    )
    try:
        engine.connected(3)
        assert engine.generate(long)[0]["cached"] == 0
    finally:
        engine.end()
    engine = Engine(folder, "upstream", model, upstream, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        engine.connected(3)  # a rank has a session for lookups as well
        outputs = engine.generate(long)
        assert_same(outputs, expected)
        assert [output["cached"] for output in outputs] == [256, 256], "whole blocks of what our own class stored"
        fresh = [tokens(300, 82)]
        engine.ask("wait_for_stores", seconds=60.0)  # half a second is little on a busy machine
        cold = engine.generate(fresh)
        assert cold[0]["cached"] == 0
        engine.forget()
        warm = engine.generate(fresh)
        assert_same(warm, cold)
        assert warm[0]["cached"] == 256
        engine.ask("abort", prompts=[*long, tokens(500, 83)], after_steps=[0, 1, 2])
        engine.forget()
        assert_same(engine.generate(long), expected)
        assert "full blocks only" in engine.text()
        engine.forget()
        assert "Lost the LMCache server" not in engine.text()
        engine.ask("deadline", seconds=1.0)
        server.send(signal.SIGSTOP)
        assert_same(engine.generate(long), expected)
        engine.forget()
        engine.ask("deadline", seconds=FOR_EVER)  # of which nothing is waited for: the server is known to be frozen
        assert_same(engine.generate(long), expected)
        assert engine.text().count("Lost the LMCache server") <= 3, "one missed deadline a connection, not one a call"
    finally:
        server.send(signal.SIGCONT)
        engine.end()


@pytest.mark.parametrize("connector", ["LMCacheMPConnector", "LMCacheConnectorV1"])
def test_large_weights_are_hashed_while_the_engine_runs(
    folder: Path, model: Path, server: Server, tmp_path: Path, connector: str
) -> None:
    """The engine starts and answers, and nothing is cached, until they are; with a server, and in process."""
    large = tmp_path / "model"
    shutil.copytree(model, large)
    with (large / "notes.txt").open("wb") as file:
        file.truncate(300 << 20)
    turns = Turns(tmp_path / "cache" / "lmcache")
    config = server.config() | {"kv_connector": connector} if "MP" in connector else {"kv_connector": connector}
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5",
        "LMCACHE_CHUNK_SIZE": "16",
    }
    config |= {"kv_role": "kv_both"}
    engine = Engine(folder, f"large-{connector}", large, environment, kv_transfer_config=config, max_model_len=1024)
    try:
        cold = engine.generate(PROMPTS)
        engine.forget()
        assert_same(engine.generate(PROMPTS), cold)
        assert "nothing is served or stored until it is done" in engine.text() and "Hashed" not in engine.text()
        turns.give()
        engine.wait_until(lambda: engine.text().count("Connected to the LMCache server") == 2, "the links", 60)
        assert "Hashed 0.4 GB" in engine.text()
        engine.generate(PROMPTS)
        engine.forget()
        warm = engine.generate(PROMPTS)
        assert_same(warm, cold)
        assert [output["cached"] >= 288 for output in warm] == [True, True]
    finally:
        turns.give()
        engine.end()


def test_bfloat16_bytes_go_round_and_stay_apart(folder: Path, model: Path, server: Server) -> None:
    """What comes back are the bytes that went in, in their places; and no KV of another dtype is served.

    Answers alone would not show two tokens that changed places: attention looks at a set.
    """
    driven = {"lmcache.mp.mp_transfer_mode": "engine_driven"}
    engine = Engine(
        folder,
        "bfloat16",
        model,
        dtype="bfloat16",
        disable_hybrid_kv_cache_manager=True,
        enable_prefix_caching=False,
        num_gpu_blocks_override=12,
        max_model_len=1024,
        kv_transfer_config=server.config(**driven),
    )
    try:
        engine.connected()
        first = engine.generate(PROMPTS[:1], max_tokens=1)
        assert first[0]["cached"] == 0, "float32's KV of this prompt is there, and is not ours"
        engine.forget()  # returns once the store has let go of its blocks, so that what is wiped is not what is stored
        stored = engine.ask("digests", wipe=True)["blocks"]
        again = engine.generate(PROMPTS[:1], max_tokens=1)
        assert again[0]["cached"] == 288
        loaded = engine.ask("digests")["blocks"]
        wiped = stored[-1]
        whole = [digest for digest in loaded if digest in stored and digest != wiped]
        assert len(whole) == 2, "the two whole blocks of the prompt are back, byte for byte"
    finally:
        engine.end()


def test_new_weights_in_a_running_engine_are_another_cache(
    folder: Path, model: Path, other_model: Path, server: Server
) -> None:
    """As RL loops do it: the engine forgets its own prefix cache, and tells no connector."""
    first, second, third = [tokens(300, 100)], [tokens(300, 101)], [tokens(300, 102)]
    engine = Engine(folder, "new-weights", model, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        engine.connected()
        old = engine.generate(first)
        engine.ask("reload", path=str(other_model))
        engine.forget()
        new = engine.generate(first)
        assert new[0]["cached"] == 0 and new[0]["logprobs"] != old[0]["logprobs"]
        engine.generate(second)  # the ranks' word has reached the scheduler: stored, under a name of its own
        cold = engine.generate(third)
        engine.forget()
        warm = engine.generate(third)
        assert warm[0]["cached"] == 288
        assert_same(warm, cold)
        engine.ask("reload", path=str(model))
        engine.forget()
        back = engine.generate(third)
        assert back[0]["cached"] == 0 and back[0]["logprobs"] != cold[0]["logprobs"]
    finally:
        engine.end()
    engine = Engine(folder, "old-weights", model, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        engine.connected()
        outputs = engine.generate([*first, *second, *third])
        assert [output["cached"] for output in outputs] == [288, 0, 0], "what the old weights computed, and no more"
        assert_same(outputs[:1], old)
    finally:
        engine.end()


def test_blocks_of_old_weights_in_vllms_own_cache_are_not_kept_as_new(
    folder: Path, model: Path, other_model: Path, server: Server
) -> None:
    """vLLM's own prefix cache is not emptied after the change, and a prompt begins with what the old weights computed."""
    stem = tokens(300, 105)
    longer, other = [stem + tokens(60, 106)], [tokens(40, 107)]
    engine = Engine(folder, "stale-blocks", model, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        engine.generate([stem])
        engine.ask("reload", path=str(other_model))
        engine.generate(other)  # the ranks' word has reached the scheduler
        assert engine.generate(longer)[0]["cached"] == 256, "blocks of the old weights"
        engine.forget()
        again = engine.generate(longer)
        assert engine.ask("reset", connector=True)["ok"]
        computed = engine.generate(longer)
        assert_same(again, computed)
        engine.forget()
        assert engine.generate(longer)[0]["cached"] == 352, "since the cache was emptied, all is kept"
    finally:
        engine.end()


def test_weights_that_come_back_from_sleep_keep_their_cache(folder: Path, model: Path, server: Server) -> None:
    """vLLM resets its connectors before any sleep. On a CPU no memory is given up, and all else is as on a GPU."""
    prompts = [tokens(300, 104)]
    engine = Engine(folder, "sleep", model, kv_transfer_config=server.config(), max_model_len=1024)

    def cached() -> int:
        outputs = engine.generate(prompts)
        assert_same(outputs, cold)
        engine.forget()  # returns once the store has let go of its blocks, for which an engine in this process does not wait
        return int(outputs[0]["cached"])

    try:
        cold = engine.generate(prompts)
        engine.forget()
        assert engine.ask("sleep", level=1, wake=[None])["awake"] == [True]
        assert cached() == 288
        assert engine.ask("sleep", level=0, wake=[["scheduling"]])["awake"] == [True]
        assert cached() == 288
        assert engine.ask("sleep", level=1, wake=[["weights"], ["kv_cache"]])["awake"] == [False, True]
        assert cached() == 0, "so do those wake up who write new weights before there is room for KV"
        assert engine.ask("sleep", level=2, wake=[None])["awake"] == [True]
        assert cached() == 0, "these weights do not come back by themselves"
        assert engine.ask("reset", connector=True)["ok"]
        assert engine.ask("sleep", level=1, wake=[None])["awake"] == [True]
        assert cached() == 0, "what the user has reset stays reset"
    finally:
        engine.end()


def test_a_model_that_vllm_computes_only_as_a_whole_is_not_served(folder: Path, model: Path, server: Server) -> None:
    """A hit would make vLLM's MEAN pooling raise, and end the engine."""
    engine = Engine(
        folder,
        "mean-pooling",
        model,
        runner="pooling",
        convert="embed",
        pooler_config={"pooling_type": "MEAN"},
        max_model_len=1024,
        kv_transfer_config=server.config(),
    )
    try:
        first, second = (engine.ask("embed", prompts=[tokens(700, 90)])["embeddings"] for _ in range(2))
        assert first == second
        assert "LMCache serves nothing for this engine" in engine.text() and "MEAN" in engine.text()
    finally:
        engine.end()


def test_a_pooling_model_that_reads_the_last_token_is_served(folder: Path, model: Path, server: Server) -> None:
    """Warm in the engine that has computed the prompts, and in the next one. It shares nothing with engines that generate."""
    options: dict[str, Any] = {"runner": "pooling", "convert": "embed", "pooler_config": {"pooling_type": "LAST"}}
    options |= {"max_model_len": 1024, "kv_transfer_config": server.config()}
    prompts, cold = [tokens(700, 91), tokens(700, 91)[:300] + tokens(90, 92)], []
    for name in ("pooling", "pooling-again"):
        engine = Engine(folder, name, model, **options)
        try:
            engine.connected()
            answers = [engine.ask("embed", prompts=prompts)]
            engine.forget()
            answers += [engine.ask("embed", prompts=prompts)]
            assert answers[-1]["cached"] == [688, 384]
            cold += answers
            for answer in answers:
                for one, other in zip(answer["embeddings"], cold[0]["embeddings"], strict=True):
                    assert one == pytest.approx(other, abs=1e-4)
        finally:
            engine.end()
    assert [answer["cached"][0] for answer in cold] == [0, 688, 688, 688]
    first, second = cold[0]["embeddings"]
    assert first != pytest.approx(second, abs=1e-2)


def test_whatever_changes_the_numbers_in_vllms_own_terms_is_noticed(folder: Path, model: Path) -> None:
    """Fields and methods of vLLM are known by name, and a new or renamed one would be missed in silence."""
    plain = {"model": str(model), "max_model_len": 1024, "dtype": "float32"}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    longer = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    longer["original_max_position_embeddings"] = 2048
    twice = folder / "two sets of weights"
    shutil.copytree(model, twice)
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    same: list[dict[str, Any]] = [
        {},
        {"enforce_eager": True},
        {"max_model_len": 2048},
        {"seed": 7},
        {"served_model_name": "another"},
        {"tokenizer": str(model)},
        {"load_format": "safetensors"},
        {"enable_lora": True},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
    ]
    others: list[dict[str, Any]] = [
        {"hf_overrides": {"rope_parameters": rope}},
        {"hf_overrides": {"rope_parameters": longer}},
        {"hf_overrides": {"rope_parameters": longer}, "max_model_len": 4096},
        {"hf_overrides": {"rms_norm_eps": 1e-5}},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
        {"model_impl": "transformers"},
        {"code_revision": "another"},
        {"load_format": "pt"},
        {"model": str(twice)},
        {"model": str(twice), "load_format": "safetensors"},
        {"enable_lora": True, "lora_dtype": "bfloat16"},
        {"enable_lora": True, "lora_target_modules": ["q_proj"]},
        {"additional_config": {"platform": "option"}},
        {"speculative_config": {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}},
    ]
    command = [
        PYTHON,
        str(Path(__file__).with_name("digests.py")),
        json.dumps([plain | more for more in same + others]),
    ]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=400, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["unwatched"] == [
        "compute_weight_checksums",
        "init_weight_transfer_engine",
        "shutdown_weight_transfer_engine",
        "supports_draft_weight_updates",
    ], "each of the others may change weights"
    digests = answer["digests"]
    assert len(set(digests[: len(same)])) == 1, dict(zip(map(str, same), digests, strict=False))
    assert len(set(digests)) == 1 + len(others), dict(zip(map(str, same + others), digests, strict=True))


def test_mla_that_vllm_computes_only_as_a_whole_is_answered_as_without_us(
    folder: Path, model: Path, server: Server
) -> None:
    """On a CPU vLLM computes MLA without chunked prefill and prefix caching; one line says that nothing is served."""
    mla = folder / "mla-model"
    script = ROOT / "tests" / "scripts" / "mla_model.py"
    subprocess.run([PYTHON, str(script), str(mla), str(model)], check=True, timeout=600)
    prompts, answers = [tokens(300, 108), tokens(300, 108)[:200] + tokens(60, 109)], []
    for name, more in (("mla-alone", {}), ("mla", {"kv_transfer_config": server.config()})):
        engine = Engine(folder, name, mla, max_model_len=1024, **more)
        try:
            answers += [engine.generate(prompts), engine.generate(prompts)]
        finally:
            engine.end()
    for outputs in answers[1:]:
        assert_same(outputs, answers[0])
        assert [output["cached"] for output in outputs] == [0, 0]
    why = "LMCache serves nothing for this engine: vLLM runs without chunked prefill and prefix caching for MLA on this CPU"
    assert engine.text().count(why) == 1


def test_tensor_parallel_two(folder: Path, model: Path, server: Server) -> None:
    """Each rank stores and loads its own heads, and what one rank has stored of all heads; and one rank loads what two have."""
    of_one, of_two = [tokens(300, 74)], PROMPTS_OF_TWO
    single = Engine(folder, "single", model, max_model_len=1024, kv_transfer_config=server.config())
    engine = None
    try:
        single.connected()
        expected_of_one = single.generate(of_one, max_tokens=4)
        expected = single.generate(of_two, max_tokens=4, salts=["apart"] * len(of_two))
        engine = Engine(
            folder,
            "tensor-parallel",
            model,
            {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            tensor_parallel_size=2,
            max_model_len=1024,
            kv_transfer_config=server.config(),
        )
        engine.connected(3)
        cold = engine.generate(of_two, max_tokens=4)
        assert_same(cold, expected)
        assert cold[0]["cached"] == 0
        engine.forget()
        warm = engine.generate([*of_two, *of_one], max_tokens=4)
        assert_same(warm, [*expected, *expected_of_one])
        assert [output["cached"] for output in warm] == [288, 288, 288]
        single.forget()
        warm = single.generate(of_two, max_tokens=4)
        assert_same(warm, expected)
        assert [output["cached"] for output in warm] == [288, 288]
    finally:
        single.end()
        if engine is not None:
            engine.end()


def test_vllm_serve_started_before_its_server(folder: Path, model: Path) -> None:
    """`kv_connector_module_path`, no server at first, and then one."""
    server = Server(folder, name="late-server")
    port, config = server.port, server.config()
    server.end()
    config["kv_connector_module_path"] = "lmcache.integration.vllm.lmcache_mp_connector"
    import json

    api = Api(folder, "serve", model, "--kv-transfer-config", json.dumps(config))
    late = None
    try:
        prompt = tokens(300, 90)
        cold = api.complete(prompt)
        late = Server(folder, port=port, name="late-server")

        def retrieved() -> bool:
            api.post("/reset_prefix_cache")
            again = api.complete(prompt)
            assert again["tokens"] == cold["tokens"]
            assert max(abs(a - b) for a, b in zip(again["logprobs"], cold["logprobs"], strict=True)) < 1e-3
            return "Retrieved " in late.text()

        api.wait_until(retrieved, "a hit", START_SECONDS)
    finally:
        api.end()
        if late is not None:
            late.end()


def test_a_model_that_cannot_be_cached_runs_on(folder: Path, model: Path, server: Server) -> None:
    """Layers with a sliding window whose blocks are longer than the server's chunks: nothing is served, and one line says so."""
    layers = ["sliding_attention", "full_attention"] * 4
    overrides = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 8, "layer_types": layers}
    options = {"hf_overrides": overrides, "model_impl": "transformers", "disable_hybrid_kv_cache_manager": False}
    engine = Engine(folder, "window", model, max_model_len=1024, kv_transfer_config=server.config(), **options)
    try:
        first = engine.generate(PROMPTS)
        engine.forget()
        again = engine.generate(PROMPTS)
        assert_same(again, first)
        assert again[0]["cached"] == 0
        assert "start the server with --chunk-size 128 or a multiple of it" in engine.text()
    finally:
        engine.end()
