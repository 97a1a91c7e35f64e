"""Loads from tiers: carries out what the fetches have decided.

Extents in L1 are reserved as the process SERVER, a `TierRunner` for each tier moves the bytes, and the outcomes are reported back
to the fetches. Everything runs in the loop's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache.cache import L1, SERVER, Refusal
from lmcache.cache.events import Event
from lmcache.cache.fetch import Ask, Ended, Fetches
from lmcache.cache.waits import REMOVED, FetchRecord, Load
from lmcache.chunks import split_hashes
from lmcache.memory.slabs import NO_EXTENT
from lmcache.server.loop import Loop
from lmcache.server.tier_contents import complete_chunks, shard_keys
from lmcache.server.tier_report import log_decision
from lmcache.server.tier_runner import TierRunner
from lmcache.server.tier_writes import TIER_FAILED, Writes, emit_outcomes, let_go
from lmcache.tiers import OK, ShardKey

_TOO_LATE = "too late"
"""Outcome of the shards of a load that ended after its reservations had expired."""
_LOAD = "loaded", "load_failed"
"""Kinds of events: of good outcomes, and of the others."""


@dataclass(frozen=True)
class _Part:
    """One rank's part of a load: reserved extents at `sectors`, for the shards `keys`."""

    reservation: int
    keys: list[ShardKey]
    sectors: list[int]
    shard_bytes: int


class Loads:
    """The loads of these fetches. runners: by the numbers of their tiers. leaving: tiers that are not asked any more.
    patience_seconds: until a question is cancelled."""

    def __init__(
        self,
        loop: Loop,
        l1: L1,
        fetches: Fetches,
        writes: Writes,
        runners: Mapping[int, TierRunner],
        leaving: Sequence[TierRunner],
        patience_seconds: float,
    ) -> None:
        self._loop, self._l1, self._fetches, self._writes = loop, l1, fetches, writes
        self._by_number, self._leaving, self._patience_seconds = runners, leaving, patience_seconds
        self._late_loads = set[int]()
        """Numbers of loads that are still running after their deadline."""

    def carry_out(self) -> None:
        """Do what the fetches have decided."""
        while self._fetches.effects and not self._writes.closed:
            effect = self._fetches.effects.pop(0)  # removed first, so that a failing effect does not repeat
            if isinstance(effect, Ask):
                self._ask(effect)
            elif isinstance(effect, Load):
                self._load(effect)
            elif isinstance(effect, Ended):
                self._tell(effect.record)
            else:
                log_decision(effect)

    def _tell(self, fetch: FetchRecord) -> None:
        requests = next(iter(fetch.requests), "")
        missing = fetch.asked_chunks - fetch.l1_chunks
        self._l1.events.tell(
            Event("fetched", fetch.space, missing, fetch.outcome, SERVER, request=requests, fetch=fetch)
        )

    def _ask(self, ask: Ask) -> None:
        runner, space = self._by_number[ask.tier], self._l1.space(ask.space)
        if space is None or runner in self._leaving:
            self._fetches.answered(self._loop.now(), ask.fetch, ask.tier, None, 0.0)
            return
        keys, shards = shard_keys(space, ask.hashes), space.shards

        def done(present: list[bool] | None, error: Exception | None, seconds: float) -> None:
            complete = None if present is None else complete_chunks(present, shards)
            self._fetches.answered(self._loop.now(), ask.fetch, ask.tier, complete, seconds)
            self.carry_out()

        runner.contains(keys, self._patience_seconds, done)

    def _load(self, load: Load) -> None:
        runner = self._by_number[load.tier]
        parts = [] if runner in self._leaving else self._reserve(load)
        if not parts:
            self._loop.call_soon(lambda: self._loaded(runner, load, [], None))
            return
        keys, by = [key for part in parts for key in part.keys], (SERVER, runner.name, load.request)
        into = [self._l1.view(sector, part.shard_bytes) for part in parts for sector in part.sectors]

        paced = runner.tier.is_paced(keys)

        def late() -> None:  # the reservations have expired, so what arrives from now on is not used
            self._late_loads.add(load.number)
            runner.count("missed", _TOO_LATE, len(keys))
            emit_outcomes(self._l1.events, _LOAD, load.space, by, keys, [_TOO_LATE] * len(keys))
            self._fetches.late(load)

        def done(outcomes: list[str] | None, error: Exception | None, seconds: float) -> None:
            let_go(into)
            self._loaded(runner, load, parts, outcomes, paced)

        runner.load(keys, into, self._l1.claim_seconds, late, done)

    def _reserve(self, load: Load) -> list[_Part]:
        """Reserve extents for a load. Shards that are in L1 or being filled already are left out."""
        space, parts = self._l1.space(load.space), []
        if space is None:
            return []
        for shard in range(space.shards):
            now, tier = self._loop.now(), self._by_number[load.tier].name
            try:
                grant = self._l1.reserve(
                    now, SERVER, load.space, shard, load.parent, load.root, load.hashes, tier, load.request
                )
            except Refusal:  # no memory can be allocated for extents
                continue
            if not grant.reservation:
                continue
            sectors = array("I", grant.extents)
            keys = [
                ShardKey(space.fingerprint, chunk, shard, space.shards)
                for chunk, sector in zip(split_hashes(load.hashes), sectors, strict=True)
                if sector != NO_EXTENT
            ]
            extents = [sector for sector in sectors if sector != NO_EXTENT]
            parts.append(_Part(grant.reservation, keys, extents, space.shard_bytes[shard]))
        return parts

    def _loaded(
        self, runner: TierRunner, load: Load, parts: list[_Part], outcomes: list[str] | None, paced: bool = True
    ) -> None:
        """Commit the shards that have arrived. outcomes: one for each shard; None if the tier failed. paced: whether its time
        shows how fast the tier is."""
        at, good_bytes = 0, 0
        by, failure = (SERVER, runner.name, load.request), REMOVED if runner in self._leaving else TIER_FAILED
        for part in parts:
            own = outcomes[at : at + len(part.sectors)] if outcomes is not None else [failure] * len(part.sectors)
            at += len(part.sectors)
            failed = {sector for sector, outcome in zip(part.sectors, own, strict=True) if outcome != OK}
            try:
                self._l1.commit(self._loop.now(), SERVER, part.reservation, len(failed) < len(own), failed)
            except Refusal:  # the reservation has expired, and others may be filling the chunks
                failed, own = set(part.sectors), [_TOO_LATE] * len(own)
            good = len(own) - len(failed)
            good_bytes += good * part.shard_bytes
            runner.counters["loaded_shards"] += good
            if load.number not in self._late_loads:
                emit_outcomes(self._l1.events, _LOAD, load.space, by, part.keys, own)
                for outcome in own:
                    if outcome != OK:
                        runner.count("missed", outcome)
        self._late_loads.discard(load.number)
        runner.counters["loaded_bytes"] += good_bytes
        self._fetches.loaded(self._loop.now(), load, None if (outcomes is None or not paced) and parts else good_bytes)
        self.carry_out()
