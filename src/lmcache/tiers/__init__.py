"""Floor 3: places behind memory (L2). One protocol (`tier`; its calls are the objects of `operation`), one frame
format (`frame`), one file a store.

A tier keeps shards under keys that are the same for every engine and machine, and gives back whole ones or none. It knows
nothing of leases, engines or the arena; it is handed memory to read from and to write into. Third parties add theirs behind
the entry point `lmcache.tiers` (docs/tiers/your-own.md); what every tier must do is tested by `lmcache.testing.conformance`.
May import: `memory`, `chunks`, the ground floor; a store's own client library only inside that store's file.
"""

from lmcache.tiers.tier import ABSENT, KEPT, OK, AsyncTier, Region, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

__all__ = ["ABSENT", "KEPT", "OK", "AsyncTier", "Region", "Shard", "ShardKey", "Tier", "TierError", "TierURL", "Usage"]
