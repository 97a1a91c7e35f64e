"""vLLM's blocks that stores read, kept from being reused before the stores have ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmcache.engine import StorePlan
from lmcache.engine.requests import GroupTable


class HeldBlocks:
    """The blocks that are held for stores. groups: the block tables of the model's groups."""

    def __init__(self, groups: Sequence[GroupTable]) -> None:
        self._groups, self._pool = groups, None
        self._held: dict[str, list[Any]] = {}
        """Store job -> vLLM's blocks that it reads, until it has ended or is about to be settled."""

    def bind(self, pool: Any) -> None:
        """Hold blocks of vLLM's block pool from now on. Without one nothing is held."""
        self._pool = pool

    @property
    def jobs(self) -> list[str]:
        """The stores for which blocks are held."""
        return list(self._held)

    def hold(self, store: StorePlan) -> None:
        """Keep vLLM from reusing the blocks that a store reads before it has ended."""
        pool: Any = self._pool
        if pool is None:
            return
        held = self._held[store.job_id] = []
        for group, part in zip(self._groups, (store, *store.others), strict=True):
            first = part.start // group.block_tokens
            if group.reach_tokens:  # of each chunk, the blocks in reach of its end; those before may be null or reused
                ends = range(part.start + part.chunk_tokens, part.end + 1, part.chunk_tokens)
                numbers = {
                    at
                    for end in ends
                    for at in range(
                        (end - min(group.reach_tokens, part.chunk_tokens)) // group.block_tokens,
                        end // group.block_tokens,
                    )
                }
            else:
                numbers = set(range(first, len(part.blocks)))
            held += [pool.blocks[part.blocks[number]] for number in sorted(numbers)]
        pool.touch(held)

    def let_go(self, jobs: Iterable[str]) -> None:
        """Give back the blocks that are held for these stores."""
        pool: Any = self._pool
        for job in jobs:
            if job in self._held:
                pool.free_blocks(reversed(self._held.pop(job)))
