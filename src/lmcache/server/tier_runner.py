"""The tier runner drives one tier: its operations with their deadlines, its circuit breakers, and its write queue.

All methods run in the loop's thread. The tier completes operations in its own threads or in those of its adapter, and the loop
receives the results. So a slow or dead tier does not block other tiers or engines.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache.cache.touches import Touches
from lmcache.cache.waits import PAUSED
from lmcache.cache.writeback import WriteQueue
from lmcache.observability.log import init_logger, printable
from lmcache.server.loop import Loop
from lmcache.tiers import Shard, ShardKey, TierError, Usage
from lmcache.tiers.blocking import BlockingAdapter, submitter, write_concurrency
from lmcache.tiers.breaker import Breaker
from lmcache.tiers.operation import CANCELLED, Clear, Close, Contains, Load, Open, Operation, Remove, Store

if TYPE_CHECKING:
    from lmcache.tiers.registry import TierSpec  # imports what only servers with tiers need

logger = init_logger(__name__)
OPEN_SECONDS = 15.0
"""How long the start waits for tiers to open. Tiers that take longer serve later."""
CLOSE_SECONDS = 3.0
"""How long the end waits for operations to end and for tiers to close. Tiers that take longer are left behind."""
_WRITE_SECONDS, _CLEAR_SECONDS = 60.0, 600.0
_STALLED_SECONDS = 1.0
"""A tier with an older unfinished `load` or `contains` is not asked anything new, since new operations would wait as well."""
_HANGS_SECONDS = 10.0
"""An older unfinished operation is logged: it may be on a mount whose server has failed, and never end."""
_LOG_SECONDS = 10.0
"""The failures of a tier are logged at most that often."""
MAX_COUNTERS = 128
"""The most counters of a tier. Tiers make up reasons; those beyond are counted as `other`."""
T = TypeVar("T")
_READS, _WRITES = {"contains", "load"}, {"store", "remove", "clear"}
_TIMED = {"open", "contains", "load", "store", "remove", "close"}
"""Methods that can hang. `clear` is not among them: its time grows with the tier's size, and its caller gets an answer."""
Done = Callable[[Any, Exception | None, float], None]
"""Takes the result of an operation (None if it failed), the error (None if it succeeded), and the seconds that it took."""


@dataclass(eq=False)
class _Call:
    """An unfinished operation. asked: the items, each of which needs one answer. late: called in the loop when the deadline has
    passed. judged: whether the outcome counts for the breakers."""

    since: float
    done: Done
    asked: Sequence[object] | None
    late: Callable[[], None]
    judged: bool
    operation: Operation[Any] = field(init=False)
    method: str = field(init=False)
    is_late: bool = False


