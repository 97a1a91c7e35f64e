"""Floor 6: moving KV between an engine's paged blocks and slots of the arena, one copy each way.

`paged` describes where an engine keeps its KV, `copier` is what every copier can do and chooses one: `cpu` (native code,
or NumPy where that is missing) or `cuda`. A slot has one canonical order; bringing KV into it and out of it happens here
and nowhere else. May import floors below (wire, cache, tiers, memory, chunks, the ground floor),
and in `cuda` alone the engine's torch and Triton.
"""
