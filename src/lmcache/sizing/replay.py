"""Replays a trace through the heart of L1 by the trace's own clock: what would this memory, with this policy, have found?

The heart, its index and its policies are those of the server; only the arena is missing, so no byte of KV is needed or moved.
A request's lookup finds the longest prefix that is complete, and what it lacks is stored: at once or, in a trace of our own,
when the recorded server stored it. What that server had and this memory lacks is stored at once, as if it was computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from lmcache.cache import Heart, Refusal
from lmcache.cache.table import Habits, Table
from lmcache.chunks import HASH_BYTES
from lmcache.errors import ConfigError
from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.sizing.trace import Cleared, Lookup, Lost, Opened, Record, Replied, Stored

DEFAULT = "LRU"
"""The policy of `lmcache server`, which `default` stands for."""


def _learning(now: Callable[[], float]) -> Callable[[int], Table]:
    habits = Habits()
    return lambda shards: Table(shards, habits)


POLICIES: dict[str, Callable[[Callable[[], float]], Callable[[int], Table]]] = {
    "LRU": lambda now: Table,
    "learned": _learning,
}
"""Name -> from the trace's clock to what makes the table of a space."""
FIRST_TOKEN_SECONDS, TOKEN_SECONDS = 0.5, 0.03
"""When an answer ends, which traces of others do not tell: so long after its request, and so much for each token."""
_PROCESS = 1
_BLOCK_BYTES = SECTOR_BYTES
"""Of a block where memory is counted in blocks."""


def policy_named(name: str) -> str:
    """Return the name of the policy as in `POLICIES`, in whatever case it was written.

    Raises:
        ConfigError: there is no such policy.
    """
    known = {one.lower(): one for one in POLICIES} | {"default": DEFAULT}
    if name.lower() not in known:
        raise ConfigError(f"--eviction-policy {name}: unknown; known: {', '.join([*POLICIES, 'default'])}")
    return known[name.lower()]


def is_policy(name: str) -> bool:
    """Return whether there is a policy of this name."""
    return name.lower() in ("default", *map(str.lower, POLICIES))


class Capacity(NamedTuple):
    """The memory of a simulation: `blocks` blocks, or `gib` GiB in which a token takes `bytes_per_token`; 0 for what the trace
    says."""

    blocks: int = 0
    gib: float = 0.0
    bytes_per_token: int = 0

    @property
    def total_bytes(self) -> int:
        return self.blocks * _BLOCK_BYTES or int(self.gib * 2**30)


@dataclass
class Counts:
    """What a simulation has counted."""

    requests: int = 0
    blocks: int = 0
    hit_blocks: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    refused_blocks: int = 0
    """Blocks that were not stored: the rest of a prompt that does not fit, or whose beginning has been evicted meanwhile."""


