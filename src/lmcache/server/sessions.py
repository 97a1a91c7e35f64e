"""Sessions record the connected engine processes, their numbers in L1, and the memory that the server holds for each."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from lmcache import __version__
from lmcache.cache import L1, Refusal
from lmcache.observability.log import init_logger, printable
from lmcache.server.refused import Refused
from lmcache.wire import messages as m

logger = init_logger(__name__)
MAX_HELD_BYTES = 1 << 30
"""Bound of the bytes of all running payload copies and all large answers that are not sent yet."""
MAX_HELD_BYTES_OF_PEER = 2 * m.MAX_PAYLOAD_BYTES
"""The same bound for one engine process. Two messages fit, so it may ask again while its last answer is being sent."""
MAX_HELD_BYTES_OF_PEERS = MAX_HELD_BYTES // 2
"""The same bound for all peers together, so that they leave room for engines."""
Who = tuple[str, int, str, int, bytes]
"""The identity of a session: instance, pid, role, rank, and random bytes that the engine chose."""


@dataclass(slots=True, eq=False)
class Peer:
    """One connected engine process, as its endpoint knows it. `process` is its number in L1; 0 before its hello."""

    endpoint: str
    host: str = "this host"
    process: int = 0
    instance: str = ""
    role: str = ""
    rank: int = 0
    pid: int = 0
    payload: bool = False
    writer: int | None = None
    """The pid of the process that fills the peer's extents; 0 if unknown, None for the server (payload frames)."""
    busy: int = 0
    """How many payload copies are running for this peer."""
    held_bytes: int = 0
    """Bytes of payload being copied for this peer, and of large answers that ZMQ has not sent yet."""
    gone: bool = False
    replaced: Callable[[], None] | None = None
    """Called once when the same session has said hello on another connection."""
    since: float = 0.0
    """When its hello was accepted, in seconds of the loop's clock."""
    layout: dict[str, object] = field(default_factory=dict)
    """The registered layout, for /status; empty until the peer registers its KV."""
    spaces: dict[int, str] = field(default_factory=dict)
    """The spaces that the peer has registered -> the model."""

    @property
    def who(self) -> str:
        return _who(self.role, self.rank, self.pid)


def who_says(hello: m.Hello | m.Declined, host: str) -> str:
    """Describe the sender of a message for log lines, with its host."""
    return f"{_who(printable(hello.role, 40), hello.rank, hello.pid)}, from {host}"


def _who(role: str, rank: int, pid: int) -> str:
    return f"{role} rank {rank}, pid {pid}"


class Sessions:
    """All sessions of a server."""

    def __init__(self, l1: L1, chunk_tokens: int, now: Callable[[], float], server_id: bytes = b"") -> None:
        self._now = now
        self.server_id = server_id or secrets.token_bytes(16)
        self.socket_path = ""
        self.cookie_path = ""
        self.meets = False
        """Whether other servers may ask how to read from L1 by themselves."""
        self.peers: set[Peer] = set()
        self.refused = Refused(now)
        self.held_bytes = 0
        """Bytes held for all peers, including those that have gone and still have unsent answers."""
        self.on_gone: list[Callable[[int], None]] = []
        """Called with the number of each process that has ended."""
        self._l1, self._chunk_tokens = l1, chunk_tokens
        self._participants: dict[Who, int] = {}
        self._next_process = 1
        self._described: dict[int, tuple[str, str]] = {}

    def hello(self, peer: Peer, hello: m.Hello) -> m.Message:
        """Check the version of a hello and let the process join L1. The endpoint has authenticated the peer before."""
        if hello.version != m.PROTOCOL_VERSION:
            return self.refuse_version(hello, peer.host)
        if peer.process:
            return m.Error("refused", "a hello was sent on this connection before; open another connection")
        who = (printable(hello.instance, 200), hello.pid, printable(hello.role, 40), hello.rank, hello.session[:16])
        process = self._return(who) or self._enter(who)
        self._l1.join(process, who[0], peer.writer)
        peer.process, peer.payload, peer.since = process, hello.payload, self._now()
        peer.instance, peer.pid, peer.role, peer.rank, _ = who
        self.peers.add(peer)
        if peer.role == m.PEER and not peer.rank and peer.instance != m.server_name(self.server_id):
            logger.info("Another server may pull from this one: %s, from %s", peer.instance, peer.host)
        return self.welcome()

    def refuse_version(self, hello: m.Hello, host: str) -> m.Error:
        """Record a hello of another protocol version as refused, and return the answer."""
        text = m.version_error(hello.version, hello.software, m.PROTOCOL_VERSION, __version__)
        self.refused.note(who_says(hello, host), "version", text)
        return m.Error("version", text)

    def welcome(self) -> m.Welcome:
        return m.Welcome(
            m.PROTOCOL_VERSION,
            __version__,
            self.server_id,
            self._chunk_tokens,
            self.socket_path,
            self._l1.arena.id,
            self._l1.arena.size_bytes,
            self.cookie_path,
            self._l1.claim_seconds,
            self._l1.epoch,
            self._l1.arena.huge != "never",
            self.meets,
        )

    def gone(self, peer: Peer) -> None:
        """Note that the peer's process no longer touches extents. Its claims end when no copy runs for it any more."""
        peer.gone = True
        if peer.busy or peer not in self.peers:
            return
        self.peers.discard(peer)
        self._participants = {who: number for who, number in self._participants.items() if number != peer.process}
        self._l1.leave(peer.process)
        self._described.pop(peer.process, None)
        for listener in self.on_gone:
            listener(peer.process)
        peer.process = 0
        if peer.layout:
            logger.info("Engine process gone: %s", peer.who)

    @property
    def held_bytes_of_peers(self) -> int:
        """Bytes held for other servers that pull from this one."""
        return sum(one.held_bytes for one in self.peers if one.role == m.PEER)

    def hold(self, peer: Peer, size: int) -> None:
        """Add `size`, which may be negative, to the bytes held for the peer."""
        peer.held_bytes += size
        self.held_bytes += size

    def check_room(self, peer: Peer, size: int) -> None:
        """Raise Refusal if `size` more bytes would exceed `MAX_HELD_BYTES_OF_PEER`."""
        if peer.held_bytes + size > MAX_HELD_BYTES_OF_PEER:
            raise Refusal(
                f"{peer.held_bytes} bytes for this engine are being copied or are not read yet, and {size} more "
                f"would exceed {MAX_HELD_BYTES_OF_PEER}: read the answers before asking for more"
            )

    def describe(self, process: int) -> tuple[str, str]:
        """Return the engine and the model of a process; "" where they are not known."""
        known = self._described.get(process)
        if known is None:
            peer = next((one for one in self.peers if one.process == process), None)
            known = (peer.instance, str(peer.layout.get("model_id", ""))) if peer is not None else ("", "")
            if known[1]:
                self._described[process] = known
        return known

    def _enter(self, who: Who) -> int:
        process = self._participants[who] = self._next_process
        self._next_process += 1
        return process

    def _return(self, who: Who) -> int:
        """Return the number of a session that reconnects, or 0 if it has to start anew.

        A hello implies that the process runs no copies any more. So its reservations end, and its former connection is closed.
        """
        process = self._participants.get(who, 0)
        former = [peer for peer in self.peers if peer.process == process]
        if not process or any(peer.busy for peer in former):
            return 0  # the server still runs a payload copy for it
        for peer in former:
            peer.process = 0
            self.peers.discard(peer)
            if peer.replaced is not None:
                peer.replaced()
        self._l1.leave_reservations(process)
        return process
