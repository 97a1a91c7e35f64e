"""Blending in a Transformers model: passages are turned to their places in the prompt, and some tokens are computed again.

All of this happens in the pool before `generate` begins, which then goes on behind the last passage as behind a prefix. The
model's own forward computes the tokens, with a mask that says which tokens each of them sees, and with a cache that puts their
KV at their places in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache.chunks.passages import Passage
from lmcache.config.engine import load_blending
from lmcache.engine.attended import paid, rows_at_once
from lmcache.engine.blending import QUESTION_TOKENS, SEPARATOR, Blend, Blending, Tokens, blending_of
from lmcache.engine.served import NOT_SERVED
from lmcache.errors import ConfigError, LayoutError
from lmcache.integration.transformers.pool import Pool, Shape
from lmcache.integration.transformers.rope import turns_of
from transformers import AutoTokenizer

_MASK_ELEMENTS, _MOST_AT_ONCE = 1 << 26, 1024
"""Bounds of a forward: tokens, and its mask. A forward over more tokens is made in several."""
_APART_AT_ONCE = 512
"""Tokens of a passage that are computed apart in one forward."""
_ATTENTIONS = "sdpa", "eager"


def given_blending(model: Any, enabled: bool | None, tokenizer: Any) -> Blending | None:
    """Return how to blend, by LMCACHE_BLEND_*; None for not at all. enabled: None: as LMCACHE_ENABLE_BLENDING says. tokenizer:
    of the model; None: it is looked for.

    Raises:
        ConfigError: a setting is wrong, or the separator has no tokens.
    """
    given = load_blending()
    if not (given.get("enable_blending", False) if enabled is None else enabled):
        return None
    text = given.get("blend_special_str", SEPARATOR)
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.name_or_path)
        separator = tuple(tokenizer.encode(text, add_special_tokens=False))
    except (*NOT_SERVED, ValueError) as error:
        raise ConfigError(
            f"blending: the tokens of blend_special_str {text!r} are not known ({error}): pass attach(tokenizer=...), or "
            "blending=Blending(separator=(...)) with their ids"
        ) from None
    if not separator:
        raise ConfigError(f"blending: blend_special_str {text!r} has no tokens")
    return blending_of(given, separator)


class Blender:
    """Blends passages into the prompts of one model.

    Raises:
        LayoutError: the KV of this model cannot be blended; the message says why.
    """

    def __init__(self, model: Any, shape: Shape, settings: Blending) -> None:
        attention = getattr(model.config, "_attn_implementation", "")
        if attention not in _ATTENTIONS:
            raise LayoutError(
                f"blending needs the attention {' or '.join(_ATTENTIONS)}, and the model has {attention!r}"
            )
        self.settings, self.turns = settings, turns_of(model, shape)
        if settings.choose == "deviation" and settings.check_layer >= len(self.turns):
            raise LayoutError(f"check_layer is {settings.check_layer}, and the model has {len(self.turns)} layers")
        self._model, self._shape = model, shape

    # Passages apart from the prompt

    def set_apart(self, pool: Pool, passage: Passage, place: int) -> None:
        """Copy a passage of the sequence to `place` in the room apart, with its keys as if its first token had position 0."""
        self._move(pool, passage.start, passage.start, pool.tokens + place, 0, passage.tokens)

    def put(self, pool: Pool, passage: Passage, place: int, first: int) -> None:
        """Copy tokens of a passage, from its token number `first` on, from `place` in the room apart to tokens `passage`."""
        self._move(pool, pool.tokens + place + first, first, passage.start, passage.start, passage.tokens)

    def compute_apart(self, pool: Pool, ids: torch.Tensor, passage: Passage, place: int, behind: Passage) -> None:
        """Compute a passage at `place` in the room apart as if it stood right behind the first tokens of the sequence, up to
        `behind.end`, of which those from `behind.start` on are computed, too. Its keys are then those of positions from 0 on."""
        self._compute(pool, ids, np.arange(*behind, dtype=np.int64))
        source = pool.tokens + place
        for first in range(0, passage.tokens, _APART_AT_ONCE):
            count = min(_APART_AT_ONCE, passage.tokens - first)
            cache = DynamicCache(config=self._shape.config)
            for number, layer in enumerate(self._shape.kinds[0].layers):
                kv = pool.kv(number)
                before, own = kv[:, :, : behind.end], kv[:, :, source : source + first + count]
                cache.layers[layer] = _Behind(before, own, count)
            places = behind.end + first + torch.arange(count, device=self._shape.device)
            begin = passage.start + first
            self._run(ids[:, begin : begin + count], places, behind.end + first + count, cache)
        self._move(pool, source, behind.end, source, 0, passage.tokens)

    def _move(self, pool: Pool, source: int, come: int, target: int, go: int, tokens: int) -> None:
        """Copy KV within the pool, with keys at positions from `come` on turned to positions from `go` on."""
        counted = torch.arange(tokens, device=self._shape.device)
        with torch.no_grad():
            for layer, turn in enumerate(self.turns):
                keys, values = pool.kv(layer)
                keys[:, target : target + tokens] = turn.turned(
                    keys[:, source : source + tokens], come + counted, go + counted
                )
                values[:, target : target + tokens] = values[:, source : source + tokens]

    # The prompt

    def compute(self, pool: Pool, ids: torch.Tensor, blend: Blend) -> Tokens:
        """Compute what has no KV before the question, and some of the blended tokens again. Return the latter.

        pool: holds the exact KV of the first `blend.have` tokens, and the blended tokens. ids: [1, tokens], the prompt."""
        first, again = blend.first(), blend.links
        scores: npt.NDArray[np.float32] | None = None
        if self.settings.choose == "query" and self.settings.recompute_ratio:
            begin = max(blend.end, ids.shape[1] - QUESTION_TOKENS)
            self._clear(pool, blend.end, begin)  # what is hidden by a mask still has to be numbers
            question = np.arange(begin, ids.shape[1], dtype=np.int64)
            scores = self._compute(pool, ids, np.concatenate([first, question]), observe=blend.end)
        else:
            self._compute(pool, ids, first)
            if self.settings.choose == "deviation" and self.settings.recompute_ratio:
                scores = self._deviation(pool, ids, blend)
        if scores is not None:
            chosen = blend.chosen(scores)
            again = np.union1d(again, chosen)
            self._compute(pool, ids, blend.then(chosen))
        return again

    def _clear(self, pool: Pool, first: int, end: int) -> None:
        for layer in range(len(self.turns)):
            pool.kv(layer)[:, :, first:end] = 0

    def _deviation(self, pool: Pool, ids: torch.Tensor, blend: Blend) -> npt.NDArray[np.float32]:
        """Return how far the keys of each token at the layer that is looked at are from the blended ones. The KV of the layers
        before it is computed anew for all tokens."""
        tokens = np.arange(blend.exact, blend.end, dtype=np.int64)
        scores = np.zeros(blend.end, dtype=np.float32)
        for part in self._parts(tokens):
            check = _Check(self.settings.check_layer)
            with suppress(_Checked):
                self._forward(pool, ids, part, check)
            scores[part] = check.found
        return scores

    def _compute(self, pool: Pool, ids: torch.Tensor, tokens: Tokens, observe: int = 0) -> Any:
        """Compute these tokens over the KV of those before them. observe: return the attention that tokens from there on pay to
        each token before it."""
        watched = _Observed(observe) if observe else None
        for part in self._parts(tokens):
            if watched is not None:
                watched.rows = torch.from_numpy(np.flatnonzero(part >= observe)).to(self._shape.device)
            with watched if watched is not None and len(watched.rows) else nullcontext():
                self._forward(pool, ids, part)
        return watched.scores() if watched is not None else None

    def _parts(self, tokens: Tokens) -> Iterator[Tokens]:
        """Yield the tokens of one forward after the other. A later one sees what an earlier one has computed, as it would see it
        in the same forward."""
        at = 0
        while at < len(tokens):
            count = max(1, min(_MOST_AT_ONCE, _MASK_ELEMENTS // (int(tokens[-1]) + 1)))
            yield tokens[at : at + count]
            at += count

    def _forward(self, pool: Pool, ids: torch.Tensor, tokens: Tokens, check: _Check | None = None) -> None:
        device = self._shape.device
        places = torch.from_numpy(tokens).to(device)
        end = int(tokens[-1]) + 1
        cache = DynamicCache(config=self._shape.config)
        for number, layer in enumerate(self._shape.kinds[0].layers):
            cache.layers[layer] = _Placed(pool.kv(number)[:, :, :end], places, number, check)
        self._run(ids[:, places], places, end, cache)

    def _run(self, ids: torch.Tensor, places: torch.Tensor, end: int, cache: DynamicCache) -> None:
        """Compute tokens at these places; each sees those of the first `end` that are not behind it."""
        seen = torch.arange(end, device=places.device)[None] <= places[:, None]
        mask: torch.Tensor = seen[None, None]
        if self._model.config._attn_implementation == "eager":
            dtype = self._model.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        with torch.no_grad():
            self._model.base_model(  # without its head, since nobody needs the logits
                input_ids=ids,
                position_ids=places[None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )


class _Checked(Exception):
    """Ends a forward at the layer that was looked at."""


class _Check:
    """The layer whose keys are compared, and what was found: the squared distance of each token's keys, float32."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.found: npt.NDArray[np.float32] = np.zeros(0, dtype=np.float32)


