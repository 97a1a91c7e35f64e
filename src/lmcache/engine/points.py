"""Points in the work of the engine's device, which copies must not overtake (`jobs.Event`)."""

from __future__ import annotations

from typing import Any

from lmcache.engine.jobs import Event


def stream_point(device: str, stream: Any = None) -> Any:
    """Where a device's stream (None: the current one) is now: a copy `after` it comes after what was launched before. None on a
    CPU."""
    if device.startswith("cpu"):
        return None
    import torch

    point = torch.cuda.Event(blocking=True)  # a waiting thread must not spin beside the engine's
    point.record(torch.cuda.current_stream(device) if stream is None else stream)
    return point


class Both:
    """Two points in a device's streams."""

    def __init__(self, one: Event, other: Event) -> None:
        self._points = one, other

    def query(self) -> bool:
        """Whether the device has passed both."""
        return all(point.query() for point in self._points)

    def synchronize(self) -> None:
        """Wait for both."""
        for point in self._points:
            point.synchronize()


class WholeDevice:
    """Everything that was launched on a device, where it is not known on which stream the engine computes."""

    def __init__(self, device: str) -> None:
        self._device = device

    def query(self) -> bool:
        """Done, as far as one can tell without waiting."""
        return True

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        import torch

        torch.cuda.synchronize(self._device)
