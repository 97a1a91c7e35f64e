"""The planes of vLLM's KV: from the strides of plain tensors, or by probing the engine's kernel on a CPU.

vLLM-CPU packs the inside of a block by instruction set (keys transposed, pairs interleaved for matrix units), and no
tensor says how. So at registration the kernel writes known numbers into a scratch block, and strides are fitted to the places of
these numbers. A packing that strides cannot describe is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.chunks import SCALE_BYTES
from lmcache.engine.points import stream_point
from lmcache.errors import LayoutError
from lmcache.integration.vllm.model import INDEXER_PARTS
from lmcache.transfer.fitted import Fit, fit_strides, probe_places
from lmcache.transfer.paged import PagedKV, Plane

_E5M2 = ("CPU_ATTN", "FLASHINFER")
"""The attention backends that keep numbers of e5m2 for `--kv-cache-dtype fp8_e5m2`."""


@dataclass(frozen=True)
class Shape:
    """The KV cache spec. head_size: including the bytes of a scale behind each head, if there is one. block_tokens: tokens of a
    scheduler block; the blocks of the tensors may be smaller."""

    heads: int
    head_size: int
    block_tokens: int
    mla: bool


@dataclass(frozen=True)
class CpuKernel:
    """The kernel of vLLM-CPU that packs KV into blocks. isa: its instruction set, as vLLM names it. dtype: of K and V as the
    model computes them, in PyTorch. kv_dtype: of the layout."""

    isa: str
    dtype: Any
    kv_dtype: str


@dataclass(frozen=True)
class Registered:
    """The paged KV, and how many of its blocks make one scheduler block.

    loads_need_fence: work in flight on the device may still write to blocks that the scheduler gives to a load.
    """

    paged: PagedKV
    blocks_per_block: int
    loads_need_fence: bool = False

    def blocks(self, table: Sequence[int]) -> list[int]:
        """Return a block table of the scheduler in blocks of the tensors."""
        ratio = self.blocks_per_block
        return list(table) if ratio == 1 else [block * ratio + part for block in table for part in range(ratio)]


def describe_tensors(
    tensors: Sequence[Any], shape: Shape, num_blocks: int, kernel: CpuKernel | None = None
) -> Registered:
    """Describe one KV tensor per layer, in the order of the extent. kernel: what packs KV into the blocks, None if elements lie
    where the strides of the tensors say.

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
    if kernel is not None:
        offsets = probe_cpu_block(first, inner, kernel, block_axis)
        planes = [plane for tensor in tensors for plane in _cpu_planes(tensor, inner, offsets, block_axis)]
    else:
        planes = [plane for tensor in tensors for plane in strided_planes(tensor, inner, block_axis)]
    paged = PagedKV(tuple(planes), inner.block_tokens, total, first.element_size(), tuple(tensors), str(first.device))
    return Registered(paged, ratio)


def describe_states(layers: Sequence[Any], num_blocks: int, state_bytes: int) -> Registered:
    """Describe the states of recurrent layers: for each layer a tensor [block, ...] whose blocks begin with `state_bytes` of
    state, or a sequence of such tensors that hold a state together. A block is one token of the paged KV, and its elements are
    bytes.

    Raises:
        LayoutError: the tensors cannot be described; the message names what they are.
    """
    planes = []
    for layer in layers:
        tensors = (layer,) if hasattr(layer, "stride") else tuple(layer)
        for tensor in tensors:
            if tensor.shape[0] != num_blocks or not tensor[0].is_contiguous():
                raise LayoutError(
                    f"states of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())} are of an unknown order"
                )
        step, address = tensors[0].stride(0) * tensors[0].element_size(), tensors[0].data_ptr()
        end = address
        for tensor in tensors:
            if tensor.data_ptr() != end or tensor.stride(0) * tensor.element_size() != step:
                raise LayoutError(f"the {len(tensors)} states of a layer do not lie behind one another in their blocks")
            end += tensor[0].numel() * tensor.element_size()
        if end - address < state_bytes:
            raise LayoutError(f"states of {end - address} bytes, where vLLM's cache spec has {state_bytes}")
        planes.append(Plane.strided(address, step, 0, 1, 0, state_bytes, 1))
    first = layers[0] if hasattr(layers[0], "device") else layers[0][0]
    return Registered(PagedKV(tuple(planes), 1, num_blocks, 1, tuple(layers), str(first.device)), 1)


