"""Floor 6: moving KV between an engine's paged blocks and slots of the arena, one copy each way.

`paged` describes where an engine keeps its KV, `cpu` copies on a CPU (native code, or NumPy where that is missing). A
slot has one canonical order; bringing KV into it and out of it happens here and nowhere else. May import floors below
(wire, cache, tiers, memory, chunks, errors and observability) and the optional `lmcache._native`.
"""
