"""DeepSeek V3.2's latents and the KV of its indexers, in groups and tensors of vLLM's own classes: run in vLLM's environment.

vLLM's kernel is for GPUs. `pack` does what it does: a block holds the values of all its tokens, then their scales. Prints one
line of JSON. found: what is wrong for each order of memory, "" if nothing. groups: of the scheduler's side, kind, dtype, elements
of a token and layers. shards: of each group. refused: why other indexers are not served.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    KVCacheLayout,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
    create_kv_cache_views,
)

from lmcache.errors import LayoutError
from lmcache.integration.vllm import caches
from lmcache.integration.vllm.model import describe_model, layer_specs, needs_ranks
from lmcache.integration.vllm.paged import describe_indexer
from lmcache.transfer.cpu import CpuCopier

LAYERS, BLOCKS, CHUNK = 3, 7, 16
FROM, TO = [5, 2, 3, 4], [1, 6]
"""The same tokens in blocks of 64 and of 128."""


def config_of(layout: Any, block: int) -> Any:
    cache = SimpleNamespace(
        block_size=block,
        cache_dtype="auto",
        num_gpu_blocks_override=BLOCKS,
        prefix_cache_retention_interval=None,
        get_resolved_kv_cache_layout=lambda: layout,
    )
    hf = SimpleNamespace(to_dict=lambda: {"layers": LAYERS}, _commit_hash=None)
    model = SimpleNamespace(
        model="m", dtype=torch.bfloat16, hf_config=hf, hf_overrides={}, get_total_num_kv_heads=lambda: 1
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=cache,
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def indexer_spec(config: Any, head_dim: int = 132, dtype: Any = torch.uint8) -> Any:
    own = SimpleNamespace(cache_config=config.cache_config, head_dim=head_dim, dtype=dtype)
    return DeepseekV32IndexerCache.get_kv_cache_spec(own, config)


def rank_and_scheduler(config: Any, **indexer: Any) -> tuple[Any, Any]:
    """vLLM's configuration of the KV of a rank, and of the scheduler."""
    block, specs = config.cache_config.block_size, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        specs[f"{name}.attn"] = MLAAttentionSpec(
            block_size=block, num_kv_heads=1, max_tp_shards=1, head_size=576, dtype=torch.bfloat16
        )
        specs[f"{name}.indexer.k_cache"] = indexer_spec(config, **indexer)
    groups = [KVCacheGroupSpec(list(specs), UniformTypeKVCacheSpecs.from_specs(specs))]
    rank = get_kv_cache_config_from_groups(config, groups, 1 << 30)
    return rank, generate_scheduler_kv_cache_config([rank])


def indexers(config: Any, rank: Any, groups: Any, seed: int) -> list[torch.Tensor]:
    """The tensors of all indexers as their layers have them, full of random bytes."""
    (held,) = [one for one in rank.kv_cache_tensors if one.layers[0].endswith("k_cache")]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (held.size,), dtype=torch.int8, generator=generator)
    layout, spec = config.cache_config.get_resolved_kv_cache_layout(), indexer_spec(config)
    views = create_kv_cache_views(raw, spec, BLOCKS, layout, held)
    layers = {}
    for name, view in zip(held.layers, views, strict=True):
        layers[name] = DeepseekV32IndexerCache.__new__(DeepseekV32IndexerCache)
        torch.nn.Module.__init__(layers[name])
        layers[name].bind_kv_cache(view)
    config.compilation_config.static_forward_context = layers
    return caches._indexers(config, next(one for one in groups if one.part))


def pack(tensor: torch.Tensor, blocks: list[int], values: torch.Tensor, scales: torch.Tensor) -> None:
    size = tensor.shape[1]
    for at, block in enumerate(blocks):
        tokens = slice(at * size, (at + 1) * size)
        tensor[block] = torch.cat([values[tokens].flatten(), scales[tokens].flatten()]).view(size, 132)


def copied(layout: Any) -> str:
    """Store from blocks of 64 tokens, load into blocks of 128."""
    generator, ends = torch.Generator().manual_seed(1), []
    values = torch.randint(0, 256, (LAYERS, 256, 128), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (LAYERS, 256, 4), dtype=torch.uint8, generator=generator)
    for block in (64, 128):
        config = config_of(layout, block)
        rank, scheduler = rank_and_scheduler(config)
        if not (needs_ranks(config, rank) and needs_ranks(config, scheduler)):
            return "the layers' shapes are not asked for"
        told = [layer_specs(rank)]
        kv, known = [describe_model(config, one, "mine", told) for one in (rank, scheduler)]
        if [one.layout(CHUNK).fingerprint for one in kv.groups] != [
            one.layout(CHUNK).fingerprint for one in known.groups
        ]:
            return "the scheduler's layouts are others"
        ends.append((indexers(config, rank, kv.groups, block), kv, block))
    (one, kv, _), (other, _, _) = ends
    for layer, tensor in enumerate(one):
        pack(tensor, FROM, values[layer], scales[layer])
    expected = [tensor.clone() for tensor in other]
    for layer, tensor in enumerate(expected):
        pack(tensor, TO, values[layer], scales[layer])
    for group in kv.groups[1:]:
        paged = [describe_indexer(tensors, group.part, block, BLOCKS).paged for tensors, _, block in ends]
        of_layout = group.shard(0, 0).token_bytes(group.model)
        if paged[0].token_bytes != of_layout:
            return f"a token has {paged[0].token_bytes} bytes, in the layout {of_layout}"
        step = CHUNK * of_layout
        extents = np.zeros(256 * of_layout + 4096, np.uint8)
        runs = np.array([(at * step, at * CHUNK, CHUNK, 0) for at in range(256 // CHUNK)], np.int64)
        CpuCopier(paged[0], CHUNK).gather(extents.ctypes.data, np.array(FROM, np.int32), runs)
        CpuCopier(paged[1], CHUNK).scatter(extents.ctypes.data, np.array(TO, np.int32), runs)
    return "" if all(map(torch.equal, other, expected)) else "what was loaded is not what was stored"


def refused(**indexer: Any) -> str:
    config = config_of(KVCacheLayout.LBHNC, 64)
    rank, _ = rank_and_scheduler(config, **indexer)
    try:
        return str(describe_model(config, rank, "mine", [layer_specs(rank)]))
    except LayoutError as error:
        return str(error)


def elsewhere() -> str:
    """On another platform than a GPU of NVIDIA."""
    config = config_of(KVCacheLayout.LBHNC, 64)
    rank, _ = rank_and_scheduler(config)
    kv = describe_model(config, rank, "mine", [layer_specs(rank)])
    try:
        return str(indexers(config, rank, kv.groups, 1))
    except LayoutError as error:
        return str(error)


if __name__ == "__main__":
    from vllm import platforms

    reasons = [elsewhere(), refused(head_dim=128, dtype=torch.bfloat16)]
    platforms.current_platform.is_cuda = lambda: True
    platforms.current_platform.is_fp8_fnuz = lambda: False
    config = config_of(KVCacheLayout.LBHNC, 64)
    rank, scheduler = rank_and_scheduler(config)
    kv = describe_model(config, scheduler, "mine", [layer_specs(rank)])
    groups = [[one.model.kind, one.model.kv_dtype, one.model.head_size, one.group.layers] for one in kv.groups]
    compact = [layout for layout in KVCacheLayout if layout.is_block_compact]
    found = {layout.name: copied(layout) for layout in compact}
    print(
        json.dumps({"found": found, "groups": groups, "shards": [one.shards for one in kv.groups], "refused": reasons})
    )
