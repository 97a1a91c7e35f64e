"""What `int8` does, in NumPy and from docs/codecs.md alone, for tests: rows of values, each with one scale."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from lmcache.chunks.forms import Form

BFLOAT16, FLOAT16, FLOAT32 = KINDS = (0, 1, 2)
_ITEM = {BFLOAT16: 2, FLOAT16: 2, FLOAT32: 4}


def floats(raw: bytes, kind: int) -> npt.NDArray[np.float32]:
    """Return the values of a payload as float32."""
    if kind == BFLOAT16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.float16 if kind == FLOAT16 else np.float32).astype(np.float32)


def narrowed(values: npt.NDArray[np.float32], kind: int) -> bytes:
    """Return float32 values in another kind, rounded to the nearest, and to even."""
    if kind == FLOAT32:
        return values.astype(np.float32).tobytes()
    if kind == FLOAT16:
        return values.astype(np.float16).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest).astype(np.uint16).tobytes()


def _rows(raw: bytes, row: int, kind: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Return the scale [rows, 1] of each row, and its codes [rows, row]."""
    values = floats(raw, kind).reshape(-1, row)
    largest = np.abs(values).max(1, keepdims=True, initial=0)
    largest = np.where(largest < np.float32(2.0**-100), np.float32(0), largest)
    with np.errstate(divide="ignore"):
        factor = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes = np.rint(values * factor).astype(np.int8)
    return (largest / np.float32(127)).astype(np.float32), codes


def stream_of(raw: bytes, row: int, kind: int) -> bytes:
    """Return the encoded payload of finite values."""
    scales, codes = _rows(raw, row, kind)
    bodies = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()
    return bodies + struct.pack("<II", row, kind)


def rounded(raw: bytes, row: int, kind: int) -> bytes:
    """Return what a payload of finite values is after it was encoded and decoded."""
    scales, codes = _rows(raw, row, kind)
    return narrowed((codes.astype(np.float32) * scales).reshape(-1), kind)


def extent_rows(raw: bytes, row: int, kind: int, form: Form) -> bytes:
    """Return what an extent holds of finite values whose heads have this form."""
    if form is Form.EXACT:
        return raw
    if form is Form.INT8:
        return stream_of(raw, row, kind)[:-8]
    scales, codes = _groups(raw, kind)
    nibbles = codes.view(np.uint8) & 15
    return np.concatenate([scales.view(np.uint8), nibbles[:, :16] | nibbles[:, 16:] << 4], axis=1).tobytes()


def from_extent(stored: bytes, row: int, kind: int, form: Form) -> bytes:
    """Return the values that rows of an extent become."""
    if form is Form.EXACT:
        return stored
    rows = np.frombuffer(stored, np.uint8).reshape(-1, 4 + row if form is Form.INT8 else 20)
    scales, codes = np.ascontiguousarray(rows[:, :4]).view(np.float32), rows[:, 4:]
    if form is Form.INT8:
        signed = codes.view(np.int8)
    else:
        signed = ((np.concatenate([codes & 15, codes >> 4], axis=1) ^ 8).astype(np.int16) - 8).astype(np.int8)
    return narrowed((signed.astype(np.float32) * scales).reshape(-1), kind)


def _groups(raw: bytes, kind: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Return the scale [groups, 1] of each 32 values, and their codes [groups, 32] of 4 bits."""
    values = floats(raw, kind).reshape(-1, 32)
    largest = np.abs(values).max(1, keepdims=True, initial=0)
    largest = np.where(largest < np.float32(2.0**-100), np.float32(0), largest)
    with np.errstate(divide="ignore"):
        factor = np.where(largest > 0, np.float32(7) / largest, np.float32(0))
    return (largest / np.float32(7)).astype(np.float32), np.rint(values * factor).astype(np.int8)
