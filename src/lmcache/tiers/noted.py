"""The shards that this process has stored in a store that does not tell what it has."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from lmcache.tiers.tier import ShardKey, Usage

_MOST = 1 << 20
"""Shards that are noted at most; the oldest are forgotten."""


class Noted:
    """Keys and sizes of shards that were stored or seen, and not seen gone."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def add(self, sizes: Mapping[ShardKey, int]) -> None:
        """Note shards with their bytes in the store."""
        with self._lock:
            for key, size in sizes.items():
                self._bytes += size - self._sizes.pop(key.packed, 0)
                self._sizes[key.packed] = size
            while len(self._sizes) > _MOST:
                self._bytes -= self._sizes.pop(next(iter(self._sizes)))

    def drop(self, keys: Sequence[ShardKey]) -> None:
        with self._lock:
            for key in keys:
                self._bytes -= self._sizes.pop(key.packed, 0)

    def clear(self) -> None:
        with self._lock:
            self._sizes.clear()
            self._bytes = 0

    def packed_keys(self) -> list[bytes]:
        """Return all keys as `ShardKey.packed`. To make a million objects of them takes seconds, for which `usage` would wait."""
        with self._lock:
            return list(self._sizes)

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self._bytes, len(self._sizes), None)
