"""What vLLM does to its caches and does not tell its connector, or tells it in words that mean something else.

Before it goes to sleep at level 1, vLLM 0.32 resets its connectors in the words of a user who says that the weights have changed
(`reset_prefix_cache(reset_connector=True)`). But such a sleep gives up the memory of the KV alone: the weights come back byte
for byte, and so does the identity of what is cached for them.

It says nothing when it empties its own prefix cache, which after a change of the weights holds blocks of the old ones until then;
nor when it loads a LoRA adapter ahead of any request.
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
_halves: weakref.WeakValueDictionary[str, SchedulerSide] = weakref.WeakValueDictionary()
"""By the engine's id: one process may run several engines."""


def watch_resets(engine_id: str, half: SchedulerSide) -> None:
    """From now on tell `half` when its engine's own prefix cache is emptied, and take back those of its resets that come from a
    sleep which keeps the weights."""
    _halves[engine_id] = half
    for owner, name, around in (
        ("vllm.v1.engine.core.EngineCore", "sleep", fall_asleep),
        ("vllm.v1.engine.core.EngineCore", "release_kv_cache_memory", keep_identity),
        ("vllm.v1.engine.core.EngineCore", "wake_up", wake_up),
        ("vllm.v1.engine.core.EngineCore", "add_lora", add_adapter),
        ("vllm.v1.core.sched.scheduler.Scheduler", "reset_prefix_cache", empty),
    ):
        found = class_at(owner)
        if found is None or not call_around(found, name, around):
            logger.debug("%s.%s is not there: what is cached may end with a sleep or a change of weights", owner, name)


def fall_asleep(sleep: Any, core: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
    """`EngineCore.sleep`. Level 0 resets nothing, so a reset before it has ended is somebody else's. Level 2 drops the weights,
    and what is loaded in their place may be others."""
    return keep_identity(sleep, core, level, *args, **kwargs) if level == 1 else sleep(core, level, *args, **kwargs)


def keep_identity(method: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of `EngineCore` that gives up the KV's memory and changes no weights. Where it waits it answers a future."""
    half = _side_of(core)
    if half is None:
        return method(core, *args, **kwargs)
    before = half.changes
    answer = method(core, *args, **kwargs)
    if isinstance(answer, Future):
        answer.add_done_callback(partial(_take_back, half, before))
    else:
        half.take_back_reset(before)
    return answer


def wake_up(wake: Any, core: Any, tags: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
    """`EngineCore.wake_up`. Who wants the weights back before there is room for KV may write into them: that is how RL loops load
    new ones, and not all of their ways are seen by the ranks (`weights`)."""
    half = _side_of(core)
    if half is not None and tags is not None and "weights" in tags and "kv_cache" not in tags:
        half.requests.reset()
    return wake(core, tags, *args, **kwargs)


def add_adapter(add: Any, core: Any, lora_request: Any) -> Any:
    """`EngineCore.add_lora`, which loads an adapter before there is a request for it."""
    half = _side_of(core)
    if half is not None:
        half.adapters.identity(lora_request)
    return add(core, lora_request)


def empty(reset: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """`Scheduler.reset_prefix_cache`, which answers whether the cache could be emptied."""
    emptied = reset(scheduler, *args, **kwargs)
    half = _side_of(scheduler)
    if emptied and half is not None:
        half.requests.own_cache_emptied()
    return emptied


def _take_back(half: SchedulerSide, before: tuple[int, int], done: Future[Any]) -> None:
    if not done.cancelled() and done.exception() is None:
        half.take_back_reset(before)


def _side_of(owner: Any) -> SchedulerSide | None:
    transfer = getattr(owner.vllm_config, "kv_transfer_config", None)
    return _halves.get(str(getattr(transfer, "engine_id", "")))
