"""Loads that a forward of SGLang waits for layer by layer.

SGLang's KV pools call a counter of SGLang's own host cache before they return a layer's KV; where a CUDA graph of a complete
prefill is replayed, SGLang calls it for the last layer first. Replacing the counter by an object with the same methods
(`LayerDoneCounter` in `managers/cache_controller.py` of SGLang 0.5.23) makes forwards wait for loads of LMCache.
"""

from __future__ import annotations

from typing import Any

from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)


class LayerLoads:
    """The running loads. planes: number of planes of all layers together."""

    def __init__(self, num_layers: int, planes: int) -> None:
        self.num_layers = num_layers
        self._planes = planes
        self._loads: list[Progress] = []

    @property
    def consumer_index(self) -> int:
        """0 while there is a load to wait for, else -1, as SGLang's."""
        self._loads = [load for load in self._loads if not load.ended]
        return 0 if self._loads else -1

    def begin(self, load: Progress) -> None:
        """Make forwards that are launched from now on wait for `load`."""
        self._loads.append(load)

    def wait_until(self, layer: int) -> None:
        """Return when work that reads this layer (counted from the pool's first) may be launched in the current stream."""
        if self.consumer_index < 0:
            return
        for load in self._loads:
            load.wait((layer + 1) * self._planes // self.num_layers)


def layer_loads(pool: Any, num_layers: int, planes: int, wanted: bool) -> LayerLoads | None:
    """Return the counter that `pool` calls from now on; None if forwards cannot or must not wait: then loads end before them."""
    free = getattr(pool, "layer_transfer_counter", pool) is None
    if not wanted or not free:
        return None
    loads = LayerLoads(num_layers, planes)
    pool.register_layer_transfer_counter(loads)
    logger.debug("Forwards wait for loads layer by layer")
    return loads
