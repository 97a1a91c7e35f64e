"""The codec `int8`: its arithmetic against NumPy's, its limits, its frames, and that only KV whose layout says so is rounded."""

from __future__ import annotations

import ctypes
import itertools
import logging
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from test_codecs import PAGE, Fenced, read, with_checksum
from test_coder import Link

from lmcache.chunks import Layout
from lmcache.compiled import native
from lmcache.testing.conformance import payload_of, shard_key
from lmcache.tiers import OK, Shard, coding, frame
from lmcache.tiers.coder import Coder
from rounding import BFLOAT16, FLOAT16, FLOAT32, KINDS, floats, narrowed, rounded, stream_of

Array = npt.NDArray[np.float32]
PLAIN = pytest.mark.parametrize("plain", [0, 1], ids=["fastest", "plain"])
DTYPES = {BFLOAT16: "bfloat16", FLOAT16: "float16", FLOAT32: "float32"}


def encoded(raw: bytes, row: int, kind: int, plain: int = 0) -> bytes:
    given, into = ctypes.create_string_buffer(raw, max(1, len(raw))), ctypes.create_string_buffer(2 * len(raw) + 64)
    where = ctypes.addressof(given), ctypes.addressof(into)
    size = native.to_int8(where[0], len(raw), row, kind, where[1], 2 * len(raw) + 64, plain)
    return into.raw[:size]


def decoded(stream: bytes, raw_bytes: int, plain: int = 0) -> bytes | None:
    given, into = ctypes.create_string_buffer(stream, max(1, len(stream))), ctypes.create_string_buffer(raw_bytes + 1)
    done = native.from_int8(ctypes.addressof(given), len(stream), ctypes.addressof(into), raw_bytes, plain)
    place = ctypes.create_string_buffer(max(len(stream), raw_bytes, 1))
    if len(stream) <= raw_bytes:  # in place
        ctypes.memmove(place, stream, len(stream))
        where = ctypes.addressof(place)
        assert native.from_int8(where, len(stream), where, raw_bytes, plain) == done
        assert place.raw[:raw_bytes] == into.raw[:raw_bytes] or not done
    return into.raw[:raw_bytes] if done else None


def payloads(kind: int, row: int) -> Iterator[tuple[str, bytes]]:
    """Yield payloads of finite values, of all kinds, in complete rows."""
    dice = np.random.default_rng(kind * 1000 + row)
    normal = dice.standard_normal(40 * row, dtype=np.float32)
    yield "nothing", b""
    yield "normal", narrowed(normal, kind)
    yield "scales far apart", narrowed(normal * np.exp2(dice.integers(-14, 13, 40 * row)).astype(np.float32), kind)
    yield "one value stands out", narrowed(np.where(np.arange(40 * row) % row == 3, 1000 * normal, normal), kind)
    yield "zeros of both signs", narrowed(np.resize(np.array([0.0, -0.0], np.float32), 2 * row), kind)
    if kind == FLOAT32:
        bits = dice.integers(0, 1 << 32, 40 * row, np.uint32)
        every = np.where(bits & 0x7F800000 == 0x7F800000, bits & 0xBFFFFFFF, bits)
        yield "all exponents", every.astype(np.uint32).tobytes()
    else:
        bits16 = np.arange(1 << 16, dtype=np.uint16)
        every16 = bits16[np.isfinite(floats(bits16.tobytes(), kind))]
        yield "every value, ascending", every16[: len(every16) // row * row].tobytes()
        yield "every value, shuffled", dice.permutation(every16)[: len(every16) // row * row].tobytes()
    smallest = narrowed(np.resize(np.array([2.0**-24, 3 * 2.0**-24, 2.0**-101, -(2.0**-99), 0], np.float32), row), kind)
    yield "the smallest", smallest


@PLAIN
@pytest.mark.parametrize("row", [8, 40, 64, 127, 128, 4096])
@pytest.mark.parametrize("kind", KINDS, ids=DTYPES.get)
def test_streams_and_what_they_decode_to_are_numpys(kind: int, row: int, plain: int) -> None:
    for name, raw in payloads(kind, row):
        stream = encoded(raw, row, kind, plain)
        assert stream == stream_of(raw, row, kind), name
        assert decoded(stream, len(raw), plain) == rounded(raw, row, kind), name


@pytest.mark.parametrize("kind", KINDS, ids=DTYPES.get)
def test_the_error_is_half_a_step_of_the_rows_largest_value(kind: int) -> None:
    for name, raw in payloads(kind, 64):
        if not raw:
            continue
        before = floats(raw, kind).astype(np.float64).reshape(-1, 64)
        after = floats(decoded(encoded(raw, 64, kind), len(raw)) or b"", kind).astype(np.float64).reshape(-1, 64)
        largest = np.abs(before).max(1, keepdims=True)
        own = {BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11, FLOAT32: 2.0**-23}[kind] * np.abs(after)
        least = 2.0**-25 if kind == FLOAT16 else 2.0**-99
        assert (np.abs(after - before) <= largest / 254 * (1 + 1e-6) + own + least).all(), name


@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16], ids=DTYPES.get)
def test_what_was_rounded_once_stays_as_it_is(kind: int) -> None:
    """So KV may pass any number of tiers: half of a step of a row is more than what bfloat16 rounds its values by."""
    for name, raw in payloads(kind, 128):
        if name == "the smallest" or (kind == FLOAT16 and "every" in name):
            continue
        once = decoded(encoded(raw, 128, kind), len(raw)) or b""
        assert (decoded(encoded(once, 128, kind), len(raw)) or b"") == once, name


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", KINDS, ids=DTYPES.get)
def test_what_is_not_finite_is_not_rounded(kind: int, bad: float) -> None:
    values = np.random.default_rng(1).standard_normal(640, dtype=np.float32)
    for place in (0, 63, 333, 639):
        one = values.copy()
        one[place] = bad
        assert encoded(narrowed(one, kind), 64, kind) == b""


