"""The second `generate` of a prompt with Transformers on a CPU: from LMCache, and from the caller's own `past_key_values`.

    .cache/vllm/bin/python -m benchmarks.transformers_generate [--tokens N] [--rounds N]      (an environment with transformers)

The model is the demo's (Qwen3 architecture, 8 layers, float32, random weights); both sides compute the prompt's last token and
then the answer. They take turns, so each round has one of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

GOAL = 1.2
"""The most that a hit may take, as a multiple of what a warm `past_key_values` takes."""
ANSWERS = (1, 8, 32)
"""Tokens of the answer."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_generate")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    import torch
    from demo.model import write_model

    from lmcache.integration.transformers import attach
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1, 8192, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    plain = model.generate
    with attach(model, embedded_gb=1) as attached:
        print(f"{options.tokens} tokens, {torch.get_num_threads()} threads; medians of {options.rounds} rounds, in ms")
        print(f"{'answer':>8} {'computed':>10} {'warm past_key_values':>22} {'LMCache':>9} {'ratio':>7}   goal {GOAL}")
        for new in ANSWERS:
            asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            asked["attention_mask"] = torch.ones_like(ids)
            cache = _own_cache(model)
            cold = _timed(lambda cache=cache, asked=asked: plain(ids, past_key_values=cache, **asked))
            model.generate(ids, **asked)
            attached.flush()
            warm, ours = [], []
            for _ in range(options.rounds):
                _crop(cache, options.tokens - 1)
                warm.append(_timed(lambda cache=cache, asked=asked: plain(ids, past_key_values=cache, **asked)))
                before = attached.hit_tokens
                ours.append(_timed(lambda asked=asked: model.generate(ids, **asked)))
                assert attached.hit_tokens - before == options.tokens - 1, "not a hit"
            ratio = median(mine / theirs for mine, theirs in zip(ours, warm, strict=True))
            print(
                f"{new:>8} {cold * 1e3:>10.0f} {median(warm) * 1e3:>22.1f} {median(ours) * 1e3:>9.1f} {ratio:>7.2f}"
                f"   {'yes' if ratio <= GOAL else 'no'}"
            )


def _own_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _crop(cache: Any, tokens: int) -> None:
    """The cache as it was behind the prompt but for its last token, in memory of its own, as the caller would keep it."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :tokens].contiguous(), layer.values[:, :, :tokens].contiguous()


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
