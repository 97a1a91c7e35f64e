"""Accounts for every token that lookups ask for: it was found somewhere, or it is missing for a reason.

`Accounts` listens to the events of L1 and of requests. It counts each lookup once, when the engine goes on with its answer:

    requested = found in the engine, L1, a tier or with another engine + missing, by reason

What a missing chunk was before is remembered by `cache.seen`, and each lookup leaves a record (`cache.records`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from sys import byteorder
from types import MappingProxyType
from typing import NamedTuple

from lmcache.cache.claims import SERVER
from lmcache.cache.events import Event, Events
from lmcache.cache.reasons import REASONS, SOURCES
from lmcache.cache.records import Record, Records
from lmcache.cache.seen import CLEARED, ENTRY_BYTES, EVICTED, LOST, STORED, Known, Seen, keys_of
from lmcache.cache.waits import AWAITED, NO_GAIN, PAUSED, REMOVED, FetchRecord
from lmcache.chunks import HASH_BYTES

MOST_WAITING = 65536
"""Lookups that may wait at the same time; of more, the oldest are accounted as if they had not waited."""
MOST_WAIT_SECONDS = 600.0
"""A lookup that has waited for so long asks no more: its engine has gone on without telling."""
MOST_ARRIVED = 262_144
"""Chunks whose origin is noted while lookups wait; further ones count as L1's."""
MOST_FETCHES = 1024
_LATELY_SECONDS = 1.5
"""A lookup without a wait belongs to a fetch of its chunks that ended so long ago: it was not repeated for that reason."""
MOST_TOKENS = 1 << 31
_TEXT_BYTES, _COPIES_BYTES, _POSITION_BYTES = 400, 800, 300
"""Memory of an entry, at most (measured by tests/test_accounts.py)."""
PASSAGES = "passages"
"""The source of tokens with blended KV, in the record of its own that blending has."""
Run = tuple[str, int]
"""A reason, and the number of consecutive chunks that are missing for it."""
Copies = dict[str, tuple[int, float]]
"""load, store or failed_load -> tokens and seconds of the copies of a request."""
_OF_L1 = {"being filled": "being_written", "incomplete": "incomplete", "other groups": "other_groups"}
_NO_LEASE = "quarantine", "too many leases"
_DAMAGE = (
    *("not a frame", "other version", "other shard", "other size", "checksum", "truncated"),
    *("written by a newer version", "undecodable"),
)
"""The names of damage of `tiers.frame.DAMAGE`."""


class Twin(NamedTuple):
    """A first chunk with the same tokens as another one: its key, and the space and model under which it was looked up."""

    key: int
    space: int
    model: str

    def told(self, space: int) -> str:
        """Return what distinguishes it from a lookup in this space, for people."""
        if space == self.space:
            return "the same model and layout; so cache_salt, the LoRA adapter or an image differs"
        return f"model {self.model or '?'} (space {self.space}); so the model, its revision, dtype or layout differs"


class Account(NamedTuple):
    """What became of one lookup. waited: seconds. tokens: of the prompt; found, missed: tokens by source and by reason."""

    process: int
    request: str
    waited: float
    tokens: int
    found: dict[str, int]
    missed: dict[str, int]
    fetch: FetchRecord | None
    space: int = -1
    tenant: bytes = b""
    """The tenant whose prompt it was; b"" if the engine did not say."""
    first: bytes = b""
    """The hash of its first chunk; b"" if it has none."""


