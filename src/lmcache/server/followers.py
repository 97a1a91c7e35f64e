"""Followers are engines that are told what happens to chunks of their spaces: what L1 has got and lost, and what tiers have got.

Engines that publish KV events ask for it now and then. Each of them has a bounded queue here. As long as no engine follows a
space, nobody listens to the events of L1.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lmcache.cache import L1, Event
from lmcache.chunks import HASH_BYTES, split_hashes
from lmcache.tiers import ABSENT
from lmcache.tiers.frame import DAMAGE
from lmcache.wire.messages import Change, News

if TYPE_CHECKING:
    from lmcache.server.tier_runner import TierRunner
    from lmcache.tiers import ShardKey

MOST_CHUNKS = 65536
"""Bound of the chunks that wait for one engine to ask, and of the changes. 1 MiB of hashes."""
CHUNKS_OF_ANSWER, CHANGES_OF_ANSWER = 16384, 512
"""Bounds of one answer. A change takes the server's loop up to two microseconds, however few chunks it has."""
_MOST_PARTS = 65536
"""Bound of the chunks of which tiers have some shards and not all, as far as events have told."""
_OF_L1, _OF_TIERS = ("stored", "removed"), ("written", "lost")
"""Changes, by where the chunks are."""
_L1_KINDS = "stored", "evicted"
_TIER_KINDS = "written", "loaded", "load_failed"


