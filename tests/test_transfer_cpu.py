"""CPU copies against plain index arithmetic, byte for byte, over every layout that the description allows."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.compiled import native
from lmcache.errors import LayoutError
from lmcache.transfer.bounds import Bounds
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import ExtentShape, PagedKV, Plane
from lmcache.transfer.progress import Progress

Bytes = npt.NDArray[np.uint8]
POISON = 0xA5
GUARD = 192  # bytes between planes and around slots that nobody may touch

# Axes from the widest step to the narrowest: b(lock), g (token group), t(oken), h(ead), D (dim group), d(im).
ORDERS = {
    "NHD": "bgthDd",
    "HND": "bhgtDd",
    "K transposed": "bhDdgt",
    "dim pairs": "bhDgtd",
    "token pairs": "bhgDdt",
    "dim tiles of token pairs": "bhDgdt",
    "tokens outside blocks": "gtbhDd",
    "heads outside blocks": "hbgtDd",
}


@dataclass(frozen=True)
class Shape:
    order: str
    planes: int
    num_blocks: int
    block_tokens: int
    token_group: int
    heads: int
    dims: int
    dim_group: int
    item_bytes: int
    padding: int = 0  # bytes behind the widest-but-one axis, as for a slice of a larger tensor


def build(shape: Shape, memory: Bytes | None = None) -> tuple[PagedKV, Bytes]:
    """Paged KV of that shape over its own bytes, `GUARD` before, between and behind the planes."""
    counts = {
        "b": shape.num_blocks,
        "g": shape.block_tokens // shape.token_group,
        "t": shape.token_group,
        "h": shape.heads,
        "D": shape.dims // shape.dim_group,
        "d": shape.dim_group,
    }
    strides, step = {}, shape.item_bytes
    for place, axis in enumerate(reversed(shape.order)):
        strides[axis] = step
        step = step * counts[axis] + (shape.padding if place == 4 else 0)
    plane_bytes = -(-step // 64) * 64 + GUARD
    memory = np.zeros(GUARD + plane_bytes * shape.planes, dtype=np.uint8) if memory is None else memory
    start = memory.ctypes.data + GUARD
    planes = tuple(
        Plane(
            address=start + number * plane_bytes,
            block_stride=strides["b"],
            token_group=shape.token_group,
            group_stride=strides["g"],
            token_stride=strides["t"],
            heads=shape.heads,
            head_stride=strides["h"],
            dims=shape.dims,
            dim_group=shape.dim_group,
            dim_group_stride=strides["D"],
            dim_stride=strides["d"],
        )
        for number in range(shape.planes)
    )
    return PagedKV(planes, shape.block_tokens, shape.num_blocks, shape.item_bytes, memory), memory


def element_bytes(
    paged: PagedKV, memory: Bytes, chunk_tokens: int, blocks: list[int], run: tuple[int, int, int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For every byte of a run: its index in the paged memory, and its index in the arena."""
    offset, first, count, in_extent = run
    inside = []
    in_arena = []
    plane_offset = 0
    item = np.arange(paged.item_bytes)
    for plane in paged.planes:
        t, h, d, i = np.ix_(np.arange(count), np.arange(plane.heads), np.arange(plane.dims), item)
        block = np.array(blocks, dtype=np.int64)[(first + t) // paged.block_tokens]
        token = (first + t) % paged.block_tokens
        inside.append(
            (plane.address - memory.ctypes.data)
            + block * plane.block_stride
            + (token // plane.token_group) * plane.group_stride
            + (token % plane.token_group) * plane.token_stride
            + h * plane.head_stride
            + (d // plane.dim_group) * plane.dim_group_stride
            + (d % plane.dim_group) * plane.dim_stride
            + i
        )
        element = ((in_extent + t) * plane.heads + h) * plane.dims + d
        in_arena.append(offset + plane_offset + element * paged.item_bytes + i)
        plane_offset += chunk_tokens * plane.heads * plane.dims * paged.item_bytes
    return (
        np.concatenate([index.ravel() for index in inside]) if inside else np.zeros(0, np.int64),
        np.concatenate([index.ravel() for index in in_arena]),
    )


@dataclass(frozen=True)
class Case:
    shape: Shape
    chunk_tokens: int
    blocks: list[int]
    runs: list[tuple[int, int, int, int]]
    arena_bytes: int
    shift: int  # misalignment of the arena
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_tokens = draw(st.sampled_from([1, 3, 16, 32, 48, 64, 128]))
    dims = draw(st.sampled_from([1, 6, 8, 16, 32, 40, 64]))
    shape = Shape(
        order=draw(st.one_of(st.sampled_from(list(ORDERS.values())), st.permutations("bgthDd").map("".join))),
        planes=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(1, 9)),
        block_tokens=block_tokens,
        token_group=draw(st.sampled_from([g for g in (1, 2, 4, 16, block_tokens) if block_tokens % g == 0])),
        heads=draw(st.integers(1, 4)),
        dims=dims,
        dim_group=draw(st.sampled_from([g for g in (1, 2, 4, 16, dims) if dims % g == 0])),
        item_bytes=draw(st.sampled_from([1, 2, 4, 8])),
        padding=draw(st.sampled_from([0, 0, 64, 24])),
    )
    chunk_tokens = draw(st.integers(1, 300))
    blocks = draw(st.permutations(range(shape.num_blocks)))
    blocks = blocks[: draw(st.integers(1, len(blocks)))]
    table_tokens = len(blocks) * block_tokens
    shard_bytes = shape.planes * shape.heads * shape.dims * shape.item_bytes * chunk_tokens
    step = -(-shard_bytes // 64) * 64 + GUARD
    runs, token, extent = [], draw(st.integers(0, table_tokens)), 0
    for _ in range(draw(st.integers(0, 4))):
        count = draw(st.integers(0, min(chunk_tokens, table_tokens - token)))
        in_extent = draw(st.integers(0, chunk_tokens - count))
        runs.append((GUARD + extent * step, token, count, in_extent))
        token = min(table_tokens, token + count + draw(st.integers(0, 5)))
        extent += 1
    shift = draw(st.sampled_from([0, 0, 0, 4, 1]))
    return Case(shape, chunk_tokens, blocks, runs, GUARD + max(extent, 1) * step, shift, draw(st.integers(0, 1 << 30)))


def aligned(size: int, shift: int = 0) -> Bytes:
    """`size` bytes that start `shift` behind a page."""
    raw = np.zeros(size + 4096 + shift, dtype=np.uint8)
    start = -raw.ctypes.data % 4096 + shift
    return raw[start : start + size]


def copiers(paged: PagedKV, chunk_tokens: int) -> dict[str, CpuCopier]:
    """One for every instruction set that this machine has."""
    found = {}
    for name, number in native.copy_isas().items():
        found[name] = CpuCopier(paged, chunk_tokens)
        found[name]._isa = number
    return found


def check(case: Case) -> None:
    random = np.random.default_rng(case.seed)
    paged, memory = build(case.shape)
    source_arena = aligned(case.arena_bytes, case.shift)
    source_arena[:] = random.integers(0, 256, len(source_arena), dtype=np.uint8)
    source_paged = random.integers(0, 256, len(memory), dtype=np.uint8)
    blocks = np.array(case.blocks, dtype=np.int32)
    runs = np.array(case.runs, dtype=np.int64).reshape(-1, 4)

    wanted_arena = np.full(len(source_arena), POISON, dtype=np.uint8)
    wanted_paged = np.full(len(memory), POISON, dtype=np.uint8)
    for run in case.runs:
        inside, in_arena = element_bytes(paged, memory, case.chunk_tokens, case.blocks, run)
        wanted_arena[in_arena] = source_paged[inside]
        wanted_paged[inside] = source_arena[in_arena]

    for name, copier in copiers(paged, case.chunk_tokens).items():
        memory[:] = source_paged
        arena = aligned(case.arena_bytes, case.shift)
        arena[:] = POISON
        copier.gather(arena.ctypes.data, blocks, runs, arena_bytes=len(arena))
        assert np.array_equal(arena, wanted_arena), f"gather by {name}"
        assert np.array_equal(memory, source_paged), f"gather by {name} wrote into paged memory"

        memory[:] = POISON
        before = source_arena.copy()
        copier.scatter(source_arena.ctypes.data, blocks, runs, arena_bytes=len(arena))
        assert np.array_equal(memory, wanted_paged), f"scatter by {name}"
        assert np.array_equal(before, source_arena), f"scatter by {name} wrote into the slot"


@given(case=cases())
@settings(max_examples=250, deadline=None)
def test_every_layout_byte_for_byte(case: Case) -> None:
    check(case)


# (order, token_group, dim_group, item_bytes): the layouts that engines really have, at sizes that reach the fast paths.
REAL = {
    "NHD bf16": ("bgthDd", 1, 1, 2),
    "HND bf16": ("bhgtDd", 1, 1, 2),
    "K transposed fp32": ("bhDdgt", 1, 1, 4),
    "K transposed bf16": ("bhDdgt", 1, 1, 2),
    "K transposed fp8": ("bhDdgt", 1, 1, 1),
    "K tiles of dim pairs bf16": ("bhgDtd", 16, 2, 2),
    "V tiles of token pairs bf16": ("bhDgdt", 2, 16, 2),
    "K dim quads fp8": ("bhDgtd", 1, 4, 1),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dims", [64, 72, 128])
@pytest.mark.parametrize("block_tokens", [16, 128])
@pytest.mark.parametrize("shift", [0, 4])
def test_real_layouts(name: str, dims: int, block_tokens: int, shift: int) -> None:
    order, token_group, dim_group, item_bytes = REAL[name]
    dim_group = dim_group if dims % dim_group == 0 else 8
    shape = Shape(order, 2, 640 // block_tokens, block_tokens, token_group, 2, dims, dim_group, item_bytes)
    extent = 2 * 2 * dims * item_bytes * 256
    blocks = np.random.default_rng(1).permutation(shape.num_blocks).tolist()
    # A whole chunk, one that ends inside a block, a few tokens inside a block.
    runs = [(GUARD, 0, 256, 0), (2 * GUARD + extent, 256, 211, 0), (3 * GUARD + 2 * extent, 500, 7, 100)]
    check(Case(shape, 256, blocks, runs, 4 * GUARD + 3 * extent, shift, 7))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("parts", [(2, 2, 2), (1, 1, 1, 1, 1, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("dims", [16, 64, 128])
def test_several_extents_fill_the_planes_as_one_does(
    monkeypatch: pytest.MonkeyPatch, name: str, parts: tuple[int, ...], dims: int
) -> None:
    """Each extent has some of the heads, and one head more that is not wanted. Runs begin and end inside blocks."""
    order, token_group, dim_group, item_bytes = REAL[name]
    paged, memory = build(Shape(order, 3, 40, 16, token_group, 6, dims, dim_group, item_bytes))
    whole = np.random.default_rng(1).integers(0, 256, (2, 3, 256, 6, dims * item_bytes), dtype=np.uint8)
    blocks = np.random.default_rng(2).permutation(40).astype(np.int32)
    runs = np.array([(0, 3, 250, 5), (whole[0].nbytes, 260, 201, 55)], dtype=np.int64)
    memory[:] = POISON
    CpuCopier(paged, 256).scatter(whole.ctypes.data, blocks, runs, arena_bytes=whole.nbytes)
    wanted, arenas, sources, at = memory.copy(), [], [], 0
    for heads in parts:
        held = whole[:, :, :, range(at - 1, at + heads)]
        row = (heads + 1) * dims * item_bytes
        places = tuple((plane * 256 * row + dims * item_bytes, row) for plane in range(3))
        sources.append((paged.part(0, 3, at, at + heads), ExtentShape(places, 3 * 256 * row)))
        arenas.append(held.reshape(2, -1))
        at += heads
    largest = max(shape.size_bytes for _, shape in sources)
    arena = aligned(2 * len(parts) * largest)
    for number, one in enumerate(arenas):
        for chunk in range(2):
            offset = (chunk * len(parts) + number) * largest
            arena[offset : offset + one.shape[1]] = one[chunk]
    rows = np.repeat(runs, len(parts), axis=0)
    rows[:, 0] = np.arange(len(rows)) * largest
    monkeypatch.setattr("lmcache.transfer.cpu._GROUP_BYTES", 1)
    monkeypatch.setattr("lmcache.transfer.cpu._SPLIT_BYTES", 1)
    for copier in (*copiers(paged, 256).values(), CpuCopier(paged, 256, threads=2)):
        for progress in (None, Progress()):
            memory[:] = POISON
            reading = copier.reader(*sources)
            reading.scatter(arena.ctypes.data, blocks, rows, arena_bytes=len(arena), progress=progress)
            assert np.array_equal(memory, wanted)
        copier.close()


def test_extents_that_do_not_belong_together_are_refused() -> None:
    paged, memory = small()
    arena = np.zeros(paged.shard_bytes(16), dtype=np.uint8)
    halves = [(paged.part(0, 2, head, head + 1), ExtentShape(((0, 16), (256, 16)), 512)) for head in range(2)]
    reading = CpuCopier(paged, 16).reader(*halves)
    for rows in ([(0, 0, 16, 0)], [(0, 0, 16, 0), (512, 0, 15, 0)], [(0, 0, 15, 0), (512, 0, 15, 1)]):
        with pytest.raises(LayoutError, match="2 extents"):
            reading.scatter(arena.ctypes.data, np.zeros(1, np.int32), np.array(rows, dtype=np.int64))
    assert not memory.any()


def small() -> tuple[PagedKV, Bytes]:
    return build(Shape("bgthDd", 2, 4, 16, 1, 2, 8, 1, 2))


def test_sizes() -> None:
    paged, _ = small()
    assert paged.token_bytes == 2 * 2 * 8 * 2
    assert paged.shard_bytes(256) == 256 * 64


def test_mla_has_one_plane_a_layer() -> None:
    shape = Shape("bgthDd", 3, 5, 64, 1, 1, 576, 1, 2)
    check(Case(shape, 100, [4, 0, 2], [(GUARD, 50, 100, 0)], 2 * GUARD + 3 * 576 * 2 * 100, 0, 3))


def test_planes_of_different_sizes() -> None:
    (k, v), memory = small()[0].planes, small()[1]
    paged = PagedKV((k, dataclasses.replace(v, heads=1)), 16, 4, 2, memory)
    assert paged.token_bytes == (2 * 8 + 8) * 2


def test_strided_is_a_tensor_s_own_strides() -> None:
    plane = Plane.strided(4096, block_stride=4096, token_stride=128, heads=2, head_stride=64, dims=32, dim_stride=2)
    paged = PagedKV((plane,), 16, 2, 2)
    assert paged.token_bytes == 128
    assert plane == Plane(4096, 4096, 1, 128, 128, 2, 64, 32, 1, 2, 2)


def test_native_code_reads_the_fields_of_a_plane_in_their_order() -> None:
    fields = [(field.name, 1) for field in dataclasses.fields(Plane)]
    assert native.layouts["plane"] == [*fields, ("extent_offset", 1), ("extent_row", 1)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"address": 0}, "address is 0"),
        ({"address": -5}, "address is -5"),
        ({"address": (1 << 63) - 100}, "address space"),
        ({"heads": 0}, "heads is 0"),
        ({"dims": -8}, "dims is -8"),
        ({"block_stride": -512}, "block_stride is -512"),
        ({"block_stride": 0}, "block_stride is 0"),
        ({"dim_group_stride": 1}, "dim_group_stride is 1"),
        ({"head_stride": 8}, "head_stride is 8"),
        ({"token_group": 3}, "token_group is 3"),
        ({"dim_group": 5}, "dim_group is 5"),
        ({"dim_group": 0}, "dim_group is 0"),
    ],
)
def test_planes_that_cannot_be(change: dict[str, int], named: str) -> None:
    (k, v), memory = small()[0].planes, small()[1]
    with pytest.raises(LayoutError, match=named):
        PagedKV((k, dataclasses.replace(v, **change)), 16, 4, 2, memory)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"planes": ()}, "has no planes"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"num_blocks": -1}, "num_blocks is -1"),
        ({"item_bytes": 3}, "item_bytes is 3"),
    ],
)
def test_paged_kv_that_cannot_be(change: dict[str, object], named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        dataclasses.replace(small()[0], **change)  # type: ignore[arg-type]


def test_planes_may_not_share_memory() -> None:
    k = small()[0].planes[0]
    with pytest.raises(LayoutError, match="planes 0 and 1"):
        PagedKV((k, k), 16, 4, 2)


@pytest.mark.parametrize(
    ("blocks", "run", "named"),
    [
        ([0, 4], (0, 0, 32, 0), "block 4"),
        ([0, -1], (0, 0, 32, 0), "block -1"),
        ([0, 1], (0, 0, 33, 0), "ends at token 33"),
        ([0, 1], (0, 31, 2, 0), "ends at token 33"),
        ([0, 1], (0, 1 << 62, 2, 0), "block table"),
        ([0, 1], (0, 0, 1 << 62, 1 << 62), "chunk_tokens"),
        ([0, 1], (0, 0, 2, 99), "chunk_tokens"),
        ([0, 1], (0, -1, 2, 0), "-1"),
        ([0, 1], (-4096, 0, 2, 0), "-4096"),
        ([0, 1], (0, 0, -2, 0), "-2"),
        ([0, 1], (4096, 0, 2, 0), "arena"),
        ([], (0, 0, 1, 0), "ends at token 1"),
    ],
)
def test_out_of_bounds_touches_nothing(blocks: list[int], run: tuple[int, ...], named: str) -> None:
    paged, memory = small()
    arena = np.full(100 * 64, POISON, dtype=np.uint8)
    copier = CpuCopier(paged, 100)
    for copy in (copier.gather, copier.scatter):
        with pytest.raises(LayoutError, match=named):
            copy(
                arena.ctypes.data,
                np.array(blocks, dtype=np.int32),
                np.array([(0, 0, 16, 0), run], dtype=np.int64),
                arena_bytes=len(arena),
            )
    assert (arena == POISON).all()
    assert not memory.any()


@pytest.mark.parametrize(
    ("blocks", "runs", "base"),
    [
        (np.zeros((1, 1), np.int32), np.zeros((1, 4), np.int64), 4096),
        (np.zeros(1, np.float32), np.zeros((1, 4), np.int64), 4096),
        (np.zeros(1, np.int32), np.zeros((1, 3), np.int64), 4096),
        (np.zeros(1, np.int32), np.zeros((1, 4), np.int32), 4096),
        (np.zeros(1, np.int32), np.zeros((1, 4), np.int64), 0),
    ],
)
def test_wrong_arguments(blocks: npt.NDArray[np.int32], runs: npt.NDArray[np.int64], base: int) -> None:
    with pytest.raises(LayoutError):
        CpuCopier(small()[0], 100).gather(base, blocks, runs)


def test_native_code_and_numpy_draw_the_same_bounds() -> None:
    """Random runs around every bound: native code alone would let a wrong copy through, and is asked first."""
    paged, rng = small()[0], np.random.default_rng(1)
    bounds, named = Bounds(paged, 100, paged.shard_bytes(100)), Counter[str]()
    for _ in range(4000):
        blocks = rng.choice(np.array([0, 1, 2, 3, 3, 3, -1, 4], np.int32), rng.integers(0, 9))
        runs = rng.integers((0, 0, 0, 0), (3, 40, 30, 90), (rng.integers(0, 4), 4))
        runs[:, 0] *= 3200
        if len(runs) and rng.random() < 0.5:
            odd = rng.choice(np.array([-1, 100, 101, 6400, 6401, 12800, 1 << 62, (1 << 63) - 1]))
            runs[rng.integers(len(runs)), rng.integers(4)] = odd
        arena_bytes = [None, 12800, 100][rng.integers(3)]
        try:
            bounds._check(4096, blocks, runs, arena_bytes)
            named["nothing"] += 1
        except LayoutError as error:
            named[str(error).split(" is ")[0][:8]] += 1
            with pytest.raises(LayoutError, match=re.escape(str(error))):
                bounds.checked(4096, blocks, runs, arena_bytes)
        else:
            bounds._check = mock.Mock(side_effect=AssertionError("only native code is needed"))  # type: ignore[method-assign]
            bounds.checked(4096, blocks, runs, arena_bytes)
            del bounds._check
    assert min(named.values()) > 50 and len(named) == 7, named


def test_blocks_outside_the_runs_do_not_matter() -> None:
    paged, _ = small()
    arena = np.zeros(100 * 64, dtype=np.uint8)
    runs = np.array([(0, 16, 16, 0)], dtype=np.int64)
    CpuCopier(paged, 100).gather(arena.ctypes.data, np.array([-1, 3, 99], dtype=np.int32), runs)


def test_wide_and_strided_arrays_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, memory = small()
    memory[:] = np.arange(len(memory), dtype=np.uint8)
    results = []
    plain = np.array([3, 1], dtype=np.int32), np.array([(0, 0, 32, 0), (6400, 4, 9, 2)], dtype=np.int64)
    wide = np.repeat(plain[0].astype(np.int64), 2)[::2], np.repeat(plain[1], 2, axis=0)[::2]
    for blocks, runs in (plain, wide):
        arena = np.zeros(2 * 100 * 64, dtype=np.uint8)
        CpuCopier(paged, 100).gather(arena.ctypes.data, blocks, runs)  # type: ignore[arg-type]
        results.append(arena)
    assert results[0].any()
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize(("chunk_tokens", "threads"), [(0, 1), (-3, 1), (16, 0)])
def test_copiers_that_cannot_be(chunk_tokens: int, threads: int) -> None:
    with pytest.raises(LayoutError, match=r"is (0|-3)"):
        CpuCopier(small()[0], chunk_tokens, threads)


def test_threads_share_one_call() -> None:
    """Large enough to be split: 2 MiB."""
    shape = Shape("bgthDd", 4, 64, 16, 1, 4, 64, 1, 2)
    paged, memory = build(shape)
    memory[:] = np.random.default_rng(5).integers(0, 256, len(memory), dtype=np.uint8)
    kept = memory.copy()
    blocks = np.random.default_rng(6).permutation(64).astype(np.int32)
    extent = paged.shard_bytes(256)
    runs = np.array([(i * extent, i * 256, 256, 0) for i in range(4)], dtype=np.int64)
    arenas = [np.zeros(4 * extent, dtype=np.uint8) for _ in range(2)]
    for arena, threads in zip(arenas, (1, 3), strict=True):
        CpuCopier(paged, 256, threads).gather(arena.ctypes.data, blocks, runs)
    assert np.array_equal(arenas[0], arenas[1])
    memory[:] = 0
    CpuCopier(paged, 256, 3).scatter(arenas[0].ctypes.data, blocks, runs)
    first, plane_bytes = GUARD, (len(memory) - GUARD) // 4
    for number in range(4):
        body = slice(first + number * plane_bytes, first + (number + 1) * plane_bytes - GUARD)
        assert np.array_equal(memory[body], kept[body])


def test_a_copy_is_made_by_the_threads_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed for want of a thread would be made later all the same, when its memory has another owner."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    paged, memory = build(Shape("bgthDd", 4, 64, 16, 1, 4, 64, 1, 2))
    memory[:] = np.random.default_rng(5).integers(1, 256, len(memory), dtype=np.uint8)
    blocks, runs = np.arange(64, dtype=np.int32), np.array([[0, 0, 1024, 0]], dtype=np.int64)
    arenas = [np.zeros(paged.shard_bytes(1024), dtype=np.uint8) for _ in range(3)]
    CpuCopier(paged, 1024, 1).gather(arenas[0].ctypes.data, blocks, runs)
    copier = CpuCopier(paged, 1024, 3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        copier.gather(arenas[1].ctypes.data, blocks, runs)
    assert np.array_equal(arenas[1], arenas[0])
    arenas[1][:] = 0
    copier.gather(arenas[2].ctypes.data, blocks, runs)
    copier.close()
    assert np.array_equal(arenas[2], arenas[0]) and not arenas[1].any()


def test_one_copier_serves_many_threads() -> None:
    paged, memory = small()
    memory[:] = np.random.default_rng(5).integers(0, 256, len(memory), dtype=np.uint8)
    copier = CpuCopier(paged, 100)
    arena = np.zeros(8 * 6400, dtype=np.uint8)
    start = threading.Barrier(8)

    def copy(number: int) -> None:
        start.wait(timeout=60)
        runs = np.array([(number * 6400, 0, 64, 0)], dtype=np.int64)
        for _ in range(50):
            copier.gather(arena.ctypes.data, np.array([0, 1, 2, 3], dtype=np.int32), runs)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.any()
    assert (arena.reshape(8, -1) == arena[:6400]).all()


def test_the_gil_is_released() -> None:
    """With so long a switch interval a second thread runs only when the first gives the GIL away, and only copies do."""
    paged, _ = build(Shape("bgthDd", 1, 64, 64, 1, 4, 64, 1, 2))
    arena = np.zeros(paged.shard_bytes(4096), dtype=np.uint8)
    copier = CpuCopier(paged, 4096)
    blocks = np.arange(64, dtype=np.int32)
    runs = np.array([(0, 0, 4096, 0)] * 100, dtype=np.int64)  # 200 MiB
    before = sys.getswitchinterval()

    def ran_meanwhile() -> bool:
        ready, start, ran = threading.Event(), threading.Lock(), []
        start.acquire()

        def other() -> None:
            ready.set()
            with start:
                ran.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        ready.wait(timeout=60)
        claimed = np.zeros(1, dtype=np.int64)
        address, tables = copier._planes_address, (blocks.ctypes.data, runs.ctypes.data, len(runs), claimed.ctypes.data)
        start.release()
        native.copy(0, -1, address, 1, 1, 2, 64, arena.ctypes.data, *tables)
        seen = bool(ran)
        thread.join()
        return seen

    sys.setswitchinterval(1000)
    try:
        # A busy machine may not wake the other thread in time; it never would while the GIL is held.
        assert any(ran_meanwhile() for _ in range(20))
    finally:
        sys.setswitchinterval(before)


def test_native_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="12 integers"):
        native.copy(1, 2, 3)
    with pytest.raises(ValueError, match="instruction set number 99"):
        native.copy(0, 99, *[0] * 10)
    with pytest.raises(TypeError, match="8 integers"):
        native.runs_fit(1, 2)
    with pytest.raises(ValueError, match="block_tokens is 0"):
        native.runs_fit(*[0] * 8)
    with pytest.raises(TypeError):
        native.copy(*["x"] * 12)
    assert native.copy(0, -1, *[0] * 10)
