"""What listens at a port from which no answer has come: by its first bytes. Never in a request's way."""

from __future__ import annotations

import socket
import struct
import time
from typing import Literal

from lmcache.config.hosts import connect

Listener = Literal["NULL", "CURVE", "HTTP", "silence", "something else"]
ZMQ: tuple[Listener, ...] = ("NULL", "CURVE")
_GREETING = struct.Struct("10s2s20s32s")
"""Of ZMTP 3.1: signature, version, security mechanism, and what is of no interest here."""
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
ZMQ_SPEAKS_FIRST = _SIGNATURE[:1]
"""What a ZMQ socket says before it has heard anything."""
_SAID_FIRST = 11
"""Bytes of ours, up to the major version, for which the other side gives all of its greeting. It hangs up at a mechanism that
is not its own, and would not tell which that is."""


def knock(host: str, port: int, timeout_seconds: float, own: Literal["NULL", "CURVE"] = "NULL") -> Listener:
    """Which protocol is spoken there: ZMQ's, with one of two security mechanisms, HTTP, none, or another one.

    `own` is the caller's mechanism, so that a ZMQ server that has the other one learns that this caller cannot come in.

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
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")  # an HTTP server waits to be asked
                first = _receive(connection, 5, timeout_seconds)
        except (OSError, struct.error):
            return "something else"
    # A ZMQ server that was frozen says its signature when it goes on; by then it has been asked for HTTP, so it says no more.
    return "HTTP" if first == b"HTTP/" else "silence" if _SIGNATURE.startswith(first) else "something else"


def _receive(connection: socket.socket, size: int, timeout_seconds: float) -> bytes:
    """So many bytes; fewer where the other side hangs up or has not sent all of them in time."""
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
