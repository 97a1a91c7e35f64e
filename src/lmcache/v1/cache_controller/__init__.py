"""Names that the router of vLLM's production stack imports from `lmcache.v1.cache_controller`."""
