"""Models with several kinds of KV: what is loaded gives the answers of what was computed, and every kind of it matters."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import CHUNK, FULL, IN_PROCESS, KINDS, PROMPTS, STEM, Serving, cached
from vllm_processes import PYTHON, Engine, Server, environment

from lmcache.sizing.model_kv import kinds_of
from prompts import assert_same, differs, tokens
from real_engines import ROOT

LONG = [tokens(500, 610 + number) for number in range(5)]


@pytest.fixture(scope="module")
def models(folder: Path, model: Path) -> Path:
    path = folder / "group-models"
    subprocess.run(
        [PYTHON, str(ROOT / "tests/scripts/group_models.py"), str(path), str(model)], check=True, timeout=600
    )
    return path


@pytest.fixture(scope="module", params=KINDS)
def serving(folder: Path, models: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Little KV space and few tokens a step: prompts are computed in parts, windows slide meanwhile, requests are preempted."""
    kind = request.param
    server = Server(folder, CHUNK, 0, f"{kind}-first")
    one = Serving(folder, kind, models / kind, server, None)  # type: ignore[arg-type]
    small = {"max_num_batched_tokens": 192, "kv_cache_memory_bytes": KINDS[kind] << 20}
    adapters = {"enable_lora": True, "max_lora_rank": 8} if kind == "gemma3" else {}
    one.engine = Engine(folder, kind, one.path, **one.options(**small, **adapters, scheduling_policy="priority"))
    one.engine.connected()
    yield one
    one.engine.end()
    one.server.end()


def test_warm_answers_are_cold_ones(serving: Serving) -> None:
    cold = serving.expected["prompts"] = [serving.engine.generate([prompt])[0] for prompt in PROMPTS]
    serving.engine.forget()  # returns once the stores have let go of their blocks
    alone = [serving.warm([prompt])[0] for prompt in PROMPTS]
    serving.same(alone, cold)
    assert serving.are_whole(alone)
    together = serving.warm()
    serving.same(together, cold)
    assert [serving.engine.text().count(line) for line in ("Traceback", "LMCache serves nothing")] == [0, 0]


def test_a_chunk_has_the_size_that_the_configuration_tells(serving: Serving) -> None:
    """`lmcache size` counts what the engine has registered: vLLM may make several groups of the layers of a kind, all alike."""
    config = json.loads((serving.path / "config.json").read_text())
    told = kinds_of(config, serving.options()["dtype"])
    spaces = serving.server.status()["index"]["spaces"]
    registered = [sum(one["shard_bytes"]) for one in spaces]
    assert sum(kind.kept_bytes(CHUNK) for kind in told) == sum(registered)


def test_many_requests_in_little_space(serving: Serving) -> None:
    cold = serving.expected["long"] = [serving.engine.generate([prompt], max_tokens=24)[0] for prompt in LONG]
    for salts in ([f"salt {at}" for at in range(len(LONG))], None):
        for priority in (None, [4, 3, 2, 1, 0]):
            serving.same(serving.warm(LONG, max_tokens=24, salts=salts, priority=priority), cold)


def test_own_hits_go_on_with_loads(serving: Serving) -> None:
    """vLLM's own cache has the beginning of the prompts, or some groups of it."""
    serving.engine.forget()
    serving.engine.generate([STEM[:400]], max_tokens=1)
    for prompt, expected in zip(PROMPTS, serving.expected["prompts"], strict=True):
        serving.same(serving.engine.generate([prompt]), [expected])


def test_the_next_turn_uses_the_answer(serving: Serving) -> None:
    prompt = tokens(120, 620)
    turn = serving.engine.generate([prompt], max_tokens=20)[0]
    following = [prompt + turn["tokens"] + tokens(40, 621)]
    own = serving.engine.generate(following)
    warm = serving.warm(following)
    assert cached(warm) == [CHUNK]
    if serving.kind == "qwen3next":  # in bfloat16, a state that decoding has reached differs from that of a prefill
        assert cached(own) == [CHUNK]
        assert_same(warm, own)
    else:
        serving.same(warm, serving.warm(following, salts=["nothing is stored for it"]))


