"""Loads that a forward waits for layer by layer: when vLLM can be relied on to do so, and what if it did not.

vLLM's attention layers call back before they read their KV, unless a CUDA graph of the whole forward is replayed, or an
attention of another make is at work. No release says beforehand which it will be. So a kind of forward (eager, piecewise
graphs) is relied on only once a forward of that kind, and every later one, has called for every layer; else loads end before
the forward begins. And should a layer not call all the same, the step's loads count as failed, and vLLM computes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmcache.transfer.progress import Progress

_KINDS = ("NONE", "PIECEWISE")
"""vLLM's names of the forwards in which attention is called from Python."""


class Layers:
    """names: of this rank's layers, in slot order. planes: of all of them together."""

    def __init__(self, names: Sequence[str], planes: int) -> None:
        each = planes // len(names)
        self._planes = {name: (number + 1) * each for number, name in enumerate(names)}
        self._all = planes
        self._called: set[str] = set()
        self._kind = ""
        self._reliable: dict[str, bool] = {}
        """Kind of forward -> whether every one of them has called for all layers."""

    def begin(self) -> None:
        """A step begins."""
        self._kind = ""
        self._called.clear()

    def will_wait(self, forward_context: Any) -> bool:
        """Whether the forward that this context belongs to will wait for each layer before it reads the layer's KV."""
        mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", "")
        if mode in _KINDS and getattr(forward_context, "attn_metadata", None) is not None:
            self._kind = mode
        return self._reliable.get(self._kind, False)

    def wait(self, name: str, loads: Iterable[Progress]) -> None:
        """Return when work that reads this layer's KV may be launched. A layer that is not known waits for all."""
        self._called.add(name)
        planes = self._planes.get(name, self._all)
        for load in loads:
            load.wait(planes)

    def end(self) -> bool:
        """The forward has been launched: whether it has called for every layer."""
        whole = self._called >= self._planes.keys()
        if self._kind:
            self._reliable[self._kind] = whole and self._reliable.get(self._kind, True)
        return whole
