"""A peer is another server at one address, with the links to it. Peers belong to one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lmcache.observability.log import init_logger
from lmcache.peers.dial import Dialled
from lmcache.peers.link import Link, Question
from lmcache.tiers.breaker import Breaker

logger = init_logger(__name__)
MAX_PULLS = 4
"""The most unanswered pulls of one link, so that the other server reads some ahead and holds little memory."""
MAX_PULLED_BYTES = 16 << 20
"""The most bytes of these, unless one pull is larger. A server refuses what it would have to hold for peers beyond 512 MiB."""


@dataclass(frozen=True)
class Source:
    """How a peer's arena is read. reader, lender: the numbers of this server's mover and of the peer's. name: by which this
    server's mover knows the other. address: of the arena's first byte there. forget: tells this server's mover that the source
    is of no more use."""

    reader: int
    lender: int
    name: bytes
    address: int
    forget: Callable[[], object]


class Peer:
    """address: numeric HOST:PORT."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.breaker = Breaker()
        """Opens when the links are lost or cannot be made; a new attempt follows each pause."""
        self.server = b""
        """The id of the server that answered last."""
        self.is_needless = False
        """Whether the server at the address is this one, or is connected by another address."""
        self.dialling = False
        self.asks: Link | None = None
        """For questions, which must not wait behind payload. None: the peer is not connected."""
        self.pulls: list[Link] = []
        self.queued_bytes = 0
        """Payload that the peer has been asked for, or will be, and has not sent."""
        self._queue: deque[Question] = deque()
        """Pulls that wait until a link has fewer than `MAX_PULLS`."""
        self.meets = self.meeting = False
        """Whether the peer may lend by a mover, and whether it is being asked how."""
        self.source: Source | None = None
        """None: payload comes over the links."""
        self.direct = Breaker()
        """Opens when a read from the source fails. A read that succeeds closes it."""
        self.pulled_by = ""
        """How pulls go, as the log has said it last."""

    @property
    def links(self) -> list[Link]:
        return [] if self.asks is None else [self.asks, *self.pulls]

    @property
    def trouble(self) -> str:
        """Why the peer does not serve; "" if it does, or has not been tried yet."""
        return "" if self.asks is not None or self.is_needless else self.breaker.reason

    def connected(self, dialled: Dialled, timeout_seconds: float, now: float) -> None:
        self.server, self.is_needless = dialled.server, False
        self.asks = Link(dialled.asks, timeout_seconds, now)
        self.pulls = [Link(one, timeout_seconds, now) for one in dialled.pulls]
        self.meets, self.pulled_by = dialled.meets, ""
        self.breaker.succeeded()
        logger.info("Peer %s: connected; lookups find what it has", self.address)

    def not_needed(self, now: float, reason: str) -> None:
        """Do without a connection for now; another server may get the address."""
        self.is_needless = True
        self.breaker.failed(now, reason, at_once=True)

    def failed(self, now: float, reason: str) -> None:
        """Give up all links, or the attempt to make them, for this reason."""
        self.is_needless = False
        if self.asks is not None or self.breaker.reason != reason:
            logger.warning("Peer %s does not serve; this server tries it again: %s", self.address, reason)
        self.breaker.failed(now, reason, at_once=True)
        self.close(reason)

    def no_source(self) -> None:
        source, self.source = self.source, None
        if source is not None:
            source.forget()

    def close(self, reason: str, goodbye: bool = False) -> None:
        self.no_source()
        links, self.asks, self.pulls = self.links, None, []
        waiting, self._queue = self._queue, deque()
        for link in links:
            link.close(reason, goodbye)
        for question in waiting:
            question.lost(reason)

    def hear(self, now: float) -> None:
        """Take all answers that have arrived. Raises ServerUnavailable if a link is lost."""
        for link in self.links:
            if self.asks is not None:  # taking an answer may have shown that the other server has hung up
                link.hear(now)
        self._pump(now)

    def pull(self, now: float, question: Question) -> None:
        """Ask for payload, over the link with the fewest unanswered pulls.

        Raises:
            ServerUnavailable: a link is lost. The question is then answered as lost when the peer is closed.
        """
        if self.asks is None:
            question.lost("it is not connected")
            return
        self._queue.append(question)
        self._pump(now)

    def _pump(self, now: float) -> None:
        """Ask for queued payload."""
        while self._queue and self.pulls:
            if not self._queue[0].wanted():
                self._queue.popleft().lost("it is not wanted any more")
                continue
            link = min(self.pulls, key=len)
            if len(link) >= MAX_PULLS or (len(link) and link.awaited_bytes + self._queue[0].size > MAX_PULLED_BYTES):
                return
            link.ask(now, self._queue[0])
            self._queue.popleft()
