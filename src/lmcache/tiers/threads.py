"""Threads for the parts of one call of a tier."""

from __future__ import annotations

import threading
from concurrent.futures import Executor

from lmcache.runtime import Runtime
from lmcache.tiers.tier import TierError


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
