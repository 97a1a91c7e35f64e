"""Which weights vLLM serves, and what of its configuration changes the numbers.

Engines with `--load-format dummy` share nothing: their weights depend on shapes, seed and vLLM's version, none of which a
name would tell.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from lmcache.errors import LayoutError
from lmcache.integration.identity import path_identity, plain, repository_identity


def model_identity(model_config: Any, load_format: str, engine_id: str) -> str:
    """The identity of the served weights.

    Raises:
        LayoutError: it cannot be found out; the message says what to set.
    """
    if load_format == "dummy":
        return f"dummy:{engine_id}"
    if getattr(model_config, "model_weights", ""):
        raise LayoutError(
            f"weights streamed from {model_config.model!r} have no identity; set lmcache.mp.model_id to a name of yours"
        )
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
        "draft": _draft(speculative) if speculative is not None else None,
    }
    return blake3(json.dumps(material, sort_keys=True).encode()).hexdigest(16)


def adapter_identity(path: str, unchanged_since: float) -> str:
    """The content of a LoRA adapter's directory, "" if it is not here to be looked at.

    It is also "" where a file is newer than `unchanged_since`, a time before this engine has loaded any adapter: vLLM may have
    loaded the older files, and answers with them until the adapter is loaded again.
    """
    try:
        return path_identity(path, unchanged_since)
    except (LayoutError, OSError):
        return ""


def _draft(speculative: Any) -> list[str] | None:
    """The draft model, which may add layers to the KV. None for methods without one (ngram, suffix), for which vLLM names the
    target model: they propose tokens and change no KV."""
    model = getattr(speculative, "draft_model_config", None)
    if model is None or model is getattr(speculative, "target_model_config", None):
        return None
    name = str(getattr(model, "model", ""))
    return [str(getattr(speculative, "method", "")), path_identity(name) or name if name else ""]
