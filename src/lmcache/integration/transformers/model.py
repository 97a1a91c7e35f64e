"""What is served of a Transformers model, and the models that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from lmcache.chunks import Group, Layout, Shard
from lmcache.engine.identity import Identity, digest_of, plain
from lmcache.engine.served import ServedKV, refuse_encoder_decoder, refuse_length_dependent_rope
from lmcache.errors import LayoutError
from lmcache.integration.transformers.pool import Kind, Pool, Shape, States, StateTensor

_SERVED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""The kinds of Transformers' cache layers."""


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
    others = sorted({type(layer).__name__ for layer in cache.layers if not _is_served(layer)})
    if others:
        raise LayoutError(f"cache layers of kind {', '.join(others)} are not supported")
    kv: dict[Kind, list[int]] = {}
    states: dict[States, list[int]] = {}
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "keys"):
            kv.setdefault(_kind_of(layer), []).append(number)
        if tensors := _state_of(layer):
            states.setdefault(States((), tensors), []).append(number)
    if not kv:
        raise LayoutError("a model without attention: Transformers does not go on from a cache that counts no tokens")
    kinds = [replace(kind, layers=tuple(layers)) for kind, layers in kv.items()]
    state_kinds = tuple(replace(kind, layers=tuple(layers)) for kind, layers in states.items())
    devices = {layer.device for layer in cache.layers if getattr(layer, "device", None) is not None}
    if len(devices) != 1:
        raise LayoutError(f"layers with KV on {len(devices)} devices are not supported")
    for states_of in state_kinds:
        _refuse_forgetting(model, states_of)
    return Shape(tuple(sorted(kinds, key=lambda kind: kind.window > 0)), state_kinds, devices.pop(), model.config)


def _refuse_forgetting(model: Any, kind: States) -> None:
    """Return if a forward over several tokens goes on from the states of this kind: some models begin with empty ones.

    Raises:
        LayoutError: the states after such a forward do not depend on those before it.
    """
    recurrent = [tensor for tensor in kind.tensors if tensor.name == "recurrent"]
    ends = []
    for value in (0.0, 1e4):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for tokens in (1, 2):
                ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                found = [tensor.of(cache.layers[kind.layers[0]]) for tensor in recurrent]
                if tokens == 1:
                    for one in found:
                        one.fill_(value)
        ends.append(found)
    if recurrent and all(map(torch.equal, *ends)):
        raise LayoutError(
            "this release of transformers computes several tokens of the model as if no token were before them (its recurrent "
            "layers begin with empty states), so a hit cannot be gone on from"
        )


def _is_served(layer: Any) -> bool:
    return type(layer).__module__ == DynamicCache.__module__ and type(layer).__name__ in _SERVED


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


def _state_of(layer: Any) -> tuple[StateTensor, ...]:
    """Return what a layer's state is made of; nothing for a layer without one."""
    return tuple(
        StateTensor(name, number, tuple(tensor.shape), tensor.dtype)
        for name in ("conv", "recurrent")
        for number, tensor in getattr(layer, f"{name}_states", {}).items()
        if tensor is not None
    )


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
    """What is served of the model, for each kind of its KV and of its states.

    Raises:
        LayoutError: KV of a dtype that is not supported.
    """
    digest = digest_of(["transformers", plain(model.config)])
    kinds: list[Kind | States] = [*shape.kinds, *shape.states]
    described = [_described(kind, digest) for kind in kinds]
    served = []
    for (layout, group), paged in zip(described, pool.describe(), strict=True):
        whole = Shard(0, 1, 0, layout.num_layers, 0, layout.num_kv_heads)
        own = group if len(described) > 1 or group.reach_tokens else None
        served.append(ServedKV(identity, layout, whole, paged, stores=True, group=own, block_tokens=1))
    return served


def _described(kind: Kind | States, digest: str) -> tuple[Layout, Group]:
    """Return the layout of a kind without a name of the weights, and its group. digest: of the model's configuration."""
    if isinstance(kind, States):
        # What the bytes of a state mean depends on its tensors.
        meaning = [[one.name, one.number, list(one.shape), str(one.dtype)] for one in kind.tensors]
        layout = Layout(
            *("", "uint8", len(kind.layers), 1, kind.size_bytes, 1, "state"), config_digest=digest_of([meaning, digest])
        )
        return layout, Group(kind.layers, 1)
    layout = Layout(
        model_id="",
        kv_dtype=str(kind.dtype).removeprefix("torch."),
        num_layers=len(kind.layers),
        num_kv_heads=kind.heads,
        head_size=kind.head_size,
        chunk_tokens=1,
        config_digest=digest,
    )
    # A token's attention sees the token itself, so the next one sees one token less of those before it than the window has.
    return layout, Group(kind.layers, max(1, kind.window - 1) if kind.window else 0)
