"""The table is the index of one space: its chunks, their extents, their order of eviction, and their readers and writers.

A *record* is one chunk. It has an id (1 .. 2**32 - 2, reused after `free`), the chunk's 16-byte hash, a parent (the
chunk before it in the prompt), and for every shard a state (empty, filling, done) with an extent, named by its sector.

    attached  The record is in the index: `match` and `get` find it, the policy orders it, and its parent counts it as a child.
    detached  The record has left the index for good. Its extents and pins can be read until `free`, which is refused while
              a reader (pin) or a writer (filling) may still touch the extents.

A record is *evictable* while it is attached and has no pins, no shards being filled and no children, so a prompt is evicted from
its tail. A policy (`memory.order`), whose rows are the ids, decides the order of eviction. It is the second argument of a table;
the default is an exact LRU. A prefix is touched tail first, so LRU never evicts a chunk before its descendants.

The table is `lmcache._native.Table`, in C; `_native.pyi` documents its methods, and `PyTable` of `tests/py_table.py` is their
specification. "ids" and "sectors" are bytes that hold consecutive little-endian u32. Every method raises ValueError for an id
that no record has. A call that raises changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from lmcache.compiled import native

Table = native.Table
Habits = native.Habits
EMPTY, FILLING, DONE = 0, 1, 2
COMPLETED, RELEASED = 1, 2  # what `end_fill` can return beside 0


def pack(numbers: Iterable[int]) -> bytes:
    """Pack ids or sectors into bytes."""
    values = list(numbers)
    return struct.pack(f"<{len(values)}I", *values)


def unpack(packed: bytes) -> tuple[int, ...]:
    """Unpack ids or sectors; ValueError if the length is not a multiple of 4."""
    if len(packed) % 4:
        raise ValueError(f"{len(packed)} bytes of ids; each id takes 4")
    return struct.unpack(f"<{len(packed) // 4}I", packed)
