"""Write small models with several kinds of KV: `python group_models.py FOLDER TOKENIZER [NAME...]`, in an engine's environment.

Each lies in a folder of FOLDER that is named as in MODELS; without names, all are written. TOKENIZER is the folder of a model
whose tokenizer they get. The weights are random and so large that an answer depends on the whole prompt, through every kind of
layer: Gemma 3, gpt-oss and Mellum have sliding windows of 128 tokens and full attention, Mistral has windows only, Qwen3-Next has
linear and full attention, and Llama 4 attends to chunks of 256 tokens and to everything. Nemotron-NAS has full attention with
another number of KV heads in each layer, and one layer without attention.

Gemma 3 also gets a LoRA adapter, in a folder `adapter` of its own. `drafted` is a Gemma 3 for speculative decoding: its first
layer has the weights of the only layer of `drafter`, and its other layers add so little that the drafter foresees most of its
tokens.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,  # vLLM knows no other
    },
    "drafted": {
        "model_type": "gemma3_text",
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 5,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
    "drafter": {  # vLLM wants all of its layers in one group
        "model_type": "gemma3_text",
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "sliding_window": 128,
    },
    "gptoss": EXPERTS
    | {
        "model_type": "gpt_oss",
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 128,
        "num_local_experts": 4,
    },
    "llama4": EXPERTS
    | {
        "model_type": "llama4_text",
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 256,
        "attn_temperature_tuning": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,  # vLLM-CPU knows no other
        "interleave_moe_layer_step": 2,
    },
    "nemotron_nas": {
        "model_type": "llama",  # but for the heads, its layers are Llama's
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "kv_heads": [4, 1, 0, 2, 1],
    },
    "mellum": {
        "model_type": "mellum",
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "mlp_layer_types": ["dense"] * 4,
        "sliding_window": 128,
    },
    "qwen3next": EXPERTS
    | {
        "model_type": "qwen3_next",
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "torch_dtype": "bfloat16",  # vLLM-CPU has the kernels of linear attention for no other
    },
}
BLOCKS = """
from transformers import LlamaConfig


class Block(dict):
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return Block(value) if isinstance(value, dict) else value


class BlocksConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **more):
        super().__init__(**more)
        self.block_configs = [Block(one) for one in block_configs]
"""
"""The configuration of Nemotron-NAS is code in its repositories, which neither Transformers nor vLLM has."""


LOUD, FAINT = 6.0, 0.03
"""What the layer adds that `drafted` and `drafter` have in common, and what each layer adds that only `drafted` has. A token's
embedding, of size 1, must not decide alone what comes next."""


def write(folder: Path, tokenizer: Path, config: dict[str, Any]) -> None:
    described = COMMON | config
    dtype, kv_heads = described.pop("torch_dtype", "float32"), described.pop("kv_heads", [])
    made = CONFIG_MAPPING[described.pop("model_type")](**described)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = gain(name, weight)
            if value:
                weight.copy_(value * torch.randn(weight.shape, generator=noise))
            elif "q_norm" in name:
                weight += 1.5  # scores spread, and some positions win
            elif "A_log" in name:
                weight.copy_(torch.linspace(-6.0, -2.0, weight.numel()))  # states that do not forget
            elif folder.name in ("drafted", "drafter") and ".post_" in name:
                weight.fill_((LOUD if ".layers.0." in name else FAINT) - 1.0)  # Gemma multiplies by 1 + weight
        if made.tie_word_embeddings:
            model.get_input_embeddings().weight /= made.hidden_size**0.5  # by which the model multiplies them
    for layer, heads in zip(model.model.layers, kv_heads, strict=False):
        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight = torch.nn.Parameter(part.weight[: heads * made.head_dim].clone())
        if not heads:
            del layer.self_attn, layer.input_layernorm
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text()) | {"torch_dtype": dtype}
    if kv_heads:
        (folder / "blocks.py").write_text(BLOCKS)
        kept |= {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}
        kept |= {"auto_map": {"AutoConfig": "blocks.BlocksConfig"}, "block_configs": blocks(made, kv_heads)}
    (folder / "config.json").write_text(json.dumps(kept))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)


def blocks(config: Any, kv_heads: list[int]) -> list[dict[str, Any]]:
    """The blocks of Nemotron-NAS with so many KV heads each; a block with none has no attention."""
    groups = [config.num_attention_heads // heads if heads else None for heads in kv_heads]
    ffn = {"no_op": False, "intermediate_size": config.intermediate_size}
    return [{"attention": {"no_op": one is None, "n_heads_in_group": one}, "ffn": ffn} for one in groups]


def gain(name: str, weight: torch.Tensor) -> float:
    """The standard deviation of a random matrix; 0 for what keeps its own values."""
    if weight.dim() < 2 or "norm" in name or "conv1d" in name:
        return 0.0
    if "embed_tokens" in name:
        return 1.0
    inputs = weight.shape[-2] if "experts" in name else weight.shape[-1]
    return float((3.0 if "lm_head" in name else 2.0 if "o_proj" in name or "out_proj" in name else 1.5) / inputs**0.5)


def write_adapter(folder: Path, base: dict[str, Any], rank: int = 8) -> None:
    """Write a LoRA adapter for the queries, keys and values of all layers, as PEFT stores it."""
    sizes = dict.fromkeys(("k_proj", "v_proj"), base["num_key_value_heads"] * base["head_dim"])
    sizes["q_proj"] = base["num_attention_heads"] * base["head_dim"]
    noise = torch.Generator().manual_seed(1)
    weights = {}
    for layer, (module, size) in itertools.product(range(base["num_hidden_layers"]), sizes.items()):
        name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, base["hidden_size"], generator=noise) / 16
        weights[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=noise) / 4
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))


if __name__ == "__main__":
    for name in sys.argv[3:] or MODELS:
        write(Path(sys.argv[1]) / name, Path(sys.argv[2]), MODELS[name])
        if name == "gemma3":
            write_adapter(Path(sys.argv[1]) / "adapter", COMMON | MODELS[name])
