"""Floor 2: the arena (one shared file), who owns which part of it (pure bookkeeping), and the order in which things go.

May import: `lmcache.chunks`, `lmcache.observability`, `lmcache.config`, `lmcache.errors`.
"""
