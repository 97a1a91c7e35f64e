"""The tier of other servers: what they have in L1. It is read-only.

One thread owns all connections. A question goes to all peers at once, and the answers say which peers have which chunks. A load
is cut into pulls of some MiB, each from one of the peers that have the chunks; a pull that fails is tried at the next one.
Arrived shards are checked and copied into their buffers by other threads.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import zmq

from lmcache.config.options import integer, number, peers
from lmcache.errors import ConfigError, LMCacheError, ServerUnavailable
from lmcache.observability.log import init_logger
from lmcache.peers.dial import MAX_PEERS, Dialled, Itself, Myself, dial, resolve
from lmcache.peers.link import Frames, Question
from lmcache.peers.peer import Peer
from lmcache.runtime import Runtime
from lmcache.tiers import ABSENT, OK, AsyncTier, ShardKey, TierError, Usage
from lmcache.tiers.frame import CHECKSUM, OTHER_SIZE, Checksum, check_header
from lmcache.tiers.operation import Clear, Close, Contains, Load, Open, Operation, Remove
from lmcache.tiers.url import TierURL
from lmcache.wire import messages as m

logger = init_logger(__name__)
DEFAULT_PORT = 5555
PULL_BYTES = 4 << 20
"""Of one pull, unless a single shard is larger. While one is sent, the next one is sealed and the one before it is checked."""
PIECE_BYTES = 512 << 10
"""Shards are checked and copied in pieces, since a copy keeps the interpreter lock."""
GRACE_SECONDS = 0.05
"""After the first answer, a question waits for those of other peers for so long."""
RESOLVE_SECONDS = 10.0
"""Time between look-ups of the peers' names."""
MAX_KNOWN = 1 << 16
"""For how many chunks the tier remembers which peers have them, from a question to the load that follows."""
_TICK_SECONDS = 0.25
_COPIERS, _DIALLERS = 2, 4
Chunk = tuple[bytes, int, bytes]
"""Space, number of shards, chunk hash."""


@dataclass(eq=False)
class _Asking:
    """A question. has: for each chunk asked for, the peers that have it. waiting: how many messages are unanswered."""

    operation: Contains
    has: dict[Chunk, list[Peer]]
    waiting: int = 0
    answers: int = 0
    grace_ends: float | None = None
    reason: str = ""


@dataclass(eq=False)
class _Loading:
    """A load. left: how many shards have no outcome yet. copying: how many copies touch its buffers now."""

    operation: Load
    outcomes: list[str]
    sources: list[list[Peer]]
    """For each shard, the peers that may still be asked for it."""
    left: int
    copying: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class _Pulling:
    """One pull of the shards with these places in a load."""

    load: _Loading
    peer: Peer
    places: list[int]
    size: int
    key: ShardKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.load.operation.keys[self.places[0]]
        """Of its first shard. The others differ in the chunk only."""

    def may_take(self, key: ShardKey, size: int) -> bool:
        """Return whether one more shard fits into this pull."""
        alike = key._replace(chunk=self.key.chunk) == self.key
        return alike and self.size + size <= PULL_BYTES and len(self.places) < m.MAX_ASKED_CHUNKS

    @property
    def request(self) -> m.Pull:
        keys = self.load.operation.keys
        space, _, shard, shards = self.key
        return m.Pull(space, shards, shard, b"".join(keys[place].chunk for place in self.places))


