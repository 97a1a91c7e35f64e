"""What a user may set in the YAML file of `--lmcache-config-file` or `LMCACHE_CONFIG_FILE`: the settings of an engine's own
server (`lmcache.config.engine`), and the keys that only SGLang has."""

from __future__ import annotations

import os
from pathlib import Path

from lmcache.config.engine import FILE_VARIABLE, SGLANG_KEYS, load_engine
from lmcache.engine.endpoint import server_address
from lmcache.engine.settings import ServerSettings
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


def read_settings(config_file: str | None) -> ServerSettings:
    """Return the settings of `config_file`, or else of the file that LMCACHE_CONFIG_FILE names, and of LMCACHE_* variables.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value cannot be used; the message says what to write.
    """
    name = config_file or os.environ.get(FILE_VARIABLE, "")
    found = load_engine(file=Path(name) if name else None)
    for warning in found.warnings:
        if not any(f": {key} has " in warning for key in SGLANG_KEYS):
            logger.warning("%s", warning)
    own = {key: found.values[key] for key in SGLANG_KEYS if found.sources[key].startswith(f"{name}:")}
    address = ""
    if "mp_host" in own or "mp_port" in own:
        address = daemon_address(own.get("mp_host", "localhost"), own.get("mp_port", 5555), f"{name}: ")
    deadline, model_id = found.config.blocking_timeout_secs, own.get("model_id", "")
    return ServerSettings(address, found.config, deadline, model_id=model_id)


def daemon_address(host: object, port: object, where: str = "") -> str:
    """Return tcp://host:port of a daemon. where: begins the message of the error.

    Raises:
        ConfigError: host and port are no address.
    """
    try:
        return server_address(str(host), int(str(port)))
    except ValueError as error:
        raise ConfigError(f"{where}mp_host {host!r} with mp_port {port!r} is no address: {error}") from error
