"""The Unix socket serves engines of the same user on this host. They get the arena's descriptor with the `Welcome`.

A process counts as gone when it sends `Bye` or when the kernel reports its end (pidfd). The end of its connection is not used:
the process may still be copying, or have ended while a child holds the connection open. Only if the kernel gives no pidfd
(before Linux 6.5, for another pid namespace) does the end of the connection count as the end of the process.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from lmcache.errors import WireError
from lmcache.observability.log import Seldom, init_logger
from lmcache.server.loop import Loop
from lmcache.server.payload import Frames, nothing
from lmcache.server.refused import Reason
from lmcache.server.service import Service
from lmcache.server.sessions import Peer
from lmcache.wire import messages as m
from lmcache.wire.frames import FrameReader, frame, groups_of, peer_of

logger = init_logger(__name__)
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5
MAX_CONNECTIONS = 1024
"""The most connections of all processes. Those closed while their process lives count, since it may still be copying."""
MAX_CONNECTIONS_OF_PROCESS = 128
HELLO_SECONDS = 10.0
"""A connection is closed if no hello has arrived by then."""
MAX_UNSENT_BYTES = 2 * m.MAX_ANSWER_BYTES
"""Bound of the unsent bytes of one connection. Two answers fit, so an engine may ask again before it has read the last one."""
MAX_ALL_UNSENT_BYTES = 256 << 20
"""Bound of the unsent bytes of all connections. Beyond it, the connection with the most unsent bytes is closed."""
_RECEIVE_BYTES = 1 << 18
_BATCH_BYTES = 1 << 16
"""The answers to messages that arrived together are sent together while they are shorter than this."""


class UnixEndpoint:
    """Serves the connections to `listener`. The endpoint closes the listener, and removes its `path` unless that is None.

    users, groups: whose processes may connect beside those of the server's own user.
    """

    def __init__(
        self,
        loop: Loop,
        service: Service,
        listener: socket.socket,
        path: Path | None,
        users: Collection[int] = (),
        groups: Collection[int] = (),
    ) -> None:
        self.loop, self.service, self.path = loop, service, path
        self._users, self._groups = frozenset(users), frozenset(groups)
        self.connections: set[_Connection] = set()
        self.unfinished: set[_Connection] = set()
        """Open connections, and closed ones whose process may still be copying."""
        self.inbox = memoryview(bytearray(_RECEIVE_BYTES))
        """The receive buffer of all connections. `recv` would allocate a buffer of this size for each message. If malloc takes
        such buffers from the kernel and returns them, page faults take a fifth of the time of a lookup."""
        self.malformed = Seldom(logger, loop.now)
        self._listener = listener
        self._paused = False
        service.sessions.socket_path = str(path) if path is not None else ""
        loop.watch(listener.fileno(), self._accept)
        loop.on_tick += [self._accept_again, self._close_silent]

    def close(self) -> None:
        self.loop.on_tick.remove(self._accept_again)
        self.loop.on_tick.remove(self._close_silent)
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor left: unwatch the listener, or it would keep the loop busy
                why = f"{error.strerror}; the server tries again: raise its limit of open files (ulimit -n)"
                self.service.sessions.refused.note("a connection that cannot be accepted", "no descriptor", why)
                self.loop.unwatch(self._listener.fileno())
                self._paused = True
                return
            sock.setblocking(False)
            pid, uid = peer_of(sock)
            if not self._may_enter(sock, uid):
                why = (
                    f"user {uid} is not the server's user {os.getuid()}: run the engine as the same user, or start the server "
                    f"with --allow-uid {uid} and the engine with LMCACHE_ALLOW_SERVER_UID={os.getuid()}"
                )
                self._turn_away(sock, f"pid {pid} of user {uid}", "other user", why)
            elif len(self.unfinished) >= MAX_CONNECTIONS:
                self._turn_away(sock, f"pid {pid}", "too many", f"{MAX_CONNECTIONS} connections are open already")
            elif pid and sum(one.pid == pid for one in self.unfinished) >= MAX_CONNECTIONS_OF_PROCESS:
                why = f"process {pid} has opened {MAX_CONNECTIONS_OF_PROCESS} already; end it to go on"
                self._turn_away(sock, f"pid {pid}", "too many", why)
            else:
                connection = _Connection(self, sock, pid)
                self.connections.add(connection)
                self.unfinished.add(connection)

    def _may_enter(self, sock: socket.socket, uid: int) -> bool:
        """Return whether a process of this user may map the arena. The kernel names users and groups, not the process."""
        if uid == os.getuid() or uid in self._users:
            return True
        return bool(self._groups) and not self._groups.isdisjoint(groups_of(sock))

    def _accept_again(self) -> None:
        if self._paused:
            self._paused = False
            self.loop.watch(self._listener.fileno(), self._accept)

    def _close_silent(self) -> None:
        """Close connections without a hello, which would otherwise use up the connections allowed."""
        limit = self.loop.now() - HELLO_SECONDS
        for connection in [one for one in self.connections if not one.peer.process and one.opened < limit]:
            connection.close()

    def _turn_away(self, sock: socket.socket, who: str, reason: Reason, why: str) -> None:
        self.service.sessions.refused.note(who, reason, why)
        try:
            sock.send(frame(m.encode(0, m.Error("refused", why))))
        except OSError:
            pass
        sock.close()


class _Connection:
    def __init__(self, endpoint: UnixEndpoint, sock: socket.socket, pid: int) -> None:
        self.endpoint, self.sock, self.pid = endpoint, sock, pid
        self.opened = endpoint.loop.now()
        self.peer = Peer("unix socket", writer=pid, replaced=self.close)
        self._reader = FrameReader(m.MAX_MESSAGE_BYTES)
        self._more, self._answers = False, b""
        """Whether more messages have arrived, and the answers that wait for theirs: the engine then wakes up only once."""
        self._hears = True
        """Whether answers still reach the engine. Once one did not, what the engine has sent before it hung up is still read."""
        self._unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self._descriptor = sock.fileno()
        self._pidfd = _open_pidfd(sock, pid)
        endpoint.loop.watch(self._descriptor, self._ready)
        if self._pidfd is not None:
            endpoint.loop.watch(self._pidfd, self._process_ended)

    def close(self) -> None:
        """Close the connection. The process stays known, unless it has sent `Bye` or a hello elsewhere, or has no pidfd."""
        if self.sock.fileno() >= 0:
            self.endpoint.loop.unwatch(self._descriptor)
            self.endpoint.connections.discard(self)
            self._unsent.clear()
            self.sock.close()
        if self._pidfd is None or not self.peer.process:
            self._process_ended()

    def _process_ended(self) -> None:
        if self._pidfd is not None:
            self.endpoint.loop.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self.endpoint.service.sessions.gone(self.peer)
        self.endpoint.unfinished.discard(self)
        if self.sock.fileno() >= 0:
            self.close()

    def _ready(self) -> None:
        if self._unsent:
            self._flush()
        try:
            received = self.sock.recv_into(self.endpoint.inbox)
        except BlockingIOError:
            return
        except OSError:
            received = 0
        if not received:
            self.close()
            return
        try:
            # No copy is needed: all of these bytes are decoded before the next ones arrive.
            frames = self._reader.feed(self.endpoint.inbox[:received])
        except WireError as error:  # the beginning of the next frame is unknown now
            self._complain(0, error)
            self.close()
            return
        for number, raw in enumerate(frames, 1):
            self._more = number < len(frames)
            try:
                sequence, request = m.decode_request(raw)
            except WireError as error:
                self._complain(m.sequence_of(raw), error)
            else:
                self._serve(sequence, request)
            if self.sock.fileno() < 0:
                return

    def _complain(self, sequence: int, error: WireError) -> None:
        self.endpoint.service.counters["malformed_messages"] += 1
        self.endpoint.malformed.warning("A malformed message from pid %d: %s", self.pid, error)
        self._answer(sequence, m.Error("malformed", str(error)))

    def _serve(self, sequence: int, request: m.Request) -> None:
        if type(request) is m.Hello and self.pid > 0:  # use the kernel's pid: the engine's may be of another namespace
            request = msgspec.structs.replace(request, pid=self.pid)

        def reply(answer: m.Message, frames: Frames, sent: Callable[[], None] = nothing) -> None:
            self._answer(sequence, answer)
            sent()

        self.endpoint.service.handle(self.peer, request, [], reply)

    def _answer(self, sequence: int, answer: m.Message) -> None:
        descriptors = (self.endpoint.service.l1.arena.descriptor,) if type(answer) is m.Welcome else ()
        data, self._answers = self._answers + frame(m.encode(sequence, answer)), b""
        if self._more and not descriptors and len(data) < _BATCH_BYTES:
            self._answers = data
        else:
            self._send(data, descriptors)

    def _send(self, data: bytes, descriptors: tuple[int, ...]) -> None:
        if self.sock.fileno() < 0 or not self._hears:
            return
        if self._unsent:
            self._keep(memoryview(data))
            return
        try:
            sent = socket.send_fds(self.sock, [data], descriptors) if descriptors else self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._hears = False
            return
        if sent < len(data):
            self._keep(memoryview(data)[sent:])

    def _keep(self, data: memoryview) -> None:
        self._unsent.append(data)
        self.unsent_bytes += len(data)
        self.endpoint.loop.watch(self._descriptor, self._ready, write=True)
        everybody = self.endpoint.connections
        most = max(everybody, key=lambda one: one.unsent_bytes)
        if most.unsent_bytes > MAX_UNSENT_BYTES or sum(one.unsent_bytes for one in everybody) > MAX_ALL_UNSENT_BYTES:
            most.hang_up_on_deaf()

    def hang_up_on_deaf(self) -> None:
        logger.warning(
            "Closing a connection of pid %d, which does not read %d bytes of answers: does it hang?",
            self.pid,
            self.unsent_bytes,
        )
        self.close()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._hears = False
                self._unsent.clear()
                self.unsent_bytes = 0
                break
            self.unsent_bytes -= sent
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
                return
            self._unsent.popleft()
        self.endpoint.loop.watch(self._descriptor, self._ready)


def _open_pidfd(sock: socket.socket, pid: int) -> int | None:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None