class PeersTier(AsyncTier):
    """names: the peers, as host and port; a name with several addresses stands for as many peers. connections: to each peer, for
    payload. timeout_seconds: how long a peer that owes an answer may be silent."""

    scheme = "peer"
    read_only: ClassVar[bool] = True

    def __init__(
        self, names: Sequence[tuple[str, int]], runtime: Runtime, connections: int = 2, timeout_seconds: float = 2.0
    ) -> None:
        self._names, self._runtime, self._now = names, runtime, runtime.now
        self._connections, self._timeout_seconds = connections, timeout_seconds
        self._myself = Myself()
        self._peers: dict[str, Peer] = {}
        self._known: OrderedDict[Chunk, list[Peer]] = OrderedDict()
        self._asking: dict[Operation[Any], _Asking] = {}
        self._loading: dict[Operation[Any], _Loading] = {}
        self._calls: deque[Callable[[], None]] = deque()
        """What other threads want done."""
        self._wake = -1
        """Descriptor of a pipe that wakes the thread; -1: it does not run."""
        self._wrong_names: list[str] = []
        self._resolving, self._resolved_at = False, float("-inf")
        self._closing: Close | None = None
        self._troubles: list[str] = []
        self._diallers: Executor
        self._copiers: Executor

    @classmethod
    def from_url(cls, url: TierURL) -> PeersTier:
        if not url.host or url.path.strip("/"):
            raise ConfigError(f"{url.redacted}: write peer://host:{DEFAULT_PORT}")
        no_others: tuple[str, ...] = ()
        also = [one.rpartition(":") for one in url.take("also", peers, no_others)]
        names = [(url.host, url.port or DEFAULT_PORT), *((host.strip("[]"), int(port)) for host, _, port in also)]
        if len(names) > MAX_PEERS:
            raise ConfigError(f"{url.redacted}: {len(names)} peers; at most {MAX_PEERS} are possible")
        return cls(
            list(dict.fromkeys(names)),
            url.runtime,
            url.take("connections", integer(1, 16), 2),
            url.take("timeout", number(0.05, 60), 2.0),
        )

    def introduce(self, myself: Myself) -> None:
        """Say who connects to the peers. Call this before `open`."""
        self._myself = myself

    def usage(self) -> Usage:
        return Usage(0, 0, None)

    def trouble(self) -> str:
        return "; ".join(self._troubles)

    def submit(self, operation: Operation[Any]) -> None:
        if isinstance(operation, Open):
            self._open()
            operation.complete(None)
        elif isinstance(operation, Close) and self._wake < 0:
            operation.complete(None)
        elif self._wake < 0:
            operation.fail(TierError("closed", "the tier of peers is not open"))
        else:
            self._soon(partial(self._begin, operation))

    def cancel(self, operation: Operation[Any]) -> None:
        self._soon(partial(self._cancel, operation))

    # The thread

    def _open(self) -> None:
        if self._wake >= 0:
            return
        woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing, self._resolved_at, self._resolving = None, float("-inf"), False
        self._diallers = self._runtime.pool(_DIALLERS, "lmcache-peers-dial")
        self._copiers = self._runtime.pool(_COPIERS, "lmcache-peers-copy")
        self._runtime.start(partial(self._run, woken), "lmcache-peers")

    def _soon(self, call: Callable[[], None]) -> None:
        """Run `call` in the thread. Any thread may call this."""
        self._calls.append(call)
        try:
            os.write(self._wake, b"x")
        except OSError:
            pass  # the pipe is full, so the thread wakes anyway; or the tier has been closed

    def _run(self, woken: int) -> None:
        poller = zmq.Poller()
        poller.register(woken, zmq.POLLIN)
        watched = dict[Any, Peer]()
        next_tick = self._now()
        while self._closing is None:
            now = self._now()
            if now >= next_tick:
                next_tick = now + _TICK_SECONDS
                self._guarded(partial(self._tick, now))
            current = {socket: peer for peer in self._peers.values() for link in peer.links for socket in link.sockets}
            for socket in watched.keys() - current.keys():
                poller.unregister(socket)
            for socket in current.keys() - watched.keys():
                poller.register(socket, zmq.POLLIN)
            watched = current
            until = min([next_tick, *(one.grace_ends for one in self._asking.values() if one.grace_ends is not None)])
            ready = [one for one, _ in poller.poll(int(max(0.0, until - self._now()) * 1000))]
            if woken in ready:
                os.read(woken, 4096)
            while self._calls:
                self._guarded(self._calls.popleft())
            for peer in dict.fromkeys(watched[one] for one in ready if one in watched):
                self._guarded(partial(self._hear, peer))
            self._guarded(self._end_graces)
        self._end(woken)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # top of the thread: one failing call must not stop the others
            logger.exception("The tier of peers: a call failed; lookups may do without it")

    def _end(self, woken: int) -> None:
        for peer in self._peers.values():
            peer.close("the tier is closed", goodbye=True)
        self._peers.clear()
        self._known.clear()
        self._diallers.shutdown(wait=False, cancel_futures=True)
        self._copiers.shutdown(wait=False, cancel_futures=True)
        wake, self._wake = self._wake, -1
        os.close(wake)
        os.close(woken)
        if self._closing is not None:
            self._closing.complete(None)

    def _tick(self, now: float) -> None:
        if not self._resolving and now - self._resolved_at > RESOLVE_SECONDS:
            self._resolving = True
            self._diallers.submit(self._resolve)
        for peer in list(self._peers.values()):
            self._with(peer, lambda peer=peer: [link.tick(now) for link in peer.links])  # type: ignore[misc]
            if peer.asks is None and not peer.dialling and (peer.breaker.closed or peer.breaker.probe(now)):
                peer.dialling = True
                self._diallers.submit(self._dial, peer)
        self._troubles = [
            *self._wrong_names,
            *(f"{one.address}: {one.trouble}" for one in self._peers.values() if one.trouble),
        ]

    # Connecting

    def _resolve(self) -> None:
        found, wrong = resolve(self._names)
        self._soon(partial(self._resolved, found, wrong))

    def _resolved(self, found: list[str], wrong: list[str]) -> None:
        self._resolving, self._resolved_at = False, self._now()
        self._wrong_names = wrong
        for address in found:
            if address not in self._peers:
                self._peers[address] = Peer(address)
        for address in [one for one in self._peers if one not in found and not wrong]:
            logger.info("Peer %s: its name has this address no longer", address)
            self._peers.pop(address).close("its name has another address now", goodbye=True)
        self._tick(self._now())

    def _dial(self, peer: Peer) -> None:
        made: Dialled | Exception
        try:
            made = dial(peer.address, self._connections, self._myself)
        except Exception as error:  # top of the thread
            if not isinstance(error, (LMCacheError, OSError)):
                logger.exception("Peer %s: connecting to it failed", peer.address)
            made = error
        self._soon(partial(self._dialled, peer, made))

    def _dialled(self, peer: Peer, made: Dialled | Exception) -> None:
        peer.dialling = False
        now = self._now()
        if isinstance(made, Itself):
            peer.is_itself = True
            peer.breaker.failed(now, str(made), at_once=True)
        elif isinstance(made, Exception):
            peer.failed(now, str(made))
        elif self._peers.get(peer.address) is not peer or self._closing is not None:
            made.close()
        elif any(one.server == made.server and one.asks is not None for one in self._peers.values()):
            made.close()
            peer.is_itself = False
            peer.breaker.failed(now, "another address of a server that is connected already", at_once=True)
        else:
            peer.is_itself = False
            peer.connected(made, self._timeout_seconds, now)

    def _with(self, peer: Peer, call: Callable[[], object]) -> None:
        """Do something with the links of a peer, which fails if one of them is lost."""
        try:
            call()
        except ServerUnavailable as error:
            peer.failed(self._now(), str(error))

    def _hear(self, peer: Peer) -> None:
        def hear() -> None:
            now = self._now()
            for link in peer.links:
                link.hear(now)
            peer.pump(now)

        self._with(peer, hear)

    # Operations

    def _begin(self, operation: Operation[Any]) -> None:
        if isinstance(operation, Contains):
            self._ask(operation)
        elif isinstance(operation, Load):
            self._load(operation)
        elif isinstance(operation, Close):
            self._closing = operation
        elif isinstance(operation, (Remove, Clear)):
            operation.complete(None)  # what other servers have is theirs
        else:
            operation.fail(TierError("read-only", "nothing is stored in the L1 of other servers"))

    def _cancel(self, operation: Operation[Any]) -> None:
        if self._asking.pop(operation, None) is not None:
            operation.cancelled()
        load = self._loading.get(operation)
        if load is not None:
            load.cancelled = True
            self._end_cancelled(load)

    def _end_cancelled(self, load: _Loading) -> None:
        if load.cancelled and not load.copying and self._loading.pop(load.operation, None) is not None:
            load.operation.cancelled()

    # Asking

    def _ask(self, operation: Contains) -> None:
        now = self._now()
        chunks = [(key.space, key.shards, key.chunk) for key in operation.keys]
        asking = _Asking(operation, {chunk: [] for chunk in chunks})
        pages = _pages(asking.has)
        self._asking[operation] = asking
        for peer in list(self._peers.values()):
            link = peer.asks
            if link is None or link.is_slow(now):
                continue
            for page in pages:
                space, shards, _ = page[0]
                request = m.Has(space, shards, b"".join(chunk for _, _, chunk in page))
                question = Question(
                    request, partial(self._told, asking, peer, page), partial(self._not_told, asking, peer)
                )
                asking.waiting += 1
                try:
                    link.ask(now, question)
                except ServerUnavailable as error:
                    self._not_told(asking, peer, str(error))
                    peer.failed(now, str(error))
                    break
        self._look(asking)

    def _told(self, asking: _Asking, peer: Peer, page: list[Chunk], answer: m.Answer, frames: Frames) -> None:
        if not isinstance(answer, m.Having) or len(answer.present) != len(page):
            self._not_told(asking, peer, _refusal(answer))
            return
        asking.answers += 1
        asking.waiting -= 1
        for chunk, present in zip(page, answer.present, strict=True):
            if present:
                asking.has[chunk].append(peer)
        if asking.grace_ends is None:
            asking.grace_ends = self._now() + GRACE_SECONDS
        self._look(asking)

    def _not_told(self, asking: _Asking, peer: Peer, reason: str) -> None:
        asking.waiting -= 1
        asking.reason = f"{peer.address}: {reason}"
        self._look(asking)

    def _end_graces(self) -> None:
        now = self._now()
        for asking in [one for one in self._asking.values() if one.grace_ends is not None and now >= one.grace_ends]:
            self._told_enough(asking)

    def _look(self, asking: _Asking) -> None:
        if not asking.waiting and asking.operation in self._asking:
            self._told_enough(asking)

    def _told_enough(self, asking: _Asking) -> None:
        operation = asking.operation
        del self._asking[operation]
        if asking.reason and not asking.answers:
            operation.fail(TierError("unreachable", asking.reason))
            return
        for chunk, having in asking.has.items():
            if having:
                self._known[chunk] = having
                self._known.move_to_end(chunk)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        has = asking.has
        operation.complete([bool(has[key.space, key.shards, key.chunk]) for key in operation.keys])

    # Loading

    def _load(self, operation: Load) -> None:
        count = len(operation.keys)
        known = [self._known.get((key.space, key.shards, key.chunk), ()) for key in operation.keys]
        load = _Loading(operation, [ABSENT] * count, [list(having) for having in known], count)
        self._loading[operation] = load
        self._pull(load, range(count))

    def _pull(self, load: _Loading, places: Sequence[int]) -> None:
        """Ask for these shards, each at a peer that has it and was not asked before."""
        pulls: list[_Pulling] = []
        keys, into = load.operation.keys, load.operation.into
        for place in places:
            sources, key, size = load.sources[place], keys[place], len(into[place])
            last = pulls[-1] if pulls else None
            if last is not None and last.peer in sources and last.may_take(key, size):
                last.places.append(place)
                last.size += size
                last.peer.queued_bytes += size
                sources.remove(last.peer)
                continue
            sources[:] = [peer for peer in sources if peer.asks is not None]
            if not sources:
                load.left -= 1
                continue
            peer = min(sources, key=lambda one: one.queued_bytes)
            sources.remove(peer)
            peer.queued_bytes += size
            pulls.append(_Pulling(load, peer, [place], size))
        for pull in pulls:
            question = Question(pull.request, partial(self._arrived, pull), partial(self._lost, pull))
            try:
                pull.peer.pull(self._now(), question)
            except ServerUnavailable as error:
                if pull.peer.asks is None:
                    self._lost(pull, str(error))
                else:
                    pull.peer.failed(self._now(), str(error))
        self._end_load(load)

    def _lost(self, pull: _Pulling, reason: str) -> None:
        self._tried(pull, ["lost"] * len(pull.places))

    def _arrived(self, pull: _Pulling, answer: m.Answer, frames: Frames) -> None:
        load = pull.load
        if not isinstance(answer, m.Pulled) or len(answer.headers) != len(pull.places):
            self._tried(pull, [_refused(answer)] * len(pull.places))
        elif load.cancelled:
            pull.peer.queued_bytes -= pull.size
        elif not frames:
            self._tried(pull, [ABSENT] * len(pull.places))
        else:
            load.copying += 1
            self._copiers.submit(self._copy, pull, answer.headers, frames)

    def _copy(self, pull: _Pulling, headers: list[bytes], frames: Frames) -> None:
        """Check and copy what has arrived, in a thread of its own."""
        outcomes: list[str] = []
        operation, at = pull.load.operation, 0
        try:
            for header, place in zip(headers, pull.places, strict=True):
                if not header:
                    outcomes.append(ABSENT)
                elif at == len(frames):
                    outcomes.append(OTHER_SIZE)
                else:
                    outcomes.append(take(header, frames[at].buffer, operation.keys[place], operation.into[place]))
                    at += 1
        except Exception:  # top of the thread: the load must end
            logger.exception("A shard of a peer could not be copied")
            outcomes = [CHECKSUM] * len(pull.places)

        def done() -> None:
            pull.load.copying -= 1
            self._tried(pull, outcomes)

        self._soon(done)

    def _tried(self, pull: _Pulling, outcomes: list[str]) -> None:
        """Note how the shards of a pull have arrived, and try those that have not at another peer."""
        load, again = pull.load, list[int]()
        pull.peer.queued_bytes -= pull.size
        for place, outcome in zip(pull.places, outcomes, strict=True):
            load.outcomes[place] = outcome
            if outcome != OK:
                chunk = (pull.key.space, pull.key.shards, load.operation.keys[place].chunk)
                having = self._known.get(chunk, [])
                if pull.peer in having:
                    having.remove(pull.peer)
                if load.sources[place]:
                    again.append(place)
        load.left -= len(outcomes) - len(again)
        if again and not load.cancelled:
            self._pull(load, again)
        self._end_cancelled(load)
        self._end_load(load)

    def _end_load(self, load: _Loading) -> None:
        if not load.left and not load.copying and self._loading.pop(load.operation, None) is not None:
            load.operation.complete(load.outcomes)


