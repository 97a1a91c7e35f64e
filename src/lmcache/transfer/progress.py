"""How far a scatter has come: layers lie one after the other in an extent, so the first ones can be used while the last arrive."""

from __future__ import annotations

import threading
from typing import Protocol


class Point(Protocol):
    """A point in a device's stream (`torch.cuda.Event`)."""

    def wait(self) -> None:
        """Make the calling thread's current stream wait for it, not the thread."""
        ...


class Progress:
    """Of one load. The thread that copies tells it, threads of the engine wait; planes are counted in extent order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._groups: list[tuple[int, Point | None]] = []
        self._ended = False

    def arrived(self, planes: int, point: Point | None = None) -> None:
        """The first `planes` planes of all tokens are there; with `point`, once the device has passed it."""
        with self._changed:
            self._groups.append((planes, point))
            self._changed.notify_all()

    def end(self) -> None:
        """The load has ended, well or not, and the device with it."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        return self._ended

    def wait_recorded(self, planes: int, timeout_seconds: float) -> bool:
        """Until the first `planes` planes were told of, or the load has ended, or the time is over; whether they were."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._reached(planes) is not None, timeout_seconds)
            return self._reached(planes) is not None

    def wait(self, planes: int) -> None:
        """Return when work that reads the first `planes` planes may begin, or the load has ended; whether well, its job tells.

        On a device that is work which the calling thread launches into its current stream.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._reached(planes) is not None)
            group = self._reached(planes) if not self._ended else None
        if group is not None and group[1] is not None:
            group[1].wait()

    def _reached(self, planes: int) -> tuple[int, Point | None] | None:
        return next((group for group in self._groups if group[0] >= planes), None)


def planes_in_group(plane_bytes: int, group_bytes: int, most: int) -> int:
    """How many planes, `most` at most, go together so that a group has about `group_bytes`. K and V of a layer stay together."""
    pairs = -(-group_bytes // max(1, 2 * plane_bytes))
    return min(most, 2 * max(1, pairs))
