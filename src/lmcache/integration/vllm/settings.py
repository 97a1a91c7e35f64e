"""The user's settings in `kv_connector_extra_config`, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lmcache.config.given import nearest
from lmcache.config.options import deadline, integer, word
from lmcache.engine.endpoint import MOST_HEARTBEAT_SECONDS, TRANSFER_MODES, server_address
from lmcache.engine.settings import DEFAULT_DEADLINE_SECONDS, WITH_A_DAEMON, ServerSettings
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_PREFIX = "lmcache.mp."


def parse_host(text: str) -> str:
    """Return the host of "tcp://localhost", "localhost" or an address.

    Raises:
        ValueError: another scheme, a port inside, or nothing at all.
    """
    host = text.strip().removeprefix("tcp://").rstrip("/")
    bare_port = host.count(":") == 1 or "]:" in host
    if not host or "://" in host or "/" in host or bare_port:
        raise ValueError('write a host such as "localhost" or "tcp://10.0.0.5", the port in lmcache.mp.port')
    return host


class Setting(NamedTuple):
    """One setting: how its text is parsed, its default, and what it does. `meaning` is for people."""

    parse: Callable[[str], Any]
    default: Any
    meaning: str


SETTINGS: dict[str, Setting] = {
    "host": Setting(parse_host, "localhost", "The server's host, such as `localhost` or `tcp://10.0.0.5`."),
    "port": Setting(integer(1, 65535), 5555, "The server's port for engines."),
    "mq_timeout": Setting(
        deadline,
        DEFAULT_DEADLINE_SECONDS,
        "Seconds that one request waits for a server that does not answer. After that the engine goes on without the server and "
        "reconnects in the background.",
    ),
    "heartbeat_interval": Setting(
        deadline,
        MOST_HEARTBEAT_SECONDS,
        f"Seconds between pings of an engine that gets payload frames; at most {MOST_HEARTBEAT_SECONDS:g}.",
    ),
    "mp_transfer_mode": Setting(
        word(*TRANSFER_MODES),
        "auto",
        "`auto` and `engine_driven`: the engine's ranks copy. `lmcache_driven` means `auto`. `payload`: payload frames, even on "
        "the server's host.",
    ),
    "model_id": Setting(
        str, "", "A name for the weights, for weights that cannot be identified. Without it: from the weights."
    ),
    "lossy_kv": Setting(
        word("none", "int8", "int8-l1", "k8v4-l1"),
        "none",
        "`int8`: the engine accepts KV that tiers with `codec=int8` have rounded, and has KV under names of its own. `int8-l1`: "
        "the engine rounds what it stores, so that memory holds about twice the tokens (CPU only). `k8v4-l1`: the same with V in "
        "4 bits, for 2.4 times the tokens and larger errors. `none`: exact KV only. See [codecs](../codecs.md).",
    ),
    "synchronous_loads": Setting(
        word("auto", "never"),
        "auto",
        "`auto`: the forward pass of a request's first step waits for its load, layer by layer, if no other request runs or if "
        "the load takes less than 2 ms. Otherwise, and with `never`, the request waits unscheduled, so that no other request is "
        "held up.",
    ),
}
"""Name without `lmcache.mp.` -> the setting."""


def read_settings(kv_transfer_config: Any) -> ServerSettings:
    """Return the settings of a `KVTransferConfig`.

    Raises:
        ConfigError: a value cannot be used; the message names the value and what to write in its place.
    """
    names = [_PREFIX + name for name in SETTINGS]
    for name in getattr(kv_transfer_config, "kv_connector_extra_config", None) or {}:
        if name.startswith(_PREFIX) and name not in names:
            logger.warning(
                "kv_connector_extra_config %s is not a setting and is ignored: %s", name, nearest(name, names)
            )

    def read(name: str) -> Any:
        value = kv_transfer_config.get_from_extra_config(_PREFIX + name, SETTINGS[name].default)
        try:
            return SETTINGS[name].parse(str(value))
        except ValueError as error:
            raise ConfigError(f"{_PREFIX}{name} is {value!r}: {error}") from None

    mode, heartbeat = read("mp_transfer_mode"), read("heartbeat_interval")
    if mode == "lmcache_driven":
        logger.info("lmcache.mp.mp_transfer_mode=lmcache_driven means auto here: the ranks copy, the server decides")
        mode = "auto"
    if heartbeat > MOST_HEARTBEAT_SECONDS:
        logger.warning(
            "lmcache.mp.heartbeat_interval is %g: a server forgets an engine that is silent for 30 s, so %g is used",
            heartbeat,
            MOST_HEARTBEAT_SECONDS,
        )
    return ServerSettings(
        server_address(read("host"), read("port")),
        replace(WITH_A_DAEMON, lossy_kv=read("lossy_kv")),
        deadline_seconds=read("mq_timeout"),
        heartbeat_seconds=min(heartbeat, MOST_HEARTBEAT_SECONDS),
        transfer_mode=mode,
        model_id=read("model_id"),
        synchronous_loads=read("synchronous_loads"),
    )


def recompute_failed_loads(kv_transfer_config: Any) -> None:
    """Set the policy so that a failed load costs time, not the request. vLLM reads it after making the connector."""
    if getattr(kv_transfer_config, "kv_load_failure_policy", "recompute") == "fail":
        kv_transfer_config.kv_load_failure_policy = "recompute"
        logger.info('kv_load_failure_policy is now "recompute": KV that cannot be loaded is computed')
