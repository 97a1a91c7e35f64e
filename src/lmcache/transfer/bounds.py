"""Bounds checks of copies, made before any memory is touched."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache.compiled import native
from lmcache.errors import LayoutError
from lmcache.transfer.paged import PagedKV

Blocks: TypeAlias = npt.NDArray[np.int32]
Runs: TypeAlias = npt.NDArray[np.int64]
_ANYWHERE = (1 << 63) - 1


class Bounds:
    """Checks copies between `paged` and extents of `chunk_tokens` tokens and `extent_bytes` bytes."""

    def __init__(self, paged: PagedKV, chunk_tokens: int, extent_bytes: int) -> None:
        self._paged, self._chunk_tokens = paged, chunk_tokens
        self._shard_bytes = extent_bytes

    def checked(
        self, base: int, blocks: npt.NDArray[Any], runs: npt.NDArray[Any], arena_bytes: int | None = None
    ) -> tuple[Blocks, Runs]:
        """Check all arguments and return blocks and runs as contiguous int32 and int64 arrays.

        Arguments as in `CpuCopier.gather`.

        Raises:
            LayoutError: the copy would touch memory out of bounds; the message names what.
        """
        blocks, runs = np.asarray(blocks), np.asarray(runs)
        if base > 0 and _is_plain(blocks, np.int32, (-1,)) and _is_plain(runs, np.int64, (-1, 4)):
            farthest = _ANYWHERE if arena_bytes is None else arena_bytes - self._shard_bytes
            table, shape = (blocks.ctypes.data, len(blocks)), (self._paged.block_tokens, self._paged.num_blocks)
            if native.runs_fit(*table, runs.ctypes.data, len(runs), self._chunk_tokens, *shape, farthest):
                return blocks, runs
        self._check(base, blocks, runs, arena_bytes)
        # All values fit in int32 and int64 now, so these conversions lose nothing. They copy only arrays of another type.
        return np.ascontiguousarray(blocks, dtype=np.int32), np.ascontiguousarray(runs, dtype=np.int64)

    def _check(self, base: int, blocks: npt.NDArray[Any], runs: npt.NDArray[Any], arena_bytes: int | None) -> None:
        """Repeat the checks of `runs_fit` (native/copy.c) to name what is wrong. Accept arrays of other integer types."""
        if blocks.ndim != 1 or blocks.dtype.kind not in "iu":
            raise LayoutError(f"blocks is {blocks.dtype}{list(blocks.shape)}; it must be a flat array of integers")
        if runs.ndim != 2 or runs.shape[1] != 4 or runs.dtype != np.int64:
            raise LayoutError(f"runs is {runs.dtype}{list(runs.shape)}; it must be int64 [runs, 4]")
        if base < 1:
            raise LayoutError(f"base is {base}; it must be the address of a mapping")
        if not len(runs):
            return
        paged, chunk_tokens = self._paged, self._chunk_tokens
        table_tokens = len(blocks) * paged.block_tokens
        low = runs.min(axis=0)
        if low.min() < 0:
            raise LayoutError(f"runs has {low.min()}; every number in it must be at least 0")
        # Each term is bounded before the terms are added, so that no sum can overflow.
        offset, first, count, in_extent = (int(value) for value in runs.max(axis=0))
        if max(count, in_extent) > chunk_tokens or int((runs[:, 2] + runs[:, 3]).max()) > chunk_tokens:
            raise LayoutError(
                f"a run of up to {count} tokens from token {in_extent} of an extent passes its end, chunk_tokens={chunk_tokens}"
            )
        end = int((runs[:, 1] + runs[:, 2]).max()) if first <= table_tokens else first
        if end > table_tokens:
            raise LayoutError(f"a run ends at token {end}, but the block table holds {table_tokens}; pass all blocks")
        if arena_bytes is not None and offset + self._shard_bytes > arena_bytes:
            raise LayoutError(
                f"an extent at {offset} of {self._shard_bytes} bytes passes the arena's end at {arena_bytes}; attach again"
            )
        used = blocks[int(low[1]) // paged.block_tokens : -(-end // paged.block_tokens)]
        if len(used) and not (int(used.min()) >= 0 and int(used.max()) < paged.num_blocks):
            bad = used[(used < 0) | (used >= paged.num_blocks)][0]
            raise LayoutError(f"block {bad} is not one of the {paged.num_blocks} blocks of the paged KV")


def _is_plain(array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> bool:
    """Return whether C may read the array directly. shape: -1 stands for any length."""
    return (
        array.dtype == dtype and array.ndim == len(shape) and array.shape[1:] == shape[1:] and array.flags.c_contiguous
    )
