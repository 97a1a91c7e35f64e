"""Counts the bytes received over a TCP connection that ZMQ owns. ZMQ buffers a message of any length until it is complete and
does not report its progress, but the kernel does."""

from __future__ import annotations

import socket
import struct

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""The start of Linux's `struct tcp_info`, up to `tcpi_bytes_received` (Linux 4.1)."""
MONITOR_EVENT = struct.Struct("=HI")
"""The first frame of an event from a ZMQ socket's monitor: its kind, and the connection's descriptor or another number."""


def bytes_received(connection: socket.socket) -> int:
    """Return the bytes that the other end has sent so far; 0 where the kernel does not say or the connection is not TCP."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
    except OSError:
        return 0
    return int(_BYTES_RECEIVED.unpack(told)[0]) if len(told) == _BYTES_RECEIVED.size else 0
