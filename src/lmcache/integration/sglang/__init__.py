"""LMCache for SGLang: the connectors that its radix caches import.

Names of modules and classes are SGLang's. `unified_lmcache_mp_connector` serves the unified radix cache of SGLang 0.5.23,
`sglang_adapter` the older releases. Both are thin: `ranks.py` holds what a scheduler process of SGLang needs of LMCache,
`model.py` says what the KV pool holds and where, `settings.py` reads the YAML file, `weights.py` notices new weights.
May import `lmcache.engine` and the floors below, and SGLang and torch.
"""
