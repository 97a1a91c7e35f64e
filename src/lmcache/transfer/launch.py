"""The pieces of a GPU copy launched from C, straight to the driver (`native/device.c`); where that cannot be, from Python.

How Triton lays out a kernel's parameters is not promised by any release, so nothing here is relied on before it was seen to
copy right: `Launcher.copies_right` sends random bytes through the ring.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lmcache.compiled import load_native
from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Runs

if TYPE_CHECKING:
    import torch

logger = init_logger(__name__)

MAX_PLACES = 64
_MOST_TRIAL_BYTES = 64 << 20
_DRIVER = ("launch", "upload", "download", "record", "wait")
_LANE = np.dtype(
    [
        (name, "<i8")
        for name in (
            *_DRIVER,
            *("kernel", "threads", "shared_bytes"),
            *("kernels", "copies"),
            "to_host",
            *("bases", "ring", "places", "place_bytes"),
            *("plane_bytes", "word_bytes"),
            *("chunk_tokens", "tile_tokens", "row_tiles"),
            *("yield_bytes", "slab_bytes"),
            *("pieces_begun", "unyielded_bytes"),
        )
    ]
    + [("filled", "<i8", (MAX_PLACES,)), ("emptied", "<i8", (MAX_PLACES,))]
)
"""As `Lane` in native/device.c."""
_COPY = np.dtype(
    [
        (name, "<i8")
        for name in (
            *("runs", "run_count", "base", "slabs_from"),
            *("blocks", "meta"),
            *("table_host", "table_device", "table_bytes"),
            *("first_plane", "end_plane", "planes_in_piece", "runs_in_piece"),
        )
    ]
)
"""As `Copy` there."""
_NAMES = {
    False: (
        ("libcuda.so.1",),
        *("cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuStreamWaitEvent"),
        "cuThreadExchangeStreamCaptureMode",
    ),
    True: (
        ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"),
        *("hipModuleLaunchKernel", "hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync", "hipEventRecord", "hipStreamWaitEvent"),
        "hipThreadExchangeStreamCaptureMode",
    ),
}
"""Whether it is HIP -> names of the library, of what `_DRIVER` stands for, and of what sets a thread's capture mode."""
_THREAD_LOCAL = 1


@dataclass(frozen=True)
class Shape:
    """What all planes of paged KV share, in words of `word_bytes`."""

    word_bytes: int
    block_stride: int
    token_stride: int
    head_stride: int
    head_words: int
    row_words: int


@dataclass(frozen=True)
class Tables:
    """Where a copy's block table and its runs' (first token, count, token in slot) are: addresses.

    upload_bytes: what has to go from `host` to the device first; `blocks` and `meta` lie in it.
    """

    host: int
    blocks: int
    meta: int
    upload_bytes: int


class Driver:
    """The GPU's driver: CUDA's, or HIP's.

    functions: addresses of those that `Launcher` needs.

    Raises:
        OSError, AttributeError: no such library, no such function in it.
    """

    def __init__(self, hip: bool) -> None:
        names, *functions, exchange = _NAMES[hip]
        library = _library(names)  # for good: libraries are never unloaded
        self._exchange = getattr(library, exchange)
        self.functions = tuple(ctypes.cast(getattr(library, one), ctypes.c_void_p).value or 0 for one in functions)

    @contextmanager
    def beside_captures(self) -> Iterator[None]:
        """See the function of that name."""
        mode = ctypes.c_int(_THREAD_LOCAL)
        self._exchange(ctypes.byref(mode))
        try:
            yield
        finally:
            self._exchange(ctypes.byref(mode))


def _library(names: Sequence[str]) -> ctypes.CDLL:
    for name in names[:-1]:
        with suppress(OSError):
            return ctypes.CDLL(name)
    return ctypes.CDLL(names[-1])


@cache
def find_driver(hip: bool) -> Driver | None:
    """The driver; None, and a line in the log, where it cannot be reached past PyTorch."""
    try:
        return Driver(hip)
    except (OSError, AttributeError) as error:
        logger.warning(
            "The GPU's driver is not reached: copies take more CPU time, and must not meet a capture: %s", error
        )
        return None


def beside_captures(device: str) -> AbstractContextManager[None]:
    """For a thread that uses a GPU while the engine may be capturing CUDA graphs in another one; nothing for a CPU.

    What the thread does inside is no part of such captures. By default memory that is allocated or registered, a kernel that is
    loaded or an event that is waited for, anywhere in the process, makes them fail.
    """
    if device == "cpu":
        return nullcontext()
    import torch

    driver = find_driver(torch.version.hip is not None)
    return nullcontext() if driver is None else driver.beside_captures()


