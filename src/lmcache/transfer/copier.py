"""What every copier can do, whatever the device of the paged KV; and the one place that chooses."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import PagedKV
from lmcache.transfer.progress import Progress


class Copier(Protocol):
    """Copies between one rank's paged KV and extents; returns when the copy has ended. Arguments as in `CpuCopier`."""

    bytes_per_second: float
    """About what it reaches on today's machines: for cutting work into steps."""
    zeroes_the_rest: bool
    """Whether a gather writes zeros where a run leaves tokens of its extent out; else those stay as they were."""

    def gather(
        self,
        base: int,
        blocks: npt.NDArray[np.int32],
        runs: npt.NDArray[np.int64],
        *,
        arena_bytes: int | None = None,
    ) -> None: ...

    def scatter(
        self,
        base: int,
        blocks: npt.NDArray[np.int32],
        runs: npt.NDArray[np.int64],
        *,
        arena_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None: ...

    def adopt(self, address: int, size_bytes: int) -> None:
        """The arena is mapped here: get ready for fast copies to and from it, in the background."""
        ...

    def close(self) -> None:
        """No copy runs any more: let go of the arena and of staging memory."""
        ...


def make_copier(paged: PagedKV, chunk_tokens: int, threads: int = 1) -> Copier:
    """The copier for the device that `paged` lies on.

    Raises:
        LayoutError: paged KV that cannot be copied there.
    """
    if paged.device == "cpu":
        return CpuCopier(paged, chunk_tokens, threads)
    from lmcache.transfer.gpu.copier import CudaCopier  # torch and Triton are the engine's, never needed elsewhere

    return CudaCopier(paged, chunk_tokens)
