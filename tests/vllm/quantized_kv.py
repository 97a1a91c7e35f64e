"""Kernels in PyTorch for quantized KV on a CPU, beside vLLM's own specs, tensors and views of scales.

vLLM-CPU quantizes KV to fp8 with AVX-512 or AMX only, and has no kernel with a scale for each head of each token: that one is
Triton's. `install` puts kernels here in their place, which keep the same numbers at the same places. Everything else is vLLM's:
which specs, shapes and strides KV has, who makes the views of the scales and when, and which static scales a layer has.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends import cpu_attn, triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm import _custom_ops as ops

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def install(kv_cache_dtype: str) -> None:
    """In this process, let engines with that --kv-cache-dtype run on this CPU."""
    cpu_attn._get_attn_isa = lambda *about: "vec"
    ops.cpu_attn_get_scheduler_metadata = lambda **about: torch.zeros(1)
    ops.cpu_attn_reshape_and_cache = write_fp8
    ops.cpu_attention_with_kv_cache = read_fp8
    triton_attn.triton_reshape_and_cache_flash_per_token_head_quant = write_with_scales
    if kv_cache_dtype.endswith("per_token_head"):
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.PerTokenHead")


class PerTokenHead(triton_attn.TritonAttentionBackend):
    """vLLM's Triton backend with other kernels."""

    @staticmethod
    def get_builder_cls() -> Any:
        return cpu_attn.CPUAttentionMetadataBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        return PerTokenHeadKernels


class PerTokenHeadKernels(triton_attn.TritonAttentionImpl):
    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any, **more: Any
    ) -> Any:
        if attn_metadata is None:
            return output
        numbers = self._pth_key_value_caches(kv_cache)
        scales = self._k_scale_cache, self._v_scale_cache
        size = self.head_size
        keys, values = (
            part[..., :size].float() * scale[..., None] for part, scale in zip(numbers, scales, strict=True)
        )
        return attend(query, keys, values, output, attn_metadata, self.scale)


def write_with_scales(
    key: Any, value: Any, keys: Any, values: Any, key_scales: Any, value_scales: Any, slots: Any, **about: Any
) -> None:
    """keys, values: [block, token, head, dim]. key_scales, value_scales: [block, token, head]."""
    size = keys.shape[1]
    slots = slots[slots >= 0]
    for source, numbers, scales in ((key, keys, key_scales), (value, values, value_scales)):
        source = source[: len(slots)].float()
        scale = (source.abs().amax(-1) / LARGEST[numbers.dtype]).clamp(min=1e-6)
        scaled = source / scale[..., None]
        scales[slots // size, slots % size] = scale
        dims = source.shape[-1]
        kept = (scaled.round() if numbers.dtype == torch.int8 else scaled).to(numbers.dtype)
        numbers[..., :dims].view(torch.int8)[slots // size, slots % size] = kept.view(torch.int8)


def kept_as(kv_cache_dtype: str) -> torch.dtype:
    return torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def write_fp8(
    key: Any,
    value: Any,
    keys: Any,
    values: Any,
    slots: Any,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """keys, values: the halves [block, head, token, dim] of each head's memory, which this kernel fills dims first."""
    size = keys.shape[2]
    slots = slots[slots >= 0]
    for source, numbers, scale in ((key, keys, k_scale), (value, values, v_scale)):
        kept = (source[: len(slots)].float() / scale).to(kept_as(kv_cache_dtype)).view(torch.uint8)
        turned(numbers)[slots // size, :, :, slots % size] = kept


def turned(numbers: Any) -> Any:
    """The same memory as [block, head, dim, token]."""
    blocks, heads, tokens, dims = numbers.shape
    strides = (*numbers.stride()[:2], tokens, 1)
    return numbers.as_strided((blocks, heads, dims, tokens), strides, numbers.storage_offset())


def read_fp8(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    output: Any,
    block_table: Any,
    query_start_loc: Any,
    seq_lens: Any,
    scale: float,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
    **more: Any,
) -> None:
    dtype, about = kept_as(kv_cache_dtype), cpu_attn.CPUAttentionMetadata
    keys, values = (
        turned(part).permute(0, 3, 1, 2).contiguous().view(dtype).float() * one
        for part, one in ((key_cache, k_scale), (value_cache, v_scale))
    )
    metadata = about(
        *(len(query), 0, query_start_loc, 0, seq_lens, block_table),
        slot_mapping=None,
        scheduler_metadata=None,
    )
    attend(query, keys, values, output, metadata, scale)


def attend(query: Any, keys: Any, values: Any, output: Any, metadata: Any, scale: float) -> Any:
    """Causal attention. keys, values: float [block, token, head, dim]."""
    starts, ends = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    block = keys.shape[1]
    for number, end in enumerate(ends):
        first, last = starts[number], starts[number + 1]
        if last == first:
            continue
        table = metadata.block_table[number, : -(-end // block)].long()
        own_keys, own_values = (part[table].flatten(0, 1)[:end].transpose(0, 1) for part in (keys, values))
        queries = query[first:last].float().transpose(0, 1)
        group = queries.shape[0] // own_keys.shape[0]
        seen = torch.arange(end)[None, :] <= torch.arange(end - (last - first), end)[:, None]
        answer = torch.nn.functional.scaled_dot_product_attention(
            *(queries, own_keys.repeat_interleave(group, 0), own_values.repeat_interleave(group, 0)),
            attn_mask=seen,
            scale=scale,
        )
        output[first:last] = answer.transpose(0, 1).to(output.dtype).reshape(output[first:last].shape)
    return output
