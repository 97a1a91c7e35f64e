"""The Unix socket: who is at its other end, and its framing, u32 little-endian length and then one msgpack message. Descriptors
ride beside a frame."""

from __future__ import annotations

import socket
import struct

from lmcache.errors import WireError

_LENGTH = struct.Struct("<I")
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SO_PEERGROUPS = 59
"""Of <asm-generic/socket.h>; Python has no name for it."""
_MOST_GROUP_BYTES = 1024
"""Python reads no more of an option. Of a process with more groups only the effective one counts."""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user (pid, uid) that connected, or listened, at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(packed)
    return pid, uid


def groups_of(connection: socket.socket) -> set[int]:
    """Return the groups that the process at the other end had when it connected, as the kernel tells: its effective one and, if
    the kernel is 4.13 or newer, the others."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    found = {_PEER_CREDENTIALS.unpack(packed)[2] & 0xFFFFFFFF}
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUP_BYTES)
    except OSError:
        return found
    return found | set(memoryview(packed).cast("I"))


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream, fed as `recv` returns it, into frames of at most `limit` bytes."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes | memoryview) -> list[bytes | memoryview]:
        """Add received bytes and return the frames that are complete now, which are parts of `data` where possible.

        Raises:
            WireError: a frame announces more than the limit.
        """
        if not self._buffer and len(data) >= 4:  # the usual case: exactly one complete frame
            (length,) = _LENGTH.unpack_from(data)
            if length + 4 == len(data) and length <= self._limit:
                return [data[4:]]
        buffer = self._buffer
        frames: list[bytes | memoryview] = []
        buffer += data
        while len(buffer) >= 4:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > self._limit:
                raise WireError(f"the peer announced a frame of {length} bytes; at most {self._limit} are allowed")
            if len(buffer) < 4 + length:
                break
            frames.append(bytes(buffer[4 : 4 + length]))
            del buffer[: 4 + length]
        return frames
