"""The identity of the weights that vLLM serves, and a digest of the configuration that changes the KV.

Engines with `--load-format dummy` share nothing: their weights depend on shapes, seed and vLLM's version, which no name
contains.
"""

from __future__ import annotations

import json
from typing import Any

from lmcache.engine.adapters import AdapterFiles
from lmcache.engine.identity import REMEDY, Identity, digest_of, model_folder, named, path_identity, plain
from lmcache.engine.load_formats import files_read, weights_identity
from lmcache.errors import LayoutError

_WRITTEN_BY_MODELS = frozenset({"dtype", "torch_dtype", "max_model_len"})
"""Fields that a model's class writes into the configuration; the scheduler's process may not see these changes."""


def served_identity(vllm_config: Any, model_id: str) -> Identity:
    """Return the identity of all weights that compute KV: the model's (`model_id` if given), and a draft model's.

    Raises:
        LayoutError: the weights cannot be identified; the message says what to set.
    """
    engine_id, load_format = str(vllm_config.kv_transfer_config.engine_id), str(vllm_config.load_config.load_format)
    identity = named(model_id) if model_id else model_identity(vllm_config.model_config, load_format, engine_id)
    draft = draft_model_of(getattr(vllm_config, "speculative_config", None))
    return identity if draft is None else identity + _draft_identity(draft, engine_id)


def model_identity(model_config: Any, load_format: str, engine_id: str) -> Identity:
    """Return the identity of the served model's own weights.

    Raises:
        LayoutError: the weights cannot be identified; the message says what to set.
    """
    if load_format != "dummy" and getattr(model_config, "model_weights", None):
        raise LayoutError(f"weights streamed from {model_config.model!r} have no identity; {REMEDY}")
    return weights_identity(str(model_config.model), load_format, model_config, engine_id)


def config_digest(vllm_config: Any) -> str:
    """Return a digest of the effective configuration: RoPE, overrides, windows, quantization, computing dtype, draft model ...

    The digest covers everything that changes the KV by more than rounding. A harmless difference then costs a miss, and no
    harmful difference causes a wrong answer.
    """
    model, cache, load = vllm_config.model_config, vllm_config.cache_config, vllm_config.load_config
    described = _without(plain(getattr(model, "hf_config", None)), _WRITTEN_BY_MODELS)
    material = {
        "hf": described,
        "overrides": plain(getattr(model, "hf_overrides", None)),
        "class": plain([getattr(model, "architecture", None), getattr(model, "model_class_overrides", None)]),
        "code": plain(getattr(model, "code_revision", None)),
        "dtype": str(model.dtype),
        "quantization": plain([getattr(model, "quantization", None), getattr(model, "quantization_config", None)]),
        "no_window": bool(getattr(model, "disable_sliding_window", False)),
        # LongRoPE selects its factors by the longest prompt that the engine admits.
        "longest": getattr(model, "max_model_len", None) if '"longrope"' in json.dumps(described) else None,
        "cache_dtype": [str(cache.cache_dtype), plain(getattr(cache, "kv_cache_dtype_skip_layers", None))],
        "load": _files_read(model, load),
        "images": _processing(getattr(model, "multimodal_config", None)),
        "lora": _lora(getattr(vllm_config, "lora_config", None), model),
        "draft": _drafting(getattr(vllm_config, "speculative_config", None), load),
        "platform": plain(getattr(vllm_config, "additional_config", None)) or None,
    }
    return digest_of(material)


class Adapters(AdapterFiles):
    """The LoRA adapters of a vLLM engine, each under a number."""

    def identity(self, lora: Any) -> tuple[str, str] | None:
        """Return name and content name of a `LoRARequest`'s adapter; None if it is unknown which weights are loaded under its
        number, or while the adapter is hashed."""
        variant = " fused experts" if getattr(lora, "is_3d_lora_weight", False) else ""
        content = self.content(lora.lora_int_id, str(lora.lora_path), variant, lora.lora_name)
        return None if content is None else (lora.lora_name, content)


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def _processing(multimodal: Any) -> Any:
    """Return the options of multimodal processing: vLLM names an item by its content and its request's options only."""
    names = ("mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate", "mm_encoder_attn_dtype")
    options = {name: plain(value) for name in names if (value := getattr(multimodal, name, None))}
    if "video_pruning_rate" in options:
        options["video_pruning_method"] = plain(getattr(multimodal, "video_pruning_method", None))
    return options or None


def _lora(lora: Any, model: Any) -> Any:
    """Return how adapters are applied; None for the default way."""
    if lora is None:
        return None
    dtype = str(getattr(lora, "lora_dtype", "auto"))
    options = {
        "dtype": dtype if dtype not in ("auto", str(model.dtype)) else None,
        "only": plain(getattr(lora, "target_modules", None)),
        "tower": getattr(lora, "enable_tower_connector_lora", None) or None,
    }
    return options if any(options.values()) else None


def _files_read(model: Any, load: Any) -> Any:
    """Return which of the model's files have been read. The caller asks after that, so a repository's are in the hub's cache."""
    commit = _commit(getattr(model, "hf_config", None))
    folder = model_folder(str(model.model), commit, getattr(load, "download_dir", None))
    return files_read(str(load.load_format), getattr(load, "model_loader_extra_config", None), folder)


def _drafting(speculative: Any, load: Any) -> Any:
    """Return how the draft model's layers are made; None without a draft model. Its weights are a part of the identity.

    load: how the target model is loaded, and by default the draft model.
    """
    model = draft_model_of(speculative)
    if model is None:
        return None
    method, quantization = str(getattr(speculative, "method", "")), plain(getattr(model, "quantization", None))
    return [method, quantization, _files_read(model, getattr(speculative, "draft_load_config", None) or load)]


def draft_model_of(speculative: Any) -> Any:
    """Return vLLM's configuration of the draft model, which may add layers to the KV. None for methods without one (ngram,
    suffix), for which vLLM names the target model: they propose tokens and change no KV."""
    model = getattr(speculative, "draft_model_config", None)
    return None if model is getattr(speculative, "target_model_config", None) else model


def _draft_identity(draft: Any, engine_id: str) -> Identity:
    """Return the identity of a draft model; for a repository with unknown commit, one that no other engine has."""
    name = str(draft.model)
    return path_identity(name) or named(f"{name}@{_commit(getattr(draft, 'hf_config', None)) or engine_id}")


def _commit(config: Any) -> str | None:
    """Return the commit of the repository of a model's configuration; None if it is unknown."""
    commits = (
        getattr(one, "_commit_hash", None) for one in (config, getattr(config, "model", None))
    )  # vLLM wraps EAGLE's
    return next(filter(None, commits), None)