def test_other_ways_to_answer(serving: Serving) -> None:
    """Several samples, beam search, log probabilities of the prompt and structured output: as computed, as after vLLM's own hit,
    and as after a load."""
    prompt = tokens(300, 640)
    computed, own = [serving.engine.ask("ways", prompt=prompt) for _ in range(2)]
    serving.engine.forget()
    loaded = serving.engine.ask("ways", prompt=prompt)
    assert loaded.pop("numbers") == pytest.approx(computed.pop("numbers"), abs=1e-3), "such requests load nothing"
    assert loaded["formed"] and len(set(map(tuple, loaded["several"]))) == 3
    assert (loaded["several"], loaded["beams"], loaded["formed"]) == (own["several"], own["beams"], own["formed"])
    if serving.kind != "qwen3next":
        assert loaded == computed


@pytest.mark.parametrize("serving", ["gemma3"], indirect=True)
def test_an_adapter_has_kv_of_its_own(serving: Serving) -> None:
    """With a LoRA adapter nothing is loaded that was computed without it, and the other way round."""
    adapter = {"adapter": str(serving.path.with_name("adapter"))}
    base, fresh = PROMPTS[0], tokens(400, 660)
    cold = serving.warm([base], **adapter)
    assert cached(cold) == [0], "the server has this prompt without the adapter"
    assert differs(cold, serving.expected["prompts"][:1])
    serving.same(cold, serving.engine.generate([base], salts=["adapter"], **adapter))
    warm = serving.warm([base], **adapter)
    serving.same(warm, cold)
    assert serving.are_whole(warm, [base])
    with_adapter = serving.warm([fresh], **adapter)
    without = serving.warm([fresh])
    assert cached(with_adapter) == cached(without) == [0]
    assert differs(with_adapter, without)
    both = [serving.warm([fresh], **more) for more in (adapter, {})]
    serving.same(both[0], with_adapter)
    serving.same(both[1], without)
    assert all(serving.are_whole(outputs, [fresh]) for outputs in both)


def test_sleep_keeps_what_is_stored(serving: Serving) -> None:
    serving.engine.forget()  # vLLM does not fall asleep while stores read its blocks
    assert serving.engine.ask("sleep", level=1, wake=[None])["awake"] == [True]
    warm = serving.warm(PROMPTS[:1])
    serving.same(warm, serving.expected["prompts"][:1])
    assert serving.are_whole(warm, PROMPTS[:1])


def test_aborted_requests(serving: Serving) -> None:
    serving.engine.forget()
    prompts = [*PROMPTS[:3], tokens(700, 630), tokens(900, 631)]
    serving.engine.ask("abort", prompts=prompts, after_steps=[0, 1, 3, 2, 4])
    serving.same(serving.engine.generate(PROMPTS), serving.expected["prompts"])
    serving.same(serving.warm(), serving.expected["prompts"])
    stems = [prompt[:600] for prompt in prompts[3:]]
    serving.same(serving.warm(stems), serving.warm(stems, salts=["one", "two"]))


def test_vllm_empties_its_cache_while_stores_read_it(serving: Serving) -> None:
    """vLLM can do so although the stores' blocks are held. What is stored, if anything, is what they held before."""
    for abort in (True, False):
        prompt, other = tokens(500, 670 + abort), tokens(1300, 672)
        serving.engine.forget()
        emptied = serving.engine.ask("empty", prompt=prompt, other=other, abort=abort)["emptied"]
        assert emptied == [True] * len(emptied)
        serving.same(serving.warm([prompt]), serving.warm([prompt], salts=["cold"]))


def test_the_null_block_is_never_written(serving: Serving) -> None:
    serving.engine.ask("null_block", poison=True)
    serving.same(serving.warm(PROMPTS[:3]), serving.expected["prompts"][:3])
    assert serving.engine.ask("null_block")["poisoned"]
    serving.same(serving.warm(PROMPTS[:2], salts=["cold", "cold"]), serving.expected["prompts"][:2])


def test_each_group_matters_and_may_fail(serving: Serving) -> None:
    each_group_matters_and_may_fail(serving)


def each_group_matters_and_may_fail(serving: Serving) -> None:
    """KV of one group that is not the prompt's changes the answer; a load that fails within a group does not."""
    expected, groups = serving.expected["prompts"][:1], serving.engine.ask("groups")["groups"]
    for group in range(groups):
        serving.engine.forget()
        serving.engine.ask("spoil", group=group, fail=True)
        serving.same(serving.engine.generate(PROMPTS[:1]), expected)
        serving.same(serving.warm(PROMPTS[:1]), expected)
    for group in range(groups):
        salts = [f"spoiled {group}"]
        serving.warm(PROMPTS[:1], salts=salts)
        right = [serving.warm(PROMPTS[:1], salts=salts) for _ in range(2)]
        assert_same(*right)  # the same load and the same steps: not even rounding differs
        serving.engine.forget()
        serving.engine.ask("spoil", group=group)
        wrong = serving.engine.generate(PROMPTS[:1], salts=salts)
        assert cached(wrong) == cached(right[0]) and serving.are_whole(wrong, PROMPTS[:1])
        with pytest.raises(AssertionError):
            assert_same(wrong, right[0])


