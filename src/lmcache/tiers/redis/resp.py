"""The Redis protocol (RESP2) over plain sockets: pipelines whose large values are sent from and received into caller's memory.

redis-py is not used: it joins a value from small pieces, and the caller copies it once more, which takes three times as long as
`recv_into` the target. Here every wait also ends at the caller's deadline.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from lmcache.config.hosts import connect, is_quiet, seconds_left
from lmcache.observability.log import printable
from lmcache.tiers.redis.remedies import remedy_of
from lmcache.tiers.tier import TierError

PIECE_BYTES = 512 << 10
"""A value is transferred in such pieces; their checksums are computed while they are in the processor's cache."""
_BUFFER_BYTES = 16 << 10
"""Buffer for short replies. It is small, because the part of a large value that arrives in it is copied once more."""
_MOST_BYTES, _MOST_ITEMS, _MOST_DEPTH = 1 << 20, 1 << 20, 4
"""Bounds of each string and list of a reply that is not received into the caller's memory, and of lists within lists."""
_MOST_MEMORY, _ITEM_BYTES = 64 << 20, 64
"""The memory of such a reply as a whole, about; and what an item takes beside its bytes."""
_KNOCK_SECONDS = 1.0
"""Time beyond the deadline, only for a server that has never answered, to find out whether it speaks TLS."""

Seen = Callable[[memoryview], object]
"""Called with each piece of a value, in order, during its transfer."""


@dataclass(frozen=True)
class ReplyError:
    """An error that the server answered. `code` is its first word."""

    code: str
    text: str


def _error(line: bytes) -> ReplyError:
    """Redis repeats the arguments of a command that it does not know. Those of AUTH are the password."""
    text = printable(line.decode("utf-8", "replace").partition(", with args beginning with")[0])
    return ReplyError(text.partition(" ")[0], text)


Reply: TypeAlias = "bytes | int | ReplyError | list[Reply] | None"
"""Simple and bulk strings are both bytes."""


class Moved(TierError):
    """The key is on another node of the cluster, so the map of nodes is out of date."""


class ScriptLost(TierError):
    """The server does not have the script that a connection has sent it before. New connections send it again."""


@dataclass(frozen=True)
class Login:
    """Credentials and database. An empty username means the password alone; an empty password means neither."""

    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: ssl.SSLContext | None = None


