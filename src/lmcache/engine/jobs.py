"""The copy jobs of a rank, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache.chunks import Split
from lmcache.transfer.progress import Progress

Blocks: TypeAlias = Sequence[int] | npt.NDArray[np.int32]
"""A block table: the block numbers of a request, from token 0 on. A job with `after` reads the table behind that point."""


class Event(Protocol):
    """A point in the engine's device stream (`torch.cuda.Event`) that a copy must not overtake."""

    def query(self) -> bool:
        """Return whether the device has passed this point."""
        ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Foreign:
    """Chunks of a load as ranks of another split have stored them. extents: first sectors, u32 [chunk][shard], of the chunks from
    `first_chunk` on. part, lease_chunk: the part of the lease and the place of `first_chunk` in it (names payload frames)."""

    first_chunk: int
    split: Split
    extents: bytes
    part: int
    lease_chunk: int = 0

    @property
    def chunks(self) -> int:
        """Number of the chunks."""
        return len(self.extents) // (4 * self.split.count)

    @property
    def end_chunk(self) -> int:
        """The chunk behind the last one."""
        return self.first_chunk + self.chunks

    def within(self, first_chunk: int, end_chunk: int) -> Foreign | None:
        """Return those of the chunks that are in this range; None if none is."""
        first, end, size = max(first_chunk, self.first_chunk), min(end_chunk, self.end_chunk), 4 * self.split.count
        if first >= end:
            return None
        skipped = first - self.first_chunk
        extents = self.extents[skipped * size : (end - self.first_chunk) * size]
        return replace(self, first_chunk=first, extents=extents, lease_chunk=self.lease_chunk + skipped)


@dataclass(frozen=True)
class Load:
    """Extents -> paged KV: tokens [start_token, end_token) of a request.

    extents: this shard's first sectors, one u32 for each chunk from `first_chunk` on. blocks: the request's block table from
    token 0 on. part, lease_chunk: the part of the lease and the place of `first_chunk` in it (names payload frames). after: on a
    GPU, the point in the engine's stream that must have passed before the blocks may be written. progress: notified of each layer
    that has arrived, if the engine waits for layers one by one. others: the same for each further group of the model; all
    succeed, or the load fails. foreign: what other splits have stored, in order: the chunks behind those of `extents`.
    request_id: the engine's request id, for the server's records."""

    epoch: bytes
    lease: int
    first_chunk: int
    extents: bytes
    start_token: int
    end_token: int
    blocks: Blocks
    lease_chunk: int = 0
    after: Event | None = None
    progress: Progress | None = None
    others: tuple[Load, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    part: int = 0
    request_id: str = ""


@dataclass(frozen=True)
class Store:
    """Paged KV -> extents: the chunks from `first_chunk` on, named by `hashes` (16 bytes each).

    end_token: if the last chunk is not full, the token behind its last one; 0 if all are full. parent: hash of the chunk before,
    or the root (then `first_chunk` is 0). chunk_tokens: chunk size of the hashes; a server that was restarted with another chunk
    size gets none of them. after: on a GPU, the point in the engine's stream behind which the blocks are filled. request_id: the
    engine's request id, for the server's events. others: the same for each further group of the model."""

    chunk_tokens: int
    parent: bytes
    hashes: bytes
    first_chunk: int
    blocks: Blocks
    after: Event | None = None
    end_token: int = 0
    request_id: str = ""
    others: tuple[Store, ...] = ()


@dataclass(frozen=True)
class Done:
    """The result of a job. `ok` is False for a load whose blocks were not filled, or a store that stored nothing.

    seconds: time of the copies. put_seconds: time of a store for reserving extents at the server and committing them.
    """

    job_id: str
    kind: Literal["load", "store"]
    ok: bool
    tokens: int
    seconds: float
    put_seconds: float = 0.0
