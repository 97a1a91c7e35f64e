"""The runs of a rank's jobs: which tokens of the paged KV go to, or come from, which place of which extent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmcache.engine.access import Access, Leased
from lmcache.engine.groups import RankGroup
from lmcache.engine.jobs import Load, Store
from lmcache.errors import LayoutError
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.transfer.bounds import Runs

Sectors = npt.NDArray[np.uint32]


def load_group(access: Access, number: int, group: RankGroup, load: Load, chunk_tokens: int) -> None:
    """Load group `number`: what other splits have stored first, since the own part reports the layers that have arrived.

    Raises:
        LMCacheError: the extents do not cover the load's tokens, or could not be copied.
    """
    own, blocks = access.parts[number], np.asarray(load.blocks, dtype=np.int32)
    sectors = np.frombuffer(load.extents, dtype="<u4")
    runs = _load_runs(group, load, load.first_chunk, len(sectors), chunk_tokens)
    foreign = [_load_runs(group, load, one.first_chunk, one.chunks, chunk_tokens) for one in load.foreign]
    _check_covered(load, np.concatenate([runs, *foreign]) if foreign else runs)
    for one, others in zip(load.foreign, foreign, strict=True):
        shards = np.frombuffer(one.extents, dtype="<u4").reshape(-1, one.split.count)
        for source in access.sources(number, group, one.split, chunk_tokens):
            leased = Leased(load.lease, one.part, one.lease_chunk)
            access.load(source, leased, blocks, _placed(group, others, shards[:, source.shards]))
    if len(runs):
        leased = Leased(load.lease, load.part, load.lease_chunk)
        access.load(own.source, leased, blocks, _placed(group, runs, sectors[:, None]), load.progress)
    elif load.progress is not None:
        load.progress.arrived(len(group.paged.planes))


def _load_runs(group: RankGroup, load: Load, first_chunk: int, count: int, chunk_tokens: int) -> Runs:
    """Return the runs of these chunks of a load, with a chunk's number among them in place of its extent."""
    chunks = np.arange(first_chunk, first_chunk + count)
    held = group.first_token(chunks, chunk_tokens)
    first = np.maximum(held, load.start_token)
    runs = np.empty((count, 4), dtype=np.int64)
    runs[:, 0], runs[:, 1], runs[:, 3] = chunks - first_chunk, first, first - held
    runs[:, 2] = np.minimum((chunks + 1) * chunk_tokens, load.end_token) - first
    filled: Runs = runs[runs[:, 2] != 0]
    return filled


def _check_covered(load: Load, runs: Runs) -> None:
    """Raise LayoutError unless the runs cover the load's tokens one after the other."""
    begins, ends = runs[:, 1], runs[:, 1] + runs[:, 2]
    gapless = len(runs) and (begins[0], ends[-1]) == (load.start_token, load.end_token)
    if not gapless or (begins[1:] != ends[:-1]).any():
        raise LayoutError(f"{len(runs)} extents do not cover tokens {load.start_token}..{load.end_token}")


def _placed(group: RankGroup, runs: Runs, sectors: Sectors) -> Runs:
    """Return the runs of a load with the extents at these sectors [chunks, shards], a row for each shard."""
    placed = np.repeat(runs, sectors.shape[1], axis=0)
    placed[:, 0] = sectors[runs[:, 0]].astype(np.int64).ravel() * SECTOR_BYTES
    return group.in_table(placed)


def store_runs(
    group: RankGroup, store: Store, first_chunk: int, count: int, extents: bytes, chunk_tokens: int
) -> tuple[Runs, int]:
    """Return the runs of those of `count` chunks that have extents, and how many tokens they store. extents: the sector of each
    chunk from `first_chunk` on, or NO_EXTENT.

    Raises:
        LayoutError: there are not as many as chunks.
    """
    sectors = np.frombuffer(extents, dtype="<u4")
    if len(sectors) != count:
        raise LayoutError(f"{len(sectors)} extents for {count} chunks")
    wanted, kept = np.flatnonzero(sectors != NO_EXTENT), group.kept_tokens(chunk_tokens)
    runs = np.zeros((len(wanted), 4), dtype=np.int64)
    if not len(wanted):
        return runs, 0
    first = group.first_token(first_chunk + wanted, chunk_tokens)
    tokens = np.minimum(first + kept, store.end_token or first[-1] + kept) - first
    runs[:, 0], runs[:, 1], runs[:, 2] = sectors[wanted].astype(np.int64) * SECTOR_BYTES, first, tokens
    return group.in_table(runs), int(tokens.sum())
