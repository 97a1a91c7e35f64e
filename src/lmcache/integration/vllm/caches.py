"""A rank's registered KV tensors, and which rank it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmcache.errors import LayoutError
from lmcache.integration.vllm.model import ModelKV
from lmcache.integration.vllm.paged import Registered, Shape, cpu_isa, describe_tensors


def describe_caches(vllm_config: Any, kv_cache_config: Any, kv: ModelKV, kv_caches: dict[str, Any]) -> Registered:
    """Where this rank's KV lies.

    Raises:
        LayoutError: the registered tensors cannot be described.
    """
    missing = [name for name in kv.layer_names if name not in kv_caches]
    if missing:
        raise LayoutError(f"layer {missing[0]} has no KV tensor of its own")
    tensors = [kv_caches[name] for name in kv.layer_names]
    heads = 1 if kv.kind == "mla" else max(1, kv.num_kv_heads // kv.tp_size)
    shape = Shape(heads, kv.head_size, kv.block_tokens, kv.kind == "mla")
    on_cpu = str(tensors[0].device).startswith("cpu")
    isa = "" if shape.mla or not on_cpu else cpu_isa(vllm_config, kv.layer_names[0], tensors[0].dtype, shape)
    registered = describe_tensors(tensors, shape, kv_cache_config.num_blocks, isa)
    return registered if on_cpu else replace(registered, loads_need_fence=_blocks_may_be_in_flight(kv_cache_config))


def _blocks_may_be_in_flight(kv_cache_config: Any) -> bool:
    """False where the scheduler gives out a block only when no step in flight writes to it, and zeroes none either."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return not hasattr(Scheduler, "_drain_deferred_frees") or bool(
        getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
    )


def rank_of() -> tuple[int, int]:
    """(tensor-parallel rank, pipeline rank) of this process."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_tp_group().rank_in_group, get_pp_group().rank_in_group
