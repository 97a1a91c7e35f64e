"""How much KV a model makes, from its config.json: which kinds of layers it has, and how many bytes a token, or a state, takes.

The sizes are those that vLLM registers with one rank: a layout for each kind of KV (`integration/vllm/model.py`). Several ranks
divide the same bytes among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmcache.chunks import LOSSY_KV, Layout
from lmcache.chunks.layout import DTYPE_BYTES
from lmcache.errors import ConfigError
from lmcache.memory.slabs import SECTOR_BYTES

Config = Mapping[str, Any]
_BLOCK_TOKENS = 16
"""Of vLLM on GPUs. It keeps complete blocks of a window."""
_INDEXER_BYTES = 132
"""Of a token in an indexer of DeepSeek V3.2: 128 values of 8 bits, and a scale."""
_DTYPES = {"auto": "", "fp8": "fp8_e4m3", "half": "float16", "float": "float32"}
_FULL = ("full_attention", "attention", "global", "full")
_WINDOW = ("sliding_attention", "sliding_window", "local", "swa")
_STATES = ("linear_attention", "mamba")
NO_KV = "none"


class Kind(NamedTuple):
    """Layers of a model with one kind and shape of KV.

    name: full attention, sliding window, chunked attention, MLA, indexer, or state. layers: how many. layer_bytes: of one layer,
    for one token or as one state. reach_tokens: as in `Group`: how far before the end of a prefix it is needed; 0 for everything,
    1 for a state.
    """

    name: str
    layers: int
    layer_bytes: int
    reach_tokens: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all layers, for one token or as one state."""
        return self.layers * self.layer_bytes

    def kept_bytes(self, chunk_tokens: int) -> int:
        """Return the bytes of a chunk that are kept: of the tokens that are in reach of its end."""
        return self.bytes * (min(chunk_tokens, self.reach_tokens) if self.reach_tokens else chunk_tokens)

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Return the memory of L1 that these take: complete sectors."""
        return -(-self.kept_bytes(chunk_tokens) // SECTOR_BYTES) * SECTOR_BYTES


class _Stored(NamedTuple):
    """How KV lies in L1. dtype: a key of `DTYPE_BYTES`; codec: a value of `LOSSY_KV`."""

    dtype: str
    codec: int

    def head_bytes(self, head_size: int) -> int:
        """Return the bytes of K and V of one head of a token.

        Raises:
            ConfigError: such heads cannot be rounded.
        """
        layout = Layout("", self.dtype, 1, 1, head_size, 1, codec=self.codec)
        if layout.l1_codec != "none" and not layout.rounded_in_l1:
            raise ConfigError(
                f"--lossy-kv {layout.lossy_kv}: heads of {head_size} values in {self.dtype} cannot be rounded (docs/codecs.md)"
            )
        return sum(layout.head_bytes)


def kv_dtype_of(config: Config, given: str = "auto") -> str:
    """Return the dtype of the KV, a key of `DTYPE_BYTES`. given: as engines take it (`--kv-cache-dtype`), `auto` for the model's.

    Raises:
        ConfigError: the dtype is unknown.
    """
    name = _DTYPES.get(given, given)
    if not name:
        name = _model_dtype(config)
        scheme = config.get("quantization_config") or {}
        cache = scheme.get("kv_cache_scheme") or {}
        if (cache.get("type"), cache.get("num_bits")) == ("float", 8) or scheme.get("kv_cache_quant_algo") == "FP8":
            name = "fp8_e4m3"
    if name not in DTYPE_BYTES:
        raise ConfigError(f"--kv-dtype {given}: {name} is unknown; known: auto, fp8, {', '.join(DTYPE_BYTES)}")
    return name


def _model_dtype(config: Config) -> str:
    text = _text_of(config)
    names = (one.get(key) for one in (text, config) for key in ("torch_dtype", "dtype"))
    name = str(next(filter(None, names), "bfloat16")).removeprefix("torch.")
    return "bfloat16" if name == "float32" else name  # engines serve such weights with 16 bits


def _text_of(config: Config) -> Config:
    """Return the part of a configuration that describes the language model."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), Mapping):
            return _text_of(
                {**config[name], "model_type": config[name].get("model_type", config.get("model_type", ""))}
            )
    if isinstance(config.get("thinker_config"), Mapping):
        return _text_of(config["thinker_config"])
    return config


