"""InfiniStore's TCP mode over a plain socket: values are sent from and received into the caller's memory, with deadlines.

Its own client is not used: it waits for an absent key for ever, has no time-outs and replaces the process's signal handlers.
A request is a magic number, a letter, the length of a body, and the body, which for most letters is a FlatBuffers table.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from lmcache.config.hosts import connect, in_url, is_quiet, seconds_left
from lmcache.tiers.tier import TierError

_SKIPPED_BYTES = 64 << 10
_MOST_FORGOTTEN = 128
"""So many times that many bytes are read at once from a connection that was given up."""
_PARKED_SECONDS, _MOST_PARKED = 60.0, 64
"""How long a connection stays open on which an answer may still be sent, and how many such connections there are at most."""
_OK, _ABSENT, _FULL = 200, 404, 507
_MAGIC, _HEAD, _NUMBER = 0xDEADBEEF, struct.Struct("<IcI"), struct.Struct("<i")
_VALUE, _DELETE, _EXISTS = b"L", b"X", b"C"
_PUT, _GET = b"P", b"G"
_PAYLOAD_TABLE = struct.Struct("<IHHHHHxxiIiBxxx")
"""Root, then a table of {key: string, value_length: int32, operation: byte}, whose vtable lies before it."""
_KEYS_TABLE = struct.Struct("<IHHHxxiII")
"""The same for {keys: [string]}, and the number of keys."""


def value_request(operation: bytes, key: bytes, length: int) -> bytes:
    """Return the request to put a value of so many bytes, which follow it, or to get one (length 0)."""
    table = _PAYLOAD_TABLE.pack(16, 10, 16, 4, 8, 12, 12, 12, length, operation[0])
    return _request(_VALUE, table + _string(key))


def delete_request(keys: Sequence[bytes]) -> bytes:
    """Return the request to delete the values of these keys, all of which exist and are complete."""
    strings, offsets, at = b"", [], _KEYS_TABLE.size + 4 * len(keys)
    for place, key in enumerate(keys):
        offsets.append(at + len(strings) - (_KEYS_TABLE.size + 4 * place))
        strings += _string(key)
    table = _KEYS_TABLE.pack(12, 6, 8, 4, 8, 4, len(keys))
    return _request(_DELETE, table + struct.pack(f"<{len(keys)}I", *offsets) + strings)


def _request(letter: bytes, body: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, letter, len(body)) + body


def _string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text + bytes(4 - len(text) % 4)


class Connection:
    """One connection. Any failure raises TierError; only its owner closes it. `deadline` is in `time.monotonic` seconds.

    The server ends when a value is read, or deleted, before all of it is there. So nobody may ask for a name until its writer
    has been told that the value is complete.
    """

    def __init__(self, host: str, port: int, deadline: float) -> None:
        self.name, self.deadline = f"{in_url(host)}:{port}", deadline
        try:
            self._socket = connect(host, port, seconds_left(deadline))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def is_quiet(self) -> bool:
        """Return whether the connection can be used for another request."""
        return is_quiet(self._socket)

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which values exist, complete or not, in one round trip. At most some 500 keys."""
        self._send(b"".join(_request(_EXISTS, key) for key in keys))
        answers = []
        for _ in keys:
            self._expect(_OK)
            answers.append(self._number() == 0)
        return answers

    def put(self, key: bytes, *parts: bytes | memoryview) -> bool:
        """Store a value, given in parts; return False if the server has no room. Small parts travel in one packet with the
        request, so that nobody sees half of a small value."""
        head = value_request(_PUT, key, sum(map(len, parts)))
        for part in parts:
            if len(part) > _PAYLOAD_TABLE.size * 64:
                self._send(head)
                head = b""
                self._send(part)
            else:
                head += bytes(part)
        self._send(head)
        code = self._number()
        if code == _FULL:
            return False
        if code != _OK:
            raise self._nonsense(code)
        return True

    def get(self, key: bytes) -> int | None:
        """Ask for a value; return its size. The caller must then `read` or `skip` all of it. None: it is not there."""
        self._send(value_request(_GET, key, 0))
        code = self._number()
        if code == _ABSENT:
            return None
        if code != _OK:
            raise self._nonsense(code)
        if (size := self._number()) < 0:
            raise self._nonsense(size)
        return size

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete values that are complete, as far as they exist."""
        self._send(delete_request(keys))
        self._expect(_OK)
        self._number()

    def read(self, memory: memoryview) -> None:
        """Receive bytes until the memory is full."""
        got = 0
        while got < len(memory):
            got += self._receive(memory[got:])

    def skip(self, count: int) -> None:
        """Receive bytes and forget them."""
        rest = memoryview(bytearray(min(count, _SKIPPED_BYTES)))
        while count:
            count -= self._receive(rest[:count])

    def forget(self) -> bool:
        """Forget what has arrived. Return whether more may come: there is no end to what a server can send."""
        rest = bytearray(_SKIPPED_BYTES)
        try:
            self._socket.settimeout(0)
            return all(self._socket.recv_into(rest) for _ in range(_MOST_FORGOTTEN))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _number(self) -> int:
        number = bytearray(_NUMBER.size)
        self.read(memoryview(number))
        return int(_NUMBER.unpack(number)[0])

    def _expect(self, wanted: int) -> None:
        if (code := self._number()) != wanted:
            raise self._nonsense(code)

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.settimeout(seconds_left(self.deadline))
            self._socket.sendall(data)
        except OSError as error:
            raise self._failed(error) from None

    def _receive(self, memory: memoryview) -> int:
        try:
            self._socket.settimeout(seconds_left(self.deadline))
            # the server sends an answer in parts and waits for each acknowledgement, which the kernel would delay by 40 ms
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if count := self._socket.recv_into(memory):
                return count
        except OSError as error:
            raise self._failed(error) from None
        raise self._failed(ConnectionResetError("the server has closed the connection"))

    def _nonsense(self, number: int) -> TierError:
        return TierError("protocol", f"InfiniStore at {self.name}: unexpected answer {number}")

    def _failed(self, error: OSError) -> TierError:
        if isinstance(error, TimeoutError):
            return TierError(
                "timeout", f"InfiniStore at {self.name} did not answer in time; check it, or raise ?timeout="
            )
        return TierError("unreachable", f"InfiniStore at {self.name}: {error.strerror or error}")


class Connections:
    """The connections to one server, of which at most `limit` are in use at once."""

    def __init__(self, host: str, port: int, limit: int) -> None:
        self.name, self._host, self._port = f"{in_url(host)}:{port}", host, port
        self._free = threading.BoundedSemaphore(limit)
        self._idle: list[Connection] = []
        self._parked = deque[tuple[float, Connection]]()
        """Connections that were given up, and when to close them."""

    @contextlib.contextmanager
    def lend(self, seconds: float) -> Iterator[Connection]:
        """Lend a connection for one conversation of so many seconds. It is reused unless an exception is raised. Then the idle
        ones are closed: where a host has vanished, each of them would wait for the time-out once."""
        deadline = time.monotonic() + seconds
        self._look_after_parked()
        if not self._free.acquire(timeout=seconds):
            raise TierError("timeout", f"InfiniStore at {self.name}: all connections were busy; raise ?connections=")
        try:
            found = self._take(deadline)
            try:
                yield found
            except BaseException:
                self._parked.append((time.monotonic() + _PARKED_SECONDS, found))
                self._close_idle()
                raise
            self._idle.append(found)
        finally:
            self._free.release()

    def close(self) -> None:
        self._close_idle()
        with contextlib.suppress(IndexError):
            while True:
                self._parked.pop()[1].close()

    def _close_idle(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread has taken it
                self._idle.pop().close()

    def _look_after_parked(self) -> None:
        """Close connections on which nothing can come any more, or which have waited for long enough."""
        with contextlib.suppress(IndexError):  # other threads do the same
            for _ in range(len(self._parked)):
                until, one = self._parked.popleft()
                if time.monotonic() < until and len(self._parked) < _MOST_PARKED and one.forget():
                    self._parked.append((until, one))
                else:
                    one.close()

    def _take(self, deadline: float) -> Connection:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread has taken it
                found = self._idle.pop()
                if found.is_quiet():
                    found.deadline = deadline
                    return found
                found.close()
        return Connection(self._host, self._port, deadline)
