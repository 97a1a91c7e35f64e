"""Names that vLLM imports from `lmcache.v1.multiprocess`, and nothing else."""