def kinds_of(
    config: Config, kv_dtype: str = "auto", block_tokens: int = _BLOCK_TOKENS, lossy_kv: str = "none"
) -> list[Kind]:
    """Return the kinds of KV of a model, those of full attention first. kv_dtype: as for `kv_dtype_of`. lossy_kv: a name of
    `LOSSY_KV`.

    Raises:
        ConfigError: the KV cannot be rounded as that name says. Or the configuration has a kind of layer, or lacks a number,
            without which the size is unknown.
    """
    if config.get("is_encoder_decoder"):
        raise ConfigError("this is an encoder-decoder model, whose KV LMCache does not keep")
    text, stored = _text_of(config), _Stored(kv_dtype_of(config, kv_dtype), LOSSY_KV[lossy_kv])
    found: Counter[tuple[str, int, int]] = Counter()
    for layer, kind in enumerate(_layer_kinds(text)):
        for name, layer_bytes, reach in _layer(
            text, layer, kind, stored, DTYPE_BYTES[_model_dtype(config)], block_tokens
        ):
            found[name, layer_bytes, reach] += 1
    if not any(reach != 1 for _, _, reach in found):
        raise ConfigError("a model without attention: engines do not reuse prefixes for it")
    kinds = [Kind(name, layers, layer_bytes, reach) for (name, layer_bytes, reach), layers in found.items()]
    return sorted(kinds, key=lambda kind: kind.reach_tokens > 0)


def _number(text: Config, *names: str) -> int:
    for name in names:
        value = text.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ConfigError(f"the configuration has no {names[0]}: pass the config.json of a language model")


def _layer_kinds(text: Config) -> list[str]:
    """Return the kind of each layer that has KV of its own."""
    kinds = _all_layers(text)
    shared = int(text.get("num_kv_shared_layers") or 0)
    return kinds[: len(kinds) - shared] if shared else kinds


def _all_layers(text: Config) -> list[str]:
    layers, family = (
        _number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        str(text.get("model_type")),
    )
    if text.get("block_configs"):  # Nemotron-NAS
        return [NO_KV if (one.get("attention") or {}).get("no_op") else "full" for one in text["block_configs"]]
    if text.get("hybrid_override_pattern"):  # Nemotron-H
        return [{"M": "mamba", "*": "full"}.get(one, NO_KV) for one in text["hybrid_override_pattern"]]
    if "attn_layer_period" in text:  # Jamba
        period, offset = _number(text, "attn_layer_period"), _number(text, "attn_layer_offset")
        return ["full" if layer % period == offset else "mamba" for layer in range(layers)]
    if family == "falcon_h1":
        return ["both"] * layers
    if text.get("attn_layer_indices") is not None:  # Bamba
        return ["full" if layer in text["attn_layer_indices"] else "mamba" for layer in range(layers)]
    if text.get("layer_types"):
        return [str(one) for one in text["layer_types"]]
    if text.get("layers_block_type"):
        return [str(one) for one in text["layers_block_type"]]
    if text.get("full_attention_interval"):  # Qwen3-Next
        return _every(layers, _number(text, "full_attention_interval"), "linear_attention")
    if text.get("attention_chunk_size"):  # Llama 4
        if text.get("no_rope_layers"):
            return ["chunked_attention" if one else "full" for one in text["no_rope_layers"]]
        return _every(layers, int(text.get("no_rope_layer_interval", 4)), "chunked_attention")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        if family.startswith(("gemma3", "gemma2", "cohere2")):
            default = 2 if family.startswith("gemma2") else 4 if family.startswith("cohere2") else 6
            return _every(layers, int(text.get("sliding_window_pattern") or default), "sliding_attention")
        if family == "gpt_oss":
            return ["full" if layer % 2 else "sliding_attention" for layer in range(layers)]
        first = int(text["max_window_layers"]) if text.get("max_window_layers") is not None else 0
        return ["full" if layer < first else "sliding_attention" for layer in range(layers)]
    if family in ("mamba", "mamba2", "falcon_mamba"):
        return ["mamba"] * layers
    return ["full"] * layers


def _every(layers: int, period: int, other: str) -> list[str]:
    """Return kinds of which each `period`-th is full attention."""
    return ["full" if (layer + 1) % max(1, period) == 0 else other for layer in range(layers)]


