"""What the server answers: requests in, answers out. Faces bring the requests; the heart decides; this file joins them.

Everything here runs in the loop's thread, but for the copies of payload frames, which I/O threads do.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache import __version__
from lmcache.cache import Cleared, Committed, Completed, Freed, Heart, Refusal, TooSmall
from lmcache.cache.heart import Effect
from lmcache.chunks import space_fingerprint
from lmcache.errors import LMCacheError
from lmcache.memory.arena import Arena, ArenaFull
from lmcache.observability.log import init_logger, printable
from lmcache.server.loop import Loop
from lmcache.server.refused import Refused
from lmcache.wire import messages as m

if TYPE_CHECKING:
    from lmcache.server.tiering import Tiering

logger = init_logger(__name__)
MAX_GIVEN_UP = 16
"""Reservations that are given up for want of memory before a request is refused."""
MAX_HELD_BYTES = 1 << 30
"""Of all payload copies under way and all large answers that are not sent yet."""
MAX_HELD_BYTES_OF_PEER = 2 * m.MAX_PAYLOAD_BYTES
"""Of those of one engine process: it may ask anew while its last answer is just leaving."""
MAX_DROP_REASONS = 32
MAX_COPY_SECONDS = 86_400.0
Reply = Callable[[m.Message, list[bytes]], None]


@dataclass(slots=True, eq=False)
class Peer:
    """One connected engine process, as its face knows it. `process` is its number in the heart, 0 before its hello."""

    endpoint: str
    host: str = "this host"
    process: int = 0
    instance: str = ""
    role: str = ""
    rank: int = 0
    pid: int = 0
    payload: bool = False
    busy: int = 0
    """Payload copies under way on this peer's behalf."""
    held_bytes: int = 0
    """Payload that is being copied on this peer's behalf, and large answers that ZMQ has not sent yet."""
    gone: bool = False
    replaced: Callable[[], None] | None = None
    """Called once when the same session has said hello on another connection."""
    since: float = field(default_factory=time.time)
    layout: dict[str, object] = field(default_factory=dict)
    """Empty until its KV is registered."""

    @property
    def who(self) -> str:
        return _who(self.role, self.rank, self.pid)


def who_says(hello: m.Hello | m.Declined, host: str) -> str:
    """For people: who has said this, from which host."""
    return f"{_who(printable(hello.role, 40), hello.rank, hello.pid)}, from {host}"


def _who(role: str, rank: int, pid: int) -> str:
    return f"{role} rank {rank}, pid {pid}"


