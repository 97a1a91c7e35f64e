"""The sockets of the HTTP endpoint, which bound the time of every connection and the number of connections of other hosts."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import Any

from lmcache.errors import ConfigError

_REQUEST_SECONDS = 10.0
"""A connection carries one request. It is closed if the request has not arrived by then."""
_CONNECTION_SECONDS = 40.0
"""A connection is closed after so long, even if the peer has not read the answer."""
_MOST_CONNECTIONS = 128
"""The most connections of all other hosts, so that they cannot exhaust descriptors; loopback is not counted."""


def is_loopback(peer: str) -> bool:
    """Return whether a peer's address is of this host."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def listen(
    host: str, port: int, connections: dict[tuple[str, int], Connection], flag: str = "--http-port"
) -> socket.socket:
    """Return a listening socket; port 0 stands for any free port.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = _Listener(host, connections)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # not later: with SO_REUSEADDR, two servers can bind one port until one listens
    except OSError as error:
        listener.close()
        raise ConfigError(f"{flag} {port}: cannot listen on {host}: {error.strerror}: pass another") from error
    return listener


class _Listener(socket.socket):
    """The listening socket. It bounds the duration of every connection, and the number of connections of other hosts."""

    def __init__(self, host: str, connections: dict[tuple[str, int], Connection]) -> None:
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the event loop calls this.

        Raises:
            ConnectionAbortedError: other hosts have the most connections allowed, so this one was closed. The event loop treats
                this as a connection that the peer has aborted.
        """
        accepted, address = super().accept()
        connection = Connection(accepted.detach(), address[:2], self._connections)
        others = sum(one.from_elsewhere for one in self._connections.values())
        if connection.from_elsewhere and others > _MOST_CONNECTIONS:
            connection.close()
            raise ConnectionAbortedError(f"other hosts have {_MOST_CONNECTIONS} connections")
        return connection, address


class Connection(socket.socket):
    """One connection, which is shut down after a fixed time. It stays in `connections` until it is closed."""

    def __init__(self, descriptor: int, peer: tuple[str, int], connections: dict[tuple[str, int], Connection]) -> None:
        super().__init__(fileno=descriptor)
        self.from_elsewhere = not is_loopback(peer[0])
        self._peer, self._connections = peer, connections
        loop = asyncio.get_running_loop()
        self._request_due = loop.call_later(_REQUEST_SECONDS, self._end)
        self._end_due = loop.call_later(_CONNECTION_SECONDS, self._end)
        connections[peer] = self

    def request_has_arrived(self) -> None:
        """Stop waiting for the request; the answer may take the rest of the connection's time."""
        self._request_due.cancel()

    def _end(self) -> None:
        """Shut the connection down. The event loop notices this and closes it."""
        with contextlib.suppress(OSError):  # the peer has ended it
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the event loop calls this once."""
        self._request_due.cancel()
        self._end_due.cancel()
        if self._connections.get(self._peer) is self:
            del self._connections[self._peer]
        super().close()
