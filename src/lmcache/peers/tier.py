"""The tier of other servers: what they have in L1. It is read-only.

One thread owns all connections. A question goes to all peers at once, and the answers say which peers have which chunks. A load
is cut into pulls of some MiB, each from one of the peers that have the chunks; a pull that fails is tried at the next one.
Arrived shards are checked and copied into their buffers by other threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import zmq

from lmcache.chunks import HASH_BYTES
from lmcache.config.options import integer, number, peers, word
from lmcache.errors import ConfigError, ServerUnavailable
from lmcache.observability.log import init_logger
from lmcache.peers.dial import MAX_CONNECTIONS, MAX_PEERS, Myself, Name
from lmcache.peers.direct import Direct
from lmcache.peers.directory import Directory
from lmcache.peers.findings import MAX_KNOWN, Finding, Findings
from lmcache.peers.link import Frames, Question
from lmcache.peers.peer import Peer
from lmcache.peers.pulls import Loading, Pulling
from lmcache.peers.roster import Roster
from lmcache.runtime import Runtime
from lmcache.tiers import ABSENT, OK, AsyncTier, Region, ShardKey, TierError, Usage
from lmcache.tiers.operation import Clear, Close, Contains, Load, Open, Operation, Remove
from lmcache.tiers.redis.address import nodes_of, prefix_of
from lmcache.tiers.redis.leases import Leases
from lmcache.tiers.url import TierURL, parse_url
from lmcache.wire import messages as m

logger = init_logger(__name__)
DEFAULT_PORT = 5555
GRACE_SECONDS = 0.05
"""After the first answer, a question waits for those of other peers for so long."""
_TICK_SECONDS = 0.25
_COPIERS, _DIALLERS = 2, 4
_DECRYPTING_THREADS = 2
"""ZMQ's threads where connections are encrypted. Each connection belongs to one of them."""


@dataclass(eq=False)
class _Asking:
    """A question. waiting: how many messages are unanswered. reason: why the last one of those that failed did."""

    operation: Contains
    finding: Finding
    waiting: int
    answers: int = 0
    grace_ends: float | None = None
    reason: str = ""


