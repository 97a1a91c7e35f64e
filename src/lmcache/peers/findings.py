"""Which peers have which chunks, from a question to the load that follows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter

from lmcache.peers.peer import Peer
from lmcache.tiers import ShardKey
from lmcache.wire import messages as m

MAX_KNOWN = 1 << 16
"""Chunks in all findings that are kept. The newest one is kept in any case."""


class Finding:
    """Holds which peers have which of some chunks of one space."""

    def __init__(self, space: bytes, shards: int, chunks: Iterable[bytes]) -> None:
        self.space, self.shards = space, shards
        self._places = {chunk: at for at, chunk in enumerate(dict.fromkeys(chunks))}
        self._present: dict[Peer, bytearray] = {}
        """For each peer that has answered, one byte for each chunk, which is not 0 if the peer has it."""

    def __len__(self) -> int:
        return len(self._places)

    def pages(self) -> list[tuple[int, m.Has]]:
        """Return the questions for a peer, each with the place of its first chunk."""
        chunks, most = list(self._places), m.MAX_ASKED_CHUNKS
        return [
            (first, m.Has(self.space, self.shards, b"".join(chunks[first : first + most])))
            for first in range(0, len(chunks), most)
        ]

    def told(self, peer: Peer, first: int, present: bytes) -> None:
        """Note an answer: for the chunks from place `first` on."""
        known = self._present.setdefault(peer, bytearray(len(self._places)))
        known[first : first + len(present)] = present

    def has(self, keys: Sequence[ShardKey]) -> list[bool]:
        """Return for each of these shards, whose chunks are in this finding, whether any peer has it."""
        if not self._present:
            return [False] * len(keys)
        first, *others = self._present.values()
        anybody = bytes(map(max, first, *others)) if others else first
        return [anybody[at] > 0 for at in map(self._places.__getitem__, map(_CHUNK, keys))]

    def states(self) -> tuple[list[bytes], list[bytes]]:
        """Return the chunks that some peer has, and those that are only coming, because an engine stores them."""
        told = list(self._present.values())
        if not any(m.COMING in one for one in told):
            return list(self._places), []
        complete, coming = list[bytes](), list[bytes]()
        for chunk, at in self._places.items():
            values = {one[at] for one in told}
            (coming if values - {0} == {m.COMING} else complete).append(chunk)
        return complete, coming

    def sources(self, chunk: bytes) -> list[Peer]:
        at = self._places.get(chunk)
        return [] if at is None else [peer for peer, present in self._present.items() if present[at]]

    def lost(self, peer: Peer, chunk: bytes) -> None:
        """Note that the peer has not delivered this chunk."""
        at = self._places.get(chunk)
        if at is not None and peer in self._present:
            self._present[peer][at] = 0


class Findings:
    """The latest findings, the newest first."""

    def __init__(self) -> None:
        self._all: deque[Finding] = deque()
        self._chunks = 0

    def add(self, finding: Finding) -> None:
        self._all.appendleft(finding)
        self._chunks += len(finding)
        while self._chunks > MAX_KNOWN and len(self._all) > 1:
            self._chunks -= len(self._all.pop())

    def sources(self, key: ShardKey) -> list[Peer]:
        """Return the peers that have this shard, as far as is known."""
        for one in self._all:
            if one.space == key.space and one.shards == key.shards and (found := one.sources(key.chunk)):
                return found
        return []

    def lost(self, peer: Peer, key: ShardKey) -> None:
        """Note that the peer has not delivered this shard."""
        for one in self._all:
            if one.space == key.space and one.shards == key.shards:
                one.lost(peer, key.chunk)

    def clear(self) -> None:
        self._all.clear()
        self._chunks = 0


_CHUNK = attrgetter("chunk")
