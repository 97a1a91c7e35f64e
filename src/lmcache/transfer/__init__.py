"""Floor 6: copies between an engine's paged KV and extents of the arena.

`paged` describes where an engine keeps its KV. `copier` defines the interface of all copiers and chooses one: `cpu` (native
code) or `gpu` (a Triton kernel and the copy engine). An extent has one canonical order, and only this folder converts KV to and
from it. The folder may import the floors below (wire, cache, tiers, memory, chunks and floor 0); only `gpu` may import the
engine's torch and Triton.
"""
