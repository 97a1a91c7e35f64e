"""What is served of a Transformers model, and the models that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lmcache.chunks import Group, Layout, Shard
from lmcache.engine.identity import Identity, digest_of, plain
from lmcache.engine.served import ServedKV, refuse_encoder_decoder, refuse_length_dependent_rope
from lmcache.errors import LayoutError
from lmcache.integration.transformers.pool import Kind, Pool, Shape
from lmcache.transfer.paged import PagedKV

_SERVED = (DynamicLayer, DynamicSlidingWindowLayer)


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
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _SERVED})
    if others:
        raise LayoutError(
            f"cache layers of kind {', '.join(others)}; only full attention and sliding windows are supported"
        )
    found: dict[Kind, list[int]] = {}
    for number, layer in enumerate(cache.layers):
        found.setdefault(_kind_of(layer), []).append(number)
    kinds = [replace(kind, layers=tuple(layers)) for kind, layers in found.items()]
    devices = {layer.keys.device for layer in cache.layers}
    if len(devices) != 1:
        raise LayoutError(f"layers with KV on {len(devices)} devices are not supported")
    return Shape(tuple(sorted(kinds, key=lambda kind: kind.window > 0)), devices.pop())


def _kind_of(layer: Any) -> Kind:
    """Return the kind of a layer that holds the KV of one token, without layers.

    Raises:
        LayoutError: KV of this kind cannot be cached.
    """
    if layer.keys is None or layer.values is None:
        raise LayoutError("layers without KV of their own are not supported")
    shape = tuple(layer.keys.shape)
    if len(shape) != 4 or (shape[0], shape[2]) != (1, 1) or tuple(layer.values.shape) != shape:
        raise LayoutError(f"keys of shape {shape} and values of shape {tuple(layer.values.shape)} are not supported")
    return Kind((), shape[1], shape[3], layer.keys.dtype, int(getattr(layer, "sliding_window", 0)))


def refuse_unsupported(model: Any) -> None:
    """Return if KV of a model of this kind, in its present state, can be cached.

    Raises:
        LayoutError: it cannot; the message says why.
    """
    refuse_encoder_decoder(model.config)
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise LayoutError("adapters can be switched without a trace in the weights; call merge_and_unload() first")
    refuse_length_dependent_rope(model.config)


def served_kv(model: Any, shape: Shape, pool: Pool, identity: Identity) -> list[ServedKV]:
    """What is served of the model, for each kind of its KV.

    Raises:
        LayoutError: KV of a dtype that is not supported.
    """
    digest = digest_of(["transformers", plain(model.config)])
    return [
        _served(kind, len(shape.kinds), paged, identity, digest)
        for kind, paged in zip(shape.kinds, pool.describe(), strict=True)
    ]


def _served(kind: Kind, kinds: int, paged: PagedKV, identity: Identity, digest: str) -> ServedKV:
    layout = Layout(
        model_id="",
        kv_dtype=str(kind.dtype).removeprefix("torch."),
        num_layers=len(kind.layers),
        num_kv_heads=kind.heads,
        head_size=kind.head_size,
        chunk_tokens=1,
        config_digest=digest,
    )
    whole = Shard(0, 1, 0, layout.num_layers, 0, kind.heads)
    # A token's attention sees the token itself, so the next one sees one token less of those before it than the window has.
    reach = max(1, kind.window - 1) if kind.window else 0
    group = Group(kind.layers, reach) if reach or kinds > 1 else None
    return ServedKV(identity, layout, whole, paged, stores=True, group=group, block_tokens=1)
