"""The server that an engine starts for itself: in-process mode, and `--kv-offloading-backend lmcache` if no server runs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from lmcache.config.engine import EngineConfig, EngineSettings, load_engine
from lmcache.engine.embedded import EmbeddedServer, start_own_server
from lmcache.engine.hello import probe
from lmcache.engine.settings import ServerSettings
from lmcache.errors import LMCacheError
from lmcache.integration.vllm.model import ModelKV
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_PROBE_SECONDS = 1.0


def engine_settings(vllm_config: Any) -> EngineSettings:
    """Return the settings of in-process mode, from this process's environment and vLLM's `kv_connector_extra_config`.

    Raises:
        ConfigError: a setting is wrong.
    """
    extra = getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None) or {}
    return load_engine(extra=extra, blends=True)


def start_fitting_server(
    instance: str, config: EngineConfig, kv: ModelKV, size_gb: float = 0.0
) -> EmbeddedServer | None:
    """Start the engine's own server as `start_own_server` does, with larger chunks where the model cannot be served with those
    of the settings."""
    tokens = kv.chunk_tokens(config.chunk_size)
    if tokens != config.chunk_size:
        logger.info(
            "This engine's own server has chunks of %d tokens instead of %d (chunk_size): they have to end where the engine has "
            "the windows or the states of the model's layers",
            *(tokens, config.chunk_size),
        )
    return start_own_server(instance, dataclasses.replace(config, chunk_size=tokens), size_gb)


def offloading_size_gb(vllm_config: Any) -> float:
    """Return the size of `--kv-offloading-backend lmcache --kv-offloading-size N` in GiB; 0 without these flags."""
    cache = vllm_config.cache_config
    if getattr(cache, "kv_offloading_backend", None) != "lmcache":
        return 0.0
    return float(getattr(cache, "kv_offloading_size", None) or 0.0)


def server_for_offloading(
    instance: str, vllm_config: Any, settings: ServerSettings, kv: ModelKV
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
    server = start_fitting_server(instance, engine_settings(vllm_config).config, kv, size_gb)
    return server, server.address if server is not None else ""
