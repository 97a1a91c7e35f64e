"""In-process mode: what vLLM's `LMCacheConnectorV1` forwards its calls to.

The engine has a server of its own (`lmcache.engine.embedded`), started by the scheduler and found by the ranks. The class that
calls has its own contract, older than the connector's: a load is part of the step that needs it, block tables are known from the
scheduler's output only, and some calls are not forwarded. Those are bound to the calling object itself, so that both modes
run the same two halves.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole

from lmcache.config.engine import EngineSettings
from lmcache.engine.embedded import EmbeddedServer, embedded_address
from lmcache.integration.vllm.lmcache_mp_connector import (
    LMCacheMetadata,
    LMCacheWorkerMetadata,
    scheduler_side,
    worker_side,
)
from lmcache.integration.vllm.model import NOT_SERVED, ModelKV, describe_model, refusal_of
from lmcache.integration.vllm.own_server import engine_settings, offloading_size_gb, start_server
from lmcache.integration.vllm.plan import StepPlan, StepReport
from lmcache.integration.vllm.scheduler import SchedulerSide
from lmcache.integration.vllm.settings import Settings, recompute_failed_loads
from lmcache.integration.vllm.worker import WorkerSide, ended_stores, refuse_loads
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_NOT_FORWARDED = (
    "handle_preemptions",
    "build_connector_worker_meta",
    "update_connector_output",
    "reset_cache",
    "shutdown",
)


class LMCacheConnectorV1Impl:
    """One role of the connector: the scheduler's or a rank's.

    Raises:
        ConfigError: a setting is wrong. Whatever else is the matter, the engine runs on without a cache, and the log says why.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, parent_connector: Any) -> None:
        found = engine_settings(vllm_config)
        self._config = found.config
        self._vllm_config, self._role, self._parent = vllm_config, role, parent_connector
        self._kv_cache_config = getattr(parent_connector, "_kv_cache_config", None)
        self._settings = Settings(
            deadline_seconds=self._config.blocking_timeout_secs,
            model_id=str(vllm_config.kv_transfer_config.get_from_extra_config("lmcache.mp.model_id", "")),
        )
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._server: EmbeddedServer | None = None
        self._refusal = ""
        self._kv: ModelKV | None = None
        self._notify_parent = parent_connector.update_connector_output
        for name in _NOT_FORWARDED:
            setattr(parent_connector, name, getattr(self, name))
        try:
            self._kv = describe_model(vllm_config, self._kv_cache_config, self._settings.model_id)
        except NOT_SERVED as error:
            self._refuse(refusal_of(error))
        if role == KVConnectorRole.SCHEDULER:
            for warning in found.warnings:
                logger.warning("%s", warning)
            recompute_failed_loads(vllm_config.kv_transfer_config)
            if self._kv is not None:
                self._start(found)

    def _start(self, found: EngineSettings) -> None:
        """Start the server and make the scheduler's half; without the one there is not the other."""
        instance, config = str(self._vllm_config.kv_transfer_config.engine_id), self._config
        # Releases whose --kv-offloading-backend lmcache means this class give each rank its part of the size.
        server = self._server = start_server(instance, found, offloading_size_gb(self._vllm_config))
        if server is None or self._kv is None:
            return
        self._scheduler = scheduler_side(
            self._vllm_config,
            self._kv,
            self._settings,
            server.address,
            synchronous=True,
            save_decode=config.save_decode_cache,
            save_tail=config.save_unfull_chunk,
            min_hit=config.min_retrieve_tokens,
            priority_limit=config.priority_limit,
        )
        self._scheduler.wait_connected(lambda: server.running)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        logger.info("Registering kv caches!")
        if self._kv is None:
            return
        address = embedded_address(str(self._vllm_config.kv_transfer_config.engine_id))
        try:
            self._worker = worker_side(
                self._vllm_config,
                self._kv_cache_config,
                self._kv,
                kv_caches,
                self._settings,
                address,
                synchronous=True,
                layerwise=self._config.use_layerwise,
            )
        except NOT_SERVED as error:
            self._refuse(refusal_of(error))

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, LMCacheMetadata):
            self._worker.settle(kv_connector_metadata.plan)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            self._begin(self._worker)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """What is computed next reads what is loaded here; releases from 0.32 on come here first where there are loads."""
        if self._worker is not None:
            self._begin(self._worker)  # once a step; releases before 0.32 do not tell of the binding
            self._worker.wait_before_forward(forward_context)

    def _begin(self, worker: WorkerSide) -> None:
        plan = self._plan()
        worker.wait_connected(plan)
        worker.settle(plan)
        worker.start_loads(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        """Stores go on behind the engine; it keeps the blocks until they have ended."""
        if self._worker is not None:
            self._worker.wait_after_forward()
            self._worker.start_stores(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        plan = self._plan()
        if self._worker is None:
            return set(plan.closing) or None, None
        self._worker.wait_after_forward()  # here too: with a drafter, vLLM asks this before it waits for stores
        return self._worker.finished(plan)[0] or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._worker is not None:
            return self._worker.take_invalid_blocks()
        return refuse_loads(self._plan(), self._vllm_config.cache_config.block_size)[1]

    def build_connector_worker_meta(self) -> LMCacheWorkerMetadata | None:
        if self._worker is not None:
            report = self._worker.take_report()
        else:
            plan = self._plan()
            loaded = {load.job_id: 1 for load in plan.loads}
            report = StepReport(stored=ended_stores(plan), loaded=loaded, refusal=self._refusal)
            self._refusal = ""
        return LMCacheWorkerMetadata(report) if report else None

    def get_kv_events(self) -> list[Any]:
        return []

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        if self._server is not None:
            self._server.close()
            self._server = None

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> int | None:
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else 0

    def update_state_after_alloc(self, request: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, [], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._scheduler is None:
            return LMCacheMetadata(StepPlan(forward=scheduler_output.total_num_scheduled_tokens > 0))
        return LMCacheMetadata(self._scheduler.plan_step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._notify_parent(connector_output)
        if self._scheduler is None:
            return
        meta = getattr(connector_output, "kv_connector_worker_meta", None)
        report = meta.report if isinstance(meta, LMCacheWorkerMetadata) else None
        invalid = getattr(connector_output, "invalid_block_ids", None) or ()
        self._scheduler.transferred((), connector_output.finished_sending or (), invalid, report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return (self._scheduler is not None and self._scheduler.finished(request)), None

    def reset_cache(self) -> bool:
        """What was kept so far is not served to this engine any more."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def _plan(self) -> StepPlan:
        metadata = getattr(self._parent, "_connector_metadata", None)
        return metadata.plan if isinstance(metadata, LMCacheMetadata) else StepPlan()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        if self._role == KVConnectorRole.SCHEDULER or self._kv is not None:
            logger.warning("LMCache serves nothing for this engine: %s", reason)
