"""Names that engines import from `lmcache.v1`. The package holds no code of its own."""
