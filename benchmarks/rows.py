"""A row of the report: what was measured on each side, the goal, and whether it was met."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

from lmcache.bench.samples import Figure, align, figure

Better = Literal["more", "less"]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is wanted, in the row's unit.

    limit_there: the machine's limit where the goal was set. A machine with another limit is asked for the same part of its own.
    """

    value: float
    better: Better
    limit_there: float | None = None


class Row:
    """Samples of one quantity, round by round, for each side: "limit", "ours", "peer"."""

    def __init__(self, name: str, what: str, unit: str, goal: Goal | None, note: str = "") -> None:
        self.name, self.what, self.unit, self.goal, self.note = name, what, unit, goal, note
        self._rounds: dict[str, list[list[float]]] = {}

    @property
    def more_is_better(self) -> bool:
        """As the goal says; without one, as the unit does."""
        return self.goal.better == "more" if self.goal else self.unit == "GB/s"

    def add(self, side: str, samples: Sequence[float]) -> None:
        """One round's samples, in the row's unit."""
        self._rounds.setdefault(side, []).append(list(samples))

    def figure(self, side: str) -> Figure | None:
        """All rounds of a side together; None where it was not measured."""
        rounds = self._rounds.get(side)
        return figure([one for samples in rounds for one in samples], self.more_is_better) if rounds else None

    def ratio(self, other: str) -> float | None:
        """Ours over the other side, round by round; the median of that, since rounds of a side are neighbours in time."""
        mine, theirs = self._rounds.get("ours"), self._rounds.get(other)
        if not mine or not theirs:
            return None
        pairs = zip(mine, theirs * (len(mine) if len(theirs) == 1 else 1), strict=False)
        ratios = [median(a) / median(b) for a, b in pairs if median(b)]
        return median(ratios) if ratios else None

    def verdict(self) -> str:
        """yes, `by ratio` (not the goal's number, but its part of this machine's limit), no, or nothing without a goal."""
        ours = self.figure("ours")
        if self.goal is None or ours is None:
            return ""
        if _reached(ours.median, self.goal.value, self.goal.better):
            return "yes"
        ratio = self.ratio("limit")
        if self.goal.limit_there and ratio is not None:
            wanted = self.goal.value / self.goal.limit_there
            if _reached(ratio, wanted, self.goal.better):
                return "by ratio"
        return "no"

    def as_json(self) -> dict[str, object]:
        sides = {side: self.figure(side) for side in ("limit", "ours", "peer")}
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "goal": dataclasses.asdict(self.goal) if self.goal else None,
            **{side: dataclasses.asdict(shown) if shown else None for side, shown in sides.items()},
            "ratio_to_limit": self.ratio("limit"),
            "ratio_to_peer": self.ratio("peer"),
            "met": self.verdict(),
            "note": self.note,
        }


def share(what: str, goal: Goal, with_it: Sequence[float], without: Sequence[float]) -> list[Row]:
    """How much longer the first of each pair of neighbours in time took, in percent, and the standard error of that median.

    The error is that of a normal distribution with the same quartiles: single slow rounds hardly move either.
    """
    percent = [100 * (slow / fast - 1) for slow, fast in zip(with_it, without, strict=True)]
    low, _, high = quantiles(percent, n=4)
    rows = [Row("", what, "%", goal), Row("", f"the same: standard error, {len(percent)} pairs", "points", None)]
    for one in percent:
        rows[0].add("ours", [one])
    rows[1].add("ours", [1.2533 * (high - low) / 1.349 / sqrt(len(percent))])
    return rows


HEAD = ["what", "unit", "limit", "ours", "p99", "spread", "of limit", "peer", "x peer", "goal", "met"]


def _spread(row: Row, ours: Figure) -> str:
    """A part of the median; for a percentage, which may be near 0, points."""
    width = ours.high - ours.low
    if row.unit == "%":
        return f"{width:.1f} points"
    return f"{width / ours.median if ours.median else 0.0:.0%}"


def cells(row: Row) -> list[str]:
    """The row as text, in the order of `HEAD`. `x peer` says how many times better ours is."""
    ours, peer, limit = row.figure("ours"), row.figure("peer"), row.figure("limit")
    less = not row.more_is_better
    times = row.ratio("peer")
    if times is not None and less:
        times = 1 / times if times else None
    return [
        row.what,
        row.unit,
        number(limit.median) if limit else "",
        number(ours.median) if ours else "",
        number(ours.p99) if ours and ours.samples > 1 else "",
        _spread(row, ours) if ours and ours.samples > 2 else "",
        number(row.ratio("limit")),
        number(peer.median) if peer else "",
        number(times),
        f"{'>=' if row.goal.better == 'more' else '<='} {number(row.goal.value)}" if row.goal else "",
        row.verdict(),
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def replace_figures(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    head, found, rest = page.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no lines {begin.strip()} and {end}; add them where the figures belong")
    page.write_text(f"{head}{begin}{text}\n{end}{tail}")


def report(facts: dict[str, object], rows: Sequence[Row], as_markdown: bool) -> str:
    """The facts of the run, and the table."""
    table = [HEAD, *(cells(row) for row in rows)]
    if as_markdown:
        return "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n\n" + markdown(table)
    return "\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n\n" + align(table)


def number(value: float | None) -> str:
    """Three digits, whatever the size."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _reached(value: float, wanted: float, better: Better) -> bool:
    return value >= wanted if better == "more" else value <= wanted
