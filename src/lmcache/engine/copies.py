"""The copies of a rank: start them from plans, collect their results, wait for them, cancel them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.config.options import GIB
from lmcache.engine.jobs import Blocks, Done, Event
from lmcache.engine.plans import LoadPlan, StorePlan
from lmcache.engine.requests import Requests
from lmcache.engine.worker import WorkerSession
from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

_LOOK_SECONDS = 60.0
_LET_GO_SECONDS = 1.0


@dataclass(eq=False)
class Copy:
    """A load or a store of one rank. done: its result, None while it may touch paged KV."""

    plan: LoadPlan | StorePlan
    done: Done | None = None

    @property
    def ok(self) -> bool:
        """Whether the copy has ended and succeeded."""
        return self.done is not None and self.done.ok


class Copies:
    """The copies of one rank. No method raises.

    Args:
        session: the session of this rank.
        shard: index of the shard that this rank holds; for a model with several groups, a sequence of one for each.
        stores: False where another rank stores this shard, again for each group; a store ends at once, without a copy, where
            all are False.
        requests: the scheduler's requests, if the scheduler is in this process; they are notified of every end.
        ended: called with each copy once it is known to have ended, in the thread that collects.
    """

    def __init__(
        self,
        session: WorkerSession,
        shard: int | Sequence[int],
        *,
        stores: bool | Sequence[bool] = True,
        requests: Requests[Any] | None = None,
        ended: Callable[[Copy], None] | None = None,
    ) -> None:
        self.session = session
        self._shards = (shard,) if isinstance(shard, int) else tuple(shard)
        self._stores = (stores,) * len(self._shards) if isinstance(stores, bool) else tuple(stores)
        self.stores = any(self._stores)
        self._requests, self._ended = requests, ended
        self._running: dict[str, Copy] = {}
        self._closing: set[Hashable] = set()

    def load(
        self,
        plan: LoadPlan,
        blocks: Blocks | None = None,
        after: Event | None = None,
        progress: Progress | None = None,
        others: Sequence[Blocks] = (),
    ) -> Copy:
        """Begin to fill blocks. blocks: this rank's block table if it is not the plan's. after: a point in the engine's stream
        that must have passed before the blocks may be written. progress: notified of each layer that has arrived. others: the
        block tables of the model's further groups."""
        copy = self._running[plan.job_id] = Copy(plan)
        tables = plan.blocks if blocks is None else blocks, *others
        self.session.load(plan.job_id, plan.job(self._shards, tables, after, progress))
        return copy

    def store(
        self, plan: StorePlan, blocks: Blocks | None = None, after: Event | None = None, others: Sequence[Blocks] = ()
    ) -> Copy:
        """Begin to store chunks; arguments as for `load`. after: the point in the stream behind which the blocks are filled."""
        if not self.stores:
            return self._end(Copy(plan), Done(plan.job_id, "store", True, 0, 0.0))
        copy = self._running[plan.job_id] = Copy(plan)
        tables = plan.blocks if blocks is None else blocks, *others
        self.session.store(plan.job_id, plan.job(self._stores, tables, after))
        return copy

    def drop(self, plan: StorePlan, reason: str) -> Copy:
        """Count the plan's chunks as dropped, and return an ended copy that failed."""
        if self.stores:
            self.session.drop(plan.chunks, reason)
        return self._end(Copy(plan), Done(plan.job_id, "store", False, 0, 0.0))

    def collect(self) -> None:
        """Record the results of copies that have ended, without waiting."""
        for done in self.session.finished():
            copy = self._running.pop(done.job_id, None)
            if copy is not None:
                self._end(copy, done)

    def running(self, kind: type[LoadPlan | StorePlan] | None = None) -> list[Copy]:
        """The loads, the stores or all copies that had not ended at the last `collect`."""
        # In one piece: another thread may start copies meanwhile (Transformers' `flush` beside a `generate`).
        now = tuple(self._running.values())
        return [copy for copy in now if kind is None or isinstance(copy.plan, kind)]

    def closed(self, ended: Iterable[Hashable]) -> set[Any]:
        """Return each ended request once (of this and earlier calls), as soon as no store reads its blocks."""
        self._closing.update(ended)
        self.collect()
        ready = self._closing - {copy.plan.request_id for copy in self.running(StorePlan)}
        self._closing -= ready
        return ready

    def wait(self, copies: Collection[Copy], seconds: float | None = None) -> bool:
        """Wait until these copies have ended, at most `seconds` (None: no limit). Return whether they have."""
        now = self.session.runtime.now
        end = None if seconds is None else now() + seconds
        self.collect()
        while any(copy.done is None for copy in copies):
            left = _LOOK_SECONDS if end is None else end - now()
            if left <= 0:
                return False
            self.session.wait_finished(left)
            self.collect()
        return True

    def settle(self, copies: Collection[Copy], seconds: float, hang_seconds: float | None = None) -> bool:
        """Wait `seconds` for these copies, then cancel those that have not begun. Return whether all succeeded.

        Copies that have begun get `hang_seconds` more (None: no limit). A copy without `done` may touch paged KV after that.
        """
        if not self.wait(copies, seconds):
            self.session.wait([copy.plan.job_id for copy in copies if copy.done is None], hang_seconds)
            self.collect()
        return all(copy.ok for copy in copies)

    def let_go(self, job_ids: Iterable[str]) -> None:
        """Cancel these jobs and return once none of them touches blocks that the engine has taken away."""
        now, jobs = self.session.runtime.now, [job_id for job_id in job_ids if job_id in self._running]
        began, warned = now(), False
        while jobs:
            jobs = list(self.session.wait(jobs, _LET_GO_SECONDS))
            if jobs and not warned:
                logger.warning("Waiting for %d copies to let go of blocks that the engine has taken away", len(jobs))
                warned = True
        if warned:
            logger.warning("The blocks that the engine has taken away were free after %.1f s", now() - began)

    def _end(self, copy: Copy, done: Done) -> Copy:
        copy.done = done
        if self._requests is not None:
            hears = self._requests.loaded if isinstance(copy.plan, LoadPlan) else self._requests.stored
            hears(copy.plan.job_id, 1)
        if self._ended is not None:
            self._ended(copy)
        return copy


def cost(size_bytes: int, seconds: float) -> str:
    """Return size (GiB of this rank's shard), time and throughput of copies, for the log."""
    size = size_bytes / GIB
    return f"size: {size:.4f} gb, cost {seconds * 1e3:.2f} ms, throughput: {size / max(seconds, 1e-9):.2f} GB/s"


def stored_line(copies: Iterable[Copy], total: int, token_bytes: int) -> str:
    """Return the log line for stores of `total` tokens; "" if nothing was copied."""
    done = [copy.done for copy in copies if copy.done is not None and copy.done.ok]
    tokens = sum(one.tokens for one in done)
    if not tokens:
        return ""
    copying, putting = sum(one.seconds for one in done), sum(one.put_seconds for one in done)
    return (
        f"Stored {tokens} out of total {total} tokens. {cost(tokens * token_bytes, copying + putting)}; "
        f"offload_time: {copying * 1e3:.2f} ms, put_time: {putting * 1e3:.2f} ms"
    )


def retrieved_line(plan: LoadPlan, done: Done, token_bytes: int) -> str:
    """Return the log line for a load."""
    return (
        f"Retrieved {done.tokens} out of {plan.end_token} required tokens (from {plan.request_tokens} total tokens). "
        f"{cost(done.tokens * token_bytes, done.seconds)}"
    )
