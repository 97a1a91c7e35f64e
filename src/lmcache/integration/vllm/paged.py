"""Where vLLM's KV lies: planes by strides for plain tensors, by asking the engine's own kernel on a CPU.

vLLM-CPU packs the inside of a block by instruction set (keys transposed, pairs interleaved for matrix units), and no
tensor says how. So at registration the kernel writes known numbers into one block of our own, and strides are fitted to
where they landed; what no strides describe is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache.errors import LayoutError
from lmcache.transfer.paged import PagedKV, Plane

_BASE = 128
"""Probed numbers are written in this base: its digits, and 128 itself, are exact in every float type."""


@dataclass(frozen=True)
class Shape:
    """What the KV cache spec says. block_tokens: of the scheduler's blocks; those of the tensors may be smaller."""

    heads: int
    head_size: int
    block_tokens: int
    mla: bool


@dataclass(frozen=True)
class Registered:
    """The paged KV, and how many of its blocks make one block of the scheduler's.

    loads_need_fence: work in flight on the device may still write to blocks that the scheduler gives to a load.
    """

    paged: PagedKV
    blocks_per_block: int
    loads_need_fence: bool = False

    def blocks(self, table: Sequence[int]) -> list[int]:
        """A block table of the scheduler's in blocks of the tensors."""
        ratio = self.blocks_per_block
        return list(table) if ratio == 1 else [block * ratio + part for block in table for part in range(ratio)]


