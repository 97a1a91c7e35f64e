"""The loads and stores that a scheduler orders from every rank for one request. Engines pickle these plain data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from lmcache.chunks import HASH_BYTES
from lmcache.engine.jobs import Blocks, Event, Load, Store
from lmcache.engine.scheduler import Hit
from lmcache.transfer.progress import Progress


@dataclass
class LoadPlan:
    """Fill tokens [start_token, end_token) of a request's blocks from the extents of a hit.

    blocks: the request's block table from token 0 on. request_tokens: tokens of the request, for the log.
    """

    job_id: str
    request_id: Hashable
    hit: Hit
    chunk_tokens: int
    start_token: int
    end_token: int
    blocks: list[int] = field(default_factory=list)
    request_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens to be loaded."""
        return self.end_token - self.start_token

    def filled(self, block_tokens: int) -> list[int]:
        """Return the blocks, of `block_tokens` tokens each, that the load writes."""
        return self.blocks[self.start_token // block_tokens : -(-self.end_token // block_tokens)]

    def job(self, shard: int, blocks: Blocks, after: Event | None, progress: Progress | None) -> Load:
        """Return the load job of the rank that holds this shard."""
        first, size = self.start_token // self.chunk_tokens, 4
        skipped, end = first - self.hit.first_chunk, -(-self.end_token // self.chunk_tokens) - self.hit.first_chunk
        extents = self.hit.shard_extents(shard)[size * skipped : size * end]
        tokens = self.start_token, self.end_token
        return Load(self.hit.epoch, self.hit.lease, first, extents, *tokens, blocks, skipped, after, progress)


@dataclass
class StorePlan:
    """Store the chunks from `first_chunk` on. hashes: their hashes, joined. parent: the hash before the first of them.

    end_token: if the last chunk is not full, the token behind its last one; 0 if all are full.
    """

    job_id: str
    request_id: Hashable
    chunk_tokens: int
    parent: bytes
    hashes: bytes
    first_chunk: int
    blocks: list[int] = field(default_factory=list)
    end_token: int = 0

    @property
    def chunks(self) -> int:
        """Number of chunks to be stored."""
        return len(self.hashes) // HASH_BYTES

    @property
    def start(self) -> int:
        """The first token to be stored."""
        return self.first_chunk * self.chunk_tokens

    @property
    def end(self) -> int:
        """The token behind the last one to be stored."""
        return self.end_token or self.start + self.chunks * self.chunk_tokens

    @property
    def tokens(self) -> int:
        """Number of tokens to be stored."""
        return self.end - self.start

    def job(self, blocks: Blocks, after: Event | None) -> Store:
        """Return the store job of a rank; `blocks` is its block table."""
        return Store(
            self.chunk_tokens,
            self.parent,
            self.hashes,
            self.first_chunk,
            blocks,
            after,
            self.end_token,
            str(self.request_id),
        )


@dataclass
class StepPlan:
    """The plans for one step of an engine whose scheduler plans for all ranks.

    settle: store jobs whose blocks were taken away; ranks settle them before the step writes to any block.
    """

    loads: list[LoadPlan] = field(default_factory=list)
    stores: list[StorePlan] = field(default_factory=list)
    settle: list[str] = field(default_factory=list)
