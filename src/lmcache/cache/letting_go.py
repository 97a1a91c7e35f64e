"""Letting go: what ends with a lease, and what leaves L1 with it, by the rules of `cache.heart`.

Chunks that a fleeting tier has loaded are evicted when an engine has read them, from a prompt's end towards its beginning. Only
`LET_GO_AT_ONCE` of them are looked at in a call. The others keep the pins of the lease that has ended, so that they stay what
they are until `let_go` goes on with them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmcache.cache.allocator import Space
from lmcache.cache.claims import Held, Lease
from lmcache.cache.events import LET_GO, By
from lmcache.cache.filling import Filling
from lmcache.cache.table import Table

LET_GO_AT_ONCE = 16
"""Chunks. To evict one takes some 5 us, and 10 us with an arena."""
MOST_UNFINISHED = 256
"""Ended leases whose chunks have not been looked at. What more of them hold stays until it is evicted in its turn."""


@dataclass(slots=True)
class _Ended:
    """A lease that has ended. read: whether an engine has read its chunks. parts: what has not been looked at. untried: (space,
    chunk hash) of chunks that have been looked at, and that may leave."""

    by: By
    read: bool
    parts: list[Held]
    untried: list[tuple[int, bytes]] = field(default_factory=list)


class LettingGo(Filling):
    """The part of the heart that ends leases, and evicts what is not kept behind them."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.on_unfinished: Callable[[], None] = lambda: None
        """Called when `let_go` has to be called again, soon but not at once."""
        self._unfinished: deque[_Ended] = deque()

    def let_go(self) -> None:
        """Go on with the chunks of leases that have ended, at most `LET_GO_AT_ONCE` of them."""
        looked = gone = 0
        while self._unfinished and (gone if self._unfinished[0].untried else looked) < LET_GO_AT_ONCE:
            one = self._unfinished[0]
            if one.untried:
                gone += self._try(one, LET_GO_AT_ONCE - gone)
                self._emit_evicted(one.by, -1, LET_GO)
            else:
                looked += self._look_at(one, LET_GO_AT_ONCE - looked)
            if not one.parts and not one.untried:
                self._unfinished.popleft()
        if self._unfinished:
            self.on_unfinished()

    def _end_lease(self, number: int) -> None:
        lease = self._claims.end_lease(number)
        if self._fleeting:
            self._begin_letting_go(lease)
        else:
            self._end_reading(lease.parts)

    def _end_reading(self, parts: Iterable[Held]) -> None:
        """Note that a lease or a pin holds these chunks no longer, and free those that have left the index meanwhile."""
        for space, table, ids in parts:
            released = table.unpin(ids)
            if released:
                self._free(space, table, released)

    def _begin_letting_go(self, lease: Lease) -> None:
        """Evict those chunks of a lease that has ended which are fleeting and have been read by an engine. What only the server
        or a peer has read stays: an engine's lookup is about to ask for it, or nobody is, and then it is evicted in its turn."""
        cleared = [part for part in lease.parts if part.table is not part.space.table]
        self._end_reading(cleared)
        parts = [part for part in lease.parts if part.ids and part.table is part.space.table]
        if parts:
            self._unfinished.append(_Ended(lease.by, bool(lease.instance.spaces), parts))
        if len(self._unfinished) > MOST_UNFINISHED:
            self._end_reading(self._unfinished.popleft().parts)
        if len(self._unfinished) == 1:  # nothing waits for its turn
            self.let_go()

    def _look_at(self, one: _Ended, most: int) -> int:
        """End the reading of the last chunks of the lease, and note those among them that may leave. Returns how many chunks."""
        space, table, ids = one.parts.pop()
        last, rest = ids[-4 * most :], ids[: -4 * most]
        if rest:
            one.parts.append(Held(space, table, rest))
        self._end_reading([Held(space, table, last)])
        for record in reversed(array("I", last)):  # the end of a prompt first
            key = space.number, table.key(record)
            if key in self._fleeting:
                self._fleeting[key] = one.read or self._fleeting[key]
                if self._fleeting[key]:
                    one.untried.append(key)
        one.untried.reverse()  # `pop` takes the end of the prompt first
        return len(last) // 4

    def _try(self, one: _Ended, most: int) -> int:
        """Evict chunks that may leave and, with each, those before it that only it has kept. Returns how many were evicted."""
        gone = 0
        while one.untried and gone < most:
            number, key = one.untried.pop()
            space = self._spaces.get(number)
            record = space.table.get(key) if space is not None else -1
            if space is None or record < 0 or not space.table.evictable(record):
                continue
            table, above, count = space.table, space.table.parent(record), 1
            while gone + count < most and self._was_read(space, above) and _only_follows(table, above):
                record, above, count = above, table.parent(above), count + 1
            self._evict(space, record)
            gone += count
            if self._was_read(space, above) and table.evictable(above):
                one.untried.append((number, table.key(above)))
        return gone

    def _was_read(self, space: Space, record: int) -> bool:
        """Return whether the record is one of a fleeting chunk that an engine has read."""
        return record >= 0 and self._fleeting.get((space.number, space.table.key(record)), False)

    def _stop_letting_go(self) -> None:
        """End the reading of all leases that have ended, and forget what they have left."""
        while self._unfinished:
            self._end_reading(self._unfinished.popleft().parts)


def _only_follows(table: Table, record: int) -> bool:
    """Return whether the chunk would be evictable without the only chunk that follows it."""
    return table.children(record) == 1 and not table.pins(record) and not table.filling(record)
