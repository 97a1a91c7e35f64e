"""Identifies what listens at a port from which no answer came, by its first bytes. No request ever waits for this."""

from __future__ import annotations

import socket
import struct
import time
from typing import Literal

from lmcache.config.hosts import connect

Listener = Literal["NULL", "CURVE", "HTTP", "silence", "something else"]
ZMQ: tuple[Listener, ...] = ("NULL", "CURVE")
_GREETING = struct.Struct("10s2s20s32s")
"""The greeting of ZMTP 3.1: signature, version, security mechanism, and fields that are not used here."""
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
ZMQ_SPEAKS_FIRST = _SIGNATURE[:1]
"""The first byte that a ZMQ socket sends before it has received anything."""
_SAID_FIRST = 11
"""Bytes of the greeting, up to the major version, after which the other side sends all of its own. Sending the mechanism as well
would be too early: the other side hangs up at a mechanism that is not its own, without naming its own."""


def knock(host: str, port: int, timeout_seconds: float, own: Literal["NULL", "CURVE"] = "NULL") -> Listener:
    """Return what the port speaks: ZMQ with one of two security mechanisms, HTTP, nothing, or something else.

    own: the caller's mechanism. It is sent, so that a ZMQ server with the other mechanism learns of a caller that cannot come in.

    Raises:
        OSError: nobody listens there, or the name does not resolve.
    """
    with connect(host, port, timeout_seconds) as connection:
        try:
            first = _receive(connection, 1, timeout_seconds)
            if first == ZMQ_SPEAKS_FIRST:
                greeting = _GREETING.pack(_SIGNATURE, b"\x03\x01", own.encode(), b"")
                connection.sendall(greeting[:_SAID_FIRST])
                greeted = first + _receive(connection, _GREETING.size - 1, timeout_seconds)
                mechanism = _GREETING.unpack(greeted)[2].rstrip(b"\0")
                connection.sendall(greeting[_SAID_FIRST:])
                return "CURVE" if mechanism == b"CURVE" else "NULL" if mechanism == b"NULL" else "something else"
            if not first:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")  # an HTTP server waits for a request
                first = _receive(connection, 5, timeout_seconds)
        except (OSError, struct.error):
            return "something else"
    # A ZMQ server that was frozen says its signature when it goes on; by then it has been asked for HTTP, so it says no more.
    return "HTTP" if first == b"HTTP/" else "silence" if _SIGNATURE.startswith(first) else "something else"


def _receive(connection: socket.socket, size: int, timeout_seconds: float) -> bytes:
    """Receive `size` bytes; fewer where the other side hangs up or does not send all of them in time."""
    received, deadline = b"", time.monotonic() + timeout_seconds
    try:
        while len(received) < size and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (data := connection.recv(size - len(received))):
                break
            received += data
    except TimeoutError:
        pass
    return received
