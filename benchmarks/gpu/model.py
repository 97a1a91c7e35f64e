"""Models without a checkpoint, of the shapes that people serve, whose answers depend on the whole prompt.

vLLM's dummy weights are so small that attention does nothing: every prompt with the same end is answered alike, whatever KV a
cache returns. So the weights are drawn anew in the engine's process once it has loaded them, as `demo.model` draws those of
the small model: scores that spread, attention that matters, an output matrix that is not the embedding.

    python -m benchmarks.gpu.model DIR [--shape qwen3-8b]      # a checkpoint (16 GB) for benchmarks with several engines
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.model import qwen3_config

CONTEXT_TOKENS = 40960
_FILE_BYTES = 4 << 30
"""A file of a checkpoint ends with the first weight beyond so many bytes."""


@dataclass(frozen=True)
class Shape:
    """A model by its `config.json`. kv_bytes: the KV in bfloat16 that a prompt of so many tokens needs to go on from its end.
    chunk_tokens: chunks must end where the engine keeps states or windows. settings: further ones of vLLM."""

    config: dict[str, Any]
    kv_bytes: Callable[[int], int]
    chunk_tokens: int = 256
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return int(self.config["vocab_size"])

    def write(self, folder: Path) -> Path:
        """Write a folder with `config.json` alone, for `load_format="dummy"`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        return folder


_WINDOW = 1024
_ATTENTION = {"max_position_embeddings": CONTEXT_TOKENS, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}


def _qwen3_8b() -> Shape:
    config = qwen3_config(
        num_hidden_layers=36, hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=CONTEXT_TOKENS, torch_dtype="bfloat16",
    )  # fmt: skip
    return Shape(config, lambda tokens: tokens * 36 * 2 * 8 * 128 * 2)


def _gemma3_12b() -> Shape:
    """Five layers of six have a window of 1,024 tokens."""
    config = _ATTENTION | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 3840,
        "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "sliding_window": _WINDOW, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
        "query_pre_attn_scalar": 256, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    of_layer = 2 * 8 * 256 * 2
    return Shape(config, lambda tokens: of_layer * (8 * tokens + 40 * min(tokens, _WINDOW)))


def _qwen3_next() -> Shape:
    """The attention of Qwen3-Next-80B-A3B, three layers of four linear, with 8 of its 512 experts."""
    config = _ATTENTION | {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "full_attention_interval": 4, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "partial_rotary_factor": 0.25, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [], "rope_theta": 10_000_000, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    triton = {"additional_config": {"gdn_prefill_backend": "triton"}}  # the default needs FlashInfer
    state = (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)) * 2
    return Shape(config, lambda tokens: 12 * 2 * 2 * 256 * 2 * tokens + 36 * state, 544, triton)


def _deepseek_v2_lite() -> Shape:
    """The attention (MLA) of DeepSeek-V2-Lite, with dense MLPs in all 27 layers."""
    config = _ATTENTION | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 27, "n_routed_experts": None, "n_shared_experts": None, "moe_intermediate_size": 1408,
        "num_experts_per_tok": None, "hidden_act": "silu", "rope_theta": 10_000, "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return Shape(config, lambda tokens: 27 * (512 + 64) * 2 * tokens)


SHAPES: dict[str, Callable[[], Shape]] = {
    "qwen3-8b": _qwen3_8b,
    "gemma3-12b": _gemma3_12b,
    "qwen3-next": _qwen3_next,
    "deepseek-v2-lite": _deepseek_v2_lite,
}


def redraw(worker: Any) -> int:
    """Give every weight of the worker's model a new value, the same in every process. Runs in the engine's process.

    Returns:
        How many parameters were drawn.
    """
    import torch

    model = worker.model_runner.get_model()
    weights = sorted(model.named_parameters())
    with torch.no_grad():
        for number, (name, weight) in enumerate(weights, 1):
            draw(weight, number, name, model.config.model_type)
    return len(weights)


def draw(weight: Any, number: int, name: str, model_type: str) -> None:
    """Give a weight (a torch tensor) the values that belong to its name. number: of the weight; it decides what is drawn."""
    import torch

    if weight.dim() == 1:
        vectors = _VECTORS.get(model_type, _VECTORS["qwen3"])
        weight.fill_(next(value for part, value in vectors.items() if part in name))
        return
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    inputs = weight.shape[-1]
    if "embed" in name and model_type != "gemma3_text":
        inputs = 1  # Gemma multiplies its embedding by the square root of its size
    generator = torch.Generator(device=weight.device).manual_seed(number)
    weight.normal_(0.0, gain / inputs**0.5, generator=generator)


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a checkpoint with such weights, which engines of one LMCache server share: they share no KV of weights that each has
    drawn for itself. Needs transformers, and as much memory on the disk as the model has bytes."""
    import torch
    from safetensors.torch import save_file

    from transformers import AutoConfig, AutoModelForCausalLM

    shape.write(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept, size, files, index = dict[str, Any](), 0, 0, dict[str, str]()
    weights = sorted(model.named_parameters())
    for number, (name, empty) in enumerate(weights, 1):
        weight = torch.empty(empty.shape, dtype=torch.bfloat16, device=device)
        draw(weight, number, name, shape.config["model_type"])
        kept[name], size = weight.cpu(), size + weight.nbytes
        if size > _FILE_BYTES or number == len(weights):
            files += 1
            save_file(kept, folder / f"model-{files:05}.safetensors", metadata={"format": "pt"})
            index |= dict.fromkeys(kept, f"model-{files:05}.safetensors")
            kept, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


_GAINS = {"lm_head": 3.0, "o_proj": 0.35, "down_proj": 0.35, "out_proj": 0.35, "w2_weight": 0.35}
"""What attention and MLP add is small beside the residual, or 36 random layers would drown a bf16 rounding's cause."""
_VECTORS = {
    "qwen3": {"q_norm": 2.0, "": 1.0},
    "gemma3_text": {"q_norm": 1.0, "post_": -0.65, "layers": 0.0, "norm": 2.0, "": 0.0},
    "qwen3_next": {"q_norm": 1.0, "linear_attn.norm": 1.0, "A_log": -6.0, "dt_bias": 1.0, "": 0.0},
}
"""Model type -> part of a vector's name -> its value. Gemma's and Qwen3-Next's norms add 1 to their weights. With A_log = -6 a
linear layer forgets within some hundred tokens, and not within two."""


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference between two {token id: logprob} of one position, over what both list; inf where that is little."""
    both = one.keys() & other.keys()
    if 2 * len(both) < min(len(one), len(other)):
        return float("inf")
    return max(abs(one[token] - other[token]) for token in both)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-8b")
    options = parser.parse_args()
    write_checkpoint(SHAPES[options.shape](), options.folder)


if __name__ == "__main__":
    main()
