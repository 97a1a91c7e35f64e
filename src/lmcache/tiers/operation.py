"""Asynchronous tiers and their calls, the operations: one object for each call, which the tier completes when the call has ended.

The caller creates the operation with a callback and passes it to `AsyncTier.submit`. The callback is called when the operation
ends. The same operations drive a blocking `Tier` (`lmcache.tiers.blocking`).
"""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from lmcache.tiers.tier import Shard, ShardKey, TierBase, TierError

CANCELLED = "cancelled"
"""Reason of the `TierError` with which a tier ends an operation after `AsyncTier.cancel`."""
T = TypeVar("T")


@dataclass(eq=False)
class Operation(Generic[T]):
    """One call of a tier, which ends with `complete` or `fail`.

    The tier may use the memory in the arguments until the end, and not afterwards. It must end every operation exactly once, from
    any thread, including late and cancelled operations; the caller does not reuse the memory before.

    deadline: time of the runtime's `now` at which the caller cancels the operation and ignores its result.
    ended: the caller's callback. It takes the result or the error, in the thread that ends the operation, and returns at once.
    """

    method: ClassVar[str]
    """Name of the equivalent blocking method."""
    deadline: float
    ended: Callable[[T | None, Exception | None], None] = field(repr=False)
    began: float | None = field(default=None, init=False)
    """Time at which the operation began after waiting in the tier, if the tier sets it. The time that the operation takes is
    measured from then on, or else from `submit`."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the blocking method."""
        names: tuple[str, ...] = self.__match_args__
        return tuple([getattr(self, name) for name in names[2:]])

    def complete(self, result: T) -> None:
        """End the operation with a result, which is of the type that the blocking method returns."""
        self.ended(result, None)

    def fail(self, error: Exception) -> None:
        """End the operation with an error; its effects are undefined. An error that is no `TierError` counts as a bug."""
        _clear_frames(error)
        self.ended(None, error)

    def cancelled(self) -> None:
        """End an operation that the tier has given up after `AsyncTier.cancel`."""
        self.fail(TierError(CANCELLED, f"{self.method} was cancelled"))


@dataclass(eq=False)
class Open(Operation[None]):
    """Connect or mount; do nothing if the tier is open."""

    method = "open"


@dataclass(eq=False)
class Contains(Operation[list[bool]]):
    """Return which of these shards the tier has."""

    method = "contains"
    keys: Sequence[ShardKey]


@dataclass(eq=False)
class Load(Operation[list[str]]):
    """Read each shard into the buffer at the same index; return one outcome for each."""

    method = "load"
    keys: Sequence[ShardKey]
    into: Sequence[memoryview] = field(repr=False)


@dataclass(eq=False)
class Store(Operation[list[str]]):
    """Store these shards; return one outcome for each."""

    method = "store"
    shards: Sequence[Shard] = field(repr=False)


@dataclass(eq=False)
class Remove(Operation[None]):
    """Remove these shards."""

    method = "remove"
    keys: Sequence[ShardKey]


@dataclass(eq=False)
class Clear(Operation[None]):
    """Remove all data of the cache."""

    method = "clear"


@dataclass(eq=False)
class Close(Operation[None]):
    """Close the tier. No other operation is unfinished."""

    method = "close"


class AsyncTier(TierBase):
    """One store of shards that does not block: it takes operations, and completes each when the store has answered.

    The rules for the methods of `Tier` hold for the operations of the same names. docs/tiers/your-own.md describes how the server
    uses both kinds of tiers.
    """

    @abstractmethod
    def submit(self, operation: Operation[Any]) -> None:
        """Begin an operation (one of the classes above) and return at once. It may complete before the return.

        One thread at a time calls this. The tier limits how many operations run concurrently; the others wait in the tier.
        """

    def cancel(self, operation: Operation[Any]) -> None:
        """Cancel a submitted operation whose deadline has passed, or because the server ends. Return at once.

        The tier must still end the operation, as soon as nothing touches its memory any more; it calls `operation.cancelled()`
        if it has given the operation up. The default implementation lets the operation go on.
        """


def _clear_frames(error: BaseException) -> None:
    """Clear the stack frames of this error and of its causes. Views of the arena in them would keep the arena mapped after the
    call."""
    behind: BaseException | None = error
    seen = set[int]()
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__
