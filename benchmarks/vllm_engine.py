"""A vLLM engine in one process that answers prompts of token ids: `python vllm_engine.py '{"model": ..., ...}'`.

Runs under vLLM's Python. One JSON object a line in, one out: `{"call": "first_token", "prompt": [ids]}`, `{"call": "forget"}`,
`{"call": "switch", "on": false}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def first_token(llm: Any, prompt: list[int]) -> dict[str, float]:
    """Seconds until the first token of the answer is there, and how many tokens of the prompt were not computed."""
    from vllm import SamplingParams

    start = time.perf_counter()
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return {"seconds": time.perf_counter() - start, "cached": output.num_cached_tokens or 0}


def forget(llm: Any) -> dict[str, bool]:
    """Empty the engine's own prefix cache, once stores that are under way have let their blocks go."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        llm.llm_engine.step()
        if llm.llm_engine.reset_prefix_cache():
            return {"done": True}
        time.sleep(0.01)
    return {"done": False}


def switch(llm: Any, on: bool) -> dict[str, bool]:
    """Take LMCache out of the engine's path, or put it back: two engines differ by more than what LMCache costs."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    for connector in (llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()):
        ours = getattr(connector, "_lmcache_engine", connector)  # in-process mode: vLLM's own class is in front of ours
        halves = vars(ours).setdefault("halves", (ours._scheduler, ours._worker))
        ours._scheduler, ours._worker = halves if on else (None, None)
    return {"on": on}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]))
    calls = {"first_token": first_token, "forget": forget, "switch": switch, "ready": lambda _: {}}
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(calls[request.pop("call")](llm, **request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
    os._exit(0)
