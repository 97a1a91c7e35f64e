"""The load cost model: how fast each tier is, and how much longer than expected a load may take. It reads no clock.

`cache.waits` compares these numbers with the time that the engine would need to compute the same tokens, and decides.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK_SHARE = 0.05
"""A wait may be longer than expected by this share of the time that computing would take, but at least by `SLACK_SECONDS`."""
SLACK_SECONDS = 0.010
"""The least slack. It applies to prompts that are computed in less than 200 ms."""
AWAIT_SLACK = 2.0
"""For chunks that another engine computes, the slack is so many times as long: a copy follows its step."""
AWAIT_TOLERANCE = 1.25
"""An engine begins to wait for another one that is expected to take up to so many times as long as computing: two equal engines
that begin at the same time have the same time before them, and their measured paces differ. The wait itself gets no longer."""
UNPACED_WAIT_SECONDS = 0.5
"""An engine whose own pace is not known waits for another engine while chunks become complete at least this often, and for twice
the time that the other one's pace suggests. Decode engines compute no prompts, so they never have a pace."""
UNPACED_QUIET_SECONDS = 30.0
"""It waits no longer than this without a new chunk, whatever pace the other one has stated: that one may hang, or be wrong."""
_WINDOW_SECONDS = 4.0
"""Older measurements lose half their weight whenever the tier has been busy for so many seconds more."""
_HALF_LIFE_SECONDS = 5.0
"""They also lose half their weight each time that the tier has been idle for so many seconds."""
_ASK_WEIGHT = 0.2
"""The weight of the latest answer in the moving average of response times."""


@dataclass
class Pace:
    """The measured pace of one tier, for all spaces together. A tier is busy while at least one load runs.

    bytes_moved, busy_seconds: bytes loaded, and the time in which the tier was busy with them; both fade. ask_seconds: how long
    the tier takes to answer which shards it has; None until it has answered. measured_at: when the last load ended.
    """

    bytes_moved: float = 0.0
    busy_seconds: float = 0.0
    ask_seconds: float | None = None
    measured_at: float = float("-inf")
    _running: int = 0
    _since: float = 0.0

    def began(self, now: float) -> None:
        """Note that a load has begun."""
        if not self._running:
            self._since = now
            faded = 0.5 ** ((now - self.measured_at) / _HALF_LIFE_SECONDS)
            self.bytes_moved *= faded
            self.busy_seconds *= faded
        self._running += 1

    def ended(self, now: float, size_bytes: int | None) -> None:
        """Note that a load has ended. size_bytes: of the shards that arrived; None if the call failed, which does not count."""
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
        """Note that the tier took so many seconds to answer which shards it has."""
        before = seconds if self.ask_seconds is None else self.ask_seconds
        self.ask_seconds = before + _ASK_WEIGHT * (seconds - before)

    @property
    def bytes_per_second(self) -> float | None:
        """The measured rate; None until a load has ended."""
        if not self.busy_seconds:
            return None
        return self.bytes_moved / self.busy_seconds

    def expected_seconds(self, size_bytes: int) -> float | None:
        """Return the time to load so many bytes: None if no load has ended yet, infinity if none of them brought any byte."""
        rate = self.bytes_per_second
        if rate is None:
            return None
        return (self.ask_seconds or 0.0) + size_bytes / rate if rate else float("inf")


def slack_seconds(recompute_seconds: float) -> float:
    """Return by how many seconds a wait may exceed the expected time, if computing would take `recompute_seconds`."""
    return max(SLACK_SHARE * recompute_seconds, SLACK_SECONDS)
