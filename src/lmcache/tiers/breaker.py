"""A tier's circuit breaker: after failures a tier gets no calls for a while, and is then probed with one call."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_TO_OPEN = 3
"""Failures in a row that open the breaker, since one lost connection is no outage."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


@dataclass
class Breaker:
    """The state is closed (calls pass), open (no calls until `retry_at`), or half-open (one probe is running and decides)."""

    state: str = "closed"
    failures: int = 0
    retry_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    reason: str = ""
    """The reason of the last failure, for people."""

    @property
    def closed(self) -> bool:
        """Whether calls may be made."""
        return self.state == "closed"

    def due(self, now: float) -> bool:
        """Return whether the breaker is open and its pause is over."""
        return self.state == "open" and now >= self.retry_at

    def probe(self, now: float) -> bool:
        """Return True when the pause is over. The caller must then make one call, which decides."""
        if not self.due(now):
            return False
        self.state = "half-open"
        return True

    def succeeded(self) -> None:
        self.state, self.failures, self.pause_seconds, self.reason = "closed", 0, FIRST_PAUSE_SECONDS, ""

    def failed(self, now: float, reason: str, at_once: bool = False) -> bool:
        """Count a failure. Return True when it opens the breaker. `at_once`: do not wait for more failures."""
        self.failures += 1
        self.reason = reason
        if self.state == "open":
            return False  # the call had begun before the breaker opened
        if self.state == "closed" and self.failures < FAILURES_TO_OPEN and not at_once:
            return False
        if self.state == "half-open":
            self.pause_seconds = min(2 * self.pause_seconds, LONGEST_PAUSE_SECONDS)
        self.state, self.retry_at = "open", now + self.pause_seconds
        return True
