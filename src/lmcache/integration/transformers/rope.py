"""How a Transformers model's keys turn with their position (RoPE), by its rotary modules and by trial."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from lmcache.engine.rope import Turn, found_turns, tried_positions
from lmcache.errors import LayoutError
from lmcache.integration.transformers.pool import Shape


def turns_of(model: Any, shape: Shape) -> tuple[Turn, ...]:
    """Return how the keys of each layer turn, by the layer's place in the one kind of the shape.

    Raises:
        LayoutError: the model is not one whose KV can be blended; the message says why.
    """
    if len(shape.kinds) != 1 or shape.states or shape.kinds[0].window:
        raise LayoutError("blending needs a model whose layers all have KV of one kind, without windows or states")
    rates = _frequencies(model)
    if not rates:
        raise LayoutError("blending needs a model with RoPE, and this one has no module with inverse frequencies")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise LayoutError("blending needs a model whose forward takes position_ids")
    kind = shape.kinds[0]
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
    places = tried_positions(limit)
    tried = [_keys_at(model, place, kind.layers) for place in places]
    return found_turns(list(zip(*tried, strict=True)), places, rates, kind.layers)


def _frequencies(model: Any) -> list[torch.Tensor]:
    """Return the different inverse frequencies of the model's rotary modules, in float32."""
    found: list[torch.Tensor] = []
    for name, value in model.named_buffers():
        last = name.rsplit(".", 1)[-1]
        if last.endswith("inv_freq") and "original" not in last and value.ndim == 1:
            rates = value.detach().float()
            if not any(rates.shape == one.shape and torch.equal(rates, one) for one in found):
                found.append(rates)
    return found


def _keys_at(model: Any, position: int, layers: Sequence[int]) -> list[torch.Tensor]:
    """Return the keys of one token at this position, with nothing before it, of each layer: [1, heads, 1, head size]."""
    cache = DynamicCache(config=model.config)
    token = model.get_input_embeddings().weight.shape[0] // 2  # the first ones may be padding, whose embedding is zero
    one = torch.full((1, 1), token, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=one, position_ids=torch.full_like(one, position), past_key_values=cache, use_cache=True)
    found: list[torch.Tensor] = [cache.layers[number].keys for number in layers]
    return found
