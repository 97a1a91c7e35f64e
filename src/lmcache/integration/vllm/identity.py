"""Which weights vLLM serves, and what of its configuration changes the numbers.

Engines with `--load-format dummy` share nothing: their weights depend on shapes, seed and vLLM's version, none of which a
name would tell.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from lmcache.errors import LayoutError
from lmcache.integration.identity import REMEDY, Identity, named, path_identity, plain, repository_identity


def served_identity(vllm_config: Any, model_id: str) -> Identity:
    """The identity of all weights that make KV: the model's, or its name `model_id` where that is given, and a draft model's.

    Raises:
        LayoutError: it cannot be found out; the message says what to set.
    """
    engine_id, load_format = str(vllm_config.kv_transfer_config.engine_id), str(vllm_config.load_config.load_format)
    identity = named(model_id) if model_id else model_identity(vllm_config.model_config, load_format, engine_id)
    draft = _draft(getattr(vllm_config, "speculative_config", None))
    return identity if draft is None else identity + _draft_identity(draft, engine_id)


def model_identity(model_config: Any, load_format: str, engine_id: str) -> Identity:
    """The identity of the served model's own weights.

    Raises:
        LayoutError: it cannot be found out; the message says what to set.
    """
    if load_format == "dummy":
        return named(f"dummy:{engine_id}")
    if getattr(model_config, "model_weights", ""):
        raise LayoutError(f"weights streamed from {model_config.model!r} have no identity; {REMEDY}")
    name = str(model_config.model)
    return path_identity(name) or repository_identity(name, model_config)


def config_digest(vllm_config: Any) -> str:
    """A digest of the effective configuration: RoPE, overrides, windows, quantization, computing dtype, draft model.

    It takes in everything, so a harmless difference costs a miss, and no harmful one a wrong answer.
    """
    model = vllm_config.model_config
    speculative = getattr(vllm_config, "speculative_config", None)
    cache = vllm_config.cache_config
    material = {
        "hf": plain(getattr(model, "hf_config", None)),
        "overrides": plain(getattr(model, "hf_overrides", None)),
        "dtype": str(model.dtype),
        "quantization": plain(getattr(model, "quantization", None)),
        "no_window": bool(getattr(model, "disable_sliding_window", False)),
        "cache_dtype": str(cache.cache_dtype),
        "draft": str(getattr(speculative, "method", "")) if _draft(speculative) is not None else None,
    }
    return blake3(json.dumps(material, sort_keys=True).encode()).hexdigest(16)


def adapter_identity(path: str, unchanged_since: float) -> str:
    """The content of a LoRA adapter's directory, "" if it is not here to be looked at, or while it is hashed.

    It is also "" where a file is newer than `unchanged_since`, a time before this engine has loaded any adapter: vLLM may have
    loaded the older files, and answers with them until the adapter is loaded again.
    """
    try:
        identity = path_identity(path, "load the adapter from another directory", unchanged_since)
        return identity.name if identity is not None else ""
    except (LayoutError, OSError):
        return ""


def _draft(speculative: Any) -> Any:
    """vLLM's configuration of the draft model, which may add layers to the KV. None for methods without one (ngram, suffix), for
    which vLLM names the target model: they propose tokens and change no KV."""
    model = getattr(speculative, "draft_model_config", None)
    return None if model is getattr(speculative, "target_model_config", None) else model


def _draft_identity(draft: Any, engine_id: str) -> Identity:
    """Of a repository whose commit is not known, one that no other engine has."""
    name, config = str(draft.model), getattr(draft, "hf_config", None)
    found = path_identity(name)
    if found is not None:
        return found
    commits = (
        getattr(one, "_commit_hash", None) for one in (config, getattr(config, "model", None))
    )  # vLLM wraps EAGLE's
    return named(f"{name}@{next(filter(None, commits), engine_id)}")
