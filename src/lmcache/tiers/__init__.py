"""Floor 3: places behind memory (L2). One protocol (`tier`, and `operation` for asynchronous tiers), one frame
format (`frame`), one folder for each store.

A tier keeps shards under keys that are the same for every engine and machine, and returns complete shards or none. It knows
nothing of leases, engines or the arena; callers pass the memory that it reads from and writes into. Third parties register
their tiers under the entry point `lmcache.tiers` (docs/tiers/your-own.md); `lmcache.testing.conformance` tests every tier.
May import: `memory`, `chunks`, floor 0; a store's client library only in that store's folder.
"""

from lmcache.tiers.operation import AsyncTier
from lmcache.tiers.tier import ABSENT, KEPT, OK, Region, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

__all__ = ["ABSENT", "KEPT", "OK", "AsyncTier", "Region", "Shard", "ShardKey", "Tier", "TierError", "TierURL", "Usage"]
