"""The accounting of one server for the S3 store: which shards it holds, their sizes, and their times of last use.

S3 records when an object was written but not when it was read, and a write for every read would cost more than the read. So each
server records uses in memory and writes them as one small object a sweep. A janitor, elected by a lease, merges all of them into
the object `recency`, which every server reads, also after a restart.
"""

from __future__ import annotations

import heapq
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from lmcache.runtime import RUNTIME
from lmcache.tiers.tier import ShardKey

_SIZE_BITS = 41
_RECORD = struct.Struct("<36sQ")
_MAGIC = b"LMCuses1"
MOST_USES = 200_000
"""The most uses in one object, which are the latest ones: 8.8 MB."""


class Changes(NamedTuple):
    """Changes that a running listing may miss: packed keys that were added, removed, and used since it began."""

    came: set[bytes]
    went: set[bytes]
    used: set[bytes]


class Accounting:
    """The accounting, which is thread-safe. Times are Unix milliseconds, made unique. A shard takes about 190 bytes of a dict.

    Loads and stores never wait for work that grows with the number of shards: such work runs without the lock.
    """

    def __init__(self, notes_uses: bool = True, wall: Callable[[], float] = RUNTIME.wall) -> None:
        """notes_uses: for `new_uses`, which forgets the oldest of them; whoever does not call it has no use for them.
        wall: returns the seconds since the epoch."""
        self._lock, self._notes_uses, self._wall = threading.Lock(), notes_uses, wall
        self._entries: dict[bytes, int] = {}
        """Packed key -> last use << 41 | bytes, the least recently used first."""
        self._fresh: dict[bytes, int] = {}
        """Packed key -> time of the recent uses by this server."""
        self._has_new = False
        self._latest = 0
        self._under_way: set[bytes] = set()
        """Shards being written, which a listing may not show."""
        self._census = threading.Lock()
        """Held while a listing is made and adopted."""
        self._changes: Changes | None = None
        """Changes since the running listing began; None when there is none, so that nothing accumulates."""
        self.stored_bytes = 0
        self.other_bytes = 0
        """Bytes of the objects that hold no shards."""

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, key: ShardKey, size: int) -> None:
        """Book a shard that will be written now, until `end`."""
        with self._lock:
            packed = key.packed
            self._under_way.add(packed)
            self._add(packed, size)

    def end(self, key: ShardKey) -> None:
        with self._lock:
            self._under_way.discard(key.packed)

    def seen(self, key: ShardKey, size: int) -> None:
        """Book a shard that the store holds, and mark it as used now."""
        with self._lock:
            self._add(key.packed, size)

    def use(self, keys: Sequence[ShardKey]) -> None:
        """Mark shards as used now, the first of them last, because the later chunks of a prompt depend on it."""
        with self._lock:
            for key in reversed(keys):
                packed = key.packed
                entry = self._entries.pop(packed, None)
                if entry is not None:
                    self._entries[packed] = self._tick(packed) << _SIZE_BITS | entry & _SIZE_MASK
                    if self._changes:
                        self._changes.used.add(packed)

    def drop(self, keys: Iterable[ShardKey]) -> None:
        with self._lock:
            for key in keys:
                self._drop(key.packed)
                self._fresh.pop(key.packed, None)
                if self._changes:
                    self._changes.went.add(key.packed)

    def oldest(self, wanted_bytes: int, most: int) -> list[ShardKey]:
        """Return the least recently used shards that hold so many bytes together, but at most `most` of them."""
        found: list[ShardKey] = []
        with self._lock:
            freed = 0
            for packed, entry in self._entries.items():
                if freed >= wanted_bytes or len(found) == most:
                    break
                found.append(ShardKey.unpack(packed))
                freed += entry & _SIZE_MASK
        return found

    # ---- the knowledge shared by all servers

    @contextmanager
    def census(self) -> Iterator[None]:
        """Record the changes while a listing is made and adopted. Only one runs at a time."""
        with self._census:
            with self._lock:
                self._changes = Changes(set(self._under_way), set(), set())
            try:
                yield
            finally:
                with self._lock:
                    self._changes = None

    def take_over(self, listed: dict[bytes, tuple[int, int]], uses: dict[bytes, int], other_bytes: int) -> None:
        """Adopt a listing (packed key -> time written, bytes). Shards that it lacks are gone, unless they came during it.

        Call this in a `census` that was begun before the listing.
        """
        before, when = self._entries, np.empty(len(listed), np.int64)
        for place, (packed, (written, _)) in enumerate(listed.items()):
            when[place] = max(written, before.get(packed, 0) >> _SIZE_BITS, uses.get(packed, 0))
        names, entries, stored_bytes = list(listed), {}, 0
        for place in np.argsort(when, kind="stable"):  # unlike `sorted` it releases the GIL
            packed = names[place]
            entries[packed] = int(when[place]) << _SIZE_BITS | listed[packed][1]
            stored_bytes += listed[packed][1]
        with self._lock:  # held only for the changes since the listing began
            assert self._changes is not None
            changed = self._changes.came | {packed for packed in self._changes.used if packed in entries}
            now = {packed: self._entries[packed] for packed in changed if packed in self._entries}
            for packed in self._changes.went | now.keys():
                stored_bytes -= entries.pop(packed, 0) & _SIZE_MASK
            for packed, entry in sorted(now.items(), key=lambda item: item[1]):
                entries[packed] = entry
                stored_bytes += entry & _SIZE_MASK
            self._entries, self.stored_bytes, self.other_bytes = entries, stored_bytes, other_bytes

    def new_uses(self, since: int) -> dict[bytes, int]:
        """Return this server's uses since then; an empty dict when there was none since the last call."""
        with self._lock:
            if not self._has_new:
                return {}
            self._has_new = False
            self._fresh = {packed: when for packed, when in self._fresh.items() if when >= since}
            return dict(self._fresh)

    def uses(self) -> dict[bytes, int]:
        """Return the last use of every shard."""
        with self._lock:
            entries = self._entries.copy()
        return {packed: entry >> _SIZE_BITS for packed, entry in entries.items()}

    def _add(self, packed: bytes, size: int) -> None:
        self._drop(packed)
        self._entries[packed] = self._tick(packed) << _SIZE_BITS | size
        self.stored_bytes += size
        if self._changes:
            self._changes.came.add(packed)
            self._changes.went.discard(packed)

    def _drop(self, packed: bytes) -> None:
        entry = self._entries.pop(packed, None)
        if self._changes:
            self._changes.came.discard(packed)
        if entry is not None:
            self.stored_bytes -= entry & _SIZE_MASK

    def _tick(self, packed: bytes) -> int:
        """Now, later than ever before."""
        self._latest = max(self.now_ms(), self._latest + 1)
        if self._notes_uses:
            self._fresh[packed], self._has_new = self._latest, True
        return self._latest

    def now_ms(self) -> int:
        """Return the Unix milliseconds."""
        return int(self._wall() * 1000)


_SIZE_MASK = (1 << _SIZE_BITS) - 1


def pack_uses(uses: dict[bytes, int]) -> bytes:
    """Return an object of uses: 8 bytes of magic, then 36 bytes of key and u64 milliseconds for each."""
    latest = heapq.nlargest(MOST_USES, uses.items(), key=lambda use: use[1])
    return _MAGIC + b"".join(_RECORD.pack(packed, when) for packed, when in latest)


def unpack_uses(data: bytes, now: int) -> dict[bytes, int]:
    """Read an object of uses; return an empty dict for other data. Times in the future become `now`."""
    if data[:8] != _MAGIC or (len(data) - 8) % _RECORD.size:
        return {}
    return {packed: min(when, now) for packed, when in _RECORD.iter_unpack(data[8:])}
