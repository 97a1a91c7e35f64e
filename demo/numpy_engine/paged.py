"""Paged KV: blocks of tokens in one array a layer, in one of several memory orders, and the free list of the blocks.

Whatever the order, this file makes of it views K and V [block][token][head][dim]; the model writes and reads those, and
LMCache gets the strides of the same views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from demo.numpy_engine.model import Floats, ModelConfig
from lmcache.transfer.paged import PagedKV, Plane

KV_ORDERS = ("nhd", "hnd", "interleaved", "transposed_k")
"""nhd: [K, V][block][token][head][dim]. hnd: [block][K, V][head][token][dim]. interleaved: [block][token][head][K, V][dim].
transposed_k: [block][head], then K as [dim][token] and V as [token][dim], which is what vLLM has on a CPU."""


class OutOfBlocks(Exception):
    """The request needs more KV blocks than are free: make `num_blocks` larger, or the prompt shorter."""


class BlockPool:
    """Which blocks are free. The block freed last is given out first, so that stale KV is met early in tests."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_count(self) -> int:
        """Blocks that may be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks.

        Raises:
            OutOfBlocks: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocks(
                f"{count} KV blocks needed, {len(self._free)} of {self.num_blocks} free; raise num_blocks"
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Make blocks free again."""
        assert not set(blocks) & set(self._free), "a block was freed twice"
        self._free.extend(blocks)

    def free_blocks(self) -> list[int]:
        """A copy of the free list."""
        return list(self._free)


class RankKV:
    """The paged KV of one tensor-parallel rank: a slice of the KV heads of every layer."""

    def __init__(self, config: ModelConfig, heads: int, num_blocks: int, block_tokens: int, order: str) -> None:
        self.heads, self.num_blocks, self.block_tokens = heads, num_blocks, block_tokens
        layers = [_layer(num_blocks, block_tokens, heads, config.head_dim, order) for _ in range(config.layers)]
        self.arrays = [array for array, _, _ in layers]
        self.keys = [keys for _, keys, _ in layers]
        self.values = [values for _, _, values in layers]
        self.poison(range(num_blocks))

    def poison(self, blocks: Sequence[int]) -> None:
        """Fill blocks with NaN, so that a read of unfilled blocks is detected."""
        index = list(blocks)
        for view in (*self.keys, *self.values):
            view[index] = np.nan

    def describe(self) -> PagedKV:
        """Describe the KV for LMCache's copier: address and strides of each plane, K then V of each layer."""
        views = [view for pair in zip(self.keys, self.values, strict=True) for view in pair]
        planes = tuple(_plane(view) for view in views)
        return PagedKV(planes, self.block_tokens, self.num_blocks, views[0].itemsize, self.arrays)


def _layer(blocks: int, tokens: int, heads: int, dims: int, order: str) -> tuple[Floats, Floats, Floats]:
    """One layer's array, and the views K and V [block][token][head][dim] into it."""
    if order == "nhd":
        array = np.empty((2, blocks, tokens, heads, dims), np.float32)
        return array, array[0], array[1]
    if order == "hnd":
        array = np.empty((blocks, 2, heads, tokens, dims), np.float32)
        return array, array[:, 0].transpose(0, 2, 1, 3), array[:, 1].transpose(0, 2, 1, 3)
    if order == "interleaved":
        array = np.empty((blocks, tokens, heads, 2, dims), np.float32)
        return array, array[..., 0, :], array[..., 1, :]
    if order == "transposed_k":
        array = np.empty((blocks, heads, 2, tokens * dims), np.float32)
        keys = array[:, :, 0].reshape(blocks, heads, dims, tokens)
        values = array[:, :, 1].reshape(blocks, heads, tokens, dims)
        return array, keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)
    raise ValueError(f"KV order {order!r} is not one of {', '.join(KV_ORDERS)}")


def _plane(view: NDArray[np.float32]) -> Plane:
    _, tokens, heads, dims = view.shape
    block_stride, token_stride, head_stride, dim_stride = view.strides
    return Plane(
        address=view.ctypes.data,
        block_stride=block_stride,
        token_group=tokens,
        group_stride=0,
        token_stride=token_stride,
        heads=heads,
        head_stride=head_stride,
        dims=dims,
        dim_group=dims,
        dim_group_stride=0,
        dim_stride=dim_stride,
    )
