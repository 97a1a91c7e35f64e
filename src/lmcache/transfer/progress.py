"""Progress of a scatter: an extent holds one layer after the other, so the engine can use the first while the last arrive."""

from __future__ import annotations

import threading
from typing import Protocol

from lmcache.runtime import RUNTIME, Runtime


class Point(Protocol):
    """A point in a device's stream (`torch.cuda.Event`)."""

    def wait(self) -> None:
        """Make the calling thread's current stream, not the thread itself, wait for this point."""
        ...


class Progress:
    """The progress of one load, from the copying thread to the engine's threads. Planes are counted in canonical order."""

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self._changed = runtime.condition(threading.Lock())
        self._groups: list[tuple[int, Point | None]] = []
        self._ended = False

    def arrived(self, planes: int, point: Point | None = None) -> None:
        """Report that the first `planes` planes of all tokens have arrived, or will have once the device passes `point`."""
        with self._changed:
            self._groups.append((planes, point))
            self._changed.notify_all()

    def end(self) -> None:
        """Report that the load has ended, on the device too, successfully or not."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        return self._ended

    def wait_recorded(self, planes: int, timeout_seconds: float) -> bool:
        """Wait until the first `planes` planes are reported, the load ends or time runs out. Return whether they are."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._reached(planes) is not None, timeout_seconds)
            return self._reached(planes) is not None

    def wait(self, planes: int) -> None:
        """Return when work that reads the first `planes` planes may begin, or when the load has ended (see its job for how).

        On a device this holds for work that the calling thread launches into its current stream.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._reached(planes) is not None)
            group = self._reached(planes) if not self._ended else None
        if group is not None and group[1] is not None:
            group[1].wait()

    def _reached(self, planes: int) -> tuple[int, Point | None] | None:
        return next((group for group in self._groups if group[0] >= planes), None)


def planes_in_group(plane_bytes: int, group_bytes: int, most: int) -> int:
    """Return how many planes, at most `most`, make a group of about `group_bytes`. K and V of a layer stay together."""
    pairs = -(-group_bytes // max(1, 2 * plane_bytes))
    return min(most, 2 * max(1, pairs))
