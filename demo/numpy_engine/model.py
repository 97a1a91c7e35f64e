"""The network: a decoder-only transformer with RMSNorm, RoPE, grouped-query attention with normed queries and keys, SwiGLU.

Weights are random but not meaningless: attention is peaked (queries are normed to a length that makes some scores win)
and yet spread over all positions, and the output matrix is its own, so that the answer depends on the complete prompt. With
flat attention any KV would give the same tokens, and a test of a cache would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Context = Callable[[int, Floats, Floats], tuple[Floats, Floats]]
"""(layer, new K, new V) -> all K and V up to here: keeps the new rows [token][head][dim], returns [head][token][dim]."""

QUERY_GAIN = 2.5
"""Length of a normed query's elements: scores of unit-variance keys then spread by about 2.5, so a few positions win."""
LOGIT_GAIN = 3.0
OUTPUT_GAIN = 2.0
"""Attention adds as much to the residual stream as the token itself, after averaging over the positions that win."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and seed of the network. The default prefills 2,000 tokens in about two seconds on two cores."""

    vocab: int = 4096
    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e6
    seed: int = 0

    @classmethod
    def tiny(cls, **changes: int) -> ModelConfig:
        """A model for fast tests: 2 layers, prefills 1,000 tokens in some 20 ms."""
        shape = {
            "vocab": 512,
            "hidden": 64,
            "intermediate": 128,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
        }
        return cls(**(shape | changes))


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices are [in][out]; `qkv` and `gate_up` are joined, as one product is faster than three."""

    qkv: Floats
    out: Floats
    gate_up: Floats
    down: Floats


class Model:
    """Weights of one `ModelConfig`, and the forward pass over a run of consecutive tokens."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        rng = np.random.default_rng(config.seed)
        self.embedding = rng.standard_normal((config.vocab, config.hidden), dtype=np.float32)
        self.layers = [_random_layer(rng, config) for _ in range(config.layers)]
        self.lm_head = _matrix(rng, config.hidden, config.vocab, LOGIT_GAIN)
        half = config.head_dim // 2
        self._frequencies = (config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)).astype(np.float64)

    def forward(self, token_ids: NDArray[np.int64], first_position: int, context: Context) -> Floats:
        """Run consecutive tokens that start at `first_position`; return the logits [vocab] after the last of them."""
        x = self.embedding[token_ids]
        angles = np.outer(np.arange(first_position, first_position + len(token_ids)), self._frequencies)
        cos, sin = np.cos(angles).astype(np.float32)[:, None], np.sin(angles).astype(np.float32)[:, None]
        for number, layer in enumerate(self.layers):
            x = x + self._attend(number, layer, _norm(x), cos, sin, context)
            x = x + _swiglu(_norm(x), layer)
        return np.asarray(_norm(x[-1]) @ self.lm_head)

    def _attend(
        self, number: int, layer: LayerWeights, x: Floats, cos: Floats, sin: Floats, context: Context
    ) -> Floats:
        config, tokens = self.config, len(x)
        rows = (x @ layer.qkv).reshape(tokens, -1, config.head_dim)
        queries = _rotate(_norm(rows[:, : config.heads]) * np.float32(QUERY_GAIN), cos, sin)
        keys = _rotate(_norm(rows[:, config.heads : config.heads + config.kv_heads]), cos, sin)
        all_keys, all_values = context(number, keys, rows[:, config.heads + config.kv_heads :])
        mixed = _attention(queries, all_keys, all_values)
        return np.asarray(mixed @ layer.out)


def _matrix(rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> Floats:
    return np.asarray(rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / rows**0.5))


def _random_layer(rng: np.random.Generator, config: ModelConfig) -> LayerWeights:
    query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return LayerWeights(
        qkv=_matrix(rng, config.hidden, query_width + 2 * kv_width),
        out=_matrix(rng, query_width, config.hidden, OUTPUT_GAIN),
        gate_up=_matrix(rng, config.hidden, 2 * config.intermediate),
        down=_matrix(rng, config.intermediate, config.hidden),
    )


def _norm(x: Floats) -> Floats:
    """RMSNorm over the last axis, with weights of one."""
    scale = np.sqrt(np.einsum("...d,...d->...", x, x) / np.float32(x.shape[-1]) + np.float32(1e-6))
    return np.asarray(x / scale[..., None])


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary position embedding: element i of the first half and of the second turn as a pair."""
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def _swiglu(x: Floats, layer: LayerWeights) -> Floats:
    gate, up = np.split(x @ layer.gate_up, 2, axis=-1)
    return np.asarray((gate / (1 + np.exp(-gate)) * up) @ layer.down)


def _attention(queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Causal attention: queries [token][head][dim] are the last tokens of the context [kv head][token][dim]."""
    tokens, heads, dims = queries.shape
    kv_heads, length, _ = keys.shape
    grouped = (
        queries.reshape(tokens, kv_heads, heads // kv_heads, dims).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dims)
    )
    scores = grouped @ keys.transpose(0, 2, 1)
    scores *= np.float32(dims**-0.5)
    future = np.triu(np.full((tokens, tokens), -np.inf, np.float32), k=1)
    scores.reshape(kv_heads, -1, tokens, length)[..., length - tokens :] += future
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed = scores @ values
    mixed /= scores.sum(axis=-1, keepdims=True)
    ordered: Floats = mixed.reshape(kv_heads, heads // kv_heads, tokens, dims).transpose(2, 0, 1, 3).reshape(tokens, -1)
    return ordered