@PLAIN
@pytest.mark.parametrize("kind", KINDS, ids=DTYPES.get)
def test_no_finite_value_becomes_infinite(kind: int, plain: int) -> None:
    top = 0x7C00 if kind == FLOAT16 else 0x7F80
    magnitudes = np.arange(top - 0x80, top, dtype=np.uint16)
    if kind == FLOAT32:
        magnitudes = np.arange(0x7F7FFF00, 0x7F7FFFFF, dtype=np.uint32)
    for signed in (magnitudes, magnitudes | (1 << 8 * magnitudes.itemsize - 1)):
        raw = np.repeat(signed, 8).astype(magnitudes.dtype).tobytes()
        assert np.isfinite(floats(decoded(encoded(raw, 8, kind, plain), len(raw), plain) or b"", kind)).all()
    largest = narrowed(np.full(8, np.finfo(np.float32).max), FLOAT32)
    assert encoded(largest, 8, FLOAT32, plain) == b""  # it would


def test_what_is_no_row_or_kind_is_refused() -> None:
    raw = narrowed(np.ones(640, np.float32), BFLOAT16)
    assert encoded(raw[:-2], 64, BFLOAT16) == b""
    for row, kind in ((7, 0), (4097, 0), (64, 3), (64, -1), (0, 0), (-64, 0)):
        with pytest.raises(ValueError, match="out of range"):
            encoded(raw, row, kind)
    with pytest.raises(ValueError, match="negative"):
        native.from_int8(0, -1, 0, 0, 0)


@PLAIN
def test_encoding_stays_within_its_room(plain: int) -> None:
    raw = narrowed(np.random.default_rng(2).standard_normal(640, dtype=np.float32), BFLOAT16)
    source, target = Fenced(len(raw)), Fenced(len(raw))
    ctypes.memmove(source.last(len(raw)), raw, len(raw))
    stream = stream_of(raw, 64, BFLOAT16)
    for room in range(len(raw) + 1):
        size = native.to_int8(source.last(len(raw)), len(raw), 64, BFLOAT16, target.last(room), room, plain)
        assert size == (len(stream) if room >= len(stream) else 0)
    assert ctypes.string_at(target.last(len(raw)), size) == stream


@PLAIN
def test_no_damaged_stream_leads_outside_of_its_memory(plain: int) -> None:
    dice = random.Random(3)
    raws = [narrowed(np.random.default_rng(row).standard_normal(row * 9, dtype=np.float32), 0) for row in (8, 64, 200)]
    streams = [stream_of(raw, row, 0) for raw, row in zip(raws, (8, 64, 200), strict=True)]
    given, into = Fenced(3 * PAGE), Fenced(3 * PAGE)
    done = 0
    for turn in range(30_000):
        raw, made = raws[turn % 3], bytearray(streams[turn % 3])
        kind = dice.randrange(4)
        if kind == 0:
            del made[dice.randrange(len(made)) :]
        elif kind == 1:
            made += dice.randbytes(dice.randint(1, 200))
        elif kind == 2:
            made[-8:] = struct.pack("<II", *(dice.choice((0, 1, 8, 64, 4096, 4097, 1 << 31)), dice.randrange(4)))
        else:
            made[dice.randrange(len(made))] = dice.randrange(256)
        raw_bytes = len(raw) if dice.random() < 0.8 else dice.randrange(3 * PAGE)
        target = into.last(raw_bytes)
        inside = turn % 2 and len(made) <= raw_bytes
        where = target if inside else given.last(len(made))
        ctypes.memmove(where, bytes(made), len(made))
        done += native.from_int8(where, len(made), target, raw_bytes, plain)
    assert 0 < done < 25_000


# ---- frames and tiers


def framed(raw: bytes, row: int = 64) -> bytes:
    stream = stream_of(raw, row, BFLOAT16)
    coded = coding.coding_of_rounded(memoryview(stream), len(raw))
    return frame.make_header(shard_key(7), bytes(16), stream, b"", coded) + stream


def values(count: int = 6400, seed: int = 1) -> bytes:
    return narrowed(np.random.default_rng(seed).standard_normal(count, dtype=np.float32), BFLOAT16)