class _Placed(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache whose new tokens have their places among others, whose KV is there. kv: [K, V][head][token][size]."""

    def __init__(self, kv: torch.Tensor, places: torch.Tensor, number: int, check: _Check | None) -> None:
        super().__init__()
        self._kv, self._places, self._number, self._check = kv, places, number, check
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values, [1, heads, new tokens, head size], at their places. Return those of all tokens."""
        if self._check is not None and self._check.layer == self._number:
            apart = key_states[0].float() - self._kv[0][:, self._places].float()
            self._check.found = apart.square().sum(dim=(0, 2)).cpu().numpy()
            raise _Checked
        self._kv[0][:, self._places] = key_states[0]
        self._kv[1][:, self._places] = value_states[0]
        return self._kv[0][None], self._kv[1][None]

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Behind(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache with the KV of a text, the last `count` tokens of which are new, behind that of other tokens. before,
    own: [K, V][head][token][size]."""

    def __init__(self, before: torch.Tensor, own: torch.Tensor, count: int) -> None:
        super().__init__()
        self._before, self._own, self._count = before, own, count
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values, [1, heads, new tokens, head size], at the end. Return those of all tokens."""
        self._own[0][:, -self._count :], self._own[1][:, -self._count :] = key_states[0], value_states[0]
        keys, values = (torch.cat([self._before[one], self._own[one]], dim=1)[None] for one in (0, 1))
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Observed(TorchFunctionMode):  # type: ignore[misc]
    """Sums, within this thread, the attention that some rows of a forward pay to each of the first `end` tokens."""

    def __init__(self, end: int) -> None:
        super().__init__()
        self.rows = torch.zeros(0, dtype=torch.long)
        self._end, self._sum = end, torch.zeros(0)

    def scores(self) -> npt.NDArray[np.float32]:
        found = np.zeros(self._end, dtype=np.float32)
        found[: len(self._sum)] = self._sum.cpu().numpy()
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._attended(args[0], args[1], kwargs.get("attn_mask"), kwargs.get("scale"))
        elif func is functional.softmax and out.ndim == 4:
            self._add(out[0][:, self.rows].float().sum(dim=(0, 1)))
        return out

    def _attended(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> None:
        """query: [1, heads, rows, size], key: [1, KV heads, tokens, size]."""
        for rows in self.rows.split(rows_at_once(query.shape[1], key.shape[2])):
            seen = mask[0][:, rows] if mask is not None else None
            self._add(paid(query[0][:, rows], key[0], scale or query.shape[-1] ** -0.5, seen).sum(dim=(0, 1)))

    def _add(self, paid: torch.Tensor) -> None:
        paid = paid[: self._end]
        self._sum = paid if not len(self._sum) else self._sum + paid
