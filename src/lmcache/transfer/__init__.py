"""Floor 6: copies between an engine's paged KV and extents of the arena.

`paged` describes where an engine keeps its KV. `copier` says what every copier can do and chooses one: `cpu` (native code, or
NumPy without it) or `gpu` (a Triton kernel and the copy engine). An extent has one canonical order; KV is brought into that
order and out of it here and nowhere else. This folder may import the floors below (wire, cache, tiers, memory, chunks and the
ground floor), and `gpu` alone may import the engine's torch and Triton.
"""
