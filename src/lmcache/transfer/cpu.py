"""Copies between paged KV and extents on a CPU: one native call for all runs and planes, without the GIL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.compiled import native
from lmcache.errors import LayoutError, Unroundable
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.bounds import Blocks, Bounds, Runs
from lmcache.transfer.paged import ExtentShape, PagedKV
from lmcache.transfer.progress import Progress, planes_in_group

# A smaller copy ends before another thread has woken up: waking one takes some 30 microseconds, in which 300 KB are copied.
_SPLIT_BYTES = 1 << 20
# Smaller groups of planes would cost more for their notification than their earlier arrival gains.
_GROUP_BYTES = 4 << 20


class CpuCopier:
    """Copies tokens between one rank's paged KV and extents that hold `chunk_tokens` tokens in canonical order.

    A run is a row (extent_offset_bytes, first_token, token_count, token_in_extent). It copies tokens [first_token, first_token +
    token_count) of the sequence whose block table is `blocks` (token t lies in block blocks[t // block_tokens]) to or from
    tokens [token_in_extent, ...) of the extent at base + extent_offset_bytes. Runs of one call must not share target tokens.
    Several threads may call it at the same time.

    threads: how many threads share the work of one call, including the calling thread. sources: what is copied in place of the
    complete paged KV: parts of the same planes of it, and the shapes of the extents that hold these. With several sources, runs
    is int64 [runs * sources, 4]: the rows of a run follow each other and differ in their extents only.
    """

    bytes_per_second = 6e9
    zeroes_the_rest = False
    reads_together = True

    def __init__(
        self,
        paged: PagedKV,
        chunk_tokens: int,
        threads: int = 1,
        runtime: Runtime = RUNTIME,
        sources: Sequence[tuple[PagedKV, ExtentShape]] = (),
    ) -> None:
        if chunk_tokens < 1:
            raise LayoutError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        if threads < 1:
            raise LayoutError(f"threads is {threads}; it must be at least 1")
        self.paged = paged
        self.chunk_tokens = chunk_tokens
        sources = sources or [(paged, ExtentShape.of(paged, chunk_tokens))]
        self._sources, self._token_bytes = len(sources), sum(part.token_bytes for part, _ in sources)
        self._bounds = Bounds(paged, chunk_tokens, max(shape.size_bytes for _, shape in sources))
        self._planes = np.stack([_packed_planes(*source) for source in sources], axis=1)
        self._planes_address = self._planes.ctypes.data
        self._isa = -1  # the best instruction set of this CPU; tests try each
        self._pool = runtime.pool(threads - 1, "lmcache-copy") if threads > 1 else None
        self._helpers = threads - 1

    def reader(self, *sources: tuple[PagedKV, ExtentShape]) -> CpuCopier:
        """Return a copier that fills parts of this paged KV from extents of other shapes. It uses the threads of this one, so it
        is closed with it."""
        reader = CpuCopier(self.paged, self.chunk_tokens, sources=sources)
        reader._isa, reader._pool, reader._helpers = self._isa, self._pool, self._helpers
        return reader

    def gather(self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None) -> None:
        """Copy paged tokens into extents.

        base: address of the arena's mapping. blocks: int32 [blocks], the block table. runs: int64 [runs, 4], see the
        class. arena_bytes: length of the mapping, by which an extent beyond it is refused instead of crashing the process.

        Raises:
            LayoutError: a block, token or extent is out of bounds; nothing was copied.
            Unroundable: a value that extents hold rounded is not finite; what the extents hold is of no use.
        """
        self._copy(0, base, blocks, runs, arena_bytes)

    def scatter(
        self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None, progress: Progress | None = None
    ) -> None:
        """Copy tokens of extents into paged KV. Arguments and errors are as in `gather`. progress: is notified of planes as
        they arrive; with it they arrive in order."""
        self._copy(1, base, blocks, runs, arena_bytes, progress)

    def adopt(self, address: int, size_bytes: int) -> None:
        """Do nothing: a CPU copies to any mapped memory."""

    def close(self) -> None:
        """End the helper threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _copy(
        self,
        scatter: int,
        base: int,
        blocks: Blocks,
        runs: Runs,
        arena_bytes: int | None,
        progress: Progress | None = None,
    ) -> None:
        blocks, runs = self._bounds.checked(base, blocks, runs, arena_bytes)
        self._check_sources(runs)
        size, planes = int(runs[:: self._sources, 2].sum()) * self._token_bytes, len(self._planes)
        if size == 0:
            return
        step = planes if progress is None else planes_in_group(size // planes, _GROUP_BYTES, planes)
        for first in range(0, planes, step):
            group = range(first, min(first + step, planes))
            self._copy_planes(scatter, base, blocks, runs, group, size * len(group) // planes)
            if progress is not None:
                progress.arrived(group.stop)

    def _check_sources(self, runs: Runs) -> None:
        if self._sources == 1:
            return
        if len(runs) % self._sources:
            raise LayoutError(
                f"runs has {len(runs)} rows; it must have one for each run and each of {self._sources} extents"
            )
        tokens = runs[:, 1:].reshape(-1, self._sources, 3)
        if (tokens != tokens[:, :1]).any():
            raise LayoutError(
                f"runs names other tokens for some of the {self._sources} extents of a run; they must be equal"
            )

    def _copy_planes(self, scatter: int, base: int, blocks: Blocks, runs: Runs, group: range, size: int) -> None:
        """Copy the planes `group` of all runs, which are `size` bytes."""
        paged = self.paged
        claimed = np.zeros(1, dtype=np.int64)  # number of the next piece; all threads of this call take from it
        arguments = (
            scatter,
            self._isa,
            self._planes_address + group.start * self._planes.strides[0],
            len(group),
            self._sources,
            paged.item_bytes,
            paged.block_tokens,
            base,
            blocks.ctypes.data,
            runs.ctypes.data,
            len(runs) // self._sources,
            claimed.ctypes.data,
        )
        if self._pool is None or size < _SPLIT_BYTES:
            _call(arguments, None)
            return
        kept = (claimed, blocks, runs)  # keeps the arrays alive, since the other threads have only their addresses
        others: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # no thread can be started: this one does it, with those that there are
                for _ in range(self._helpers):
                    others.append(self._pool.submit(_call, arguments, kept))
            _call(arguments, None)
        finally:
            # A helper that never started has nothing left to do: all pieces were taken. A running one ends with its piece.
            for other in others:
                if not other.cancel():
                    other.result()


def _call(arguments: tuple[Any, ...], kept: object) -> None:
    if not native.copy(*arguments):
        raise Unroundable("KV with an infinity, a NaN or the largest float32 cannot be rounded, and is not stored")


def _packed_planes(paged: PagedKV, shape: ExtentShape) -> npt.NDArray[np.int64]:
    """Return the table that native code reads: one row a plane, the fields of `Plane` and the plane's place in an extent."""
    rows = [(*dataclasses.astuple(plane), *place) for plane, place in zip(paged.planes, shape.planes, strict=True)]
    return np.array(rows, dtype=np.int64)
