"""Summaries of measured times: the median, the tail, and the spread."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured quantity. `low` and `high` enclose the middle 80 % of the samples; `p99` is the slow (or small) end."""

    median: float
    p99: float
    low: float
    high: float
    samples: int


def quantile(samples: Sequence[float], part: float) -> float:
    """Return the sample at the fraction `part` (0 to 1) of the sorted samples.

    >>> quantile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def figure(samples: Sequence[float], more_is_better: bool = False) -> Figure:
    """Summarize samples that are already in the unit to be shown. `p99` is at the bad end.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no samples to summarize; measure at least once")
    tail = 0.01 if more_is_better else 0.99
    return Figure(
        statistics.median(samples),
        quantile(samples, tail),
        quantile(samples, 0.1),
        quantile(samples, 0.9),
        len(samples),
    )


def align(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a text table: the first row is the head, the first column is flush left, the others right.

    >>> print(align([["what", "ms"], ["a", "1.5"]]))
    what   ms
    ----  ---
    a     1.5
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if not column else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
