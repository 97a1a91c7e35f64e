"""A client of InfiniStore's TCP mode that knows nothing of ours, and is patient."""

from __future__ import annotations

import socket
import struct

MAGIC = 0xDEADBEEF


class InfiniStoreClient:
    """One connection, which says whatever it is told to."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def begin_put(self, key: bytes, length: int, some: bytes = b"") -> None:
        """The request to put a value, and some of its bytes."""
        self._say(b"L", self._table(key, length, b"P"))
        self.socket.sendall(some)

    def put(self, key: bytes, value: bytes) -> int:
        self.begin_put(key, len(value), value)
        return self._number()

    def begin_get(self, key: bytes) -> None:
        """The request to get a value, and the first bytes of the answer."""
        self._say(b"L", self._table(key, 0, b"G"))
        self._exactly(100)

    def get(self, key: bytes) -> bytes | None:
        self._say(b"L", self._table(key, 0, b"G"))
        return self._exactly(self._number()) if self._number() == 200 else None

    def exists(self, key: bytes) -> bool:
        self._say(b"C", key)
        assert self._number() == 200
        return self._number() == 0

    def delete(self, key: bytes) -> int:
        text = struct.pack("<I", len(key)) + key + bytes(4 - len(key) % 4)
        self._say(b"X", struct.pack("<I3HxxiIII", 12, 6, 8, 4, 8, 4, 1, 4) + text)
        assert self._number() == 200
        return self._number()

    def close(self) -> None:
        self.socket.close()

    def _say(self, letter: bytes, body: bytes) -> None:
        self.socket.sendall(struct.pack("<IcI", MAGIC, letter, len(body)) + body)

    def _table(self, key: bytes, length: int, operation: bytes) -> bytes:
        text = struct.pack("<I", len(key)) + key + bytes(4 - len(key) % 4)
        return struct.pack("<I5HxxiIicxxx", 16, 10, 16, 4, 8, 12, 12, 12, length, operation) + text

    def _number(self) -> int:
        return int(struct.unpack("<i", self._exactly(4))[0])

    def _exactly(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            piece = self.socket.recv(count - len(got))
            if not piece:
                raise ConnectionError("closed")
            got += piece
        return bytes(got)
