"""Pulls whose payload a mover reads from the peer's arena into this one. The link carries the question, the headers and the end
of the lease. All of it belongs to the thread of the tier.

A read that has begun is waited for until it has ended or the mover has gone: nothing else shows that no late byte will reach the
extent, so a mover that takes too long is killed. What has arrived counts only if its checksum is right.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.observability.log import init_logger
from lmcache.peers.dial import Myself
from lmcache.peers.link import Frames, Link, Question
from lmcache.peers.mover import Mover
from lmcache.peers.mover_words import Ended, Failed, Forget, Meeting, Read
from lmcache.peers.peer import Peer, Source
from lmcache.peers.pulls import Pulling
from lmcache.runtime import Runtime
from lmcache.tiers import Region
from lmcache.wire import messages as m

logger = init_logger(__name__)
_SLOWEST = 16 << 20
"""Bytes a second. A read that is slower hangs."""
Watch = Callable[[Peer, Callable[[], object]], None]


@dataclass(eq=False)
class _Reading:
    """A read of the mover with number `mover`. ended: takes whether all bytes are there; nothing touches the extents then."""

    mover: int
    pull: Pulling
    size: int
    until: float
    over: Callable[[], None]
    ended: Callable[[bool], None]


class Direct:
    """timeout_seconds: how long a read may take, and in addition what its size needs. soon: runs a call in the tier's thread.
    watch: as `Roster.watch`."""

    def __init__(
        self,
        region: Region,
        myself: Myself,
        timeout_seconds: float,
        runtime: Runtime,
        soon: Callable[[Callable[[], None]], bool],
        watch: Watch,
    ) -> None:
        self._region, self._timeout_seconds, self._now, self._watch = region, timeout_seconds, runtime.now, watch
        self._numbers = count(1)
        self._reading: dict[int, _Reading] = {}
        self._peers: list[Peer] = []
        self._mover = Mover(
            *(runtime, region.descriptor, region.size_bytes, myself.devices),
            writes=True,
            heard=lambda mover, said: soon(partial(self._heard, mover, said)),
            lost=lambda mover, reason: soon(partial(self._lost, mover, reason)),
        )
        self._mover.start()

    @property
    def is_reading(self) -> bool:
        """Whether a mover may still write into the arena."""
        return bool(self._reading)

    def close(self) -> None:
        """Begin no more reads, and end the mover. Those that have begun end when it has gone."""
        self._mover.close()

    def tick(self, peers: list[Peer]) -> None:
        """Ask peers how to read from them, and end a mover that hangs."""
        now, offer, self._peers = self._now(), self._mover.offer, peers
        for one in self._reading.values():
            if now > one.until:
                self._failed(one.pull.peer, "a read took too long")
                self._mover.kill(one.mover, f"a read from {one.pull.peer.address} took longer than it may")
        for peer in peers:
            if peer.asks is None or offer is None:
                continue
            if not peer.meets:
                self._say(peer, "TCP, since it is an older server or has no --peer-transport nixl")
            elif peer.source is None and not peer.meeting and (peer.direct.state != "open" or peer.direct.probe(now)):
                self._watch(peer, partial(self._meet, peer, peer.asks))

    def use(self, pull: Pulling) -> None:
        """Let the mover make this pull if it can."""
        source = pull.peer.source
        offsets = [self._offset(pull.load.operation.into[place]) for place in pull.places]
        if source is not None and None not in offsets:
            pull.source, pull.offsets = source, [one for one in offsets if one is not None]

    def not_lent(self, pull: Pulling) -> None:
        """Note that the peer has sent the payload itself: the mover that is known of it does not run any more."""
        if pull.source is not None and pull.peer.source is pull.source:
            self._failed(pull.peer, "its own mover was replaced")

    def begin(self, pull: Pulling, answer: m.Pulled, ended: Callable[[bool], None]) -> None:
        """Read what the answer has lent. Calls `ended` as soon as nothing touches the extents, perhaps at once."""
        link = pull.question.link if pull.question is not None else None
        over = partial(self._release, pull.peer, link, answer.lease)
        sectors = iter(np.frombuffer(answer.extents, "<u4").tolist() if len(answer.extents) % 4 == 0 else ())
        parts, source, each = list[tuple[int, int, int]](), pull.source, pull.size // len(pull.places)
        for header, offset in zip(answer.headers, pull.offsets, strict=True):
            if header and (sector := next(sectors, None)) is not None and source is not None:
                parts.append((offset, source.address + sector * SECTOR_BYTES, each))
        unlike = len(parts) != sum(map(bool, answer.headers)) or next(sectors, None) is not None
        # The memory of a load that was cancelled while the peer had not answered may be another's already.
        if pull.load.cancelled or source is None or unlike:
            over()
            ended(False)
            return
        if not parts:
            over()
            ended(True)
            return
        number, size = next(self._numbers), each * len(parts)
        until = (
            self._now() + self._timeout_seconds + (sum(one.size for one in self._reading.values()) + size) / _SLOWEST
        )
        mover = self._mover.tell(Read(number, source.name, parts))
        if not mover:  # it has begun nothing
            over()
            ended(False)
            return
        self._reading[number] = _Reading(mover, pull, size, until, over, ended)

    # What others say

    def _meet(self, peer: Peer, asks: Link) -> None:
        asks.ask(self._now(), Question(m.Meet(), partial(self._met, peer), partial(self._not_met, peer)))
        peer.meeting = True  # unless the question could not be asked

    def _met(self, peer: Peer, answer: m.Answer, frames: Frames) -> None:
        peer.meeting = False
        if not isinstance(answer, m.Met) or not answer.mover:
            self._failed(peer, "its own mover does not run")
            return
        name = secrets.token_bytes(16)
        mover = self._mover.tell(Meeting(name, answer.agent))
        if mover:
            forget = partial(self._mover.tell, Forget(name))
            peer.source = Source(mover, answer.mover, name, answer.address, forget)
            self._say(
                peer, "NIXL, which does not encrypt them; questions and checksums go over the connection as before"
            )

    def _not_met(self, peer: Peer, reason: str) -> None:
        peer.meeting = False

    def _heard(self, mover: int, said: Ended | Failed) -> None:
        one = self._reading.get(said.number)
        if one is None or one.mover != mover:
            return
        if said.trouble:
            self._failed(one.pull.peer, said.trouble)
        else:
            one.pull.peer.direct.succeeded()
        if isinstance(said, Ended):
            del self._reading[said.number]
            one.over()
            one.ended(not said.trouble)

    def _lost(self, mover: int, reason: str) -> None:
        for peer in self._peers:
            if peer.source is not None and peer.source.reader == mover:
                peer.source = None
                self._say(peer, f"TCP for now: {reason}")
        gone = {number: one for number, one in self._reading.items() if one.mover == mover}
        for number, one in gone.items():
            del self._reading[number]
            one.over()
            one.ended(False)

    def _failed(self, peer: Peer, reason: str) -> None:
        """Do without reading from this peer for a while."""
        peer.no_source()
        peer.direct.failed(self._now(), reason, at_once=True)
        self._say(peer, f"TCP for now: {reason}")

    def _say(self, peer: Peer, how: str) -> None:
        if peer.pulled_by != how:
            peer.pulled_by = how
            logger.info("Peer %s: pulls go by %s", peer.address, how)

    def _release(self, peer: Peer, link: Link | None, lease: int) -> None:
        if link is None or link not in peer.links:
            return  # the peer ends the lease by itself
        question = Question(m.Release([lease]), lambda answer, frames: None, lambda reason: None)
        self._watch(peer, lambda: link.ask(self._now(), question))

    def _offset(self, into: memoryview) -> int | None:
        """Return where in the arena this memory is."""
        offset = int(np.frombuffer(into, np.uint8).ctypes.data) - self._region.address
        return offset if 0 <= offset <= self._region.size_bytes - into.nbytes else None
