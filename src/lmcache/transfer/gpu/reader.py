"""Loads from extents that hold other layers or KV heads, too: those that ranks of another parallel split have stored.

The copy engine moves contiguous bytes, and of such an extent it would move all heads to use some. So a kernel reads the wanted
ones directly from the registered arena. It has few programs, which are enough for PCIe, and leaves the others' place to the
engine's kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from lmcache.errors import LayoutError
from lmcache.transfer.bounds import Blocks, Bounds, Runs
from lmcache.transfer.gpu.driver import using_device
from lmcache.transfer.gpu.kernel import WARPS, WORD_TYPES, kernel_constants
from lmcache.transfer.gpu.launch import Shape
from lmcache.transfer.gpu.pinned import PinnedArena
from lmcache.transfer.paged import ExtentShape, PagedKV
from lmcache.transfer.progress import Progress

_PROGRAMS = 32
"""Each has 16 KiB in flight, so together they have 6 times what PCIe needs at its latency of some microseconds."""


@triton.jit(do_not_specialize=["items", "planes", "tiles"])  # type: ignore[untyped-decorator]
def read_kernel(  # type: ignore[no-untyped-def]
    bases,
    offsets,
    extents,
    blocks,
    meta,
    items,
    planes,
    tiles,
    EXTENT_ROW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Copy items (chunk, plane, tile): TOKENS rows of one plane of one chunk, by all programs in turns. Strides are in words of
    type WORD.

    extents: address of each chunk's extent. offsets: where each plane's first wanted word is in an extent, in bytes. EXTENT_ROW:
    words from token to token there. The rest is as in `kernel.copy_kernel`.
    """
    row_tiles: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        plane = (item // tiles) % planes
        chunk = item // tiles // planes
        word = (tile % row_tiles) * WORDS + tl.arange(0, WORDS)
        first = tl.load(meta + chunk * 3)
        count = tl.load(meta + chunk * 3 + 1)
        in_extent = tl.load(meta + chunk * 3 + 2)
        token = (tile // row_tiles) * TOKENS + tl.arange(0, TOKENS)
        live = token < count
        position = first + token
        block = tl.load(blocks + position // BLOCK_TOKENS, mask=live, other=0)
        row = block * BLOCK_STRIDE + (position % BLOCK_TOKENS) * TOKEN_STRIDE
        column = (word // HEAD_WORDS).to(tl.int64) * HEAD_STRIDE + word % HEAD_WORDS
        paged = tl.load(bases + plane).to(tl.pointer_type(WORD)) + row[:, None] + column[None, :]
        start = (tl.load(extents + chunk) + tl.load(offsets + plane)).to(tl.pointer_type(WORD))
        stored = start + ((in_extent + token) * EXTENT_ROW)[:, None] + word[None, :]
        mask = live[:, None] & (word < ROW_WORDS)[None, :]
        tl.store(paged, tl.load(stored, mask=mask), mask=mask)


class CudaReader:
    """Fills a part of a rank's paged KV from extents of another shape. Several threads may call it at the same time.

    part: what is filled. planes: its strides, which all planes share. shape: of the extents.
    """

    def __init__(
        self, part: PagedKV, planes: Shape, shape: ExtentShape, chunk_tokens: int, arena: PinnedArena, stream: Any
    ) -> None:
        self._device, self._arena, self._stream = torch.device(part.device), arena, stream
        self._bounds = Bounds(part, chunk_tokens, shape.size_bytes)
        self._extent_bytes, self._keepalive = shape.size_bytes, part
        rows = {row for _, row in shape.planes}
        if len(rows) != 1:
            raise LayoutError("extents whose planes have rows of different sizes cannot be loaded into a GPU")
        words = _in_smaller_words(planes, [*rows, *(start for start, _ in shape.planes)])
        constants = kernel_constants(words, chunk_tokens, part.block_tokens, to_host=False)
        unused = ("CHUNK_TOKENS", "TO_STAGING")
        self._constants = {name: value for name, value in constants.items() if name not in unused}
        self._constants["EXTENT_ROW"] = rows.pop() // words.word_bytes
        with using_device(self._device):
            numbers = [[plane.address for plane in part.planes], [start for start, _ in shape.planes]]
            self._bases, self._offsets = torch.tensor(numbers, dtype=torch.int64).to(self._device)

    def scatter(
        self, base: int, blocks: Blocks, runs: Runs, *, arena_bytes: int | None = None, progress: Progress | None = None
    ) -> None:
        """Copy tokens of extents into paged KV, as a copier does; `progress` is not told of layers.

        Raises:
            LayoutError: a block, token or extent is out of bounds; nothing was copied.
            RuntimeError: the device failed.
        """
        blocks, runs = self._bounds.checked(base, blocks, runs, arena_bytes)
        if not len(runs):
            return
        constants = self._constants
        row_tiles = -(-constants["ROW_WORDS"] // constants["WORDS"])
        tiles = -(-int(runs[:, 2].max()) // constants["TOKENS"]) * row_tiles
        items = tiles * len(self._bases) * len(runs)
        with using_device(self._device), torch.cuda.stream(self._stream):
            extents, kept = self._reachable(base, runs[:, 0])
            table = np.concatenate([extents, runs[:, 1:].ravel(), blocks.astype(np.int64)])
            on_device = torch.from_numpy(table).to(self._device)
            first, second = len(runs), 4 * len(runs)
            read_kernel[(min(items, _PROGRAMS),)](
                self._bases,
                self._offsets,
                on_device[:first],
                on_device[second:],
                on_device[first:second],
                items,
                len(self._bases),
                tiles,
                **constants,
                num_warps=WARPS,
            )
            self._stream.synchronize()
            del kept  # copies of extents, which the kernel has read

    def _reachable(self, base: int, offsets: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, list[torch.Tensor]]:
        """Return the addresses of extents for a kernel, and copies in GPU memory of those that the device cannot reach: they are
        not registered yet, or lie in a buffer of payload frames."""
        addresses, copies = base + offsets, []
        for number, offset in enumerate(offsets.tolist()):
            if not self._arena.covers(base, offset, self._extent_bytes):
                pieces = [piece.to(self._device) for piece in self._arena.pieces(base, offset, self._extent_bytes)]
                copies.append(torch.cat(pieces))
                addresses[number] = copies[-1].data_ptr()
        return addresses, copies


def _in_smaller_words(shape: Shape, numbers: list[int]) -> Shape:
    """Return the shape in the largest words that also divide these numbers of bytes."""
    word = shape.word_bytes
    while any(number % word for number in numbers):
        word //= 2
    times = shape.word_bytes // word
    strides = (shape.block_stride, shape.token_stride, shape.head_stride, shape.head_words, shape.row_words)
    assert word in WORD_TYPES
    return Shape(word, *(times * one for one in strides))
