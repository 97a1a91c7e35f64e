"""Where vLLM itself rules out that KV of a prefix is used again: for a whole engine, and for one request.

vLLM writes its rule and the user's `--no-enable-prefix-caching` into the same flag. The user's flag is about vLLM's own
cache and leaves ours alone, so what is asked here are the rules behind the flag.
"""

from __future__ import annotations

import os
from typing import Any

from lmcache.errors import LayoutError

_BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"


def refuse_what_vllm_rules_out(vllm_config: Any) -> None:
    """Return if vLLM may compute a prompt of this model from the KV of its prefix.

    Raises:
        LayoutError: it may not; the message names the cause.
    """
    model = vllm_config.model_config
    if not getattr(model, "is_prefix_caching_supported", True):
        raise LayoutError(f"vLLM does not reuse prefixes for {_kind(model)}")
    if getattr(vllm_config.cache_config, "enable_prefix_caching", True):
        return
    if not getattr(getattr(vllm_config, "scheduler_config", None), "enable_chunked_prefill", True):
        # An engine that cannot compute a prompt in parts cannot compute the rest of one either: vLLM then switches both off.
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
    """Whether vLLM promises the same bits whatever else is computed beside them."""
    return os.environ.get(_BATCH_INVARIANT, "0") not in ("", "0")


def reads_nothing(request: Any) -> bool:
    """Whether vLLM has to compute every token of this request, for its prompt's log probabilities or for its pooler."""
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def _kind(model: Any) -> str:
    """The kind of model, in vLLM's own words."""
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
