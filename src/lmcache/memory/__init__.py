"""Floor 2: the arena (one shared file) and who owns which part of it (pure bookkeeping).

May import: `lmcache.chunks`, `lmcache.observability`, `lmcache.config`, `lmcache.errors`.
"""