class Connection:
    """One connection to one server. Any failure raises TierError and closes it.

    `deadline` is in `time.monotonic` seconds; the user of the connection must set it first.
    """

    def __init__(self, host: str, port: int, login: Login, deadline: float) -> None:
        self.name, self.deadline = f"{host}:{port}", deadline
        self._username = login.username
        self._known_scripts: set[bytes] = set()
        """The digests of the scripts that this connection has sent."""
        self._out = bytearray()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view, self._from, self._to = memoryview(self._buffer), 0, 0
        self._memory_left = 0
        """What the reply that is being read may still take."""
        try:
            self._socket = connect(host, port, seconds_left(self.deadline))
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if login.tls:
                self._socket.settimeout(seconds_left(self.deadline))
                self._socket = login.tls.wrap_socket(self._socket, server_hostname=host)
            self._enter(login)
        except OSError as error:
            raise self._failed(error) from None
        except TierError:
            self.close()
            raise

    def _enter(self, login: Login) -> None:
        if login.password:
            self.queue(b"AUTH", *filter(None, (login.username, login.password)))
        if login.database:
            self.queue(b"SELECT", login.database)
        self.queue(b"PING")
        for _ in range(1 + bool(login.password) + bool(login.database)):
            self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def own_address(self) -> str:
        """Return the numeric address of this end."""
        try:
            return str(self._socket.getsockname()[0]).removeprefix("::ffff:").partition("%")[0]
        except OSError as error:
            raise self._failed(error) from None

    def is_quiet(self) -> bool:
        """Return whether the connection can be used for another command."""
        return self._from == self._to and not self._out and is_quiet(self._socket)

    # ---- requests

    def queue(self, *words: bytes | str | int) -> None:
        """Queue a command, which is sent by the next `flush`, `send_value` or read of a reply."""
        self._out += b"*%d\r\n" % len(words)
        for word in words:
            said = word if isinstance(word, bytes) else str(word).encode()
            self._out += b"$%d\r\n%b\r\n" % (len(said), said)

    def queue_script(self, text: bytes, digest: bytes, key: bytes, *arguments: bytes | str | int) -> None:
        """Queue a call of a script with one key: its text the first time, which the server keeps, and then its SHA-1 digest."""
        if digest in self._known_scripts:
            self.queue(b"EVALSHA", digest, 1, key, *arguments)
        else:
            self.queue(b"EVAL", text, 1, key, *arguments)
            self._known_scripts.add(digest)

    def send_value(self, key: bytes, value: memoryview, seen: Seen, *options: bytes) -> None:
        """Send `SET key value options` now, without copying the value anywhere but into the socket."""
        self._out += b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (3 + len(options), len(key), key, len(value))
        self.flush()
        try:
            for start in range(0, len(value), PIECE_BYTES):
                piece = value[start : start + PIECE_BYTES]
                seen(piece)
                self._socket.settimeout(seconds_left(self.deadline))
                self._socket.sendall(piece)
        except OSError as error:
            raise self._failed(error) from None
        self._out += b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(option), option) for option in options)

    def flush(self) -> None:
        if self._out:
            try:
                self._socket.settimeout(seconds_left(self.deadline))
                self._socket.sendall(self._out)
            except OSError as error:
                raise self._failed(error) from None
            self._out.clear()

    # ---- replies

    def reply(self, depth: int = 0) -> Reply:
        """Return the next reply, errors included."""
        self.flush()
        kind, rest = self._line()
        if not depth:
            self._memory_left = _MOST_MEMORY
        elif (left := self._memory_left - len(rest) - _ITEM_BYTES) >= 0:
            self._memory_left = left
        else:
            raise self._nonsense(kind + rest)
        if kind == b"+":
            return rest
        if kind == b":":
            return self._number(rest)
        if kind == b"-":
            return _error(rest)
        count = self._number(rest)
        if count < 0:
            return None
        if count > (_MOST_BYTES if kind == b"$" else _MOST_ITEMS) or depth > _MOST_DEPTH:
            raise self._nonsense(kind + rest)
        if kind == b"$":
            self._memory_left -= count
            value = bytearray(count)
            self._read(memoryview(value))
            self._skip(2)
            return bytes(value)
        if kind == b"*":
            return [self.reply(depth + 1) for _ in range(count)]
        raise self._nonsense(kind + rest)

    def answer(self) -> Reply:
        """Return the next reply. Raises TierError for an error, after which the connection's other replies are lost."""
        reply = self.reply()
        if isinstance(reply, ReplyError):
            raise self.refused(reply)
        return reply

    def value_into(self, memory: memoryview, seen: Seen) -> int | ReplyError | None:
        """Receive a value into `memory` and return its length, None for none. A value of another length is discarded."""
        self.flush()
        kind, rest = self._line()
        if kind == b"-":
            return _error(rest)
        if kind != b"$":
            raise self._nonsense(kind + rest)
        count = self._number(rest)
        if count < 0:
            return None
        if count == len(memory):
            self._read(memory, seen)
            self._skip(2)
        else:
            self._skip(count + 2)
        return count

    # ---- bytes

    def _line(self) -> tuple[bytes, bytes]:
        """Return the kind and the rest of the next line of a reply."""
        while (end := self._buffer.find(b"\r\n", self._from, self._to)) < 0:
            if self._from:
                left = self._to - self._from
                self._view[:left] = bytes(self._view[self._from : self._to])
                self._from, self._to = 0, left
            if self._to == len(self._buffer):
                raise self._nonsense(bytes(self._buffer[:40]))
            self._to += self._receive(self._view[self._to :])
        line = bytes(self._view[self._from : end])
        self._from = end + 2
        return line[:1], line[1:]

    def _read(self, memory: memoryview, seen: Seen | None = None) -> None:
        """Receive bytes until the memory is full."""
        got = min(len(memory), self._to - self._from)
        memory[:got] = self._view[self._from : self._from + got]
        self._from += got
        told = 0
        while got < len(memory):
            got += self._receive(memory[got:])
            if seen and got - told >= PIECE_BYTES:
                seen(memory[told:got])
                told = got
        if seen and told < got:
            seen(memory[told:got])

    def _skip(self, count: int) -> None:
        while count:
            if self._from == self._to:
                self._from, self._to = 0, self._receive(self._view)
            step = min(count, self._to - self._from)
            self._from += step
            count -= step

    def _receive(self, memory: memoryview) -> int:
        try:
            self._socket.settimeout(seconds_left(self.deadline))
            if count := self._socket.recv_into(memory):
                return count
        except OSError as error:
            raise self._failed(error) from None
        raise self._failed(ConnectionResetError("the server has closed the connection"))

    # ---- errors

    def _number(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            raise self._nonsense(text) from None

    def _nonsense(self, line: bytes) -> TierError:
        self.close()
        return TierError("protocol", f"{self.name} does not speak Redis: it answered {line[:40]!r}")

    def _failed(self, error: OSError) -> TierError:
        """Close the connection and return the error as a TierError."""
        if hasattr(self, "_socket"):
            self.close()
        if isinstance(error, TimeoutError):
            return TierError("timeout", f"Redis at {self.name} did not answer in time; check it, or raise ?timeout=")
        if isinstance(error, ssl.SSLCertVerificationError):
            return TierError("denied", f"Redis at {self.name}: {error.verify_message}; give its signer with ?ca_file=")
        return TierError("unreachable", f"Redis at {self.name}: {error.strerror or error}")

    def refused(self, error: ReplyError) -> TierError:
        """Close the connection and return an error reply as a TierError."""
        self.close()
        if error.code == "MOVED":
            return Moved("moved", f"Redis at {self.name} is a node of a cluster and lacks a key: add ?cluster=yes")
        if error.code == "NOSCRIPT":
            return ScriptLost("not ready", f"Redis at {self.name} has forgotten a script; it is sent again")
        reason, remedy = remedy_of(error.code, error.text, self._username)
        text = f"{error.text.rstrip('.')}; {remedy}" if remedy else error.text
        return TierError(reason, f"Redis at {self.name}: {text}")


class Node:
    """The connections to one server, of which at most `limit` are in use at once."""

    def __init__(self, host: str, port: int, login: Login, limit: int) -> None:
        self.host, self.port, self._login = host, port, login
        self._free = threading.BoundedSemaphore(limit)
        self._idle: list[Connection] = []
        self._has_answered = False

    @contextlib.contextmanager
    def connection(self, deadline: float) -> Iterator[Connection]:
        """Lend a connection for one conversation. It is reused unless an exception is raised. Then the idle ones are closed, too:
        behind one address another server may answer now, as after a failover, and each of them would fail once."""
        if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TierError(
                "timeout", f"Redis at {self.host}:{self.port}: all connections were busy; raise ?connections="
            )
        try:
            found = self._take(deadline)
            try:
                yield found
            except BaseException:
                found.close()
                self.close()
                raise
            self._idle.append(found)
        finally:
            self._free.release()

    def _take(self, deadline: float) -> Connection:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread has taken it
                found = self._idle.pop()
                if found.is_quiet():
                    found.deadline = deadline
                    return found
                found.close()
        try:
            found = Connection(self.host, self.port, self._login, deadline)
        except TierError as error:
            raise error if self._has_answered else self._explained(error) from None
        self._has_answered = True
        return found

    def _explained(self, error: TierError) -> TierError:
        """Return the error of a server that never answered: `error`, or that the URL's scheme does not fit the port."""
        has_tls = self._login.tls is not None
        if error.reason in (("timeout", "unreachable") if has_tls else ("protocol", "unreachable")):
            with contextlib.suppress(OSError), connect(self.host, self.port, _KNOCK_SECONDS) as other:
                other.settimeout(_KNOCK_SECONDS)
                if has_tls and _is_plain_redis(other):
                    why = f"Redis at {self.host}:{self.port} speaks no TLS: write redis:// in place of rediss://"
                    return TierError("protocol", why)
                if not has_tls and _is_tls(other):
                    why = f"{self.host}:{self.port} speaks TLS: write rediss:// in place of redis://"
                    return TierError("protocol", why)
            if self._login.tls and error.reason == "unreachable" and self._wants_certificate(self._login.tls):
                remedy = "give one with ?cert_file= and ?cert_key_file=, or set `tls-auth-clients no` there"
                why = f"Redis at {self.host}:{self.port} asks for a certificate of its clients: {remedy}"
                return TierError("denied", why)
        return error

    def _wants_certificate(self, tls: ssl.SSLContext) -> bool:
        """Whether the server ends TLS because the client shows no certificate. It says so to one who listens only."""
        with contextlib.suppress(OSError), connect(self.host, self.port, _KNOCK_SECONDS) as plain:
            plain.settimeout(_KNOCK_SECONDS)
            try:
                with tls.wrap_socket(plain, server_hostname=self.host) as other:
                    other.recv(1)
            except ssl.SSLError as error:
                return "CERTIFICATE_REQUIRED" in (error.reason or "") or "HANDSHAKE_FAILURE" in (error.reason or "")
        return False

    def close(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()


def _is_plain_redis(connection: socket.socket) -> bool:
    connection.sendall(b"PING\r\n")
    return connection.recv(1) in (b"+", b"-")


def _is_tls(connection: socket.socket) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no data is sent to it
    context.wrap_socket(connection).close()
    return True
