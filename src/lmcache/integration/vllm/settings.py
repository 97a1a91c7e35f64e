"""The user's settings in `kv_connector_extra_config`, checked once."""

from __future__ import annotations

import math
from typing import Any

from lmcache.config.load import nearest
from lmcache.engine.connection import MOST_DEADLINE_SECONDS, MOST_HEARTBEAT_SECONDS, TRANSFER_MODES, server_address
from lmcache.engine.settings import DEFAULT_DEADLINE_SECONDS, ServerSettings
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_PREFIX = "lmcache.mp."
_NAMES = [
    _PREFIX + name for name in ("host", "port", "mq_timeout", "heartbeat_interval", "mp_transfer_mode", "model_id")
]


def read_settings(kv_transfer_config: Any) -> ServerSettings:
    """Return the settings of a `KVTransferConfig`.

    Raises:
        ConfigError: a value cannot be used; the message names the value and what to write in its place.
    """
    for name in getattr(kv_transfer_config, "kv_connector_extra_config", None) or {}:
        if name.startswith(_PREFIX) and name not in _NAMES:
            logger.warning(
                "kv_connector_extra_config %s is not a setting and is ignored: %s", name, nearest(name, _NAMES)
            )
    get = kv_transfer_config.get_from_extra_config
    mode = str(get("lmcache.mp.mp_transfer_mode", "auto"))
    if mode not in TRANSFER_MODES:
        raise ConfigError(f"lmcache.mp.mp_transfer_mode is {mode!r}; use one of {', '.join(TRANSFER_MODES)}")
    if mode == "lmcache_driven":
        logger.info("lmcache.mp.mp_transfer_mode=lmcache_driven means auto here: the ranks copy, the server decides")
        mode = "auto"
    heartbeat = _seconds("lmcache.mp.heartbeat_interval", get("lmcache.mp.heartbeat_interval", MOST_HEARTBEAT_SECONDS))
    if heartbeat > MOST_HEARTBEAT_SECONDS:
        logger.warning(
            "lmcache.mp.heartbeat_interval is %g: a server forgets an engine that is silent for 30 s, so %g is used",
            heartbeat,
            MOST_HEARTBEAT_SECONDS,
        )
        heartbeat = MOST_HEARTBEAT_SECONDS
    return ServerSettings(
        server_address(parse_host(get("lmcache.mp.host", "tcp://localhost")), _port(get("lmcache.mp.port", 5555))),
        deadline_seconds=_seconds("lmcache.mp.mq_timeout", get("lmcache.mp.mq_timeout", DEFAULT_DEADLINE_SECONDS)),
        heartbeat_seconds=heartbeat,
        transfer_mode=mode,
        model_id=str(get("lmcache.mp.model_id", "")),
    )


def recompute_failed_loads(kv_transfer_config: Any) -> None:
    """Set the policy so that a failed load costs time, not the request. vLLM reads it after making the connector."""
    if getattr(kv_transfer_config, "kv_load_failure_policy", "recompute") == "fail":
        kv_transfer_config.kv_load_failure_policy = "recompute"
        logger.info('kv_load_failure_policy is now "recompute": KV that cannot be loaded is computed')


def parse_host(value: object) -> str:
    """Return the bare host of "tcp://localhost", "localhost" or an address.

    Raises:
        ConfigError: another scheme, a port inside, or nothing at all.
    """
    host = str(value).strip().removeprefix("tcp://").rstrip("/")
    bare_port = host.count(":") == 1 or "]:" in host
    if not host or "://" in host or "/" in host or bare_port:
        raise ConfigError(
            f'lmcache.mp.host is {value!r}; write a host such as "localhost" or "tcp://10.0.0.5", the port in lmcache.mp.port'
        )
    return host


def _port(value: object) -> int:
    try:
        port = int(str(value))
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ConfigError(f"lmcache.mp.port is {value!r}; it must be a number from 1 to 65535 (the server's --port)")
    return port


def _seconds(name: str, value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < MOST_DEADLINE_SECONDS:
        raise ConfigError(
            f"{name} is {value!r}; it must be a number of seconds above 0, and below {MOST_DEADLINE_SECONDS:g}"
        )
    return seconds