def take(header: bytes, payload: memoryview, key: ShardKey, into: memoryview) -> str:
    """Copy a shard that a peer has sent into a buffer of its size, and check it. Returns OK or the name of the damage."""
    if payload.nbytes != into.nbytes:
        return OTHER_SIZE
    wrong = check_header(header, key, into.nbytes)
    if wrong:
        return wrong
    checksum = Checksum()
    for start in range(0, into.nbytes, PIECE_BYTES):
        piece = payload[start : start + PIECE_BYTES]
        checksum.update(piece)
        into[start : start + PIECE_BYTES] = piece
    return checksum.check(header, key)


def _pages(chunks: Sequence[Chunk] | dict[Chunk, list[Peer]]) -> list[list[Chunk]]:
    """Cut chunks into pages of one message each."""
    pages: list[list[Chunk]] = []
    for chunk in chunks:
        if not pages or pages[-1][0][:2] != chunk[:2] or len(pages[-1]) == m.MAX_ASKED_CHUNKS:
            pages.append([])
        pages[-1].append(chunk)
    return pages


def _refusal(answer: m.Answer) -> str:
    return answer.text if isinstance(answer, m.Error) else f"unexpected answer {type(answer).__name__}"


def _refused(answer: m.Answer) -> str:
    return "refused" if isinstance(answer, m.Error) else "wrong answer"
