"""Points in the streams of the engine's device that copies must not overtake (`jobs.Event`)."""

from __future__ import annotations

from typing import Any

from lmcache.engine.jobs import Event


def stream_point(device: str, stream: Any = None) -> Any:
    """Record a point in a device's stream (None: the current one): a copy `after` it runs after what was launched before it.
    Return None on a CPU."""
    if device.startswith("cpu"):
        return None
    import torch

    point = torch.cuda.Event(blocking=True)  # a waiting thread must not spin beside the engine's
    point.record(torch.cuda.current_stream(device) if stream is None else stream)
    return point


class Both:
    """Two points in a device's streams, as one that has passed when both have."""

    def __init__(self, one: Event, other: Event) -> None:
        self._points = one, other

    def query(self) -> bool:
        """Return whether the device has passed both."""
        return all(point.query() for point in self._points)

    def synchronize(self) -> None:
        """Wait for both."""
        for point in self._points:
            point.synchronize()


class WholeDevice:
    """All work that was launched on a device, for an engine that computes on an unknown stream."""

    def __init__(self, device: str) -> None:
        self._device = device

    def query(self) -> bool:
        """Return True: without waiting it cannot be known whether work is left."""
        return True

    def synchronize(self) -> None:
        """Wait until all of the work is done."""
        import torch

        torch.cuda.synchronize(self._device)
