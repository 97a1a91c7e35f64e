"""The cases in which vLLM itself excludes that KV of a prefix is reused: for an engine, and for one request.

vLLM writes its own decision and the user's `--no-enable-prefix-caching` into the same flag. The user's flag concerns only vLLM's
own cache and not LMCache, so this module checks the rules behind the flag.
"""

from __future__ import annotations

import os
from typing import Any

from lmcache.errors import LayoutError

_BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"


def refuse_what_vllm_rules_out(vllm_config: Any) -> None:
    """Return if vLLM may compute a prompt of this model from the KV of its prefix.

    Raises:
        LayoutError: vLLM may not; the message names the cause.
    """
    model = vllm_config.model_config
    if not getattr(model, "is_prefix_caching_supported", True):
        raise LayoutError(f"vLLM does not reuse prefixes for {_kind(model)}")
    if getattr(vllm_config.cache_config, "enable_prefix_caching", True):
        return
    if not getattr(getattr(vllm_config, "scheduler_config", None), "enable_chunked_prefill", True):
        # An engine that cannot compute a prompt in parts cannot compute the rest of a prompt: vLLM then switches both off.
        cause = "for MLA on this CPU" if _mla_on_a_cpu(vllm_config) else "for this model or platform"
        raise LayoutError(
            f"vLLM runs without chunked prefill and prefix caching {cause}; if both were switched off by hand, leave chunked "
            "prefill on"
        )
    if _batch_invariant():
        raise LayoutError(
            f"{_BATCH_INVARIANT} is set and prefix caching is off, so it is not known that this attention backend answers the "
            "same after a hit; leave --no-enable-prefix-caching out, and vLLM decides"
        )


def _batch_invariant() -> bool:
    """Return whether vLLM guarantees the same bits for a request, whatever else is in its batch."""
    return os.environ.get(_BATCH_INVARIANT, "0") not in ("", "0")


def names_items(vllm_config: Any) -> bool:
    """Return whether vLLM names the images, sounds ... of a prompt by their content. With both of its own caches of them off, it
    numbers them instead, and every engine begins with the same number."""
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    caches = getattr(multimodal, "mm_processor_cache_gb", 1) > 0
    return caches or bool(getattr(vllm_config.cache_config, "enable_prefix_caching", True))


def adapts_items(vllm_config: Any) -> bool:
    """Return whether LoRA adapters change what vLLM's encoders compute of images, sounds ..., which it keeps under the adapter's
    name."""
    return bool(getattr(getattr(vllm_config, "lora_config", None), "enable_tower_connector_lora", False))


def reads_nothing(request: Any) -> bool:
    """Return whether vLLM has to compute every token of this request, for prompt log probabilities or for its pooler."""
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def _kind(model: Any) -> str:
    """Return the kind of model in vLLM's terms."""
    attention = getattr(model, "attn_type", "unknown")
    pooler = getattr(model, "pooler_config", None)
    if pooler is None:
        return f"models of attention type {attention}"
    kinds = [getattr(pooler, name, None) for name in ("seq_pooling_type", "tok_pooling_type")]
    pooling = "/".join(str(kind) for kind in kinds if kind)
    return f"pooling models of attention type {attention} with {pooling} pooling"


def _mla_on_a_cpu(vllm_config: Any) -> bool:
    device = str(getattr(getattr(vllm_config, "device_config", None), "device_type", ""))
    return device == "cpu" and bool(getattr(vllm_config.model_config, "use_mla", False))
