"""The worker's half: one rank's loads, before the forward, and stores, behind it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from lmcache.engine import Load, Store, WorkerSession
from lmcache.errors import LMCacheError
from lmcache.integration.tensorrt_llm.plan import LoadPlan, StepPlan, StorePlan
from lmcache.integration.tensorrt_llm.ranks import RankReporter
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_LOAD_SECONDS = 30.0
"""A copy from mapped memory ends; one that takes longer than this is not coming."""
_SETTLE_SECONDS = 1.0


class LoadFailed(LMCacheError):
    """KV that the engine counts on could not be loaded. Raised inside the step, whose requests the engine then fails: their
    answers would be made from memory that nobody filled."""


class WorkerSide:
    """shard: which part of a chunk this rank holds. device: of the pool. stores: False where another rank stores that part."""

    def __init__(
        self, session: WorkerSession, reporter: RankReporter, shard: int, device: str = "cpu", *, stores: bool = True
    ) -> None:
        self._session, self._reporter, self._shard, self._device = session, reporter, shard, device
        self._stores = stores
        self._stored: StepPlan | None = None
        self._storing: dict[str, int] = {}
        """Store jobs under way, and whose they are."""
        self._loading: dict[str, bool | None] = {}
        """Load jobs of this step, and how they ended."""
        self._closing: set[int] = set()

    def load(self, plan: StepPlan, stream: Any) -> bool:
        """Let go of blocks that were taken away, then load whatever the step needs; whether all of it is there."""
        self.settle(plan.settle)
        fence = self._stream_point(stream) if plan.loads else None
        self._loading = {load.job_id: None for load in plan.loads}
        for load in plan.loads:
            self._session.load(load.job_id, self._load(load, fence))
        self._wait_loads()
        self.report()
        return all(self._loading.values())

    def start_stores(self, plan: StepPlan, stream: Any) -> None:
        """Start every store of the step, whose forward has been launched on `stream`."""
        if plan is self._stored:
            return
        self._stored = plan
        if not self._stores or not plan.stores:
            return
        point = self._stream_point(stream)
        for store in plan.stores:
            self._storing[store.job_id] = store.request_id
            self._session.store(store.job_id, _store(store, point))

    def settle(self, jobs: Iterable[str]) -> None:
        """Return when these stores no longer read their blocks, which others are about to write to."""
        waiting = {job_id for job_id in jobs if job_id in self._storing}
        while waiting:
            waiting = self._session.wait(waiting, _SETTLE_SECONDS)
            if waiting:
                logger.warning("waiting for %d stores to let go of blocks that were taken away", len(waiting))

    def finished(self, ended: Iterable[int]) -> list[int]:
        """Of the requests that have ended (these and earlier ones), those whose blocks nothing of ours reads any more."""
        self._closing.update(ended)
        self._collect()
        busy = set(self._storing.values())
        ready = [request for request in self._closing if request not in busy]
        self._closing.difference_update(ready)
        self.report()
        return ready

    def report(self) -> None:
        """Tell the scheduler what has changed."""
        self._reporter.tell(self._session.mapped_epoch)

    def _wait_loads(self) -> None:
        end = time.monotonic() + _LOAD_SECONDS
        while None in self._loading.values():
            if not self._session.wait_finished(max(0.0, end - time.monotonic())):
                late = [job_id for job_id, ok in self._loading.items() if ok is None]
                self._session.wait(late)  # they write to blocks: nobody may go on before they have ended
                logger.warning("%d loads did not end in %.0f s", len(late), _LOAD_SECONDS)
                self._collect()
                return
            self._collect()

    def _collect(self) -> None:
        for done in self._session.finished():
            if done.kind == "store":
                self._storing.pop(done.job_id, None)
            elif done.job_id in self._loading:
                self._loading[done.job_id] = done.ok

    def _load(self, load: LoadPlan, fence: Any) -> Load:
        size, hit = load.chunk_tokens, load.hit
        first, end = load.start_token // size, -(-load.end_token // size)
        skip = first - hit.first_chunk
        slots = hit.shard_extents(self._shard)[4 * skip : 4 * (end - hit.first_chunk)]
        return Load(
            hit.epoch,
            hit.lease,
            first,
            slots,
            load.start_token,
            load.end_token,
            load.blocks,
            lease_chunk=skip,
            after=fence,
        )

    def _stream_point(self, stream: Any) -> Any:
        """Where the engine's stream is now: what was launched before it comes before a copy. None on a CPU."""
        if self._device == "cpu":
            return None
        import torch

        point = torch.cuda.Event(blocking=True)
        point.record(stream)
        return point


def _store(store: StorePlan, after: Any) -> Store:
    return Store(store.chunk_tokens, store.parent, store.hashes, store.first_chunk, store.blocks, after=after)
