"""Detection of new weights in a running SGLang engine. SGLang only tells its radix cache to drop its KV. But LMCache outlives the
radix tree: it must not serve KV of the old weights, nor store KV of the new weights under the model's name.

So the methods that change weights are wrapped, in this process, to call back first. SGLang empties its radix tree in most of
them. It refuses that while a store runs, and ends if it was told to release memory. So running stores are waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache.engine.wrapped import class_at, watch
from lmcache.integration.sglang.model import weights_are_backed_up
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
    "release_memory_occupation",
    "check_weights",
)
"""Between the beginning and the end of an update others may write into the weights' memory."""
Listener = Callable[[bool], None]
"""Called before the weights change, with whether any KV is in use at that moment."""
_listeners: list[Listener] = []
_waits: list[Callable[[], None]] = []


def on_new_weights(listener: Listener, wait: Callable[[], None] = lambda: None) -> None:
    """Call `listener` whenever this process is about to change its weights, and then `wait`, which returns when no store of this
    process runs, or after a bounded time. `wait` is also called before SGLang releases memory and keeps the weights."""
    if not _listeners:
        watch([(_owner(), UPDATES)], _notify, "SGLang")
    _listeners.append(listener)
    _waits.append(wait)


def forget(listener: Listener) -> None:
    """Call it no more."""
    if listener in _listeners:
        at = _listeners.index(listener)
        del _listeners[at], _waits[at]


def _owner() -> Any:
    """The class whose methods change weights; None where there is no such class."""
    managers = "sglang.srt.managers"
    newer = class_at(f"{managers}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager")
    # SGLang 0.5.10 and older
    return newer or class_at(f"{managers}.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin")


def _notify(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    request = (*args[1:], *kwargs.values(), None)[0]
    if name == "check_weights" and not str(getattr(request, "action", "reset")).startswith("reset"):
        return  # it only reads
    if _changes(name, request):
        in_use = _kv_in_use(args[0])
        for listener in tuple(_listeners):
            listener(in_use)
    for wait in tuple(_waits):
        wait()
    _tell_of_ends(args[0])


def _changes(name: str, request: Any) -> bool:
    """Whether the weights will be others; in release_memory_occupation they may be kept, or come back as they were."""
    of_weights = "weights" in (getattr(request, "tags", None) or ("weights",))
    return name != "release_memory_occupation" or (of_weights and not weights_are_backed_up())


def _tell_of_ends(updater: Any) -> None:
    """Let SGLang's radix cache notice which stores have ended. It looks for that at each step only, on all ranks together, and
    all ranks update their weights together, too."""
    scheduler = getattr(updater, "scheduler", updater)  # SGLang 0.5.10 and older: it is the scheduler
    look = getattr(getattr(scheduler, "tree_cache", None), "check_hicache_events", None)
    if look is not None:
        look()


def _kv_in_use(updater: Any) -> bool:
    """Whether the radix tree or a request has any slot of the engine's KV pool; True where this release does not tell.

    The pool is asked, since requests shorter than a page are computed without a call to any connector.
    """
    scheduler = getattr(updater, "scheduler", updater)  # SGLang 0.5.10 and older: it is the scheduler
    try:
        pool = scheduler.token_to_kv_pool_allocator
        return bool(pool.size - pool.available_size() >= pool.page_size)  # the rest of a page at the end is nobody's
    except (AttributeError, TypeError) as error:
        logger.debug("Free KV slots are not known: %r", error)
        return True
