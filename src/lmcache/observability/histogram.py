"""A histogram with fixed bounds, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts values by the least bound that is not below them. bounds: ascending, without infinity."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0
        """The sum of all values."""

    @property
    def count(self) -> int:
        """Return how many values were noted."""
        return sum(self._counts)

    def __add__(self, other: Histogram) -> Histogram:
        """Return a histogram of the values of both, which have the same bounds."""
        both = Histogram(self._bounds)
        both._counts = [one + more for one, more in zip(self._counts, other._counts, strict=True)]
        both.sum = self.sum + other.sum
        return both

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def counters(self, name: str, labels: str = "") -> dict[str, float]:
        """Return the counters `server.metrics` renders as one histogram. labels: such as `tier="disk"`, or "" for none."""
        out: dict[str, float] = {}
        total, joined = 0, f"{labels}," if labels else ""
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            out[f'{name}_bucket{{{joined}le="{"+Inf" if bound is None else f"{bound:g}"}"}}'] = total
        ending = f"{{{labels}}}" if labels else ""
        return out | {f"{name}_sum{ending}": self.sum, f"{name}_count{ending}": total}
