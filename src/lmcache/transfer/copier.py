"""The interface of all copiers, whatever device the paged KV is on, and `make_copiers`, which chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache.errors import LayoutError
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import ExtentShape, PagedKV
from lmcache.transfer.progress import Progress


class Reader(Protocol):
    """Copies from extents to paged KV; a call returns when its copy has ended. Arguments as in `CpuCopier`."""

    def scatter(
        self,
        base: int,
        blocks: npt.NDArray[np.int32],
        runs: npt.NDArray[np.int64],
        *,
        arena_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None: ...


class Copier(Reader, Protocol):
    """Copies between one rank's paged KV and extents; a call returns when its copy has ended. Arguments as in `CpuCopier`."""

    bytes_per_second: float
    """A typical rate on current machines, used to cut work into steps."""
    zeroes_the_rest: bool
    """Whether a gather writes zeros to the tokens of an extent that its run leaves out; otherwise they keep their bytes."""
    reads_together: bool
    """Whether one `reader` fills the same planes from several sources in one call."""

    def gather(
        self, base: int, blocks: npt.NDArray[np.int32], runs: npt.NDArray[np.int64], *, arena_bytes: int | None = None
    ) -> None: ...

    def reader(self, *sources: tuple[PagedKV, ExtentShape]) -> Reader:
        """Return what fills parts of the paged KV from extents of other shapes, until this copier is closed. sources: as for
        `CpuCopier`.

        Raises:
            LayoutError: this copier cannot do that.
        """
        ...

    def adopt(self, address: int, size_bytes: int) -> None:
        """Prepare for fast copies to and from the arena, mapped at `address` in this process. Runs in the background."""
        ...

    def close(self) -> None:
        """Release the arena and the staging memory. No copy may be running."""
        ...


def make_copiers(groups: Sequence[tuple[PagedKV, int]], threads: int = 1, runtime: Runtime = RUNTIME) -> list[Copier]:
    """Return the copiers of a model's groups, given as (paged KV, tokens of an extent), which copy from and to one arena. On a
    GPU they share its registration and the staging memory. Only the first one may `adopt` the arena.

    Raises:
        LayoutError: a copier does not support the paged KV.
    """
    if groups[0][0].device != "cpu" and any(plane.form for paged, _ in groups for plane in paged.planes):
        raise LayoutError(
            "lossy_kv=int8-l1 and k8v4-l1 are for engines on a CPU, since the copies of GPUs cannot round: use "
            "lossy_kv=int8 here, and codec=int8 at the tiers (docs/codecs.md)"
        )
    if groups[0][0].device == "cpu":
        return [CpuCopier(paged, tokens, threads, runtime) for paged, tokens in groups]
    from lmcache.transfer.gpu.copier import cuda_copiers  # imports torch and Triton, which only engines on a GPU have

    return list(cuda_copiers(groups, runtime))
