"""Names that engines import from `lmcache.v1`, and nothing else: the code is on its own floors."""
