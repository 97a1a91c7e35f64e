"""The pool: memory for one sequence's KV. LMCache copies into it and out of it, and the model's attention reads it in place.

So a hit costs one copy, from the extents. The KV of a computed token is written behind that of the others, whereas a plain
`DynamicLayer` makes a new tensor for each token and copies all KV into it. States of recurrent layers are the model's own; the
pool holds copies of them, as they were behind some of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from lmcache.engine.jobs import Blocks
from lmcache.errors import LayoutError
from lmcache.transfer.paged import PagedKV, Plane

BLOCK_TOKENS = 64
"""The unit in which LMCache's copier counts the tokens of a pool. The tokens lie one after another, whatever the block size."""
PLACES = 3
"""Copies of the states that the pool has room for: where prompts part, where this one ends, and where its answer does."""
_ALIGNMENT = 64
"""Bytes. The tensors of a copy of a state begin at multiples of it."""


@dataclass(frozen=True)
class Kind:
    """The KV of layers of one kind: for each token, each layer holds `heads` keys and values of `head_size` elements.

    layers: the numbers of these layers in the model. window: how many tokens, with its own, a token's attention sees; 0 for all
    before it."""

    layers: tuple[int, ...]
    heads: int
    head_size: int
    dtype: torch.dtype
    window: int = 0


class StateTensor(NamedTuple):
    """One tensor of a layer's state. name: `conv` or `recurrent`. number: which of the layer's states of that name."""

    name: str
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def of(self, layer: Any) -> torch.Tensor:
        """Return this tensor of a layer.

        Raises:
            LayoutError: the layer has none, or another shape or dtype.
        """
        found: torch.Tensor | None = getattr(layer, f"{self.name}_states")[self.number]
        if found is None or (tuple(found.shape), found.dtype) != (self.shape, self.dtype):
            raise LayoutError(f"a {self.name} state is not the {self.dtype} tensor of shape {self.shape} that it was")
        return found


