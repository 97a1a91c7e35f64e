"""Connections to the ZMQ socket that never come as far as a message, since the engine has a wrong key or none."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import zmq

from lmcache.config.hosts import duplicate, ends
from lmcache.server.refused import Reason, Refused
from lmcache.server.strangers import Strangers
from lmcache.wire.received import MONITOR_EVENT

_EVENTS = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Not those of peers that hang up before they have said which mechanism they want: whoever looks at the port does so."""


class Handshakes:
    """Notes in `refused` the handshakes that fail at `door`, which listens at `host`. `descriptor` is to be watched, and `hear`
    to be called after every batch of the loop's events. `strangers` are the connections that were not let in yet."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        door: zmq.Socket[bytes],
        host: str,
        key_file: Path | None,
        refused: Refused,
    ) -> None:
        self._door, self._key_file, self._refused = door, key_file, refused
        self._unknown = host if ip_address(host).is_loopback else "an address that could not be read in time"
        self._hosts: dict[int, str] = {}
        """Of each connection, by its descriptor in this process."""
        self._failed: Reason | None = None
        self.strangers = Strangers(refused)
        place = f"inproc://handshakes-{id(self)}"
        door.monitor(place, _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # else ZMQ's own thread would wait for this one
        self._monitor.connect(place)
        self.descriptor: int = self._monitor.FD

    def close(self) -> None:
        self._door.disable_monitor()
        self._monitor.close(0)
        self.strangers.close()

    def hear(self) -> None:
        while self._waiting():
            kind, value = MONITOR_EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            if kind == zmq.EVENT_ACCEPTED:
                self._accepted(value)
            elif kind == zmq.EVENT_DISCONNECTED:  # follows a failure at once, in the same thread of ZMQ
                self.strangers.forget(value)
                host = self._hosts.pop(value, self._unknown)
                if self._failed is not None:
                    self._refused.note(f"one from {host}", self._failed, self._remedy(self._failed))
                self._failed = None
            else:
                self._failed = self._reason(kind, value)
        self.strangers.close_excess()

    def let_in(self, descriptor: int) -> None:
        """A message of this connection was the hello of an engine."""
        self.hear()  # that it was accepted
        self.strangers.forget(descriptor)

    def _accepted(self, descriptor: int) -> None:
        host, connection = _host_behind(descriptor), duplicate(descriptor)
        # Where more has happened since, the descriptor may have been closed and be another connection's. Its end is told next.
        self._hosts[descriptor] = self._unknown if self._waiting() else host or self._unknown
        if connection is not None:
            self.strangers.add(descriptor, connection, self._hosts[descriptor])

    def _waiting(self) -> bool:
        return bool(int(self._monitor.EVENTS) & zmq.POLLIN)

    def _reason(self, kind: int, value: int) -> Reason | None:
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH or value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return "wrong key"
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "unwanted key" if self._key_file is None else "no key"
        return None  # no engine of ours

    def _remedy(self, reason: Reason) -> str:
        if reason == "unwanted key":
            return (
                "it has a key file, and the server has none: start the server with --auth-key-file and the same file, or "
                "unset LMCACHE_AUTH_KEY_FILE for the engine"
            )
        has = "it has no key file" if reason == "no key" else "its key is another one"
        return f"{has}: set LMCACHE_AUTH_KEY_FILE for the engine to a copy of the server's {self._key_file}"


def _host_behind(descriptor: int) -> str:
    """The address of the other end; "" where the connection has ended already, and its number may be another one's by now."""
    try:
        return ends(descriptor)[1][0]
    except OSError:
        return ""
