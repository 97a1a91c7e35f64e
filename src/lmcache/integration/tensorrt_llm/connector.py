"""The base of both presets: the engine's two abstract classes, implemented. No method raises, except for a failed load."""

from __future__ import annotations

import threading
import uuid
import weakref
from contextlib import ExitStack
from typing import Any

from tensorrt_llm._utils import mpi_allgather, mpi_broadcast, mpi_rank

from lmcache.engine import SchedulerSession, WorkerSession
from lmcache.engine.edge import LoadFailed, never_raises
from lmcache.engine.embedded import NOT_STARTED, start_own_server, wait_for_server
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.engine.rank_arenas import RankReporter, RankWatch
from lmcache.engine.served import NOT_SERVED, ServedKV, refusal_of
from lmcache.engine.settings import ServerSettings
from lmcache.integration.tensorrt_llm.model import describe_pool
from lmcache.integration.tensorrt_llm.scheduler import SchedulerSide, StepPlan
from lmcache.integration.tensorrt_llm.worker import WorkerSide
from lmcache.observability.log import init_logger

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:  # releases before 1.2
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import KvCacheConnectorScheduler, KvCacheConnectorWorker

logger = init_logger(__name__)


class Meeting:
    """The shared state of the scheduler and the worker of rank 0, which are in one process. The worker learns the KV's layout
    with the pool; the scheduler begins its work then."""

    def __init__(self, llm_args: Any) -> None:
        self.llm_args = llm_args
        self.instance = f"tensorrt-llm-{uuid.uuid4().hex}"
        self.side: SchedulerSide | None = None
        self.worker: WorkerSide | None = None


_meetings: weakref.WeakValueDictionary[int, Meeting] = weakref.WeakValueDictionary()
_meetings_lock = threading.Lock()


def meet(llm_args: Any) -> Meeting:
    """Return the shared state for this object of arguments; the engine makes scheduler and worker at once, in two threads."""
    with _meetings_lock:
        meeting = _meetings.get(id(llm_args))
        if meeting is None:
            meeting = _meetings[id(llm_args)] = Meeting(llm_args)
        return meeting


