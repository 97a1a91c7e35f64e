"""Prefetches load prompts from tiers into L1 because an operator wants it, not because a request waits.

A prefetch looks a prompt up as an engine does (`Tiering.wait_for`), one slice after the other, so that it never has more loads
under way than a slice. It ends when all of the prompt is there, when a slice brings nothing, or when it is cancelled. Everything
runs in the loop's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmcache.cache import L1, SERVER, Event, Refusal
from lmcache.cache.promises import Asker
from lmcache.cache.waits import FetchRecord
from lmcache.chunks import HASH_BYTES
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.server.named import Named, Unknown
from lmcache.server.tiering import Tiering

logger = init_logger(__name__)
MOST_RUNNING = 8
KEPT = 100
"""How many ended prefetches are remembered."""
SLICE_BYTES = 256 << 20
_LARGEST = 2
"""A prefetch may take at most 1/2 of L1."""
_TRIES = 3
"""A slice that has brought nothing is tried again so often, since a tier may have been busy or slow for a moment."""
_RETRY_SECONDS = 1.25
"""Longer than a fetch that has ended is remembered."""
_NO_ROOM = (
    "L1 has no room for the rest: all it holds is pinned (GET /cache/pins) or in use by engines; "
    "end pins, or raise --l1-size-gb"
)
_NO_ENGINE = "no engine with this model is connected, and L1 loads nothing for one that has gone: prefetch while one is connected"
_UNDELIVERED = "failed", "late", "patience"
"""How a fetch ends whose tier has said that it has the chunks."""
_READABLE = "serving", "serves in part", "stores fail"
"""The states of tiers that say nothing against loads."""
LOADING, DONE, PARTIAL, ABSENT, CANCELLED, FAILED = "loading", "done", "partial", "absent", "cancelled", "failed"


@dataclass(eq=False)
class Prefetch:
    name: str
    wanted: Named
    chunk_tokens: int
    step: int
    """Chunks of a slice."""
    pin_seconds: float
    note: str
    began: float
    before: int
    """So many leading chunks were in L1 at the beginning."""
    state: str = LOADING
    reason: str = ""
    found: int = 0
    """So many leading chunks are in L1."""
    end: int = 0
    """Where the slice ends that is loaded now."""
    tries: int = 0
    retry_at: float = 0.0
    pin: str = ""
    ended: float = 0.0

    @property
    def chunks(self) -> int:
        return len(self.wanted.hashes) // HASH_BYTES

    @property
    def request(self) -> str:
        """The name of its lookups, for the records of fetches."""
        return f"prefetch {self.name}"

    def described(self, now: float) -> dict[str, object]:
        """Return the state as JSON."""
        one, size = self.wanted, self.chunk_tokens
        had = one.tokens_of(self.before, size)
        told: dict[str, object] = {
            "id": self.name,
            "state": self.state,
            "model": one.model.name,
            "tokens": one.tokens_of(self.chunks, size),
            "l1_tokens": one.tokens_of(self.found, size),
            "loaded_tokens": max(0, one.tokens_of(self.found, size) - had),
            "seconds": round((self.ended or now) - self.began, 3),
            "note": self.note,
        }
        return told | ({"reason": self.reason} if self.reason else {}) | ({"pin": self.pin} if self.pin else {})


class Prefetches:
    """The prefetches of a server. pin: pins what a prefetch has loaded, for so many seconds and with a note."""

    def __init__(self, loop: Loop, l1: L1, tiering: Tiering | None, pin: Callable[[Named, float, str], str]) -> None:
        self._loop, self._l1, self._tiering, self._pin = loop, l1, tiering, pin
        self._running: dict[str, Prefetch] = {}
        self._ended: OrderedDict[str, Prefetch] = OrderedDict()
        self._scheduled = False
        l1.events.listen(["stored"], self._heard, named=False)
        loop.on_tick.append(self._step_all)

    @property
    def running(self) -> int:
        """How many prefetches run."""
        return len(self._running)

    def begin(self, name: str, wanted: Named, chunk_tokens: int, pin_seconds: float, note: str) -> dict[str, object]:
        """Begin a prefetch.

        Raises:
            Refusal: too many of them run, the prompt is too large for L1, or its model's KV has never been stored here.
        """
        if len(self._running) >= MOST_RUNNING:
            raise Refusal(f"{MOST_RUNNING} prefetches run already: wait for one of them, or cancel it")
        before = self._l1.usable(wanted.model.spaces, wanted.hashes)
        spaces = [one for one in map(self._l1.space, wanted.model.spaces) if one is not None]
        if not all(all(one.shard_bytes) for one in spaces):
            raise Refusal(
                f"the ranks of {wanted.model.name} have not connected yet, so the size of its KV is unknown: try again"
            )
        chunks, chunk_bytes = len(wanted.hashes) // HASH_BYTES, sum(one.chunk_bytes for one in spaces)
        needed, most = chunks * chunk_bytes, self._l1.total_bytes // _LARGEST
        if needed > most:
            raise Refusal(
                f"the prompt takes {needed / 2**20:,.1f} MiB, and a prefetch may take {most / 2**20:,.1f} MiB, half of L1: name "
                "its beginning only, or raise --l1-size-gb"
            )
        # The groups of a model agree at the prompt's end only, so its slices cannot be loaded one after the other.
        step = chunks if len(spaces) > 1 else max(1, SLICE_BYTES // max(1, chunk_bytes))
        one = Prefetch(name, wanted, chunk_tokens, step, pin_seconds, note, self._loop.now(), before, found=before)
        self._running[name] = one
        self._step(one)
        return one.described(self._loop.now())

    def described(self) -> list[dict[str, object]]:
        """Return all that run, and those that have ended last, the latest first."""
        now = self._loop.now()
        return [one.described(now) for one in (*self._running.values(), *reversed(self._ended.values()))]

    def describe(self, name: str) -> dict[str, object]:
        """Raises Unknown: there is no prefetch of this name."""
        return self._of(name).described(self._loop.now())

    def cancel(self, name: str) -> dict[str, object]:
        """End a prefetch that runs: its queued loads are dropped, and those that run go on. Raises what `describe` does."""
        one = self._of(name)
        if one.state == LOADING:
            self._finish(one, CANCELLED)
        return one.described(self._loop.now())

    def _of(self, name: str) -> Prefetch:
        found = self._running.get(name) or self._ended.get(name)
        if found is None:
            raise Unknown(f"{name[:40]}: there is no such prefetch; the last {KEPT} that have ended are remembered")
        return found

    def _heard(self, event: Event) -> None:
        """Go on soon, since something has arrived. Not now: a listener must not call L1."""
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._running and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._step_all)

    def _step_all(self) -> None:
        self._scheduled = False
        for one in list(self._running.values()):
            self._step(one)

    def _step(self, one: Prefetch) -> None:
        try:
            self._load(one)
        except Refusal as error:
            self._finish(one, FAILED, str(error))

    def _load(self, one: Prefetch) -> None:
        """Go on with the slice that is being loaded, or with the next one."""
        assert self._tiering is not None
        now = self._loop.now()
        if now < one.retry_at:
            return
        one.end = max(one.end, min(one.chunks, one.found + one.step))
        asker = Asker(SERVER, one.request)
        found, coming = self._tiering.wait_for(
            asker, one.wanted.model.spaces, one.wanted.hashes[: one.end * HASH_BYTES], 0.0
        )
        if found > one.found:
            one.found, one.tries = found, 0
        if coming:
            return
        if found >= one.chunks:
            self._finish(one, DONE)
        elif found >= one.end:
            one.end = min(one.chunks, found + one.step)
            self._go_on_soon()
        elif one.tries + 1 < _TRIES:
            one.tries, one.retry_at = one.tries + 1, now + _RETRY_SECONDS
        elif self._was_refused(one, "no room"):
            self._finish(one, PARTIAL if found else FAILED, _NO_ROOM)
        elif self._was_refused(one, "no engine"):
            self._finish(one, PARTIAL if found else FAILED, _NO_ENGINE)
        elif troubles := "; ".join(self._troubles(one)):
            reason = f"tiers that may have the rest have not delivered it: {troubles}; GET /fetches says what each did"
            self._finish(one, PARTIAL if found else FAILED, reason)
        else:
            self._finish(
                one, PARTIAL if found else ABSENT, "no tier has delivered the rest; GET /fetches says what each did"
            )

    def _last_fetch(self, one: Prefetch) -> FetchRecord | None:
        """Return the record of the fetch of the last slice. Only so many records are kept."""
        assert self._tiering is not None
        of_it = (record for record in reversed(self._tiering.fetches.records) if one.request in record.requests)
        return next(of_it, None)

    def _was_refused(self, one: Prefetch, reason: str) -> bool:
        """Return whether L1 refused what a tier had for the last slice, for this reason."""
        last = self._last_fetch(one)
        return last is not None and bool(last.events[f"refused:{reason}"])

    def _troubles(self, one: Prefetch) -> Iterator[str]:
        """Yield what is wrong with each tier that has not said what it has of the last slice, or has not delivered it."""
        assert self._tiering is not None
        now, last = self._loop.now(), self._last_fetch(one)
        for runner in self._tiering.runners:
            why = last.left_out.get(runner.number, "") if last is not None else ""
            if last is not None and runner.number in last.planned and last.outcome in _UNDELIVERED:
                why = f"its load ended as: {last.outcome}"
            if not why and runner.usable(now):
                continue
            state, reason = runner.state(now)
            known = ": ".join(filter(None, (state, reason))) if state not in _READABLE else ""
            yield f"{runner.name} ({known or runner.why_silent(now) or why or runner.why_not_usable()})"

    def _finish(self, one: Prefetch, state: str, reason: str = "") -> None:
        assert self._tiering is not None
        one.state, one.reason, one.ended = state, reason, self._loop.now()
        self._running.pop(one.name, None)
        self._tiering.fetches.withdraw(one.ended, SERVER, one.request)
        self._ended[one.name] = one
        if len(self._ended) > KEPT:
            self._ended.popitem(last=False)
        if one.pin_seconds and state in (DONE, PARTIAL):
            try:
                one.pin = self._pin(one.wanted, one.pin_seconds, one.note)
            except Refusal as error:
                one.reason = f"{reason}; not pinned: {error}".lstrip("; ")
        logger.info("Prefetch %s of %s: %s, %d chunks in L1", one.name, one.wanted.model.name, state, one.found)
