"""The plainest tier there is: a dictionary of frames. The conformance suite is tested on it, and on broken ones made of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from lmcache.tiers import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage, frame
from lmcache.tiers.url import TierURL, read_secret

STORES: dict[Path, dict[bytes, bytes]] = {}
"""What outlives a tier: place -> packed key -> frame, used longest ago first."""


class MemoryTier(Tier):
    scheme = "memory"

    def __init__(self, place: Path, max_bytes: int | None, key_file: Path | None) -> None:
        self.place, self._max_bytes = place, max_bytes
        self._secret = read_secret(str(key_file), "memory", frame.KEY_BYTES) if key_file else b""
        self._lock = threading.Lock()
        self._opened = False
        self.frames: dict[bytes, bytes] = {}

    @classmethod
    def from_url(cls, url: TierURL) -> MemoryTier:
        return cls(Path(url.path), url.take_max_bytes(), None)

    def open(self) -> None:
        self.frames = STORES.setdefault(self.place, {})
        self._opened = True

    def _check(self) -> None:
        if not self._opened:
            raise TierError("closed", "memory: not open")

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._check()
        return [key.packed in self.frames for key in keys]

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        self._check()
        with self._lock:
            return [self.load_one(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def load_one(self, key: ShardKey, buffer: memoryview) -> str:
        stored = self.frames.pop(key.packed, None)
        if stored is None:
            return ABSENT
        outcome = frame.unpack(stored, key, buffer, self._secret)
        if outcome == OK:
            self.frames[key.packed] = stored
        return outcome

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._check()
        with self._lock:
            return [self.store_one(shard) for shard in shards]

    def store_one(self, shard: Shard) -> str:
        made = frame.make_header(shard.key, shard.parent, shard.payload, self._secret) + shard.payload
        before = self.frames.pop(shard.key.packed, b"")
        if len(before) == len(made):
            self.frames[shard.key.packed] = before
            return KEPT
        if self._max_bytes is not None:
            if len(made) > self._max_bytes:
                return "too large"
            while self.stored_bytes() + len(made) > self._max_bytes:
                del self.frames[next(iter(self.frames))]
        self.frames[shard.key.packed] = made
        return OK

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._check()
        with self._lock:
            for key in keys:
                self.frames.pop(key.packed, None)

    def clear(self) -> None:
        self._check()
        with self._lock:
            self.frames.clear()

    def stored_bytes(self) -> int:
        return sum(map(len, self.frames.values()))

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self.stored_bytes(), len(self.frames), self._max_bytes)

    def close(self) -> None:
        self._opened = False
