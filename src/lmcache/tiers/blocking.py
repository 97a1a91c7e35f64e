"""The adapter gives a blocking `Tier` the interface of an asynchronous one: threads call its methods and end the operations."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from lmcache.tiers.coder import Coder
from lmcache.tiers.operation import AsyncTier, Contains, Load, Operation, Store
from lmcache.tiers.tier import Tier, TierBase

MakeExecutor = Callable[[str, int], Executor]
"""Creates a thread pool from a name for the threads and their maximum number."""


def write_concurrency(tier: TierBase) -> int:
    """Return how many stores may run concurrently."""
    return max(1, tier.concurrency // 2)


def submitter(
    tier: TierBase, name: str, executor: MakeExecutor, now: Callable[[], float]
) -> AsyncTier | BlockingAdapter:
    """Return an asynchronous tier itself, or an adapter for a blocking one. now: the clock of the operations' deadlines."""
    if isinstance(tier, AsyncTier):
        return tier
    assert isinstance(tier, Tier)
    return BlockingAdapter(tier, name, executor, now)


class BlockingAdapter:
    """Calls a tier's methods in threads: `concurrency` threads read, and half as many plus one do everything else.

    An operation that has not begun can be cancelled. An operation that has begun goes on until the tier returns, since a thread
    cannot be interrupted.
    """

    def __init__(self, tier: Tier, name: str, executor: MakeExecutor, now: Callable[[], float]) -> None:
        self._tier, self._now = tier, now
        self.coder = Coder(tier, name, now)
        self._readers = executor(f"{name}-read", tier.concurrency)
        self._writers = executor(f"{name}-write", write_concurrency(tier) + 1)
        self._waiting: dict[Operation[Any], None] = {}
        """Operations that have not begun. The thread or `cancel`, whichever removes an operation, ends it."""

    def submit(self, operation: Operation[Any]) -> None:
        self._waiting[operation] = None
        reads = isinstance(operation, (Contains, Load))
        try:
            (self._readers if reads else self._writers).submit(self._run, operation)
        except RuntimeError:  # no thread can be started; the caller ends the operation
            self._waiting.pop(operation, None)
            raise

    def cancel(self, operation: Operation[Any]) -> None:
        if self._begins(operation):
            operation.cancelled()

    def _begins(self, operation: Operation[Any]) -> bool:
        try:
            del self._waiting[operation]
        except KeyError:
            return False
        return True

    def _run(self, operation: Operation[Any]) -> None:
        if not self._begins(operation):
            return
        operation.began = self._now()
        try:
            whose = self.coder if isinstance(operation, (Load, Store)) else self._tier
            result = getattr(whose, operation.method)(*operation.arguments)
        except Exception as error:  # top of the thread; the caller handles errors that are no TierError
            operation.fail(error)
        except BaseException as error:  # a panic of a library in Rust; nobody else would end the operation
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            operation.fail(failure)
        else:
            operation.complete(result)
