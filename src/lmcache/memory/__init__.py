"""Floor 2: the arena (one shared file), the allocation of its sectors to spaces (no I/O), and the order of eviction.

This package may import `lmcache.chunks`, `lmcache.observability`, `lmcache.config` and `lmcache.errors`.
"""
