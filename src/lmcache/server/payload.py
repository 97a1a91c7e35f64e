"""Payload frames carry KV for engines that cannot map the arena, and for peers: I/O threads copy between L1 and the messages.

What a peer pulls is not copied, unless the shards are small: ZMQ sends it from the arena, and the chunks are leased to the peer
until it is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from lmcache.cache import L1, Refusal
from lmcache.chunks import split_hashes
from lmcache.observability.log import init_logger
from lmcache.server.lending import Lending
from lmcache.server.loop import Loop
from lmcache.server.sessions import MAX_HELD_BYTES, MAX_HELD_BYTES_OF_PEERS, Peer, Sessions
from lmcache.tiers import ShardKey
from lmcache.tiers.frame import make_header
from lmcache.wire import messages as m

logger = init_logger(__name__)
Frames = Sequence[bytes | memoryview]
PINNED_SHARE = 2
"""What peers read keeps at most this part of L1 (a half) from being evicted, or what one of them reads at once. Peers that hang
would else keep engines from storing."""


def nothing() -> None:
    """What follows an answer whose frames nobody has to be told of."""


class Reply(Protocol):
    """Sends an answer with its payload frames. sent: called once, in the loop's thread, when the frames' memory is no longer
    read, whether they were sent or not."""

    def __call__(self, answer: m.Message, frames: Frames, sent: Callable[[], None] = nothing, /) -> None: ...


Work = Callable[[], tuple[m.Message, Frames]]
"""What an I/O thread does. Returns the answer and its frames."""


class PayloadCopies:
    """All payload copies. The copies run in `workers`, everything else in the loop's thread."""

    def __init__(self, loop: Loop, l1: L1, sessions: Sessions, workers: Executor, counters: Counter[str]) -> None:
        self.filling: set[int] = set()
        """Reservations whose extents an I/O thread is writing."""
        self.lending: Lending | None = None
        """Keeps count of what movers read; None: this server lends over connections only."""
        self._lent = Counter[tuple[bytes, int, bytes]]()
        """(space, number of shards, hash) of each chunk that peers have leased -> how often."""
        self._pinned_bytes = 0
        """The bytes of these chunks, with all shards of each, since one shard that is leased keeps them all."""
        self._loop, self._l1, self._sessions, self._workers, self._counters = loop, l1, sessions, workers, counters

    def fetch(self, peer: Peer, request: m.Fetch, reply: Reply) -> None:
        """Answer with the bytes of leased chunks."""
        sectors, size = self._l1.leased_sectors(
            peer.process, request.lease, request.shard, request.first, request.count, request.part
        )
        view = self._l1.view

        def copy() -> tuple[m.Message, Frames]:
            return m.Ok(len(sectors)), [bytes(view(sector, size)) for sector in sectors]

        self._in_worker(peer, size * len(sectors), copy, reply)

    def pull(self, peer: Peer, request: m.Pull, reply: Reply) -> None:
        """Answer a peer with one shard of those of the chunks that L1 has. They stay leased until the answer is sent."""
        l1, name, process = self._l1, (request.space, request.shards, request.shard), peer.process
        lent = l1.lend(self._loop.now(), process, *name, request.hashes)
        size = lent.shard_bytes * len(lent.found)
        lending = self.lending if self.lending is not None and self.lending.has(request.mover) else None
        chunks = [(request.space, request.shards, chunk) for chunk, _, _ in lent.found]

        def returned() -> None:
            l1.release(process, lent.lease)
            for one in chunks:
                self._lent[one] -= 1
                if not self._lent[one]:
                    del self._lent[one]
                    self._pinned_bytes -= lent.chunk_bytes
            peer.busy -= 1
            if peer.gone:
                self._sessions.gone(peer)

        def seal() -> tuple[m.Message, Frames]:
            headers = dict.fromkeys(split_hashes(request.hashes), b"")
            frames = []
            for chunk, parent, sector in lent.found:
                frames.append(l1.view(sector, lent.shard_bytes).toreadonly())
                key = ShardKey(request.space, chunk, request.shard, request.shards)
                headers[chunk] = make_header(key, parent, frames[-1])
            named = list(map(headers.__getitem__, split_hashes(request.hashes)))
            if lent.found and lending is not None:
                places = {chunk: sector for chunk, _, sector in lent.found}
                asked = [places[chunk] for chunk in split_hashes(request.hashes) if chunk in places]
                return m.Pulled(named, lent.lease, np.array(asked, "<u4").tobytes()), []
            if lent.found and lent.shard_bytes < m.JOINED_BYTES:
                frames = [memoryview(b"".join(frames))]
            return m.Pulled(named), frames

        def sealed(answer: m.Message, frames: Frames, sent: Callable[[], None] = nothing) -> None:
            by_mover = isinstance(answer, m.Pulled) and answer.lease > 0 and not peer.gone
            if (frames or by_mover) and not peer.gone:
                self._counters["lent_shards"] += len(lent.found)
                self._counters["lent_bytes"] += size
            if by_mover and lending is not None:
                self._counters["lent_by_nixl_bytes"] += size
                lending.lend(peer, lent.lease, returned)
                reply(answer, [])
            else:
                reply(answer, frames, returned)

        before = self._pinned_bytes
        for one in chunks:
            self._pinned_bytes += 0 if self._lent[one] else lent.chunk_bytes
            self._lent[one] += 1
        peer.busy += 1  # until the frames are sent: the lease must not end before, even if the peer has gone
        try:
            if lent.shard_bytes >= m.JOINED_BYTES and len(lent.found) > m.MAX_PULLED_FRAMES:
                raise Refusal(
                    f"{len(lent.found)} shards of {lent.shard_bytes} bytes; at most {m.MAX_PULLED_FRAMES} at a time"
                )
            if self._sessions.held_bytes_of_peers + size > MAX_HELD_BYTES_OF_PEERS:
                raise Refusal(f"{self._sessions.held_bytes_of_peers} bytes are being sent to peers already; try again")
            if before and self._pinned_bytes > max(before, l1.total_bytes // PINNED_SHARE):
                raise Refusal(f"{self._pinned_bytes} bytes of L1 cannot be evicted while peers read them; try again")
            self._in_worker(peer, size, seal, sealed)
        except Exception:  # also where no thread can be started
            returned()
            raise

    def fill(self, peer: Peer, request: m.Fill, frames: list[bytes], reply: Reply) -> None:
        """Write the frames into reserved extents, then answer."""
        number = request.reservation
        reserved, size = self._l1.reserved_sectors(peer.process, number)
        sectors = reserved[max(0, request.first) :][: len(frames)]
        if request.first < 0 or len(sectors) != len(frames):
            raise Refusal(f"{len(frames)} frames from extent {request.first} on exceed reservation {number}")
        if any(len(one) != size for one in frames):
            raise Refusal(f"each payload frame must have {size} bytes, the size of an extent's shard")
        view = self._l1.view

        def copy() -> tuple[m.Message, Frames]:
            for sector, one in zip(sectors, frames, strict=True):
                view(sector, size)[:] = one
            return m.Ok(), []

        def answer(message: m.Message, frames: Frames, sent: Callable[[], None] = nothing) -> None:
            self.filling.discard(number)
            reply(message, frames)

        if number in self.filling:
            raise Refusal(f"reservation {number} is being filled by an earlier message")
        self._in_worker(peer, size * len(sectors), copy, answer)
        self.filling.add(number)

    def _in_worker(self, peer: Peer, size: int, work: Work, reply: Reply) -> None:
        """Run `work` in an I/O thread and answer with what it returns. Raises Refusal if too many bytes are in flight."""
        sessions = self._sessions
        if size > m.MAX_PAYLOAD_BYTES:
            raise Refusal(f"{size} payload bytes in one message; at most {m.MAX_PAYLOAD_BYTES} are allowed")
        sessions.check_room(peer, size)
        if sessions.held_bytes + size > MAX_HELD_BYTES:
            raise Refusal(f"{sessions.held_bytes} payload bytes are being copied or sent already; try again")

        def finish(answer: m.Message, frames: Frames) -> None:
            peer.busy -= 1
            sessions.hold(peer, -size)
            try:
                reply(answer, frames)
            finally:
                if peer.gone:
                    sessions.gone(peer)

        def run() -> None:
            answer: m.Message
            frames: Frames
            try:
                answer, frames = work()
            except Exception as error:  # top of the thread: the engine must get an answer
                logger.exception("A payload copy failed; the engine gets an error")
                frames, answer = [], m.Error("internal", f"{type(error).__name__} in the server: see its log")
            self._loop.call_soon(lambda: finish(answer, frames))

        self._workers.submit(run)
        peer.busy += 1
        sessions.hold(peer, size)
