"""Floor 10: what engines import, at the names they dictate. Thin: the engine's terms in, ours out.

One folder an engine. `numpy/` is an engine of our own, small but real: it is how the fast tests and the quick demo use
the cache, and the shortest example of how an engine does. May import every floor below.
"""
