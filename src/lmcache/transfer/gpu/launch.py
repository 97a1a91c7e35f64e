"""Launches the pieces of a GPU copy from C, by calls to the driver (`native/device.c`).

No release of Triton guarantees how it lays out a kernel's parameters. So a launcher is used only after `Launcher.copies_right`
has sent random bytes through the ring and received them unchanged; otherwise the ring launches its pieces from Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmcache.compiled import native
from lmcache.errors import LayoutError
from lmcache.transfer.bounds import Runs

if TYPE_CHECKING:
    import torch

MAX_PLACES = 64
_MOST_TRIAL_BYTES = 64 << 20
_DRIVER = ("launch", "upload", "download", "record", "wait")
"""The driver's functions that C calls, in the order of `Driver.functions`."""


def _layout(name: str) -> np.dtype[np.void]:
    """Return the dtype of the C struct `name` of native/device.c: 64-bit numbers, and arrays of a ring's events."""
    fields = native.layouts[name]
    return np.dtype([(field, "<i8") if count == 1 else (field, "<i8", (count,)) for field, count in fields])


@dataclass(frozen=True)
class Shape:
    """The strides and sizes that all planes of paged KV share, in words of `word_bytes` bytes."""

    word_bytes: int
    block_stride: int
    token_stride: int
    head_stride: int
    head_words: int
    row_words: int


@dataclass(frozen=True)
class Tables:
    """Addresses of a copy's block table and of (first token, token count, token in extent) of its runs.

    upload_bytes: bytes to upload from `host` to the device first; `blocks` and `meta` lie in the upload.
    """

    host: int
    blocks: int
    meta: int
    upload_bytes: int


def staging_bytes() -> int:
    """Return the device memory of one copier for both directions: LMCACHE_GPU_STAGING_MB, or 128 MiB.

    Raises:
        LayoutError: the setting is not a positive number of MiB.
    """
    text = os.environ.get("LMCACHE_GPU_STAGING_MB", "").strip() or "128"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise LayoutError(
            f"LMCACHE_GPU_STAGING_MB is {text!r}: give a whole number of MiB, at least 1, or leave it out (128)"
        )
    return int(text) << 20


class Launcher:
    """Launches the pieces of one staging ring from C.

    driver: `Driver.functions`. filled, emptied: the driver's handles of the events of the ring's places.
    fields: the other fields of the C struct.
    """

    def __init__(self, driver: Sequence[int], filled: Sequence[int], emptied: Sequence[int], **fields: int) -> None:
        self._ring, self._copy = np.zeros(1, _layout("ring")), np.zeros(1, _layout("copy"))
        ring = self._ring[0]
        for field, value in (*zip(_DRIVER, driver, strict=True), *fields.items()):
            ring[field] = value
        ring["filled"][: len(filled)], ring["emptied"][: len(emptied)] = filled, emptied
        self._arguments = (self._ring.ctypes.data, self._ring.nbytes, self._copy.ctypes.data, self._copy.nbytes)

    def launch(
        self, base: int, registered_from: int, tables: Tables, runs: Runs, planes: range, runs_in_piece: int
    ) -> None:
        """Launch the planes `planes` of these runs, `planes.step` planes a piece.

        registered_from: address where registrations with the driver begin; 0: `base` is not registered.

        Raises:
            RuntimeError: the driver refused a piece. The pieces before it are in flight.
        """
        runs = np.ascontiguousarray(runs)
        self._copy[0] = (
            *(runs.ctypes.data, len(runs), base, registered_from),
            *(tables.blocks, tables.meta, tables.host, tables.blocks, tables.upload_bytes),
            *(planes.start, planes.stop, planes.step, runs_in_piece),
        )
        error = native.launch_copy(*self._arguments)
        if error:
            raise RuntimeError(f"the GPU's driver refused a copy: error {error}")

    def copies_right(
        self, shape: Shape, chunk_tokens: int, runs_in_piece: int, planes: range, last: torch.cuda.Stream
    ) -> bool:
        """Return whether a row of random bytes passes through each plane to the right address. last: the stream of a piece's
        second step. The engine's KV is not touched."""
        import torch

        ring, device, count = self._ring[0], last.device, planes.stop
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shape.word_bytes]
        span = (shape.row_words // shape.head_words - 1) * shape.head_stride + shape.head_words
        if count * span * shape.word_bytes > _MOST_TRIAL_BYTES:
            return False
        # Made and compared on the host: PyTorch's kernels for it take 92 MiB of an H200 that nothing else may have loaded.
        drawn = np.random.default_rng().integers(-128, 128, (count, span * shape.word_bytes), dtype=np.int8)
        expected = _rows(torch.from_numpy(drawn).view(words), shape)
        extent = torch.full((int(ring["plane_bytes"]) * count,), 90, dtype=torch.int8)
        in_extent = extent.view(words).view(count, chunk_tokens, -1)[:, -1]
        if not ring["to_host"]:
            in_extent.copy_(expected)
            drawn = np.full_like(drawn, -1)
        paged = torch.from_numpy(drawn).to(device)
        bases = torch.tensor([plane.data_ptr() for plane in paged], device=device)
        host = torch.tensor([0, 0, 1, chunk_tokens - 1])  # the block table, then the run's meta
        on_device = torch.empty_like(host, device=device)
        tables = Tables(host.data_ptr(), on_device.data_ptr(), on_device.data_ptr() + 8, 8 * len(host))
        run = np.array([[0, *host[1:]]], dtype=np.int64)
        torch.cuda.current_stream().synchronize()
        real, ring["bases"] = int(ring["bases"]), bases.data_ptr()
        try:
            self.launch(extent.data_ptr(), 0, tables, run, planes, runs_in_piece)
            last.synchronize()
        finally:
            ring["bases"] = real
        return bool(torch.equal(in_extent if ring["to_host"] else _rows(paged.cpu().view(words), shape), expected))


def _rows(paged: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return the heads of one token of each plane side by side: [planes, words of a row]."""
    planes, span = paged.shape
    heads = shape.row_words // shape.head_words
    rows = paged.as_strided((planes, heads, shape.head_words), (span, shape.head_stride, 1))
    return rows.reshape(planes, -1)