def test_another_server_its_tier_and_another_engine(serving: Serving) -> None:
    """Cold after kill -9 of the server; then warm, also from a tier alone, and for an engine that comes after kill -9 of this.
    Both die in the middle of stores."""
    expected, long = serving.expected["prompts"][:3], {"max_tokens": 24, "salts": ["killed"] * len(LONG)}
    tier = ("--l2", f"disk://{serving.folder}/{serving.kind}-disk?max_gb=1", "--worth", "always")
    serving.engine.forget()
    _start_storing(serving, **long)
    serving.another_server("writes", *tier)
    serving.same(serving.engine.hear()["outputs"], serving.expected["long"])
    serving.engine.forget()
    serving.engine.connected(serving.sessions)
    for at, output in enumerate(expected):
        cold = serving.engine.generate([PROMPTS[at]])
        serving.same(cold, [output])
        assert at or cached(cold) == [0]
    serving.same(serving.warm(PROMPTS[:3]), expected)
    serving.engine.forget()
    serving.server.wait_until(lambda: _kept(serving.server), "all that is stored is in the tier", 60)
    serving.another_server("reads", *tier)
    serving.engine.connected(serving.sessions)
    warm = serving.warm(PROMPTS[:3])
    serving.same(warm, expected)
    assert serving.are_whole(warm, PROMPTS[:3])
    serving.engine.forget()
    _start_storing(serving, **long)
    serving.engine.end(signal.SIGKILL)
    serving.engine = Engine(serving.folder, f"{serving.kind}-again", serving.path, **serving.options())
    serving.engine.connected()
    warm = serving.engine.generate(PROMPTS[:3])
    serving.same(warm, expected)
    assert serving.are_whole(warm, PROMPTS[:3])
    for _ in range(2):
        serving.same(serving.warm(LONG, **long), serving.expected["long"])


def _start_storing(serving: Serving, **more: Any) -> None:
    """Ask for the long prompts, and return when some of what the server lacks of them is stored. The answer is still to be
    heard."""

    def stored() -> int:
        return int(serving.server.status()["counters"]["committed_chunks_total"])

    before = stored()
    serving.engine.tell("generate", prompts=LONG, **more)
    serving.engine.wait_until(lambda: stored() > before, "a store", 120)


def _kept(server: Server) -> bool:
    status = server.status()
    return 0 < status["counters"]["committed_chunks_total"] == status["tiers"][0]["counters"].get("kept_shards", 0)


def test_chunks_that_do_not_end_where_blocks_do_are_refused(serving: Serving) -> None:
    serving.engine.forget()
    serving.another_server("small-chunks", chunk=48)
    if serving.kind in FULL:  # they may end anywhere
        serving.engine.connected(serving.sessions)
        for hit in (0, 960):
            outputs = serving.warm(PROMPTS[:1])
            serving.same(outputs, serving.expected["prompts"][:1])
            assert cached(outputs) == [hit]
        return
    line = "start the server with --chunk-size"
    serving.engine.wait_until(lambda: line in serving.engine.text(), line, 60)
    for _ in range(2):
        outputs = serving.warm(PROMPTS[:1])
        serving.same(outputs, serving.expected["prompts"][:1])
        assert cached(outputs) == [0]


