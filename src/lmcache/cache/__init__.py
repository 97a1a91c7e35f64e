"""Floor 4: L1. Which chunks are where, who may read or fill which extents, what goes when room is needed.

No thread and no clock of its own: every call brings `now`. One thread of the server owns it, so it needs no lock. The decisions
(`heart`, `claims`, `room`, `table`) are pure, so a test can run a million operations with made-up clocks and deaths; `l1` puts
the arena and its extent headers behind them. May import: `memory`, `chunks`, and the ground floor.
"""

from lmcache.cache.claims import SERVER, Refusal
from lmcache.cache.events import KINDS, Event
from lmcache.cache.heart import Grant, Heart, Hit, TooSmall
from lmcache.cache.l1 import L1

__all__ = ["KINDS", "L1", "SERVER", "Event", "Grant", "Heart", "Hit", "Refusal", "TooSmall"]
