"""A name that SGLang 0.5.13 to 0.5.19 imports from here."""

from __future__ import annotations

from typing import NamedTuple

from lmcache.integration.sglang.settings import read_settings


class MPAddress(NamedTuple):
    """What SGLang reads of the YAML file."""

    mp_host: str
    mp_port: int


def lmcache_get_config(config_file: str | None = None) -> MPAddress:
    """Where the daemon is, tcp://localhost:5555 where the file does not say.

    Raises:
        ConfigError: as `read_settings`.
    """
    host, _, port = (read_settings(config_file).address or "tcp://localhost:5555").rpartition(":")
    return MPAddress(host, int(port))
