"""Changes of vLLM's caches that vLLM does not report to its connector, or reports in a misleading way.

Before it goes to sleep at level 1, vLLM 0.32 resets its connectors by the same call by which a user reports changed weights
(`reset_prefix_cache(reset_connector=True)`). But such a sleep frees only the memory of the KV: the weights come back unchanged,
byte for byte, so the cached KV stays valid.

vLLM does not report that it empties its own prefix cache, which after a change of the weights holds blocks of the old weights
until then, nor its encoder cache, which holds what the encoders have made of images. Nor does it report that it loads a LoRA
adapter before any request for it, or that a user calls the ranks, which may give them other weights.
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future
from functools import partial
from typing import Any

from lmcache.engine.wrapped import call_around, class_at
from lmcache.integration.vllm.scheduler import SchedulerSide
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_sides: weakref.WeakValueDictionary[str, SchedulerSide] = weakref.WeakValueDictionary()
"""Scheduler sides by engine id: one process may run several engines."""


def watch_resets(engine_id: str, side: SchedulerSide) -> None:
    """Notify `side` from now on before and after its engine's own prefix cache is emptied, and undo resets that come from a sleep
    that keeps the weights."""
    _sides[engine_id] = side
    for owner, name, around in (
        ("vllm.v1.engine.core.EngineCore", "sleep", fall_asleep),
        ("vllm.v1.engine.core.EngineCore", "release_kv_cache_memory", keep_identity),
        ("vllm.v1.engine.core.EngineCore", "wake_up", wake_up),
        ("vllm.v1.engine.core.EngineCore", "add_lora", add_adapter),
        ("vllm.v1.engine.core.EngineCore", "collective_rpc", call_ranks),
        ("vllm.v1.core.sched.scheduler.Scheduler", "reset_prefix_cache", empty),
        ("vllm.v1.core.sched.scheduler.Scheduler", "reset_encoder_cache", empty_items),
    ):
        found = class_at(owner)
        if found is None or not call_around(found, name, around):
            logger.debug("%s.%s is missing: a sleep or a change of weights may end the use of cached KV", owner, name)


def fall_asleep(sleep: Any, core: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
    """Wrap `EngineCore.sleep`. Level 0 resets nothing, so a reset before its end has another cause. Level 2 drops the weights,
    and other weights may be loaded in their place."""
    return keep_identity(sleep, core, level, *args, **kwargs) if level == 1 else sleep(core, level, *args, **kwargs)


def keep_identity(method: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap a method of `EngineCore` that frees the KV's memory and changes no weights. It may return a future."""
    side = _side_of(core)
    if side is None:
        return method(core, *args, **kwargs)
    before = side.changes
    answer = method(core, *args, **kwargs)
    if isinstance(answer, Future):
        answer.add_done_callback(partial(_take_back, side, before))
    else:
        side.take_back_reset(before)
    return answer


def wake_up(wake: Any, core: Any, tags: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Wrap `EngineCore.wake_up`. Waking the weights before the KV counts as a change of the weights: RL loops load new weights in
    this way, and the ranks do not see all of their methods (`weights`)."""
    side = _side_of(core)
    if side is not None and tags is not None and "weights" in tags and "kv_cache" not in tags:
        side.reset()
    return wake(core, tags, *args, **kwargs)


def add_adapter(add: Any, core: Any, lora_request: Any) -> Any:
    """Wrap `EngineCore.add_lora`, which loads an adapter before there is a request for it."""
    side = _side_of(core)
    if side is not None:
        side.adapters.identity(lora_request)
    return add(core, lora_request)


def call_ranks(call: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `EngineCore.collective_rpc`."""
    side = _side_of(core)
    if side is not None:
        side.ask_ranks()
    return call(core, *args, **kwargs)


def empty(reset: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Scheduler.reset_prefix_cache`, which returns whether the cache could be emptied: only if no block is in use. With
    `reset_running_requests` vLLM takes all blocks away from requests, and raises RuntimeError if others use some."""
    side = _side_of(scheduler)
    if side is not None and (args[0] if args else kwargs.get("reset_running_requests")):
        side.release_blocks()
    emptied = reset(scheduler, *args, **kwargs)
    if emptied and side is not None:
        side.own_cache_emptied()
    return emptied


def empty_items(reset: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Scheduler.reset_encoder_cache`."""
    answer = reset(scheduler, *args, **kwargs)
    side = _side_of(scheduler)
    if side is not None:
        side.items_emptied()
    return answer


def _take_back(side: SchedulerSide, before: tuple[int, int], done: Future[Any]) -> None:
    if not done.cancelled() and done.exception() is None:
        side.take_back_reset(before)


def _side_of(owner: Any) -> SchedulerSide | None:
    transfer = getattr(owner.vllm_config, "kv_transfer_config", None)
    return _sides.get(str(getattr(transfer, "engine_id", "")))
