"""Codecs: frames with encoded payloads, and `pack12` against a reader written from docs/codecs.md alone."""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from lmcache.cache import accounts
from lmcache.compiled import native
from lmcache.testing.conformance import shard_key
from lmcache.tiers import OK, coding, frame

KEY = shard_key(7)
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def bfloat16(values: np.ndarray) -> bytes:
    """Return these float32 values as bfloat16, by truncation."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def normal(count: int, seed: int = 1) -> bytes:
    return bfloat16(np.random.default_rng(seed).standard_normal(count, dtype=np.float32))


class Fenced:
    """Memory of an exact size, between pages that end the process when they are touched."""

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for fence in (begin, begin + (pages + 1) * PAGE):
            assert _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), 0) == 0
        self.end = begin + (pages + 1) * PAGE
        self.capacity = pages * PAGE

    def last(self, size: int) -> int:
        """Return the address of the last `size` bytes, behind which the fence stands."""
        assert size <= self.capacity
        return self.end - size


def packed(raw: bytes, plain: int = 0) -> bytes:
    given, into = ctypes.create_string_buffer(raw, max(1, len(raw))), ctypes.create_string_buffer(2 * len(raw) + 512)
    size = native.pack12(ctypes.addressof(given), len(raw), ctypes.addressof(into), 2 * len(raw) + 512, plain)
    return into.raw[:size]


def unpacked(stream: bytes, raw_bytes: int, plain: int = 0) -> bytes | None:
    given = ctypes.create_string_buffer(stream, max(1, len(stream)))
    into = ctypes.create_string_buffer(max(1, raw_bytes))
    done = native.unpack12(ctypes.addressof(given), len(stream), ctypes.addressof(into), raw_bytes, 0, plain)
    if len(stream) > raw_bytes:
        return into.raw[:raw_bytes] if done else None
    place, scratch = ctypes.create_string_buffer(max(1, raw_bytes)), ctypes.create_string_buffer(max(1, len(stream)))
    ctypes.memmove(place, stream, len(stream))
    where = ctypes.addressof(place)
    assert native.unpack12(where, len(stream), where, raw_bytes, ctypes.addressof(scratch), plain) == done
    assert place.raw == into.raw or not done
    return into.raw[:raw_bytes] if done else None


def read_from_the_page(stream: bytes, raw_bytes: int) -> bytes:
    """Decode as docs/codecs.md says, value by value."""
    blocks, rest = divmod(raw_bytes, 128)
    bases, at, made = stream[:blocks], blocks, b""
    for base in bases:
        if base == 255:
            made, at = made + stream[at : at + 128], at + 128
            continue
        body, values = stream[at : at + 96], []
        at += 96
        for number in range(64):
            byte = body[64 + number % 32]
            code = byte & 15 if number < 32 else byte >> 4
            exponent = 0 if code == 15 else base - code
            values.append((body[number] & 0x80) << 8 | exponent << 7 | body[number] & 0x7F)
        made += struct.pack("<64H", *values)
    assert len(stream) == at + rest
    return made + stream[at:]


def contents() -> Iterator[tuple[str, bytes]]:
    """Yield payloads of all kinds."""
    dice = np.random.default_rng(3)
    yield "nothing", b""
    yield "normal", normal(64 * 40)
    yield "every value there is", np.arange(65536, dtype=np.uint16).tobytes()
    yield "every value, shuffled", dice.permutation(65536).astype(np.uint16).tobytes()
    yield "zeros of both signs", np.tile(np.array([0, 0x8000], np.uint16), 320).tobytes()
    yield "subnormal", dice.integers(1, 128, 640).astype(np.uint16).tobytes()
    yield "infinite, and not numbers", np.resize(np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF], np.uint16), 640).tobytes()
    mixed = np.frombuffer(normal(64 * 40), np.uint16).copy()
    mixed[::61], mixed[5::997], mixed[9::801] = 0, 0x7F80, 0x0001
    yield "normal with zeros and infinities", mixed.tobytes()
    yield "random bytes", dice.bytes(64 * 129)
    for offset in range(15, 18):  # exponents that just fit, and just do not
        yield (
            f"exponents {offset} apart",
            np.resize(np.array([130 << 7, (130 - offset + 1) << 7], np.uint16), 128).tobytes(),
        )
    for size in (1, 2, 63, 127, 128, 129, 255, 257, 5001):
        yield f"{size} bytes", normal(3000)[:size]


@pytest.mark.parametrize("plain", [0, 1], ids=["fastest", "plain"])
@pytest.mark.parametrize(("name", "raw"), list(contents()), ids=lambda one: one if isinstance(one, str) else "")
def test_what_was_packed_comes_back_bit_by_bit(name: str, raw: bytes, plain: int) -> None:
    stream = packed(raw, plain)
    assert stream == packed(raw, 1 - plain)
    assert unpacked(stream, len(raw), plain) == raw == read_from_the_page(stream, len(raw))


def test_random_payloads_come_back() -> None:
    dice, numbers = random.Random(5), np.random.default_rng(5)
    for _ in range(3000):
        size = dice.randrange(2000)
        scale = np.exp2(numbers.integers(-dice.randint(1, 40), 3, size))
        raw = bytearray(bfloat16(numbers.standard_normal(size) * scale))
        for _ in range(dice.choice((0, 0, 1, 20))):
            if raw:
                raw[dice.randrange(len(raw))] = dice.randrange(256)
        raw = raw[: len(raw) - dice.randrange(2)] if raw else raw
        stream = packed(bytes(raw))
        assert unpacked(stream, len(raw)) == raw and unpacked(stream, len(raw), 1) == raw


def test_the_ratio() -> None:
    raw = normal(1 << 20)
    assert len(raw) / len(packed(raw)) >= 1.30
    assert len(packed(bytes(1 << 16))) < 0.77 * (1 << 16)  # zeros
    noise = random.Random(1).randbytes(1 << 16)
    into = memoryview(bytearray(1 << 16))
    assert coding.encode(memoryview(noise), into) == 0  # it would become larger, so it stays as it is


@pytest.mark.parametrize("plain", [0, 1], ids=["fastest", "plain"])
def test_packing_stays_within_its_room(plain: int) -> None:
    raw = normal(64 * 9 + 3)
    source, target = Fenced(len(raw)), Fenced(len(raw))
    ctypes.memmove(source.last(len(raw)), raw, len(raw))
    stream = packed(raw)
    for room in range(len(raw) + 1):
        size = native.pack12(source.last(len(raw)), len(raw), target.last(room), room, plain)
        assert size <= room and (size == 0 or ctypes.string_at(target.last(room), size) == stream)
    assert size == len(stream)


@pytest.mark.parametrize("plain", [0, 1], ids=["fastest", "plain"])
def test_no_damaged_stream_leads_outside_of_its_memory(plain: int) -> None:
    """Streams of which nothing was checked before, as if the checksum had been forged, right in front of a page that ends the
    process. Some of them can be decoded, to as many bytes as there must be."""
    dice = random.Random(11)
    raws = [normal(64 * count + dice.randrange(64), count) for count in (1, 2, 5, 13)]
    streams = [packed(raw) for raw in raws]
    given, into, scratch = (Fenced(2 * PAGE) for _ in range(3))
    decoded = 0
    for turn in range(100_000):
        raw, made = raws[turn % 4], bytearray(streams[turn % 4])
        kind = dice.randrange(5)
        if kind == 0:
            del made[dice.randrange(len(made)) :]
        elif kind == 1:
            made += dice.randbytes(dice.randint(1, 200))
        elif kind == 2:
            made = bytearray(dice.randbytes(dice.randrange(300)))
        else:
            for _ in range(dice.randint(1, 5)):
                made[dice.randrange(len(made) if kind == 3 else len(raw) // 128)] = dice.choice((0, 254, 255, 7))
        raw_bytes = len(raw) if dice.random() < 0.8 else dice.randrange(3000)
        where = given.last(len(made))
        ctypes.memmove(where, bytes(made), len(made))
        target = into.last(raw_bytes)
        if turn % 2:  # in place
            where = target if len(made) <= raw_bytes else into.last(len(made))
            target = where
            ctypes.memmove(where, bytes(made), len(made))
        decoded += native.unpack12(where, len(made), target, raw_bytes, scratch.last(len(made)), plain)
    assert 0 < decoded < 80_000


# ---- frames


def test_the_accounts_know_all_names_of_damage() -> None:
    assert set(accounts._DAMAGE) == set(frame.DAMAGE)


def encoded_frame(raw: bytes, secret: bytes = b"") -> bytes:
    stream = packed(raw)
    return frame.make_header(KEY, bytes(16), stream, secret, coding.coding_of(memoryview(raw))) + stream


def read(stored: bytes, raw_bytes: int, secret: bytes = b"") -> tuple[str, bytes]:
    into = bytearray(raw_bytes)
    return frame.unpack(stored, KEY, memoryview(into), secret), bytes(into)


def with_checksum(stored: bytes | bytearray) -> bytes:
    """Return a frame with the checksum that its other bytes should have."""
    return bytes(stored[:112]) + xxhash.xxh3_128_digest(bytes(stored[128:]) + bytes(stored[:112])) + bytes(stored[128:])


@pytest.mark.parametrize("secret", [b"", bytes(range(32))], ids=["plain", "keyed"])
def test_an_encoded_frame_is_read(secret: bytes) -> None:
    raw = normal(5000)
    stored = encoded_frame(raw, secret)
    assert len(stored) < 0.79 * len(raw)
    assert read(stored, len(raw), secret) == (OK, raw)
    assert read(stored, len(raw), b"" if secret else bytes(32))[0] in (frame.OTHER_VERSION, frame.CHECKSUM)
    counted: list[tuple[int, int]] = []
    frame.unpack(stored, KEY, memoryview(bytearray(len(raw))), secret, lambda *one: counted.append(one))
    assert counted == [(len(raw), len(stored) - frame.HEADER_BYTES)]


def test_the_fields_of_an_encoded_frame() -> None:
    raw = normal(640)
    stored = encoded_frame(raw)
    assert struct.unpack_from("<HHQ", stored, 52) == (1, 0, len(stored) - 128)
    assert struct.unpack_from("<Q16s8s", stored, 80) == (len(raw), xxhash.xxh3_128_digest(raw), bytes(8))
    assert with_checksum(stored) == stored


def test_a_frame_of_an_unknown_codec_is_a_miss_with_a_name() -> None:
    raw = normal(640)
    for codec in (3, 77, 65535):
        stored = bytearray(encoded_frame(raw))
        struct.pack_into("<H", stored, 52, codec)
        assert read(with_checksum(stored), len(raw))[0] == frame.NEWER_CODEC == "written by a newer version"


def test_numbers_in_a_frame_decide_nothing() -> None:
    """The buffer says how many bytes there must be; what a header claims beside it is a miss, with a right checksum, too."""
    raw = normal(640)
    stored = encoded_frame(raw)
    for claimed in (0, 1, len(raw) - 1, len(raw) + 1, 1 << 40, (1 << 64) - 1):
        made = bytearray(stored)
        struct.pack_into("<Q", made, 80, claimed)
        assert read(with_checksum(made), len(raw))[0] == frame.OTHER_SIZE
    for claimed in (0, len(stored) - 129, len(stored) - 127, len(raw), 1 << 40, (1 << 64) - 1):
        made = bytearray(stored)
        struct.pack_into("<Q", made, 56, claimed)
        assert read(with_checksum(made), len(raw))[0] in (frame.OTHER_SIZE, frame.TRUNCATED)
    assert read(stored, len(raw) + 2)[0] == frame.OTHER_SIZE
    assert read(stored, len(stored) - 128)[0] == frame.OTHER_SIZE


def test_what_decodes_to_other_bytes_is_a_miss() -> None:
    raw = normal(640)
    stored = encoded_frame(raw)
    for place in (88, 128, 200, len(stored) - 1):  # the digest of the raw bytes, a base, a body, the last one
        made = bytearray(stored)
        made[place] ^= 1
        assert read(bytes(made), len(raw))[0] == frame.CHECKSUM
        assert read(with_checksum(made), len(raw))[0] == frame.UNDECODABLE


def test_a_hundred_thousand_damaged_frames_and_none_is_served() -> None:
    dice = random.Random(13)
    raws = [normal(count, count) for count in (64, 200, 700)]
    frames = [encoded_frame(raw) for raw in raws]
    outcomes: dict[str, int] = {}
    for turn in range(100_000):
        raw, stored = raws[turn % 3], frames[turn % 3]
        made = bytearray(stored)
        kind = dice.randrange(6)
        if kind == 0:
            del made[dice.randrange(len(made)) :]
        elif kind == 1:
            made += dice.randbytes(dice.randint(1, 300))
        elif kind == 2:
            made[dice.randrange(128)] = dice.randrange(256)
        elif kind == 3:
            at = dice.randrange(len(made))
            made[at : at + 64] = dice.randbytes(len(made[at : at + 64]))
        else:
            made[dice.randrange(len(made))] ^= 1 << dice.randrange(8)
        if made == stored:
            continue
        # Half of them get the checksum that they should have, as a fault in the writer or a forger would give them.
        made = bytearray(with_checksum(made)) if turn % 2 and len(made) >= 128 else made
        if made == stored:
            continue
        outcome, into = read(bytes(made), len(raw))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        # With a right checksum a changed parent hash, or zeros that nobody reads, leave a frame of the very same bytes.
        assert outcome != OK or (into == raw and turn % 2), outcome
    assert set(frame.DAMAGE) <= set(outcomes)
    assert outcomes.get(OK, 0) < 10_000
