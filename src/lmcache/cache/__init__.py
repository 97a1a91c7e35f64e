"""Floor 4: the heart. Which chunks are where, who may read or fill which extents, what goes when room is needed.

Pure: no I/O, no threads, no clock of its own; every call brings `now`. One thread of the server owns it, so it needs no lock,
and a test can run a million operations with made-up clocks and deaths. May import: `memory.slabs`, `memory.order`, `chunks`,
and the ground floor.
"""

from lmcache.cache.heart import (
    SERVER,
    Cleared,
    Committed,
    Completed,
    Event,
    Freed,
    Grant,
    Heart,
    Hit,
    Refusal,
    TooSmall,
)

__all__ = [
    "SERVER",
    "Cleared",
    "Committed",
    "Completed",
    "Event",
    "Freed",
    "Grant",
    "Heart",
    "Hit",
    "Refusal",
    "TooSmall",
]
