"""Lending: what other servers' movers read from L1, until they give it back or their time is over."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.observability.log import init_logger
from lmcache.peers.mover import Mover
from lmcache.peers.mover_words import Serve
from lmcache.server.loop import Loop
from lmcache.server.sessions import Peer
from lmcache.wire import messages as m

logger = init_logger(__name__)
LENT_SECONDS = 30.0
"""What is not given back is lent for so long. Who reads it later may get other bytes, whose checksum is wrong."""


class Lending:
    """Keeps the mover that other movers read from. memory: descriptor of the arena. Everything else than the mover's own thread
    runs in the loop's."""

    def __init__(self, loop: Loop, memory: int, memory_bytes: int, devices: str) -> None:
        self._loop = loop
        self._lent: dict[tuple[Peer, int], tuple[float, Callable[[], None]]] = {}
        """(peer, lease) -> the time at which the loan ends at the latest, and the function to call when it has ended."""
        self._mover = Mover(
            *(loop.runtime, memory, memory_bytes, devices),
            writes=False,
            changed=lambda: loop.call_soon(self._serve),
        )
        self._mover.start()
        loop.on_tick.append(self._tick)

    def has(self, mover: int) -> bool:
        """Return whether this is the number of the mover that runs."""
        offer = self._mover.offer
        return offer is not None and offer.number == mover

    def meet(self, peer: Peer, request: m.Meet) -> m.Message:
        offer = self._mover.offer
        return m.Met() if offer is None else m.Met(offer.number, offer.agent, offer.address)

    def lend(self, peer: Peer, lease: int, returned: Callable[[], None]) -> None:
        """Call `returned` once: when the peer gives back the lease, or its time is over."""
        self._lent[peer, lease] = self._loop.now() + LENT_SECONDS, returned
        if len(self._lent) == 1:
            self._serve()

    def released(self, peer: Peer, request: m.Release) -> m.Message:
        for lease in request.leases:
            self._end(peer, lease)
        return m.Ok()

    def close(self) -> None:
        self._mover.close()

    def _end(self, peer: Peer, lease: int) -> None:
        _, returned = self._lent.pop((peer, lease), (0.0, None))
        if returned is not None:
            returned()
            if not self._lent:
                self._serve()

    def _serve(self) -> None:
        """Let the mover look after its readers only while there are some, since it takes a part of a core."""
        self._mover.tell(Serve(bool(self._lent)))

    def _tick(self) -> None:
        now = self._loop.now()
        over = [which for which, (until, _) in self._lent.items() if now >= until]
        if over:
            logger.warning(
                "%d loans were not given back within %g s by a server that pulls; they end now", len(over), LENT_SECONDS
            )
        for peer, lease in over:
            self._end(peer, lease)
