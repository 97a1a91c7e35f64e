"""The live miss-ratio curve: which share of the tokens that lookups ask for would other sizes of L1 find, under LRU?

A sample of the chunks (`native/sample.c`) is kept in order of use, with their stack distances. Under LRU the heart touches the
end of a prompt before its beginning. So if a chunk is found, those before it are found, too, and each one can be judged alone.

Of the few chunks that very many prompts share, the sample has too many or too few. These are found with any of the sizes. So what
the server has really found stands for the present size, and the sample for the differences only. A server with tiers finds more
than L1 has. There the sample stands for itself, and what it has too few or too many of counts as found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from lmcache.compiled import native

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""The sizes, in multiples of L1."""
_NOW = FACTORS.index(1.0)
SAMPLED_CHUNKS = 16384
_SURE = 2.4
"""Standard errors on both sides of an estimate: 95 % where the error is known from eight parts of the sample (Student's t)."""
_COUNT_ERROR = 0.0033
"""Standard error of the count of new chunks, relative: 0.83 / sqrt(2^16 registers)."""


class Point(NamedTuple):
    """An estimate, and the interval that contains the truth 19 times of 20."""

    ratio: float
    low: float
    high: float


class Estimate(NamedTuple):
    """asked_chunks: since the start. sizes: one for each of `FACTORS`. unlimited: if nothing was ever evicted. rate: of sampling.
    sampled_chunks: in the sample now."""

    asked_chunks: int
    sizes: tuple[Point, ...]
    unlimited: Point
    rate: float
    sampled_chunks: int


class Curve:
    """The curve of an L1 of `l1_bytes`. One thread calls the methods.

    by_found: whether `found` of `looked_up` is what L1 alone has.
    """

    def __init__(self, l1_bytes: int, by_found: bool) -> None:
        self._sizes = [l1_bytes * one for one in FACTORS]
        self.by_found, self._chunk_bytes = by_found, 1.0
        self._sample = native.Sample(SAMPLED_CHUNKS, self._sizes)

    def looked_up(self, hashes: bytes, found: int, chunk_bytes: int) -> None:
        """Note a lookup of these chunks (16 bytes each), of which the server had the first `found`."""
        self._chunk_bytes = chunk_bytes
        self._sample.looked_up(hashes, found, chunk_bytes)

    def stored(self, hashes: bytes, chunk_bytes: int) -> None:
        """Note that these chunks are complete now."""
        self._sample.stored(hashes, chunk_bytes)

    def clear(self) -> None:
        """Note that L1 has been cleared. The lookups until now go on to count."""
        self._sample.clear()

    def memory_bytes(self) -> int:
        return self._sample.memory_bytes()

    def estimate(self) -> Estimate | None:
        """Return the estimate, or None before the first lookup."""
        (asked, found, fresh, rate, count), seen, hit = self._sample.counts()
        if not asked:
            return None
        ratios = _Ratios(asked, found, self.by_found)
        whole = ratios.of(seen, hit, 1.0)
        errors = _errors(ratios, seen, hit)
        if rate < 1:
            held = [max(1.0, size * rate / self._chunk_bytes) for size in self._sizes]
            errors = [
                math.hypot(error, slope / math.sqrt(chunks))
                for error, slope, chunks in zip(errors, _slopes(whole), held, strict=True)
            ]
        if self.by_found:
            errors[_NOW] = 0.0
        points, least = list[Point](), 0.0
        for ratio, error in zip(whole, errors, strict=True):
            least = min(1.0, max(least, ratio))  # more memory never finds less
            points.append(_point(least, error))
        known = 1 - min(asked, fresh) / asked
        unlimited = _point(max(known, found / asked), _COUNT_ERROR * fresh / asked)
        return Estimate(int(asked), tuple(points), unlimited, rate, int(count))


def _point(ratio: float, error: float) -> Point:
    return Point(ratio, max(0.0, ratio - _SURE * error), min(1.0, ratio + _SURE * error))


class _Ratios(NamedTuple):
    """Makes hit ratios from what parts of the sample have counted."""

    asked: float
    found: float
    by_found: bool

    def of(self, seen: Sequence[float], hit: Sequence[Sequence[float]], share: float) -> list[float]:
        """Return the hit ratio by size. share: these parts' share of the sample."""
        hits, sampled = [sum(column) for column in zip(*hit, strict=True)], sum(seen)
        if not self.by_found:
            return [(one / share + self.asked - sampled / share) / self.asked for one in hits]
        missed = sampled - hits[_NOW]
        scale = (self.asked - self.found) / missed if missed > 0 else 0.0
        return [(self.found + (one - hits[_NOW]) * scale) / self.asked for one in hits]


def _errors(ratios: _Ratios, seen: list[float], hit: list[list[float]]) -> list[float]:
    """Return the standard errors by size, from the estimates without each of the parts (jackknife)."""
    parts = len(seen)
    without = [
        ratios.of(seen[:at] + seen[at + 1 :], hit[:at] + hit[at + 1 :], (parts - 1) / parts) for at in range(parts)
    ]
    columns = list(zip(*without, strict=True))
    means = [sum(column) / parts for column in columns]
    squares = [sum((one - mean) ** 2 for one in column) for column, mean in zip(columns, means, strict=True)]
    return [math.sqrt((parts - 1) / parts * square) for square in squares]


def _slopes(ratios: Sequence[float]) -> list[float]:
    """Return how much the hit ratio grows with the logarithm of the size: a stack distance is known to 1 / sqrt(chunks) only."""
    steps = [abs(after - before) / math.log(2) for before, after in itertools.pairwise(ratios)]
    return [max(pair) for pair in zip([steps[0], *steps], [*steps, steps[-1]], strict=True)]
