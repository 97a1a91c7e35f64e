"""What the tiers have of a space: which of its chunks, at which earlier end a prompt can go on, and which other splits of it.

Lookups ask for chunks, and tiers know shards. Everything here runs in the loop's thread, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from lmcache.cache.allocator import Space
from lmcache.cache.fetch import ENDED_SECONDS
from lmcache.cache.groups import longest_prefix
from lmcache.chunks import HASH_BYTES, Split, split_hashes
from lmcache.server.tier_runner import TierRunner
from lmcache.tiers import ShardKey
from lmcache.tiers.tier import TierBase

MOST_ASKED = 32768
"""Shards. A tier is asked for so many at once: naming the shards of a million tokens would keep all other engines waiting for
longer than their deadlines."""


def most_asked(space: Space) -> int:
    """Return for how many chunks of a space a tier is asked at once."""
    return max(1, MOST_ASKED // space.shards)


def shard_keys(space: Space, hashes: bytes) -> list[ShardKey]:
    """Return the keys of all shards of these chunks, [chunk][shard]."""
    fields = product((space.fingerprint,), split_hashes(hashes), range(space.shards), (space.shards,))
    return list(map(partial(tuple.__new__, ShardKey), fields))  # three times as fast as calls of ShardKey


def complete_chunks(present: Sequence[bool], shards: int) -> Sequence[bool]:
    """Return for each chunk whether all its shards are present."""
    if shards == 1:
        return present
    return [all(present[at : at + shards]) for at in range(0, len(present), shards)]


def known_chunks(runner: TierRunner, space: Space, hashes: bytes) -> Sequence[bool] | None:
    """Return for each of these chunks whether the tier has it, as far as the tier knows that without I/O; None if it does not."""
    if type(runner.tier).known is TierBase.known:
        return None  # without the work of naming the shards
    present = runner.known(shard_keys(space, hashes))
    return None if present is None else complete_chunks(present, space.shards)


def known_splits(runners: Sequence[TierRunner], space: Space, chunk: bytes) -> list[Split]:
    """Return those of the splits that sisters of the space may have, and none has yet, of which a tier knows without I/O that it
    has this chunk."""
    known, found = {one.split for one in space.sisters}, []
    for split in space.expected:
        keys = [ShardKey(space.family, chunk, shard, split.count) for shard in range(split.count)]
        if split not in known and any(all(runner.known(keys) or (False,)) for runner in runners):
            found.append(split)
    return found


@dataclass
class _Survey:
    """Which chunks of a prompt, from number `skipped` on, the tiers have. running: how many tiers have not answered."""

    began: float
    shards: int
    skipped: int
    running: int = 0
    has: set[int] = field(default_factory=set)

    def answered(self, present: list[bool] | None, error: Exception | None, seconds: float) -> None:
        """Take the answer of one tier."""
        self.running -= 1
        if present is not None:
            complete = complete_chunks(present, self.shards)
            self.has.update(at for at, one in enumerate(complete, self.skipped) if one)


class EarlierEnds:
    """Finds where a prompt can go on in a group with a reach, if what it needs at the prompt's end is missing.

    runners: of the tiers, which are asked once for all chunks of a prompt. patience_seconds: until a question is cancelled.
    """

    def __init__(self, runners: Sequence[TierRunner], patience_seconds: float) -> None:
        self._runners, self._patience_seconds = runners, patience_seconds
        self._surveys: dict[tuple[int, bytes], _Survey] = {}
        """By space and the hash of the last chunk. Remembered for as long as a fetch that has ended."""

    def last(self, now: float, space: Space, hashes: bytes, wait_seconds: float) -> int | None:
        """Return the largest number of chunks, fewer than all of these, at whose end L1 and the tiers have what is in reach of
        this space; 0 if there is none. None: ask again, since not all tiers have answered, and `wait_seconds` have not passed."""
        skipped = max(0, len(hashes) // HASH_BYTES - most_asked(space))
        survey = self._surveys.get(key := (space.number, hashes[-HASH_BYTES:]))
        if survey is None:
            survey = self._surveys[key] = self._begin(now, space, hashes, skipped)
        if survey.running and now - survey.began < wait_seconds:
            return None

        def end_of(group: int, first: int, end: int) -> int:
            chunks = enumerate(split_hashes(hashes[first * HASH_BYTES : end * HASH_BYTES]), first)
            lacking = (at for at, one in chunks if at not in survey.has and not space.table.match(one))
            return next(lacking, end) if first >= skipped else 0

        return longest_prefix([space.reach_chunks], len(hashes) // HASH_BYTES - 1, end_of)

    def _begin(self, now: float, space: Space, hashes: bytes, skipped: int) -> _Survey:
        survey, keys = _Survey(now, space.shards, skipped), shard_keys(space, hashes[skipped * HASH_BYTES :])
        for runner in self._runners:
            if runner.usable(now):
                survey.running += 1
                runner.contains(keys, self._patience_seconds, survey.answered)
        return survey

    def forget(self) -> None:
        """Forget all surveys, since other tiers are attached now."""
        self._surveys.clear()

    def tick(self, now: float) -> None:
        """Forget old surveys."""
        for key, survey in list(self._surveys.items()):
            if now - survey.began > ENDED_SECONDS and not survey.running:
                del self._surveys[key]
