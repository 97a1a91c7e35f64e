"""The names that TensorRT-LLM's preset `lmcache-mp` looks for: with the daemon at `server_url`."""

from __future__ import annotations

from lmcache.engine.endpoint import given_address
from lmcache.engine.settings import DEFAULT_ADDRESS, ServerSettings
from lmcache.errors import ConfigError
from lmcache.integration.tensorrt_llm.connector import Scheduler, Worker

__all__ = ["LMCacheMPKvConnectorScheduler", "LMCacheMPKvConnectorWorker"]


class LMCacheMPKvConnectorScheduler(Scheduler):
    """Rank 0's."""


class LMCacheMPKvConnectorWorker(Worker):
    """One a rank."""

    def settings(self) -> ServerSettings:
        """Of `kv_connector_config.server_url`."""
        url = str(getattr(getattr(self._args, "kv_connector_config", None), "server_url", None) or DEFAULT_ADDRESS)
        try:
            return ServerSettings(given_address(url))
        except ValueError as error:
            raise ConfigError(f"kv_connector_config.server_url is {url!r} ({error}); write {DEFAULT_ADDRESS}") from None
