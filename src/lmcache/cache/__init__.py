"""Floor 4: L1, which records where each chunk is stored, who may read or fill its extents, and what is evicted.

L1 has no thread and reads no clock: every call passes `now`. One thread of the server owns it, so it needs no lock. The modules
that decide (all but `l1`) do no I/O, so a test can run a million operations with an artificial clock.
`l1` adds the arena and its extent headers. This package may import `memory`, `chunks` and the ground floor.
"""

from lmcache.cache.claims import SERVER, Refusal
from lmcache.cache.events import KINDS, TIER_KINDS, Event
from lmcache.cache.filling import Grant
from lmcache.cache.heart import Heart, Hit, TooSmall
from lmcache.cache.l1 import L1

__all__ = ["KINDS", "L1", "SERVER", "TIER_KINDS", "Event", "Grant", "Heart", "Hit", "Refusal", "TooSmall"]