class Follower:
    """An engine process that follows a space, and what it has not been told yet."""

    def __init__(self, space: int) -> None:
        self.space = space
        self.changes: deque[tuple[Change, bytearray]] = deque()
        self.chunks = 0
        """How many chunks and changes wait."""
        self.incomplete = False

    def add(self, change: Change, hashes: bytes) -> bool:
        """Return False if the queue was full, and has been emptied."""
        chunks = len(hashes) // HASH_BYTES
        if not hashes:
            self._void(change)
        if self.chunks + chunks >= MOST_CHUNKS:
            self.changes.clear()
            self.chunks, self.incomplete = 0, True
            return False
        if hashes and self.changes and self.changes[-1][0] == change and self.changes[-1][1]:
            self.changes[-1][1].extend(hashes)
            self.chunks += chunks
        else:
            self.changes.append((change, bytearray(hashes)))
            self.chunks += chunks + 1
        return True

    def _void(self, change: Change) -> None:
        """Drop the changes that one of all chunks makes void, so that few of these wait: each costs the engine a walk over all
        chunks that it knows."""
        void = _OF_L1 if change in _OF_L1 else _OF_TIERS
        self.changes = deque(one for one in self.changes if one[0] not in void)
        self.chunks = sum(len(hashes) // HASH_BYTES + 1 for _, hashes in self.changes)

    def take(self) -> News:
        """Return the oldest changes, as many as one answer holds."""
        taken, room = list[tuple[Change, bytes]](), CHUNKS_OF_ANSWER * HASH_BYTES
        while self.changes and room and len(taken) < CHANGES_OF_ANSWER:
            change, hashes = self.changes[0]
            part = bytes(hashes[:room])
            if len(part) < len(hashes):
                del hashes[:room]
            else:
                self.changes.popleft()
                self.chunks -= 1
            self.chunks -= len(part) // HASH_BYTES
            room -= len(part)
            taken.append((change, part))
        incomplete, self.incomplete = self.incomplete, False
        return News(taken, incomplete)


class Followers:
    """The followers of all spaces, and what they are to be told. counters: `news_chunks` counts chunks queued for an engine, and
    `news_overflows` how often a queue was full."""

    def __init__(self, l1: L1, counters: Counter[str], runners: Sequence[TierRunner] = ()) -> None:
        self._l1, self._counters, self._runners = l1, counters, runners
        self._followers: dict[int, Follower] = {}
        """By process."""
        self._parts: OrderedDict[tuple[int, str, bytes], int] = OrderedDict()
        """Space, tier and hash of chunks of which the tier has some shards: a bit for each."""

    def follow(self, process: int, space: int) -> None:
        """Note from now on what happens to chunks of this space or its sisters, for this process."""
        if not self._followers:
            self._l1.events.listen(_L1_KINDS + _TIER_KINDS, self._heard)
            self._l1.events.listen(["cleared"], self._heard, named=False)
            for runner in self._runners:
                runner.tell_drops(self._dropped)
        self._followers[process] = Follower(space)

    def leave(self, process: int) -> None:
        """Forget a process that has ended."""
        if self._followers.pop(process, None) is not None and not self._followers:
            self._l1.events.ignore(self._heard)
            for runner in self._runners:
                runner.tell_drops(None)
            self._parts.clear()

    def take(self, process: int) -> News:
        """Return what this process has not been told yet; nothing if it follows no space."""
        follower = self._followers.get(process)
        return follower.take() if follower is not None else News([], True)

    def tier_joined(self, runner: TierRunner) -> None:
        """Hear of what a new tier drops, if somebody follows."""
        if self._followers:
            runner.tell_drops(self._dropped)

    def tier_cleared(self) -> None:
        """Note that a tier has been emptied or removed. Which chunks other tiers have is not known here, so all count as gone
        from tiers."""
        self._parts.clear()
        for follower in self._followers.values():
            self._add(follower, "lost", b"")

    def _heard(self, event: Event) -> None:
        if event.kind == "cleared":
            self._tell(event.space, "removed", b"")
        elif event.kind in ("stored", "evicted"):
            self._tell(event.space, "stored" if event.kind == "stored" else "removed", event.hashes)
        elif not self._keeps(event.tier):
            return
        elif event.kind in ("written", "loaded"):
            if complete := self._whole(event):
                self._tell(event.space, "written", complete)
        elif event.reason == ABSENT or event.reason in DAMAGE:
            for chunk in split_hashes(event.hashes):
                self._parts.pop((event.space, event.tier, chunk), None)
            self._tell(event.space, "lost", event.hashes)

    def _keeps(self, tier: str) -> bool:
        """Return whether a tier is attached now, and keeps what it is given. What came from other servers' memory may be gone at
        any time, and what is still written to a removed tier is of no use to lookups."""
        return any(one.name == tier and not one.tier.read_only for one in self._runners)

    def _dropped(self, tier: str, keys: list[ShardKey]) -> None:
        """Note that a tier has dropped these shards, most likely to make room. Other tiers may have the chunks still."""
        for space in self._l1.spaces:
            mine = (key.chunk for key in keys if (key.space, key.shards) == (space.fingerprint, space.shards))
            if chunks := list(dict.fromkeys(mine)):
                for chunk in chunks:
                    self._parts.pop((space.number, tier, chunk), None)
                self._tell(space.number, "lost", b"".join(chunks))

    def _tell(self, space: int, change: Change, hashes: bytes) -> None:
        for follower in self._of(space):
            self._add(follower, change, hashes)

    def _add(self, follower: Follower, change: Change, hashes: bytes) -> None:
        self._counters["news_chunks"] += len(hashes) // HASH_BYTES
        self._counters["news_overflows"] += not follower.add(change, hashes)

    def _of(self, number: int) -> Iterator[Follower]:
        """Yield who follows the space or one of its sisters."""
        space = self._l1.space(number)
        sisters = {one.number for one in space.sisters} if space is not None else set()
        return (one for one in self._followers.values() if one.space == number or one.space in sisters)

    def _whole(self, event: Event) -> bytes:
        """Note that the tier has this shard of the chunks. Return those of which it has all shards now."""
        space = self._l1.space(event.space)
        if space is None or space.shards == 1:
            return event.hashes if space is not None else b""
        whole, every = bytearray(), (1 << space.shards) - 1
        for chunk in split_hashes(event.hashes):
            name = event.space, event.tier, chunk
            have = self._parts.pop(name, 0) | 1 << event.shard
            if have == every:
                whole += chunk
                continue
            self._parts[name] = have
            if len(self._parts) > _MOST_PARTS:
                self._parts.popitem(last=False)
        return bytes(whole)