class TierRunner:
    """Drives the tier of `spec`. max_queued_bytes: bound of the write queue. l1_bytes: size of the arena."""

    def __init__(self, loop: Loop, spec: TierSpec, max_queued_bytes: int, l1_bytes: int) -> None:
        self.spec, self.tier, self.name = spec, spec.tier, spec.name
        self.breaker = Breaker()
        """The breaker of the tier; a probe closes it again."""
        self.loads, self.stores = Breaker(), Breaker()
        """The breakers of loads and of stores, which may fail while other operations work. One that opens also opens `breaker`,
        and stays open when that closes; the next operation of its kind after the pause decides whether it closes."""
        self._kinds = {"load": self.loads, "store": self.stores}
        self.counters: Counter[str] = Counter()
        """Shards and bytes by outcome, with reasons after a colon."""
        self.generation = 0
        """Number of clears. What a write that began before a clear has stored must be removed."""
        self.chunks_being_written = 0
        self.write_concurrency = write_concurrency(self.tier)
        self.queue = WriteQueue(
            max_queued_bytes, self.tier.batch_bytes, self.tier.batch_shards, l1_bytes, spec.write == "on-evict"
        )
        self.closed = self.paused = False
        self.number = -1
        """Of the tier among all fetches (`Fetches.attach`); -1 until it has one."""
        self._loop = loop
        self._executors: list[Executor] = []
        self._submitter = submitter(self.tier, self.name, self._executor, loop.now)
        self.coder = self._submitter.coder if isinstance(self._submitter, BlockingAdapter) else None
        """The coder encodes what the tier stores. Only tiers that block have one."""
        self.touches = Touches() if spec.write != "none" and spec.admit != "all" else None
        """The chunks that this tier has been offered, if it is given only what is wanted a second time; else None."""
        self._under_way: dict[_Call, None] = {}
        """The operations that were submitted and have not ended, oldest first."""
        self._usage = Usage(0, 0, None)
        self._closing = False
        self._reported_hanging = False
        self._logged_at = float("-inf")

    def _executor(self, name: str, threads: int) -> Executor:
        self._executors.append(self._loop.executor(name, threads))
        return self._executors[-1]

    def release(self) -> None:
        """End the tier's threads, once it is closed."""
        for executor in self._executors:
            self._loop.release(executor)

    def count(self, kind: str, reason: str, number: int = 1) -> None:
        """Add to the counter of this kind for a reason that the tier may have made up."""
        name = f"{kind}:{printable(str(reason), 40)}"
        known = name in self.counters or len(self.counters) < MAX_COUNTERS
        self.counters[name if known else f"{kind}:other"] += number

    # Operations

    def open(self, opened: Callable[[Exception | None], None]) -> None:
        """Open the tier, and call `opened` with None or the error."""
        self._submit(Open, lambda result, error, seconds: opened(error), OPEN_SECONDS, judged=False)

    def opened(self, error: Exception | None) -> None:
        """Take the outcome of `open` at the start."""
        if error is None:
            self.breaker.succeeded()
            return
        self.counters["failed:open"] += 1
        self.breaker.failed(self._loop.now(), str(error), at_once=True)
        logger.warning("Tier %s does not serve yet; the server goes on and tries again: %s", self.name, error)

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        """Return for each key whether the tier has the shard, if it can answer at once; None if it has to be asked."""
        if self.paused:
            return None
        try:
            answers = self.tier.known(keys)
            return None if answers is None else one_each(answers, keys)
        except Exception as error:  # a third party's tier must not stop the loop
            self._failed(error, None)
            return None

    def tell_drops(self, listener: Callable[[str, list[ShardKey]], None] | None) -> None:
        """Call the listener from now on, in the loop's thread, with the tier's name and the shards that the tier has dropped, as
        far as the tier knows that. None: call nobody."""
        if listener is None:
            self.tier.dropped = None
        else:
            self.tier.dropped = lambda keys: self._loop.call_soon(partial(listener, self.name, keys))

    def usage(self) -> Usage:
        """Return the tier's usage, or the last one that it told."""
        try:
            self._usage = self.tier.usage()
        except Exception as error:  # a third party's tier must not take /status and /metrics away
            self._note(error)
        return self._usage

    def contains(self, keys: Sequence[ShardKey], seconds: float, done: Done, judged: bool = True) -> None:
        """Ask which shards the tier has. The operation is cancelled after `seconds`, which counts as a failure if `judged`."""
        self._submit(partial(Contains, keys=keys), done, seconds, keys, judged=judged)

    def load(
        self, keys: Sequence[ShardKey], into: Sequence[memoryview], seconds: float, late: Callable[[], None], done: Done
    ) -> None:
        """Load shards. late: called after `seconds` unless the load has ended. The load is cancelled then, but the tier may touch
        the memory until `done` is called."""
        self._submit(partial(Load, keys=keys, into=into), done, seconds, keys, late)

    def store(self, shards: Sequence[Shard], done: Done) -> None:
        self._submit(partial(Store, shards=shards), done, _WRITE_SECONDS, shards)

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._submit(partial(Remove, keys=keys), _nothing, _WRITE_SECONDS)

    def clear(self, done: Done) -> None:
        self._submit(Clear, done, _CLEAR_SECONDS)

    def close(self) -> None:
        """Cancel all operations, and close the tier when they have ended; `closed` becomes true then.

        If an operation hangs, the tier is not closed, and `under_way` names the operation.
        """
        self._closing = True
        for call in list(self._under_way):
            self._cancel(call)
        self._close_when_idle()

    # State

    @property
    def writing(self) -> int:
        """How many unfinished operations change the contents of the tier."""
        return sum(call.method in _WRITES for call in self._under_way)

    @property
    def under_way(self) -> Counter[str]:
        """Method -> number of its unfinished operations."""
        return Counter(call.method for call in self._under_way)

    def usable(self, now: float) -> bool:
        """Return whether lookups may ask the tier now."""
        may = self.spec.read and not self.paused and self.breaker.closed and (self.loads.closed or self.loads.due(now))
        return may and not self.why_silent(now)

    def why_not_usable(self) -> str:
        """Return why lookups may not ask the tier, in short."""
        return PAUSED if self.paused else "not serving"

    def why_silent(self, now: float) -> str:
        """Describe the oldest call of a lookup if the tier has stalled, so that lookups do not ask it; "" otherwise."""
        overdue = self._overdue(_READS, now, _STALLED_SECONDS)
        return f"stalled: {overdue}" if overdue else ""

    def may_store(self, now: float) -> bool:
        """Return whether queued chunks may be written now."""
        return not self.paused and self.breaker.closed and (self.stores.closed or self.stores.due(now))

    def may_store_by(self, moment: float) -> bool:
        """Return whether queued chunks may be written at that time, as far as is known now."""
        return not self.paused and all(
            one.closed or one.state == "half-open" or one.due(moment) for one in (self.breaker, self.stores)
        )

    def state(self, now: float) -> tuple[str, str]:
        """Return the tier's state for /status, and why the tier does not serve or serves only in part; "" if it serves."""
        if self.paused:
            return PAUSED, "an operator has paused it (`lmcache tier resume`)"
        if not self.breaker.closed:
            return "failing" if self.breaker.state == "open" else "being tried", self.breaker.reason
        if not self.stores.closed and (len(self.queue) or not self.stores.due(now)):
            return "stores fail", self.stores.reason
        if not self.loads.closed and not self.loads.due(now):
            return "loads fail", self.loads.reason
        hanging = self._hanging(now)
        if hanging:
            return "stalled", hanging
        try:
            degraded = self.tier.degraded()
        except Exception as error:  # a third party's tier must not take /status and /metrics away
            self._note(error)
            degraded = ""
        return "serves in part" if degraded else "serving", degraded

    def tick(self, now: float) -> None:
        """Cancel operations whose deadline has passed, open a failed tier again when its pause is over, and log when an operation
        begins to hang and when none hangs any more."""
        for call in [one for one in self._under_way if now > one.operation.deadline and not one.is_late]:
            call.is_late = True
            self._cancel(call)
            call.late()
        if not self.paused and not self._closing and self.breaker.probe(now):
            self._submit(Open, self._opened_again, OPEN_SECONDS, judged=False)
        hanging = self._hanging(now)
        if bool(hanging) != self._reported_hanging:
            self._reported_hanging = bool(hanging)
            if hanging:
                logger.warning(
                    "Tier %s: %s; the server goes on without this call: check whether %s answers",
                    self.name,
                    hanging,
                    self.spec.url,
                )
            else:
                logger.info("Tier %s: no call hangs any more", self.name)

    def _hanging(self, now: float) -> str:
        """Describe the oldest unfinished operation if it hangs; "" otherwise."""
        return self._overdue(_TIMED, now, _HANGS_SECONDS)

    def _overdue(self, methods: set[str], now: float, seconds: float) -> str:
        """Describe the oldest unfinished operation with one of these methods if it takes longer than `seconds`, else ""."""
        method, since = next(
            ((call.method, call.since) for call in self._under_way if call.method in methods), ("", now)
        )
        return f"{method} has not returned for {now - since:.0f} s" if now - since > seconds else ""

    # Submitting and ending operations

    def _submit(
        self,
        make: Callable[..., Operation[Any]],
        done: Done,
        seconds: float,
        asked: Sequence[object] | None = None,
        late: Callable[[], None] = lambda: None,
        judged: bool = True,
    ) -> None:
        now = self._loop.now()
        call = _Call(now, done, asked, late, judged)
        call.operation = make(now + seconds, partial(self._ended_in_thread, call))
        call.method = call.operation.method
        kind = self._kinds.get(call.method)
        if kind is not None:
            kind.probe(now)
        self._under_way[call] = None
        try:
            self._submitter.submit(call.operation)
        except Exception as error:  # a third party's tier may raise anything
            call.operation.fail(error)

    def _cancel(self, call: _Call) -> None:
        try:
            self._submitter.cancel(call.operation)
        except Exception:  # a third party's tier may raise anything; the operation goes on
            logger.exception("Tier %s could not cancel an operation (%s)", self.name, call.method)

    def _ended_in_thread(self, call: _Call, result: Any, error: Exception | None) -> None:
        began = call.operation.began
        seconds = self._loop.now() - (call.since if began is None else began)
        self._loop.call_soon(lambda: self._ended(call, result, error, seconds))

    def _ended(self, call: _Call, result: Any, error: Exception | None, seconds: float) -> None:
        if call not in self._under_way:
            logger.error("Tier %s ended one %s operation twice, which is a bug in the tier", self.name, call.method)
            return
        del self._under_way[call]
        cancelled = isinstance(error, TierError) and error.reason == CANCELLED
        if cancelled and call.is_late:
            error = TierError("late", f"{call.method} had not ended after {seconds:.0f} s and was cancelled")
        if error is None and call.asked is not None:
            try:
                one_each(result, call.asked)
            except (TypeError, ValueError) as wrong:
                error = wrong
        if call.judged and not (cancelled and self._closing):
            self._judge(error, self._kinds.get(call.method))
        call.done(result if error is None else None, error, seconds)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._closing and not self._under_way and not self.closed:
            self._submit(Close, self._ended_close, CLOSE_SECONDS, judged=False)

    def _ended_close(self, result: None, error: Exception | None, seconds: float) -> None:
        self.closed = True
        if error is not None:  # only logged, since the server must go on to end
            logger.error("Tier %s could not be closed", self.name, exc_info=error)

    def _opened_again(self, result: None, error: Exception | None, seconds: float) -> None:
        """Ask a tier that was opened again for an unknown shard; the answer decides whether it serves."""
        if error is not None:
            self._failed(error, None)
        elif not self._closing:
            self.contains([ShardKey(bytes(16), secrets.token_bytes(16), 0, 1)], OPEN_SECONDS, _nothing)

    def _judge(self, error: Exception | None, kind: Breaker | None) -> None:
        if error is None:
            self._succeeded(kind)
        else:
            self._failed(error, kind)

    def _succeeded(self, kind: Breaker | None) -> None:
        was_in_trouble = not (self.breaker.closed and (kind is None or kind.closed))
        self.breaker.succeeded()
        if kind is not None:
            kind.succeeded()
        if was_in_trouble and (self.stores.closed or not len(self.queue)) and self.loads.closed:
            logger.info("Tier %s serves again", self.name)

    def _failed(self, error: Exception, kind: Breaker | None) -> None:
        now, text = self._loop.now(), self._note(error)
        of_the_tier = kind is None or kind.closed
        opened = kind is not None and kind.failed(now, text)
        if of_the_tier:
            opened |= self.breaker.failed(now, text, at_once=opened)
        if opened:
            self.counters["opened_breaker"] += 1

    def _note(self, error: Exception) -> str:
        """Count and log a failure. Returns its text."""
        now, known = self._loop.now(), isinstance(error, TierError)
        self.count("failed", error.reason if isinstance(error, TierError) else "internal")
        text = str(error) if known else f"internal error {type(error).__name__}: {error}"
        if now - self._logged_at > _LOG_SECONDS:
            self._logged_at = now
            logger.warning("Tier %s: %s", self.name, text, exc_info=None if known else error)
        return text


def one_each(answers: list[T], asked: Sequence[object]) -> list[T]:
    """Return the answers of a tier. Raises ValueError unless there is one for each item; a third party's tier may be wrong."""
    if len(answers) != len(asked):
        raise ValueError(f"{len(answers)} answers for {len(asked)} shards")
    return answers


def _nothing(result: Any, error: Exception | None, seconds: float) -> None:
    """Ignore the outcome of an operation."""
