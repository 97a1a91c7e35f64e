"""Strides found from the places of elements, for kernels that keep KV in an order of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache.errors import LayoutError
from lmcache.transfer.paged import Plane

_BASE = 8
"""Probed numbers are written in this base: its digits, and 8 itself, are exact in every float type, also in those of 8 bits."""


@dataclass(frozen=True)
class Fit:
    """Two-level strides, in elements, of one plane inside one block."""

    start: int
    token_group: int
    group_stride: int
    token_stride: int
    head_stride: int
    dim_group: int
    dim_group_stride: int
    dim_stride: int

    def plane(self, address: int, block_stride: int, item_bytes: int, heads: int, dims: int) -> Plane:
        """The plane of blocks `block_stride` bytes apart that begins at this address."""
        return Plane(
            *(address, block_stride, self.token_group, self.group_stride * item_bytes, self.token_stride * item_bytes),
            *(heads, self.head_stride * item_bytes),
            *(dims, self.dim_group, self.dim_group_stride * item_bytes, self.dim_stride * item_bytes),
        )


def fit_strides(positions: np.ndarray[Any, np.dtype[np.int64]]) -> Fit:
    """Strides that give `positions` [token, head, dim] (elements from the block's start) exactly.

    Raises:
        LayoutError: there are none.
    """
    heads = positions.shape[1]
    start = int(positions[0, 0, 0])
    token_axis, dim_axis = positions[:, 0, 0] - start, positions[0, 0, :] - start
    head_stride = int(positions[0, 1, 0]) - start if heads > 1 else 0
    token_group, dim_group = _fit_axis(token_axis), _fit_axis(dim_axis)
    expected = (
        start + (np.arange(heads) * head_stride)[None, :, None] + token_axis[:, None, None] + dim_axis[None, None, :]
    )
    if not np.array_equal(expected, positions):
        raise LayoutError("the attention kernel packs KV in an order that strides cannot describe")
    return Fit(start, *token_group, head_stride, *dim_group)


def _fit_axis(offsets: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[int, int, int]:
    """(group, stride of a group, stride inside it) of positions along one axis; the plainest that fits."""
    count = len(offsets)
    numbers = np.arange(count)
    for group in (g for g in range(1, count + 1) if count % g == 0):
        outer = int(offsets[group]) if group < count else 0
        inner = int(offsets[1]) if group > 1 else outer
        if np.array_equal((numbers // group) * outer + (numbers % group) * inner, offsets):
            return group, outer, inner
    raise LayoutError("the attention kernel packs KV in an order that strides cannot describe")


def probe_places(
    write: Callable[[Any], None], views: Sequence[Any], sizes: tuple[int, int, int]
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Where a kernel puts each element: for each view of its output, the places [token, head, dim] in elements from the start of
    the view's memory.

    write: lets the kernel write float numbers [token, head, dim] into all views (PyTorch tensors on a CPU). sizes: of that.

    Raises:
        LayoutError: the kernel does not keep every element once.
    """
    import torch

    count = sizes[0] * sizes[1] * sizes[2]
    numbers = torch.arange(count, dtype=torch.int64).view(sizes)
    found = [np.zeros(count, dtype=np.int64) for _ in views]
    weight = 1
    while weight < max(count, 2):  # each element's number is written digit by digit
        write(torch.div(numbers, weight, rounding_mode="floor") % _BASE + 1)
        for numbers_at, view in zip(found, views, strict=True):
            numbers_at += (view.to(torch.float32).reshape(-1).numpy().astype(np.int64) - 1) * weight
        weight *= _BASE
    return [_invert(numbers_at, view).reshape(sizes) for numbers_at, view in zip(found, views, strict=True)]


def _invert(numbers_at: np.ndarray[Any, np.dtype[np.int64]], view: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """From "which element is at this place of the view" to "at which place of the memory is this element"."""
    count = numbers_at.size
    if not np.array_equal(np.sort(numbers_at), np.arange(count)):
        raise LayoutError("the attention kernel does not keep every element of KV in its block once")
    shape = tuple(view.shape)
    places = np.zeros(shape, dtype=np.int64)
    for axis, (size, step) in enumerate(zip(shape, view.stride(), strict=True)):
        places += (np.arange(size) * step).reshape([-1 if other == axis else 1 for other in range(places.ndim)])
    positions = np.empty(count, dtype=np.int64)
    positions[numbers_at] = places.reshape(-1) + int(view.storage_offset())
    return positions
