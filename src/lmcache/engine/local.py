"""An engine whose scheduler and one of its ranks run in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic

from lmcache.engine.copies import Copies, Copy
from lmcache.engine.embedded import NOT_STARTED, EmbeddedServer, wait_connected, wait_for_server
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import RankGroup, shares
from lmcache.engine.requests import GroupTable, Requests, RequestT
from lmcache.engine.scheduler import SchedulerSession
from lmcache.engine.served import ServedKV
from lmcache.engine.worker import WorkerSession
from lmcache.errors import LayoutError
from lmcache.runtime import RUNTIME, Runtime


class LocalRank(Generic[RequestT]):
    """The scheduler's and the rank's session of one process, its requests and its copies. No method raises.

    Args:
        endpoint: the server's address and this process's identity; its role is not used.
        kv: what this rank serves; of a model with several groups, the first one.
        threads: copy threads of one job.
        stages: the layer at which each pipeline stage ends, if the model is split by layers.
        name: the engine's name, as for `Requests`.
        ended: called with each copy that has ended.
        runtime: clock and threads.
        others: the further groups. A block of a group of states holds the state after as many tokens as its place in the table.

    Raises:
        LayoutError: stages of a model with several groups, each of which has its own: give `RankGroup`s to the sessions.
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
        others: Sequence[ServedKV] = (),
    ) -> None:
        if stages and others:
            raise LayoutError(
                f"stages of a model with {1 + len(others)} groups; give the sessions a RankGroup for each group"
            )
        self.kv, self.deadline_seconds = kv, endpoint.deadline_seconds
        scheduler, worker = (replace(endpoint, role=role) for role in ("scheduler", "worker"))
        served = (kv, *others)
        groups = _rank_groups(served, tuple(stages))
        self.scheduler = SchedulerSession(scheduler, *(one.shape for one in groups), runtime=runtime)
        self.worker = WorkerSession(worker, *groups, threads=threads, runtime=runtime)
        tables = [
            GroupTable(0, one.group.reach_tokens if one.group else 0, one.only_last or one.model.kind == "state")
            for one in served
        ]
        shards, stores = [one.shard.index for one in served], [one.stores for one in served]
        self.requests: Requests[RequestT] = Requests(self.scheduler, name=name, groups=tables)
        self.copies = Copies(self.worker, shards, stores=stores, requests=self.requests, ended=ended)

    @property
    def connected(self) -> bool:
        return self.scheduler.connected and self.worker.connected

    def wait_connected(self, seconds: float, own: EmbeddedServer | None = None) -> bool:
        """As `embedded.wait_connected`, for both sessions."""
        return wait_connected((self.scheduler, self.worker), seconds, own)

    def wait_for_server(self, own: EmbeddedServer | None = None, seconds: float | None = None) -> None:
        """As `embedded.wait_for_server`, for both sessions. Serve nothing if the engine's own server has not started."""
        if not wait_for_server((self.scheduler, self.worker), own, seconds):
            self.requests.stop(NOT_STARTED)

    def close(self) -> None:
        """Finish the running copies, drop the queued ones, and close the connections."""
        self.worker.close()
        self.requests.close()


def _rank_groups(served: Sequence[ServedKV], stages: tuple[int, ...]) -> list[RankGroup]:
    sizes = [(one.shard.token_bytes(one.model), one.group.reach_tokens if one.group else 0) for one in served]
    return [
        RankGroup(
            *(one.layout, one.shard, one.paged, one.group, share, int(one.model.kind == "state"), one.block_tokens),
            stages=() if number else stages,
        )
        for number, (one, share) in enumerate(zip(served, shares(sizes), strict=True))
    ]
