"""Loads that a forward waits for layer by layer, in the kinds of forward where vLLM does so reliably.

vLLM's attention layers call the connector before they read their KV, unless a CUDA graph of the complete forward is replayed or
another kind of attention runs. No release says beforehand which it will be. So a kind of forward (eager, piecewise graphs)
counts as reliable only once a forward of that kind, and every later one, has called for every layer; otherwise loads end before
the forward begins. If a layer of a reliable kind does not call, the step's loads count as failed, and vLLM computes them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmcache.transfer.progress import Progress

_KINDS = ("NONE", "PIECEWISE")
"""vLLM's names of the kinds of forward in which Python calls attention."""


class Layers:
    """The layers of one rank. names: in the order of the extent. planes: number of planes of all layers together."""

    def __init__(self, names: Sequence[str], planes: int) -> None:
        each = planes // len(names)
        self._planes = {name: (number + 1) * each for number, name in enumerate(names)}
        self._all = planes
        self._called: set[str] = set()
        self._kind = ""
        self._reliable: dict[str, bool] = {}
        """Kind of forward -> whether every forward of that kind has called for all layers."""

    def begin(self) -> None:
        """Begin a step."""
        self._kind = ""
        self._called.clear()

    def will_wait(self, forward_context: Any) -> bool:
        """Return whether the forward of this context will wait for each layer before it reads the layer's KV."""
        mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", "")
        if mode in _KINDS and getattr(forward_context, "attn_metadata", None) is not None:
            self._kind = mode
        return self._reliable.get(self._kind, False)

    def wait(self, name: str, loads: Iterable[Progress]) -> None:
        """Return when work that reads this layer's KV may be launched. An unknown layer waits for all layers."""
        self._called.add(name)
        planes = self._planes.get(name, self._all)
        for load in loads:
            load.wait(planes)

    def end(self) -> bool:
        """End the forward, which has been launched. Return whether it has called for every layer."""
        complete = self._called >= self._planes.keys()
        if self._kind:
            self._reliable[self._kind] = complete and self._reliable.get(self._kind, True)
        return complete
