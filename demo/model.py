"""Write the model that vLLM serves in the demo and in the tests: Qwen3 architecture, random float32 weights, 134 MB.

    python -m demo.model FOLDER [--seed N]          (in the engine's environment: needs safetensors and tokenizers)

The weights are made so that the answer depends on the complete prompt. vLLM's own dummy weights are so small that attention
does nothing: all prompts with the same end are answered alike, whatever KV a cache returns. Here
- the query norm's weight is 2.5, so that attention's scores spread and some positions win, others in every head;
- the attention's output is scaled by 2, so that what those positions say matters beside the last token's own embedding;
- the output matrix is not the embedding, so that the model does not simply repeat its last token.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 512, 1536, 8, 8, 4, 64, 8192
QUERY_GAIN, OUTPUT_GAIN, LOGIT_GAIN = 2.5, 2.0, 3.0
END_OF_TEXT = "<|endoftext|>"
CONTEXT_TOKENS = 32_768


def write_model(folder: Path, seed: int = 0) -> None:
    """Write the folder, `config.json` last, so that a folder with a `config.json` is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, seed)
    _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(qwen3_config(), indent=1))


def qwen3_config(**shape: object) -> dict[str, object]:
    """`config.json` of this model, or with other sizes (and `torch_dtype`) under the file's own names."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 1_000_000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | shape


def _write_weights(folder: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> np.ndarray:
        values = rng.standard_normal((outputs, inputs), dtype=np.float32)
        values *= np.float32(gain / inputs**0.5)
        return values

    def ones(size: int, value: float = 1.0) -> np.ndarray:
        return np.full(size, value, np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, HIDDEN**0.5),
        "model.norm.weight": ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, LOGIT_GAIN),
    }
    for number in range(LAYERS):
        layer = {
            "input_layernorm": ones(HIDDEN),
            "self_attn.q_proj": matrix(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD_DIM, OUTPUT_GAIN),
            "self_attn.q_norm": ones(HEAD_DIM, QUERY_GAIN),
            "self_attn.k_norm": ones(HEAD_DIM),
            "post_attention_layernorm": ones(HIDDEN),
            "mlp.gate_proj": matrix(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": matrix(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INTERMEDIATE),
        }
        weights |= {f"model.layers.{number}.{name}.weight": value for name, value in layer.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer, trained on the source of Python's own standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sources], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_model(options.folder, options.seed)
