"""Write-back decides which chunks are written to one tier, and in which order. It does no I/O.

The queue holds chunks in the order in which they became complete, so no chunk precedes its parent, and the chunks written at any
time form prefixes. The queue is bounded in bytes. Beyond the bound new chunks, which are the ends of prompts, are not queued.
The chunks stay in L1 and are not pinned; a chunk that is evicted before it is written is counted as lost.

The mode `on-evict` keeps chunks back until L1 is nearly full, and then writes the oldest ones before they are evicted.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from lmcache.chunks import HASH_BYTES

KEEP_BACK_SHARE = 0.7
"""`on-evict`: chunks are written if more than this share of L1 is in use."""
_WRITE_AHEAD_SHARE = 0.1
"""`on-evict`: at most this share of L1 is queued to be written ahead of eviction."""


class Batch(NamedTuple):
    """Chunks of one space that are written in one call: their hashes and their parents' hashes, 16 bytes each. chunk_shards:
    number of shards of one chunk."""

    space: int
    hashes: bytes
    parents: bytes
    size_bytes: int
    chunk_shards: int = 1
    clears: int = 0
    """How many times the queue had been cleared when the batch was taken."""
    again: bool = False
    """Whether the tier has been given these chunks before (`add_again`), so that nothing is lost if they are not written."""


class _Chunk(NamedTuple):
    space: int
    key: bytes
    parent: bytes
    size_bytes: int
    shards: int
    again: bool = False


class WriteQueue:
    """The write queue of one tier. max_bytes: the most bytes queued. batch_bytes, batch_shards: the most of one write. l1_bytes:
    the most bytes kept back."""

    def __init__(
        self, max_bytes: int, batch_bytes: int, batch_shards: int, l1_bytes: int, on_evict: bool = False
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Chunks queued; chunks and bytes lost, by reason: `queue full`, `evicted` (from L1, before they were written),
        `cleared` (from L1 or from the tier) and `tier removed`."""
        self.queued_bytes = 0
        self._max_bytes, self._batch_bytes, self._batch_shards = max_bytes, batch_bytes, batch_shards
        self._l1_bytes, self._kept_bytes = l1_bytes, 0
        self._on_evict = on_evict
        self._clears, self._cleared_as = 0, "cleared"
        self._ready: deque[_Chunk] = deque()
        self._kept_back: deque[_Chunk] = deque()

    def __len__(self) -> int:
        """Return how many chunks can be written now."""
        return len(self._ready)

    @property
    def kept_back(self) -> int:
        return len(self._kept_back)

    def add(
        self, space: int, hashes: bytes, parents: bytes, chunk_bytes: int, chunk_shards: int = 1, again: bool = False
    ) -> None:
        """Queue chunks that have become complete. chunk_bytes, chunk_shards: size and number of shards of one chunk. again: as in
        `Batch`."""
        for at in range(0, len(hashes), HASH_BYTES):
            if self.queued_bytes + chunk_bytes > self._max_bytes and not self._on_evict:
                left = (len(hashes) - at) // HASH_BYTES
                self._lose("queue full", left, left * chunk_bytes)
                return
            cut = slice(at, at + HASH_BYTES)
            one = _Chunk(space, hashes[cut], parents[cut], chunk_bytes, chunk_shards, again)
            if not self._on_evict:
                self._push(one)
                continue
            self._kept_back.append(one)
            self._kept_bytes += chunk_bytes
            while self._kept_bytes > self._l1_bytes:  # more than L1 can hold, so the first ones have been evicted
                self._lose("evicted", 1, self._keep_no_longer().size_bytes)

    def add_again(self, space: int, hashes: bytes, parents: bytes, chunk_bytes: int, chunk_shards: int) -> None:
        """Queue chunks that the tier has been given before: the last ones, as far as half of the free queue holds them."""
        fit = HASH_BYTES * ((self._max_bytes - self.queued_bytes) // 2 // chunk_bytes)
        if fit > 0:
            self.add(space, hashes[-fit:], parents[-fit:], chunk_bytes, chunk_shards, again=True)

    def make_ready(self, used_bytes: int) -> None:
        """`on-evict`: queue the oldest chunks kept back if `used_bytes` is above `KEEP_BACK_SHARE` of L1."""
        ahead = self._l1_bytes * _WRITE_AHEAD_SHARE
        while self._kept_back and used_bytes > self._l1_bytes * KEEP_BACK_SHARE and self.queued_bytes < ahead:
            self._push(self._keep_no_longer())

    def make_all_ready(self) -> None:
        """Queue all chunks that were kept back, and drop those to be written again, as the server does before it ends."""
        self.queued_bytes -= sum(one.size_bytes for one in self._ready if one.again)
        self._ready = deque(one for one in self._ready if not one.again)
        while self._kept_back:
            self._push(self._keep_no_longer())

    def take(self) -> Batch | None:
        """Remove the next batch from the queue and return it: the oldest chunks, all of one space, each of them once. None if the
        queue is empty."""
        if not self._ready:
            return None
        first = self._ready[0]
        by_size, by_count = self._batch_bytes // first.size_bytes, self._batch_shards // first.shards
        # A chunk may be queued twice: L1 has lost it and got it again, or has answered with it.
        taken: dict[bytes, _Chunk] = {}
        while self._ready and len(taken) < max(1, min(by_size, by_count)):
            one = self._ready[0]
            if (one.space, one.again) != (first.space, first.again):
                break
            taken[one.key] = self._ready.popleft()
            self.queued_bytes -= one.size_bytes
        keys, parents = b"".join(taken), b"".join(one.parent for one in taken.values())
        return Batch(first.space, keys, parents, len(taken) * first.size_bytes, first.shards, self._clears, first.again)

    def still_there(self, batch: Batch, found: bytes) -> Batch:
        """Return the batch with only the chunks `found`, in the batch's order. The others are counted as lost by eviction."""
        count, gone = len(batch.hashes) // HASH_BYTES, (len(batch.hashes) - len(found)) // HASH_BYTES
        if not gone:
            return batch
        gone_bytes = batch.size_bytes // count * gone
        if not batch.again:
            self._lose("evicted", gone, gone_bytes)
        cuts = [slice(at, at + HASH_BYTES) for at in range(0, len(batch.hashes), HASH_BYTES)]
        parents = {batch.hashes[cut]: batch.parents[cut] for cut in cuts}
        of_found = [parents[found[at : at + HASH_BYTES]] for at in range(0, len(found), HASH_BYTES)]
        return batch._replace(hashes=found, parents=b"".join(of_found), size_bytes=batch.size_bytes - gone_bytes)

    def put_back(self, batch: Batch) -> None:
        """Put a batch that the tier did not store back at the head, unless the queue has been cleared since it was taken, or the
        tier had been given it before."""
        count = len(batch.hashes) // HASH_BYTES
        if batch.again:
            return
        if batch.clears != self._clears:
            self._lose(self._cleared_as, count, batch.size_bytes)
            return
        for at in reversed(range(0, len(batch.hashes), HASH_BYTES)):
            cut = slice(at, at + HASH_BYTES)
            size = batch.size_bytes // count
            self._ready.appendleft(_Chunk(batch.space, batch.hashes[cut], batch.parents[cut], size, batch.chunk_shards))
        self.queued_bytes += batch.size_bytes
        while self.queued_bytes > self._max_bytes and self._ready:
            last = self._ready.pop()
            self.queued_bytes -= last.size_bytes
            if not last.again:
                self._lose("queue full", 1, last.size_bytes)

    def clear(self, reason: str = "cleared") -> None:
        """Drop all chunks, since L1 or the tier has been cleared, and any batch taken earlier that is put back later. They are
        lost for this reason."""
        self._cleared_as = reason
        for one in (*self._ready, *self._kept_back):
            if not one.again:
                self._lose(reason, 1, one.size_bytes)
        self._clears += 1
        self._ready.clear()
        self._kept_back.clear()
        self.queued_bytes = self._kept_bytes = 0

    def _lose(self, reason: str, chunks: int, size_bytes: int) -> None:
        self.counters[f"lost:{reason}"] += chunks
        self.counters[f"lost_bytes:{reason}"] += size_bytes

    def _keep_no_longer(self) -> _Chunk:
        one = self._kept_back.popleft()
        self._kept_bytes -= one.size_bytes
        return one

    def _push(self, one: _Chunk) -> None:
        self._ready.append(one)
        self.queued_bytes += one.size_bytes
        self.counters["queued"] += 1
