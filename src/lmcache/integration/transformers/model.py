"""The layout of a Transformers model's KV, and the models that are refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache.chunks import Layout
from lmcache.engine.identity import digest_of, plain
from lmcache.engine.served import refuse_encoder_decoder, refuse_length_dependent_rope
from lmcache.errors import LayoutError
from lmcache.integration.transformers.pool import Shape


def kv_shape(model: Any) -> Shape:
    """The shape of the model's KV, as one token's forward makes it.

    Raises:
        LayoutError: this model's KV cannot be cached; the message says why.
    """
    refuse_unsupported(model)
    try:
        cache = DynamicCache(config=model.config)
    except TypeError:
        raise LayoutError("this release of transformers is too old; install transformers>=4.56") from None
    with torch.no_grad():
        one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=one, past_key_values=cache, use_cache=True)
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds:
        raise LayoutError(f"cache layers of kind {', '.join(kinds)}; only full attention is supported")
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = {(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    if len(found) != 1 or any(tensor is None for tensor in tensors):
        raise LayoutError(
            f"layers with KV of different shapes, dtypes or devices ({len(found)} kinds) are not supported"
        )
    ((batch, heads, tokens, head_size), dtype, device) = found.pop()
    if (batch, tokens) != (1, 1):
        raise LayoutError(f"KV of shape {(batch, heads, tokens, head_size)} for one token is not supported")
    return Shape(len(cache.layers), heads, head_size, dtype, device)


def refuse_unsupported(model: Any) -> None:
    """Return if KV of a model of this kind, in its present state, can be cached.

    Raises:
        LayoutError: it cannot; the message says why.
    """
    refuse_encoder_decoder(model.config)
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise LayoutError("adapters can be switched without a trace in the weights; call merge_and_unload() first")
    refuse_length_dependent_rope(model.config)


def layout_of(model: Any, shape: Shape) -> Layout:
    """The layout of the model's KV in chunks of one token, without a name of the weights.

    Raises:
        LayoutError: KV of a dtype that is not supported.
    """
    return Layout(
        model_id="",
        kv_dtype=str(shape.dtype).removeprefix("torch."),
        num_layers=shape.layers,
        num_kv_heads=shape.heads,
        head_size=shape.head_size,
        chunk_tokens=1,
        config_digest=digest_of(["transformers", plain(model.config)]),
    )
