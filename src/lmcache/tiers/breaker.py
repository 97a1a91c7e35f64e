"""A tier's circuit breaker: a tier in trouble is left alone for a while, then tried with one call."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_TO_OPEN = 3
"""In a row: one lost connection is no outage."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass
class Breaker:
    """closed: calls pass. open: none do until `retry_at`. half-open: one probe is under way, and decides."""

    state: str = "closed"
    failures: int = 0
    retry_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    reason: str = ""
    """Of the last failure, for people."""

    @property
    def closed(self) -> bool:
        """Whether calls may go."""
        return self.state == "closed"

    def due(self, now: float) -> bool:
        """Whether the pause is over."""
        return self.state == "open" and now >= self.retry_at

    def probe(self, now: float) -> bool:
        """Whether the pause is over and this is the moment for one call, which decides."""
        if not self.due(now):
            return False
        self.state = "half-open"
        return True

    def succeeded(self) -> None:
        self.state, self.failures, self.pause_seconds, self.reason = "closed", 0, FIRST_PAUSE_SECONDS, ""

    def failed(self, now: float, reason: str, at_once: bool = False) -> bool:
        """True when the breaker has opened by this. `at_once`: do not wait for more failures."""
        self.failures += 1
        self.reason = reason
        if self.state == "open":
            return False  # a call that had begun before
        if self.state == "closed" and self.failures < FAILURES_TO_OPEN and not at_once:
            return False
        if self.state == "half-open":
            self.pause_seconds = min(2 * self.pause_seconds, LONGEST_PAUSE_SECONDS)
        self.state, self.retry_at = "open", now + self.pause_seconds
        return True
