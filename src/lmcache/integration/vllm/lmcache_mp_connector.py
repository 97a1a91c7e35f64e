"""`LMCacheMPConnector`: vLLM's KV connector for an LMCache server. It only turns vLLM's calls into those of two halves.

Loads are asynchronous: the request waits, unscheduled, while the ranks copy, so no forward pass ever waits for a load
and `wait_for_layer_load`/`save_kv_layer` have nothing to do. What to copy travels in our own metadata; the forward
context is never looked at (with CUDA graphs it says nothing).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from lmcache.engine import SchedulerSession, WorkerSession
from lmcache.engine.embedded import EmbeddedServer
from lmcache.integration.vllm.caches import describe_caches, rank_of
from lmcache.integration.vllm.layers import Layers
from lmcache.integration.vllm.model import NOT_SERVED, ModelKV, describe_model, layer_range, refusal_of
from lmcache.integration.vllm.own_server import offloading_size_gb, server_for_offloading
from lmcache.integration.vllm.plan import StepPlan, StepReport
from lmcache.integration.vllm.resets import watch_resets
from lmcache.integration.vllm.scheduler import SchedulerSide
from lmcache.integration.vllm.settings import Settings, read_settings, recompute_failed_loads
from lmcache.integration.vllm.weights import watch_weights
from lmcache.integration.vllm.worker import WorkerSide, ended_stores, refuse_loads, stats_of
from lmcache.observability.log import init_logger

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _HIT_SOURCE: Any = CacheHitSource.HOST
except ImportError:  # before vLLM 0.30
    _HIT_SOURCE = None
_SupportsHMA: Any = getattr(base, "SupportsHMA", object)
_WorkerMetadata: Any = getattr(base, "KVConnectorWorkerMetadata", object)

logger = init_logger(__name__)


class LMCacheMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step's plan, from the scheduler to every rank."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self.plan = plan


class LMCacheWorkerMetadata(_WorkerMetadata):  # type: ignore[misc]
    """A rank's report, back to the scheduler."""

    def __init__(self, report: StepReport) -> None:
        self.report = report

    def aggregate(self, other: LMCacheWorkerMetadata) -> LMCacheWorkerMetadata:
        self.report.merge(other.report)
        return self


