"""A vLLM engine that answers many prompts at once: `python -m benchmarks.gpu.engine '{"model": ..., ...}'`.

Runs under vLLM's Python. One JSON object a line in, one out: `{"call": "first_tokens", "prompts": [[ids]]}`; see `Engine`.
The setting "redraw" is ours: give the weights of `benchmarks.gpu.model` after loading.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.model import redraw

SHORT = 32
"""Tokens of prompts that only make the engine take a step."""


def worker_cpu_seconds(worker: Any) -> float:
    """CPU time so far of LMCache's threads in the worker's process (theirs are named after it)."""
    ours = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("lmcache-")]
    stats = [Path(f"/proc/self/task/{number}/schedstat").read_text() for number in ours]
    return sum(int(stat.split()[0]) for stat in stats) / 1e9


class Engine:
    def __init__(self, llm: Any, vocabulary: int) -> None:
        self._llm, self._vocabulary = llm, vocabulary
        self._numbers = itertools.count()
        self._rng = random.Random(time.time_ns())

    async def ready(self) -> dict[str, Any]:
        await self._answer(self._random(SHORT), 1)
        return {}

    async def first_tokens(
        self, prompts: list[list[int]], tokens: int = 1, pause: float = 0.05, transfer: Any = None
    ) -> list[dict[str, Any]]:
        """Ask for all at once, `pause` seconds behind a short prompt that wakes the engine: seconds until each one's first token,
        tokens that were not computed, the first token's logprobs, the answer's token ids, and its `kv_transfer_params`.
        transfer: the requests' `kv_transfer_params`."""
        await self._answer(self._random(SHORT), 1)
        await asyncio.sleep(pause)
        return await self.answers(prompts, tokens, transfer)

    async def answers(self, prompts: list[list[int]], tokens: int = 1, transfer: Any = None) -> list[dict[str, Any]]:
        """As `first_tokens`, without a step before."""
        return list(await asyncio.gather(*(self._answer(prompt, tokens, None, transfer) for prompt in prompts)))

    async def forget(self) -> dict[str, bool]:
        """Empty the engine's own prefix cache once stores have let their blocks go (a step lets the engine notice)."""
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            if await self._llm.reset_prefix_cache():
                return {"done": True}
            await self._answer(self._random(SHORT), 1)
            await asyncio.sleep(0.05)
        return {"done": False}

    async def beside(self, prompts: list[list[int]], decodes: int, seconds: float) -> list[float]:
        """Milliseconds between tokens of `decodes` running requests while the prompts come one by one, and for `seconds` more."""
        stamps: list[list[float]] = [[] for _ in range(decodes)]
        running = [asyncio.create_task(self._answer(self._random(64), 4000, one)) for one in stamps]
        while not all(stamps):
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        begin = time.perf_counter()
        for prompt in prompts:
            await self._answer(prompt, 1)
            await asyncio.sleep(0.3)
        await asyncio.sleep(seconds)
        end = time.perf_counter()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return [
            1000 * (later - earlier)
            for one in stamps
            for earlier, later in itertools.pairwise(one)
            if begin <= earlier and later <= end
        ]

    async def cpu_seconds(self) -> float:
        return float(sum(await self._llm.collective_rpc(worker_cpu_seconds)))

    async def _answer(
        self, prompt: list[int], tokens: int, stamps: list[float] | None = None, transfer: Any = None
    ) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        wanted = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=8 if stamps is None else None,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        begin, out = time.perf_counter(), {"seconds": 0.0, "cached": 0, "logprobs": {}, "answer": [], "transfer": None}
        async for part in self._llm.generate(
            {"prompt_token_ids": prompt}, wanted, request_id=f"bench-{next(self._numbers)}"
        ):
            now = time.perf_counter()
            if stamps is not None:
                stamps.append(now)
            if not out["answer"]:
                out["seconds"], out["cached"] = now - begin, part.num_cached_tokens or 0
                first = (part.outputs[0].logprobs or [{}])[0]
                out["logprobs"] = {str(token): value.logprob for token, value in first.items()}
            out["answer"] += part.outputs[0].token_ids
            out["transfer"] = part.kv_transfer_params or out["transfer"]
        return out

    def _random(self, count: int) -> list[int]:
        return self._rng.choices(range(1, self._vocabulary), k=count)


def take_failed_loads_for_granted() -> None:
    """Serve models with windows or states with a release of vLLM that cannot be told of a failed load of them. LMCache refuses
    that; here no load fails, and what was not loaded would show in the answers."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    if not hasattr(base, "KVConnectorTransferResults"):
        base.KVConnectorTransferResults = object


async def serve(settings: dict[str, Any], answers: Any) -> None:
    """Answer standard input until it ends."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    take_failed_loads_for_granted()  # vLLM's other processes are forked from this one
    new_weights, vocabulary = settings.pop("redraw"), settings.pop("vocabulary")
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    if new_weights:
        await llm.collective_rpc(redraw)
    engine = Engine(llm, vocabulary)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        answer = await getattr(engine, request.pop("call"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    llm.shutdown()


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    asyncio.run(serve(json.loads(sys.argv[1]), out))
    os._exit(0)
