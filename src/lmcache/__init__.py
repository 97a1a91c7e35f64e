"""LMCache: a KV-cache layer for LLM engines.

The names in `__all__` are what other programs may use; docs/api.md explains them. A module is imported when one of its names is
first used, so that `import lmcache` costs nothing. The folders are floors; a file imports only from floors below its own
(ARCHITECTURE.md draws them, and a test enforces them).
"""

TYPE_CHECKING = False
"""What type checkers take for true; importing `typing` for it would take longer than all the rest of this module."""

if TYPE_CHECKING:
    from lmcache.chunks import HASH_BYTES, Layout, Shard, TokenChain, shard_of_rank
    from lmcache.engine import (
        Copies,
        Done,
        Hit,
        Load,
        Loading,
        Request,
        Requests,
        SchedulerSession,
        Store,
        WorkerSession,
    )
    from lmcache.engine.embedded import EmbeddedServer, embedded_address
    from lmcache.engine.endpoint import Endpoint
    from lmcache.engine.identity import named, path_identity
    from lmcache.engine.local import LocalRank
    from lmcache.engine.served import ServedKV
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
    "Copies",
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
    "LocalRank",
    "PagedKV",
    "Plane",
    "Request",
    "Requests",
    "SchedulerSession",
    "ServedKV",
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
    "named",
    "path_identity",
    "shard_of_rank",
]
_MODULES = {
    "chunks": "HASH_BYTES Layout Shard TokenChain shard_of_rank",
    "engine": "Copies Done Hit Load Loading Request Requests SchedulerSession Store WorkerSession",
    "engine.embedded": "EmbeddedServer embedded_address",
    "engine.endpoint": "Endpoint",
    "engine.identity": "named path_identity",
    "engine.local": "LocalRank",
    "engine.served": "ServedKV",
    "errors": "ConfigError IdentityUnknown LMCacheError LayoutError ServerRefused ServerUnavailable",
    "tiers": "ShardKey Tier TierError TierURL Usage",
    "transfer.paged": "PagedKV Plane",
}
"""Which module of this package defines each name."""


def __getattr__(name: str) -> object:
    """Import the module that defines `name` when the name is first used."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names.split():
            globals()[name] = found = getattr(import_module(f"lmcache.{module}"), name)
            return found
    raise AttributeError(f"module 'lmcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
