"""What a learned policy of eviction would find, beside LRU, on a recorded trace.

    python -m benchmarks.policies --trace conversation.jsonl [--blocks 1000,5000,10000] [--json]

The policy is Python behind the door of `memory.order.Policy`; the heart, its index and the replay are the server's own.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcache.cache.table import Table
from lmcache.memory.order import Policy
from lmcache.sizing import replay as replays
from lmcache.sizing.readers import Trace
from lmcache.sizing.replay import Capacity, Simulation, replay
from lmcache.sizing.trace import Record

FIRST_SECONDS, PER_OCTAVE, BUCKETS = 0.05, 3, 54
COUNTS = 7
"""Classes by how often a block was used: 1, 2, 3, 4-5, 6-9, 10-32, more."""
TURNS, LENGTHS = 5, 8
COARSE = COUNTS * 2
MIDDLE = COARSE * TURNS
DEAD = COUNTS * LENGTHS
CLASSES = MIDDLE + DEAD
SAMPLE = 32
GHOSTS = 16
"""Evicted blocks that are remembered, as a multiple of the capacity."""


def _count_class(count: int) -> int:
    return count - 1 if count < 4 else 3 if count < 6 else 4 if count < 10 else 5 if count < 33 else 6


class Learned(Policy):
    """Learns for classes of blocks at which age they are used again, and evicts where the chance for the time held is least.

    The class of a block follows from how often it was used, whether it was the last of its request, and which turn of a
    conversation that was. What another branch has left behind is a class of its own. now: the trace's clock. capacity: in blocks.
    """

    def __init__(self, now: Callable[[], float], capacity: int) -> None:
        self._now, self._most_ghosts = now, GHOSTS * capacity
        self._dice = random.Random(7)
        self._slots: dict[bytes, int] = {}
        """Key -> slot in the arrays below, of rows and ghosts."""
        self._free: list[int] = []
        size = 1 << 12
        self._last, self._weight = np.zeros(size), np.zeros(size)
        self._class = np.full(size, -1, np.int32)
        """-1: nothing is known of the slot."""
        self._count = array("I", bytes(4 * size))
        self._turn, self._path = array("I", bytes(4 * size)), array("I", bytes(4 * size))
        self._rows = bytearray(size)
        """1 for a slot that has a row."""
        self._next = array("q", [-1]) * size
        """The block after this one in the last request that used it."""
        self._key_of: dict[int, bytes] = {}
        self._row_slot: dict[int, int] = {}
        self._parent: dict[int, int] = {}
        self._children: dict[int, int] = {}
        self._leaves: list[int] = []
        self._leaf_at: dict[int, int] = {}
        self._ghosts: deque[tuple[bytes, float]] = deque()
        self._request: list[int] = []
        """Slots of the running request, from its first block on."""
        self._matched = 0
        self._requests = 0
        self._events, self._closed = np.zeros((CLASSES, BUCKETS)), np.zeros((CLASSES, BUCKETS))
        edges = FIRST_SECONDS * 2 ** (np.arange(BUCKETS) / PER_OCTAVE)
        self._edges, self._steps = edges, np.diff(np.concatenate([[0.0], edges]))
        self._index = np.tile(1.0 / edges, (CLASSES, 1))

    # What the table tells

    def begin(self) -> None:
        """Note that a request begins, and what the one before it has shown."""
        if self._request:
            self._finish()
        self._request, self._matched = [], 0

    def inserted(self, row: int, key: bytes, parent: int) -> None:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._new_slot()
        self._row_slot[row], self._key_of[row], self._rows[slot] = slot, bytes(key), 1
        self._parent[row], self._children[row] = parent, 0
        if parent:
            self._children[parent] += 1
            self._no_leaf(parent)
        self._leaf(row)
        self._request.append(slot)

    def touched(self, rows: Sequence[int]) -> None:
        if not self._request:
            self._request = [self._row_slot[row] for row in reversed(rows)]
            self._matched = len(self._request)

    def removed(self, row: int) -> None:
        slot, key, parent = self._row_slot.pop(row), self._key_of.pop(row), self._parent.pop(row)
        del self._children[row]
        self._rows[slot] = 0
        self._no_leaf(row)
        if parent in self._children:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._leaf(parent)
        self._ghosts.append((key, float(self._last[slot])))
        while len(self._ghosts) > self._most_ghosts:
            self._forget(*self._ghosts.popleft())

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._row_slot, key=lambda row: self._worth([row])[0]))

    def victim(self, evictable: Callable[[int], bool]) -> int:
        for _ in range(8):
            found = [row for row in self._dice.choices(self._leaves, k=SAMPLE) if evictable(row)]
            if found:
                return found[int(np.argmin(self._worth(found)))]
        return next(filter(evictable, self), 0)

    def memory_bytes(self) -> int:
        return len(self._last) * 60

    # Leaves and slots

    def _leaf(self, row: int) -> None:
        if row not in self._leaf_at:
            self._leaf_at[row] = len(self._leaves)
            self._leaves.append(row)

    def _no_leaf(self, row: int) -> None:
        at = self._leaf_at.pop(row, None)
        if at is not None:
            last = self._leaves.pop()
            if last != row:
                self._leaves[at], self._leaf_at[last] = last, at

    def _new_slot(self) -> int:
        if not self._free:
            size = len(self._last)
            self._free = list(range(2 * size - 1, size - 1, -1)) if self._slots else list(range(size - 1, -1, -1))
            if self._slots:
                self._last, self._weight = np.resize(self._last, 2 * size), np.resize(self._weight, 2 * size)
                self._class = np.concatenate([self._class, np.full(size, -1, np.int32)])
                for one in (self._count, self._turn, self._path):
                    one.extend([0] * size)
                self._next.extend([-1] * size)
                self._rows.extend(bytes(size))
        slot = self._free.pop()
        self._class[slot], self._count[slot], self._next[slot] = -1, 0, -1
        return slot

    def _forget(self, key: bytes, last: float) -> None:
        slot = self._slots.get(key)
        if slot is None or self._last[slot] != last or self._rows[slot] or slot in self._request:
            return
        self._close(slot, self._now(), used=False)
        self._class[slot] = -1
        del self._slots[key]
        self._free.append(slot)

    # Learning

    def _close(self, slot: int, now: float, used: bool) -> None:
        kind = self._class[slot]
        if kind >= 0:
            bucket = min(BUCKETS - 1, int(np.searchsorted(self._edges, now - self._last[slot])))
            self._closed[kind, bucket] += self._weight[slot]
            if used:
                self._events[kind, bucket] += self._weight[slot]

    def _finish(self) -> None:
        now, path, matched = self._now_of_request, self._request, self._matched
        known = matched  # blocks behind the hit may be ghosts, which were used again, too
        while known < len(path) and self._class[path[known]] >= 0:
            known += 1
        turn = 1
        if known >= 2:
            deepest = path[known - 1]
            before = self._path[deepest]
            if known >= before - (2 if before > 8 else 1):
                turn = min(TURNS, 1 + self._turn[deepest])
        if known and known < len(path):
            self._leave_behind(path[known - 1], path[known], now)
        for slot in path[:known]:
            self._close(slot, now, used=True)
        kinds: dict[int, list[int]] = {}
        for place, slot in enumerate(path):
            self._count[slot] = min(self._count[slot] + 1, 1 << 20)
            self._last[slot], self._turn[slot], self._path[slot] = now, turn, len(path)
            self._next[slot] = path[place + 1] if place + 1 < len(path) else -1
            coarse = _count_class(self._count[slot]) * 2 + (place + 1 == len(path))
            kinds.setdefault(coarse * TURNS + turn - 1, []).append(slot)
        for kind, slots in kinds.items():
            self._class[slots], self._weight[slots] = kind, 1.0 / len(slots)
        self._requests += 1
        if self._requests % (16 if self._requests < 256 else 64) == 0:
            self._refresh(now)

    def _leave_behind(self, at: int, other: int, now: float) -> None:
        """What the last request through block `at` had behind it, and this one has not, is a dead tail now."""
        tail, slot = list[int](), self._next[at]
        while slot >= 0 and slot != other and self._class[slot] >= 0 and len(tail) < 512:
            tail.append(slot)
            slot = self._next[slot]
        if tail and slot != other and self._count[at] <= 32:
            length = min(LENGTHS - 1, len(tail).bit_length() - 1)
            kind = MIDDLE + _count_class(self._count[at]) * LENGTHS + length
            for one in tail:
                self._close(one, now, used=False)
                self._class[one], self._weight[one], self._last[one] = kind, 1.0 / len(tail), now

    def _refresh(self, now: float) -> None:
        live = np.flatnonzero(self._class >= 0)
        kinds, ages = self._class[live], now - self._last[live]
        buckets = np.minimum(np.searchsorted(self._edges, ages), BUCKETS - 1)
        ends = self._closed.copy()
        np.add.at(ends, (kinds, buckets), self._weight[live])
        behind = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - ends
        exposure = (behind + 0.5 * ends) * self._steps
        events, exposure = _smooth(self._events), _smooth(exposure)
        middles = self._middle_parents
        pool_e, pool_x = events.sum(axis=0), exposure.sum(axis=0)
        centre = np.sqrt(np.concatenate([[self._edges[0] / 2], self._edges[:-1]]) * self._edges)
        pool = _hazard(pool_e, pool_x, 0.3 / centre, 20, self._steps)
        coarse_e, coarse_x = np.zeros((COARSE + DEAD, BUCKETS)), np.zeros((COARSE + DEAD, BUCKETS))
        np.add.at(coarse_e, middles, events)
        np.add.at(coarse_x, middles, exposure)
        coarse = _hazard(coarse_e, coarse_x, pool, 1, self._steps)
        hazard = _hazard(events, exposure, coarse[middles], 100, self._steps)
        self._index = _gittins(hazard, self._steps)

    _middle_parents = np.concatenate([np.repeat(np.arange(COARSE), TURNS), COARSE + np.arange(DEAD)])

    @property
    def _now_of_request(self) -> float:
        return self.began

    began = 0.0
    """When the running request came."""

    def _worth(self, rows: Sequence[int]) -> Any:
        slots = np.fromiter((self._row_slot[row] for row in rows), np.int64, len(rows))
        ages = np.maximum(0.0, self._now() - self._last[slots])
        buckets = np.minimum(np.searchsorted(self._edges, ages), BUCKETS - 1)
        kinds = self._class[slots]
        worth = np.where(kinds >= 0, self._index[kinds, buckets], np.inf)
        return worth * (1 - 1e-9 * np.minimum(ages, 1e6))


def _smooth(table: Any) -> Any:
    wide = np.pad(table, ((0, 0), (1, 1)))
    return 0.5 * wide[:, :-2] + table + 0.5 * wide[:, 2:]


def _hazard(events: Any, exposure: Any, parent: Any, weight: float, steps: Any) -> Any:
    return (events + weight * steps * parent) / (exposure + weight * steps)


def _gittins(hazard: Any, steps: Any) -> Any:
    """For each class and age: the greatest chance of a use before some horizon, divided by the time held until then."""
    index = np.zeros_like(hazard)
    gone = hazard * steps
    lasting = np.where(gone > 1e-9, (1 - np.exp(-gone)) / np.maximum(hazard, 1e-300), steps)
    for age in range(hazard.shape[1]):
        survives = np.exp(-np.cumsum(gone[:, age:], axis=1))
        before = np.concatenate([np.ones((len(hazard), 1)), survives[:, :-1]], axis=1)
        held = np.cumsum(before * lasting[:, age:], axis=1)
        index[:, age] = ((1 - survives) / held).max(axis=1)
    return index


class Learning(Simulation):
    """A simulation that tells its policy where requests begin."""

    def __init__(self, capacity: Capacity) -> None:
        self.policies: list[Learned] = []

        def made(now: Callable[[], float]) -> Callable[[int], Table]:
            def table(shards: int) -> Table:
                self.policies.append(Learned(now, capacity.blocks))
                return Table(shards, self.policies[-1])

            return table

        replays.POLICIES["learned"] = made
        super().__init__("learned", capacity)

    def play(self, record: Record) -> None:
        for one in self.policies:
            one.begin()
            one.began = getattr(record, "time", one.began)
        super().play(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--blocks", default="1000,2000,5000,10000,20000,40000")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for blocks in map(int, arguments.blocks.split(",")):
        found, seconds = {}, {}
        for make in (lambda size: Simulation("LRU", size), Learning):
            one = make(Capacity(blocks=blocks))
            begin = time.process_time()
            replay(Trace([arguments.trace], 0), [one], lambda requests: None)
            seconds[one.policy] = time.process_time() - begin
            found[one.policy] = one.result()
        per_block = {name: 1e6 * spent / int(str(found[name]["blocks"])) for name, spent in seconds.items()}
        ratios = {name: float(str(one["token_hit_ratio"])) for name, one in found.items()}
        rows.append({"blocks": blocks, "token_hit_ratio": ratios, "microseconds_a_block": per_block})
        if not arguments.json:
            learned = f"learned {ratios['learned']:.2%}, {per_block['learned']:.1f} us a block"
            print(
                f"{blocks:>7,} blocks: LRU {ratios['LRU']:.2%}, {per_block['LRU']:.1f} us a block; {learned}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
