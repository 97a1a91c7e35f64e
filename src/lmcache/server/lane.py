"""One tier as the server drives it: its threads, its breakers, what waits to be written, and what became of everything.

All methods run in the loop's thread; calls of the tier run in the lane's own threads and come back through the loop. So one
slow or dead tier holds up nobody else.
"""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lmcache.cache.writeback import WriteQueue
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.tiers import ShardKey, TierError
from lmcache.tiers.breaker import Breaker
from lmcache.tiers.registry import TierSpec

logger = init_logger(__name__)
T = TypeVar("T")
_STALLED_SECONDS = 1.0
"""A tier with a reading call that has been under way for longer is not asked anything new: whoever asks would wait as well."""
_HANGS_SECONDS = 10.0
"""A call that has been under way for longer is told of: it may be on a mount whose server is gone, and never return."""
_LOG_SECONDS = 10.0
"""A tier in trouble says so at most that often."""
_LOSSES_SECONDS = 10.0
"""What could not be written is told at most that often: one line for all that came since the last."""
_REMEDIES = {
    "queue full": "a higher --l2-queue-gb lets more wait",
    "evicted": "a higher --l1-size-gb keeps chunks longer",
    "full": "its max_gb should be below what its store has room for",
    "too large": "a higher max_gb or a lower --chunk-size makes it fit",
}
"""By the reason for which something was not written."""


