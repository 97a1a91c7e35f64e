"""One record a request: where its tokens came from, and why the others were missing. Memory is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

RECORD_BYTES = 96
"""Memory of a record beside its encoded bytes: the object's head and its places in lists."""
MOST_EXAMINED = 4096
"""How many records one call decodes at most; the answer says where to go on."""
MOST_RETURNED = 1000
_BLOCK = 256


class Record(msgspec.Struct, array_like=True, frozen=True):
    """What became of one lookup. Times (`at`, `gone`, `used`) are seconds since the epoch, 0 if unknown.

    number: counts all records from 1 on. engine, model: as the engine registered. waited_seconds: from the first answer that
    said to wait until the last one. sources: tokens by where they came from; missed: tokens by reason; their sum is `tokens`.
    reason: of the first missing chunk, whose number is `chunk`; "" and -1 if none is missing. `differs`: the chunk that does.
    gone: when that chunk was evicted or cleared; used: when it was last used before; wanted_by: the space that needed its memory,
    -1 if none. fetch: what tiers and other engines did for the request; empty if they were not asked."""

    number: int
    request: str
    at: float
    engine: str
    model: str
    space: int
    tokens: int
    chunk_tokens: int
    waited_seconds: float
    sources: dict[str, int]
    missed: dict[str, int]
    reason: str = ""
    chunk: int = -1
    gone: float = 0.0
    used: float = 0.0
    wanted_by: int = -1
    fetch: dict[str, object] = {}
    twin: str = ""
    """For `other_identity`: under what the same tokens are stored."""
    blended: dict[str, int] = {}
    """Not of a lookup, but of passages that were blended into a prompt: how many, and how many of their tokens were computed
    again. The tokens are missing in the record of the prompt's lookup, since they are no prefix."""

    def described(self) -> dict[str, object]:
        """Return field name -> value, in JSON types only."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


Blocks = Sequence[Sequence[bytes]]
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Record)


class Records:
    """Keeps encoded records in `most_bytes`. `add` belongs to the loop's thread; `blocks` may be read by any."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.count = 0
        """How many records have been added in all, so it is the number of the last one."""
        self.bytes = 0
        self._blocks: deque[list[bytes]] = deque()
        self._sizes: deque[int] = deque()

    def add(self, record: Record) -> None:
        """Add a record, whose number is `count` + 1; the oldest records make room for it."""
        self.count += 1
        if not self._blocks or len(self._blocks[-1]) >= _BLOCK:
            self._blocks.append([])
            self._sizes.append(0)
        raw = _encoder.encode(record)
        self._blocks[-1].append(raw)
        self._sizes[-1] += len(raw) + RECORD_BYTES
        self.bytes += len(raw) + RECORD_BYTES
        while self.bytes > self.most_bytes and len(self._blocks) > 1:
            self._blocks.popleft()
            self.bytes -= self._sizes.popleft()

    def blocks(self) -> Blocks:
        """Return what is kept, to be read by `select` in another thread."""
        return list(self._blocks)


def select(
    blocks: Blocks,
    *,
    request: str = "",
    misses: bool = False,
    since: float = 0.0,
    before: int = 0,
    limit: int = 100,
    pause: Callable[[], None] = lambda: None,
) -> tuple[list[Record], int]:
    """Return the latest records that fit, the latest first, and the number before which to go on; 0 if there are no more.

    request: the beginning of the id. misses: only records with missing tokens. since: only records after this time.
    before: only records with a smaller number, if it is not 0. pause: called after every few records, so that it can let other
    threads run.
    """
    found: list[Record] = []
    left, last = MOST_EXAMINED, 0
    for raw in _backwards(blocks, before, pause):
        if request and request.encode("utf-8", "replace") not in raw:
            continue
        if not left or len(found) >= min(limit, MOST_RETURNED):
            return found, last
        left -= 1
        record = _decoder.decode(raw)
        last = record.number
        if record.at < since:
            break
        if record.request.startswith(request) and (record.missed or not misses):
            found.append(record)
    return found, 0


def _backwards(blocks: Blocks, before: int, pause: Callable[[], None]) -> Iterator[bytes]:
    """Yield encoded records, the latest first, of those with a number below `before`, if that is not 0."""
    for block in reversed(blocks):
        kept = block[:]
        if before and kept:
            first = _decoder.decode(kept[0]).number
            kept = kept[: max(0, before - first)]
        yield from reversed(kept)
        pause()