def staging_bytes() -> int:
    """Device memory of one copier, both directions together: LMCACHE_GPU_STAGING_MB, or 128 MiB.

    Raises:
        LayoutError: it is set to something else than a number of MiB.
    """
    text = os.environ.get("LMCACHE_GPU_STAGING_MB", "").strip() or "128"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise LayoutError(
            f"LMCACHE_GPU_STAGING_MB is {text!r}: give a whole number of MiB, at least 1, or leave it out (128)"
        )
    return int(text) << 20


class Launcher:
    """One lane's. driver: `Driver.functions`. filled, emptied: events of its ring's places, as the driver knows
    them. fields: the rest of `_LANE`. Only where there is native code of ours.
    """

    def __init__(self, driver: Sequence[int], filled: Sequence[int], emptied: Sequence[int], **fields: int) -> None:
        self._launch_copy = load_native().launch_copy
        self._lane, self._copy = np.zeros(1, _LANE), np.zeros(1, _COPY)
        lane = self._lane[0]
        for field, value in (*zip(_DRIVER, driver, strict=True), *fields.items()):
            lane[field] = value
        lane["filled"][: len(filled)], lane["emptied"][: len(emptied)] = filled, emptied
        self._arguments = (self._lane.ctypes.data, self._lane.nbytes, self._copy.ctypes.data, self._copy.nbytes)

    def launch(self, base: int, slabs_from: int, tables: Tables, runs: Runs, planes: range, runs_in_piece: int) -> None:
        """Everything of these planes (`planes.step` a piece) and runs. slabs_from: 0, or where registrations begin.

        Raises:
            RuntimeError: the driver's; what was launched before is under way.
        """
        runs = np.ascontiguousarray(runs)
        self._copy[0] = (
            *(runs.ctypes.data, len(runs), base, slabs_from),
            *(tables.blocks, tables.meta, tables.host, tables.blocks, tables.upload_bytes),
            *(planes.start, planes.stop, planes.step, runs_in_piece),
        )
        error = self._launch_copy(*self._arguments)
        if error:
            raise RuntimeError(f"the GPU's driver refused a copy: error {error}")

    def copies_right(
        self, shape: Shape, chunk_tokens: int, runs_in_piece: int, planes: range, last: torch.cuda.Stream
    ) -> bool:
        """Whether a row of random bytes goes through each plane to where it belongs. last: the stream of a piece's last step.
        The engine's KV is not touched."""
        import torch

        lane, device, count = self._lane[0], last.device, planes.stop
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shape.word_bytes]
        span = (shape.row_words // shape.head_words - 1) * shape.head_stride + shape.head_words
        if count * span * shape.word_bytes > _MOST_TRIAL_BYTES:
            return False
        # Made and compared on the host: PyTorch's kernels for it keep 92 MiB of an H200 where nobody else has loaded them.
        drawn = np.random.default_rng().integers(-128, 128, (count, span * shape.word_bytes), dtype=np.int8)
        expected = _rows(torch.from_numpy(drawn).view(words), shape)
        slot = torch.full((int(lane["plane_bytes"]) * count,), 90, dtype=torch.int8)
        in_slot = slot.view(words).view(count, chunk_tokens, -1)[:, -1]
        if not lane["to_host"]:
            in_slot.copy_(expected)
            drawn = np.full_like(drawn, -1)
        paged = torch.from_numpy(drawn).to(device)
        bases = torch.tensor([plane.data_ptr() for plane in paged], device=device)
        host = torch.tensor([0, 0, 1, chunk_tokens - 1])  # the block table, and the run's meta
        on_device = torch.empty_like(host, device=device)
        tables = Tables(host.data_ptr(), on_device.data_ptr(), on_device.data_ptr() + 8, 8 * len(host))
        run = np.array([[0, *host[1:]]], dtype=np.int64)
        torch.cuda.current_stream().synchronize()
        real, lane["bases"] = int(lane["bases"]), bases.data_ptr()
        try:
            self.launch(slot.data_ptr(), 0, tables, run, planes, runs_in_piece)
            last.synchronize()
        finally:
            lane["bases"] = real
        return bool(torch.equal(in_slot if lane["to_host"] else _rows(paged.cpu().view(words), shape), expected))


def _rows(paged: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The heads of one token of each plane, side by side: [planes, words of a row]."""
    planes, span = paged.shape
    heads = shape.row_words // shape.head_words
    rows = paged.as_strided((planes, heads, shape.head_words), (span, shape.head_stride, 1))
    return rows.reshape(planes, -1)
