"""Codecs: shards stored in fewer bytes, and brought back (docs/codecs.md). All of it runs in the threads of tiers.

`pack12` brings back every bit. `int8` rounds, and is only for shards whose layout says that the engine accepts this.

A codec is a property of one stored frame: keys, chunk hashes and L1 know nothing of it, so one tier may hold frames of several
codecs. Decoding is bounded by the buffer to be filled, whose size follows from the layout, never by a number in the frame.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import xxhash

from lmcache.compiled import native

RAW, PACK12, INT8 = 0, 1, 2
"""Numbers of codecs, as in frames. RAW: the payload is the extent's bytes as they are."""
NAMES = {RAW: "none", PACK12: "pack12", INT8: "int8"}
PACKABLE = frozenset({"bfloat16"})
"""The KV dtypes that `pack12` makes smaller. fp16 has exponents of 5 bits, of which at most 1 could be left out."""
_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""The KV dtypes that `int8` can round -> their numbers in its streams."""
_LEAST_ROW, _MOST_ROW = 8, 4096
"""The elements of a row that `int8` can round."""
DIGEST_BYTES = 16
_ALIGNED_BYTES = 4096
"""Encoded payloads begin at multiples of this, for tiers with direct I/O."""
_STEP_BYTES = 1 << 20
_MOST_IDLE = 4


class Coding(NamedTuple):
    """How a payload is encoded. raw_bytes, raw_digest: size and xxh3-128 of the bytes that decoding yields; zeros for RAW."""

    codec: int = RAW
    raw_bytes: int = 0
    raw_digest: bytes = bytes(DIGEST_BYTES)


AS_IT_IS = Coding()
"""The coding of payloads that are not encoded."""


class Scratch:
    """A pool of buffers for encoding and decoding, of which only what is touched takes memory. Up to four idle ones are kept,
    since new memory costs more time than decoding."""

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    @contextmanager
    def taken(self, size: int) -> Iterator[memoryview]:
        """Lend aligned memory of at least this size, with any content. All views of it must be released before the end."""
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = mmap.mmap(-1, _rounded(size, _STEP_BYTES))
        if len(buffer) < size:
            buffer = mmap.mmap(-1, _rounded(size, _STEP_BYTES))
        yield memoryview(buffer)
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(buffer)


SCRATCH = Scratch()


def encode(payload: memoryview, into: memoryview) -> int:
    """Encode bfloat16 values by `pack12`. Return how many bytes of `into` they take; 0 if not fewer than before.

    The last byte of an odd number, and blocks that do not fit, are stored as they are.
    """
    room = min(into.nbytes, payload.nbytes - 1)
    return native.pack12(_address(payload), payload.nbytes, _address(into), room, 0) if room > 0 else 0


def coding_of(payload: memoryview) -> Coding:
    """Return the coding for a frame with this payload, encoded by `pack12`."""
    return Coding(PACK12, payload.nbytes, xxhash.xxh3_128_digest(payload))


def rounds(kv_dtype: str, row: int) -> bool:
    """Return whether `int8` can round KV of this dtype in rows of so many elements; 0: the KV is exact, and stays so."""
    return kv_dtype in _KINDS and _LEAST_ROW <= row <= _MOST_ROW


def encode_rounded(payload: memoryview, kv_dtype: str, row: int, into: memoryview) -> int:
    """Encode values by `int8`, with one scale for each `row` of them. Return how many bytes of `into` they take; 0 if a value is
    infinite, not a number or the largest float32, or `into` is too small. `rounds` must hold."""
    room = min(into.nbytes, payload.nbytes - 1)
    values = _address(payload), payload.nbytes, row, _KINDS[kv_dtype]
    return native.to_int8(*values, _address(into), room, 0) if room > 0 else 0


def coding_of_rounded(stream: memoryview, raw_bytes: int) -> Coding:
    """Return the coding for a frame with this payload, encoded by `int8`: it is decoded for the digest, once."""
    with SCRATCH.taken(raw_bytes) as scratch:
        made = scratch[:raw_bytes]
        done = native.from_int8(_address(stream), stream.nbytes, _address(made), raw_bytes, 0)
        assert done, "to_int8 and from_int8 do not agree"
        digest = xxhash.xxh3_128_digest(made)
        made.release()
        scratch.release()
    return Coding(INT8, raw_bytes, digest)


def decode(coding: Coding, stored_bytes: int, into: memoryview) -> bool:
    """Decode the payload that lies in the first `stored_bytes` of `into`, to all of it. Return whether the result is right.

    Whatever the payload contains, nothing outside of it is read, and nothing outside of `into` is written. Decoding goes from the
    end on, and needs scratch memory for the beginning only.
    """
    if not 0 < stored_bytes < into.nbytes:
        return False
    if coding.codec == INT8:
        done = native.from_int8(_address(into), stored_bytes, _address(into), into.nbytes, 0)
    elif coding.codec == PACK12:
        with SCRATCH.taken(stored_bytes) as scratch:
            done = native.unpack12(_address(into), stored_bytes, _address(into), into.nbytes, _address(scratch), 0)
            scratch.release()
    else:
        return False
    return done and xxhash.xxh3_128_digest(into) == coding.raw_digest


def aligned(size: int) -> int:
    """Return the bytes that an encoded payload takes in a buffer with several of them."""
    return _rounded(size, _ALIGNED_BYTES)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _address(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