def describe_tensors(tensors: Sequence[Any], shape: Shape, num_blocks: int, isa: str = "") -> Registered:
    """Describe one KV tensor a layer, in slot order. isa: what vLLM-CPU's attention runs with ("" elsewhere).

    Raises:
        LayoutError: the tensors cannot be described; the message names what they are.
    """
    first = tensors[0]
    if len({(tuple(tensor.shape), str(tensor.dtype), str(tensor.device)) for tensor in tensors}) != 1:
        raise LayoutError("layers with KV tensors of different shapes are not supported")
    if len({tensor.data_ptr() for tensor in tensors}) != len(tensors):
        raise LayoutError("layers that share one KV tensor are not supported")
    block_axis = 1 if len(first.shape) == 5 and first.shape[0] == 2 and first.shape[1] % num_blocks == 0 else 0
    total = first.shape[block_axis]
    if total % num_blocks or shape.block_tokens % (total // num_blocks):
        raise LayoutError(
            f"KV tensors of shape {tuple(first.shape)} do not hold {num_blocks} blocks of {shape.block_tokens} tokens"
        )
    ratio = total // num_blocks
    inner = Shape(shape.heads, shape.head_size, shape.block_tokens // ratio, shape.mla)
    on_cpu = str(first.device).startswith("cpu") and not shape.mla
    if on_cpu:
        offsets = probe_cpu_block(first, inner, isa, block_axis)
        planes = [plane for tensor in tensors for plane in _cpu_planes(tensor, inner, offsets, block_axis)]
    else:
        planes = [plane for tensor in tensors for plane in strided_planes(tensor, inner, block_axis)]
    paged = PagedKV(tuple(planes), inner.block_tokens, total, first.element_size(), tuple(tensors), str(first.device))
    return Registered(paged, ratio)


def strided_planes(tensor: Any, shape: Shape, block_axis: int) -> list[Plane]:
    """The planes of a tensor whose elements lie where its strides say.

    Known: [2, blocks, tokens, heads, dims] and [blocks, 2, tokens, heads, dims] in any order of memory;
    [blocks, heads, tokens, 2 * dims] with keys before values; MLA [blocks, tokens, latent] and [blocks, 1, tokens,
    latent].
    """
    item, sizes = tensor.element_size(), tuple(tensor.shape)
    stride = [step * item for step in tensor.stride()]
    heads, dims, tokens = shape.heads, shape.head_size, shape.block_tokens
    base = tensor.data_ptr()
    if shape.mla and sizes[1:] in ((tokens, dims), (1, tokens, dims)):
        return [Plane.strided(base, stride[0], stride[-2], 1, 0, dims, stride[-1])]
    if len(sizes) == 5 and sizes[2:] == (tokens, heads, dims) and sizes[1 - block_axis] == 2:
        step = stride[1 - block_axis]
        starts = (base, base + step)
        return [
            Plane.strided(start, stride[block_axis], stride[2], heads, stride[3], dims, stride[4]) for start in starts
        ]
    if not shape.mla and sizes[1:] == (heads, tokens, 2 * dims):
        starts = (base, base + dims * stride[3])
        return [Plane.strided(start, stride[0], stride[2], heads, stride[1], dims, stride[3]) for start in starts]
    raise LayoutError(
        f"KV tensors of shape {sizes} with {heads} heads of {dims} and {tokens} tokens a block are of an unknown order"
    )


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


def probe_cpu_block(tensor: Any, shape: Shape, isa: str, block_axis: int) -> tuple[Fit, Fit]:
    """Where vLLM-CPU's kernel puts K and V inside a block.

    Raises:
        LayoutError: there is no such kernel for these tensors, or strides cannot describe what it does.
    """
    import torch

    from vllm import _custom_ops as ops

    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LayoutError(f"KV of dtype {tensor.dtype} on a CPU is not supported yet")
    sizes = list(tensor.shape)
    sizes[block_axis] = 1
    scratch = torch.zeros(sizes, dtype=tensor.dtype)
    kv_axes = _cpu_axes(tensor, shape, block_axis)
    if any(tensor.stride(axis) != scratch.stride(axis) for axis in kv_axes):
        raise LayoutError(
            f"KV tensors of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())} are of an unknown order"
        )
    keys, values = _cpu_views(scratch)
    slots = torch.arange(shape.block_tokens, dtype=torch.int64)

    def write(numbers: Any) -> None:
        scratch.zero_()
        source = numbers.to(tensor.dtype)
        try:
            ops.cpu_attn_reshape_and_cache(source, source.clone(), keys, values, slots, isa)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise LayoutError(f"vLLM-CPU's kernel cannot be asked for its order of KV: {error}") from None

    positions = _probe_positions(write, keys, values, shape)
    return fit_strides(positions[0]), fit_strides(positions[1])


def _probe_positions(
    write: Callable[[Any], None], keys: Any, values: Any, shape: Shape
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Write each element's number, digit by digit, and find where it went: [token, head, dim] -> element, for K and V."""
    import torch

    count = shape.block_tokens * shape.heads * shape.head_size
    numbers = torch.arange(count, dtype=torch.int64).view(shape.block_tokens, shape.heads, shape.head_size)
    found = [np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)]
    weight = 1
    while weight < max(count, 2):
        write(torch.div(numbers, weight, rounding_mode="floor") % _BASE + 1)
        for index, view in enumerate((keys, values)):
            digits = view[0].to(torch.float32).reshape(-1).numpy().astype(np.int64) - 1
            found[index] += digits * weight
        weight *= _BASE
    return [_invert(numbers_at, view, shape, count) for numbers_at, view in zip(found, (keys, values), strict=True)]


def _invert(
    numbers_at: np.ndarray[Any, np.dtype[np.int64]], view: Any, shape: Shape, count: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """From "which element is at this place of the view" to "at which place of the block is this element"."""
    if numbers_at.size != count or not np.array_equal(np.sort(numbers_at), np.arange(count)):
        raise LayoutError("the attention kernel does not keep every element of KV in its block once")
    places = np.zeros(view[0].numel(), dtype=np.int64).reshape(tuple(view[0].shape))
    for axis, (size, step) in enumerate(zip(view[0].shape, view[0].stride(), strict=True)):
        places += (np.arange(size) * step).reshape([-1 if other == axis else 1 for other in range(places.ndim)])
    positions = np.empty(count, dtype=np.int64)
    positions[numbers_at] = places.reshape(-1) + int(view.storage_offset())
    return positions.reshape(shape.block_tokens, shape.heads, shape.head_size)


def _cpu_axes(tensor: Any, shape: Shape, block_axis: int) -> tuple[int, ...]:
    """The axes inside a block.

    Raises:
        LayoutError: not one of the two shapes that vLLM-CPU has had.
    """
    sizes = tuple(tensor.shape)
    if len(sizes) == 4 and sizes[1:] == (shape.heads, shape.block_tokens, 2 * shape.head_size):
        return (1, 2, 3)
    if len(sizes) == 5 and block_axis == 1 and sizes[2:] == (shape.heads, shape.block_tokens, shape.head_size):
        return (2, 3, 4)
    raise LayoutError(f"KV tensors of shape {sizes} on a CPU are of an unknown order")


def _cpu_views(scratch: Any) -> tuple[Any, Any]:
    """K and V of one block as vLLM-CPU hands them to its kernel."""
    if len(scratch.shape) == 5:
        return scratch[0], scratch[1]
    blocks, heads, tokens, _ = scratch.shape
    keys, values = scratch.view(blocks, heads, tokens * 2, -1).chunk(2, dim=2)
    return keys, values


def _cpu_planes(tensor: Any, shape: Shape, fits: tuple[Fit, Fit], block_axis: int) -> list[Plane]:
    item = tensor.element_size()
    planes = []
    for index, fit in enumerate(fits):
        start = fit.start
        if block_axis == 1 and index == 1:
            # The scratch tensor has one block, so its V starts elsewhere than the real one's.
            start += tensor.stride(0) - shape.heads * shape.block_tokens * shape.head_size
        planes.append(
            Plane(
                address=tensor.data_ptr() + start * item,
                block_stride=tensor.stride(block_axis) * item,
                token_group=fit.token_group,
                group_stride=fit.group_stride * item,
                token_stride=fit.token_stride * item,
                heads=shape.heads,
                head_stride=fit.head_stride * item,
                dims=shape.head_size,
                dim_group=fit.dim_group,
                dim_group_stride=fit.dim_group_stride * item,
                dim_stride=fit.dim_stride * item,
            )
        )
    return planes


def cpu_isa(vllm_config: Any, layer_name: str, dtype: Any, shape: Shape) -> str:
    """The instruction set that vLLM-CPU's attention was set up with, as its backend named it to the layer."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    isa = getattr(layer, "isa", None)
    if isa:
        return str(isa)
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(dtype, shape.block_tokens, shape.head_size))
