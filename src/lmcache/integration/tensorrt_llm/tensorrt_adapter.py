"""The names that TensorRT-LLM's preset `lmcache` looks for: with a server of the engine's own."""

from __future__ import annotations

from lmcache.engine.settings import ServerSettings
from lmcache.integration.tensorrt_llm.connector import Scheduler, Worker
from lmcache.integration.tensorrt_llm.settings import own_settings

__all__ = ["LMCacheKvConnectorScheduler", "LMCacheKvConnectorWorker"]


class LMCacheKvConnectorScheduler(Scheduler):
    """Rank 0's."""


class LMCacheKvConnectorWorker(Worker):
    """One a rank; that of rank 0 starts the server."""

    def settings(self) -> ServerSettings:
        return own_settings()
