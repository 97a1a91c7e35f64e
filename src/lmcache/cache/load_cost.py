"""Is a load worth its wait? A tier's measured pace against the engine's measured prefill. Pure arithmetic, no clock."""

from __future__ import annotations

from dataclasses import dataclass

SLACK_SHARE = 0.05
"""A wait may exceed its plan by this share of the time that computing would take."""
SLACK_SECONDS = 0.010
"""... or by this, where that is more: recomputing less than 200 ms is judged so."""
_WINDOW_SECONDS = 4.0
"""Busy seconds after which older measurements count half."""
_HALF_LIFE_SECONDS = 5.0
"""After so much idle time, too."""
_ASK_WEIGHT = 0.2


@dataclass
class Pace:
    """What one tier does: bytes a second while it is busy, and seconds until it answers a question."""

    bytes_moved: float = 0.0
    busy_seconds: float = 0.0
    ask_seconds: float | None = None
    measured_at: float = float("-inf")
    """When the last load ended."""
    _running: int = 0
    _since: float = 0.0

    def began(self, now: float) -> None:
        """A load has begun."""
        if not self._running:
            self._since = now
            faded = 0.5 ** ((now - self.measured_at) / _HALF_LIFE_SECONDS)
            self.bytes_moved *= faded
            self.busy_seconds *= faded
        self._running += 1

    def ended(self, now: float, size_bytes: int | None) -> None:
        """A load has ended; so many bytes of it were good. None: the tier failed, which says nothing of its pace."""
        self._running -= 1
        if size_bytes is None:
            self._since = now
            return
        self.measured_at = now
        self.bytes_moved += size_bytes
        self.busy_seconds += now - self._since
        self._since = now
        if self.busy_seconds > 2 * _WINDOW_SECONDS:
            self.bytes_moved /= 2
            self.busy_seconds /= 2

    def answered(self, seconds: float) -> None:
        """A question took so long."""
        before = seconds if self.ask_seconds is None else self.ask_seconds
        self.ask_seconds = before + _ASK_WEIGHT * (seconds - before)

    @property
    def bytes_per_second(self) -> float | None:
        """None until a load has ended."""
        if not self.busy_seconds:
            return None
        return self.bytes_moved / self.busy_seconds

    def expected_seconds(self, size_bytes: int) -> float | None:
        """From now until so many bytes have been loaded; None while nothing is known, infinite for a tier that gave nothing."""
        rate = self.bytes_per_second
        if rate is None:
            return None
        return (self.ask_seconds or 0.0) + size_bytes / rate if rate else float("inf")


def slack_seconds(recompute_seconds: float) -> float:
    """How far a wait may exceed its plan."""
    return max(SLACK_SHARE * recompute_seconds, SLACK_SECONDS)
