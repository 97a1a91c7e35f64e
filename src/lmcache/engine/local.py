"""An engine whose scheduler and one of its ranks live in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic

from lmcache.engine.connection import Endpoint
from lmcache.engine.copies import Copies, Copy
from lmcache.engine.embedded import wait_connected
from lmcache.engine.requests import Requests, RequestT
from lmcache.engine.runtime import RUNTIME, Runtime
from lmcache.engine.scheduler import SchedulerSession
from lmcache.engine.served import ServedKV
from lmcache.engine.worker import WorkerSession


class LocalRank(Generic[RequestT]):
    """Both sessions of such a process, its requests and its copies. Nothing raises.

    Args:
        endpoint: where the server is and who asks, in whatever role.
        kv: what this rank serves.
        threads: copy threads of one job.
        stages: where each pipeline stage ends, where the model is split by layers.
        name: of the engine, as `Requests` has it.
        ended: is called with each copy that has ended.
        runtime: clock and threads.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        kv: ServedKV,
        *,
        threads: int = 1,
        stages: Sequence[int] = (),
        name: str = "",
        ended: Callable[[Copy], None] | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.kv, self.deadline_seconds = kv, endpoint.deadline_seconds
        scheduler, worker = (replace(endpoint, role=role) for role in ("scheduler", "worker"))
        self.scheduler = SchedulerSession(scheduler, kv.layout, kv.shard.count, stages, runtime)
        self.worker = WorkerSession(worker, kv.layout, kv.shard, kv.paged, threads, stages, runtime)
        self.requests: Requests[RequestT] = Requests(self.scheduler, name=name)
        self.copies = Copies(self.worker, kv.shard.index, stores=kv.stores, requests=self.requests, ended=ended)

    @property
    def connected(self) -> bool:
        return self.scheduler.connected and self.worker.connected

    def wait_connected(self, seconds: float, running: Callable[[], bool] = lambda: True) -> bool:
        """As `embedded.wait_connected`, for both sessions."""
        return wait_connected((self.scheduler, self.worker), seconds, running)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """As `SchedulerSession.wait_for_server`, for both sessions."""
        self.scheduler.wait_for_server(seconds)
        self.worker.wait_for_server(seconds)

    def close(self) -> None:
        """Finish the copy at hand, drop what waits, and hang up."""
        self.worker.close()
        self.requests.close()
