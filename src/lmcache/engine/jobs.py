"""What a rank is asked to copy, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache.transfer.progress import Progress

Blocks: TypeAlias = Sequence[int] | npt.NDArray[np.int32]
"""A block table: block numbers of a request, from token 0 on. Of a job with `after`, they are read behind that point."""


class Event(Protocol):
    """A point in the engine's device stream (`torch.cuda.Event`) that a copy must not overtake."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Load:
    """Extents -> paged KV: tokens [start_token, end_token) of a request.

    extents: this shard's u32 sectors of the chunks from `first_chunk` on. blocks: the request's block table from token 0 on.
    lease_chunk: place of `first_chunk` among the lease's chunks (payload frames are asked for by that). after: on a GPU, the
    point in the engine's stream that must have passed before the blocks may be written. progress: is told of layers as they
    arrive, where the engine waits for them one by one.
    """

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


@dataclass(frozen=True)
class Store:
    """Paged KV -> extents: the chunks from `first_chunk` on, named by `hashes` (16 bytes each).

    end_token: where the last of them is unfull, the token behind its last one; 0 where all are full.
    parent: hash of the chunk before, or the root's (then `first_chunk` is 0). chunk_tokens: that of the hashes; a server that
    came back with another one gets none of them. after: on a GPU, the point in the engine's stream behind which the blocks
    are filled. request_id: the engine's own, for the server's events.
    """

    chunk_tokens: int
    parent: bytes
    hashes: bytes
    first_chunk: int
    blocks: Blocks
    after: Event | None = None
    end_token: int = 0
    request_id: str = ""


@dataclass(frozen=True)
class Done:
    """A finished job. `ok` is False for a load whose blocks were not filled, or a store of which nothing was kept.

    seconds: of the copies. put_seconds: of a store, for getting extents from the server and committing them.
    """

    job_id: str
    kind: Literal["load", "store"]
    ok: bool
    tokens: int
    seconds: float
    put_seconds: float = 0.0
