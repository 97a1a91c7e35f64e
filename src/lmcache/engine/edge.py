"""The boundary to an engine: no error of an integration passes it, except the failure of a load that the engine relies on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


class LoadFailed(LMCacheError):
    """KV that the engine relies on could not be loaded, and only an exception can report that to the engine: without it the
    engine would compute answers from memory that was never filled."""


def never_raises(otherwise: Callable[[], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a method that an engine calls log an exception and return `otherwise()`. `LoadFailed` is raised to the engine."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except LoadFailed:
                raise
            except Exception:  # the edge
                logger.exception("LMCache failed in %s; the engine goes on without it", method.__name__)
                return otherwise()

        return call

    return around
