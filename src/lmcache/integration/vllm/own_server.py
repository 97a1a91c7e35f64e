"""The server that an engine starts for itself: in-process mode, and `--kv-offloading-backend lmcache` where no server is."""

from __future__ import annotations

import logging
import os
from typing import Any

from lmcache.config.engine import EngineSettings, load_engine
from lmcache.engine.connection import probe
from lmcache.engine.embedded import EmbeddedServer
from lmcache.errors import ConfigError, LMCacheError
from lmcache.integration.vllm.settings import Settings
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_PROBE_SECONDS = 1.0


def engine_settings(vllm_config: Any) -> EngineSettings:
    """The settings of in-process mode, from this process's environment and vLLM's `kv_connector_extra_config`.

    Raises:
        ConfigError: one of them is wrong.
    """
    return load_engine(extra=getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None) or {})


def start_server(instance: str, settings: EngineSettings, size_gb: float = 0.0) -> EmbeddedServer | None:
    """The server of the engine `instance`, of `size_gb` or of the configured size; None, with a line, where it cannot be."""
    config = settings.config
    quiet = () if "LMCACHE_LOG_LEVEL" in os.environ else ("--log-level", "WARNING")
    try:
        return EmbeddedServer(
            instance,
            l1_size_gb=size_gb or config.max_local_cpu_size,
            chunk_size=config.chunk_size,
            flags=(*quiet, *config.server_flags),
        )
    except ConfigError as error:
        logger.error("LMCache serves nothing for this engine: %s", error)
        return None


def offloading_size_gb(vllm_config: Any) -> float:
    """The size of `--kv-offloading-backend lmcache --kv-offloading-size N` in GiB, 0 where vLLM was not started so."""
    cache = vllm_config.cache_config
    if getattr(cache, "kv_offloading_backend", None) != "lmcache":
        return 0.0
    return float(getattr(cache, "kv_offloading_size", None) or 0.0)


def server_for_offloading(instance: str, vllm_config: Any, settings: Settings) -> tuple[EmbeddedServer | None, str]:
    """The server that an engine with `--kv-offloading-backend lmcache` has started for want of one at host:port, and the
    address of the one to use: "" where its own does not start.

    Asked once: an engine never changes its server later.

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
            "--kv-offloading-size %.15g is that of no server: using the one at %s, whose own size counts",
            size_gb,
            settings.address,
        )
        return None, settings.address
    server = start_server(instance, engine_settings(vllm_config), size_gb)
    return server, server.address if server is not None else ""
