"""Which prefix of a prompt can be used when a model has several kinds of KV, each in a space of its own.

A prefix of N chunks can be used if every space without a reach has all of its chunks, and every space with a reach of R chunks
has the last R of them. The engine then goes on from token N as if it had computed the prefix."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.cache.allocator import Space
from lmcache.chunks import HASH_BYTES

Found = list[tuple[Space, bytes]]
"""Each space with the ids of the chunks that a prefix needs there: the last ones before its end."""


def usable_prefix(spaces: Sequence[Space], hashes: bytes) -> tuple[int, Found]:
    """Return the length in chunks of the longest prefix of `hashes` that can be used from these spaces, and what it needs.

    The work is at most proportional to the number of hashes times the number of spaces.
    """
    matched = [b"" if space.reach_chunks else space.table.match(hashes) for space in spaces]
    chunks = len(hashes) // HASH_BYTES
    for space, ids in zip(spaces, matched, strict=True):
        if not space.reach_chunks:
            chunks = min(chunks, len(ids) // 4)
    reaching, agreed = [space for space in spaces if space.reach_chunks], 0
    firsts = [chunks] * len(reaching)
    while agreed < len(reaching):  # each round either shortens the prefix or is the last one
        agreed = 0
        for number, space in enumerate(reaching):
            own, firsts[number] = _longest(space, hashes, chunks, firsts[number])
            agreed += own == chunks
            chunks = own
    found = []
    for space, ids in zip(spaces, matched, strict=True):
        if space.reach_chunks:
            first = max(0, chunks - space.reach_chunks)
            ids = space.table.match(hashes[first * HASH_BYTES : chunks * HASH_BYTES])
        found.append((space, ids[: 4 * chunks]))
    return chunks, found


def _longest(space: Space, hashes: bytes, chunks: int, first: int) -> tuple[int, int]:
    """Return the most chunks, at most `chunks`, of which the space has the last `reach_chunks`, and the first chunk from which on
    it is now known to have all of them. first: as that was known before, so that no chunk is looked for twice."""
    first = min(first, chunks)
    while first and chunks - first < space.reach_chunks:
        first -= 1
        if not space.table.match(hashes[first * HASH_BYTES : (first + 1) * HASH_BYTES]):
            chunks = first
    return chunks, first