class PeersTier(AsyncTier):
    """names: the peers; a name with several addresses stands for as many. connections: to each peer, for payload.
    timeout_seconds: how long a peer that owes an answer may be silent."""

    scheme = "peer"
    read_only = True

    def __init__(
        self, names: Sequence[Name], runtime: Runtime, connections: int = 2, timeout_seconds: float = 2.0
    ) -> None:
        self._names, self._runtime, self._now = names, runtime, runtime.now
        self._directory: Directory | None = None
        self._connections, self._timeout_seconds = connections, timeout_seconds
        self._myself = Myself()
        self._findings = Findings()
        self._coming: dict[bytes, None] = {}
        """Chunks that an engine was storing when a peer told of them. Loads of them wait for that engine. Any thread may read."""
        self._asking: dict[Operation[Any], _Asking] = {}
        self._loading: dict[Operation[Any], Loading] = {}
        self._calls: deque[Callable[[], None]] = deque()
        """What other threads want done."""
        self._wake = -1
        """Descriptor of a pipe that wakes the thread; -1: it does not run."""
        self._lock = threading.Lock()
        """Guards writing to `_wake` and closing it."""
        self._closing: Close | None = None
        self._trouble = ""
        self._region: Region | None = None
        self._direct: Direct | None = None
        """Pulls of the mover; None: there is no mover."""
        self._roster: Roster
        self._diallers: Executor
        self._copiers: Executor

    @classmethod
    def from_url(cls, url: TierURL) -> PeersTier:
        directory = url.take("directory", unquote, "")
        if not (url.host or directory) or url.path.strip("/"):
            raise ConfigError(f"{url.redacted}: write peer://host:{DEFAULT_PORT}")
        no_others: tuple[str, ...] = ()
        also = [one.rpartition(":") for one in url.take("also", peers, no_others)]
        first = [(url.host, url.port or DEFAULT_PORT)] if url.host else []
        names = [*first, *((host.strip("[]"), int(port)) for host, _, port in also)]
        if len(names) > MAX_PEERS:
            raise ConfigError(f"{url.redacted}: {len(names)} peers; at most {MAX_PEERS} are possible")
        tier = cls(
            list(dict.fromkeys(names)),
            url.runtime,
            url.take("connections", integer(1, MAX_CONNECTIONS), 2),
            url.take("timeout", number(1, 60), 2.0),
        )
        if directory:
            tier._directory = _directory_of(directory, url)
        tier.fleeting = url.take("keep", word("yes", "no"), "yes") == "no"
        return tier

    def introduce(self, myself: Myself) -> None:
        """Say who connects to the peers. Call this before `open`.

        Raises:
            ConfigError: a directory of servers cannot be used like this.
        """
        self._myself = myself
        if self._directory is not None:
            self._directory.introduce(myself)

    def attach(self, region: Region) -> None:
        self._region = region

    def usage(self) -> Usage:
        return Usage(0, 0, None)

    def is_paced(self, keys: Sequence[ShardKey]) -> bool:
        return not self._coming or not any(key.chunk in self._coming for key in keys)

    def degraded(self) -> str:
        return self._trouble

    def submit(self, operation: Operation[Any]) -> None:
        if isinstance(operation, Open):
            self._open()
            operation.complete(None)
        elif not self._soon(partial(self._begin, operation)):
            if isinstance(operation, Close):
                operation.complete(None)
            else:
                operation.fail(TierError("closed", "the tier of peers is not open"))

    def cancel(self, operation: Operation[Any]) -> None:
        self._soon(partial(self._cancel, operation))

    # The thread

    def _open(self) -> None:
        if self._wake >= 0:
            return
        self._closing = None
        if self._myself.key_file is not None:
            zmq.Context.instance(_DECRYPTING_THREADS)  # of the process, which has made no connection before
        self._diallers = self._runtime.pool(_DIALLERS, "lmcache-peers-dial")
        self._copiers = self._runtime.pool(_COPIERS, "lmcache-peers-copy")
        settings = self._names, self._myself, self._connections, self._timeout_seconds
        self._roster = Roster(
            *settings, now=self._now, soon=self._soon_heard, diallers=self._diallers, directory=self._directory
        )
        if self._myself.devices and self._region is not None:
            about = self._region, self._myself, self._timeout_seconds, self._runtime
            self._direct = Direct(*about, soon=self._soon, watch=self._roster.watch)
        woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._runtime.start(partial(self._run, woken), "lmcache-peers")

    def _soon(self, call: Callable[[], None]) -> bool:
        """Run `call` in the thread, or return False if it does not run. Any thread may call this."""
        with self._lock:
            if self._wake < 0:
                return False
            self._calls.append(call)
            try:
                os.write(self._wake, b"x")
            except BlockingIOError:
                pass  # the pipe is full, so the thread wakes anyway
            return True

    def _soon_heard(self, call: Callable[[], None]) -> bool:
        """Run what another thread has found out about the peers. /status says it from then on, not from the next tick."""
        return self._soon(partial(self._heard, call))

    def _heard(self, call: Callable[[], None]) -> None:
        call()
        self._trouble = "; ".join(self._roster.troubles())

    def _run(self, woken: int) -> None:
        poller, watched, next_tick = zmq.Poller(), dict[Any, Peer](), self._now()
        poller.register(woken, zmq.POLLIN)
        while self._closing is None or any(load.copying for load in self._loading.values()):
            if self._now() >= next_tick:
                next_tick = self._now() + _TICK_SECONDS
                self._guarded(self._tick)
            watched = self._watch(poller, watched)
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

    def _watch(self, poller: zmq.Poller, watched: dict[Any, Peer]) -> dict[Any, Peer]:
        """Make the poller watch the links that there are now. Returns the peer of each socket."""
        current = {socket: peer for peer in self._roster.peers for link in peer.links for socket in link.sockets}
        for socket in watched.keys() - current.keys():
            poller.unregister(socket)
        for socket in current.keys() - watched.keys():
            poller.register(socket, zmq.POLLIN)
        return current

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # top of the thread: one failing call must not stop the others
            logger.exception("The tier of peers: a call failed; lookups may do without it")

    def _tick(self) -> None:
        self._roster.tick(self._now())
        if self._direct is not None:
            self._direct.tick(self._roster.peers)
        self._trouble = "; ".join(self._roster.troubles())

    def _end(self, woken: int) -> None:
        self._roster.close()
        self._direct = self._region = None
        self._findings.clear()
        self._diallers.shutdown(wait=False, cancel_futures=True)
        self._copiers.shutdown(wait=False, cancel_futures=True)
        if self._directory is not None:
            self._directory.close()
        with self._lock:
            os.close(self._wake)
            os.close(woken)
            self._wake = -1
            left, self._calls = self._calls, deque()
        for call in left:  # may hold connections that were just made
            self._guarded(call)
        if self._closing is not None:
            self._closing.complete(None)

    def _hear(self, peer: Peer) -> None:
        self._roster.watch(peer, partial(peer.hear, self._now()))

    # Operations

    def _begin(self, operation: Operation[Any]) -> None:
        if isinstance(operation, Contains):
            self._ask(operation)
        elif isinstance(operation, Load):
            self._load(operation)
        elif isinstance(operation, Close):
            self._closing = operation
            if self._direct is not None:
                self._direct.close()
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
            self._end_load(load)

    # Asking

    def _ask(self, operation: Contains) -> None:
        now, keys = self._now(), operation.keys
        if any(key.space != keys[0].space or key.shards != keys[0].shards for key in keys):
            operation.fail(TierError("internal", "one question to peers is about the chunks of one space"))
            return
        finding = Finding(keys[0].space, keys[0].shards, [key.chunk for key in keys]) if keys else Finding(b"", 0, [])
        asking = _Asking(operation, finding, waiting=1)
        self._asking[operation] = asking
        pages = finding.pages()
        for peer in self._roster.peers:
            # A server that hangs is not waited for again: what it has is unknown until it answers.
            if peer.asks is not None and not peer.asks.is_slow(now):
                self._roster.watch(peer, partial(self._ask_peer, asking, peer, pages, now))
        asking.waiting -= 1  # all are asked
        self._look(asking)

    def _ask_peer(self, asking: _Asking, peer: Peer, pages: list[tuple[int, m.Has]], now: float) -> None:
        for first, request in pages:
            told, lost = partial(self._told, asking, peer, first, request), partial(self._not_told, asking, peer)
            if peer.asks is None:
                return
            asking.waiting += 1
            try:
                peer.asks.ask(now, Question(request, told, lost))
            except ServerUnavailable as error:
                lost(str(error))
                raise

    def _told(self, asking: _Asking, peer: Peer, first: int, request: m.Has, answer: m.Answer, frames: Frames) -> None:
        if not isinstance(answer, m.Having) or HASH_BYTES * len(answer.present) != len(request.hashes):
            self._not_told(asking, peer, _why(answer))
            return
        asking.answers += 1
        asking.waiting -= 1
        asking.finding.told(peer, first, answer.present)
        if asking.grace_ends is None:
            asking.grace_ends = self._now() + GRACE_SECONDS
        self._look(asking)

    def _not_told(self, asking: _Asking, peer: Peer, reason: str) -> None:
        asking.waiting -= 1
        asking.reason = f"{peer.address}: {reason}"
        self._look(asking)

    def _look(self, asking: _Asking) -> None:
        if not asking.waiting:
            self._told_enough(asking)

    def _end_graces(self) -> None:
        now = self._now()
        for asking in [one for one in self._asking.values() if one.grace_ends is not None and now >= one.grace_ends]:
            self._told_enough(asking)

    def _told_enough(self, asking: _Asking) -> None:
        """Answer with what is known now. A load may use also what answers bring that come later."""
        operation = asking.operation
        if self._asking.pop(operation, None) is None:
            return
        if asking.reason and not asking.answers:
            operation.fail(TierError("unreachable", asking.reason))
            return
        self._findings.add(asking.finding)
        self._note_coming(asking.finding)
        operation.complete(asking.finding.has(operation.keys))

    def _note_coming(self, finding: Finding) -> None:
        complete, coming = finding.states()
        if self._coming:
            for chunk in complete:
                self._coming.pop(chunk, None)
        self._coming.update(dict.fromkeys(coming))
        while len(self._coming) > MAX_KNOWN:
            del self._coming[next(iter(self._coming))]

    # Loading

    def _load(self, operation: Load) -> None:
        count = len(operation.keys)
        load = Loading(operation, [ABSENT] * count, list(map(self._findings.sources, operation.keys)), count)
        self._loading[operation] = load
        self._pull(load, range(count))

    def _pull(self, load: Loading, places: Iterable[int], direct: bool = True) -> None:
        """Ask for these shards, each at a peer that has it and was not asked before. direct: whether movers may read them."""
        pulls: list[Pulling] = []
        for place in places:
            key, size = load.operation.keys[place], len(load.operation.into[place])
            sources = load.sources[place] = [peer for peer in load.sources[place] if peer.asks is not None]
            if not sources:
                load.left -= 1
                continue
            if pulls and pulls[-1].peer in sources and pulls[-1].may_take(key, size):
                pull = pulls[-1]
                pull.places.append(place)
                pull.size += size
            else:
                pull = Pulling(load, min(sources, key=lambda one: one.queued_bytes), [place], size)
                pulls.append(pull)
            pull.peer.queued_bytes += size
            sources.remove(pull.peer)
        for pull in pulls:
            if direct and self._direct is not None:
                self._direct.use(pull)
            told, lost = partial(self._arrived, pull), partial(self._lost, pull)
            pull.question = Question(pull.request, told, lost, pull.size, lambda: not load.cancelled)
            self._roster.watch(pull.peer, partial(pull.peer.pull, self._now(), pull.question))
        self._end_load(load)

    def _lost(self, pull: Pulling, reason: str) -> None:
        self._tried(pull, ["lost"] * len(pull.places))

    def _arrived(self, pull: Pulling, answer: m.Answer, frames: Frames) -> None:
        load = pull.load
        if not isinstance(answer, m.Pulled) or len(answer.headers) != len(pull.places):
            reason = "refused" if isinstance(answer, m.Error) else "wrong answer"
            self._tried(pull, [reason] * len(pull.places))
        elif answer.lease and self._direct is not None and pull.source is not None:
            load.copying += 1
            self._direct.begin(pull, answer, partial(self._read, pull, answer.headers))
        elif load.cancelled or not frames:
            self._tried(pull, [ABSENT] * len(pull.places))
        else:
            if self._direct is not None:
                self._direct.not_lent(pull)
            load.copying += 1
            self._copy_soon(pull, partial(pull.take, answer.headers, frames))

    def _read(self, pull: Pulling, headers: list[bytes], complete: bool) -> None:
        """Check what a mover has read, or ask for it once more if it could not."""
        if pull.load.cancelled or not complete:
            pull.load.copying -= 1
            self._tried(pull, [ABSENT if pull.load.cancelled else "not read"] * len(pull.places), by_link=not complete)
        else:
            self._copy_soon(pull, partial(pull.check, headers))

    def _copy_soon(self, pull: Pulling, copy: Callable[[], list[str]]) -> None:
        try:
            self._copiers.submit(self._copy, pull, copy)
        except RuntimeError:  # no thread can be started
            pull.load.copying -= 1
            self._tried(pull, ["no thread"] * len(pull.places))

    def _copy(self, pull: Pulling, copy: Callable[[], list[str]]) -> None:
        outcomes = copy()

        def done() -> None:
            pull.load.copying -= 1
            self._tried(pull, outcomes)

        self._soon(done)

    def _tried(self, pull: Pulling, outcomes: list[str], by_link: bool = False) -> None:
        """Note how the shards of a pull have arrived, and try those that have not at another peer. by_link: at the same one, over
        its links."""
        load, again = pull.load, list[int]()
        pull.peer.queued_bytes -= pull.size
        for place, outcome in zip(pull.places, outcomes, strict=True):
            load.outcomes[place] = outcome
            if outcome != OK and not load.cancelled:
                if by_link:
                    load.sources[place].append(pull.peer)
                else:
                    self._findings.lost(pull.peer, load.operation.keys[place])
                if load.sources[place]:
                    again.append(place)
        load.left -= len(outcomes) - len(again)
        if again:
            self._pull(load, again, direct=not by_link)
        self._end_load(load)

    def _end_load(self, load: Loading) -> None:
        """End the load if all shards have an outcome, or it was cancelled, and no copy touches its memory any more."""
        done = load.cancelled or not load.left
        if done and not load.copying and self._loading.pop(load.operation, None) is not None:
            if load.cancelled:
                load.operation.cancelled()
            else:
                load.operation.complete(load.outcomes)


def _directory_of(text: str, url: TierURL) -> Directory:
    """Return the directory in the Redis or Valkey of this URL, which is an option of `url`."""
    store = parse_url(text, runtime=url.runtime)
    if store.scheme not in ("redis", "rediss"):
        raise ConfigError(f"--peers {store.redacted}: a directory of peers is in redis:// or rediss://")
    nodes, prefix = nodes_of(store), store.take("prefix", prefix_of, "lmcache")
    leases = Leases(nodes, prefix, store.take("timeout", number(0.05, 60), 5.0))
    store.finish()
    url.inline_secret |= store.inline_secret
    return Directory(leases, store.redacted, url.runtime.now)


def _why(answer: m.Answer) -> str:
    return answer.text if isinstance(answer, m.Error) else f"unexpected answer {type(answer).__name__}"
