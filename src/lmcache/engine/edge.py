"""The edge towards an engine: nothing that goes wrong in an integration gets past it, but a load that the engine counts on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


class LoadFailed(LMCacheError):
    """KV that the engine counts on could not be loaded, and it has no other way to hear of it: its answers would be made from
    memory that nobody filled."""


def never_raises(otherwise: Callable[[], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method that an engine calls answer `otherwise()` where it raises, and log that; `LoadFailed` gets through."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except LoadFailed:
                raise
            except Exception:  # the edge
                logger.exception("%s went wrong; the engine goes on without", method.__name__)
                return otherwise()

        return call

    return around