class Accounts:
    """All lookups of one server.

    Args:
        events: the stream to listen to.
        chunk_tokens: tokens of a chunk.
        now, wall: the clocks of events and of people.
        most_bytes: memory for records and for what has become of chunks; 0 remembers nothing, and only counts.
        tiers: the names of the tiers by their numbers, as they change.
        who: returns the engine and the model of a process.
        indexed: returns of a space, hashes and a first chunk how many of the chunks from there on the index of L1 holds, and why
            the first of them is not complete; "" if it is.
    """

    def __init__(
        self,
        events: Events,
        chunk_tokens: int,
        now: Callable[[], float],
        wall: Callable[[], float],
        most_bytes: int = 0,
        tiers: Mapping[int, str] = MappingProxyType({}),
        who: Callable[[int], tuple[str, str]] = lambda process: ("", ""),
        indexed: Callable[[int, bytes, int], tuple[str, int]] = lambda space, hashes, first: ("", 0),
    ) -> None:
        self.requested = 0
        self.found = Counter(dict.fromkeys((*SOURCES, *tiers.values()), 0))
        """Tokens by source."""
        self.missed = Counter(dict.fromkeys(REASONS, 0))
        """Tokens by reason."""
        self.blended_requests = self.blended_tokens = self.recomputed_tokens = 0
        """Prompts with blended passages, the tokens of these, and how many of them were computed again. For the prompt's lookup
        these tokens are missing, since they are no prefix."""
        self.records = Records(most_bytes * 31 // 64)
        self.waiting: OrderedDict[tuple[int, object], tuple[float, int]] = OrderedDict()
        """(process, request, or the last hash if it has no id) -> since when the lookup waits, and what L1 had then."""
        self._seen = Seen(most_bytes * 7 // 16 // ENTRY_BYTES) if most_bytes else None
        self._texts = OrderedDict[bytes, Twin]()
        """Hash of a first chunk's tokens alone -> who asked for it last and has stored it."""
        self._most_texts = most_bytes // 32 // _TEXT_BYTES
        self._chunk_tokens, self._now, self._wall, self._tiers, self._who = chunk_tokens, now, wall, tiers, who
        self._indexed = indexed
        self._arrived: dict[int, str] = {}
        """Chunks that were stored while a lookup waited -> by whom."""
        self._fetches: OrderedDict[object, FetchRecord] = OrderedDict()
        """The fetches that ended last, by the id of a request and by the last hash."""
        self._copies = OrderedDict[tuple[str, str], Copies]()
        """By engine and request: engines may give their requests the same ids."""
        self._positions = OrderedDict[tuple[str, str], int]()
        """Engine and request -> where the engine says that the prompt parts from the nearest one."""
        self._most_copies, self._most_positions = most_bytes // 32 // _COPIES_BYTES, most_bytes // 64 // _POSITION_BYTES
        self._twin: Twin | None = None
        """The twin of the lookup that is being accounted for."""
        self.on_account: list[Callable[[Account], None]] = []
        """Told of each lookup that has been accounted for."""
        self._why = ""
        """Why the first chunk was missing, of the lookup that L1 is answering."""
        events.listen(["missed"], self._missed, named=False)
        events.listen(["waits"], self._waits, named=False)
        events.listen(["answered"], self._answered, named=False)
        events.listen(["fetched"], self._fetched, named=False)
        events.listen(["stored"], self._stored)
        if self._seen is not None:
            events.listen(["evicted"], self._evicted)
            events.listen(["refused", "dropped"], self._lost)
            events.listen(["cleared"], self._cleared, named=False)

    # What has become of chunks

    def _stored(self, event: Event) -> None:
        if self._seen is not None:
            self._seen.stored(self._now(), event.hashes, event.parents)
        if self.waiting and len(self._arrived) < MOST_ARRIVED:
            source = event.tier if event.process == SERVER and event.tier else "other_engine"
            self._arrived.update(dict.fromkeys(keys_of(event.hashes), source))

    def _evicted(self, event: Event) -> None:
        assert self._seen is not None
        self._seen.evicted(self._now(), event.space, event.hashes, event.wanted_by)

    def _lost(self, event: Event) -> None:
        assert self._seen is not None
        if event.process != SERVER and event.reason != "cleared":
            self._seen.lost(self._now(), event.hashes)

    def _cleared(self, event: Event) -> None:
        assert self._seen is not None
        self._seen.cleared(self._now())

    # Lookups

    def is_uncounted(self, process: int, request: str) -> bool:
        """Return whether this request waits, so that no answer to it has been counted."""
        return (process, request) in self.waiting

    def forget(self, process: int, request: str | None = None) -> None:
        """Note that a request, or all requests of a process, have ended."""
        ended = [(process, request)] if request is not None else [key for key in self.waiting if key[0] == process]
        for key in ended:
            self.waiting.pop(key, None)
        self._forget_arrived()

    def _forget_arrived(self) -> None:
        if self._arrived and not self.waiting:
            self._arrived = {}

    def _missed(self, event: Event) -> None:
        self._why = event.reason

    def _waits(self, event: Event) -> None:
        self.waiting.setdefault(_name(event), (self._now(), event.found))
        if len(self.waiting) > MOST_WAITING:
            self.waiting.popitem(last=False)
        self._forget_old(self._now())

    def _forget_old(self, now: float) -> None:
        """Forget lookups without an id that were given up, since nobody says so."""
        while self.waiting and next(iter(self.waiting.values()))[0] < now - MOST_WAIT_SECONDS:
            self.waiting.popitem(last=False)

    def _fetched(self, event: Event) -> None:
        fetch = event.fetch
        assert fetch is not None
        for name in (fetch.prompt, *fetch.requests):
            self._fetches[name] = fetch
            self._fetches.move_to_end(name)
        while len(self._fetches) > MOST_FETCHES:
            self._fetches.popitem(last=False)

    def _answered(self, event: Event) -> None:
        now, asked, have, size, why = self._now(), event.chunks, event.have, self._chunk_tokens, self._why
        self._why, self._twin = "", None
        since, in_l1 = now, asked
        if (
            self.waiting and not event.reason
        ):  # who waits now under the name of a lookup that is told later is another one
            since, in_l1 = self.waiting.pop(_name(event), (now, asked))
        self._forget_old(now)
        tokens, own = self._tokens(event), min(have, asked)
        usable, runs, known, fetch = max(event.found, own), list[Run](), None, None
        found = {"engine": own * size} if own else {}
        if usable > own:
            for source, count in self._sources(event, own, in_l1, usable):
                found[source] = found.get(source, 0) + count * size  # a tier may be named `engine`
        self._forget_arrived()
        if usable < asked or since != now:
            fetch = self._fetch_of(event, since)
        missed: dict[str, int] = {}
        if usable < asked:
            keys = keys_of(event.hashes)
            if not usable:
                self._twin = self._twin_of(event, keys)
            runs, known = self._why_missing(event, keys, usable, why, fetch)
            for reason, count in runs:
                missed[reason] = missed.get(reason, 0) + count * size
        self._fit_end(tokens - asked * size, found, missed)
        self.requested += tokens
        for source, count in found.items():
            self.found[source] += count
        for reason, count in missed.items():
            self.missed[reason] += count
        for told in self.on_account:
            whose = event.space, event.tenant, event.hashes[:HASH_BYTES]
            told(Account(event.process, event.request, now - since, tokens, found, missed, fetch, *whose))
        if self._seen is not None:
            reason, chunk = (runs[0][0], usable) if runs else (next(iter(missed)), asked) if missed else ("", -1)
            if reason == "differs":
                chunk = self._never_seen(keys_of(event.hashes), usable, event.found)[1]
            if event.found:
                self._seen.used(
                    now, int.from_bytes(event.hashes[16 * event.found - 16 : 16 * event.found - 8], byteorder)
                )
            self._record(event, now - since, tokens, found, missed, reason, chunk, known, fetch)

    def _sources(self, event: Event, own: int, in_l1: int, usable: int) -> Iterable[tuple[str, int]]:
        """Return where the chunks behind the engine's own came from. in_l1: so many were in L1 before the lookup waited."""
        if not self._arrived or in_l1 >= usable:
            return [("l1", usable - own)]
        keys = keys_of(event.hashes)
        sources = Counter(self._arrived.get(keys[chunk], "l1") for chunk in range(max(own, in_l1), usable))
        sources["l1"] += max(0, in_l1 - own)
        return [(source, count) for source, count in sources.items() if count]

    def _fit_end(self, more: int, found: dict[str, int], missed: dict[str, int]) -> None:
        """Account for the end of a prompt that has so many more tokens than its chunks; fewer if the last one is not full."""
        if more > 0:
            for reason, count in (
                ("not_asked", more - more % self._chunk_tokens),
                ("below_chunk", more % self._chunk_tokens),
            ):
                if count:
                    missed[reason] = missed.get(reason, 0) + count
        elif more < 0:
            counted = missed or found
            last = next(reversed(counted))
            counted[last] += more

    def _twin_of(self, event: Event, keys: Sequence[int]) -> Twin | None:
        """Return who has stored the same tokens under another name, if anybody has."""
        if self._seen is None or not event.text or not keys:
            return None
        other = self._texts.get(event.text)
        if other is not None and other.key != keys[0]:
            known = self._seen.get(other.key)
            if known is not None and known.state == STORED and known.cleared is None:
                return other
        self._texts[event.text] = Twin(keys[0], event.space, self._who(event.process)[1])
        if len(self._texts) > self._most_texts:
            self._texts.popitem(last=False)
        return None

    def _tokens(self, event: Event) -> int:
        """Return the tokens of the prompt: as the engine says, if that can be true, or of the chunks asked for."""
        least = (event.chunks - 1) * self._chunk_tokens
        return event.tokens if max(0, least) < event.tokens < MOST_TOKENS else event.chunks * self._chunk_tokens

    def _fetch_of(self, event: Event, since: float) -> FetchRecord | None:
        """Return the fetch that this lookup has waited for, or for whose end it need not wait."""
        names: tuple[object, ...] = event.request, event.hashes[-HASH_BYTES:]
        for name in names:
            fetch = self._fetches.get(name) if name else None
            if fetch is None or fetch.ended < since - _LATELY_SECONDS:
                continue
            if event.hashes.find(fetch.prompt) >= 0:  # else another engine's request has the same id
                return fetch
        return None

    # Copies

    def copied(self, engine: str, request: str, kind: str, tokens: int, seconds: float, shard: int) -> None:
        """Note that the rank of a shard has copied tokens of an engine's request; the first shard stands for all. kind: load,
        store, or failed_load."""
        if shard or not request or self._seen is None:
            return
        copies = self._copies.setdefault((engine, request), {})
        before, took = copies.get(kind, (0, 0.0))
        copies[kind] = before + tokens, took + seconds
        self._copies.move_to_end((engine, request))
        if len(self._copies) > self._most_copies:
            self._copies.popitem(last=False)

    def copies_of(self, requests: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Copies]:
        """Return the copies of these requests of engines, as far as they are still remembered."""
        return {name: dict(found) for name in requests if (found := self._copies.get(name))}

    def differs(self, engine: str, request: str, token: int) -> None:
        """Note that a prompt differs from the nearest one that its engine knows from this token on."""
        if self._seen is None or not request or not 0 <= token < MOST_TOKENS:
            return
        self._positions[engine, request] = token
        self._positions.move_to_end((engine, request))
        if len(self._positions) > self._most_positions:
            self._positions.popitem(last=False)

    def position_of(self, record: Record) -> int:
        """Return the token from which on the prompt of this record differs from the nearest known one; -1 if that is unknown, or
        not the reason why its first missing chunk was not found."""
        is_new = record.reason in ("differs", "never_seen")
        token = self._positions.get((record.engine, record.request), -1) if is_new else -1
        return token if 0 <= token < record.tokens and token // record.chunk_tokens == record.chunk else -1

    def blended(self, process: int, request: str, space: int, passages: int, tokens: int, again: int) -> None:
        """Note that an engine has used the KV of passages in a prompt, and computed some of their tokens `again`."""
        if not (0 < passages < MOST_TOKENS and 0 <= again <= tokens < MOST_TOKENS):
            return
        self.blended_requests += 1
        self.blended_tokens += tokens
        self.recomputed_tokens += again
        if self._seen is not None:
            engine, model = self._who(process)
            found = {PASSAGES: tokens}
            record = Record(
                *(self.records.count + 1, request, self._wall(), engine, model, space, tokens, self._chunk_tokens),
                *(0.0, found, {}),
                blended={"passages": passages, "recomputed": again},
            )
            self.records.add(record)

    # Reasons

    def _why_missing(
        self, event: Event, keys: Sequence[int], first: int, why: str, fetch: FetchRecord | None
    ) -> tuple[list[Run], Known | None]:
        """Return the reasons of the chunks from number `first` on, each with how many chunks, and what is known of the first.
        why: why the first chunk was missing that is not in L1."""
        asked = len(keys)
        if why in _NO_LEASE:
            return [("no_lease", asked - first)], None
        ours = _fetch_reason(fetch) if fetch is not None else ""
        at = first
        if fetch is not None and ours:  # what was planned and has not arrived
            at = max(first, min(asked, fetch.l1_chunks + fetch.planned.total()))
        runs: list[Run] = [(ours, at - first)] if at > first else []
        own, count = self._indexed(event.space, event.hashes, at) if at < asked else ("", 0)
        if (
            count
        ):  # complete ones are missing for what is wrong with an earlier one or in another group, or came just now
            runs.append((_OF_L1.get(own or why) or ours or "being_written", count))
            at += count
        if self._seen is None:
            return runs + [("not_found", asked - at)] * (at < asked), None
        for state, count in self._seen.runs(keys, at):
            runs.append((_gone_reason(state, fetch) or (runs[-1][0] if runs else "not_found"), count))
            at += count
        if at < asked:
            runs.append((self._never_seen(keys, at, event.found)[0], asked - at))
        return runs, self._seen.get(keys[first])

    def _never_seen(self, keys: Sequence[int], chunk: int, in_l1: int) -> tuple[str, int]:
        """Return the reason of a chunk that was never stored, and the first chunk of the prompt that was not. A chunk
        that follows one that was never stored was not stored either. Those in L1 were stored, even if `seen` has forgotten it."""
        seen = self._seen
        assert seen is not None
        first = bisect_left(range(chunk), True, lo=min(in_l1, chunk), key=lambda one: seen.get(keys[one]) is None)
        before = seen.get(keys[first - 1]) if first else None
        if (
            before is None and first
        ):  # it is older than all that is remembered, and still used: many prompts begin with it
            return "differs", first
        if before is None:
            return "other_identity" if self._twin is not None else "never_seen", chunk
        return "differs" if before.continued else "longer", first

    # Records

    def _record(
        self, event: Event, waited: float, tokens: int, found: dict[str, int], missed: dict[str, int],
        reason: str, chunk: int, known: Known | None, fetch: FetchRecord | None,
    ) -> None:  # fmt: skip
        wall, gone, used, wanted_by, told = self._wall(), 0.0, 0.0, -1, ""
        if known is not None and reason in (
            "evicted",
            "cleared",
            "not_stored",
            "tier_down",
            "tier_removed",
            "tier_paused",
            "tier_slow",
        ):
            offset, wanted_by = wall - self._now(), known.wanted_by
            gone = offset + (known.when if known.state in (EVICTED, LOST) or known.cleared is None else known.cleared)
            used = offset + known.used if known.used is not None else 0.0
        if self._twin is not None and reason == "other_identity":
            told = self._twin.told(event.space)
        engine, model = self._who(event.process)
        self.records.add(
            Record(
                *(self.records.count + 1, event.request, wall, engine, model, event.space, tokens, self._chunk_tokens),
                *(round(waited, 6) if waited else 0.0, found, missed, reason, chunk, gone, used, wanted_by),
                {} if fetch is None else self._described(fetch),
                told,
            )
        )

    def _described(self, fetch: FetchRecord) -> dict[str, object]:
        def name(tier: int) -> str:
            return "other engines" if tier == AWAITED else self._tiers.get(tier, REMOVED)

        return {
            "outcome": fetch.outcome,
            "decision": fetch.decision,
            "expected_seconds": _finite(fetch.expected_seconds),
            "recompute_seconds": _finite(fetch.recompute_seconds),
            "waited_seconds": round(fetch.waited_seconds, 6),
            "l1_chunks": fetch.l1_chunks,
            "arrived_chunks": fetch.arrived_chunks,
            "planned_chunks": {name(tier): chunks for tier, chunks in fetch.planned.items()},
            "left_out": {name(tier): why for tier, why in fetch.left_out.items()},
            "events": dict(islice(fetch.events.items(), 16)),
        }


def _name(event: Event) -> tuple[int, object]:
    return event.process, event.request or event.hashes[-HASH_BYTES:]


def _finite(seconds: float | None) -> float | None:
    return None if seconds is None or seconds > 1e9 else round(seconds, 6)


def _gone_reason(state: int, fetch: FetchRecord | None) -> str:
    """Return why a chunk with this state (`Seen.runs`) is not in L1; "" if it should be."""
    if state != EVICTED:
        return {LOST: "not_stored", CLEARED: "cleared"}.get(state, "")
    whys = set(fetch.left_out.values()) if fetch is not None and not fetch.planned else set()
    if whys & {"not serving", "failed"}:
        return "tier_down"
    if whys & {REMOVED, PAUSED}:
        return "tier_removed" if REMOVED in whys else "tier_paused"
    if fetch is not None and fetch.outcome == "too many":
        return "tier_busy"
    return "tier_slow" if "late answer" in whys else "tier_not_worth" if whys else "evicted"


def _fetch_reason(fetch: FetchRecord) -> str:
    """Return why the planned chunks of a fetch that have not arrived are missing; "" if nothing was planned for them."""
    of_tiers = fetch.planned.total() - fetch.planned[AWAITED]  # they come first, as a rule
    awaited = AWAITED in fetch.planned and fetch.arrived_chunks >= of_tiers
    if fetch.outcome == "failed" or (fetch.outcome == "late" and not awaited):
        failures = {name.partition(":")[2] for name in fetch.events if name.startswith("load_failed")}
        if failures & set(_DAMAGE):
            return "damaged"
        if REMOVED in fetch.left_out.values():
            return "tier_removed"
        return "tier_down" if fetch.outcome == "failed" else "tier_slow"
    if awaited and fetch.outcome in (NO_GAIN, "late", "patience"):
        return "awaited_in_vain"
    return {
        NO_GAIN: "tier_not_worth",
        "patience": "tier_slow",
        "promise ended": "awaited_in_vain",
    }.get(fetch.outcome, "")
