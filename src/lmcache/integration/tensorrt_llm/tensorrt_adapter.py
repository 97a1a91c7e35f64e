"""The names that TensorRT-LLM's preset `lmcache` looks for: with a server of the engine's own."""

from __future__ import annotations

from lmcache.config.engine import load_engine
from lmcache.engine.settings import ServerSettings
from lmcache.integration.tensorrt_llm.connector import Scheduler, Worker
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

__all__ = ["LMCacheKvConnectorScheduler", "LMCacheKvConnectorWorker"]


class LMCacheKvConnectorScheduler(Scheduler):
    """Rank 0's."""


class LMCacheKvConnectorWorker(Worker):
    """One a rank; that of rank 0 starts the server."""

    def settings(self) -> ServerSettings:
        """Of LMCACHE_CONFIG_FILE and the LMCACHE_* variables."""
        found = load_engine()
        for warning in found.warnings:
            logger.warning("%s", warning)
        return ServerSettings("", found.config, found.config.blocking_timeout_secs)
