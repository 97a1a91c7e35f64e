"""The engine's transports to the server: one request, one answer, one deadline. Not thread-safe: `engine.connection` locks."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

import zmq

from lmcache.compiled import native
from lmcache.config.hosts import duplicate, in_url, seconds_left
from lmcache.errors import ServerUnavailable, WireError, plainly
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME, Runtime
from lmcache.wire import auth
from lmcache.wire import messages as m
from lmcache.wire.frames import FrameReader, frame, peer_of
from lmcache.wire.received import MONITOR_EVENT, bytes_received

_LINGER_MILLISECONDS = 300
"""How long ZMQ's own thread tries to deliver the last posted message (a `Bye`) after the socket is closed."""
_HOLD_MICROSECONDS = 200
"""How long a call keeps the GIL, and a post too (`native/exchange.c` says why). A server answers sooner unless it has to evict or
to ask a tier."""
_POST_MICROSECONDS = 1_000_000
"""How long a post may take whose message the server's full socket does not take at once."""
_WAITING_ANSWERS = 8
"""Messages that ZMQ receives ahead of reading. The bound is needed because an unproven server may send anything."""
MAX_UNTRUSTED_BYTES = 1 << 20
"""A server that may be anybody's may send so many on one connection: ZMQ keeps a message until it is complete, however long."""
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_LOOK_SECONDS = 0.01
"""Interval between checks of how much an unproven server has sent, while an answer is awaited."""
_MAX_SKIPPED = 64
"""Of answers to earlier posts, before the next one. There is one for each post, unless the server is a rogue."""


class Carrier(Protocol):
    """A connection to the server. Any failure raises ServerUnavailable; the caller must then close the carrier, because it
    cannot know what the server did with the last request."""

    def exchange(
        self, request: m.Message, deadline_seconds: float, frames: Sequence[bytes | memoryview] = ()
    ) -> tuple[m.Answer, list[bytes]]: ...

    def post(self, request: m.Message) -> None:
        """Send a request without waiting for its answer. The answer is discarded when it arrives."""
        ...

    def close(self) -> None: ...


