"""A TCP proxy for tests: delay, throttling, freezes and cuts between a client and a real server."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from types import TracebackType

PIECE_BYTES = 64 << 10
_QUEUED_PIECES = 64


class Proxy:
    """Forwards connections to `127.0.0.1:port` of a server. Every attribute may be changed while connections are open.

    delay: seconds that every byte is under way, each way. rate: bytes a second, each way and connection; None: unlimited.
    refuse: new connections are closed at once. tls: the client's side is wrapped in this context.
    """

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target, self.tls = target, tls
        self.delay = 0.0
        self.rate: float | None = None
        self.refuse = False
        self.accepted = 0
        """Connections so far."""
        self.sent = 0
        """Bytes from clients to the server so far."""
        self._allowed: int | None = None
        self._flow = threading.Event()
        self._flow.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def freeze(self) -> None:
        """Nothing is forwarded any more; connections stay open, and new ones are accepted."""
        self._flow.clear()

    def thaw(self) -> None:
        self._flow.set()

    def cut(self) -> None:
        """End all connections now. New ones are accepted."""
        with self._lock:
            ended, self._open = self._open, set()
        for one in ended:
            _end(one)

    def cut_after(self, count: int | None) -> None:
        """When clients have sent so many more bytes, all connections are cut at exactly that byte; once. None: never."""
        with self._lock:
            self._allowed = count

    def close(self) -> None:
        """End everything, and wait for the threads."""
        self.refuse = True
        self._flow.set()
        _end(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(10)
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
                client.settimeout(10)
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
        for source, sink, outwards in ((client, server, True), (server, client, False)):
            pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(_QUEUED_PIECES)
            self._start(self._read, source, pieces)
            self._start(self._write, sink, source, pieces, outwards)

    def _read(self, source: socket.socket, pieces: queue.Queue[tuple[float, bytes]]) -> None:
        piece = b"more"
        while piece:
            try:
                piece = source.recv(PIECE_BYTES)
            except OSError:
                piece = b""
            pieces.put((time.monotonic() + self.delay, piece))

    def _write(
        self, sink: socket.socket, source: socket.socket, pieces: queue.Queue[tuple[float, bytes]], outwards: bool
    ) -> None:
        """Until the source has ended; then both ends are closed. Pieces behind a failed write are drained."""
        free = 0.0
        while True:
            due, piece = pieces.get()
            if not piece:
                break
            if self.rate:
                due = free = max(free, due) + len(piece) / self.rate
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            self._flow.wait()
            try:
                if outwards:
                    self._send_counted(sink, piece)
                else:
                    sink.sendall(piece)
            except OSError:
                _end(source)  # and its reader says so with an empty piece
        for one in (source, sink):
            with self._lock:
                self._open.discard(one)
            _end(one)

    def _send_counted(self, sink: socket.socket, piece: bytes) -> None:
        with self._lock:
            if sink.fileno() < 0:
                raise OSError("the connection was cut before this piece")
            cut = self._allowed is not None and self._allowed <= len(piece)
            if cut:
                piece, self._allowed = piece[: self._allowed], None
            elif self._allowed is not None:
                self._allowed -= len(piece)
            self.sent += len(piece)
        sink.sendall(piece)
        if cut:
            self.cut()


def _end(one: socket.socket) -> None:
    """Close, and wake up whoever waits in it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
