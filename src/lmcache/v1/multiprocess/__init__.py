"""Names that vLLM imports from `lmcache.v1.multiprocess`. The package holds no code of its own."""
