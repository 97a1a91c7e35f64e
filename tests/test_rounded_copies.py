"""Copies that round: what extents hold, and what comes back, against NumPy's arithmetic, over every layout of paged KV."""

from __future__ import annotations

import dataclasses
import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.chunks import Layout
from lmcache.chunks.forms import KINDS, Form
from lmcache.engine.groups import refuse_unrounded
from lmcache.errors import LayoutError, Unroundable
from lmcache.transfer.copier import make_copiers
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import ExtentShape, PagedKV
from rounding import BFLOAT16, FLOAT16, FLOAT32, extent_rows, floats, from_extent, narrowed
from test_transfer_cpu import GUARD, POISON, REAL, Bytes, Case, Shape, aligned, build, cases, copiers

FORMS = [(Form.INT8,), (Form.INT8, Form.INT4), (Form.EXACT, Form.INT8)]
DTYPES = {number: name for name, number in KINDS.items()}


def finite_bytes(size: int, kind: int, seed: int) -> Bytes:
    """Random bytes of finite values: of all exponents, subnormal numbers, zeros of both signs."""
    dice = np.random.default_rng(seed)
    if kind == FLOAT32:
        bits = dice.integers(0, 1 << 32, size // 4 + 1, np.uint32)
        bits = np.where(bits & 0x7F800000 == 0x7F800000, bits & 0xBFFFFFFF, bits)
        bits[dice.random(len(bits)) < 0.1] &= np.uint32(0x80000000)
        return bits.astype(np.uint32).view(np.uint8)[:size]
    infinite = np.uint16(0x7C00 if kind == FLOAT16 else 0x7F80)
    half = dice.integers(0, 1 << 16, size // 2 + 1, np.uint16)
    half = np.where(half & infinite == infinite, half & ~np.uint16(0x4000), half)
    half[dice.random(len(half)) < 0.1] &= np.uint16(0x8000)
    return half.astype(np.uint16).view(np.uint8)[:size]


def forms_of(paged: PagedKV, forms: tuple[Form, ...]) -> list[Form]:
    return [form for form, _ in zip(itertools.cycle(forms), paged.planes, strict=False)]


def placed(case: Case, paged: PagedKV) -> list[tuple[int, int, int, int]]:
    """The runs of a case, in extents of the size that this paged KV has."""
    step = -(-paged.shard_bytes(case.chunk_tokens) // 64) * 64 + GUARD
    return [(GUARD + number * step, *run[1:]) for number, run in enumerate(case.runs)]


def check(case: Case, kind: int, forms: tuple[Form, ...]) -> None:
    """The exact copier tells what the values are; NumPy rounds them."""
    exact, memory = build(case.shape)
    paged = exact.rounded(forms, DTYPES[kind])
    memory[:] = finite_bytes(len(memory), kind, case.seed)
    source, blocks = memory.copy(), np.array(case.blocks, dtype=np.int32)
    runs = np.array(placed(case, paged), dtype=np.int64).reshape(-1, 4)
    exact_runs = np.array(placed(case, exact), dtype=np.int64).reshape(-1, 4)
    size, exact_size = (
        GUARD + (len(runs) + 1) * (one.shard_bytes(case.chunk_tokens) + 64 + GUARD) for one in (paged, exact)
    )

    raw = aligned(exact_size)
    CpuCopier(exact, case.chunk_tokens).gather(raw.ctypes.data, blocks, exact_runs)
    wanted, back = np.full(size, POISON, np.uint8), raw.copy()
    shapes = ExtentShape.of(paged, case.chunk_tokens), ExtentShape.of(exact, case.chunk_tokens)
    for run, exact_run in zip(runs.tolist(), exact_runs.tolist(), strict=True):
        for number, form in enumerate(forms_of(paged, forms)):
            (start, row), (exact_start, exact_row) = shapes[0].planes[number], shapes[1].planes[number]
            begin = exact_run[0] + exact_start + run[3] * exact_row
            values = raw[begin : begin + run[2] * exact_row].tobytes()
            stored = extent_rows(values, case.shape.dims, kind, form)
            assert len(stored) == run[2] * row
            at = run[0] + start + run[3] * row
            wanted[at : at + len(stored)] = np.frombuffer(stored, np.uint8)
            restored = from_extent(stored, case.shape.dims, kind, form)
            back[begin : begin + len(restored)] = np.frombuffer(restored, np.uint8)
    memory[:] = POISON
    CpuCopier(exact, case.chunk_tokens).scatter(back.ctypes.data, blocks, exact_runs)
    wanted_memory = memory.copy()

    several = {"threads": CpuCopier(paged, case.chunk_tokens, threads=2)}
    for name, copier in (copiers(paged, case.chunk_tokens) | several).items():
        memory[:] = source
        arena = aligned(size, case.shift)
        arena[:] = POISON
        copier.gather(arena.ctypes.data, blocks, runs, arena_bytes=len(arena))
        assert np.array_equal(arena, wanted), f"gather by {name}"
        assert np.array_equal(memory, source), f"gather by {name} wrote into paged memory"
        memory[:] = POISON
        copier.scatter(arena.ctypes.data, blocks, runs, arena_bytes=len(arena))
        assert np.array_equal(memory, wanted_memory), f"scatter by {name}"
        assert np.array_equal(arena, wanted), f"scatter by {name} wrote into the slot"
        copier.close()


@given(case=cases(), kind=st.sampled_from([BFLOAT16, FLOAT16, FLOAT32]), forms=st.sampled_from(FORMS))
@settings(max_examples=150, deadline=None)
def test_every_layout(case: Case, kind: int, forms: tuple[Form, ...]) -> None:
    dims = -(-max(8, case.shape.dims) // 32) * 32 if Form.INT4 in forms else max(8, case.shape.dims)
    group = case.shape.dim_group if dims % case.shape.dim_group == 0 else 1
    item = 4 if kind == FLOAT32 else 2
    check(
        dataclasses.replace(case, shape=dataclasses.replace(case.shape, dims=dims, dim_group=group, item_bytes=item)),
        kind,
        forms,
    )


@pytest.mark.parametrize("name", [name for name in REAL if REAL[name][3] == 2])
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_real_layouts(monkeypatch: pytest.MonkeyPatch, name: str, forms: tuple[Form, ...]) -> None:
    """Sizes at which several threads share the work, and tokens do not fit into the buffer at once."""
    monkeypatch.setattr("lmcache.transfer.cpu._SPLIT_BYTES", 1)
    order, token_group, dim_group, item_bytes = REAL[name]
    shape = Shape(order, 2, 5, 128, token_group, 3, 128, dim_group, item_bytes)
    runs = [(0, 0, 256, 0), (0, 256, 211, 0), (0, 500, 7, 100)]
    check(Case(shape, 256, [3, 0, 4, 1, 2], runs, 0, 4, 7), BFLOAT16, forms)


def test_heads_of_one_token_may_be_larger_than_the_buffer() -> None:
    shape = Shape("bhDgtd", 1, 2, 4, 2, 130, 128, 2, 4)
    check(Case(shape, 8, [1, 0], [(0, 1, 6, 2)], 0, 0, 3), FLOAT32, (Form.INT8,))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, np.float32(3.4028235e38)])
@pytest.mark.parametrize("order", ["bgthDd", "bhDdgt"], ids=["dense", "transposed"])
@pytest.mark.parametrize("forms", [(Form.INT8,), (Form.INT4,)], ids=str)
def test_what_cannot_be_rounded_is_not_stored(bad: float, order: str, forms: tuple[Form, ...]) -> None:
    """One value anywhere fails the call; the largest bfloat16 does not."""
    exact, memory = build(Shape(order, 2, 4, 16, 1, 2, 32, 1, 4))
    paged, arena = exact.rounded(forms, "float32"), aligned(1 << 16)
    copier = CpuCopier(paged, 64)
    call = arena.ctypes.data, np.arange(4, dtype=np.int32), np.array([(0, 0, 64, 0)], dtype=np.int64)
    copier.gather(*call)
    for at in (GUARD, GUARD + 4 * 2047, len(memory) - 2 * GUARD):
        place = memory[at // 4 * 4 :].view(np.float32)
        place[0] = bad
        with pytest.raises(Unroundable, match="cannot be rounded"):
            copier.gather(*call)
        place[0] = 3.3895314e38
        copier.gather(*call)


def test_heads_of_other_splits_are_taken_from_extents_of_rounded_kv() -> None:
    """Two extents with two of the four heads each, and one with all of them, become the same."""
    exact, memory = build(Shape("bhgtDd", 2, 4, 16, 1, 4, 64, 1, 2))
    memory[:] = finite_bytes(len(memory), BFLOAT16, 5)
    paged = exact.rounded((Form.INT8,), "bfloat16")
    blocks, run = np.array([2, 0, 3, 1], dtype=np.int32), np.array([(0, 3, 50, 5)], dtype=np.int64)
    whole = aligned(paged.shard_bytes(64))
    CpuCopier(paged, 64).gather(whole.ctypes.data, blocks, run)
    halves = [paged.part(0, 2, first, first + 2) for first in (0, 2)]
    size = halves[0].shard_bytes(64)
    parted = aligned(2 * size)
    for number, half in enumerate(halves):
        at = np.array([(number * size, 3, 50, 5)], dtype=np.int64)
        CpuCopier(half, 64).gather(parted.ctypes.data, blocks, at)
    memory[:] = POISON
    CpuCopier(paged, 64).scatter(whole.ctypes.data, blocks, run)
    wanted = memory.copy()
    memory[:] = POISON
    reading = CpuCopier(paged, 64).reader(*((half, ExtentShape.of(half, 64)) for half in halves))
    reading.scatter(parted.ctypes.data, blocks, np.array([(0, 3, 50, 5), (size, 3, 50, 5)], dtype=np.int64))
    assert np.array_equal(memory, wanted) and not np.array_equal(memory, np.full_like(memory, POISON))


def test_what_was_rounded_once_stays_as_it_is() -> None:
    """KV that was loaded and is stored again has the same bytes, so that it never moves away from what was computed."""
    values = np.random.default_rng(4).standard_normal(1 << 16, dtype=np.float32)
    for kind, form in itertools.product((BFLOAT16, FLOAT16), (Form.INT8, Form.INT4)):
        stored = extent_rows(narrowed(values, kind), 64, kind, form)
        back = from_extent(stored, 64, kind, form)
        assert from_extent(extent_rows(back, 64, kind, form), 64, kind, form) == back
        steps = 127 if form is Form.INT8 else 7
        error = np.abs(floats(back, kind) - floats(narrowed(values, kind), kind)).reshape(-1, 32).max(1)
        assert (error <= np.abs(values).max() * (0.51 / steps + 2.0**-8)).all()


def test_layouts_say_what_extents_hold() -> None:
    exact = Layout("m", "bfloat16", 4, 8, 128, 256)
    rounded = replaced(exact, codec=2)
    assert exact.head_bytes == (256, 256) and rounded.head_bytes == (132, 132)
    assert exact.fingerprint != rounded.fingerprint and rounded.l1_codec == "int8" and rounded.stored_dtype == "uint8"
    fewer = replaced(exact, codec=3)
    assert (
        fewer.head_bytes == (132, 80) and fewer.l1_codec == "k8v4" and not replaced(fewer, head_size=80).rounded_in_l1
    )
    for change in ({"kind": "mla"}, {"kind": "state"}, {"kv_dtype": "fp8_e4m3"}, {"kv_scales": "x"}, {"head_size": 4}):
        kept = replaced(rounded, **change)
        assert not kept.rounded_in_l1 and kept.stored_dtype == kept.kv_dtype, change
        assert set(kept.forms) == {Form.EXACT}


def replaced(layout: Layout, **changes: object) -> Layout:
    return msgspec.structs.replace(layout, **changes)


def test_engines_none_of_whose_kv_can_be_rounded_are_refused_by_name() -> None:
    exact = Layout("m", "bfloat16", 4, 8, 128, 256)
    rounded, latents = replaced(exact, codec=2), replaced(exact, codec=2, kind="mla")
    refuse_unrounded([replaced(exact, kind="state")])
    refuse_unrounded([replaced(rounded, kind="state"), rounded])
    for layout, told in (
        (latents, "int8-l1 cannot.*mla in bfloat16"),
        (replaced(exact, codec=3, head_size=80), "80 values a head"),
    ):
        with pytest.raises(LayoutError, match=f"{told}.*set lossy_kv to none"):
            refuse_unrounded([layout])


def test_gpus_and_other_heads_are_refused_by_name() -> None:
    paged, _ = build(Shape("bgthDd", 2, 4, 16, 1, 2, 64, 1, 2))
    rounded = dataclasses.replace(paged.rounded((Form.INT8,), "bfloat16"), device="cuda:0")
    with pytest.raises(LayoutError, match=r"k8v4-l1 are for engines on a CPU.*codec=int8 at the tiers"):
        make_copiers([(rounded, 16)])
    with pytest.raises(LayoutError, match="heads of 64 values in fp8_e4m3 cannot be INT8"):
        paged.rounded((Form.INT8,), "fp8_e4m3")
