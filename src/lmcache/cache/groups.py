"""Which prefix of a prompt can be used when a model has several kinds of KV, each in a space of its own.

A prefix of N chunks can be used if every space without a reach has all of its chunks, and every space with a reach of R chunks
has the last R of them. The engine then goes on from token N as if it had computed the prefix. An engine that can load what ranks
of another split have stored finds the chunks of its spaces' sisters, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    reaches = [space.reach_chunks for space in spaces]
    found = [[] if space.reach_chunks else parts_of(space, hashes, sisters) for space in spaces]

    def end_of(group: int, first: int, end: int) -> int:
        if not reaches[group]:
            return found[group][-1].end
        needed = hashes[first * HASH_BYTES : end * HASH_BYTES]
        if sisters:
            return first + parts_of(spaces[group], needed, sisters, 0, end - first)[-1].end
        return first + len(spaces[group].table.match(needed)) // 4

    chunks = longest_prefix(reaches, len(hashes) // HASH_BYTES, end_of)
    for group, reach in enumerate(reaches):
        if reach:
            first = max(0, chunks - reach)
            found[group] = parts_of(spaces[group], hashes[: chunks * HASH_BYTES], sisters, first, chunks - first)
    return chunks, [
        [part._replace(ids=part.ids[: 4 * (chunks - part.first)]) for part in parts if part.first < chunks]
        for parts in found
    ]


def longest_prefix(reaches: Sequence[int], chunks: int, end_of: Callable[[int, int, int], int]) -> int:
    """Return the length of the longest prefix, of at most `chunks` chunks, of which all groups have what they need.

    reaches: of the groups, in chunks. end_of(group, first, end): the number of the first of the chunks from `first` to `end` that
    the group lacks, or `end`. Any smaller number shortens the prefix to it. No chunk is asked for twice.
    """
    for group in (group for group, reach in enumerate(reaches) if not reach):
        chunks = min(chunks, end_of(group, 0, chunks))
    firsts, before = [chunks] * len(reaches), -1
    while chunks != before:  # each round either shortens the prefix or is the last one
        before = chunks
        for group, reach in enumerate(reaches):
            known = min(chunks, firsts[group])  # it has those from here on
            while reach and known and chunks - known < reach:
                first = max(0, chunks - reach)
                end = end_of(group, first, known)
                chunks, known = chunks if end == known else end, min(first, end)
            firsts[group] = known
    return chunks


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
