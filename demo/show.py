"""The output of the demo: a table, bars for the terminal, and a PNG if matplotlib is installed."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One way to answer the prompts: seconds to the first token and the answer, for each prompt.

    ours: with LMCache. warm: its KV should come from there. cached_tokens: how many did, all prompts together.
    """

    title: str
    ours: bool
    warm: bool = False
    cached_tokens: int = 0
    ttft_seconds: list[float] = field(default_factory=list)
    answers: list[list[object]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.ttft_seconds)


def report(engine: str, prompt_tokens: int, rows: Sequence[Row], png: Path) -> bool:
    """Print everything and write the PNG; False when an answer differs, or a warm row had nothing from the cache."""
    title = f"time to first token, {engine}, prompts of {prompt_tokens:,} tokens"
    print(f"\n{_bold(title)}\n")
    _print_table(rows, prompt_tokens)
    print()
    _print_bars(rows)
    same = sum(answer == right for row in rows for answer, right in zip(row.answers, rows[0].answers, strict=True))
    total = sum(len(row.answers) for row in rows)
    length = len(rows[0].answers[0])
    print(f"\nanswers equal to those without LMCache: {same} of {total} ({length} tokens each)")
    if _draw(title, rows, png):
        print(f"plot: {png}")
    if same != total:
        print(_red("An answer differs. That must never happen: please report it."))
    cold = [row.title for row in rows if row.warm and not row.cached_tokens]
    if cold:
        print(_red(f"Nothing came from the cache for: {', '.join(cold)}. The logs are in .cache/demo."))
    return same == total and not cold


def _print_table(rows: Sequence[Row], prompt_tokens: int) -> None:
    width = max(len(row.title) for row in rows)
    prompts = range(1, len(rows[0].ttft_seconds) + 1)
    print(" " * width + "".join(f"  prompt {number}" for number in prompts) + "    median  speed-up  from the cache")
    for row in rows:
        cells = "".join(f"{seconds:8.3f} s" for seconds in row.ttft_seconds)
        cached = f"{row.cached_tokens / prompt_tokens / len(row.answers):14.0%}" if row.ours else ""
        print(f"{row.title:<{width}}{cells}{row.median:8.3f} s{rows[0].median / row.median:8.1f} x{cached}")


def _print_bars(rows: Sequence[Row]) -> None:
    width = max(len(row.title) for row in rows)
    room = max(10, min(60, shutil.get_terminal_size().columns - width - 14))
    longest = max(row.median for row in rows)
    full, half = ("█", "▌") if "utf" in (sys.stdout.encoding or "").lower() else ("#", "")
    for row in rows:
        halves = max(1, round(row.median / longest * room * 2))
        bar = full * (halves // 2) + half * (halves % 2)
        print(f"{row.title:<{width}}  {_green(bar) if row.ours else bar} {row.median:.3f} s")


def _draw(title: str, rows: Sequence[Row], png: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.4), layout="constrained")
    colors = ["#2a9d5c" if row.ours else "#8a8f98" for row in rows]
    bars = axes.barh([row.title for row in rows], [row.median for row in rows], color=colors)
    axes.bar_label(bars, [f" {row.median:.3f} s" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds, median; lower is better")
    axes.set_title(title, loc="left", fontsize=11)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
    return True


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if _colored() else text


def _green(text: str) -> str:
    return f"\033[32m{text}\033[0m" if _colored() else text


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if _colored() else text


def _colored() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