class Service:
    """Answers every request with exactly one answer; an error of ours becomes an `Error` answer, never silence."""

    def __init__(self, loop: Loop, heart: Heart, arena: Arena, chunk_tokens: int, workers: Executor) -> None:
        self.loop, self.heart, self.arena, self.chunk_tokens = loop, heart, arena, chunk_tokens
        self.server_id = secrets.token_bytes(16)
        self.socket_path = ""
        self.cookie_path = ""
        self.peers: set[Peer] = set()
        self.counters: Counter[str] = Counter()
        self.started = time.time()
        self.refused = Refused()
        self.tiering: Tiering | None = None
        self._workers = workers
        self.held_bytes = 0
        """Of all peers, and of those that have gone and still have unsent answers."""
        self._filling: set[int] = set()
        """Reservations that an I/O thread is writing to."""
        self._participants: dict[tuple[str, int, str, int, bytes], int] = {}
        self._drop_reasons: set[str] = set()
        self._next_process = 1
        self._answers: dict[type, Callable[[Peer, m.Request], m.Message]] = {
            m.Ping: lambda peer, request: m.Ok(),
            m.Register: self._register,
            m.Lookup: self._lookup,
            m.Release: self._release,
            m.Hold: self._hold,
            m.Renew: self._renew,
            m.Reserve: self._reserve,
            m.Commit: self._commit,
            m.Copied: self._copied,
            m.Clear: lambda peer, request: m.Ok(self.clear()),
            m.Dropped: self._dropped,
            m.Bye: self._bye,
        }
        loop.on_tick += [self._tick, self.settle]

    # Requests

    def handle(self, peer: Peer, request: m.Request, frames: list[bytes], reply: Reply) -> None:
        """Answer through `reply`, at once or, for payload frames, when the copy has ended."""
        try:
            if isinstance(request, m.Hello):
                reply(self.hello(peer, request), [])
            elif not peer.process:
                reply(m.Error("hello", "say hello first"), [])
            elif isinstance(request, m.Fetch):
                self._fetch(peer, request, reply)
            elif isinstance(request, m.Fill):
                self._fill(peer, request, frames, reply)
            elif type(request) not in self._answers:
                reply(m.Error("refused", f"{type(request).__name__} is not for this connection"), [])
            else:
                answer = self._answers[type(request)](peer, request)
                self.settle()  # before anybody hears of extents that have changed hands
                reply(answer, [])
        except Refusal as error:
            self.counters["refused_requests"] += 1
            reply(m.Error("refused", str(error)), [])
        except LMCacheError as error:
            self.counters["failed_requests"] += 1
            reply(m.Error("failed", str(error)), [])
        except Exception as error:  # a bug of ours must not leave the engine waiting for its deadline
            self.counters["internal_errors"] += 1
            logger.exception("A %s request failed", type(request).__name__)
            reply(m.Error("internal", f"{type(error).__name__} in the server: see its log"), [])

    def hello(self, peer: Peer, hello: m.Hello) -> m.Message:
        """The faces have checked who it is; here only the version counts, and the process joins the heart."""
        if hello.version != m.PROTOCOL_VERSION:
            return self.refuse_version(hello, peer.host)
        if peer.process:
            return m.Error("refused", "hello was said on this connection before; open another one")
        who = (printable(hello.instance, 200), hello.pid, printable(hello.role, 40), hello.rank, hello.session[:16])
        process = self._return(who) or self._enter(who)
        peer.process, peer.payload = process, hello.payload
        peer.instance, peer.pid, peer.role, peer.rank, _ = who
        self.peers.add(peer)
        return self.welcome()

    def refuse_version(self, hello: m.Hello, host: str) -> m.Error:
        """The answer to a hello of another protocol version, which is noted."""
        text = m.version_error(hello.version, hello.software, m.PROTOCOL_VERSION, __version__)
        self.refused.note(who_says(hello, host), "version", text)
        return m.Error("version", text)

    def _enter(self, who: tuple[str, int, str, int, bytes]) -> int:
        process = self._participants[who] = self._next_process
        self._next_process += 1
        self.heart.join(process, who[0])
        return process

    def _return(self, who: tuple[str, int, str, int, bytes]) -> int:
        """The number of a session that has lost its connection and come back; 0 where it has to start anew.

        By its hello it says that no copy of it runs any more, so what it was filling is free again; and nothing that still
        arrives on its former connection counts.
        """
        process = self._participants.get(who, 0)
        former = [peer for peer in self.peers if peer.process == process]
        if not process or any(peer.busy for peer in former):
            return 0  # a payload copy of ours still runs on its behalf
        for peer in former:
            peer.process = 0
            self.peers.discard(peer)
            if peer.replaced is not None:
                peer.replaced()
        self.heart.leave_reservations(process)
        return process

    def hold(self, peer: Peer, size: int) -> None:
        """`size` more bytes of memory are held on the peer's behalf; fewer where it is negative."""
        peer.held_bytes += size
        self.held_bytes += size

    def welcome(self) -> m.Welcome:
        return m.Welcome(
            m.PROTOCOL_VERSION,
            __version__,
            self.server_id,
            self.chunk_tokens,
            self.socket_path,
            self.arena.id,
            self.arena.size_bytes,
            self.cookie_path,
            self.heart.claim_seconds,
        )

    def gone(self, peer: Peer) -> None:
        """The peer's process touches no extent any more. Its claims end, once no copy runs on its behalf."""
        peer.gone = True
        if peer.busy or peer not in self.peers:
            return
        self.peers.discard(peer)
        self._participants = {who: number for who, number in self._participants.items() if number != peer.process}
        self.heart.leave(peer.process)
        peer.process = 0
        if peer.layout:
            logger.info("Engine process gone: %s", peer.who)

    def clear(self) -> int:
        count = self.heart.clear()
        self.settle()
        logger.info("L1 cleared: %d chunks", count)
        return count

    def _register(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Register)
        layout = request.layout
        if layout.chunk_tokens != self.chunk_tokens:
            raise Refusal(f"the layout has {layout.chunk_tokens}-token chunks, this server {self.chunk_tokens}")
        name = space_fingerprint(layout, request.stages)
        try:
            space = self.heart.open_space(peer.process, name, request.shards, request.shard, request.shard_bytes)
        except TooSmall as error:
            self.refused.note(f"{peer.who}, from {peer.host}", "small L1", str(error))
            raise
        if not peer.layout:
            logger.info("Engine process connected: %s, over %s", peer.who, peer.endpoint)
        peer.layout = {
            "model_id": layout.model_id,
            "kv_dtype": layout.kv_dtype,
            "num_layers": layout.num_layers,
            "num_kv_heads": layout.num_kv_heads,
            "head_size": layout.head_size,
            "kind": layout.kind,
            "fingerprint": layout.fingerprint.hex(),
            "shard": f"{request.shard + 1} of {request.shards}" if request.shard >= 0 else f"all {request.shards}",
            "slot_bytes": request.shard_bytes,
        }
        if request.shard >= 0:
            logger.info("Registered KV cache for GPU ID %d with %d layers (%s)", peer.pid, layout.num_layers, peer.who)
        return m.Registered(space)

    def _lookup(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Lookup)
        hashes = request.hashes
        if len(hashes) % 16:
            raise Refusal(f"{len(hashes)} bytes are not whole 16-byte hashes")
        first = max(0, request.first_wanted)
        asked, shards = len(hashes) // 16, self.heart.shards(peer.process, request.space)
        most = m.most_looked_up(first, shards)
        if asked > most:
            raise Refusal(
                f"a lookup of {asked} chunks from chunk {first} on is more than one answer holds; ask for {most}"
            )
        self._check_room(peer, 4 * shards * max(0, asked - first))
        lookup = time.monotonic(), peer.process, request.space, hashes, first
        if self.tiering is not None:
            if not self.tiering.knows(request.space, hashes):
                found = self.heart.lookup_all(*lookup)
                if found is not None:
                    return m.Found(*found)
            name = printable(request.request, 200)
            in_l1, coming = self.tiering.wait_for(peer.process, request.space, hashes, request.prefill_rate, name)
            if coming:
                return m.Found(in_l1, 0, b"", coming)
        return m.Found(*self.heart.lookup(*lookup))

    def _release(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Release)
        for lease in request.leases:
            self.heart.release(peer.process, lease)
        return m.Ok(len(request.leases))

    def _hold(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Hold)
        return m.Ok(self.heart.keep_leases(peer.process, request.leases))

    def _renew(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Renew)
        count = self.heart.renew(time.monotonic(), peer.process, request.leases)
        self.counters["renewed_leases"] += count
        return m.Ok(count)

    def _reserve(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Reserve)
        if len(request.hashes) % 16 or (not request.root and len(request.parent) != 16):
            raise Refusal("hashes must be whole 16-byte hashes")
        now, parent = time.monotonic(), request.parent
        for _ in range(MAX_GIVEN_UP):
            grant = self.heart.reserve(
                now, peer.process, request.space, request.shard, parent, request.root, request.hashes
            )
            if not grant.reservation or self.back(peer.process, grant.reservation):
                return m.Reserved(grant.reservation, grant.extents, grant.refused, grant.reason)
        raise Refusal(f"{self.arena.path.parent} has no room for the arena: free some, or pass a smaller --l1-size-gb")

    def back(self, process: int, reservation: int) -> bool:
        """Whether there is memory behind the extents. If not they are given up, and the next ones may be those of older chunks."""
        if self.arena.backed_bytes == self.arena.size_bytes:
            return True
        sectors, size = self.heart.reserved_sectors(process, reservation), self.heart.shard_bytes(reservation)
        try:
            self.arena.back((sector * m.SECTOR_BYTES for sector in sectors), size)
        except ArenaFull as error:
            if not self.counters["given_up_slots"]:
                logger.warning("L1 stays smaller than it was to be, until it is cleared: %s", error)
            lost = {sector for sector in sectors if not self.arena.has_sectors(sector * m.SECTOR_BYTES, size)}
            self.counters["given_up_slots"] += len(lost)
            self.heart.give_up(process, reservation, lost)
            return False
        return True

    def _commit(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Commit)
        if request.reservation in self._filling:
            raise Refusal(f"reservation {request.reservation} is still being filled")
        return m.Ok(self.heart.commit(time.monotonic(), peer.process, request.reservation, request.ok))

    def _copied(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Copied)
        if not request.ok:
            self.counters[f"failed_{request.kind}s"] += 1
            logger.warning("Rank %d could not %s %d tokens", peer.rank, request.kind, request.tokens)
            return m.Ok()
        if request.tokens < 0 or not 0 <= request.seconds < MAX_COPY_SECONDS:
            raise Refusal(f"{request.tokens} tokens in {request.seconds} seconds make no sense")
        past = "retrieved" if request.kind == "load" else "stored"
        self.counters[f"{past}_tokens"] += request.tokens
        self.counters[f"{past}_microseconds"] += int(request.seconds * 1e6)
        logger.info("%s %d tokens in %.3f seconds", past.capitalize(), request.tokens, request.seconds)
        return m.Ok()

    def _dropped(self, peer: Peer, request: m.Request) -> m.Message:
        assert isinstance(request, m.Dropped)
        reason = "".join(char if char.isalnum() else " " for char in request.reason[:40])
        if reason not in self._drop_reasons and len(self._drop_reasons) >= MAX_DROP_REASONS:
            reason = "other"
        self._drop_reasons.add(reason)
        self.counters[f"engine_dropped:{reason}"] += max(0, request.chunks)
        return m.Ok()

    def _bye(self, peer: Peer, request: m.Request) -> m.Message:
        self.gone(peer)
        return m.Ok()

    # Payload frames

    def _fetch(self, peer: Peer, request: m.Fetch, reply: Reply) -> None:
        sectors = self.heart.leased_sectors(peer.process, request.lease, request.shard, request.first, request.count)
        size = self.heart.shard_bytes(lease=request.lease, shard=request.shard)
        view = self.arena.mapping.view

        def copy() -> list[bytes]:
            return [bytes(view(sector * m.SECTOR_BYTES, size)) for sector in sectors]

        self._in_worker(peer, size * len(sectors), copy, reply)

    def _fill(self, peer: Peer, request: m.Fill, frames: list[bytes], reply: Reply) -> None:
        number = request.reservation
        sectors = self.heart.reserved_sectors(peer.process, number)[max(0, request.first) :][: len(frames)]
        if request.first < 0 or len(sectors) != len(frames):
            raise Refusal(f"{len(frames)} frames from extent {request.first} on pass the end of reservation {number}")
        size = self.heart.shard_bytes(reservation=number)
        if any(len(one) != size for one in frames):
            raise Refusal(f"payload frames must have the extent's {size} bytes")
        view = self.arena.mapping.view

        def copy() -> list[bytes]:
            for sector, one in zip(sectors, frames, strict=True):
                view(sector * m.SECTOR_BYTES, size)[:] = one
            return []

        def answer(message: m.Message, nothing: list[bytes]) -> None:
            self._filling.discard(number)
            reply(message, nothing)

        if number in self._filling:
            raise Refusal(f"reservation {number} is being filled by an earlier message")
        self._in_worker(peer, size * len(sectors), copy, answer)
        self._filling.add(number)

    def _in_worker(self, peer: Peer, size: int, copy: Callable[[], list[bytes]], reply: Reply) -> None:
        """Run `copy` in an I/O thread and answer with the frames it returns. Raises Refusal when too much is under way."""
        if size > m.MAX_PAYLOAD_BYTES:
            raise Refusal(f"{size} payload bytes in one message; at most {m.MAX_PAYLOAD_BYTES} are allowed")
        self._check_room(peer, size)
        if self.held_bytes + size > MAX_HELD_BYTES:
            raise Refusal(f"{self.held_bytes} payload bytes are being copied or sent already; try again")

        def finish(answer: m.Message, frames: list[bytes]) -> None:
            peer.busy -= 1
            self.hold(peer, -size)
            try:
                reply(answer, frames)
            finally:
                if peer.gone:
                    self.gone(peer)

        def run() -> None:
            try:
                frames = copy()
                answer: m.Message = m.Ok(len(frames))
            except Exception as error:  # the edge of the thread: whoever asked must hear of it
                logger.exception("A payload copy failed")
                frames, answer = [], m.Error("internal", f"{type(error).__name__} in the server: see its log")
            self.loop.call_soon(lambda: finish(answer, frames))

        self._workers.submit(run)
        peer.busy += 1
        self.hold(peer, size)

    def _check_room(self, peer: Peer, size: int) -> None:
        """Raises Refusal: with so many bytes more, too many would be held for this peer."""
        if peer.held_bytes + size > MAX_HELD_BYTES_OF_PEER:
            raise Refusal(
                f"{peer.held_bytes} bytes of this engine's are being copied or wait until it reads them, and {size} more "
                f"would pass {MAX_HELD_BYTES_OF_PEER}: read the answers before asking for more"
            )

    # Upkeep

    def settle(self) -> None:
        """Carry out what the heart wants done: to the extents' headers, and with chunks that have become whole.

        An effect that fails is counted, and fails neither the request at hand nor those to come.
        """
        effects, self.heart.effects = self.heart.effects, []
        for effect in effects:
            try:
                self._carry_out(effect)
            except Exception:  # a fault of ours
                kind = type(effect).__name__
                if not self.counters[f"failed_effects_{kind}"]:
                    logger.exception("%s of chunks could not be noted; counted from now on, L1 serves on", kind)
                self.counters[f"failed_effects_{kind}"] += 1
                self.counters["failed_effects"] += 1
                if not isinstance(effect, Completed):
                    self.arena.headers.void()

    def _carry_out(self, effect: Effect) -> None:
        headers = self.arena.headers
        if isinstance(effect, Committed):
            headers.committed(*effect)
        elif isinstance(effect, Freed):
            headers.freed(effect.sectors)
        elif isinstance(effect, Cleared):
            if self.tiering is not None:
                self.tiering.l1_cleared()
            headers.cleared()
        elif self.tiering is not None:
            self.tiering.whole(effect)

    def _tick(self) -> None:
        events, self.heart.events = self.heart.events, []  # first: what fails below must not let them pile up
        if logger.isEnabledFor(logging.DEBUG):
            for event in events:
                logger.debug("%s %d chunks of space %d %s", event.kind, event.chunks, event.space, event.reason)
        self.heart.tick(time.monotonic())
