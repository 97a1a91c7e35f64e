"""Floor 0: settings. `load` fills one frozen `ServerConfig` from flags, environment, file and defaults.

This folder checks the meaning of settings; `lmcache.server.preflight` checks them against the machine.
May import: `lmcache.errors`.
"""

from lmcache.config.load import Settings, load
from lmcache.config.server import ServerConfig

__all__ = ["ServerConfig", "Settings", "load"]
