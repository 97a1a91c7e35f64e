"""Write small models for speculative decoding with drafters that have KV of their own: `python drafters.py FOLDER TOKENIZER`, in
an engine's environment. TOKENIZER is the folder of a model whose tokenizer they get.

    target   Llama's architecture: one layer of full attention, then three with windows of 128 tokens
    eagle, eagle3   their drafters, of one layer
    mtp      GLM-4.5's architecture, with a layer that predicts one token more

In the targets only the first layer's attention says much. Each drafter has this layer's weights, reads tokens and no hidden
states, and so foresees nearly all tokens of its target, as long as it has its own KV of the prompt.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS = 8192, 256, 4, 2, 64, 512, 4
LOUD, FAINT = 12.0, 0.02
"""What the common layer's attention adds to a token's embedding of size 1, and what all else adds."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INNER,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA = SHAPE | {"model_type": "llama", "rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False}
WINDOWS = {"layer_types": ["full_attention"] + ["sliding_attention"] * 3, "sliding_window": 128}
GLM = SHAPE | {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "use_qk_norm": False,
    "moe_intermediate_size": INNER // 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
Weights = dict[str, torch.Tensor]
noise = torch.Generator().manual_seed(0)


def matrix(outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=noise) * (gain / inputs**0.5)


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": weight.clone() for name, weight in weights.items()}


def attention(gain: float) -> Weights:
    return {
        "q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, 5.0),
        "k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
        "v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        "o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, gain),
    }


def mlp(inner: int = INNER) -> Weights:
    up = {f"{name}_proj.weight": matrix(inner, HIDDEN) for name in ("gate", "up")}
    return up | {"down_proj.weight": matrix(HIDDEN, inner, FAINT)}


def experts() -> Weights:
    found = under("shared_experts.", mlp(INNER // 2))
    for number in range(EXPERTS):
        found |= under(f"experts.{number}.", mlp(INNER // 2))
    router = {"gate.weight": matrix(EXPERTS, HIDDEN), "gate.e_score_correction_bias": torch.zeros(EXPERTS)}
    return found | router


def layer(own_attention: Weights, own_mlp: Weights) -> Weights:
    norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
    return under("self_attn.", own_attention) | under("mlp.", own_mlp) | norms


def ends() -> Weights:
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=noise)
    return {
        "model.embed_tokens.weight": embeddings
        / embeddings.square().mean(1, keepdim=True).sqrt(),  # EAGLE's layer has no norm
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, 3.0),
    }


def write(folder: Path, tokenizer: Path, config: dict[str, Any], weights: Weights) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    (folder / "config.json").write_text(json.dumps(config))


def main(folder: Path, tokenizer: Path) -> None:
    common, outside = attention(LOUD), ends()
    target = outside | under("model.layers.0.", layer(common, mlp()))
    for number in (1, 2, 3):
        target |= under(f"model.layers.{number}.", layer(attention(FAINT * 8), mlp()))
    described = LLAMA | {"num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]} | WINDOWS
    write(folder / "target", tokenizer, described, target)

    tokens_only = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1)
    eagle = under("layers.0.", layer(common, mlp())) | {"fc.weight": tokens_only}
    del eagle["layers.0.input_layernorm.weight"]
    eagle["embed_tokens.weight"] = outside["model.embed_tokens.weight"].clone()
    described = LLAMA | {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    write(folder / "eagle", tokenizer, described, eagle)

    of_both = {
        name: torch.cat([weight, torch.zeros_like(weight)], 1) if name[0] in "qkv" else weight
        for name, weight in common.items()
    }  # of the token's embedding, and of nothing else
    eagle3 = under("midlayer.", layer(of_both, mlp()) | {"hidden_norm.weight": torch.ones(HIDDEN)})
    eagle3 |= {"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN), "norm.weight": torch.ones(HIDDEN)}
    eagle3 |= {"lm_head.weight": outside["lm_head.weight"].clone()}
    described |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCABULARY}
    described["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    write(folder / "eagle3", tokenizer, described, eagle3)

    mtp = (
        outside
        | under("model.layers.0.", layer(common, mlp()))
        | under("model.layers.1.", layer(attention(FAINT * 8), experts()))
    )
    mtp |= under("model.layers.2.", layer(common, experts()) | {"eh_proj.weight": tokens_only})
    mtp |= under("model.layers.2.", {name: torch.ones(HIDDEN) for name in ("enorm.weight", "hnorm.weight")})
    mtp |= under(
        "model.layers.2.shared_head.", {"norm.weight": torch.ones(HIDDEN), "head.weight": outside["lm_head.weight"]}
    )
    mtp["model.layers.2.embed_tokens.weight"] = outside["model.embed_tokens.weight"].clone()
    write(folder / "mtp", tokenizer, GLM, mtp)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
