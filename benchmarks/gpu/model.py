"""A model of Qwen3-8B's shape without a checkpoint, whose answers depend on the whole prompt.

vLLM's dummy weights are so small that attention does nothing: every prompt with the same end is answered alike, whatever KV a
cache returns. So the weights are drawn anew in the engine's process once it has loaded them, as `demo.model` draws those of
the small model: scores that spread, attention that matters, an output matrix that is not the embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.model import qwen3_config

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 36, 4096, 12288, 32, 8, 128, 151936
CONTEXT_TOKENS = 40960
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
"""KV of one token, bf16."""


def write_shape(folder: Path) -> Path:
    """A folder with `config.json` alone: for `load_format="dummy"`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_config(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT_TOKENS,
        torch_dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def redraw(worker: Any) -> int:
    """Give every weight of the worker's model a new value, the same in every process. Runs in the engine's process.

    Returns:
        How many parameters were drawn.
    """
    import torch

    drawn = 0
    with torch.no_grad():
        for name, weight in sorted(worker.model_runner.get_model().named_parameters()):
            drawn += 1
            if weight.dim() == 1:
                weight.fill_(2.0 if "q_norm" in name else 1.0)
                continue
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            inputs = 1 if "embed" in name else weight.shape[-1]
            generator = torch.Generator(device=weight.device).manual_seed(drawn)
            weight.normal_(0.0, gain / inputs**0.5, generator=generator)
    return drawn


_GAINS = {"lm_head": 3.0, "o_proj": 0.35, "down_proj": 0.35}
"""What attention and MLP add is small beside the residual, or 36 random layers would drown a bf16 rounding's cause."""


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference between two {token id: logprob} of one position, over what both list; inf where that is little."""
    both = one.keys() & other.keys()
    if 2 * len(both) < min(len(one), len(other)):
        return float("inf")
    return max(abs(one[token] - other[token]) for token in both)
