"""One tier as the server drives it: its threads, its breaker, what waits to be written, and what became of everything.

All methods run in the loop's thread; calls of the tier run in the lane's own threads and come back through the loop. So one
slow or dead tier holds up nobody else.
"""

from __future__ import annotations

import secrets
import time
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
"""A tier with a call that has been under way for longer is not asked anything new: whoever asks would wait as well."""
_LOG_SECONDS = 10.0
"""A tier in trouble says so at most that often."""


class Lane:
    """`spec`'s tier. max_queued_bytes: of chunks that wait to be written. l1_bytes: size of the arena."""

    def __init__(self, loop: Loop, spec: TierSpec, max_queued_bytes: int, l1_bytes: int) -> None:
        self.spec, self.tier, self.name = spec, spec.tier, spec.name
        self.breaker = Breaker()
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
        self._told_at = float("-inf")

    def open(self) -> Future[None]:
        """Open the tier in its own thread; the result is None or a TierError."""
        return self._writers.submit(self.tier.open)

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
        return self.spec.read and self.breaker.closed and not stalled

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        return self.tier.known(keys)

    def read(self, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """Run `call` in a reading thread; then `done(result, seconds)` in the loop, None where the tier failed."""
        number, self._next_call = self._next_call, self._next_call + 1
        self._calls[number] = time.monotonic()

        def ended(result: T | None, seconds: float) -> None:
            self._calls.pop(number, None)
            done(result, seconds)

        self._run(self._readers, call, ended)

    def write(self, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        """As `read`, in a writing thread."""
        self.writing += 1

        def ended(result: T | None, seconds: float) -> None:
            self.writing -= 1
            done(result, seconds)

        self._run(self._writers, call, ended)

    def tick(self, now: float) -> None:
        """Try a tier that was left alone, when its pause is over."""
        if self.breaker.probe(now):
            self._run(self._writers, self._probe, lambda result, seconds: None)

    def status(self) -> dict[str, object]:
        """For /status; JSON types only."""
        usage = self.tier.usage()
        return {
            "name": self.name,
            "url": self.spec.url,
            "state": {"closed": "serving", "open": "failing", "half-open": "being tried"}[self.breaker.state],
            "reason": self.breaker.reason,
            "read": self.spec.read,
            "write": self.spec.write,
            "stored_bytes": usage.stored_bytes,
            "shards": usage.shards,
            "max_bytes": usage.max_bytes,
            "queued_bytes": self.queue.queued_bytes,
            "queued_chunks": len(self.queue),
            "kept_back_chunks": self.queue.kept_back,
        }

    def close(self) -> None:
        """End the threads, once calls under way have ended (the tier's time-outs bound them), and close the tier."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True, cancel_futures=True)
        try:
            self.tier.close()
        except Exception:  # the other tiers and the server have to end as well
            logger.exception("Tier %s could not be closed", self.name)

    def _probe(self) -> None:
        self.tier.open()
        self.tier.contains([ShardKey(bytes(16), secrets.token_bytes(16), 0, 1)])

    def _run(self, threads: ThreadPoolExecutor, call: Callable[[], T], done: Callable[[T | None, float], None]) -> None:
        def run() -> None:
            begin, result, error = time.monotonic(), None, None
            try:
                result = call()
            except Exception as caught:  # the edge of the thread; what is not a TierError is a fault of ours, and told
                error = caught
            seconds = time.monotonic() - begin
            self._loop.call_soon(lambda: self._back(result, error, seconds, done))

        threads.submit(run)

    def _back(
        self, result: T | None, error: Exception | None, seconds: float, done: Callable[[T | None, float], None]
    ) -> None:
        if error is None:
            if not self.breaker.closed:
                logger.info("Tier %s serves again", self.name)
            self.breaker.succeeded()
        else:
            self._failed(error)
        done(result, seconds)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        reason = error.reason if isinstance(error, TierError) else "internal"
        self.counters[f"failed:{reason}"] += 1
        text = str(error) if isinstance(error, TierError) else f"internal error {type(error).__name__}: {error}"
        if self.breaker.failed(now, text):
            self.counters["opened_breaker"] += 1
        if now - self._told_at > _LOG_SECONDS:
            self._told_at = now
            logger.warning("Tier %s: %s", self.name, text, exc_info=None if isinstance(error, TierError) else error)
