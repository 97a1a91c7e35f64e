"""Wrappers around methods of engines that change their weights while they run: engines do not report such changes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from lmcache.observability.log import init_logger

logger = init_logger(__name__)


def class_at(path: str) -> Any:
    """Return the class of this dotted name, or None if the engine's release does not have it."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        logger.debug("The class %s was not found: %r", path, error)
        return None


Callback = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
"""Called with the name, the positional and the keyword arguments of a method."""


def call_before(owner: Any, names: Iterable[str], callback: Callback) -> bool:
    """Make these methods of a class call `callback(name, args, kwargs)` before they run. A method is wrapped once.

    Return whether the class has any of them.
    """

    def before(name: str) -> Callable[..., Any]:
        def call(method: Any, *args: Any, **kwargs: Any) -> Any:
            callback(name, args, kwargs)
            return method(*args, **kwargs)

        return call

    found = [call_around(owner, name, before(name)) for name in names]
    return any(found)


def watch(owners: Iterable[tuple[Any, Iterable[str]]], callback: Callback, engine: str) -> None:
    """Make these methods, which change weights, call `callback` first. Log a warning if the engine has none of them."""
    noticed = [call_before(owner, names, callback) for owner, names in owners if owner is not None]
    if not any(noticed):
        logger.warning(
            "This release of %s changes weights in a way that LMCache does not see: restart it after each update of weights",
            engine,
        )


def call_around(owner: Any, name: str, around: Callable[..., Any]) -> bool:
    """Make a method of a class run as `around(method, *args, **kwargs)`, which calls the method itself. It is wrapped once.

    Return whether the class has the method.
    """
    method = getattr(owner, name, None)
    if method is not None and not getattr(method, "tells_lmcache", False):

        @functools.wraps(method)
        def tell(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs)

        tell.tells_lmcache = True  # type: ignore[attr-defined]
        setattr(owner, name, tell)
    return method is not None
