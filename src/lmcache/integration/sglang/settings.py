"""What a user may set in the YAML file of `--lmcache-config-file` or `LMCACHE_CONFIG_FILE`, checked once."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmcache.engine.link import server_address
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

CONFIG_VARIABLE = "LMCACHE_CONFIG_FILE"


@dataclass(frozen=True)
class Settings:
    """address: of the daemon, "" for a server of the engine's own, which then has chunks of `chunk_size` tokens and
    `max_local_cpu_size` GiB. timeout_seconds: the most that a silent server may cost. model_id: "" = find out."""

    address: str = ""
    chunk_size: int = 256
    max_local_cpu_size: float = 5.0
    timeout_seconds: float = 2.0
    model_id: str = ""


KEYS = (
    "chunk_size",
    "local_cpu",
    "max_local_cpu_size",
    "model_id",
    "mp_host",
    "mp_port",
    "mp_timeout",
    "use_layerwise",
)


def read_settings(config_file: str | None) -> Settings:
    """The settings of `config_file`, or else of the file that LMCACHE_CONFIG_FILE names, or else the defaults.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value cannot be used; the message says what to write.
    """
    name = config_file or os.environ.get(CONFIG_VARIABLE, "")
    return parse_settings(_load(Path(name)), name) if name else Settings()


def parse_settings(values: dict[str, Any], name: str) -> Settings:
    """`read_settings` of what the file `name` holds."""
    for key in values:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the known keys are {', '.join(KEYS)}"
            raise ConfigError(f"{name}: unknown key {key!r}; {hint}")
    if values.get("local_cpu", True) is not True:
        raise ConfigError(
            f"{name}: local_cpu is {values['local_cpu']!r}, but KV is kept in memory; remove it, or say true"
        )
    if "use_layerwise" in values:
        logger.info("use_layerwise is accepted and changes nothing: a load is one copy, whatever the layers")
    default = Settings()
    return Settings(
        address=_address(values, name),
        chunk_size=int(_number(values, "chunk_size", default.chunk_size, name)),
        max_local_cpu_size=_number(values, "max_local_cpu_size", default.max_local_cpu_size, name),
        timeout_seconds=_number(values, "mp_timeout", default.timeout_seconds, name, most=3599),
        model_id=str(values.get("model_id", "")),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the LMCache config file {str(path)!r}: {error}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: the file holds a {type(values).__name__}; write `key: value` lines")
    return values or {}


def _address(values: dict[str, Any], name: str) -> str:
    if "mp_host" not in values and "mp_port" not in values:
        return ""
    host, port = values.get("mp_host", "localhost"), values.get("mp_port", 5555)
    try:
        return server_address(str(host), int(port))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: mp_host {host!r} with mp_port {port!r} is no address: {error}") from error


def _number(values: dict[str, Any], key: str, default: float, name: str, most: float = 1e6) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ConfigError(f"{name}: {key} is {value!r}; it must be a number above 0, and {most:g} at most")
    return value
