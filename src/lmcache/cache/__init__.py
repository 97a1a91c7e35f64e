"""Floor 4: the heart. What is where, who may touch it, and what may be dropped. Pure: no I/O, no threads, no clock.

May import: `lmcache.tiers`, `lmcache.memory`, `lmcache.chunks`, the ground floor, and `lmcache._native` (optional).
"""
