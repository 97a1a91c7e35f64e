"""Floor 10: what engines import, at the names they dictate. It turns an engine's terms into ours; what all engines do alike is
in `lmcache.engine`.

One folder an engine. `numpy/` is an engine of our own, small but real: it is how the fast tests and the quick demo use
the cache, and the shortest example of how an engine does. May import every floor below.
"""
