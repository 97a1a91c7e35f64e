"""What drives one tier: its operations under way and their deadlines, its breakers, and what waits to be written.

All methods run in the loop's thread. The tier completes operations in threads of its own, or in those of its adapter, and the
results come back through the loop. So one slow or dead tier holds up nobody else.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lmcache.cache.writeback import WriteQueue
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.tiers import Clear, Close, Contains, Load, Open, Remove, Shard, ShardKey, Store, TierError
from lmcache.tiers.blocking import submitter, write_concurrency
from lmcache.tiers.breaker import Breaker
from lmcache.tiers.operation import CANCELLED, AnyOperation
from lmcache.tiers.registry import TierSpec

logger = init_logger(__name__)
OPEN_SECONDS = 15.0
"""How long start-up waits for tiers; those that take longer serve later."""
CLOSE_SECONDS = 3.0
"""How long the end waits for operations under way and for tiers to close; those that take longer are left behind."""
_WRITE_SECONDS, _CLEAR_SECONDS = 60.0, 600.0
_STALLED_SECONDS = 1.0
"""A tier with a load or a question that has been under way for longer is not asked anything new: whoever asks would wait as
well."""
_HANGS_SECONDS = 10.0
"""An operation that has been under way for longer is reported: it may be on a mount whose server is gone, and never end."""
_LOG_SECONDS = 10.0
"""A tier in trouble says so at most that often."""
_READS, _WRITES = {"contains", "load"}, {"store", "remove", "clear"}
_TIMED = {"open", "contains", "load", "store", "remove", "close"}
"""`clear` may take as long as the tier is large, and whoever asked for it gets an answer."""
Ended = Callable[[Any, Exception | None, float], None]
"""What became of an operation: its result or its error, and how many seconds it took."""


@dataclass(eq=False)
class _Call:
    """An operation under way. late: called in the loop when its deadline has passed, once."""

    method: str
    since: float
    deadline: float
    ended: Ended
    late: Callable[[], None]
    operation: AnyOperation = field(init=False)
    is_late: bool = False


class TierRunner:
    """`spec`'s tier. max_queued_bytes: of chunks that wait to be written. l1_bytes: size of the arena."""

    def __init__(self, loop: Loop, spec: TierSpec, max_queued_bytes: int, l1_bytes: int) -> None:
        self.spec, self.tier, self.name = spec, spec.tier, spec.name
        self.breaker = Breaker()
        """Of the whole tier; a probe closes it again."""
        self.loads, self.stores = Breaker(), Breaker()
        """A store may answer questions and yet refuse these. One that opens opens the tier's, too; then it stays open while
        the rest goes on, and the next operation of its kind after the pause decides."""
        self.counters: Counter[str] = Counter()
        """Shards and bytes by what became of them; reasons after a colon."""
        self.generation = 0
        """Counts clears: a write that began before one must not outlive it."""
        self.chunks_being_written = 0
        self.write_concurrency = write_concurrency(self.tier)
        self.queue = WriteQueue(
            max_queued_bytes, self.tier.batch_bytes, l1_bytes, spec.write == "on-evict", self.tier.batch_shards
        )
        self.closed = False
        """Whether the tier has been closed."""
        self._loop = loop
        self._submitter = submitter(self.tier, self.name, loop.executor)
        self._under_way: dict[_Call, None] = {}
        """The operations that have been submitted and have not ended, in the order of their beginnings."""
        self._closing = False
        self._reported_hanging = False
        self._logged_at = float("-inf")

    # Operations

    def open(self, opened: Callable[[Exception | None], None]) -> None:
        """Open the tier; `opened` gets None or the error."""
        self._submit(Open, lambda result, error, seconds: opened(error), OPEN_SECONDS)

    def opened(self, error: Exception | None) -> None:
        """What became of `open` at start-up."""
        if error is None:
            self.breaker.succeeded()
            return
        self.counters["failed:open"] += 1
        self.breaker.failed(self._loop.now(), str(error), at_once=True)
        logger.warning("Tier %s does not serve yet, the server goes on without it: %s", self.name, error)

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        """What the tier can tell at once, for each key; None: it has to be asked."""
        try:
            answers = self.tier.known(keys)
            if answers is not None:
                _check_count(answers, keys)
            return answers
        except Exception as error:  # this is the loop's thread, and the tier may be a third party's
            self._failed(error, None)
            return None

    def contains(
        self, keys: Sequence[ShardKey], seconds: float, done: Callable[[list[bool] | None, float], None]
    ) -> None:
        """Ask the tier; `done` gets its answers, None where it failed, and how long they took. Nobody wants them any more after
        `seconds`."""

        def ended(answers: list[bool] | None, error: Exception | None, took: float) -> None:
            done(self._judged(answers, error, keys, None), took)

        self._submit(partial(Contains, keys=keys), ended, seconds)

    def load(
        self,
        keys: Sequence[ShardKey],
        into: Sequence[memoryview],
        seconds: float,
        late: Callable[[], None],
        done: Callable[[list[str] | None], None],
    ) -> None:
        """Load shards; `done` gets their outcomes, None where the tier failed.

        late: called after `seconds` unless the load has ended. Nobody waits for it any more then, but the tier may touch the
        memory until `done` is called.
        """

        def ended(outcomes: list[str] | None, error: Exception | None, took: float) -> None:
            done(self._judged(outcomes, error, keys, self.loads))

        self.loads.probe(self._loop.now())
        self._submit(partial(Load, keys=keys, into=into), ended, seconds, late)

    def store(self, shards: Sequence[Shard], done: Callable[[list[str] | None], None]) -> None:
        """Store shards; `done` gets their outcomes, None where the tier failed."""

        def ended(outcomes: list[str] | None, error: Exception | None, took: float) -> None:
            done(self._judged(outcomes, error, shards, self.stores))

        self.stores.probe(self._loop.now())
        self._submit(partial(Store, shards=shards), ended, _WRITE_SECONDS)

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._submit(partial(Remove, keys=keys), self._judge, _WRITE_SECONDS)

    def clear(self, done: Callable[[bool], None]) -> None:
        """Empty the tier; `done` gets whether that succeeded."""

        def ended(result: None, error: Exception | None, took: float) -> None:
            self._judge(result, error, took)
            done(error is None)

        self._submit(Clear, ended, _CLEAR_SECONDS)

    def close(self) -> None:
        """Cancel what is under way, and close the tier when all of it has ended; `closed` says when that is done.

        An operation that hangs never ends: the tier is not closed then, and `under_way` names what it is left behind with.
        """
        self._closing = True
        for call in list(self._under_way):
            self._cancel(call)
        self._close_when_idle()

    # State

    @property
    def writing(self) -> int:
        """Operations under way that change what the tier holds."""
        return sum(call.method in _WRITES for call in self._under_way)

    @property
    def under_way(self) -> Counter[str]:
        """Operations that have not ended, by method."""
        return Counter(call.method for call in self._under_way)

    def usable(self, now: float) -> bool:
        """Whether lookups may ask it now."""
        stalled = now - self._oldest(_READS, now)[1] > _STALLED_SECONDS
        return self.spec.read and self.breaker.closed and (self.loads.closed or self.loads.due(now)) and not stalled

    def may_store(self, now: float) -> bool:
        """Whether what waits may be written now."""
        return self.breaker.closed and (self.stores.closed or self.stores.due(now))

    def may_store_by(self, moment: float) -> bool:
        """Whether what waits may be written by then, as far as is known now."""
        return all(one.closed or one.state == "half-open" or one.due(moment) for one in (self.breaker, self.stores))

    def state(self, now: float) -> tuple[str, str]:
        """What the tier is doing, as /status names it, and why it does not serve in full; "" where nothing is known to be
        wrong."""
        if not self.breaker.closed:
            return "failing" if self.breaker.state == "open" else "being tried", self.breaker.reason
        if not self.stores.closed and (len(self.queue) or not self.stores.due(now)):
            return "stores fail", self.stores.reason
        if not self.loads.closed and not self.loads.due(now):
            return "loads fail", self.loads.reason
        hanging = self._hanging(now)
        return "stalled" if hanging else "serving", hanging

    def tick(self, now: float) -> None:
        """Give up operations whose deadline has passed, try a tier again when its pause is over, and report when an operation
        begins or ceases to hang."""
        for call in [one for one in self._under_way if now > one.deadline and not one.is_late]:
            call.is_late = True
            self._cancel(call)
            call.late()
        if self.breaker.probe(now):
            self._submit(Open, self._try_again, OPEN_SECONDS)
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

    def _hanging(self, now: float) -> str:
        """The operation that has been under way for longest, where that is too long; "" otherwise."""
        method, since = self._oldest(_TIMED, now)
        return f"{method} has not returned for {now - since:.0f} s" if now - since > _HANGS_SECONDS else ""

    def _oldest(self, methods: set[str], now: float) -> tuple[str, float]:
        """Of the operations under way with these methods, the one that began first: its method, and when that was."""
        return next(((call.method, call.since) for call in self._under_way if call.method in methods), ("", now))

    # How operations begin and end

    def _submit(
        self,
        operation: Callable[..., AnyOperation],
        ended: Ended,
        seconds: float,
        late: Callable[[], None] = lambda: None,
    ) -> None:
        now = self._loop.now()
        call = _Call("", now, now + seconds, ended, late)
        call.operation = operation(call.deadline, partial(self._ended_in_thread, call))
        call.method = call.operation.method
        self._under_way[call] = None
        try:
            self._submitter.submit(call.operation)
        except Exception as error:  # the tier may be a third party's
            call.operation.fail(error)

    def _ended_in_thread(self, call: _Call, result: Any, error: Exception | None) -> None:
        seconds = self._loop.now() - call.since
        self._loop.call_soon(lambda: self._ended(call, result, error, seconds))

    def _ended(self, call: _Call, result: Any, error: Exception | None, seconds: float) -> None:
        if call not in self._under_way:
            logger.error("Tier %s has ended one %s twice, which is a fault of the tier", self.name, call.method)
            return
        del self._under_way[call]
        if isinstance(error, TierError) and error.reason == CANCELLED and call.is_late:
            error = TierError("late", f"{call.method} had not ended after {seconds:.0f} s and was cancelled")
        call.ended(result, error, seconds)
        self._close_when_idle()

    def _cancel(self, call: _Call) -> None:
        try:
            self._submitter.cancel(call.operation)
        except Exception:  # as above; the operation goes on
            logger.exception("Tier %s could not cancel a %s", self.name, call.method)

    def _close_when_idle(self) -> None:
        if self._closing and not self._under_way and not self.closed:
            self._submit(Close, self._ended_close, CLOSE_SECONDS)

    def _ended_close(self, result: None, error: Exception | None, seconds: float) -> None:
        self.closed = True
        if error is not None:  # the other tiers and the server have to end as well
            logger.error("Tier %s could not be closed", self.name, exc_info=error)

    def _try_again(self, result: None, error: Exception | None, seconds: float) -> None:
        """The tier was opened, or not: an answer to a question decides whether it serves again."""
        if error is None and not self._closing:
            probe = [ShardKey(bytes(16), secrets.token_bytes(16), 0, 1)]
            self.contains(probe, OPEN_SECONDS, lambda answers, took: None)
        elif error is not None:
            self._judge(result, error, seconds)

    def _judge(self, result: None, error: Exception | None, seconds: float) -> None:
        self._judged([], error, [], None)

    def _judged(
        self, answers: list[Any] | None, error: Exception | None, asked: Sequence[object], kind: Breaker | None
    ) -> list[Any] | None:
        """Tell the breakers what came of an operation. Returns the answers, None where the tier failed."""
        if error is None:
            try:
                _check_count(answers, asked)
            except (TypeError, ValueError) as wrong:
                error = wrong
        if error is None:
            self._succeeded(kind)
            return answers
        if not (self._closing and isinstance(error, TierError) and error.reason == CANCELLED):
            self._failed(error, kind)
        return None

    def _succeeded(self, kind: Breaker | None) -> None:
        was_in_trouble = not (self.breaker.closed and (kind is None or kind.closed))
        self.breaker.succeeded()
        if kind is not None:
            kind.succeeded()
        if was_in_trouble and (self.stores.closed or not len(self.queue)) and self.loads.closed:
            logger.info("Tier %s serves again", self.name)

    def _failed(self, error: Exception, kind: Breaker | None) -> None:
        now = self._loop.now()
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


def _check_count(answers: Any, asked: Sequence[object]) -> None:
    """Raises ValueError or TypeError: the tier has not answered once for each shard; those of third parties may do so."""
    if len(answers) != len(asked):
        raise ValueError(f"{len(answers)} answers for {len(asked)} shards")
