"""Payload frames carry KV for engines that cannot map the arena: I/O threads copy between L1 and the messages."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from lmcache.cache import L1, Refusal
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.server.sessions import MAX_HELD_BYTES, Peer, Sessions
from lmcache.wire import messages as m

logger = init_logger(__name__)
Reply = Callable[[m.Message, list[bytes]], None]


class PayloadCopies:
    """All payload copies. The copies run in `workers`, everything else in the loop's thread."""

    def __init__(self, loop: Loop, l1: L1, sessions: Sessions, workers: Executor) -> None:
        self.filling: set[int] = set()
        """Reservations whose extents an I/O thread is writing."""
        self._loop, self._l1, self._sessions, self._workers = loop, l1, sessions, workers

    def fetch(self, peer: Peer, request: m.Fetch, reply: Reply) -> None:
        """Answer with the bytes of leased chunks."""
        sectors, size = self._l1.leased_sectors(
            peer.process, request.lease, request.shard, request.first, request.count, request.part
        )
        view = self._l1.view

        def copy() -> list[bytes]:
            return [bytes(view(sector, size)) for sector in sectors]

        self._in_worker(peer, size * len(sectors), copy, reply)

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

        def copy() -> list[bytes]:
            for sector, one in zip(sectors, frames, strict=True):
                view(sector, size)[:] = one
            return []

        def answer(message: m.Message, nothing: list[bytes]) -> None:
            self.filling.discard(number)
            reply(message, nothing)

        if number in self.filling:
            raise Refusal(f"reservation {number} is being filled by an earlier message")
        self._in_worker(peer, size * len(sectors), copy, answer)
        self.filling.add(number)

    def _in_worker(self, peer: Peer, size: int, copy: Callable[[], list[bytes]], reply: Reply) -> None:
        """Run `copy` in an I/O thread and answer with the frames it returns. Raises Refusal if too many bytes are in flight."""
        sessions = self._sessions
        if size > m.MAX_PAYLOAD_BYTES:
            raise Refusal(f"{size} payload bytes in one message; at most {m.MAX_PAYLOAD_BYTES} are allowed")
        sessions.check_room(peer, size)
        if sessions.held_bytes + size > MAX_HELD_BYTES:
            raise Refusal(f"{sessions.held_bytes} payload bytes are being copied or sent already; try again")

        def finish(answer: m.Message, frames: list[bytes]) -> None:
            peer.busy -= 1
            sessions.hold(peer, -size)
            try:
                reply(answer, frames)
            finally:
                if peer.gone:
                    sessions.gone(peer)

        def run() -> None:
            try:
                frames = copy()
                answer: m.Message = m.Ok(len(frames))
            except Exception as error:  # top of the thread: the engine must get an answer
                logger.exception("A payload copy failed; the engine gets an error")
                frames, answer = [], m.Error("internal", f"{type(error).__name__} in the server: see its log")
            self._loop.call_soon(lambda: finish(answer, frames))

        self._workers.submit(run)
        peer.busy += 1
        sessions.hold(peer, size)
