"""Parked pulls: a peer that asks for chunks which an engine stores at this moment gets them when they are complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from lmcache.cache import L1, Event, Refusal
from lmcache.cache.promises import Asker
from lmcache.chunks import HASH_BYTES
from lmcache.server.loop import Loop
from lmcache.server.payload import Reply
from lmcache.server.sessions import Peer
from lmcache.wire import messages as m

PARK_SECONDS = 0.25
"""A pull waits for so long, and a peer is told of chunks that should come within it. That is longer than storing a step takes,
and short beside the time after which the peer takes this server for dead."""
_LOOKED_AT = 8
"""Parked pulls that are looked at in one turn of the loop."""
MAX_PARKED_OF_PEER, MAX_PARKED = 32, 256
"""Pulls that wait: of one connection, and of all. Others are answered at once."""


@dataclass(eq=False)
class _Parked:
    peer: Peer
    request: m.Pull
    reply: Reply
    until: float


class ParkedPulls:
    """answer: answers a pull with what is there now."""

    def __init__(
        self, loop: Loop, l1: L1, answer: Callable[[Peer, m.Pull, Reply], None], counters: Counter[str]
    ) -> None:
        self._loop, self._l1, self._answer, self._counters = loop, l1, answer, counters
        self._parked: dict[_Parked, None] = {}
        self._to_look_at: dict[_Parked, None] = {}
        l1.events.listen(["stored", "dropped"], self._changed, named=False)
        loop.on_tick.append(self._look)

    def __len__(self) -> int:
        return len(self._parked)

    def has(self, peer: Peer, request: m.Has) -> m.Having:
        """Return which of the chunks are complete, and which of the first others should come soon."""
        self._check(request)
        present = self._l1.having(request.space, request.shards, request.hashes)
        first = present.find(0)
        coming = self._coming(peer, request, first) if first >= 0 else 0
        after = [one or m.COMING for one in present[first : first + coming]]
        return m.Having(present[:first] + bytes(after) + present[first + coming :] if coming else present)

    def pull(self, peer: Peer, request: m.Pull, reply: Reply) -> None:
        """Answer now, or when what is coming has come."""
        self._check(request)
        own = sum(one.peer is peer for one in self._parked)
        if own < MAX_PARKED_OF_PEER and len(self._parked) < MAX_PARKED and self._waits(peer, request):
            self._parked[_Parked(peer, request, reply, self._loop.now() + PARK_SECONDS)] = None
            self._counters["awaited_pulls"] += 1
        else:
            self._answer(peer, request, reply)

    @staticmethod
    def _check(request: m.Has | m.Pull) -> None:
        """Raises Refusal unless the request names complete hashes."""
        if len(request.hashes) % HASH_BYTES:
            raise Refusal(f"{len(request.hashes)} bytes of hashes: the length must be a multiple of {HASH_BYTES}")

    def _waits(self, peer: Peer, request: m.Pull) -> bool:
        first = self._l1.having(request.space, request.shards, request.hashes).find(0)
        return first >= 0 and self._coming(peer, request, first) > 0

    def _coming(self, peer: Peer, request: m.Has | m.Pull, first: int) -> int:
        """Return how many chunks from number `first` on engines store within `PARK_SECONDS`."""
        l1 = self._l1
        space = l1.named(request.space, request.shards)
        if space is None or not (l1.promises.by_chunk or l1.open_reservations):
            return 0
        asker = Asker(peer.process, "a peer")
        coming = l1.coming(self._loop.now(), asker, space.number, request.hashes, first)
        if not coming.chunks or coming.expected_seconds is None:
            return 0
        if coming.expected_seconds <= PARK_SECONDS:
            return coming.chunks
        return int(coming.chunks * PARK_SECONDS / coming.expected_seconds)  # they come one after the other

    def _changed(self, event: Event) -> None:
        self._look()

    def _look(self) -> None:
        """Look soon at all pulls; not now, since a listener must not call L1."""
        if self._parked and not self._to_look_at:
            self._loop.call_soon(self._look_at_some)
        self._to_look_at = dict(self._parked)

    def _look_at_some(self) -> None:
        """Answer the pulls that wait for nothing any more."""
        now = self._loop.now()
        for one in list(islice(self._to_look_at, _LOOKED_AT)):
            del self._to_look_at[one]
            if one.peer.gone or not one.peer.process:
                self._parked.pop(one, None)
            elif now >= one.until or not self._waits(one.peer, one.request):
                self._parked.pop(one, None)
                self._answer(one.peer, one.request, one.reply)
        if self._to_look_at:
            self._loop.call_soon(self._look_at_some)
