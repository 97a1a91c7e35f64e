"""The interface of tiers: the base class of all, that of blocking tiers, the types of their arguments, and their outcomes."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from lmcache.errors import LMCacheError
from lmcache.tiers.coding import AS_IT_IS, Coding
from lmcache.tiers.url import TierURL

OK = ""
"""Outcome of one shard: it was loaded completely and checked, or it was stored."""
KEPT = "kept"
"""Outcome of a store: the tier already has this shard and keeps it."""
ABSENT = "absent"
"""Outcome of a load: the tier does not have the shard. A damaged shard has another outcome (`frame` lists them)."""

_KEY = struct.Struct("<16s16sHH")


class TierError(LMCacheError):
    """The tier itself has failed: it cannot be reached, or its storage fails. The result of the call is undefined.

    `reason` is one word for counters (unreachable, timeout, denied, full, io ...); the text is for people and contains no secret.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ShardKey(NamedTuple):
    """The key of one rank's part of a chunk. `space`: 16 bytes for layout and parallel split. `chunk`: the 16-byte chunk hash."""

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
        """The key as text for file, object and Redis names: `SPACE/CHUNK-SHARD-SHARDS`, with numbers in hexadecimal."""
        return f"{self.space.hex()}/{self.chunk.hex()}-{self.shard:x}-{self.shards:x}"


class Shard(NamedTuple):
    """A shard to store. `parent`: the 16-byte hash of the preceding chunk, zeros for a first chunk.

    kv_dtype: what its elements are, as in the layout; "" if that is unknown. coding: how the payload is encoded, which belongs
    into the frame's header. Only a tier whose class says `codecs` gets encoded payloads. rounded_row: the elements of each row
    that a lossy codec may round with one scale (`Layout.rounded_row`); 0: the KV is exact, and stays so.
    """

    key: ShardKey
    parent: bytes
    payload: memoryview
    kv_dtype: str = ""
    coding: Coding = AS_IT_IS
    rounded_row: int = 0

    def is_kept(self, stored_bytes: int) -> bool:
        """Return whether a stored payload of so many bytes is this shard already, as it is to be stored or not encoded."""
        return stored_bytes == self.payload.nbytes or stored_bytes == self.coding.raw_bytes > 0


class Usage(NamedTuple):
    """The usage of a tier. `stored_bytes` count against `max_bytes` (None: no bound), with frames, parts and index."""

    stored_bytes: int
    shards: int
    max_bytes: int | None


@dataclass(frozen=True)
class Region:
    """The memory that contains all payloads and buffers of a tier: the arena, mapped into this process.

    address: address of its first byte. descriptor: descriptor of its file, which another process can map. memory: its bytes.
    """

    address: int
    size_bytes: int
    descriptor: int
    memory: memoryview = field(repr=False)


class TierBase(ABC):
    """The common base of `Tier`, whose methods block, and `AsyncTier` (`lmcache.tiers.operation`)."""

    scheme: ClassVar[str]
    """The scheme of its URL (`disk`, `redis`, `s3` ...), which is also the name of its entry point."""
    concurrency: ClassVar[int] = 4
    """The most useful number of concurrent loads. Half as many stores run concurrently."""
    batch_bytes: ClassVar[int] = 32 << 20
    """The payload of one load or store above which throughput does not increase."""
    batch_shards: ClassVar[int] = 512
    """The most shards of one load or store, so that a batch of tiny shards ends within the tier's timeouts."""

    fleeting: bool = False
    """Whether L1 lets go of what this tier has loaded as soon as an engine has read it."""
    read_only: ClassVar[bool] = False
    """Whether it only reads: what it has is written, removed and cleared by somebody else."""
    codecs: ClassVar[bool] = False
    """Whether it stores encoded payloads: it writes `Shard.coding` into the header of each frame, and decodes with `frame.unpack`
    or `frame.unfold`."""
    codec: str = "none"
    """The option `codec`: none, auto, or the name of a codec."""
    decoded: Callable[[int, int], None] | None = None
    """Set while somebody counts what is decoded: called with the bytes of a payload after and before, from any thread."""
    dropped: Callable[[list[ShardKey]], None] | None = None
    """Set while somebody wants to hear which shards the tier drops. A tier that knows calls it then, from any thread. It returns
    at once, and raises nothing."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: TierURL) -> TierBase:
        """Create the tier from its URL without opening it. The tier takes its options from `url`, and reads only secret files.

        Raises:
            ConfigError: a part or an option of the URL is invalid.
        """

    def attach(self, region: Region) -> None:  # noqa: B027
        """Take the memory of all payloads and buffers, for stores that register memory. It is called before the first `open`.

        The region is valid until the tier has been closed. Return at once; `open` may take time. A tier that keeps the region
        must release its memory in `close`, or the arena stays mapped until the process ends.
        """

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        """Return at once, without I/O, which of these shards the tier has; None if it has to ask the store."""
        return None

    def is_paced(self, keys: Sequence[ShardKey]) -> bool:
        """Return at once whether the time of a load of these shards shows how fast the tier is; False if it waits for engines."""
        return True

    def degraded(self) -> str:
        """Return at once what of the tier does not serve now, and why, although the tier as a whole serves; "" if nothing."""
        return ""

    @abstractmethod
    def usage(self) -> Usage:
        """Return the usage that this process knows of: at once, without I/O, and also if the tier is not open."""


class Tier(TierBase):
    """One store of shards whose methods block.

    Several threads may call the methods concurrently. A method may block, and may touch the memory in its arguments only until it
    returns. It returns one outcome for each shard, in the given order. Damage of a shard is an outcome, never an exception, and a
    damaged shard is removed. `TierError` means that the store itself has failed. No method but `clear` may take longer than the
    timeouts in the tier's URL. docs/tiers/your-own.md describes how the server uses a tier.
    """

    @abstractmethod
    def open(self) -> None:
        """Connect or mount. It may be called again after a TierError, and does nothing if the tier is open.

        Raises:
            TierError: the tier cannot serve now; the text says in one line why and what to do.
        """

    @abstractmethod
    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        """Return which of these shards the tier has, in one pipelined query. A load may still find such a shard damaged."""

    @abstractmethod
    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        """Read each shard into its buffer and check it; its size must be that of the buffer. A loaded shard counts as used now.

        After any outcome but OK the content of the buffer is undefined, and the caller must not use it.
        """

    @abstractmethod
    def store(self, shards: Sequence[Shard]) -> list[str]:
        """Store these shards. OK and KEPT acknowledge a shard as stored; another outcome is the reason (`full`, `too large` ...).

        The tier first evicts what exceeds its cap. A crash at any moment leaves each shard either complete or absent.
        """

    @abstractmethod
    def remove(self, keys: Sequence[ShardKey]) -> None:
        """Remove these shards, as far as the tier has them."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all data of the cache, and no other data."""

    @abstractmethod
    def close(self) -> None:
        """End all work, flush what recovery needs, and release all resources. The tier can be opened again."""
