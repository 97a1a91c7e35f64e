"""How keys turn with their position (RoPE), how they are turned to another one, and how an integration finds that out.

What a model's rotary module says is tried: the model computes one token at several positions, and the keys of each layer must
differ by exactly the turn that is expected. So a model whose keys do anything else is refused, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from lmcache.errors import LayoutError

_TRIED_POSITIONS = 7, 977
_MOST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of turned keys, relative to the keys (root mean square over the pairs). Models turn keys in their own dtype, and a wrong turn
is off by more than 0.1."""


class Turn(NamedTuple):
    """How the keys of a layer turn. pairs: which elements of a key turn together: `halves` (number i and number i + half of
    them), `neighbours` (2 i and 2 i + 1), or `none` if they do not turn. frequencies: float32 [pairs], the angle of each pair per
    position; elements behind the pairs do not turn. The scale of keys that some kinds of RoPE have (an attention factor) is the
    same at all positions."""

    pairs: Literal["halves", "neighbours", "none"]
    frequencies: torch.Tensor

    def turned(self, keys: torch.Tensor, come: torch.Tensor, go: torch.Tensor) -> torch.Tensor:
        """Return keys [..., tokens, head size] of tokens at positions `come` as they are at positions `go`, both [tokens].

        Angles are those of the model, float32 products, and their difference is exact. The turn is made in float32 and rounded
        once to the dtype of the keys."""
        if self.pairs == "none":
            return keys.clone()
        rates, count = self.frequencies, len(self.frequencies)
        angles = [(places.float()[:, None] * rates).double() for places in (go, come)]
        angle = angles[0] - angles[1]
        cos, sin = angle.cos().float(), angle.sin().float()
        turning, still = keys[..., : 2 * count].float(), keys[..., 2 * count :]
        if self.pairs == "halves":
            a, b = turning[..., :count], turning[..., count:]
            made = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            made = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([made.to(keys.dtype), still], dim=-1)


def tried_positions(limit: int) -> list[int]:
    """Return the positions at which one token is computed, of a model that takes positions below `limit`."""
    return [0, *(min(place, limit - 1) for place in _TRIED_POSITIONS)]


def found_turns(
    keys: Sequence[Sequence[torch.Tensor]],
    places: Sequence[int],
    rates: Sequence[torch.Tensor],
    names: Sequence[object],
) -> tuple[Turn, ...]:
    """Return how the keys of each layer turn. keys: for each layer the keys of one token at each of the places, [..., 1, head
    size]. rates: the inverse frequencies that the model's rotary modules have, each float32 [pairs]. names: of the layers.

    Raises:
        LayoutError: a layer's keys turn in no known way, or no layer's keys turn.
    """
    none = Turn("none", torch.zeros(0))
    expected = [none, *(Turn(pairs, rate) for rate in rates for pairs in ("halves", "neighbours"))]
    found = []
    for name, of_layer in zip(names, keys, strict=True):
        fits = [turn for turn in expected if _fits(turn, of_layer, places)]
        if not fits:
            raise LayoutError(
                f"the keys of layer {name} do not turn with their position as the model's rotary module says, so they cannot be "
                "moved: blending does not serve this model"
            )
        found.append(fits[0])
    if all(turn.pairs == "none" for turn in found):
        raise LayoutError("blending needs a model with RoPE, and no layer's keys turn with their position")
    return tuple(found)


def _fits(turn: Turn, keys: Sequence[torch.Tensor], places: Sequence[int]) -> bool:
    """Return whether the keys at the first place, turned to the others, are those there.

    Errors are relative to each pair of elements: some models have a few elements that are a hundred times as large as all others
    together, and these mostly belong to pairs that hardly turn. Keys of zeros fit nothing, since they say nothing."""
    if 2 * len(turn.frequencies) > keys[0].shape[-1]:
        return False
    come = torch.tensor(places[:1], device=keys[0].device)
    most = _MOST_ERROR.get(keys[0].dtype, 0.0)
    for place, there in zip(places[1:], keys[1:], strict=True):
        made = turn.turned(keys[0], come, torch.full_like(come, place)).float()
        size = _sizes(turn, there.float())
        told = size > size.max() * 1e-6
        if not bool(told.any()):
            return False
        error = (_sizes(turn, made - there.float())[told] / size[told]).square().mean().sqrt()
        if not float(error) <= most:
            return False
    return True


def _sizes(turn: Turn, keys: torch.Tensor) -> torch.Tensor:
    """Return the length of each pair of elements of keys, and of each element that is in no pair: [any number]."""
    count = len(turn.frequencies)
    turning, still = keys[..., : 2 * count], keys[..., 2 * count :]
    one, other = (
        (turning[..., 0::2], turning[..., 1::2])
        if turn.pairs == "neighbours"
        else (turning[..., :count], turning[..., count:])
    )
    return torch.cat([(one.square() + other.square()).sqrt(), still.abs()], dim=-1).flatten()
