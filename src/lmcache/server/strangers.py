"""Connections to the ZMQ socket that have not been let in: how long they may last, how many there may be, and how much they may
send.

ZMQ neither closes an idle connection nor bounds a message of many frames, and it keeps that until it is complete. So each
connection is watched from outside until it is let in, through a duplicate of its descriptor: to shut that down is safe, whatever
has become of ZMQ's own number.
"""

from __future__ import annotations

import resource
import select
import socket
import struct
import time
from dataclasses import dataclass

from lmcache.server.refused import Reason, Refused
from lmcache.server.unix_endpoint import HELLO_SECONDS
from lmcache.wire.received import bytes_received

MAX_STRANGERS = 1024
"""The oldest goes beyond it. Each takes two descriptors, so there are never more than an eighth of the process's limit."""
MAX_STRANGER_BYTES = 1 << 16
"""Of one connection, with ZMQ's own handshake. An engine sends some hundred bytes before it is let in."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""`struct linger`: on, for no time."""


@dataclass(frozen=True, slots=True)
class _Stranger:
    connection: socket.socket
    """A duplicate. While it is open the connection does not end, so it must be closed when ZMQ has closed its own."""
    host: str
    opened: float


class Strangers:
    """Closes connections, and notes them in `refused`. `descriptor` is to be watched for `look_at_arrivals`, and
    `look_at_all` to be called now and then."""

    def __init__(self, refused: Refused) -> None:
        self._refused = refused
        self._all: dict[int, _Stranger] = {}
        """By ZMQ's descriptor, the oldest first."""
        self._numbers: dict[int, int] = {}
        """The duplicate's descriptor -> ZMQ's."""
        self._most = min(MAX_STRANGERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self._arrivals = select.epoll()
        self.descriptor = self._arrivals.fileno()

    def close(self) -> None:
        for number in list(self._all):
            self.forget(number)
        self._arrivals.close()

    def add(self, number: int, connection: socket.socket, host: str) -> None:
        """A connection has been accepted: `number` is ZMQ's descriptor, `connection` a duplicate, which is closed here."""
        self.forget(number)
        self._all[number] = _Stranger(connection, host, time.monotonic())
        self._numbers[connection.fileno()] = number
        # Edge-triggered, since it may be long before ZMQ reads what has arrived.
        self._arrivals.register(connection, select.EPOLLIN | select.EPOLLET)

    def close_excess(self) -> None:
        while len(self._all) > self._most:
            why = f"more than {self._most} connections have not been let in, and this is the oldest"
            self._end(next(iter(self._all)), "too many", why)

    def forget(self, number: int) -> None:
        """The connection has been let in, or ZMQ closes it."""
        stranger = self._all.pop(number, None)
        if stranger is not None:
            del self._numbers[stranger.connection.fileno()]
            self._arrivals.unregister(stranger.connection)
            stranger.connection.close()

    def look_at_arrivals(self) -> None:
        """Whether somebody sends too much. What ZMQ has read first is not told, so `look_at_all` looks, too."""
        for descriptor, _ in self._arrivals.poll(0):
            self._close_talkative(self._numbers[descriptor])

    def look_at_all(self) -> None:
        limit = time.monotonic() - HELLO_SECONDS
        for number, stranger in list(self._all.items()):
            if stranger.opened < limit:
                self._end(number, "no hello", f"it was not let in within {HELLO_SECONDS:.0f} s")
            else:
                self._close_talkative(number)

    def _close_talkative(self, number: int) -> None:
        if bytes_received(self._all[number].connection) > MAX_STRANGER_BYTES:
            self._end(number, "no hello", f"it has sent more than {MAX_STRANGER_BYTES} bytes and was not let in")

    def _end(self, number: int, reason: Reason, why: str) -> None:
        stranger = self._all[number]
        remedy = f"{why}, so the connection is closed; no engine does that: see what connects to this port"
        self._refused.note(f"one from {stranger.host}", reason, remedy)
        try:
            # The last close resets the connection: the kernel must not wait for the other end to take note.
            stranger.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            stranger.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end has reset it
        self.forget(number)
