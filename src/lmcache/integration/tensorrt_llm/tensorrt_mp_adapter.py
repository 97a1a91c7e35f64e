"""The names that TensorRT-LLM's preset `lmcache-mp` looks for: with the daemon at `server_url`."""

from __future__ import annotations

from lmcache.engine.settings import ServerSettings
from lmcache.integration.tensorrt_llm.connector import Scheduler, Worker
from lmcache.integration.tensorrt_llm.settings import daemon_settings

__all__ = ["LMCacheMPKvConnectorScheduler", "LMCacheMPKvConnectorWorker"]


class LMCacheMPKvConnectorScheduler(Scheduler):
    """Rank 0's."""


class LMCacheMPKvConnectorWorker(Worker):
    """One a rank."""

    def settings(self) -> ServerSettings:
        return daemon_settings(self._args)
