"""Engines that change their weights while they run tell nobody, so the methods that do it are wrapped to call back first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any


def call_before(
    owner: Any, names: Iterable[str], callback: Callable[[str, tuple[Any, ...], dict[str, Any]], None]
) -> bool:
    """Make these methods of a class call `callback(name, args, kwargs)` before they run; a method is wrapped once.

    Returns whether the class has any of them.
    """
    found = [name for name in names if hasattr(owner, name)]
    for name in found:
        method = getattr(owner, name)
        if not getattr(method, "tells_lmcache", False):
            setattr(owner, name, _wrapped(name, method, callback))
    return bool(found)


def _wrapped(name: str, method: Any, callback: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> Any:
    @functools.wraps(method)
    def tell(*args: Any, **kwargs: Any) -> Any:
        callback(name, args, kwargs)
        return method(*args, **kwargs)

    tell.tells_lmcache = True  # type: ignore[attr-defined]
    return tell
