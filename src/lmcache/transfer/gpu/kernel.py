"""The Triton kernel that moves tokens between paged KV and the staging ring.

The kernel knows blocks, tokens, heads and strides and uses nothing specific to CUDA: ROCm's Triton runs it too (untested).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lmcache.transfer.gpu.launch import Shape

WARPS = 8
_TILE_WORDS = 2048
WORD_TYPES: dict[int, tuple[torch.dtype, Any]] = {
    8: (torch.int64, tl.int64),
    4: (torch.int32, tl.int32),
    2: (torch.int16, tl.int16),
    1: (torch.int8, tl.int8),
}
"""Maps the bytes of a word to its types in PyTorch and in Triton."""


@triton.jit(do_not_specialize=["blocks", "meta", "first_plane"])  # type: ignore[untyped-decorator]
def copy_kernel(  # type: ignore[no-untyped-def]
    bases,
    blocks,
    meta,
    staging,
    first_plane,
    piece_words,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TO_STAGING: tl.constexpr,
    WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program (tile, plane, chunk) copies TOKENS rows of one plane of one chunk. Strides are in words of type WORD.

    `meta` holds (first_token, token_count, token_in_extent) for each chunk. A row is the heads x dims of one token in one plane.
    A copy to the staging ring writes all rows of the chunk, and zeros for tokens outside the run: the complete piece goes to
    the extent, and the ring may still hold another prompt's KV. What a model fixes is a compile-time constant, because fewer
    arguments make a launch cheaper, and launches take most of the time of this code.
    """
    row_tiles: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    tile = tl.program_id(0) // row_tiles
    word = (tl.program_id(0) % row_tiles) * WORDS + tl.arange(0, WORDS)
    plane = tl.program_id(1)
    chunk = tl.program_id(2)
    first = tl.load(meta + chunk * 3)
    count = tl.load(meta + chunk * 3 + 1)
    in_extent = tl.load(meta + chunk * 3 + 2)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    if TO_STAGING:
        token = token - in_extent
    live = (token >= 0) & (token < count)
    position = first + token
    block = tl.load(blocks + position // BLOCK_TOKENS, mask=live, other=0)
    row = block * BLOCK_STRIDE + (position % BLOCK_TOKENS) * TOKEN_STRIDE
    column = (word // HEAD_WORDS).to(tl.int64) * HEAD_STRIDE + word % HEAD_WORDS
    paged = tl.load(bases + first_plane + plane).to(tl.pointer_type(WORD)) + row[:, None] + column[None, :]
    extent_row = (plane * CHUNK_TOKENS + in_extent + token) * ROW_WORDS
    staged = staging + chunk.to(tl.int64) * piece_words + extent_row[:, None] + word[None, :]
    in_row = (word < ROW_WORDS)[None, :]
    mask = live[:, None] & in_row
    if TO_STAGING:
        tl.store(staged, tl.load(paged, mask=mask, other=0), mask=(in_extent + token < CHUNK_TOKENS)[:, None] & in_row)
    else:
        tl.store(paged, tl.load(staged, mask=mask), mask=mask)


def kernel_constants(shape: Shape, chunk_tokens: int, block_tokens: int, to_host: bool) -> dict[str, Any]:
    """Return the compile-time constants of the kernel."""
    words = min(triton.next_power_of_2(shape.row_words), 1024)
    return {
        "CHUNK_TOKENS": chunk_tokens,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_STRIDE": shape.block_stride,
        "TOKEN_STRIDE": shape.token_stride,
        "HEAD_STRIDE": shape.head_stride,
        "HEAD_WORDS": shape.head_words,
        "ROW_WORDS": shape.row_words,
        "TO_STAGING": to_host,
        "WORD": WORD_TYPES[shape.word_bytes][1],
        "TOKENS": max(1, _TILE_WORDS // words),
        "WORDS": words,
    }