class Simulation:
    """One memory with one policy. `policy` is a key of `POLICIES`."""

    def __init__(self, policy: str, capacity: Capacity) -> None:
        self.policy, self.capacity, self.counts = policy, capacity, Counts()
        self._time = 0.0
        table = POLICIES[policy](lambda: self._time)
        self.heart = Heart(capacity.total_bytes, new_table=table)
        self.heart.join(_PROCESS, "replay")
        self._spaces: dict[int, tuple[int, int]] = {}
        """Number in the trace -> number in the heart, tokens of a chunk."""
        self._answers: list[tuple[float, int, bytes, int]] = []
        """A heap of (end, number in the heart, last hash of the prompt, tokens) of answers that have not ended."""

    def play(self, record: Record) -> None:
        """Do what the record says, after the answers that have ended before it.

        Raises:
            ConfigError: the trace does not tell how much memory a chunk takes, or not even one chunk fits.
        """
        if isinstance(record, Lookup):
            self._answer(record.time)
            self._lookup(record)
        elif isinstance(record, Stored):
            self._time = record.time
            space, _ = self._space(record.space)
            self._store(space, record.parent, record.hashes)
        elif isinstance(record, Replied):
            self._time = record.time
            self.heart.answered(record.time, _PROCESS, self._space(record.space)[0], record.last, record.tokens)
        elif isinstance(record, Opened):
            self._open(record)
        elif isinstance(record, Cleared):
            self.heart.clear()

    def _space(self, number: int) -> tuple[int, int]:
        found = self._spaces.get(number)
        if found is None:
            raise ConfigError(
                f"the trace uses space {number} before it has said what that is: begin with the first file"
            )
        return found

    def _open(self, opened: Opened) -> None:
        size = _BLOCK_BYTES
        if not self.capacity.blocks:
            size = self.capacity.bytes_per_token * opened.chunk_tokens or opened.chunk_bytes
            if not size:
                raise ConfigError(
                    "--l1-size-gb: this trace does not tell how much memory a token takes: pass --bytes-per-token, which "
                    "`lmcache size` computes, or --capacity-blocks"
                )
        name = opened.space.to_bytes(8, "little") + size.to_bytes(8, "little")
        try:
            number = self.heart.open_space(_PROCESS, name, 1, 0, size)
        except Refusal as error:
            raise ConfigError(f"--l1-size-gb {self.capacity.gib:g}: {error}") from None
        self._spaces[opened.space] = number, opened.chunk_tokens

    def _lookup(self, record: Lookup) -> None:
        hashes, counts = record.hashes, self.counts
        self._time = record.time
        space, chunk_tokens = self._space(record.space)
        asked = len(hashes) // HASH_BYTES
        found = self.heart.lookup(record.time, _PROCESS, space, hashes, asked).chunks
        counts.requests += 1
        counts.blocks += asked
        counts.hit_blocks += found
        counts.tokens += record.tokens
        counts.hit_tokens += min(found * chunk_tokens, record.tokens)
        if record.answer and asked:
            ends = record.time + FIRST_TOKEN_SECONDS + TOKEN_SECONDS * record.answer
            heappush(self._answers, (ends, space, hashes[-HASH_BYTES:], record.answer))
        end = HASH_BYTES * (asked if record.found < 0 else record.found)
        if found * HASH_BYTES < end:
            at = found * HASH_BYTES
            self._store(space, hashes[at - HASH_BYTES : at] if at else b"", hashes[at:end])

    def _answer(self, until: float) -> None:
        """Tell the heart of the answers that have ended by then."""
        while self._answers and self._answers[0][0] <= until:
            time, space, last, tokens = heappop(self._answers)
            self.heart.answered(time, _PROCESS, space, last, tokens)

    def _store(self, space: int, parent: bytes, hashes: bytes) -> None:
        heart, time = self.heart, self._time
        grant = heart.reserve(time, _PROCESS, space, 0, parent, not parent, hashes)
        self.counts.refused_blocks += grant.refused
        if grant.reservation:
            heart.commit(time, _PROCESS, grant.reservation, True)

    def result(self) -> dict[str, object]:
        """Return what has been counted, as JSON has it."""
        counts = self.counts
        counts.evicted_blocks = self.heart.events.counters["evicted"]
        memory: dict[str, object] = {"capacity_blocks": self.capacity.blocks}
        if not self.capacity.blocks:
            memory = {"l1_size_gb": self.capacity.gib}
        return {
            "policy": self.policy,
            **memory,
            "block_hit_ratio": _ratio(counts.hit_blocks, counts.blocks),
            "token_hit_ratio": _ratio(counts.hit_tokens, counts.tokens),
            **vars(counts),
        }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


@dataclass
class Summary:
    """What the trace itself tells."""

    requests: int = 0
    first_time: float = 0.0
    last_time: float = 0.0
    recorded_blocks: int = 0
    recorded_hit_blocks: int = 0
    """Of lookups for which the recorded server has noted what it had."""
    lost_events: int = 0
    answers: int = 0
    """Requests of which the trace tells how long their answers were."""

    def note(self, record: Record) -> None:
        if isinstance(record, Lookup):
            if not self.requests:
                self.first_time = record.time
            self.requests += 1
            self.answers += record.answer > 0
            self.last_time = record.time
            if record.found >= 0:
                self.recorded_blocks += len(record.hashes) // HASH_BYTES
                self.recorded_hit_blocks += record.found
        elif isinstance(record, Replied):
            self.answers += 1
        elif isinstance(record, Lost):
            self.lost_events += record.events

    def as_json(self) -> dict[str, object]:
        told: dict[str, object] = {
            "requests": self.requests,
            "seconds": round(self.last_time - self.first_time, 3),
            "lost_events": self.lost_events,
            "answers": self.answers,
        }
        if self.recorded_blocks:
            told["recorded_block_hit_ratio"] = _ratio(self.recorded_hit_blocks, self.recorded_blocks)
        return told


def replay(trace: Iterable[Record], simulations: Sequence[Simulation], every: Callable[[int], None]) -> Summary:
    """Play all records in all simulations; call `every` with the number of requests after each record of a request."""
    summary, play = Summary(), [one.play for one in simulations]
    for record in trace:
        summary.note(record)
        for one in play:
            one(record)
        every(summary.requests)
    return summary
