"""The loads and stores that a scheduler orders from every rank for one request. Engines pickle these plain data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from lmcache.chunks import HASH_BYTES
from lmcache.engine.jobs import Blocks, Event, Load, Store
from lmcache.engine.scheduler import Hit
from lmcache.transfer.progress import Progress


@dataclass
class LoadPlan:
    """Fill tokens [start_token, end_token) of a request's blocks from the extents of a hit.

    blocks: the request's block table from token 0 on. request_tokens: tokens of the request, for the log. others: the same for
    each further group of the model, with its own block table. synchronous: whether the step's forward waits for the load, in an
    engine whose loads may run beside other steps, too."""

    job_id: str
    request_id: Hashable
    hit: Hit
    chunk_tokens: int
    start_token: int
    end_token: int
    blocks: list[int] = field(default_factory=list)
    request_tokens: int = 0
    others: list[LoadPlan] = field(default_factory=list)
    synchronous: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens to be loaded."""
        return self.end_token - self.start_token

    def filled(self, block_tokens: int) -> list[int]:
        """Return the blocks, of `block_tokens` tokens each, that the load writes."""
        return self.blocks[self.start_token // block_tokens : -(-self.end_token // block_tokens)]

    def job(
        self, shards: Sequence[int], tables: Sequence[Blocks], after: Event | None, progress: Progress | None
    ) -> Load:
        """Return the load job of the rank that holds these shards, one for each group, and has these block tables."""
        one = self._part(shards[0], tables[0], after, progress)
        if not self.others:
            return one
        rest = zip(self.others, shards[1:], tables[1:], strict=True)
        return replace(one, others=tuple(plan._part(shard, blocks, None, None) for plan, shard, blocks in rest))

    def _part(self, shard: int, blocks: Blocks, after: Event | None, progress: Progress | None) -> Load:
        first, end, hit = self.start_token // self.chunk_tokens, -(-self.end_token // self.chunk_tokens), self.hit
        skipped, size = first - hit.first_chunk, 4
        extents = hit.shard_extents(shard)[size * skipped : size * (end - hit.first_chunk)]
        foreign = (
            tuple(part for one in hit.foreign if (part := one.within(first, end)) is not None) if hit.foreign else ()
        )
        tokens = self.start_token, self.end_token
        return Load(
            *(hit.epoch, hit.lease, first, extents, *tokens, blocks, skipped, after, progress),
            foreign=foreign,
            part=hit.part,
            request_id=str(self.request_id),
        )


@dataclass
class StorePlan:
    """Store the chunks from `first_chunk` on. hashes: their hashes, joined. parent: the hash before the first of them.

    end_token: if the last chunk is not full, the token behind its last one; 0 if all are full. others: the same for each further
    group of the model, with its own block table.
    """

    job_id: str
    request_id: Hashable
    chunk_tokens: int
    parent: bytes
    hashes: bytes
    first_chunk: int
    blocks: list[int] = field(default_factory=list)
    end_token: int = 0
    others: list[StorePlan] = field(default_factory=list)

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

    def job(self, stores: Sequence[bool], tables: Sequence[Blocks], after: Event | None) -> Store:
        """Return the store job of a rank. stores, tables: for each group, whether it stores its shard, and its block table."""
        one = self._part(stores[0], tables[0], after)
        if not self.others:
            return one
        rest = zip(self.others, stores[1:], tables[1:], strict=True)
        return replace(one, others=tuple(plan._part(kept, blocks, None) for plan, kept, blocks in rest))

    def _part(self, stores: bool, blocks: Blocks, after: Event | None) -> Store:
        return Store(
            self.chunk_tokens,
            self.parent,
            self.hashes if stores else b"",
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
