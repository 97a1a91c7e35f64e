"""Detection of new weights in a running SGLang engine. SGLang only tells its radix cache to drop its KV. But LMCache outlives the
radix tree: it must not serve KV of the old weights, nor store KV of the new weights under the model's name.

So the methods that change weights are wrapped, in this process, to call back first.
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


def on_new_weights(listener: Listener) -> None:
    """Call `listener` whenever this process is about to change its weights."""
    if not _listeners:
        watch([(_owner(), UPDATES)], _notify, "SGLang")
    _listeners.append(listener)


def forget(listener: Listener) -> None:
    """Call it no more."""
    if listener in _listeners:
        _listeners.remove(listener)


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
    if name == "release_memory_occupation" and (
        "weights" not in (getattr(request, "tags", None) or ("weights",)) or weights_are_backed_up()
    ):
        return  # they are kept, or come back as they were
    in_use = _kv_in_use(args[0])
    for listener in tuple(_listeners):
        listener(in_use)


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
