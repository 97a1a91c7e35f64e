"""Reads of a disk tier's frames, spread over threads: file by file, and in the order of their places."""

from __future__ import annotations

import errno
import itertools
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

from lmcache.tiers import frame
from lmcache.tiers.disk.segments import Segment, Segments, is_large
from lmcache.tiers.frame_io import Decoded, Found, FrameIO
from lmcache.tiers.threads import each_in_pool

LANES = 4
"""Threads that read for one call."""
_LANE_BYTES = 4 << 20
"""A smaller call is not spread over threads."""
Outcome = str | OSError
"""The outcome of a load, or the error of the device."""


class Hit(NamedTuple):
    """A frame to read. number: the shard's number in its call. reuses: those of the segment before the read."""

    number: int
    found: Found
    segment: Segment
    reuses: int


class Reader:
    """Reads frames from segments, in the threads of a pool."""

    def __init__(self, segments: Segments, io: FrameIO, pool: Executor) -> None:
        self._segments, self._io, self._pool = segments, io, pool

    def read(self, hits: list[Hit], decoded: Decoded) -> list[tuple[int, Outcome]]:
        """Read all hits and return (number, outcome) of each, in several threads when there is much to read. decoded: as in
        `TierBase`."""
        hits = sorted(hits, key=lambda hit: hit.found.place)
        total = sum(hit.found.stored_bytes for hit in hits)
        lanes = min(LANES, len(hits), 1 + total // _LANE_BYTES)
        if lanes <= 1:
            return self._read_lane(hits, decoded)
        each, share = total / lanes, 0
        parts: list[list[Hit]] = [[] for _ in range(lanes)]
        for hit in hits:
            parts[min(lanes - 1, int(share / each))].append(hit)
            share += hit.found.stored_bytes
        return list(
            itertools.chain.from_iterable(each_in_pool(self._pool, partial(self._read_lane, decoded=decoded), parts))
        )

    def _read_lane(self, hits: list[Hit], decoded: Decoded) -> list[tuple[int, Outcome]]:
        """Read hits file by file in one thread."""
        outcomes: list[tuple[int, Outcome]] = []
        large = [hit for hit in hits if is_large(hit.found.stored_bytes)]
        for _, of_file in itertools.groupby(large, key=lambda hit: hit.segment.number):
            some = list(of_file)
            try:
                handle = self._segments.open_handle(some[0].segment)
                said = self._io.read_large(handle.fd, [hit.found for hit in some], decoded)
                outcomes += [(hit.number, one) for hit, one in zip(some, said, strict=True)]
            except OSError as error:
                outcomes += [(hit.number, _outcome_of(error)) for hit in some]
        packed = [hit for hit in hits if not is_large(hit.found.stored_bytes)]
        for _, of_file in itertools.groupby(packed, key=lambda hit: hit.segment.number):
            outcomes += self._read_packed(list(of_file), decoded)
        return outcomes

    def _read_packed(self, hits: list[Hit], decoded: Decoded) -> list[tuple[int, Outcome]]:
        try:
            handle = self._segments.open_handle(hits[0].segment)
            said = self._io.read_packed(handle.fd, [hit.found for hit in hits], decoded)
        except OSError as error:
            if len(hits) == 1:
                return [(hits[0].number, _outcome_of(error))]
            return [
                one for hit in hits for one in self._read_packed([hit], decoded)
            ]  # perhaps only one of them is unreadable
        return [(hit.number, outcome) for hit, outcome in zip(hits, said, strict=True)]


def _outcome_of(error: OSError) -> Outcome:
    """Return the outcome of a failed read: a missing file is damage, any other error may be the device's."""
    return frame.TRUNCATED if error.errno == errno.ENOENT else error
