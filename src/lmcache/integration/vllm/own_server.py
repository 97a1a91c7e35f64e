"""The server that an engine starts for itself: in-process mode, and `--kv-offloading-backend lmcache` if no server runs."""

from __future__ import annotations

import logging
from typing import Any

from lmcache.config.engine import EngineSettings, load_engine
from lmcache.engine.embedded import EmbeddedServer, start_own_server
from lmcache.engine.hello import probe
from lmcache.engine.settings import ServerSettings
from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_PROBE_SECONDS = 1.0


def engine_settings(vllm_config: Any) -> EngineSettings:
    """Return the settings of in-process mode, from this process's environment and vLLM's `kv_connector_extra_config`.

    Raises:
        ConfigError: a setting is wrong.
    """
    return load_engine(extra=getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None) or {})


def offloading_size_gb(vllm_config: Any) -> float:
    """Return the size of `--kv-offloading-backend lmcache --kv-offloading-size N` in GiB; 0 without these flags."""
    cache = vllm_config.cache_config
    if getattr(cache, "kv_offloading_backend", None) != "lmcache":
        return 0.0
    return float(getattr(cache, "kv_offloading_size", None) or 0.0)


def server_for_offloading(
    instance: str, vllm_config: Any, settings: ServerSettings
) -> tuple[EmbeddedServer | None, str]:
    """Return the server that this call started because none answers at host:port (else None), and the address of the server
    to use: "" if the engine's own server does not start.

    To be called once, for an engine with `--kv-offloading-backend lmcache`: an engine never changes its server later.

    Raises:
        ConfigError: a setting of its own server is wrong.
    """
    size_gb = offloading_size_gb(vllm_config)
    try:
        probe(settings.address, _PROBE_SECONDS)
    except LMCacheError as error:
        logger.log(
            logging.INFO if isinstance(error.__cause__, ConnectionRefusedError) else logging.WARNING,
            "No LMCache server at %s for this engine (%s): starting one of %.15g GiB for it alone",
            *(settings.address, error, size_gb),
        )
    else:
        logger.info(
            "A server runs, so --kv-offloading-size %.15g is ignored: using the one at %s, whose own size counts",
            size_gb,
            settings.address,
        )
        return None, settings.address
    server = start_own_server(instance, engine_settings(vllm_config).config, size_gb)
    return server, server.address if server is not None else ""
