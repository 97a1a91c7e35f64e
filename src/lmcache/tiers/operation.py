"""What an asynchronous tier is given to do: one object for each call, which the tier completes when it has ended.

The caller makes the operation, hands it to `AsyncTier.submit`, and hears of its end through the callback that it has put
into it. A blocking `Tier` is driven by the same operations (`lmcache.tiers.blocking`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from lmcache.tiers.tier import Shard, ShardKey, TierError

CANCELLED = "cancelled"
"""Reason of the `TierError` with which a tier ends an operation because `AsyncTier.cancel` has asked for it."""
T = TypeVar("T")


@dataclass(eq=False)
class Operation(Generic[T]):
    """One call of a tier, until `complete` or `fail`.

    The memory that it names may be used until then, and not afterwards. A tier ends every operation exactly once, from any
    thread, also those that are late or cancelled: what the memory holds is nobody else's until then.

    deadline: the caller gives the result up at this time of `time.monotonic()`, and cancels the operation then.
    ended: the caller's; it gets the result or the error, in the thread that has ended the operation, and returns at once.
    """

    method: ClassVar[str]
    """Name of the blocking method that does the same."""
    deadline: float
    ended: Callable[[T | None, Exception | None], None] = field(repr=False)
    began: float | None = field(default=None, init=False)
    """When the tier has begun with it, where it has waited for its turn and the tier has set this. How long an operation takes is
    counted from then on."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the blocking method."""
        names: tuple[str, ...] = self.__match_args__
        return tuple([getattr(self, name) for name in names[2:]])

    def complete(self, result: T) -> None:
        """The operation is done. The result is what the blocking method of this name returns."""
        self.ended(result, None)

    def fail(self, error: Exception) -> None:
        """The operation has failed, and nothing of it may be relied on. `TierError` says why; anything else is a fault."""
        _clear_frames(error)
        self.ended(None, error)

    def cancelled(self) -> None:
        """The tier has given the operation up, as `AsyncTier.cancel` asked."""
        self.fail(TierError(CANCELLED, f"{self.method} was cancelled"))


@dataclass(eq=False)
class Open(Operation[None]):
    """Connect or mount; does nothing where the tier is open."""

    method = "open"


@dataclass(eq=False)
class Contains(Operation[list[bool]]):
    """Which of these shards are there?"""

    method = "contains"
    keys: Sequence[ShardKey]


@dataclass(eq=False)
class Load(Operation[list[str]]):
    """Read each shard into the buffer at the same place; one outcome each."""

    method = "load"
    keys: Sequence[ShardKey]
    into: Sequence[memoryview] = field(repr=False)


@dataclass(eq=False)
class Store(Operation[list[str]]):
    """Keep these shards; one outcome each."""

    method = "store"
    shards: Sequence[Shard] = field(repr=False)


@dataclass(eq=False)
class Remove(Operation[None]):
    """Forget these shards."""

    method = "remove"
    keys: Sequence[ShardKey]


@dataclass(eq=False)
class Clear(Operation[None]):
    """Forget everything that is the cache's."""

    method = "clear"


@dataclass(eq=False)
class Close(Operation[None]):
    """Let everything go. No other operation is under way."""

    method = "close"


def _clear_frames(error: BaseException) -> None:
    """Let go of what the frames of this error, and of the errors behind it, hold of the arena: it would outlive the call, and
    keep the arena mapped."""
    behind: BaseException | None = error
    seen = set[int]()
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__
