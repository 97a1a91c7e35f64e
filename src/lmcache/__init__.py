"""LMCache: a KV-cache layer for LLM engines.

The names in `__all__` are what other programs may use; docs/api.md explains them. A module is imported when one of its names is
first used, so that `import lmcache` costs nothing. The folders are floors; a file imports only from floors below its own
(ARCHITECTURE.md draws them, and a test enforces them).
"""

TYPE_CHECKING = False
"""What type checkers take for true; importing `typing` for it would take longer than all the rest of this module."""

if TYPE_CHECKING:
    from lmcache.chunks import HASH_BYTES, Layout, Shard, TokenChain, shard_of_rank
    from lmcache.engine import Done, Hit, Load, Loading, SchedulerSession, Store, WorkerSession
    from lmcache.engine.connection import Endpoint
    from lmcache.engine.embedded import EmbeddedServer, embedded_address
    from lmcache.errors import (
        ConfigError,
        IdentityUnknown,
        LayoutError,
        LMCacheError,
        ServerRefused,
        ServerUnavailable,
    )
    from lmcache.tiers import ShardKey, Tier, TierError, TierURL, Usage
    from lmcache.transfer.paged import PagedKV, Plane

__version__ = "0.6.0"
__all__ = [
    "HASH_BYTES",
    "ConfigError",
    "Done",
    "EmbeddedServer",
    "Endpoint",
    "Hit",
    "IdentityUnknown",
    "LMCacheError",
    "Layout",
    "LayoutError",
    "Load",
    "Loading",
    "PagedKV",
    "Plane",
    "SchedulerSession",
    "ServerRefused",
    "ServerUnavailable",
    "Shard",
    "ShardKey",
    "Store",
    "Tier",
    "TierError",
    "TierURL",
    "TokenChain",
    "Usage",
    "WorkerSession",
    "embedded_address",
    "shard_of_rank",
]
_MODULES = {
    "chunks": "HASH_BYTES Layout Shard TokenChain shard_of_rank",
    "engine": "Done Hit Load Loading SchedulerSession Store WorkerSession",
    "engine.embedded": "EmbeddedServer embedded_address",
    "engine.link": "Endpoint",
    "errors": "ConfigError IdentityUnknown LMCacheError LayoutError ServerRefused ServerUnavailable",
    "tiers": "ShardKey Tier TierError TierURL Usage",
    "transfer.paged": "PagedKV Plane",
}
"""Which module of this package defines each name."""


def __getattr__(name: str) -> object:
    """Import the module that defines `name`, the first time that somebody uses it."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names.split():
            globals()[name] = found = getattr(import_module(f"lmcache.{module}"), name)
            return found
    raise AttributeError(f"module 'lmcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
