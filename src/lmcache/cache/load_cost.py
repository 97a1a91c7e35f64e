"""The load cost model measures the pace of tiers, to compare a load with computing. It reads no clock."""

from __future__ import annotations

from dataclasses import dataclass

SLACK_SHARE = 0.05
"""A wait may be longer than expected by this share of the time that computing would take, or by `SLACK_SECONDS`."""
SLACK_SECONDS = 0.010
"""The greater slack for prompts that are computed in less than 200 ms."""
_WINDOW_SECONDS = 4.0
"""The weight of older measurements is halved after so many busy seconds."""
_HALF_LIFE_SECONDS = 5.0
"""Their weight is also halved after so many idle seconds."""
_ASK_WEIGHT = 0.2


@dataclass
class Pace:
    """The pace of one tier: bytes per second while it is busy, and seconds until it answers which shards it has."""

    bytes_moved: float = 0.0
    busy_seconds: float = 0.0
    ask_seconds: float | None = None
    measured_at: float = float("-inf")
    """When the last load ended."""
    _running: int = 0
    _since: float = 0.0

    def began(self, now: float) -> None:
        if not self._running:
            self._since = now
            faded = 0.5 ** ((now - self.measured_at) / _HALF_LIFE_SECONDS)
            self.bytes_moved *= faded
            self.busy_seconds *= faded
        self._running += 1

    def ended(self, now: float, size_bytes: int | None) -> None:
        """Note that a load of `size_bytes` has ended; None if the tier failed, which does not change the pace."""
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
        """Note that the tier has answered after so many seconds."""
        before = seconds if self.ask_seconds is None else self.ask_seconds
        self.ask_seconds = before + _ASK_WEIGHT * (seconds - before)

    @property
    def bytes_per_second(self) -> float | None:
        """None until a load has ended."""
        if not self.busy_seconds:
            return None
        return self.bytes_moved / self.busy_seconds

    def expected_seconds(self, size_bytes: int) -> float | None:
        """Return the time to load so many bytes: None if the pace is unknown, infinity for a tier that has loaded none."""
        rate = self.bytes_per_second
        if rate is None:
            return None
        return (self.ask_seconds or 0.0) + size_bytes / rate if rate else float("inf")


def slack_seconds(recompute_seconds: float) -> float:
    """Return by how much a wait may exceed the expected time."""
    return max(SLACK_SHARE * recompute_seconds, SLACK_SECONDS)
