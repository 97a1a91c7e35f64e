"""Where the server of an engine is: a daemon's address, or one of the engine's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmcache.config.engine import EngineConfig, load_engine
from lmcache.engine.connection import given_address
from lmcache.engine.embedded import embedded_address
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
DEFAULT_URL = "tcp://localhost:5555"


@dataclass(frozen=True)
class Settings:
    """url: the daemon's; "" for a server of the engine's own, as `own` says. least_gain: tokens that a load must bring."""

    url: str = ""
    own: EngineConfig | None = None
    deadline_seconds: float = 2.0
    stores_answers: bool = True
    least_gain: int = 1

    def address(self, instance: str) -> str:
        return self.url or embedded_address(instance)


def daemon_settings(llm_args: Any) -> Settings:
    """Of `kv_connector_config.server_url`.

    Raises:
        ConfigError: it is no address.
    """
    url = str(getattr(getattr(llm_args, "kv_connector_config", None), "server_url", None) or DEFAULT_URL)
    try:
        return Settings(url=given_address(url))
    except ValueError as error:
        raise ConfigError(f"kv_connector_config.server_url is {url!r} ({error}); write {DEFAULT_URL}") from None


def own_settings() -> Settings:
    """Of LMCACHE_CONFIG_FILE and the LMCACHE_* variables.

    Raises:
        ConfigError: one of them cannot be used.
    """
    found = load_engine()
    for warning in found.warnings:
        logger.warning("%s", warning)
    config = found.config
    return Settings(
        own=config,
        deadline_seconds=config.blocking_timeout_secs,
        stores_answers=config.save_decode_cache,
        least_gain=config.min_retrieve_tokens,
    )