def test_a_frame_of_rounded_kv_is_read_and_damage_is_a_miss() -> None:
    raw = values()
    stored = framed(raw)
    assert struct.unpack_from("<H", stored, 52) == (2,) and len(stored) < 0.55 * len(raw)
    assert read(stored, len(raw)) == (OK, rounded(raw, 64, BFLOAT16))
    for place in (88, 130, 133, len(stored) - 8, len(stored) - 4):  # digest, scale, code, row, kind
        made = bytearray(stored)
        made[place] ^= 0x21
        assert read(bytes(made), len(raw))[0] == frame.CHECKSUM
        assert read(with_checksum(made), len(raw))[0] == frame.UNDECODABLE


def loaded(coder: Coder, shard: Shard) -> bytes:
    buffer = bytearray(shard.payload.nbytes)
    assert coder.load([shard.key], [memoryview(buffer)]) == [OK]
    return bytes(buffer)


@pytest.mark.parametrize("codec", ["none", "auto", "pack12", "int8"])
@pytest.mark.parametrize("kind", KINDS, ids=DTYPES.get)
def test_only_an_int8_tier_rounds_and_only_kv_whose_layout_says_so(tmp_path: Path, codec: str, kind: int) -> None:
    tier = Link(tmp_path, 1e6, codec)
    coder = Coder(tier, "link", tier.now)
    raw = narrowed(np.random.default_rng(1).standard_normal(1 << 19, dtype=np.float32), kind)
    exact, lossy = (
        Shard(shard_key(number), bytes(16), memoryview(raw), DTYPES[kind], rounded_row=row)
        for number, row in enumerate((0, 64))
    )
    for _ in range(3):
        assert coder.store([exact, lossy]) == [OK, OK]
    status: Any = coder.status()
    assert loaded(coder, exact) == raw
    assert loaded(coder, lossy) == (rounded(raw, 64, kind) if codec == "int8" else raw)
    assert status["rounded_bytes"] == (3 * len(raw) if codec == "int8" else 0)
    if codec == "int8":
        assert status["used"] == status["option"] == "int8"
        assert tier.payload_bytes(lossy.key) == len(raw) // (2 if kind != FLOAT32 else 4) * 17 // 16 + 8


def test_int8_says_once_that_it_rounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tier = Link(tmp_path, 1e6, "int8")
    coder = Coder(tier, "link", tier.now)
    raw = values()
    for row, said in ((0, 0), (64, 1), (64, 1)):
        coder.store([Shard(shard_key(1), bytes(16), memoryview(raw), "bfloat16", rounded_row=row)])
        assert len([one for one in caplog.records if "rounded by int8" in one.message]) == said


@pytest.mark.parametrize(
    ("dtype", "row"), [("bfloat16", 4), ("bfloat16", 8192), ("fp8_e4m3", 64), ("uint8", 64), ("", 64)]
)
def test_what_int8_cannot_round_stays_exact(tmp_path: Path, dtype: str, row: int) -> None:
    tier = Link(tmp_path, 1e6, "int8")
    coder = Coder(tier, "link", tier.now)
    shard = Shard(shard_key(1), bytes(16), memoryview(values(1 << 15)), dtype, rounded_row=row)
    assert coder.store([shard]) == [OK] and loaded(coder, shard) == shard.payload


def test_infinities_in_lossy_kv_are_stored_losslessly(tmp_path: Path) -> None:
    tier = Link(tmp_path, 1e6, "int8")
    coder = Coder(tier, "link", tier.now)
    raw = bytearray(values(1 << 15))
    raw[1000:1002] = struct.pack("<H", 0x7F80)
    shard = Shard(shard_key(1), bytes(16), memoryview(bytes(raw)), "bfloat16", rounded_row=64)
    assert coder.store([shard]) == [OK] and loaded(coder, shard) == shard.payload
    assert coder.status()["rounded_bytes"] == 0 and tier.payload_bytes(shard.key) < 0.8 * len(raw)
    noise = Shard(shard_key(2), bytes(16), memoryview(payload_of(shard_key(2), 4096)), "bfloat16", rounded_row=64)
    assert coder.store([noise]) == [OK] and loaded(coder, noise) == noise.payload


def test_lossy_layouts_have_names_of_their_own_and_say_what_may_be_rounded() -> None:
    exact = Layout("model", "bfloat16", 4, 2, 64, 256)
    lossy = msgspec.structs.replace(exact, codec=1)
    assert exact.fingerprint != lossy.fingerprint
    assert (exact.rounded_row, lossy.rounded_row) == (0, 64) and (exact.lossy_kv, lossy.lossy_kv) == ("none", "int8")
    others: list[dict[str, Any]] = [{"kind": "mla"}, {"kind": "state"}, {"kv_dtype": "fp8_e4m3"}, {"codec": 77}]
    others.append({"kv_scales": "per_token_head"})
    for one, two in itertools.product(others, ({}, {"head_size": 128})):
        assert msgspec.structs.replace(lossy, **one, **two).rounded_row == 0, one
