"""The settings of an engine's connection to its server; each integration reads them from the engine's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmcache.config.engine import EngineConfig
from lmcache.engine.embedded import embedded_address
from lmcache.engine.endpoint import MOST_HEARTBEAT_SECONDS, Endpoint

DEFAULT_ADDRESS = "tcp://localhost:5555"
DEFAULT_DEADLINE_SECONDS = 2.0
WITH_A_DAEMON = EngineConfig(save_decode_cache=True, save_unfull_chunk=False)
"""The settings of loads and stores for an engine that uses a daemon."""


@dataclass(frozen=True)
class ServerSettings:
    """address: the daemon's address, "" for a server of the engine's own. config: settings of that server, and of loads and
    stores. deadline_seconds: how long a silent server may delay a request. model_id: name of the weights, for weights that cannot
    be identified, or to override their identity ("" = identify them). synchronous_loads: which loads forwards wait for, in an
    engine that can choose (vLLM with a daemon)."""

    address: str = DEFAULT_ADDRESS
    config: EngineConfig = WITH_A_DAEMON
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    heartbeat_seconds: float = MOST_HEARTBEAT_SECONDS
    transfer_mode: str = "auto"
    model_id: str = ""
    synchronous_loads: Literal["auto", "never"] = "auto"

    @property
    def lossy_kv(self) -> str:
        """What may have changed the KV that the engine accepts, a name of `LOSSY_KV`. Tiers of a server of its own may say."""
        asked = self.config.lossy_kv
        return asked if asked != "auto" else "none" if self.address else self.config.lossy_kv_of_tiers

    def endpoint(self, instance: str, role: str, rank: int = 0, address: str = "") -> Endpoint:
        """Return the endpoint of the engine `instance`, with `address`, if given, in place of the configured address."""
        return Endpoint(
            address or self.address or embedded_address(instance),
            *(instance, role, rank, self.deadline_seconds, self.heartbeat_seconds, self.transfer_mode),
        )