@pytest.mark.parametrize("kind", ["gemma3", "gptoss", "mistral", "qwen3next", "nemotron_nas"])
def test_in_process(folder: Path, models: Path, kind: str) -> None:
    """A server of the engine's own, and the lines that its users look for. vLLM's own class serves a model with one
    group."""
    one = Serving(folder, kind, models / kind, None, None)  # type: ignore[arg-type]
    small = {"max_num_batched_tokens": 192, "kv_cache_memory_bytes": KINDS[kind] << 20}
    one_group = kind in ("mistral", *FULL)
    if one_group:
        small["kv_transfer_config"] = {name: IN_PROCESS[name] for name in ("kv_connector", "kv_role")}
    # With the hybrid manager, no chunks of fewer tokens than a block are possible.
    environ = {"LMCACHE_CHUNK_SIZE": str(CHUNK if one_group else 100), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5"}
    environ["LMCACHE_SAVE_UNFULL_CHUNK"] = "false"  # as it is with windows and states
    one.engine = Engine(folder, f"{kind}-in-process", one.path, environ, **one.options(**small))
    try:
        one.engine.connected()
        cold = one.expected["prompts"] = [one.engine.generate([prompt])[0] for prompt in PROMPTS]
        one.engine.forget()
        alone = [one.warm([prompt])[0] for prompt in PROMPTS]
        one.same(alone, cold)
        assert one.are_whole(alone)
        one.same(one.warm(), cold)
        each_group_matters_and_may_fail(one)
        loaded = CHUNK if kind == "mistral" else 896  # of windows, only what is in reach
        for line in (
            "Total tokens 1000, LMCache hit tokens: 896, need to load: 896",
            f"Retrieved {loaded} out of 896 required tokens (from 1000 total tokens)",
            "Storing KV cache for 128 out of 896 tokens (skip_leading_tokens=768)",
        ):
            assert line in one.engine.text(), line
        one.engine.ask("reload", path=str(one.path))
        # With this answer the scheduler hears of it, and the next one is stored. Without LMCache, too, vLLM 0.32 does not read
        # the weights of Qwen3-Next as it did at first.
        computed = one.engine.generate(PROMPTS[:1], salts=["after the reload"])
        fresh = one.warm(PROMPTS[:1])
        one.same(fresh, computed)
        assert cached(fresh) == [0], "nobody says that these weights are the same"
        warm = one.warm(PROMPTS[:1])
        one.same(warm, computed)
        assert one.are_whole(warm, PROMPTS[:1])
    finally:
        one.engine.end()


@pytest.mark.parametrize("kind", ["gemma3", "nemotron_nas"])
def test_pipeline_stages(folder: Path, models: Path, kind: str) -> None:
    """Each stage has layers of some groups only. And the KV of the stages is that of an engine without them."""
    one = Serving(folder, kind, models / kind, Server(folder, CHUNK, 0, f"{kind}-stages-server"), None)  # type: ignore[arg-type]
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    try:
        one.engine = Engine(folder, f"{kind}-stages", one.path, environ, **one.options(pipeline_parallel_size=2))
        one.engine.ask("warm_up")
        one.engine.connected(3)
        cold = [one.engine.generate([prompt])[0] for prompt in PROMPTS]
        warm = one.warm()
        one.same(warm, cold)
        assert one.are_whole(warm)
        one.engine.end()
        one.engine = Engine(folder, f"{kind}-no-stages", one.path, **one.options())
        one.engine.connected()
        warm = one.engine.generate(PROMPTS[:2])
        one.same(warm, cold[:2])
        assert one.are_whole(warm, PROMPTS[:2])
    finally:
        if one.engine is not None:
            one.engine.end()
        one.server.end()


def test_without_the_hybrid_manager(folder: Path, models: Path) -> None:
    server = Server(folder, 16, 0, "no-hybrid-manager-server")
    one = Serving(folder, "gptoss", models / "gptoss", server, None)  # type: ignore[arg-type]
    one.engine = Engine(folder, "no-hybrid-manager", one.path, **one.options(disable_hybrid_kv_cache_manager=True))
    try:
        one.engine.connected()
        cold = one.engine.generate(PROMPTS[:2])
        warm = one.warm(PROMPTS[:2])
        one.same(warm, cold)
        assert cached(warm) == [992, 800]
    finally:
        one.engine.end()
        server.end()


def test_indexers_of_sparse_attention() -> None:
    """The scale of an indexer's values lies elsewhere in the block, so each of both is a group."""
    script = [PYTHON, str(ROOT / "tests/vllm/indexers.py")]
    done = subprocess.run(script, env=environment(), stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert len(answer["found"]) > 2 and set(answer["found"].values()) == {""}, answer
    latents, indexers = [0, 2, 4], [1, 3, 5]
    assert answer["groups"] == [
        ["mla", "bfloat16", 576, latents],
        ["mla", "fp8_e4m3", 128, indexers],
        ["mla", "float32", 1, indexers],
    ]
    assert answer["shards"] == [1, 1, 1], "all ranks have the same"
    elsewhere, other = answer["refused"]
    assert "of DeepseekV32IndexerCache on cpu" in elsewhere and "128 elements of bfloat16 a token" in other
