"""Loads from peers, cut into pulls, and what arrives of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lmcache.observability.log import init_logger
from lmcache.peers.link import Frames, Question
from lmcache.peers.peer import Peer, Source
from lmcache.tiers import ABSENT, ShardKey
from lmcache.tiers.frame import CHECKSUM, OTHER_SIZE, Checksum, check_header
from lmcache.tiers.operation import Load
from lmcache.wire import messages as m

logger = init_logger(__name__)
PULL_BYTES = 4 << 20
"""Of one pull, unless a single shard is larger. While one is sent, the next one is sealed and the one before it is checked."""
PIECE_BYTES = 512 << 10
"""Shards are checked and copied in pieces, since a copy keeps the interpreter lock."""


@dataclass(eq=False)
class Loading:
    """A load. sources: for each shard, the peers that may still be asked for it. left: how many shards have no outcome yet.
    copying: how many copies touch its buffers now."""

    operation: Load
    outcomes: list[str]
    sources: list[list[Peer]]
    left: int
    copying: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class Pulling:
    """One pull, of the shards with these places in a load. key: of its first shard; the others differ in the chunk only.
    question: by which it was asked for. source: from where a mover reads the payload, to these offsets in the arena; None: it
    comes with the answer."""

    load: Loading
    peer: Peer
    places: list[int]
    size: int
    key: ShardKey = field(init=False)
    question: Question | None = field(default=None, init=False)
    source: Source | None = field(default=None, init=False)
    offsets: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.key = self.load.operation.keys[self.places[0]]

    def may_take(self, key: ShardKey, size: int) -> bool:
        """Return whether one more shard fits into this pull."""
        alike = key._replace(chunk=self.key.chunk) == self.key
        return alike and self.size + size <= PULL_BYTES and len(self.places) < m.MAX_ASKED_CHUNKS

    @property
    def request(self) -> m.Pull:
        keys = self.load.operation.keys
        space, _, shard, shards = self.key
        chunks = b"".join(keys[place].chunk for place in self.places)
        return m.Pull(space, shards, shard, chunks, self.source.lender if self.source is not None else 0)

    def take(self, headers: list[bytes], frames: Frames) -> list[str]:
        """Copy what has arrived into the buffers, and check it. Returns the outcome of each shard; any thread may do this."""
        operation = self.load.operation
        left = iter(_shards(frames, sum(map(bool, headers)), self.size // len(self.places)))

        def taken(header: bytes, place: int) -> str:
            sent = next(left, None)
            return OTHER_SIZE if sent is None else take(header, sent, operation.keys[place], operation.into[place])

        return self._outcomes(headers, taken)

    def check(self, headers: list[bytes]) -> list[str]:
        """Check what a mover has read into the buffers. Returns the outcome of each shard; any thread may do this."""
        operation = self.load.operation
        return self._outcomes(
            headers, lambda header, place: _check(header, operation.into[place], operation.keys[place], None)
        )

    def _outcomes(self, headers: list[bytes], of: Callable[[bytes, int], str]) -> list[str]:
        """Return the outcome of each shard, which is `of` its header and its place if the peer has it."""
        try:
            return [of(one, place) if one else ABSENT for one, place in zip(headers, self.places, strict=True)]
        except Exception:  # top of the thread: the load must end
            logger.exception("Shards of a peer could not be copied or checked")
            return [CHECKSUM] * len(self.places)


def _shards(frames: Frames, count: int, size: int) -> list[memoryview]:
    """Return the payload of each shard, which may all be in one frame."""
    if len(frames) == 1 < count:
        return [frames[0].buffer[at * size : (at + 1) * size] for at in range(count)]
    return [one.buffer for one in frames]


def take(header: bytes, payload: memoryview, key: ShardKey, into: memoryview) -> str:
    """Copy a shard that a peer has sent into a buffer of its size, and check it. Returns OK or the name of the damage."""
    return _check(header, payload, key, into) if payload.nbytes == into.nbytes else OTHER_SIZE


def _check(header: bytes, payload: memoryview, key: ShardKey, into: memoryview | None) -> str:
    """Check a shard, and copy it on the way if `into` is given. Returns OK or the name of the damage."""
    wrong = check_header(header, key, payload.nbytes)
    if wrong:
        return wrong
    checksum = Checksum()
    for start in range(0, payload.nbytes, PIECE_BYTES):
        piece = payload[start : start + PIECE_BYTES]
        checksum.update(piece)
        if into is not None:
            into[start : start + PIECE_BYTES] = piece
    return checksum.check(header, key)
