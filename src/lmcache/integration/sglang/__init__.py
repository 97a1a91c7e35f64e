"""LMCache for SGLang: the connectors that its radix caches import.

SGLang dictates some names of modules and classes. `unified_lmcache_mp_connector` serves the unified radix cache of SGLang 0.5.23,
`sglang_adapter` older releases. `ranks.py` holds the LMCache objects of an SGLang scheduler process, `model.py` describes the KV
pool, `settings.py` reads the YAML file, and `weights.py` detects new weights.
May import `lmcache.engine` and the floors below, and SGLang and torch.
"""
