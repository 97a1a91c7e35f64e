"""Floor 0: settings. One frozen `ServerConfig`, filled in one place from flags, environment, file and defaults.

What a setting means is checked here; what the machine has is checked by `lmcache.server.preflight`.
May import: `lmcache.errors`.
"""

from lmcache.config.load import Settings, load
from lmcache.config.server import ServerConfig

__all__ = ["ServerConfig", "Settings", "load"]
