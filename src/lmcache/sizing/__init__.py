"""Floor 5: what more memory would give. Traces of lookups, their replay through the heart, and how much KV a token takes.

Nothing here runs in a server but the lines of a trace (`trace`) and the live estimate (`curve`). This package may import `cache`
and the floors below it.
"""
