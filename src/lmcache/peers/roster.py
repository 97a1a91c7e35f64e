"""The roster: which other servers there are, and the connections to them. It belongs to the thread of its tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial

from lmcache.errors import LMCacheError, ServerUnavailable
from lmcache.observability.log import init_logger
from lmcache.peers.dial import MAX_PEERS, Dialled, Itself, Myself, Name, dial, resolve
from lmcache.peers.directory import Directory
from lmcache.peers.peer import Peer

logger = init_logger(__name__)
RESOLVE_SECONDS = 10.0
"""Time between look-ups of the peers' names."""
Soon = Callable[[Callable[[], None]], bool]
"""Runs a call in the tier's thread; returns False after the tier's end."""


class Roster:
    """names: of the servers; those that a directory lists come in addition. connections: to each, for payload. diallers: threads
    that resolve names and connect, which block. now: the clock. The other arguments are as for `PeersTier`."""

    def __init__(
        self,
        names: Sequence[Name],
        myself: Myself,
        connections: int,
        timeout_seconds: float,
        *,
        now: Callable[[], float],
        soon: Soon,
        diallers: Executor,
        directory: Directory | None = None,
    ) -> None:
        self._names, self._myself, self._connections, self._timeout_seconds = (
            names,
            myself,
            connections,
            timeout_seconds,
        )
        self._now, self._soon, self._diallers, self._directory = now, soon, diallers, directory
        self._peers: dict[str, Peer] = {}
        """By address."""
        self._addresses: dict[Name, list[str] | str] = {}
        """What the last look-up has found."""
        self._behind: dict[Name, list[str]] = {}
        """The addresses of each name, of the last look-up that has found any."""
        self._resolving, self._resolved_at = False, float("-inf")
        self._left_out = 0
        """The number of addresses that are not used, since a name has more than a server connects to."""
        self._closed = False

    @property
    def peers(self) -> list[Peer]:
        return list(self._peers.values())

    def close(self) -> None:
        self._closed = True
        for peer in self.peers:
            peer.close("the tier is closed", goodbye=True)

    def tick(self, now: float) -> None:
        """Look up names again, watch the links, and connect to whom there is no connection."""
        if not self._resolving and now - self._resolved_at > RESOLVE_SECONDS:
            self._diallers.submit(self._resolve)  # raises if no thread can be started
            self._resolving = True
        for peer in self.peers:
            self.watch(peer, partial(_tick_links, peer, now))
            if peer.asks is None and not peer.dialling and (peer.breaker.closed or peer.breaker.probe(now)):
                self._diallers.submit(self._dial, peer)
                peer.dialling = True

    def watch(self, peer: Peer, call: Callable[[], object]) -> None:
        """Do something with the links of a peer, which has failed if one of them is lost."""
        try:
            call()
        except ServerUnavailable as error:
            peer.failed(self._now(), str(error))

    def troubles(self) -> Iterator[str]:
        """Describe each name behind which no server serves, and a directory that fails. Of several servers behind one name, some
        may come and go."""
        if self._directory is not None and self._directory.trouble:
            yield self._directory.trouble
        for found in self._addresses.values():
            if isinstance(found, str):
                yield found
                continue
            behind = [self._peers[one] for one in found if one in self._peers]
            if all(one.trouble for one in behind):
                yield from (f"{one.address}: {one.trouble}" for one in behind)

    # What other threads have found

    def _resolve(self) -> None:
        found = None
        try:
            listed = self._directory.look_up() if self._directory is not None else []
            found = resolve(list(dict.fromkeys([*self._names, *listed])))
        except Exception:  # top of the thread: the next look-up must come
            logger.exception("Looking up the peers failed; the last ones stay")
        self._soon(partial(self._resolved, found))

    def _resolved(self, found: dict[Name, list[str] | str] | None) -> None:
        self._resolving, self._resolved_at = False, self._now()
        if self._closed or found is None:
            return
        self._addresses = found
        behind = {name: self._behind.get(name) if isinstance(one, str) else one for name, one in found.items()}
        self._behind = {name: one for name, one in behind.items() if one is not None}
        known = dict.fromkeys(address for addresses in self._behind.values() for address in addresses)
        for address in [one for one in self._peers if one not in known]:
            logger.info("Peer %s: no name has this address any longer", address)
            self._peers.pop(address).close("it is no peer any longer", goodbye=True)
        left_out = []
        for address in known:
            if address not in self._peers and len(self._peers) < MAX_PEERS:
                self._peers[address] = Peer(address)
            elif address not in self._peers:
                left_out.append(address)
        if left_out and not self._left_out:
            logger.warning(
                "%d addresses of peers are left out, such as %s: a server reads from at most %d others; give each server the "
                "names of some of them only",
                *(len(left_out), left_out[0], MAX_PEERS),
            )
        self._left_out = len(left_out)
        self.tick(self._now())

    def _dial(self, peer: Peer) -> None:
        made: Dialled | Exception
        try:
            made = dial(peer.address, self._connections, self._myself)
        except Exception as error:  # top of the thread
            if not isinstance(error, (LMCacheError, OSError)):
                logger.exception("Peer %s: connecting to it failed", peer.address)
            made = error
        if not self._soon(partial(self._dialled, peer, made)) and isinstance(made, Dialled):
            made.close()

    def _dialled(self, peer: Peer, made: Dialled | Exception) -> None:
        now, peer.dialling = self._now(), False
        if isinstance(made, Itself):
            peer.not_needed(now, str(made))
        elif isinstance(made, Exception):
            peer.failed(now, str(made))
        elif self._closed or self._peers.get(peer.address) is not peer:
            made.close()
        elif any(one.server == made.server and one.asks is not None for one in self.peers):
            made.close()
            peer.not_needed(now, "this server is connected by another address")
        else:
            peer.connected(made, self._timeout_seconds, now)


def _tick_links(peer: Peer, now: float) -> None:
    for link in peer.links:
        link.tick(now)
