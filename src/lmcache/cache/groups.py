"""Which prefix of a prompt can be used when a model has several kinds of KV, each in a space of its own.

A prefix of N chunks can be used if every space without a reach has all of its chunks, and every space with a reach of R chunks
has the last R of them. The engine then goes on from token N as if it had computed the prefix. An engine that can load what ranks
of another split have stored finds the chunks of its spaces' sisters, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmcache.cache.allocator import Space
from lmcache.chunks import HASH_BYTES

MAX_PARTS = 16
"""In how many parts a prefix is looked for in a space and its sisters, since each part costs the engine a copy."""


class Part(NamedTuple):
    """Consecutive chunks that one space has: those from chunk `first` of the prompt on. ids: of their records."""

    space: Space
    first: int
    ids: bytes

    @property
    def end(self) -> int:
        return self.first + len(self.ids) // 4


Found = list[list[Part]]
"""What a prefix needs of each group, which are the last chunks before its end: in the group's own space, and in sisters of it."""


def usable_prefix(spaces: Sequence[Space], hashes: bytes, sisters: bool = False) -> tuple[int, Found]:
    """Return the length in chunks of the longest prefix of `hashes` that can be used from these spaces, and what it needs.

    sisters: whether the engine can also use what the spaces' sisters have. The work is at most proportional to the number of
    hashes times the number of spaces, with their sisters.
    """
    matched = [[] if space.reach_chunks else parts_of(space, hashes, sisters) for space in spaces]
    chunks = len(hashes) // HASH_BYTES
    for space, parts in zip(spaces, matched, strict=True):
        if not space.reach_chunks:
            chunks = min(chunks, parts[-1].end)
    reaching, agreed = [space for space in spaces if space.reach_chunks], 0
    firsts = [chunks] * len(reaching)
    while agreed < len(reaching):  # each round either shortens the prefix or is the last one
        agreed = 0
        for number, space in enumerate(reaching):
            own, firsts[number] = _longest(space, hashes, chunks, firsts[number], sisters)
            agreed += own == chunks
            chunks = own
    found = []
    for space, parts in zip(spaces, matched, strict=True):
        if space.reach_chunks:
            first = max(0, chunks - space.reach_chunks)
            parts = parts_of(space, hashes[: chunks * HASH_BYTES], sisters, first, chunks - first)
        found.append(
            [part._replace(ids=part.ids[: 4 * (chunks - part.first)]) for part in parts if part.first < chunks]
        )
    return chunks, found


def parts_of(space: Space, hashes: bytes, sisters: bool, first: int = 0, most: int = MAX_PARTS) -> list[Part]:
    """Return which of the chunks from number `first` on, up to the first missing one, the space has. sisters: where it ends, go
    on with the space or sister that has most of what follows. At most `most` parts, at least one, which may be empty."""
    part = Part(space, first, space.table.match(hashes[first * HASH_BYTES :] if first else hashes))
    if not sisters or not space.sisters:
        return [part]
    parts, at = [part] if part.ids else [], part.end
    while len(parts) < most and at * HASH_BYTES < len(hashes):
        rest = hashes[at * HASH_BYTES :]
        having = [one for one in (space, *space.sisters) if one.table.match(rest[:HASH_BYTES])]
        if not having:
            break
        parts.append(max((Part(one, at, one.table.match(rest)) for one in having), key=lambda one: len(one.ids)))
        at = parts[-1].end
    return parts or [part]


def _longest(space: Space, hashes: bytes, chunks: int, first: int, sisters: bool) -> tuple[int, int]:
    """Return the most chunks, at most `chunks`, of which the space has the last `reach_chunks`, and the first chunk from which on
    it is now known to have all of them. first: as that was known before, so that no chunk is looked for twice. sisters: as in
    `usable_prefix`."""
    first = min(first, chunks)
    family = (space, *space.sisters) if sisters else (space,)
    while first and chunks - first < space.reach_chunks:
        first -= 1
        key = hashes[first * HASH_BYTES : (first + 1) * HASH_BYTES]
        if not any(one.table.match(key) for one in family):
            chunks = first
    return chunks, first
