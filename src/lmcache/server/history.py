"""What a server did within the last hour: a few of its counters, noted every ten seconds, for the status page."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

INTERVAL_SECONDS = 10.0
SAMPLES = 361
"""An hour. Each sample takes less than 500 bytes."""
COUNTERS = (
    "hit_chunks_total", "missed_chunks_total", "evicted_chunks_total", "stored_tokens_total", "retrieved_tokens_total",
    "requested_tokens_total",
)  # fmt: skip
GAUGES = "arena_used_bytes", "chunks"
SOURCES = "tokens_found_in_engine", "tokens_found_in_l1", "tokens_found_elsewhere"
"""Tokens found so far: by the engine itself, in L1, and in tiers or by other engines."""
COLUMNS = "time", *COUNTERS, *GAUGES, *SOURCES
_FOUND = 'lookup_tokens_total{source="'


class History:
    """Samples of counters. The loop calls `tick`; the newest sample is the last.

    now: the loop's clock. wall: seconds since 1970. read: returns the server's counters by name.
    """

    def __init__(
        self, now: Callable[[], float], wall: Callable[[], float], read: Callable[[], Mapping[str, float]]
    ) -> None:
        self._now, self._wall, self._read = now, wall, read
        self._due = now()
        self._samples: deque[tuple[float, ...]] = deque(maxlen=SAMPLES)

    def tick(self) -> None:
        """Note a sample if the last one is ten seconds old."""
        now = self._now()
        if now < self._due:
            return
        self._due = now + INTERVAL_SECONDS
        counters = self._read()
        engine, l1 = (counters.get(f'{_FOUND}{source}"}}', 0) for source in ("engine", "l1"))
        found = sum(value for name, value in counters.items() if name.startswith(_FOUND))
        known = (counters.get(name, 0) for name in (*COUNTERS, *GAUGES))
        self._samples.append((self._wall(), *known, engine, l1, found - engine - l1))

    def samples(self) -> list[tuple[float, ...]]:
        """Return the samples, oldest first: the values of `COLUMNS`."""
        return list(self._samples)
