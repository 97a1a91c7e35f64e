"""A TCP proxy for tests: throttling, freezes and cuts between a client and a real server, at a byte where that matters."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType

PIECE_BYTES = 64 << 10
_QUEUED_PIECES = 1024
_PATIENCE = 60.0


class Way:
    """One direction, of all connections together."""

    def __init__(self) -> None:
        self.arrived = 0
        """Bytes that have come to the proxy so far."""
        self.passed = 0
        """Bytes forwarded so far."""
        self._lock = threading.Lock()
        self._mark: tuple[int, Callable[[], object]] | None = None
        self._flow = threading.Event()
        self._flow.set()

    def hold(self) -> None:
        """Forward nothing until `release`; what arrives meanwhile is kept."""
        self._flow.clear()

    def release(self) -> None:
        self._flow.set()

    def after(self, count: int, act: Callable[[], object]) -> None:
        """Call `act`, once, when exactly so many more bytes have been forwarded (0: when the next ones are there)."""
        with self._lock:
            self._mark = self.passed + count, act

    def _take(self, count: int) -> None:
        with self._lock:
            self.arrived += count

    def _forward(self, sink: socket.socket, piece: bytes) -> None:
        left = memoryview(piece)
        while left:
            self._flow.wait()
            left = left[self._forward_to_mark(sink, left) :]

    def _forward_to_mark(self, sink: socket.socket, piece: memoryview) -> int:
        with self._lock:
            if sink.fileno() < 0:
                raise OSError("the connection was cut before this piece")
            act = None
            if self._mark and self._mark[0] <= self.passed + len(piece):
                (end, act), self._mark = self._mark, None
                piece = piece[: end - self.passed]
            self.passed += len(piece)
        sink.sendall(piece)
        if act:
            act()
        return len(piece)


class Proxy:
    """Forwards connections to `127.0.0.1:port` of a server. Every attribute may be changed while connections are open.

    rate: bytes a second, each way and connection; None: unlimited. refuse: new connections are closed at once.
    tls: the client's side is wrapped in this context.
    """

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target, self.tls = target, tls
        self.rate: float | None = None
        self.refuse = False
        self.accepted = 0
        """Connections so far."""
        self.questions, self.answers = Way(), Way()
        """From clients to the server, and back."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def freeze(self) -> None:
        """Nothing is forwarded any more; connections stay open, and new ones are accepted."""
        self.questions.hold()
        self.answers.hold()

    def thaw(self) -> None:
        self.questions.release()
        self.answers.release()

    def cut(self) -> None:
        """End all connections now. New ones are accepted."""
        with self._lock:
            ended, self._open = self._open, set()
        for one in ended:
            _end(one)

    def cut_for_good(self) -> None:
        """End all connections now, and refuse new ones."""
        self.refuse = True
        self.cut()

    def close(self) -> None:
        """End everything, and wait for the threads."""
        self.refuse = True
        self.thaw()
        _end(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "a thread of the proxy does not end"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.refuse:
                _end(client)
                continue
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            if self.tls:
                client.settimeout(_PATIENCE)
                client = self.tls.wrap_socket(client, server_side=True)
                client.settimeout(None)
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            _end(client)
            return
        for one in (client, server):
            with contextlib.suppress(OSError):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, server}
        if self.refuse:
            self.cut()
        for source, sink, way in ((client, server, self.questions), (server, client, self.answers)):
            pieces: queue.Queue[bytes] = queue.Queue(_QUEUED_PIECES)
            self._start(self._read, source, pieces, way)
            self._start(self._write, sink, source, pieces, way)

    def _read(self, source: socket.socket, pieces: queue.Queue[bytes], way: Way) -> None:
        piece = b"more"
        while piece:
            try:
                piece = source.recv(PIECE_BYTES)
            except OSError:
                piece = b""
            way._take(len(piece))
            pieces.put(piece)

    def _write(self, sink: socket.socket, source: socket.socket, pieces: queue.Queue[bytes], way: Way) -> None:
        """Until the source has ended; then both ends are closed. Pieces behind a failed write are drained."""
        free = 0.0
        while piece := pieces.get():
            if self.rate:
                free = max(free, time.monotonic()) + len(piece) / self.rate
                time.sleep(max(0.0, free - time.monotonic()))
            try:
                way._forward(sink, piece)
            except OSError:
                _end(source)  # and its reader says so with an empty piece
        for one in (source, sink):
            with self._lock:
                self._open.discard(one)
            _end(one)


def _end(one: socket.socket) -> None:
    """Close, and wake up whoever waits in it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
