"""Floor 1: what a chunk is called. Hashes, roots and layouts: pure functions and frozen structs, no I/O.

May import: `lmcache.errors` and nothing else of ours.
"""

from lmcache.chunks.hashing import HASH_BYTES, TokenChain, chunk_hash, chunk_root
from lmcache.chunks.layout import Layout, Shard, shard_of_rank, space_fingerprint

__all__ = [
    "HASH_BYTES",
    "Layout",
    "Shard",
    "TokenChain",
    "chunk_hash",
    "chunk_root",
    "shard_of_rank",
    "space_fingerprint",
]
