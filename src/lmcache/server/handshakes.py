"""Failed handshakes: connections to the ZMQ socket that end before the first message, because of a wrong or missing key."""

from __future__ import annotations

from collections.abc import Callable
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
"""Failures without details are left out: any port scanner causes them by hanging up before the handshake."""


class Handshakes:
    """Records in `refused` the handshakes that fail at the socket `door`, which listens at `host`. The owner calls `hear` once,
    and then whenever `descriptor` is readable. `strangers` holds the connections that are not admitted yet."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        door: zmq.Socket[bytes],
        host: str,
        key_file: Path | None,
        refused: Refused,
        now: Callable[[], float],
    ) -> None:
        self._door, self._key_file, self._refused = door, key_file, refused
        self._unknown = host if ip_address(host).is_loopback else "an address that could not be read in time"
        self._hosts: dict[int, str] = {}
        """Descriptor of a connection in this process -> address of the peer."""
        self._failed: Reason | None = None
        self.strangers = Strangers(refused, now)
        place = f"inproc://handshakes-{id(self)}"
        door.monitor(place, _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # with a limit, ZMQ's I/O thread could block on this one
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
            elif kind == zmq.EVENT_DISCONNECTED:  # ZMQ's I/O thread sends it directly after a failure
                self.strangers.forget(value)
                host = self._hosts.pop(value, self._unknown)
                if self._failed is not None:
                    self._refused.note(f"one from {host}", self._failed, self._remedy(self._failed))
                self._failed = None
            else:
                self._failed = self._reason(kind, value)
        self.strangers.close_excess()

    def let_in(self, descriptor: int) -> None:
        """Admit a connection, after the hello of an engine has arrived on it."""
        self.hear()  # the event of its acceptance may still be waiting
        self.strangers.forget(descriptor)

    def _accepted(self, descriptor: int) -> None:
        host, connection = _host_behind(descriptor), duplicate(descriptor)
        # If more events wait, the descriptor may have been closed and reused. The event of its end then follows.
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
        return None  # the peer is not one of our engines

    def _remedy(self, reason: Reason) -> str:
        if reason == "unwanted key":
            return (
                "it has a key file, and the server has none: start the server with --auth-key-file and the same file, or "
                "unset LMCACHE_AUTH_KEY_FILE for the engine"
            )
        has = "it has no key file" if reason == "no key" else "its key is another one"
        return (
            f"{has}: set LMCACHE_AUTH_KEY_FILE for the engine to a copy of the server's {self._key_file}, or "
            "--auth-key-file if another server has it in its --peers"
        )


def _host_behind(descriptor: int) -> str:
    """Return the address of the peer; "" if the connection has ended already."""
    try:
        return ends(descriptor)[1][0]
    except OSError:
        return ""