def _layer(
    text: Config, layer: int, kind: str, stored: _Stored, state_item: int, block_tokens: int
) -> list[tuple[str, int, int]]:
    """Return (name, bytes of a token or state, reach) of what a layer keeps."""
    if kind in (NO_KV, "moe", "mlp"):
        return []
    if kind in _STATES:
        return [("state", _state_bytes(text, kind, state_item), 1)]
    if kind == "both":
        return [
            ("full attention", _heads_bytes(text, layer, False, stored), 0),
            *_layer(text, layer, "mamba", stored, state_item, 0),
        ]
    if text.get("kv_lora_rank"):
        latent = (_number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim")) * DTYPE_BYTES[stored.dtype]
        return [("MLA", latent, 0), *([("indexer", _INDEXER_BYTES, 0)] if text.get("index_topk") else [])]
    if kind in _FULL:
        return [("full attention", _heads_bytes(text, layer, True, stored), 0)]
    if kind in _WINDOW:
        seen = _number(text, "sliding_window", "sliding_window_size") - 1
        reach = max(1, -(-seen // block_tokens)) * block_tokens
        return [("sliding window", _heads_bytes(text, layer, False, stored), reach)]
    if kind == "chunked_attention":
        return [("chunked attention", _heads_bytes(text, layer, False, stored), _number(text, "attention_chunk_size"))]
    raise ConfigError(f"layer {layer} is of kind {kind!r}, which LMCache does not know: its KV cannot be sized")


def _heads_bytes(text: Config, layer: int, full: bool, stored: _Stored) -> int:
    """Return the bytes of one token's keys and values in a layer. full: Gemma 4's layers of full attention have other heads."""
    queries = _number(text, "num_attention_heads", "n_head", "n_heads")
    heads: Any = text.get("num_key_value_heads")
    if heads is None:
        heads = text.get("multi_query_group_num") or text.get("num_kv_heads") or queries
    if text.get("block_configs"):
        heads = queries // int(text["block_configs"][layer]["attention"]["n_heads_in_group"])
    elif isinstance(heads, list):
        heads = heads[layer]
    size = text.get("head_dim") or text.get("attention_head_dim") or text.get("kv_channels")
    if full and text.get("global_head_dim"):
        size, heads = text["global_head_dim"], text.get("num_global_key_value_heads") or heads
    size = size or _number(text, "hidden_size", "n_embd", "d_model") // queries
    if text.get("v_head_dim") not in (None, size):
        raise ConfigError(f"keys of {size} and values of {text['v_head_dim']} elements a head are not supported yet")
    return int(heads) * stored.head_bytes(int(size))


def _state_bytes(text: Config, kind: str, item: int) -> int:
    """Return the bytes of a state, as vLLM keeps it: the last inputs of the convolution, and the recurrent state."""
    recurrent_item = DTYPE_BYTES.get(str(text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")), item)
    if kind == "linear_attention":
        keys, values = _number(text, "linear_num_key_heads"), _number(text, "linear_num_value_heads")
        key_size, value_size = _number(text, "linear_key_head_dim"), _number(text, "linear_value_head_dim")
        width = 2 * keys * key_size + values * value_size
        recurrent = values * value_size * key_size
        return (int(text.get("linear_conv_kernel_dim", 4)) - 1) * width * item + recurrent * recurrent_item
    kernel = _number(text, "conv_kernel", "mamba_d_conv", "d_conv")
    size = _number(text, "ssm_state_size", "mamba_d_state", "state_size")
    heads = text.get("mamba_num_heads") or text.get("mamba_n_heads")
    if heads is None:  # Mamba 1
        inner = int(text.get("mamba_expand") or text.get("expand") or 2) * _number(text, "hidden_size")
        return (kernel - 1) * inner * item + inner * size * recurrent_item
    head_size = text.get("mamba_head_dim") or text.get("mamba_d_head")
    if not isinstance(head_size, int):
        head_size = (
            text.get("mamba_d_ssm") or int(text.get("mamba_expand", 2)) * _number(text, "hidden_size")
        ) // heads
    inner = heads * head_size
    width = inner + 2 * int(text.get("n_groups") or text.get("mamba_n_groups") or 1) * size
    return (kernel - 1) * int(width) * item + int(inner) * size * recurrent_item
