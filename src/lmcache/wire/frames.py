"""The Unix socket's framing: u32 little-endian length, then one msgpack message. Descriptors ride beside a frame."""

from __future__ import annotations

import struct

from lmcache.errors import WireError
from lmcache.wire.messages import MAX_MESSAGE_BYTES

_LENGTH = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into frames. Feed what `recv` gave; take whole frames out."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete now.

        Raises:
            WireError: a frame announces more than `MAX_MESSAGE_BYTES`.
        """
        if not self._buffer and len(data) >= 4:  # the usual case: one whole frame at once
            (length,) = _LENGTH.unpack_from(data)
            if length + 4 == len(data) and length <= MAX_MESSAGE_BYTES:
                return [data[4:]]
        buffer, frames = self._buffer, []
        buffer += data
        while len(buffer) >= 4:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > MAX_MESSAGE_BYTES:
                raise WireError(f"a frame of {length} bytes is announced; at most {MAX_MESSAGE_BYTES} are allowed")
            if len(buffer) < 4 + length:
                break
            frames.append(bytes(buffer[4 : 4 + length]))
            del buffer[: 4 + length]
        return frames
