"""Where the server of an engine is: a daemon's address, or one of the engine's own."""

from __future__ import annotations

from typing import Any

from lmcache.config.engine import EngineConfig, load_engine
from lmcache.engine.connection import given_address
from lmcache.engine.settings import DEFAULT_ADDRESS, ServerSettings
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


def daemon_settings(llm_args: Any) -> ServerSettings:
    """Of `kv_connector_config.server_url`.

    Raises:
        ConfigError: it is no address.
    """
    url = str(getattr(getattr(llm_args, "kv_connector_config", None), "server_url", None) or DEFAULT_ADDRESS)
    try:
        return ServerSettings(given_address(url), EngineConfig(save_decode_cache=True))
    except ValueError as error:
        raise ConfigError(f"kv_connector_config.server_url is {url!r} ({error}); write {DEFAULT_ADDRESS}") from None


def own_settings() -> ServerSettings:
    """Of LMCACHE_CONFIG_FILE and the LMCACHE_* variables.

    Raises:
        ConfigError: one of them cannot be used.
    """
    found = load_engine()
    for warning in found.warnings:
        logger.warning("%s", warning)
    return ServerSettings("", found.config, found.config.blocking_timeout_secs)
