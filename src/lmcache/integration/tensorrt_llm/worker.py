"""The worker's side: it loads before the forward, and stores behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmcache.engine import Copies, WorkerSession
from lmcache.engine.plans import StepPlan
from lmcache.engine.points import stream_point
from lmcache.engine.rank_arenas import RankReporter
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_LOAD_SECONDS = 30.0
"""How long a load is waited for: a copy from mapped memory that takes longer has failed."""


class WorkerSide:
    """shard: index of this rank's shard. device: the pool's device. stores: False if another rank stores that shard."""

    def __init__(
        self, session: WorkerSession, reporter: RankReporter, shard: int, device: str = "cpu", *, stores: bool = True
    ) -> None:
        self.session, self._reporter, self._device = session, reporter, device
        self.copies = Copies(session, shard, stores=stores)
        self._stored: StepPlan | None = None

    def load(self, plan: StepPlan, stream: Any) -> bool:
        """Let go of blocks that were taken away, then load whatever the step needs; whether all of it is there."""
        self.copies.let_go(plan.settle)
        fence = stream_point(self._device, stream) if plan.loads else None
        loads = [self.copies.load(load, after=fence) for load in plan.loads]
        if not self.copies.wait(loads, _LOAD_SECONDS):
            logger.warning("%d loads do not end within %.0f s", len(self.copies.running()), _LOAD_SECONDS)
        ok = self.copies.settle(loads, 0.0)  # they write to blocks: the step must not go on before they have ended
        self.report()
        return ok

    def start_stores(self, plan: StepPlan, stream: Any) -> None:
        """Start every store of the step, whose forward has been launched on `stream`."""
        if plan is not self._stored and plan.stores:
            point = stream_point(self._device, stream)
            for store in plan.stores:
                self.copies.store(store, after=point)
        self._stored = plan

    def finished(self, ended: Iterable[int]) -> list[int]:
        """Return each ended request (of this and earlier calls) once, as soon as no store reads its blocks."""
        ready = self.copies.closed(ended)
        self.report()
        return list(ready)

    def report(self) -> None:
        """Tell the scheduler what has changed."""
        self._reporter.tell(self.session.mapped_epoch)
