"""What operators do with chunks: find, pin, unpin, list and remove them, by the rules of `cache.heart`.

- A *pin* keeps chunks in L1 until its time is over, it is ended, or the cache is cleared. Engines that come and go leave it.
  A pinned chunk and its ancestors are never evicted and never removed by name; clearing the cache ends all pins.
- Pins together hold at most `pinnable_bytes`. A chunk that several pins hold counts once.
- Only chunks that nobody reads, fills or has pinned are removed by name, from a prompt's end towards its beginning. Chunks that
  other prompts go on from stay.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcache.cache.allocator import Space
from lmcache.cache.claims import Held, Refusal
from lmcache.cache.events import NOBODY
from lmcache.cache.groups import usable_prefix
from lmcache.cache.heart import Heart
from lmcache.chunks import HASH_BYTES, split_hashes

MAX_PINS = 1024
MOST_NAMED = 4096
"""The most chunks that one of these calls may name, which bounds its time to a few milliseconds."""
REMOVED_AT_ONCE = 32
"""Chunks that one call should remove, since giving an extent back takes some 10 us."""
_ENDED_A_TICK = 4
"""Pins whose time is over that one tick ends."""


@dataclass(frozen=True)
class Pin:
    """name: chosen by the caller. model, note: for people. parts: what it holds, by space. chunks: of the prompt, from its first
    one on. size_bytes: of all shards of the chunks in all spaces. until: on the clock of `now`."""

    name: str
    model: str
    note: str
    parts: Sequence[Held]
    chunks: int
    size_bytes: int
    until: float
    last: bytes
    """The hash of the last chunk."""
    named: bytes
    """The hash of the last chunk that was named, which L1 need not have."""


class Listed(NamedTuple):
    """A chunk that is in L1: its record and hash, the hash of the chunk before it (zeros: none is in the index), and its bytes.
    readers: how many leases and pins hold it. pinned: whether a pin does."""

    record: int
    key: bytes
    parent: bytes
    size_bytes: int
    complete: bool
    readers: int
    pinned: bool


class Removed(NamedTuple):
    """How many chunks were removed, and how many were found and stay, by reason."""

    chunks: int
    size_bytes: int
    kept: Counter[str]


class Managing(Heart):
    """A heart with the verbs of operators. Chunks are named by all groups' spaces of a model and the hashes of a prompt."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.pinnable_bytes = self.total_bytes // 2
        """The most bytes that pins may hold together."""
        self._pins: dict[str, Pin] = {}
        self._pinned: dict[int, Counter[int]] = {}
        """Space -> record -> how many pins hold the chunk."""
        self._pinned_bytes = 0

    @property
    def pins(self) -> list[Pin]:
        """The pins, in the order in which they were made."""
        return list(self._pins.values())

    @property
    def pinned_bytes(self) -> int:
        """Bytes that pins hold, each chunk counted once."""
        return self._pinned_bytes

    @property
    def pinned_chunks(self) -> int:
        return sum(map(len, self._pinned.values()))

    def usable(self, spaces: Sequence[int], hashes: bytes) -> int:
        """Return how many of these chunks, from the first on, engines could use now. Nothing is touched, leased or counted.

        Raises:
            Refusal: too many chunks, or a space that does not exist any more.
        """
        return usable_prefix(self._named(spaces, hashes), hashes, sisters=True)[0]

    def pin(
        self,
        now: float,
        name: str,
        spaces: Sequence[int],
        hashes: bytes,
        seconds: float,
        model: str = "",
        note: str = "",
    ) -> Pin:
        """Pin those of these chunks that are there, from the first on, for so many seconds. A pin of no chunks is not kept.

        Raises:
            Refusal: as for `usable`; there are too many pins, or `pinnable_bytes` would be exceeded. Nothing is pinned then.
        """
        chunks, found = usable_prefix(self._named(spaces, hashes), hashes, sisters=True)
        parts = [Held(part.space, part.space.table, part.ids) for parts in found for part in parts if part.ids]
        size = sum(len(part.ids) // 4 * part.space.chunk_bytes for part in parts)
        pin = Pin(
            name,
            model,
            note,
            parts,
            chunks,
            size,
            now + seconds,
            hashes[(chunks - 1) * HASH_BYTES : chunks * HASH_BYTES],
            hashes[-HASH_BYTES:],
        )
        if not chunks:
            return pin
        if len(self._pins) >= MAX_PINS:
            raise Refusal(f"there are {MAX_PINS} pins: remove some of them first")
        more = sum(
            part.space.chunk_bytes * len(set(array("I", part.ids)).difference(self._pinned.get(part.space.number, ())))
            for part in parts
        )
        if self._pinned_bytes + more > self.pinnable_bytes:
            raise Refusal(
                f"pinning these {chunks} chunks takes {_mib(more)} more, {_mib(self._pinned_bytes)} are pinned, and at most "
                f"{_mib(self.pinnable_bytes)} may be: unpin something, name a shorter prompt, or raise --pinned-share or "
                "--l1-size-gb"
            )
        for part in parts:
            part.table.pin(part.ids)
            self._pinned_in(part).update(array("I", part.ids))
        self._pinned_bytes += more
        self._pins[name] = pin
        return pin

    def unpin(self, name: str) -> Pin | None:
        """End a pin; None if there is none of this name. Its chunks stay in L1, and may be evicted from now on."""
        pin = self._pins.pop(name, None)
        for part in pin.parts if pin is not None else ():
            counts, before = self._pinned_in(part), len(self._pinned_in(part))
            for one in array("I", part.ids):
                if counts[one] > 1:
                    counts[one] -= 1
                else:
                    counts.pop(one)  # `del` of a Counter takes ten times as long
            self._pinned_bytes -= (before - len(counts)) * part.space.chunk_bytes
            if not counts:
                del self._pinned[part.space.number]
        if pin is not None:
            self._end_reading(pin.parts)
        return pin

    def remove(self, spaces: Sequence[int], hashes: bytes) -> Removed:
        """Remove these chunks of a prompt, from the last one on, in these spaces and their sisters. Chunks before one that stays
        stay too. Callers remove a long prompt in several calls, its end first.

        Raises:
            Refusal: as for `usable`.
        """
        removed, size, kept = 0, 0, Counter[str]()
        for own in self._named(spaces, hashes):
            for space in (own, *own.sisters):
                gone, left = self._remove_in(space, hashes)
                removed, size = removed + gone, size + gone * space.chunk_bytes
                kept.update(left)
        return Removed(removed, size, kept)

    def _remove_in(self, space: Space, hashes: bytes) -> tuple[int, Counter[str]]:
        """Do the same in one space. Returns how many chunks were removed, and how many stay, by reason."""
        table, gone, kept = space.table, 0, Counter[str]()
        for key in reversed(split_hashes(hashes)):
            record = table.get(key)
            if record < 0:
                continue
            if not table.evictable(record):
                kept[self._why_kept(space, record)] += 1
                continue
            gone += table.complete(record)
            self._evict(space, record)
        self._emit_evicted(NOBODY, -1, "deleted")  # to whoever follows chunks, it is an eviction
        return gone, kept

    def _why_kept(self, space: Space, record: int) -> str:
        if self._is_pinned(space, record):
            return "pinned"
        if space.table.pins(record) or space.table.filling(record):
            return "in_use"
        return "shared"

    def listed(self, space_number: int, first: int, most: int) -> tuple[list[Listed], int]:
        """Look at `most` records of a space, from number `first` on. Return the chunks among them, and the number with which to
        go on; 0 at the end.

        Raises:
            Refusal: a space that does not exist.
        """
        (space,) = self._named([space_number], b"")
        table, out = space.table, []
        ids, rest = table.numbered(first, most)
        for record in array("I", ids):
            above = table.parent(record)
            parent = table.key(above) if above >= 0 else bytes(HASH_BYTES)
            told = table.key(record), parent, space.chunk_bytes, table.complete(record), table.pins(record)
            out.append(Listed(record, *told, self._is_pinned(space, record)))
        return out, rest

    def tick(self, now: float) -> None:
        super().tick(now)
        over = [name for name, pin in self._pins.items() if now >= pin.until]
        for name in over[:_ENDED_A_TICK]:
            self.unpin(name)
            self.events.counters["pins_expired"] += 1

    def clear(self) -> int:
        """End all pins, and do the same as `Heart.clear`."""
        pins, self._pinned_bytes = self.pins, 0
        self._pins.clear()
        self._pinned.clear()
        for pin in pins:
            self._end_reading(pin.parts)
        return super().clear()

    def _is_pinned(self, space: Space, record: int) -> bool:
        return record in self._pinned.get(space.number, ())

    def _pinned_in(self, part: Held) -> Counter[int]:
        return self._pinned.setdefault(part.space.number, Counter())

    def _named(self, spaces: Sequence[int], hashes: bytes) -> list[Space]:
        if len(hashes) > MOST_NAMED * HASH_BYTES:
            raise Refusal(
                f"the prompt has {len(hashes) // HASH_BYTES} chunks, and one call may name {MOST_NAMED}: name its beginning only"
            )
        found = [self._spaces.get(one) for one in spaces]
        if any(one is None for one in found):
            raise Refusal("L1 has nothing of this model any more")
        return [one for one in found if one is not None]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
