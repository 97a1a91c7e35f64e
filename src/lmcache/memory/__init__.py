"""Floor 2: the arena (one shared file), the allocation of its sectors to spaces (no I/O), and the LRU order.

May import: `lmcache.chunks`, `lmcache.observability`, `lmcache.config`, `lmcache.errors`.
"""
