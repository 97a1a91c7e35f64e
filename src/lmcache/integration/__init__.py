"""Floor 11: the modules that engines import, with names that engines dictate. They translate an engine's terms; shared code is
in `lmcache.engine`.

One folder per engine. May import every floor below. `demo/numpy_engine` is a small engine whose code shows an integration.
"""
