"""A blocking `Tier` behind the interface of an asynchronous one: threads call its methods and complete the operations."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol

from lmcache.tiers.operation import AnyOperation, Clear, Close, Contains, Load, Open, Remove, Store
from lmcache.tiers.tier import AsyncTier, Tier, TierBase

_CALLS: dict[type, Callable[[Tier, Any], Any]] = {
    Open: lambda tier, operation: tier.open(),
    Contains: lambda tier, operation: tier.contains(operation.keys),
    Load: lambda tier, operation: tier.load(operation.keys, operation.into),
    Store: lambda tier, operation: tier.store(operation.shards),
    Remove: lambda tier, operation: tier.remove(operation.keys),
    Clear: lambda tier, operation: tier.clear(),
    Close: lambda tier, operation: tier.close(),
}
MakeExecutor = Callable[[str, int], Executor]
"""Makes a pool of threads from a name for them and their greatest number."""


class Submits(Protocol):
    """What drives a tier, of either kind."""

    def submit(self, operation: AnyOperation) -> None: ...

    def cancel(self, operation: AnyOperation) -> None: ...


def write_concurrency(tier: TierBase) -> int:
    """Stores that may be under way at once."""
    return max(1, tier.concurrency // 2)


def submitter(tier: TierBase, name: str, executor: MakeExecutor) -> Submits:
    """The asynchronous tier itself, or the adapter of a blocking one."""
    if isinstance(tier, AsyncTier):
        return tier
    assert isinstance(tier, Tier)
    return BlockingAdapter(tier, name, executor)


class BlockingAdapter:
    """Calls a tier's methods in threads: `concurrency` of them read, half as many (and one more) do everything else.

    An operation that has not begun can be cancelled. One that has begun goes on until the tier returns, since nothing
    interrupts a thread.
    """

    def __init__(self, tier: Tier, name: str, executor: MakeExecutor) -> None:
        self._tier = tier
        self._readers = executor(f"{name}-read", tier.concurrency)
        self._writers = executor(f"{name}-write", write_concurrency(tier) + 1)
        self._waiting: dict[AnyOperation, None] = {}
        """Operations that have not begun. Who takes one out, the thread or `cancel`, ends it."""

    def submit(self, operation: AnyOperation) -> None:
        self._waiting[operation] = None
        reads = isinstance(operation, (Contains, Load))
        (self._readers if reads else self._writers).submit(self._run, operation)

    def cancel(self, operation: AnyOperation) -> None:
        if self._begins(operation):
            operation.cancelled()

    def _begins(self, operation: AnyOperation) -> bool:
        try:
            del self._waiting[operation]
        except KeyError:
            return False
        return True

    def _run(self, operation: AnyOperation) -> None:
        if not self._begins(operation):
            return
        try:
            result = _CALLS[type(operation)](self._tier, operation)
        except Exception as error:  # the edge of the thread; the caller judges what is no TierError
            operation.fail(error)
        else:
            operation.complete(result)
