"""Copies between one rank's paged KV in GPU memory and extents of the arena."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.bounds import Blocks, Bounds, Runs
from lmcache.transfer.gpu.driver import using_device
from lmcache.transfer.gpu.launch import Shape, staging_bytes
from lmcache.transfer.gpu.pinned import PinnedArena
from lmcache.transfer.gpu.reader import CudaReader
from lmcache.transfer.gpu.ring import Source, StagingRing
from lmcache.transfer.paged import ExtentShape, PagedKV, Plane
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)
STAGING_BYTES = staging_bytes()
"""Device memory of one copier for both directions together."""


class CudaCopier:
    """The `Copier` for paged KV on a GPU. arena: the registered arena, if another copier registers it. Stores and loads have
    separate staging rings and streams, so they run concurrently: one storing thread and two loading threads may call it at the
    same time.

    Raises:
        LayoutError: planes of different strides, tiled interiors, or no GPU memory for the staging rings.
    """

    bytes_per_second = 50e9
    zeroes_the_rest = True
    reads_together = False

    def __init__(
        self,
        paged: PagedKV,
        chunk_tokens: int,
        runtime: Runtime = RUNTIME,
        arena: PinnedArena | None = None,
        staging_bytes: int = 0,
    ) -> None:
        staging_bytes = staging_bytes or STAGING_BYTES
        device = torch.device(paged.device)
        self._bounds = Bounds(paged, chunk_tokens, paged.shard_bytes(chunk_tokens))
        self._own_arena = PinnedArena(device, runtime) if arena is None else None
        self._arena = self._own_arena or arena
        assert self._arena is not None
        with using_device(device):
            bases = torch.tensor([plane.address for plane in paged.planes], dtype=torch.int64, device=device)
            source = Source(
                device, bases, _shape_of(paged), paged.block_tokens, chunk_tokens, paged.shard_bytes(chunk_tokens)
            )
            self._rings = {
                to_host: StagingRing(source, self._arena, staging_bytes // 2, to_host) for to_host in (True, False)
            }
        self._device, self._chunk_tokens = device, chunk_tokens
        self._reading: torch.cuda.Stream | None = None
        """The stream of what `reader` has made."""
        logger.info("GPU staging: %d MiB on %s", staging_bytes >> 20, device)

    def gather(self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None) -> None:
        """Copy paged tokens, which the engine must have computed, to extents. The rest of each extent becomes zeros."""
        self._rings[True].run(base, *self._bounds.checked(base, blocks, runs, arena_bytes))

    def scatter(
        self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None, progress: Progress | None = None
    ) -> None:
        """Copy extents to paged tokens, in blocks that no work in flight touches.

        progress: gets an event of the kernels' stream for each group of planes. The groups then arrive in order.
        """
        self._rings[False].run(base, *self._bounds.checked(base, blocks, runs, arena_bytes), progress)

    def reader(self, *sources: tuple[PagedKV, ExtentShape]) -> CudaReader:
        """Return a copier that fills a part of this paged KV from extents of another shape."""
        ((part, shape),) = sources
        assert self._arena is not None
        with using_device(self._device):
            self._reading = self._reading or torch.cuda.Stream(self._device)
        return CudaReader(part, _shape_of(part), shape, self._chunk_tokens, self._arena, self._reading)

    def adopt(self, address: int, size_bytes: int) -> None:
        """Register the arena, which is mapped at `address`, with the driver in the background."""
        assert self._own_arena is not None, "another copier registers the arena"
        self._own_arena.register(address, size_bytes)

    def close(self) -> None:
        """Undo registrations and free the rings. No copy may be running."""
        if self._own_arena is not None:
            self._own_arena.close()
        with using_device(self._device):
            self._rings.clear()


def cuda_copiers(groups: Sequence[tuple[PagedKV, int]], runtime: Runtime = RUNTIME) -> list[CudaCopier]:
    """Return one copier for each (paged KV, tokens of an extent). They use one arena, and share the staging memory."""
    size = STAGING_BYTES // len(groups)
    first = CudaCopier(*groups[0], runtime, staging_bytes=size)
    return [first, *(CudaCopier(*group, runtime, first._arena, size) for group in groups[1:])]


def _shape_of(paged: PagedKV) -> Shape:
    """Return the strides that all planes share, in the largest word that divides them.

    Raises:
        LayoutError: the planes differ, or are tiled for a CPU's matrix units.
    """
    planes = [_plain(plane, paged.item_bytes) for plane in paged.planes]
    if any(plane[1:] != planes[0][1:] for plane in planes):
        raise LayoutError("the layers' KV tensors have different strides; the GPU copier needs equal ones")
    _, block, token, heads, head, head_bytes = planes[0]
    if head == head_bytes or heads == 1:  # the heads are contiguous, so they are one long row
        head, head_bytes, heads = heads * head_bytes, heads * head_bytes, 1
    for word in (8, 4, 2, 1):
        if all(value % word == 0 for value in (block, token, head, head_bytes, *(plane[0] for plane in planes))):
            break
    return Shape(word, block // word, token // word, head // word, head_bytes // word, heads * head_bytes // word)


def _plain(plane: Plane, item: int) -> tuple[int, int, int, int, int, int]:
    """Return (address, block stride, token stride, heads, head stride, bytes of a head) of a plane.

    Raises:
        LayoutError: the plane's tokens or dims are tiled.
    """
    tokens_plain = plane.token_group == 1 or plane.group_stride == plane.token_group * plane.token_stride
    dims_plain = plane.dims == 1 or (
        (plane.dim_stride == item or plane.dim_group == 1)
        and (plane.dim_group in (1, plane.dims) or plane.dim_group_stride == plane.dim_group * item)
        and (plane.dim_group != 1 or plane.dim_group_stride == item)
    )
    if not tokens_plain or not dims_plain:
        raise LayoutError("a GPU KV tensor whose tokens or dims are tiled cannot be described")
    token = plane.group_stride if plane.token_group == 1 else plane.token_stride
    return plane.address, plane.block_stride, token, plane.heads, plane.head_stride, plane.dims * item