class Scheduler(KvCacheConnectorScheduler):  # type: ignore[misc]
    """The scheduler's connector, on rank 0 only."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._meeting = meet(llm_args)

    @never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        side = self._meeting.side
        return (side.match(request, num_computed_tokens) if side is not None else 0), False

    @never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        if self._meeting.side is not None:
            self._meeting.side.allocated(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        side = self._meeting.side
        if side is None:
            return StepPlan()
        try:
            return side.plan_step(scheduler_output)
        except Exception:  # the edge towards the engine; neither promises nor lost blocks must be forgotten with it
            logger.exception("build_connector_meta went wrong; the engine goes on without")
            return StepPlan(settle=side.settle, broken=side.owes)

    @never_raises(lambda: False)
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self._meeting.side is not None and self._meeting.side.finished(request)

    @never_raises(lambda: None)
    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids_by_layer_group: list[list[int]]) -> None:
        """Newer releases, for caches of layer groups. Such an engine does not start without this method."""
        if len(block_ids_by_layer_group) == 1:
            self.update_state_after_alloc(request, block_ids_by_layer_group[0])

    @never_raises(lambda: False)
    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: list[list[int]]) -> bool:
        """As `update_state_after_alloc_by_layer_group`."""
        groups = cache_block_ids_by_layer_group
        return len(groups) == 1 and self.request_finished(request, groups[0])

    @never_raises(lambda: None)
    def request_reset(self, request: Any) -> None:
        """Newer releases: the engine has taken away the blocks of a request that will run again."""
        if self._meeting.side is not None and self._meeting.worker is not None:
            self._meeting.worker.copies.let_go(
                self._meeting.side.reset(request)
            )  # other ranks do before their next forward

    @never_raises(lambda: None)
    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """Newer releases: the engine does not load the offered tokens [start, end)."""
        if self._meeting.side is not None:
            self._meeting.side.cancelled(request, start)


class Worker(KvCacheConnectorWorker):  # type: ignore[misc]
    """The connector of one rank."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._args, self._rank = llm_args, int(mpi_rank())
        self._ranks = int(getattr(llm_args, "tensor_parallel_size", 1) or 1)
        self._started: StepPlan | None = None
        self._load_failed = False
        self._meeting = meet(llm_args) if self._rank == 0 else None
        self._side: WorkerSide | None = None

    def settings(self) -> ServerSettings:
        """Return the settings of the server's address and of loads and stores.

        Raises:
            ConfigError: a setting cannot be used.
        """
        raise NotImplementedError

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """Every rank calls this once, in its main thread."""
        instance = mpi_broadcast(self._meeting.instance if self._meeting is not None else None, 0)
        epoch = b""
        try:
            settings = self.settings()
            kv = describe_pool(self._args, kv_cache_tensor, self._rank, settings.lossy_kv)
            epoch = self._open(kv, settings, instance)
        except NOT_SERVED as error:
            self._refuse(refusal_of(error, "TensorRT-LLM"))
        epochs = mpi_allgather(epoch) if self._ranks > 1 else [epoch]
        if self._meeting is not None and self._meeting.side is not None:
            self._meeting.side.watch.begin(epochs)

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Newer releases, for caches of layer groups; one group is a pool like any other."""
        single = getattr(layout, "as_single_pool_tensor", None)
        pool = single() if single is not None else None
        if pool is not None:
            self.register_kv_caches(pool)
            return
        sizes = {getattr(group, "window_size", None) for group in getattr(layout, "groups", ())}
        if len(sizes) > 1:
            windows = ", ".join(str(size) for size in sorted(size for size in sizes if size is not None))
            full = " and full attention" if None in sizes else ""
            self._refuse(
                f"attention windows of {windows} tokens{full} in one model are not supported: the engine may use less of a hit "
                "than it was offered without telling how much, and would then read windows that were not loaded"
            )
        else:
            self._refuse("this KV cache is not one pool; set kv_cache_config.use_kv_cache_manager_v2=False")

    def start_load_kv(self, stream: Any) -> None:
        """Load the KV that the step needs, and return when it has arrived on all ranks."""
        plan = self._metadata
        if not isinstance(plan, StepPlan) or plan is self._started:
            return
        self._started = plan
        try:
            ok = not plan.broken and (self._side is not None or not plan.loads)
            ok = ok and (self._side is None or self._side.load(plan, stream))
        except Exception:  # the edge towards the engine
            logger.exception("LMCache failed in start_load_kv")
            ok = not plan.loads
        if plan.loads and self._ranks > 1:  # the plan is the same on all ranks, so all ranks reduce
            ok = all(mpi_allgather(ok))
        if self._meeting is not None and self._meeting.side is not None:
            self._meeting.side.loaded()
        self._load_failed = not ok

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Do nothing, since `start_load_kv` returns with all layers loaded; report a failed load inside the step.

        Raises:
            LoadFailed: the engine relies on KV that was not loaded.
        """
        if self._load_failed:
            self._load_failed = False
            raise LoadFailed(
                "LMCache could not load KV that it had promised; the requests of this step have to be asked again"
            )

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Do nothing: all layers are stored together, behind the forward."""

    @never_raises(lambda: None)
    def wait_for_save(self, stream: Any) -> None:
        """Start the stores. They run behind the forward, and the blocks stay until `get_finished` has returned their request."""
        plan = self._metadata
        self.wait_for_layer_load(0, stream)  # where no layer has called it
        if self._side is not None and isinstance(plan, StepPlan):
            self._side.start_stores(plan, stream)

    @never_raises(lambda: ([], []))
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        if self._side is None:
            return list(finished_gen_req_ids), list(started_loading_req_ids)
        return self._side.finished(finished_gen_req_ids), list(started_loading_req_ids)

    def _open(self, kv: ServedKV, settings: ServerSettings, instance: str) -> bytes:
        """Make the sessions of this rank and, on rank 0, of the scheduler. They end with this object, or with the process.

        Return the epoch whose arena is mapped by now.
        """
        own, scheduler = None, None
        with ExitStack() as opened:
            if self._meeting is not None and not settings.address:
                own = start_own_server(instance, settings.config)
                if own is None:
                    return b""
                opened.callback(own.close)
            if self._meeting is not None:
                scheduler = self._open_scheduler(kv, settings, instance)
                opened.callback(scheduler.close)
            endpoint = settings.endpoint(instance, "worker", self._rank)
            session = WorkerSession(endpoint, RankGroup(kv.layout, kv.shard, kv.paged))
            opened.callback(session.close)
            started = wait_for_server((session, *([scheduler.session] if scheduler is not None else [])), own)
            if scheduler is not None and not started:
                scheduler.requests.stop(NOT_STARTED)
            epoch = session.mapped_epoch
            reporter = RankReporter(instance, self._rank, epoch)
            opened.callback(reporter.close)
            self._side = side = WorkerSide(session, reporter, kv.shard.index, kv.paged.device, stores=kv.stores)
            weakref.finalize(self, opened.pop_all().close)
        if self._meeting is not None:
            self._meeting.side, self._meeting.worker = scheduler, side
        logger.info("Registering kv caches!")
        return epoch

    def _open_scheduler(self, kv: ServedKV, settings: ServerSettings, instance: str) -> SchedulerSide:
        endpoint = settings.endpoint(instance, "scheduler")
        session = SchedulerSession(endpoint, GroupShape(kv.layout, kv.shard.count))
        return SchedulerSide(session, RankWatch(instance, self._ranks), kv.paged.block_tokens, settings.config)

    def _refuse(self, why: str) -> None:
        logger.warning("LMCache serves nothing for this engine: %s", why)
