"""LMCache: a KV-cache layer for LLM engines.

The names in `__all__` are what other programs may use; docs/api.md explains them. A module is imported when one of its names is
first used, so that `import lmcache` costs nothing. The folders are floors; a file imports only from floors below its own
(ARCHITECTURE.md draws them, and a test enforces them).
"""

TYPE_CHECKING = False
"""What type checkers take for true; importing `typing` for it would take longer than all the rest of this module."""

if TYPE_CHECKING:
    from lmcache.chunks import HASH_BYTES as HASH_BYTES
    from lmcache.chunks import Layout as Layout
    from lmcache.chunks import Shard as Shard
    from lmcache.chunks import TokenChain as TokenChain
    from lmcache.chunks import shard_of_rank as shard_of_rank
    from lmcache.engine import Copies as Copies
    from lmcache.engine import Done as Done
    from lmcache.engine import Hit as Hit
    from lmcache.engine import Load as Load
    from lmcache.engine import Loading as Loading
    from lmcache.engine import Request as Request
    from lmcache.engine import Requests as Requests
    from lmcache.engine import SchedulerSession as SchedulerSession
    from lmcache.engine import Store as Store
    from lmcache.engine import WorkerSession as WorkerSession
    from lmcache.engine.embedded import EmbeddedServer as EmbeddedServer
    from lmcache.engine.embedded import embedded_address as embedded_address
    from lmcache.engine.endpoint import Endpoint as Endpoint
    from lmcache.engine.groups import GroupShape as GroupShape
    from lmcache.engine.groups import RankGroup as RankGroup
    from lmcache.engine.identity import named as named
    from lmcache.engine.identity import path_identity as path_identity
    from lmcache.engine.local import LocalRank as LocalRank
    from lmcache.engine.served import ServedKV as ServedKV
    from lmcache.errors import ConfigError as ConfigError
    from lmcache.errors import IdentityUnknown as IdentityUnknown
    from lmcache.errors import LayoutError as LayoutError
    from lmcache.errors import LMCacheError as LMCacheError
    from lmcache.errors import ServerRefused as ServerRefused
    from lmcache.errors import ServerUnavailable as ServerUnavailable
    from lmcache.tiers import ShardKey as ShardKey
    from lmcache.tiers import Tier as Tier
    from lmcache.tiers import TierError as TierError
    from lmcache.tiers import TierURL as TierURL
    from lmcache.tiers import Usage as Usage
    from lmcache.transfer.paged import PagedKV as PagedKV
    from lmcache.transfer.paged import Plane as Plane

__version__ = "0.6.0"
_MODULES = {
    "chunks": "HASH_BYTES Layout Shard TokenChain shard_of_rank",
    "engine": "Copies Done Hit Load Loading Request Requests SchedulerSession Store WorkerSession",
    "engine.embedded": "EmbeddedServer embedded_address",
    "engine.endpoint": "Endpoint",
    "engine.groups": "GroupShape RankGroup",
    "engine.identity": "named path_identity",
    "engine.local": "LocalRank",
    "engine.served": "ServedKV",
    "errors": "ConfigError IdentityUnknown LMCacheError LayoutError ServerRefused ServerUnavailable",
    "tiers": "ShardKey Tier TierError TierURL Usage",
    "transfer.paged": "PagedKV Plane",
}
"""Which module of this package defines each name."""
__all__ = sorted(" ".join(_MODULES.values()).split())


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
