"""Threads for the parts of one call of a tier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from lmcache.runtime import Runtime
from lmcache.tiers.tier import TierError

T = TypeVar("T")
R = TypeVar("R")


def started_pool(runtime: Runtime, threads: int, name: str) -> Executor:
    """A pool all of whose threads run already. One that starts a thread in the middle of a call may fail to, and the call
    would end while others of its threads still use the caller's memory.

    Raises:
        TierError: so many threads cannot be started.
    """
    pool, all_there = runtime.pool(threads, name), threading.Barrier(threads)
    try:
        for _ in range(threads):
            pool.submit(all_there.wait)
    except RuntimeError as error:
        all_there.abort()
        pool.shutdown()
        raise TierError(
            "no threads", f"{threads} threads {name} cannot be started: {error}; raise the limit"
        ) from error
    return pool


@contextmanager
def all_ended() -> Iterator[list[Future[Any]]]:
    """Give a list for the parts of one call. At the end, and whatever is raised before it, they have all ended: nothing may use
    the caller's memory afterwards."""
    parts: list[Future[Any]] = []
    try:
        yield parts
    finally:
        for one in parts:
            one.cancel()  # has no effect where nothing was raised and all results were waited for
        wait(parts)


def each_in_pool(pool: Executor, call: Callable[[T], R], of: Iterable[T]) -> list[R]:
    """Make the calls in parallel and return their results in order. When it returns or raises, all of them have ended.

    Raises:
        RuntimeError: the pool has been shut down.
    """
    with all_ended() as parts:
        for one in of:
            parts.append(pool.submit(call, one))
        return [part.result() for part in parts]
