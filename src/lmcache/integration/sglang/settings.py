"""What a user may set in the YAML file of `--lmcache-config-file` or `LMCACHE_CONFIG_FILE`: the settings of an engine's own
server (`lmcache.config.engine`), and the keys that only SGLang has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from lmcache.config.engine import FILE_VARIABLE, SGLANG_KEYS, load_engine
from lmcache.engine.connection import server_address
from lmcache.engine.settings import ServerSettings
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


def read_settings(config_file: str | None) -> ServerSettings:
    """The settings of `config_file`, or else of the file that LMCACHE_CONFIG_FILE names, and of LMCACHE_* variables.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value cannot be used; the message says what to write.
    """
    name = config_file or os.environ.get(FILE_VARIABLE, "")
    found = load_engine(file=Path(name) if name else None)
    for warning in found.warnings:
        if not any(f": {key} has " in warning for key in SGLANG_KEYS):
            logger.warning("%s", warning)
    own = _own_keys(Path(name)) if name else {}
    deadline, model_id = found.config.blocking_timeout_secs, str(own.get("model_id") or "")
    return ServerSettings(_address(own, name), found.config, deadline, model_id=model_id)


def _own_keys(path: Path) -> dict[str, Any]:
    """SGLang's keys of a file that has been read once, and is in order."""
    values = yaml.safe_load(path.read_text()) or {}
    return {key: values[key] for key in SGLANG_KEYS if key in values}


def _address(values: dict[str, Any], name: str) -> str:
    if "mp_host" not in values and "mp_port" not in values:
        return ""
    host, port = values.get("mp_host", "localhost"), values.get("mp_port", 5555)
    try:
        return server_address(str(host), int(port))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: mp_host {host!r} with mp_port {port!r} is no address: {error}") from error