@dataclass(frozen=True)
class States:
    """The states of recurrent layers of one kind. layers: the numbers of these layers in the model."""

    layers: tuple[int, ...]
    tensors: tuple[StateTensor, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of one layer's state in the pool."""
        return sum(-(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors)


@dataclass(frozen=True)
class Shape:
    """The shape of a model's KV: its kinds, those of full attention first, and the kinds of its states. config: the model's, by
    which Transformers makes caches for it."""

    kinds: tuple[Kind, ...]
    states: tuple[States, ...]
    device: torch.device
    config: Any


class Pooled:
    """What makes a layer of Transformers' cache one whose keys and values lie in the pool, [1, heads, tokens, head size].

    If the pool is full (the answer is longer than expected), or the sequence is split (beams), it goes on as the layer that it
    would be without the pool. A window's tokens stay in the pool when it has left them behind, so that all of them can be stored.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    get_seq_length: Callable[[], int]

    def begin(
        self,
        layer: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        window: int = 0,
        appends: Callable[[int], None] | None = None,
    ) -> None:
        """Stand in for an empty layer of a cache, and go on from the first `tokens` tokens of the pool.

        layer: as Transformers has made it by the model's configuration. keys, values: the layer's part of the pool, [1, heads,
        pool tokens, head size]. window: as in `Kind`. appends: called with the number of new tokens before each update."""
        self.__dict__.update(layer.__dict__)
        self._appends, self._window = appends, window
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room_keys, self._room_values = keys, values
        self._left_at = 0
        self._hold(tokens)

    @property
    def tokens_in_pool(self) -> int:
        """How many leading tokens have their KV in the pool."""
        return self.get_seq_length() if self._in_pool() else self._left_at

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, [1, heads, new tokens, head size]. Return those that the new tokens' attention sees."""
        if self._appends is not None:
            self._appends(int(key_states.shape[-2]))
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        fits = key_states.shape[0] == 1 and end <= self._room_keys.shape[-2] and self._in_pool()
        if not fits:
            self._left_at = start if self._in_pool() else self._left_at
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return grown
        self._room_keys[:, :, start:end] = key_states
        self._room_values[:, :, start:end] = value_states
        self._hold(end)
        first = self._first_in_reach(start)
        return self._room_keys[:, :, first:end], self._room_values[:, :, first:end]

    def leave(self) -> None:
        """Copy the KV out of the pool, so that this layer stays valid when the pool is used for another prompt."""
        self._appends = None
        if self._in_pool() and self.keys is not None and self.values is not None:
            self._left_at = self.tokens_in_pool
            self.keys, self.values = self.keys.clone(), self.values.clone()

    _appends: Callable[[int], None] | None
    _window: int
    _room_keys: torch.Tensor
    _room_values: torch.Tensor
    _left_at: int

    def _hold(self, end: int) -> None:
        """Hold, of the first `end` tokens of the pool, what the next token's attention sees."""
        first = self._first_in_reach(end)
        self.keys, self.values = self._room_keys[:, :, first:end], self._room_values[:, :, first:end]
        if self._window:
            self.cumulative_length = end

    def _first_in_reach(self, token: int) -> int:
        """Return the first token that is seen by token number `token`."""
        return max(0, token - self._window + 1) if self._window else 0

    def _in_pool(self) -> bool:
        return self.keys is not None and _storage(self.keys) == _storage(self._room_keys)


_KINDS: dict[type, type[Pooled]] = {}
"""The pooled form of each kind of layer."""


def _pooled(kind: type) -> type[Pooled]:
    return _KINDS.setdefault(kind, type(f"Pooled{kind.__name__}", (Pooled, kind), {}))


class Pool:
    """Memory for the KV of `tokens` tokens (rounded up to complete blocks), for each kind [layer][K, V][head][token][head size],
    and for `PLACES` copies of the states, for each kind [layer][place][bytes].

    apart: more tokens, behind those of the sequence, for passages whose KV is not where it is used.

    Attention reads this order of KV fastest: on a CPU a step of one token after 4,096 takes 21 ms, and 25 ms with the order
    [token][head].
    """

    def __init__(self, shape: Shape, tokens: int, apart: int = 0) -> None:
        self.tokens, self.apart_tokens = (-(-count // BLOCK_TOKENS) * BLOCK_TOKENS for count in (tokens, apart))
        room = self.tokens + self.apart_tokens
        self._shape, self._blocks = shape, list(range(room // BLOCK_TOKENS))
        sizes = [(len(kind.layers), 2, kind.heads, room, kind.head_size) for kind in shape.kinds]
        # A tensor that is made in the caller's inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False):
            self._memory = [
                torch.empty(size, dtype=kind.dtype, device=shape.device)
                for size, kind in zip(sizes, shape.kinds, strict=True)
            ]
            self._states = [
                torch.zeros((len(kind.layers), PLACES, kind.size_bytes), dtype=torch.uint8, device=shape.device)
                for kind in shape.states
            ]

    def describe(self) -> list[PagedKV]:
        """Describe where the KV of each kind lies, then the states of each kind, for LMCache's copier."""
        device, kv, states = str(self._shape.device), self._memory, self._states
        planes = [tuple(Plane.of(plane, "htd", BLOCK_TOKENS) for layer in one for plane in layer) for one in kv]
        described = [
            PagedKV(own, BLOCK_TOKENS, len(self._blocks), one.element_size(), one, device)
            for own, one in zip(planes, kv, strict=True)
        ]
        rows = [tuple(Plane.of(layer.unsqueeze(1), "btd") for layer in one) for one in states]
        return described + [PagedKV(own, 1, PLACES, 1, one, device) for own, one in zip(rows, states, strict=True)]

    def tables(self, place: int = 0) -> list[Blocks]:
        """Return the block table of each kind of KV and of states. place: where the states lie, behind whatever token."""
        states = np.full(self.tokens, place, dtype=np.int32)
        return [*(self._blocks for _ in self._memory), *(states for _ in self._states)]

    def apart(self, place: int) -> list[int]:
        """Return the block table of a passage that lies from token `place` of the room apart on, a multiple of the block size."""
        return self._blocks[(self.tokens + place) // BLOCK_TOKENS :]

    def kv(self, layer: int) -> torch.Tensor:
        """Return the KV of a layer of the first kind, [K, V][head][token][head size], with the room apart at the end."""
        return self._memory[0][layer]

    def cache(self, tokens: int, step: Callable[[int], None]) -> DynamicCache:
        """Return a cache for `generate` whose first `tokens` tokens are those in the pool, with the states in the first place.
        step: called with the number of new tokens when a forward reaches the first layer with keys and values."""
        cache = DynamicCache(config=self._shape.config)
        first = min(number for kind in self._shape.kinds for number in kind.layers)
        for kind, memory in zip(self._shape.kinds, self._memory, strict=True):
            for number, layer in zip(kind.layers, memory, strict=True):
                keys, values = (plane[:, : self.tokens].unsqueeze(0) for plane in layer)
                appends = step if number == first else None
                pooled = _pooled(type(cache.layers[number]))
                own = pooled.__new__(pooled)
                own.begin(cache.layers[number], keys, values, tokens, kind.window, appends)
                cache.layers[number] = own
        if tokens:
            for layer, tensor, copy in self._copies(cache, 0):
                getattr(layer, f"update_{tensor.name}_state")(copy, state_idx=tensor.number)
        return cache

    def keep_states(self, cache: DynamicCache, place: int) -> None:
        """Copy the cache's states to a place.

        Raises:
            LayoutError: they are not of the shape that they had when the shape of the KV was found.
        """
        for layer, tensor, copy in self._copies(cache, place):
            copy.copy_(tensor.of(layer))

    def _copies(self, cache: DynamicCache, place: int) -> list[tuple[Any, StateTensor, torch.Tensor]]:
        """Return each tensor of the cache's states: its layer, what it is, and its copy at this place."""
        found = []
        for kind, memory in zip(self._shape.states, self._states, strict=True):
            for number, row in zip(kind.layers, memory[:, place], strict=True):
                start = 0
                for tensor in kind.tensors:
                    copy = row[start : start + tensor.size_bytes].view(tensor.dtype).view(tensor.shape)
                    found.append((cache.layers[number], tensor, copy))
                    start += -(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT
        return found


def pooled_layers(cache: DynamicCache) -> list[Pooled]:
    """Return the cache's layers with keys and values."""
    return [layer for layer in cache.layers if isinstance(layer, Pooled)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
