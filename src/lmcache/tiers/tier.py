"""What a tier is asked, and what it answers."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lmcache.errors import LMCacheError

if TYPE_CHECKING:
    from lmcache.tiers.operation import Operation
    from lmcache.tiers.url import TierURL

OK = ""
"""Outcome of one shard: loaded, whole and checked; or stored."""
KEPT = "kept"
"""Outcome of a store: the tier has this very shard already, and keeps it."""
ABSENT = "absent"
"""Outcome of a load: the tier does not have it. Damage has other names (`frame` lists them)."""

_KEY = struct.Struct("<16s16sHH")


class TierError(LMCacheError):
    """The tier itself is in trouble: it cannot be reached, or its medium fails. Nothing of the call may be relied on.

    `reason` is one word for counters (unreachable, timeout, denied, full, io ...); the text is for people and names no secret.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ShardKey(NamedTuple):
    """One rank's part of a chunk. `space` is 16 bytes that name layout and parallel split, `chunk` the 16-byte chunk hash."""

    space: bytes
    chunk: bytes
    shard: int
    shards: int

    @property
    def packed(self) -> bytes:
        """36 bytes: space, chunk, u16 shard, u16 shards, little-endian."""
        return _KEY.pack(*self)

    @classmethod
    def unpack(cls, packed: bytes) -> ShardKey:
        return cls(*_KEY.unpack(packed))

    @property
    def text(self) -> str:
        """For file, object and Redis names: `SPACE/CHUNK-SHARD-SHARDS`, numbers in hex."""
        return f"{self.space.hex()}/{self.chunk.hex()}-{self.shard:x}-{self.shards:x}"


class Shard(NamedTuple):
    """What is to be stored. `parent` is the 16-byte hash of the chunk before (zeros for the first): what it is reachable by."""

    key: ShardKey
    parent: bytes
    payload: memoryview


class Usage(NamedTuple):
    """`stored_bytes` as they count against `max_bytes` (None: no bound), frames, parts and index included."""

    stored_bytes: int
    shards: int
    max_bytes: int | None


@dataclass(frozen=True)
class Region:
    """The memory that all payloads and buffers of a tier lie in: the arena, mapped into this process.

    address: of its first byte here. descriptor: of its file, which another process could map. memory: its bytes.
    """

    address: int
    size_bytes: int
    descriptor: int
    memory: memoryview = field(repr=False)


class TierBase(ABC):
    """What the two kinds of tiers have in common: `Tier`, whose methods block, and `AsyncTier`."""

    scheme: ClassVar[str]
    """Of its URL: `disk`, `redis`, `s3` ... The name of its entry point."""
    concurrency: ClassVar[int] = 4
    """Loads that may usefully be under way at once; half as many stores may."""
    batch_bytes: ClassVar[int] = 32 << 20
    """Payload of one load or store from which on larger ones gain nothing."""
    batch_shards: ClassVar[int] = 512
    """The most shards of one load or store, so that one of tiny shards ends within the tier's time-outs, too."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: TierURL) -> TierBase:
        """Made from its URL, not opened: no I/O beyond reading secret files. Takes its own options from `url`.

        Raises:
            ConfigError: a part or an option of the URL cannot be used.
        """

    def attach(self, region: Region) -> None:  # noqa: B027
        """Before the tier is opened for the first time: where payloads and buffers will lie, for stores that register memory.

        The region is there until the tier has been closed. Return at once: `open` is the place for what takes time. A tier that
        keeps the region lets go of its memory in `close`, or the arena stays mapped until the process ends.
        """

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        """Which of these are there, told at once and without I/O; None where only the store itself can tell."""
        return None

    @abstractmethod
    def usage(self) -> Usage:
        """What is there, as far as this process knows; at once, without I/O, and also of a tier that is not open."""


class Tier(TierBase):
    """One store of shards whose methods block.

    All methods may be called from several threads at once, may block, and touch the memory they were handed only until
    they return. One outcome a shard, in the order asked: a shard's damage is an outcome and never an exception, and a
    damaged shard is removed. `TierError` is for the store as a whole. No method but `clear` takes longer than the
    tier's own time-outs, which its URL sets. docs/tiers/your-own.md says how the server uses them.
    """

    @abstractmethod
    def open(self) -> None:
        """Connect or mount. May be called again after a TierError; does nothing when open.

        Raises:
            TierError: it cannot serve now; one clear line says why and what to do.
        """

    @abstractmethod
    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        """Which of these are there, in one pipelined question. A yes is no promise: a load may still find it damaged."""

    @abstractmethod
    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        """Read whole, checked payloads of exactly the buffers' sizes; a loaded shard counts as used now.

        After any outcome but OK the buffer's content is undefined, and the caller must not show it to anybody.
        """

    @abstractmethod
    def store(self, shards: Sequence[Shard]) -> list[str]:
        """Keep these: OK and KEPT are acknowledged as kept; other outcomes name why not (`full`, `too large` ...).

        What must go to stay under the cap goes first. A crash at any moment leaves a shard whole or absent.
        """

    @abstractmethod
    def remove(self, keys: Sequence[ShardKey]) -> None:
        """Forget these, where they are there."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything that is the cache's, and nothing else."""

    @abstractmethod
    def close(self) -> None:
        """Finish, flush what recovery needs, let everything go. The tier can be opened again."""


class AsyncTier(TierBase):
    """One store of shards that waits for nothing: it is given operations, and completes each when the store has answered.

    What the methods of `Tier` promise holds for the operations of the same names. docs/tiers/your-own.md says how the server
    uses both kinds.
    """

    @abstractmethod
    def submit(self, operation: Operation[Any]) -> None:
        """Begin this (`lmcache.tiers.operation` has them all) and return at once. It may complete at once, too.

        Called by one thread at a time. The tier's own limits decide how many run at once; the others wait in the tier.
        """

    def cancel(self, operation: Operation[Any]) -> None:
        """Nobody wants the result of this operation, which was submitted, any more: its deadline has passed, or the server
        ends. Return at once.

        The operation must be ended all the same, when nothing touches its memory any more: as soon as possible, by
        `operation.cancelled()` where it is given up. The default lets it go on.
        """
