"""Strangers are connections to the ZMQ socket that are not admitted yet. Their duration, number and received bytes are bounded.

ZMQ does not close idle connections. It does not limit the number of frames in a message, and it buffers them until the message is
complete. So each connection is watched through a duplicate of its descriptor until it is admitted. Shutting the duplicate down is
safe even if ZMQ has closed its own descriptor.
"""

from __future__ import annotations

import resource
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from lmcache.server.refused import Reason, Refused
from lmcache.server.unix_endpoint import HELLO_SECONDS
from lmcache.wire.received import bytes_received

MAX_STRANGERS = 1024
"""Beyond this number, or an eighth of the process's limit of descriptors, the oldest is closed. Each takes two descriptors."""
MAX_STRANGER_BYTES = 1 << 16
"""Bytes that one connection may send, ZMQ's handshake included. An engine sends a few hundred bytes before it is admitted."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""`struct linger`: enabled, with a timeout of 0 seconds."""


@dataclass(frozen=True, slots=True)
class _Stranger:
    connection: socket.socket
    """The duplicate. It keeps the connection open, so it must be closed when ZMQ has closed its own descriptor."""
    host: str
    opened: float


class Strangers:
    """Closes connections that exceed a bound, and records them in `refused`. The owner watches `descriptor` and then calls
    `look_at_arrivals`, and calls `look_at_all` on every tick."""

    def __init__(self, refused: Refused, now: Callable[[], float]) -> None:
        self._refused, self._now = refused, now
        self._all: dict[int, _Stranger] = {}
        """ZMQ's descriptor -> stranger, the oldest first."""
        self._numbers: dict[int, int] = {}
        """Descriptor of the duplicate -> ZMQ's descriptor."""
        self._most = min(MAX_STRANGERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self._arrivals = select.epoll()
        self.descriptor = self._arrivals.fileno()

    def close(self) -> None:
        for number in list(self._all):
            self.forget(number)
        self._arrivals.close()

    def add(self, number: int, connection: socket.socket, host: str) -> None:
        """Watch an accepted connection. `number`: ZMQ's descriptor. `connection`: a duplicate, which this object closes."""
        self.forget(number)
        self._all[number] = _Stranger(connection, host, self._now())
        self._numbers[connection.fileno()] = number
        # Edge-triggered, since received bytes may wait for a long time until ZMQ reads them.
        self._arrivals.register(connection, select.EPOLLIN | select.EPOLLET)

    def close_excess(self) -> None:
        while len(self._all) > self._most:
            why = f"more than {self._most} connections are not admitted yet, and this is the oldest"
            self._end(next(iter(self._all)), "too many", why)

    def forget(self, number: int) -> None:
        """Stop watching a connection that was admitted or that ZMQ closes."""
        stranger = self._all.pop(number, None)
        if stranger is not None:
            del self._numbers[stranger.connection.fileno()]
            self._arrivals.unregister(stranger.connection)
            stranger.connection.close()

    def look_at_arrivals(self) -> None:
        """Close connections with new bytes that have sent too many. ZMQ may read bytes first, so `look_at_all` checks too."""
        for descriptor, _ in self._arrivals.poll(0):
            self._close_talkative(self._numbers[descriptor])

    def look_at_all(self) -> None:
        limit = self._now() - HELLO_SECONDS
        for number, stranger in list(self._all.items()):
            if stranger.opened < limit:
                self._end(number, "no hello", f"it was not admitted within {HELLO_SECONDS:.0f} s")
            else:
                self._close_talkative(number)

    def _close_talkative(self, number: int) -> None:
        if bytes_received(self._all[number].connection) > MAX_STRANGER_BYTES:
            self._end(number, "no hello", f"it has sent more than {MAX_STRANGER_BYTES} bytes before it was admitted")

    def _end(self, number: int, reason: Reason, why: str) -> None:
        stranger = self._all[number]
        remedy = f"{why}, so the connection is closed; engines do not do that: check what connects to this port"
        self._refused.note(f"one from {stranger.host}", reason, remedy)
        try:
            # The last close then resets the connection, so the kernel does not wait for the peer.
            stranger.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            stranger.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer has reset the connection
        self.forget(number)
