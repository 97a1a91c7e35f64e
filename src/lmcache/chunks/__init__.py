"""Floor 1: the names of chunks: hashes, roots and layouts. It holds pure functions and frozen structs, and does no I/O.

May import: `lmcache.errors` and nothing else of this package.
"""

from lmcache.chunks.forms import SCALE_BYTES
from lmcache.chunks.hashing import (
    HASH_BYTES,
    TENANT_BYTES,
    TokenChain,
    chunk_hash,
    chunk_root,
    split_hashes,
    tenant_of,
)
from lmcache.chunks.layout import (
    LOSSY_KV,
    PER_TOKEN_HEAD,
    Group,
    Layout,
    Shard,
    Split,
    shard_of_rank,
    space_fingerprint,
    tensor_splits,
)

__all__ = [
    "HASH_BYTES",
    "LOSSY_KV",
    "PER_TOKEN_HEAD",
    "SCALE_BYTES",
    "TENANT_BYTES",
    "Group",
    "Layout",
    "Shard",
    "Split",
    "TokenChain",
    "chunk_hash",
    "chunk_root",
    "shard_of_rank",
    "space_fingerprint",
    "split_hashes",
    "tenant_of",
    "tensor_splits",
]