class LMCacheMPConnector(KVConnectorBase_V1, _SupportsHMA):  # type: ignore[misc]
    """Loads prompts' KV from, and stores it in, the LMCache server at `lmcache.mp.host`:`lmcache.mp.port`."""

    if _HIT_SOURCE is not None:
        _cache_hit_source = _HIT_SOURCE

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = read_settings(vllm_config.kv_transfer_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._refusal = ""
        self._block_tokens = vllm_config.cache_config.block_size
        self._kv: ModelKV | None = None
        self._kv_caches: dict[str, Any] | None = None
        """Registered, while the scheduler has not told where the server is."""
        self._server: EmbeddedServer | None = None
        self._address = ""
        try:
            self._kv = describe_model(vllm_config, kv_cache_config, self._settings.model_id)
        except NOT_SERVED as error:
            self._refuse(refusal_of(error))
        if role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(vllm_config.kv_transfer_config)
            if self._kv is not None:
                self._start(self._kv)

    def _start(self, kv: ModelKV) -> None:
        """Make the scheduler's half, and its server where it has to have one of its own."""
        if offloading_size_gb(self._vllm_config):
            instance = str(self._vllm_config.kv_transfer_config.engine_id)
            self._server, self._address = server_for_offloading(instance, self._vllm_config, self._settings)
            if not self._address:
                return
        self._scheduler = scheduler_side(self._vllm_config, kv, self._settings, self._address)
        server = self._server
        if server is not None:
            self._scheduler.wait_connected(lambda: server.running)
        else:
            self._scheduler.wait_for_server()

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is a later miss."""
        return False

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        logger.info("Registering kv caches!")
        self._kv_caches = kv_caches
        if not offloading_size_gb(self._vllm_config):
            self._attach("")

    def _attach(self, address: str) -> None:
        """Make this rank's half; `address` is that of the server where it is not the configured one."""
        kv_caches, self._kv_caches = self._kv_caches, None
        if self._kv is None or kv_caches is None:
            return
        try:
            self._worker = worker_side(
                self._vllm_config, self._kv_cache_config, self._kv, kv_caches, self._settings, address
            )
        except NOT_SERVED as error:
            self._refuse(refusal_of(error))

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, LMCacheMetadata):
            self._worker.settle(kv_connector_metadata.plan)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """vLLM starts asynchronous loads after the forward; that may take seconds, and the loads need not wait for it."""
        super().bind_connector_metadata(connector_metadata)
        if self._kv_caches is not None and self._plan().address:
            self._attach(self._plan().address)
        if self._worker is not None:
            if self._plan().address:
                self._worker.wait_connected(self._plan())
            self._worker.start_loads(self._plan())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.start_stores(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        plan = self._plan()
        if self._worker is not None:
            sent, received = self._worker.finished(plan)
        else:
            sent, received = set(plan.closing), refuse_loads(plan, self._block_tokens)[0]
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._worker is not None:
            return self._worker.take_invalid_blocks()
        return refuse_loads(self._plan(), self._block_tokens)[1]

    def build_connector_worker_meta(self) -> LMCacheWorkerMetadata | None:
        if self._worker is not None:
            report = self._worker.take_report()
        else:
            report = StepReport(stored=ended_stores(self._plan()), refusal=self._refusal)
            self._refusal = ""
        return LMCacheWorkerMetadata(report) if report else None

    def get_kv_connector_stats(self) -> Any:
        if self._worker is None or not self._worker.reports_stats:
            return None
        from lmcache.integration.vllm.stats import LMCacheStats

        stats = LMCacheStats(data=stats_of(self._worker))
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        if self._server is not None:
            self._server.close()
            self._server = None

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """None: a tier is loading, ask again at the next step."""
        tokens = self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else 0
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._scheduler is None:
            return LMCacheMetadata(StepPlan(forward=scheduler_output.total_num_scheduled_tokens > 0))
        plan = self._scheduler.plan_step(scheduler_output)
        plan.address = self._address
        return LMCacheMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is None:
            return
        meta = getattr(connector_output, "kv_connector_worker_meta", None)
        report = meta.report if isinstance(meta, LMCacheWorkerMetadata) else None
        invalid: Iterable[int] = getattr(connector_output, "invalid_block_ids", None) or ()
        received, sent = connector_output.finished_recving or (), connector_output.finished_sending or ()
        self._scheduler.transferred(received, sent, invalid, report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return (self._scheduler is not None and self._scheduler.finished(request)), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """What was kept so far is not served to this engine any more; other engines' KV stays where it is."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        from lmcache.integration.vllm.stats import LMCacheStats

        return LMCacheStats(data=data) if data is not None else LMCacheStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        from lmcache.integration.vllm.stats import LMCachePromMetrics

        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _plan(self) -> StepPlan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, LMCacheMetadata) else StepPlan()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        if self._role == KVConnectorRole.SCHEDULER or self._kv is not None:
            logger.warning("LMCache serves nothing for this engine: %s", reason)


def scheduler_side(vllm_config: Any, kv: ModelKV, settings: Settings, address: str = "", **rules: Any) -> SchedulerSide:
    """The scheduler's half for this engine. rules: keyword arguments of `SchedulerSide`."""
    transfer = vllm_config.kv_transfer_config
    engine_id = str(transfer.engine_id)
    endpoint = settings.endpoint(engine_id, "scheduler", address=address)
    half = SchedulerSide(
        SchedulerSession(endpoint, kv.layout, kv.shards, kv.stages),
        kv.block_tokens,
        kv.ranks,
        can_load=transfer.is_kv_consumer,
        can_store=transfer.is_kv_producer,
        device=str(vllm_config.device_config.device_type),
        **rules,
    )
    watch_resets(engine_id, half)
    return half


def worker_side(
    vllm_config: Any,
    kv_cache_config: Any,
    kv: ModelKV,
    kv_caches: dict[str, Any],
    settings: Settings,
    address: str = "",
    *,
    synchronous: bool = False,
    layerwise: bool = False,
) -> WorkerSide:
    """This rank's half. layerwise: whether forwards wait for loads layer by layer, where they wait at all.

    Raises:
        NOT_SERVED: its KV cannot be described.
    """
    tp_rank, pp_rank = rank_of()
    shard = kv.shard(tp_rank, pp_rank, layer_range(vllm_config, kv))
    registered = describe_caches(vllm_config, kv_cache_config, kv, kv_caches)
    watch_weights(vllm_config)
    rank = pp_rank * kv.tp_size + tp_rank
    endpoint = settings.endpoint(str(vllm_config.kv_transfer_config.engine_id), "worker", rank, address)
    session = WorkerSession(endpoint, kv.layout, shard, registered.paged, stages=kv.stages)
    layers = Layers(kv.layer_names, len(registered.paged.planes)) if layerwise else None
    stores = kv.stores(tp_rank)
    half = WorkerSide(
        session,
        registered,
        shard.index,
        shard.count,
        stores=stores,
        synchronous=synchronous,
        layers=layers,
        refusal=lambda: kv.identity.failure,
    )
    half.reports_stats = tp_rank == 0 and pp_rank == 0
    return half


__all__ = ["LMCacheMPConnector"]
