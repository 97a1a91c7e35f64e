"""A rank's access to the extents of one server: in the mapped arena, or by payload frames. It lasts until another server takes
over, or this one has ended for good."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.chunks import Split
from lmcache.engine.groups import RankGroup
from lmcache.errors import LayoutError
from lmcache.memory.arena import Mapping, populate_all
from lmcache.runtime import Runtime
from lmcache.transfer.bounds import Runs
from lmcache.transfer.copier import Copier, Reader
from lmcache.transfer.progress import Progress
from lmcache.wire import messages as m

_BATCH_SECONDS = 0.01
"""A store reserves, fills and commits extents in steps of about this length; a preemption waits for at most one step."""
_PAYLOAD_BYTES = 64 << 20
"""One message holds at most so many bytes of chunks."""
Blocks = npt.NDArray[np.int32]


class Source(NamedTuple):
    """How the extents of shards that hold the same layers are loaded. shards: their indexes. shard_bytes: the size of each."""

    reader: Reader
    shards: tuple[int, ...]
    shard_bytes: int


class Part(NamedTuple):
    """How one group of KV is copied. extent_tokens: tokens of an extent. shard, shard_bytes: index and size of the part of a
    chunk that this rank holds."""

    copier: Copier
    extent_tokens: int
    shard: int
    shard_bytes: int

    @property
    def source(self) -> Source:
        """Return how the extents of this rank's own shard are loaded."""
        return Source(self.copier, (self.shard,), self.shard_bytes)


class Leased(NamedTuple):
    """Where the chunks of a load are in a lease, which names their payload frames: those from `first_chunk` of a part on."""

    lease: int
    part: int
    first_chunk: int


class Access:
    """What both kinds share. parts: one for each group.

    `runs` are those of a copier, one for each chunk. A shard is full if its run has `extent_tokens` tokens."""

    mapped = False
    batch_bytes = _PAYLOAD_BYTES
    """How many bytes a store copies in one step."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._sources: dict[tuple[int, Split], list[Source]] = {}

    def sources(self, number: int, group: RankGroup, split: Split, chunk_tokens: int) -> list[Source]:
        """Return how to load what the shards of another split have in common with this rank's part of group `number`.

        Raises:
            LayoutError: the layout cannot be split like this, or the copier cannot load it.
        """
        known = self._sources.get((number, split))
        if known is None:
            copier, known = self.parts[number].copier, []
            step = max(1, split.stage_shards) if copier.reads_together else 1
            for first in range(0, split.count, step):
                overlaps = {index: group.overlap(split, index, chunk_tokens) for index in range(first, first + step)}
                found = {index: overlap for index, overlap in overlaps.items() if overlap is not None}
                if found:
                    size = next(iter(found.values()))[1].size_bytes
                    known.append(Source(copier.reader(*found.values()), tuple(found), size))
            self._sources[number, split] = known
        return known

    def load(
        self, source: Source, leased: Leased, blocks: Blocks, runs: Runs, progress: Progress | None = None
    ) -> None:
        """Fill blocks from extents. leased: which chunks those of the runs are. runs: for each chunk a row for each shard of the
        source. progress: as for a copier."""
        raise NotImplementedError

    def gather(self, group: int, blocks: Blocks, runs: Runs) -> Sequence[memoryview]:
        """Copy blocks of one group into extents. Return the payload frames, a shard each, that the server needs to fill the
        extents itself."""
        raise NotImplementedError

    def close(self) -> None:
        """End the access. The caller ensures that no copy runs any more."""
        for part in self.parts:
            part.copier.close()


class ArenaAccess(Access):
    """Access to the mapped arena."""

    mapped = True

    def __init__(self, parts: Sequence[Part], mapping: Mapping, runtime: Runtime) -> None:
        super().__init__(parts)
        copier = parts[0].copier
        self.batch_bytes = int(copier.bytes_per_second * _BATCH_SECONDS)
        # Fill this process's page table ahead of use: a store into populated memory runs at twice the speed.
        self._mapping, self._stop = mapping, runtime.event()
        self._populating = runtime.start(lambda: populate_all(mapping, self._stop), "lmcache-map")
        copier.adopt(mapping.address, mapping.size_bytes)

    def load(
        self, source: Source, leased: Leased, blocks: Blocks, runs: Runs, progress: Progress | None = None
    ) -> None:
        arena = self._mapping
        source.reader.scatter(arena.address, blocks, runs, arena_bytes=arena.size_bytes, progress=progress)

    def gather(self, group: int, blocks: Blocks, runs: Runs) -> Sequence[memoryview]:
        arena, part = self._mapping, self.parts[group]
        if int(runs[:, 0].max()) + part.shard_bytes > arena.size_bytes:
            raise LayoutError(f"the server gave an extent beyond the arena's {arena.size_bytes} bytes")
        if runs[-1, 2] < part.extent_tokens and not part.copier.zeroes_the_rest:
            # Tiers store the complete extent, so the rest behind an unfull chunk must not hold bytes of a former chunk.
            ctypes.memset(arena.address + int(runs[-1, 0]), 0, part.shard_bytes)
        part.copier.gather(arena.address, blocks, runs, arena_bytes=arena.size_bytes)
        return ()

    def close(self) -> None:
        super().close()
        self._stop.set()
        self._populating.join()
        self._mapping.close()


class PayloadAccess(Access):
    """Access by payload frames, which a server gives that is on another host or of another user. fetch: asks the server for
    frames."""

    def __init__(self, parts: Sequence[Part], fetch: Callable[[m.Fetch], list[bytes]]) -> None:
        super().__init__(parts)
        self._fetch = fetch

    def load(
        self, source: Source, leased: Leased, blocks: Blocks, runs: Runs, progress: Progress | None = None
    ) -> None:
        chunks = runs.reshape(-1, len(source.shards), 4)
        step = max(1, _PAYLOAD_BYTES // (source.shard_bytes * len(source.shards)))
        for at in range(0, len(chunks), step):
            some = chunks[at : at + step].copy()
            wanted = leased.lease, leased.first_chunk + at, len(some), leased.part, source.shard_bytes
            frames = [self._frames(shard, *wanted) for shard in source.shards]
            for rows, buffers in zip(some, zip(*frames, strict=True), strict=True):
                addresses = [np.frombuffer(one, dtype=np.uint8).ctypes.data for one in buffers]
                rows[:, 0] = np.array(addresses) - min(addresses)
                source.reader.scatter(min(addresses), blocks, rows)

    def _frames(self, shard: int, lease: int, first: int, count: int, part: int, size: int) -> list[bytes]:
        frames = self._fetch(m.Fetch(lease, shard, first, count, part))
        if len(frames) != count or any(len(one) != size for one in frames):
            raise LayoutError(f"{len(frames)} payload frames for {count} chunks")
        return frames

    def gather(self, group: int, blocks: Blocks, runs: Runs) -> Sequence[memoryview]:
        own = self.parts[group]
        # Behind an unfull chunk an uninitialized buffer would send this process's memory to the server.
        full = bool((runs[:, 2] == own.extent_tokens).all())
        buffer = (np.empty if full else np.zeros)((len(runs), own.shard_bytes), dtype=np.uint8)
        runs[:, 0] = np.arange(len(runs)) * own.shard_bytes
        own.copier.gather(buffer.ctypes.data, blocks, runs)
        return [row.data for row in buffer]