def describe_indexer(tensors: Sequence[Any], part: str, block_tokens: int, num_blocks: int) -> Registered:
    """Describe one of the `INDEXER_PARTS` of indexers' KV: for each layer a tensor [block, token, byte] whose blocks hold first
    one part of all their tokens, then the other. block_tokens, num_blocks: of the scheduler; the tensors' blocks may be smaller.

    Raises:
        LayoutError: the tensors cannot be described; the message names what they are.
    """
    _, before, size = INDEXER_PARTS[part]
    token = sum(one for _, _, one in INDEXER_PARTS.values())
    planes = []
    for tensor in tensors:
        blocks, tokens, width = tensor.shape
        fits = blocks * tokens == num_blocks * block_tokens and blocks % num_blocks == 0
        if not fits or width != token or tensor.element_size() != 1 or not tensor[0].is_contiguous():
            raise LayoutError(
                f"KV tensors of indexers of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())} for {num_blocks} "
                f"blocks of {block_tokens} tokens are of an unknown order"
            )
        address = tensor.data_ptr() + before * tokens
        planes.append(Plane.strided(address, tensor.stride(0), size, 1, 0, size, 1))
    blocks, tokens, _ = tensors[0].shape
    paged = PagedKV(tuple(planes), tokens, blocks, 1, tuple(tensors), str(tensors[0].device))
    return Registered(paged, blocks // num_blocks)


def strided_planes(tensor: Any, shape: Shape, block_axis: int) -> list[Plane]:
    """Return the planes of a tensor whose elements lie where its strides say.

    Known: [2, blocks, tokens, heads, dims] and [blocks, 2, tokens, heads, dims] in any order of memory;
    [blocks, heads, tokens, 2 * dims] with keys before values; MLA [blocks, tokens, latent] and [blocks, 1, tokens,
    latent].
    """
    sizes, heads, dims, tokens = tuple(tensor.shape), shape.heads, shape.head_size, shape.block_tokens
    if shape.mla and sizes[1:] in ((tokens, dims), (1, tokens, dims)):
        return [Plane.of(tensor, "btd" if len(sizes) == 3 else "bhtd")]
    if len(sizes) == 5 and sizes[2:] == (tokens, heads, dims) and sizes[1 - block_axis] == 2:
        return [Plane.of(part, "bthd") for part in tensor.unbind(1 - block_axis)]
    if not shape.mla and sizes[1:] == (heads, tokens, 2 * dims):
        return [Plane.of(part, "bhtd") for part in tensor.chunk(2, -1)]
    raise LayoutError(
        f"KV tensors of shape {sizes} with {heads} heads of {dims} and {tokens} tokens a block are of an unknown order"
    )


def own_scales(vllm_config: Any, names: Sequence[str], tensors: Sequence[Any], paged: PagedKV) -> None:
    """Let vLLM make its views of the scales behind the heads. It would make them in the first forward, and then set all scales to
    1.0, those that loads have brought before, too.

    Raises:
        LayoutError: a view is not where `paged` has the last bytes of each head.
    """
    layers, caches = vllm_config.compilation_config.static_forward_context, dict(zip(names, tensors, strict=True))
    for name, layer in layers.items():
        source = getattr(layer, "kv_sharing_target_layer_name", None) or name  # a layer may read another one's KV
        if source in caches:
            layer.impl._ensure_scale_caches(caches[source])
    for number, name in enumerate(names):
        views = layers[name].impl._k_scale_cache, layers[name].impl._v_scale_cache
        for plane, view in zip(paged.planes[2 * number : 2 * number + 2], views, strict=True):
            place = (view.data_ptr(), *(step * view.element_size() for step in view.stride()))
            end = plane.address + plane.dims * paged.item_bytes
            if place != (end - SCALE_BYTES, plane.block_stride, plane.token_stride, plane.head_stride):
                raise LayoutError(
                    f"vLLM keeps the scales of {name} elsewhere than behind each head of each token; with "
                    "VLLM_KV_CACHE_LAYOUT=NHD they may be there"
                )
    if (written := stream_point(paged.device)) is not None:
        written.synchronize()  # a load that overtook it would be overwritten


def refuse_other_numbers(vllm_config: Any, names: Sequence[str]) -> None:
    """Return if the kernels of all these layers keep numbers of e5m2 under that name. Layers of a draft model may have another
    kernel.

    Raises:
        LayoutError: one is not known to do so. vLLM's Triton kernel keeps numbers of e4m3.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for backend in {layers[name].get_attn_backend().get_name() for name in names} - set(_E5M2):
        raise LayoutError(
            f"{backend} does not keep numbers of e5m2 for --kv-cache-dtype fp8_e5m2 as other attention backends do; use fp8"
        )


def probe_cpu_block(tensor: Any, shape: Shape, kernel: CpuKernel, block_axis: int) -> tuple[Fit, Fit]:
    """Return where vLLM-CPU's kernel puts K and V inside a block.

    Raises:
        LayoutError: there is no such kernel for these tensors, or strides cannot describe its packing.
    """
    import torch

    from vllm import _custom_ops as ops

    quantized = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(kernel.kv_dtype)
    kept, more = (quantized, {"kv_cache_dtype": kernel.kv_dtype}) if quantized else (tensor.dtype, {})
    if not kept.is_floating_point:
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
        source = numbers.to(kernel.dtype if quantized else tensor.dtype)
        try:
            ops.cpu_attn_reshape_and_cache(source, source.clone(), keys, values, slots, kernel.isa, **more)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise LayoutError(f"vLLM-CPU's kernel cannot be asked for its order of KV: {error}") from None

    elements = shape.block_tokens, shape.heads, shape.head_size
    key_places, value_places = probe_places(write, (keys[0].view(kept), values[0].view(kept)), elements)
    return fit_strides(key_places), fit_strides(value_places)


def _cpu_axes(tensor: Any, shape: Shape, block_axis: int) -> tuple[int, ...]:
    """Return the axes inside a block.

    Raises:
        LayoutError: the shape is none of the two that vLLM-CPU has used.
    """
    sizes = tuple(tensor.shape)
    if len(sizes) == 4 and sizes[1:] == (shape.heads, shape.block_tokens, 2 * shape.head_size):
        return (1, 2, 3)
    if len(sizes) == 5 and block_axis == 1 and sizes[2:] == (shape.heads, shape.block_tokens, shape.head_size):
        return (2, 3, 4)
    raise LayoutError(f"KV tensors of shape {sizes} on a CPU are of an unknown order")


def _cpu_views(scratch: Any) -> tuple[Any, Any]:
    """Return K and V of one block as vLLM-CPU passes them to its kernel."""
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
            # The scratch tensor has one block, so its V starts at another offset than that of the real tensor.
            start += tensor.stride(0) - shape.heads * shape.block_tokens * shape.head_size
        address, block_stride = tensor.data_ptr() + start * item, tensor.stride(block_axis) * item
        planes.append(fit.plane(address, block_stride, item, shape.heads, shape.head_size))
    return planes


def cpu_kernel(vllm_config: Any, layer_name: str, kv_dtype: str, shape: Shape) -> CpuKernel:
    """Return the kernel of vLLM-CPU's attention, with the instruction set that its backend named to the layer."""
    layer, dtype = vllm_config.compilation_config.static_forward_context.get(layer_name), vllm_config.model_config.dtype
    isa = getattr(layer, "isa", None)
    if not isa:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, shape.block_tokens, shape.head_size)
    return CpuKernel(str(isa), dtype, kv_dtype)
