"""The description of one rank: its number, its KV tensors and its part of the model's KV."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmcache.chunks import Shard
from lmcache.engine.served import ServedKV, stores_its_shard
from lmcache.errors import LayoutError
from lmcache.integration.vllm.model import ModelKV, Stages, layer_specs
from lmcache.integration.vllm.paged import (
    Registered,
    Shape,
    cpu_kernel,
    describe_indexer,
    describe_states,
    describe_tensors,
    own_scales,
    refuse_other_numbers,
)
from lmcache.integration.vllm.weights import watch_weights


def describe_rank(
    vllm_config: Any, kv_cache_config: Any, kv: ModelKV, kv_caches: dict[str, Any]
) -> tuple[int, list[ServedKV], list[Registered]]:
    """Return this rank's number and, for each group of which it has layers, its part of the model's KV, and where that lies.
    Begin to count changes of its weights.

    Raises:
        LayoutError: the registered tensors cannot be described.
    """
    tp_rank, pp_rank = rank_of()
    described = [
        _describe_group(vllm_config, kv_cache_config, group, kv_caches, tp_rank, pp_rank)
        for group in kv.groups
        if group.layer_names
    ]
    if not described:
        raise LayoutError("a pipeline stage has no layers with KV; use fewer stages")
    watch_weights(vllm_config)
    return pp_rank * kv.tp_size + tp_rank, [one[0] for one in described], [one[1] for one in described]


def _describe_group(
    vllm_config: Any, kv_cache_config: Any, kv: ModelKV, kv_caches: dict[str, Any], tp_rank: int, pp_rank: int
) -> tuple[ServedKV, Registered]:
    if len(kv.layer_names) != kv.counts[pp_rank]:
        raise LayoutError(
            f"{len(kv.layer_names)} layers with KV on a rank of {kv.counts[pp_rank]} layers are not supported with pipelines"
        )
    missing = [name for name in kv.layer_names if name not in kv_caches]
    if missing:
        raise LayoutError(f"layer {missing[0]} has no KV tensor of its own")
    tensors = [kv_caches[name] for name in kv.layer_names]
    if kv.model.kind == "state":
        registered = describe_states(tensors, kv_cache_config.num_blocks, kv.model.head_size)
        return _served(kv, kv.shard(tp_rank, pp_rank), registered, tp_rank), registered
    on_cpu = str(tensors[0].device).startswith("cpu")
    if kv.part:
        registered = describe_indexer(_indexers(vllm_config, kv), kv.part, kv.block_tokens, kv_cache_config.num_blocks)
    else:
        registered = _describe_tokens(vllm_config, kv_cache_config.num_blocks, kv, tensors, on_cpu)
    if not on_cpu and _blocks_may_be_in_flight(kv_cache_config):
        registered = replace(registered, loads_need_fence=True)
    return _served(kv, kv.shard(tp_rank, pp_rank), registered, tp_rank), registered


def _describe_tokens(vllm_config: Any, num_blocks: int, kv: ModelKV, tensors: list[Any], on_cpu: bool) -> Registered:
    mla = kv.model.kind == "mla"
    heads = 1 if mla else max(1, kv.model.num_kv_heads // kv.tp_size)
    shape = Shape(heads, kv.model.head_size, kv.block_tokens, mla)
    packed = not mla and not kv.model.kv_scales
    kernel = cpu_kernel(vllm_config, kv.layer_names[0], kv.model.kv_dtype, shape) if on_cpu and packed else None
    registered = describe_tensors(tensors, shape, num_blocks, kernel)
    if kv.model.kv_scales:
        own_scales(vllm_config, kv.layer_names, tensors, registered.paged)
    if kv.model.kv_dtype == "fp8_e5m2":
        refuse_other_numbers(vllm_config, kv.layer_names)
    return registered


def _indexers(vllm_config: Any, kv: ModelKV) -> list[Any]:
    """Return the tensors that indexers use, whose blocks are those of their kernels.

    Raises:
        LayoutError: kernels of this platform or of another kind of indexer use them.
    """
    from vllm.platforms import current_platform

    layers = [vllm_config.compilation_config.static_forward_context[name] for name in kv.layer_names]
    kinds = {type(layer).__name__ for layer in layers}
    if kinds != {"DeepseekV32IndexerCache"} or not current_platform.is_cuda():
        raise LayoutError(
            f"KV of {kinds.pop()} on {current_platform.device_type}; of indexers, only those of DeepSeek V3.2 on NVIDIA GPUs are "
            "supported"
        )
    return [layer.kv_cache for layer in layers]


def _served(kv: ModelKV, shard: Shard, registered: Registered, tp_rank: int) -> ServedKV:
    return ServedKV(kv.identity, kv.model, shard, registered.paged, stores_its_shard(kv.model, tp_rank, kv.tp_size))


def _blocks_may_be_in_flight(kv_cache_config: Any) -> bool:
    """Return False if the scheduler gives out a block only when no step in flight writes to it, and zeroes no blocks."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return not hasattr(Scheduler, "_drain_deferred_frees") or bool(
        getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
    )


def layers_of_all_stages(kv_cache_config: Any) -> Stages:
    """Return the specs of all stages' layers, as `describe_model` needs them. All ranks of a pipeline have to call this."""
    from torch import distributed
    from vllm.distributed.parallel_state import get_pp_group

    pipeline = get_pp_group()
    stages: list[Any] = [None] * pipeline.world_size
    distributed.all_gather_object(stages, layer_specs(kv_cache_config), group=pipeline.cpu_group)
    return stages


def rank_of() -> tuple[int, int]:
    """Return (tensor-parallel rank, pipeline rank) of this process."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_tp_group().rank_in_group, get_pp_group().rank_in_group