class UnixCarrier:
    """A connection to the Unix socket of a server on this host. The arena's descriptor arrives with the welcome."""

    def __init__(self, path: str, hello: m.Hello, deadline_seconds: float, server_uids: Collection[int] = ()) -> None:
        """server_uids: users beside this process's own whose server is trusted."""
        self._sequence = 0
        self._reader = FrameReader(m.MAX_ANSWER_BYTES)
        self._arrived: list[bytes | memoryview] = []
        self.descriptor = -1
        """The arena's descriptor, which the caller has to close; -1 where the server sent none."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + deadline_seconds
        try:
            self._socket.settimeout(seconds_left(deadline))
            self._socket.connect(path)
            _, uid = peer_of(self._socket)
            if uid != os.getuid() and uid not in server_uids:
                raise ServerUnavailable(f"the server there runs as user {uid}, this engine as {os.getuid()}")
            self._socket.settimeout(seconds_left(deadline))
            with suppress(
                BrokenPipeError
            ):  # a server that refuses this process has answered, and closed its end, already
                self._socket.sendall(frame(m.encode(0, hello)))
            self._socket.settimeout(seconds_left(deadline))
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
            self.descriptor = descriptors[0] if descriptors else -1
            self._arrived = self._reader.feed(data)
            _, self.welcome = self._next(deadline)
        except (OSError, WireError, ServerUnavailable) as error:
            self._socket.close()
            if self.descriptor >= 0:
                os.close(self.descriptor)
            shown = printable(path.replace("\0", "@"), 200)  # an abstract socket name is written with an @
            raise ServerUnavailable(f"{shown}: {plainly(error)}") from error

    def exchange(
        self, request: m.Message, deadline_seconds: float, frames: Sequence[bytes | memoryview] = ()
    ) -> tuple[m.Answer, list[bytes]]:
        assert not frames, "payload frames travel over ZMQ"
        deadline = time.monotonic() + deadline_seconds
        self._sequence += 1
        try:
            self._arrived += self._round_trip(frame(m.encode(self._sequence, request)), deadline_seconds)
            while True:
                sequence, answer = self._next(deadline)
                if sequence == self._sequence:
                    return answer, []
                if sequence > self._sequence or sequence == 0:
                    raise WireError(f"answer {sequence} to request {self._sequence}: {printable(str(answer))}")
        except (OSError, WireError) as error:
            raise ServerUnavailable(str(error) or type(error).__name__) from error

    def post(self, request: m.Message) -> None:
        self._sequence += 1
        self._arrived.clear()  # answers to earlier posts
        try:
            message = frame(m.encode(self._sequence, request))
            self._reader.feed(native.post(self._socket.fileno(), message, _HOLD_MICROSECONDS, _POST_MICROSECONDS))
        except (OSError, WireError) as error:
            raise ServerUnavailable(str(error) or type(error).__name__) from error

    def wait_for_end(self, timeout_seconds: float, runtime: Runtime = RUNTIME) -> bool:
        """Return True when the other side has hung up, or another thread has closed the socket. runtime: counts the seconds."""
        return runtime.hung_up(self._socket, timeout_seconds)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()

    def _next(self, deadline: float) -> tuple[int, m.Answer]:
        while not self._arrived:
            self._arrived = self._round_trip(b"", seconds_left(deadline))
        return m.decode_answer(self._arrived.pop(0))

    def _round_trip(self, request: bytes, timeout_seconds: float) -> list[bytes | memoryview]:
        """Send `request` (b"": nothing), receive once, and return the frames that are complete now, if any."""
        try:
            data = native.exchange(self._socket.fileno(), request, _HOLD_MICROSECONDS, int(timeout_seconds * 1_000_000))
        except TimeoutError as error:
            raise ServerUnavailable("no answer within the deadline") from error
        if not data:
            raise ServerUnavailable("the server has hung up")
        return self._reader.feed(data)


class ZmqCarrier:
    """A ZMQ socket to a server on any host, for one connection. ZMQ may not reconnect it, because a later owner of the port may
    be another server, which must not receive what was meant for this one.

    address: tcp://host:port with a numeric host, because ZMQ would resolve a name without a deadline and take any of its
    addresses. key_file: the key file of CURVE; None for no CURVE. `host` and `port` are the server's.
    """

    def __init__(self, address: str, key_file: Path | None = None) -> None:
        self._sequence = 0
        self._head = zmq.Frame()
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.host, self.port = str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MILLISECONDS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_PAYLOAD_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, _WAITING_ANSWERS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        # Without an id the server's ZMQ counts, and whoever guesses the id of a connection that just ended may continue it.
        self._socket.setsockopt(zmq.ROUTING_ID, b"e" + secrets.token_bytes(16))
        self._socket.setsockopt(zmq.IPV6, int(":" in self.host))
        if key_file is not None:
            auth.protect_engine(self._socket, key_file)
        self._trusted = key_file is not None
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED
        )
        self._connection, self._turned_away, self._hung_up = -1, False, False
        try:
            self._socket.connect(f"tcp://{in_url(self.host)}:{self.port}")
        except zmq.ZMQError as error:
            self.close()
            raise ServerUnavailable(f"{address}: {plainly(error)}") from error

    def exchange(
        self, request: m.Message, deadline_seconds: float, frames: Sequence[bytes | memoryview] = ()
    ) -> tuple[m.Answer, list[bytes]]:
        deadline = time.monotonic() + deadline_seconds
        self.post(request, frames)
        try:
            while True:
                self._wait(deadline)
                self._head = self._socket.recv(copy=False)  # this frame knows the connection that brought it
                payload = self._socket.recv_multipart() if self._head.more else []
                sequence, answer = m.decode_answer(self._head.bytes)
                if sequence == self._sequence:
                    return answer, payload
                if sequence > self._sequence or (sequence == 0 and isinstance(answer, m.Error)):
                    raise ServerUnavailable(f"answer {sequence} to request {self._sequence}: {printable(str(answer))}")
        except (zmq.ZMQError, WireError) as error:
            raise ServerUnavailable(str(error)) from error

    def post(self, request: m.Message, frames: Sequence[bytes | memoryview] = ()) -> None:
        self._sequence += 1
        try:
            for _ in range(_MAX_SKIPPED):
                if not self._socket.poll(0, zmq.POLLIN):
                    break
                self._socket.recv_multipart(zmq.NOBLOCK)
            self._send(request, frames)
        except zmq.ZMQError as error:
            raise ServerUnavailable(str(error)) from error

    def _send(self, request: m.Message, frames: Sequence[bytes | memoryview] = ()) -> None:
        try:
            self._socket.send_multipart([m.encode(self._sequence, request), *frames], zmq.NOBLOCK, copy=not frames)
        except zmq.Again as error:
            raise ServerUnavailable("the server has hung up") from error

    # Several requests at a time

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Readable when `receive` may have something, and when `hung_up` may have changed."""
        return self._socket, self._monitor

    def send(self, request: m.Message) -> int:
        """Send a request, whose answer `receive` returns with the number that this returns. Raises ServerUnavailable."""
        self._sequence += 1
        try:
            self._send(request)
        except zmq.ZMQError as error:
            raise ServerUnavailable(str(error)) from error
        return self._sequence

    def receive(self) -> tuple[int, m.Answer, list[zmq.Frame]] | None:
        """Return the next answer that has arrived, with its number and its payload frames, which are not copied; None if none.

        Raises:
            ServerUnavailable: what has arrived is no answer.
        """
        try:
            head, *payload = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            return *m.decode_answer(head.buffer), payload
        except zmq.Again:
            return None
        except (zmq.ZMQError, WireError) as error:
            raise ServerUnavailable(str(error)) from error

    def hung_up(self) -> bool:
        """Return whether the connection has ended."""
        self._read_monitor()
        return self._hung_up

    def connection_name(self) -> str:
        """Name the TCP connection that brought the last answer to `exchange` (see `auth.connection_name`)."""
        return auth.connection_name(self._head, "engine")

    def turned_away(self) -> bool:
        """Whether the handshake of ZMQ has failed. With CURVE on both sides that means that the keys differ."""
        self._read_monitor()
        return self._turned_away

    def trust(self) -> None:
        """Lift the bound on received bytes, because the server is proved or the engine uses it without a proof."""
        self._trusted = True

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()

    def _wait(self, deadline: float) -> None:
        """Wait for a message. Raises ServerUnavailable when none comes in time or an unproven server sends too much."""
        while (remaining := deadline - time.monotonic()) > 0:
            if not self._trusted and self.received() > MAX_UNTRUSTED_BYTES:
                raise ServerUnavailable(f"an unproven server has sent more than {MAX_UNTRUSTED_BYTES} bytes")
            step = remaining if self._trusted else min(remaining, _LOOK_SECONDS)
            if self._socket.poll(int(step * 1000) + 1, zmq.POLLIN):
                return
        raise ServerUnavailable("no answer within the deadline")

    def received(self) -> int:
        """Bytes over the connection so far, also those of messages that are not complete. 0 if there is no connection."""
        self._read_monitor()
        connection = duplicate(self._connection) if self._connection >= 0 else None
        if connection is None:
            return 0
        with connection:
            try:
                # After a connection has ended, its descriptor number may belong to another one.
                is_ours = connection.getpeername()[:2] == (self.host, self.port)
            except OSError:
                return 0
            return bytes_received(connection) if is_ours else 0

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            kind, value = MONITOR_EVENT.unpack(self._monitor.recv_multipart()[0])
            if kind == zmq.EVENT_CONNECTED:
                self._connection = value
            elif kind == zmq.EVENT_DISCONNECTED:
                self._hung_up = True
            else:
                self._turned_away = True
