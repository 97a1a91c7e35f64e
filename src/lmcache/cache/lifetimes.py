"""How long chunks live in L1 and when they are used again: histograms over about 1 % of all chunks, chosen by their hashes.

A chunk is in the sample whenever it comes, so what is measured of it is complete. Memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmcache.cache.events import LET_GO, Event, Events
from lmcache.chunks import HASH_BYTES
from lmcache.observability.histogram import Histogram

MOST_SAMPLED = 65_536
"""Chunks of the sample that are followed at the same time; further ones are left out."""
SAMPLED_BYTES = 400
"""Memory of one of them, at most (measured by tests/test_lifetimes.py)."""
_SAMPLED = 0, 1, 2
"""The last byte of the hashes of the sample: 3 of 256 chunks."""
_SECONDS = 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600
_TIMES = 0, 1, 2, 3, 5, 10, 20, 50, 100, 1000


@dataclass(slots=True)
class _Life:
    space: int
    born: float
    used: float
    uses: int = 0


class Lifetimes:
    """Follows the chunks of the sample from their store to their eviction, by the events of L1.

    A use is a lookup that found the chunk in L1 and for which the engine did not have it itself. Of a model with several kinds of
    KV a chunk is followed in the space that stored it first.
    """

    def __init__(self, events: Events, now: Callable[[], float]) -> None:
        self._now = now
        self._lives: dict[bytes, _Life] = {}
        self.first_hit_age, self.reuse_gap = Histogram(_SECONDS), Histogram(_SECONDS)
        self.eviction_age, self.idle_before_eviction = Histogram(_SECONDS), Histogram(_SECONDS)
        self.reuses = Histogram(_TIMES)
        events.listen(["stored"], self._stored)
        events.listen(["evicted"], self._evicted)
        events.listen(["cleared"], self._cleared, named=False)
        events.listen(["answered"], self._answered, named=False)  # it has its hashes in any case

    def __len__(self) -> int:
        return len(self._lives)

    def _stored(self, event: Event) -> None:
        now = self._now()
        for chunk in _sampled(event.hashes):
            if chunk not in self._lives and len(self._lives) < MOST_SAMPLED:
                self._lives[chunk] = _Life(event.space, now, now)

    def _answered(self, event: Event) -> None:
        if event.found <= event.have:
            return
        now = self._now()
        for chunk in _sampled(event.hashes[HASH_BYTES * event.have : HASH_BYTES * event.found]):
            life = self._lives.get(chunk)
            if life is not None:
                (self.reuse_gap if life.uses else self.first_hit_age).observe(now - life.used)
                life.used, life.uses = now, life.uses + 1

    def _evicted(self, event: Event) -> None:
        now = self._now()
        for chunk in _sampled(event.hashes):
            life = self._lives.get(chunk)
            if life is not None and life.space == event.space:
                del self._lives[chunk]
                if event.reason == LET_GO:
                    continue  # its age says nothing about the size of L1
                self.eviction_age.observe(now - life.born)
                self.idle_before_eviction.observe(now - life.used)
                self.reuses.observe(life.uses)

    def _cleared(self, event: Event) -> None:
        self._lives = {chunk: life for chunk, life in self._lives.items() if life.space != event.space}

    def counters(self) -> dict[str, float]:
        """Return the histograms, as /metrics has them."""
        return {
            **self.first_hit_age.counters("chunk_first_hit_age_seconds"),
            **self.reuse_gap.counters("chunk_reuse_gap_seconds"),
            **self.eviction_age.counters("chunk_eviction_age_seconds"),
            **self.idle_before_eviction.counters("chunk_idle_before_eviction_seconds"),
            **self.reuses.counters("chunk_reuses"),
            "chunks_followed": len(self._lives),
        }


def _sampled(hashes: bytes) -> Iterator[bytes]:
    """Yield those of these hashes that are in the sample."""
    ends = hashes[HASH_BYTES - 1 :: HASH_BYTES]
    for end in _SAMPLED:
        chunk = ends.find(end)
        while chunk >= 0:
            yield hashes[HASH_BYTES * chunk : HASH_BYTES * chunk + HASH_BYTES]
            chunk = ends.find(end, chunk + 1)