class Lane:
    """`spec`'s tier. max_queued_bytes: of chunks that wait to be written. l1_bytes: size of the arena."""

    def __init__(self, loop: Loop, spec: TierSpec, max_queued_bytes: int, l1_bytes: int) -> None:
        self.spec, self.tier, self.name = spec, spec.tier, spec.name
        self.breaker = Breaker()
        """Of the whole tier; a probe closes it again."""
        self.loads, self.stores = Breaker(), Breaker()
        """A store may answer questions and yet refuse these. One that opens opens the tier's, too; then it stays open while
        the rest goes on, and the next call of its kind after the pause decides."""
        self.counters: Counter[str] = Counter()
        """Shards and bytes by what became of them; reasons after a colon."""
        self.generation = 0
        """Counts clears: a write that began before one must not outlive it."""
        self.writing = 0
        """Writes under way."""
        self.write_concurrency = max(1, self.tier.concurrency // 2)
        self.queue = WriteQueue(max_queued_bytes, self.tier.batch_bytes, l1_bytes, spec.write == "on-evict")
        self._loop = loop
        self._readers = ThreadPoolExecutor(self.tier.concurrency, thread_name_prefix=f"lmcache-{self.name}-read")
        self._writers = ThreadPoolExecutor(self.write_concurrency + 1, thread_name_prefix=f"lmcache-{self.name}-write")
        self._calls: dict[int, float] = {}
        """Reading calls under way: since when."""
        self._next_call = 0
        self._lock = threading.Lock()
        """Over the next two, which the lane's own threads use as well."""
        self._under_way: dict[object, tuple[str, float]] = {}
        """Calls that have begun in the lane's threads, `open` and `close` among them: the method, and since when."""
        self._left_behind = False
        self._reported_hanging = False
        self._logged_at = self._reported_losses_at = float("-inf")
        self._reported_losses: Counter[str] = Counter()
        """All counters, as they were when losses were last told."""

    def open(self) -> Future[None]:
        """Open the tier in its own thread; the result is None or a TierError."""
        return self._writers.submit(self._noted, "open", self.tier.open)

    def opened(self, error: BaseException | None) -> None:
        """What became of `open` at start-up."""
        if error is None:
            self.breaker.succeeded()
            return
        self.counters["failed:open"] += 1
        self.breaker.failed(time.monotonic(), str(error), at_once=True)
        logger.warning("Tier %s does not serve yet, the server goes on without it: %s", self.name, error)

    def usable(self, now: float) -> bool:
        """Whether lookups may ask it now."""
        stalled = bool(self._calls) and now - min(self._calls.values()) > _STALLED_SECONDS
        may_load = self.loads.closed or self.loads.due(now)
        return self.spec.read and self.breaker.closed and may_load and not stalled

    def may_store(self, now: float) -> bool:
        """Whether what waits may be written now."""
        return self.breaker.closed and (self.stores.closed or self.stores.due(now))

    def may_store_by(self, moment: float) -> bool:
        """Whether what waits may be written by then, as far as is known now."""
        return all(one.closed or one.state == "half-open" or one.due(moment) for one in (self.breaker, self.stores))

    def trouble(self, now: float) -> str:
        """Why it does not serve, or not all of it; "" where nothing is known to be wrong."""
        return self._state(now)[1]

    def _state(self, now: float) -> tuple[str, str]:
        """How it is called in /status, and `trouble`."""
        if not self.breaker.closed:
            return "failing" if self.breaker.state == "open" else "being tried", self.breaker.reason
        if not self.stores.closed and (len(self.queue) or not self.stores.due(now)):
            return "stores fail", self.stores.reason
        if not self.loads.closed and not self.loads.due(now):
            return "loads fail", self.loads.reason
        hanging = self._hanging(now)
        return "stalled" if hanging else "serving", hanging

    def _hanging(self, now: float) -> str:
        """The call that has been under way for longest, where that is too long; "" otherwise. `clear` may take as long as the
        tier is large, and whoever has asked for it is told."""
        with self._lock:
            calls = [call for call in self._under_way.values() if call[0] != "clear"]
        method, since = min(calls, key=lambda call: call[1], default=("", now))
        return f"{method} has not returned for {now - since:.0f} s" if now - since > _HANGS_SECONDS else ""

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        """What the tier can tell at once, for each key; None: it has to be asked."""
        try:
            answers = self.tier.known(keys)
            return None if answers is None else one_each(answers, keys)
        except Exception as error:  # this is the loop's thread, and the tier may be a third party's
            self._failed(error, None)
            return None

    def ask(self, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """Run `call` in a reading thread; then `done(result, seconds)` in the loop, None where the tier failed."""
        self._read("contains", call, done, None)

    def load(self, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """As `ask`, for a load."""
        self.loads.probe(time.monotonic())
        self._read("load", call, done, self.loads)

    def change(self, method: str, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """As `ask`, in a writing thread. method: of the tier, which `call` calls."""
        self._write(method, call, done, None)

    def store(self, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """As `change`, for a store."""
        self.stores.probe(time.monotonic())
        self._write("store", call, done, self.stores)

    def _read(
        self, method: str, call: Callable[[], T], done: Callable[[T | None, float], None], kind: Breaker | None
    ) -> None:
        number, self._next_call = self._next_call, self._next_call + 1
        self._calls[number] = time.monotonic()

        def ended(result: T | None, seconds: float) -> None:
            self._calls.pop(number, None)
            done(result, seconds)

        self._run(self._readers, method, call, ended, kind)

    def _write(
        self, method: str, call: Callable[[], T], done: Callable[[T | None, float], None], kind: Breaker | None
    ) -> None:
        self.writing += 1

        def ended(result: T | None, seconds: float) -> None:
            self.writing -= 1
            done(result, seconds)

        self._run(self._writers, method, call, ended, kind)

    def tick(self, now: float) -> None:
        """Try a tier that was left alone, when its pause is over, and tell when a call begins or ceases to hang."""
        if self.breaker.probe(now):
            self._run(self._writers, "open", self._probe, lambda result, seconds: None)
        hanging = self._hanging(now)
        if bool(hanging) != self._reported_hanging:
            self._reported_hanging = bool(hanging)
            if hanging:
                logger.warning(
                    "Tier %s: %s; the server goes on without this call: see whether %s answers",
                    self.name,
                    hanging,
                    self.spec.url,
                )
            else:
                logger.info("Tier %s: no call hangs any more", self.name)

    def report_losses(self, now: float) -> None:
        """Warn of what could not be written since the last time, unless that was just now."""
        if now - self._reported_losses_at < _LOSSES_SECONDS:
            return
        counters = self.counters + self.queue.counters
        new, parts = counters - self._reported_losses, []
        for name, count in new.items():
            kind, _, reason = name.partition(":")
            unit = {"lost": "chunks", "unwritten": "shards"}.get(kind)
            if unit is None:
                continue
            mebibytes = new[f"{kind}_bytes:{reason}"] / 2**20
            remedy = f": {_REMEDIES[reason]}" if reason in _REMEDIES else ""
            parts.append(f"{count} {unit} ({mebibytes:,.1f} MiB), {reason}{remedy}")
        if parts:
            self._reported_losses, self._reported_losses_at = counters, now
            logger.warning("Tier %s: not written: %s", self.name, "; ".join(parts))

    def status(self) -> dict[str, object]:
        """For /status; JSON types only."""
        usage, (state, trouble) = self.tier.usage(), self._state(time.monotonic())
        return {
            "name": self.name,
            "url": self.spec.url,
            "state": state,
            "reason": trouble or self.breaker.reason,
            "read": self.spec.read,
            "write": self.spec.write,
            "stored_bytes": usage.stored_bytes,
            "shards": usage.shards,
            "max_bytes": usage.max_bytes,
            "queued_bytes": self.queue.queued_bytes,
            "queued_chunks": len(self.queue),
            "kept_back_chunks": self.queue.kept_back,
        }

    def close(self) -> Future[None]:
        """Drop the calls that have not begun, and return at once.

        The result, None, is there when the calls under way have ended and the tier is closed. A tier that hangs never
        gives one: `leave_behind`.
        """
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)
        closed: Future[None] = Future()

        def close() -> None:
            self._readers.shutdown(wait=True)
            self._writers.shutdown(wait=True)
            try:
                self._noted("close", self.tier.close)
            except Exception:  # the other tiers and the server have to end as well
                logger.exception("Tier %s could not be closed", self.name)
            closed.set_result(None)

        threading.Thread(target=close, name=f"lmcache-{self.name}-close", daemon=True).start()
        return closed

    def leave_behind(self) -> list[str]:
        """The methods of the calls that are still under way; what they return from now on is dropped.

        Their threads keep the process from ending in the usual way, and may write to the memory that they were given.
        """
        with self._lock:
            self._left_behind = True
            return [method for method, _ in self._under_way.values()]

    def _probe(self) -> None:
        self.tier.open()
        self.tier.contains([ShardKey(bytes(16), secrets.token_bytes(16), 0, 1)])

    def _noted(self, method: str, call: Callable[[], T]) -> T:
        key = object()
        with self._lock:
            self._under_way[key] = method, time.monotonic()
        try:
            return call()
        finally:
            with self._lock:
                del self._under_way[key]

    def _run(
        self,
        threads: ThreadPoolExecutor,
        method: str,
        call: Callable[[], T],
        done: Callable[[T | None, float], None],
        kind: Breaker | None = None,
    ) -> None:
        def run() -> None:
            begin, result, error = time.monotonic(), None, None
            try:
                result = self._noted(method, call)
            except Exception as caught:  # the edge of the thread; what is not a TierError is a fault of ours, and told
                error = caught
                _clear_frames(caught)
            seconds = time.monotonic() - begin
            with self._lock:
                if not self._left_behind:  # otherwise the loop may have been closed
                    self._loop.call_soon(lambda: self._back(result, error, seconds, done, kind))

        threads.submit(run)

    def _back(
        self,
        result: T | None,
        error: Exception | None,
        seconds: float,
        done: Callable[[T | None, float], None],
        kind: Breaker | None,
    ) -> None:
        if error is None:
            self._succeeded(kind)
        else:
            self._failed(error, kind)
        done(result, seconds)

    def _succeeded(self, kind: Breaker | None) -> None:
        was_in_trouble = not (self.breaker.closed and (kind is None or kind.closed))
        self.breaker.succeeded()
        if kind is not None:
            kind.succeeded()
        if was_in_trouble and (self.stores.closed or not len(self.queue)) and self.loads.closed:
            logger.info("Tier %s serves again", self.name)

    def _failed(self, error: Exception, kind: Breaker | None) -> None:
        now = time.monotonic()
        reason = error.reason if isinstance(error, TierError) else "internal"
        self.counters[f"failed:{reason}"] += 1
        text = str(error) if isinstance(error, TierError) else f"internal error {type(error).__name__}: {error}"
        of_the_tier = kind is None or kind.closed
        opened = kind is not None and kind.failed(now, text)
        if of_the_tier:
            opened |= self.breaker.failed(now, text, at_once=opened)
        if opened:
            self.counters["opened_breaker"] += 1
        if now - self._logged_at > _LOG_SECONDS:
            self._logged_at = now
            logger.warning("Tier %s: %s", self.name, text, exc_info=None if isinstance(error, TierError) else error)


def one_each(answers: list[T], asked: Sequence[object]) -> list[T]:
    """What a tier answered. Raises ValueError: more or fewer than it was asked; tiers of third parties may do so."""
    if len(answers) != len(asked):
        raise ValueError(f"{len(answers)} answers for {len(asked)} shards")
    return answers


def _clear_frames(error: BaseException) -> None:
    """Of those behind it, too: what they hold of the arena would outlive the call, and the mapping."""
    behind: BaseException | None = error
    seen = set[int]()
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__
