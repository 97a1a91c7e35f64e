"""Where an engine's server is, and how the engine asks it; integrations read it from wherever their engine keeps settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.config.engine import EngineConfig
from lmcache.engine.connection import MOST_HEARTBEAT_SECONDS, Endpoint
from lmcache.engine.embedded import embedded_address

DEFAULT_ADDRESS = "tcp://localhost:5555"
DEFAULT_DEADLINE_SECONDS = 2.0


@dataclass(frozen=True)
class ServerSettings:
    """address: of the daemon, "" for a server of the engine's own. config: what that one is like, and what is loaded and stored.
    deadline_seconds: the most that a request may be delayed by the server's silence. model_id: the weights' name where it cannot
    be found out, or is to be another one ("" = find out)."""

    address: str = DEFAULT_ADDRESS
    config: EngineConfig = field(default_factory=EngineConfig)
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    heartbeat_seconds: float = MOST_HEARTBEAT_SECONDS
    transfer_mode: str = "auto"
    model_id: str = ""

    def endpoint(self, instance: str, role: str, rank: int = 0, address: str = "") -> Endpoint:
        """How the engine `instance` reaches the server, at another `address` than the configured one where that is given."""
        return Endpoint(
            address or self.address or embedded_address(instance),
            *(instance, role, rank, self.deadline_seconds, self.heartbeat_seconds, self.transfer_mode),
        )
