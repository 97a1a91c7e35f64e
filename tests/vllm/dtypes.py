"""How KV of each dtype lies in the tensors that vLLM's own classes make, and what copies of it keep: run in vLLM's environment.

Prints one line of JSON: {"<dtype> <layout>": what is wrong, "" if nothing}, and under "refused" the lines of dtypes that are
not served.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from quantized_kv import install, kept_as, write_fp8
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
    get_kv_quant_mode,
)

from lmcache.errors import LayoutError
from lmcache.integration.vllm.model import _elements
from lmcache.integration.vllm.paged import CpuKernel, Shape, describe_tensors, own_scales
from lmcache.transfer.cpu import CpuCopier

LAYERS, BLOCKS, BLOCK, HEADS, DIMS, CHUNK = 2, 7, 16, 2, 64, 8
SERVED = ("auto", "fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
OTHERS = ("nvfp4", "nvfp4_4over6", "turboquant_k8v4", "ultraquant_4bit", "fp8_ds_mla", "fp8_inc")
FROM, TO = [5, 2, 3], [1, 6, 0]


def spec_of(dtype: str) -> Any:
    kept = torch.bfloat16 if dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[dtype]
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=DIMS, dtype=kept, kv_quant_mode=get_kv_quant_mode(dtype)
    )
    return TritonAttentionBackend.customize_spec(spec)


def caches(spec: Any, layout: Any, seed: int) -> list[torch.Tensor]:
    """The tensors of all layers, full of random bytes."""
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = spec.page_size_bytes * BLOCKS * LAYERS
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator)
    tensor = KVCacheTensor(size, [str(n) for n in range(LAYERS)], layer_stride=strides[0], block_stride=strides[1])
    return create_kv_cache_views(raw, spec, BLOCKS, layout, tensor)


def tokens_of(cache: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """All bytes of these blocks' tokens: [token, head, byte]."""
    return cache[blocks].transpose(1, 2).flatten(0, 1).contiguous().view(torch.uint8)


def copied(dtype: str, layout: Any) -> str:
    spec = spec_of(dtype)
    _, size, scales = _elements(spec, SimpleNamespace(cache_dtype=dtype))
    one, other = caches(spec, layout, 1), caches(spec, layout, 2)
    described = []
    for tensors in (one, other):
        paged = describe_tensors(tensors, Shape(HEADS, size, BLOCK, False), BLOCKS).paged
        if scales:
            kernels = [TritonAttentionImpl(4, DIMS, 1.0, HEADS, None, None, dtype) for _ in tensors]
            layers = {str(number): SimpleNamespace(impl=kernel) for number, kernel in enumerate(kernels)}
            config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
            before = [kernel._k_scale_cache for kernel in kernels]
            own_scales(config, list(layers), tensors, paged)
            views = [view for kernel in kernels for view in (kernel._k_scale_cache, kernel._v_scale_cache)]
            if before != [None, None] or not all(bool((view == 1.0).all()) for view in views):
                return "vLLM has not made its views of the scales"
            for number, view in enumerate(views):
                view.copy_(torch.arange(view.numel()).view(view.shape) + 0.5 + number)
            for kernel, tensor in zip(kernels, tensors, strict=True):
                kernel._ensure_scale_caches(tensor)
            if bool((views[0] == 1.0).all()):
                return "the first forward sets the scales to 1.0"
        described.append(paged)
    count = BLOCK * len(FROM)
    if described[0].token_bytes != tokens_of(one[0], [0])[0].numel() * LAYERS:
        return f"a token has {described[0].token_bytes} bytes, which are not all"
    extents = np.zeros(count * described[0].token_bytes + 4096, np.uint8)
    step = CHUNK * described[0].token_bytes
    runs = np.array([(at * step, at * CHUNK, CHUNK, 0) for at in range(count // CHUNK)], np.int64)
    untouched = tokens_of(other[0], [2, 3, 4, 5]).clone()
    CpuCopier(described[0], CHUNK).gather(extents.ctypes.data, np.array(FROM, np.int32), runs)
    CpuCopier(described[1], CHUNK).scatter(extents.ctypes.data, np.array(TO, np.int32), runs)
    if not all(torch.equal(tokens_of(a, FROM), tokens_of(b, TO)) for a, b in zip(one, other, strict=True)):
        return "what was loaded is not what was stored"
    return "" if torch.equal(untouched, tokens_of(other[0], [2, 3, 4, 5])) else "other blocks were written"


def probed(dtype: str) -> str:
    """vLLM-CPU's own order, which only its kernel knows."""
    install(dtype)
    tensors = caches(spec_of(dtype), KVCacheLayout.LBHNC, 3)
    kernel = CpuKernel("vec", torch.float32, _elements(spec_of(dtype), SimpleNamespace(cache_dtype=dtype))[0])
    planes = describe_tensors(tensors, Shape(HEADS, DIMS, BLOCK, False), BLOCKS, kernel).paged.planes
    key, value = torch.rand(2, BLOCK, HEADS, DIMS).unbind(0)
    keys, values = tensors[1].view(BLOCKS, HEADS, 2 * BLOCK, DIMS).chunk(2, 2)
    write_fp8(key, value, keys, values, torch.arange(BLOCK, 2 * BLOCK), "vec", kv_cache_dtype=dtype)
    memory = tensors[1].untyped_storage()
    raw, start = torch.tensor([], dtype=torch.uint8).set_(memory), memory.data_ptr()
    for plane, source in zip(planes[2:], (key, value), strict=True):
        first = plane.address + plane.block_stride - start
        sizes = (BLOCK // plane.token_group, plane.token_group, HEADS, DIMS // plane.dim_group, plane.dim_group)
        steps = (plane.group_stride, plane.token_stride, plane.head_stride, plane.dim_group_stride, plane.dim_stride)
        numbers = source.to(kept_as(dtype)).view(torch.uint8)
        if not torch.equal(raw.as_strided(sizes, steps, first).reshape(-1), numbers.reshape(-1)):
            return "elements are elsewhere"
    return ""


def refused(dtype: str) -> str:
    spec = SimpleNamespace(dtype=STR_DTYPE_TO_TORCH_DTYPE[dtype], head_size=DIMS)
    try:
        return str(_elements(spec, SimpleNamespace(cache_dtype=dtype)))
    except LayoutError as error:
        return f"refused: {error}"


found: dict[str, Any] = {f"{dtype} {one.name}": copied(dtype, one) for dtype in SERVED for one in KVCacheLayout}
found |= {f"{dtype} on a CPU": probed(dtype) for dtype in ("fp8_e4m3", "fp8_e5m2")}
print(json.dumps(found | {"refused": {dtype: refused(dtype) for dtype in OTHERS}}))
