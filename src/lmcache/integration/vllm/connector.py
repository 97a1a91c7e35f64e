"""The base of both vLLM connector classes for LMCache: the two sides of a connector, and the calls that both classes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole

from lmcache.engine import SchedulerSession, WorkerSession
from lmcache.engine.blending import Blending
from lmcache.engine.embedded import NOT_STARTED, EmbeddedServer, wait_for_server
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.engine.requests import GroupTable
from lmcache.engine.served import NOT_SERVED, refusal_of
from lmcache.engine.settings import ServerSettings
from lmcache.errors import LayoutError
from lmcache.integration.vllm.blending import given_blending, refuse_blending, with_separator
from lmcache.integration.vllm.caches import describe_rank, layers_of_all_stages
from lmcache.integration.vllm.identity import draft_model_of
from lmcache.integration.vllm.kv_events import Events
from lmcache.integration.vllm.layers import Layers
from lmcache.integration.vllm.model import ModelKV, Stages, describe_model, needs_ranks, zeroes_first
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import StepPlan, StepReport
from lmcache.integration.vllm.resets import watch_resets
from lmcache.integration.vllm.rules import adapts_items, names_items
from lmcache.integration.vllm.runner import watch_runner
from lmcache.integration.vllm.scheduler import SchedulerSide, Synchronous
from lmcache.integration.vllm.settings import recompute_failed_loads
from lmcache.integration.vllm.worker import WorkerSide
from lmcache.observability.log import init_logger

if TYPE_CHECKING:
    from lmcache.integration.vllm.passages import Passages

logger = init_logger(__name__)
_WorkerMetadata: Any = getattr(base, "KVConnectorWorkerMetadata", object)
_HandshakeMetadata: Any = getattr(base, "KVConnectorHandshakeMetadata", object)
_ENDED_WELL = "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"


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


@dataclass
class LMCacheHandshake(_HandshakeMetadata):  # type: ignore[misc]
    """What each rank reports to the scheduler once, before the first step: the layers of all stages and the specs of their KV."""

    stages: Stages


class Connector:
    """One role of a connector: the scheduler's or a rank's. A subclass sets the attributes of vLLM's base class, then calls
    `_describe`."""

    _in_process = False
    """Whether this is a class of in-process mode: the first step waits for the server, copies are logged, and forwards wait for
    all loads that they can wait for."""
    _synchronous: Synchronous = "never"
    """Which loads forwards wait for; none if vLLM cannot hear that such a load has failed."""
    _vllm_config: Any
    _kv_cache_config: Any
    _role: KVConnectorRole
    _connector_metadata: Any

    def _describe(self, settings: ServerSettings) -> None:
        """Describe the served model, and make the scheduler's side."""
        self._settings = settings
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._server: EmbeddedServer | None = None
        self._address = self._refusal = ""
        self._kv: ModelKV | None = None
        self._pool: Any = None
        self._stages: Stages = ()
        transfer = self._vllm_config.kv_transfer_config
        self._instance = str(transfer.engine_id)
        if self._role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(transfer)
        elif given_blending(self._vllm_config) is not None:
            watch_runner()
        hears_ranks = hasattr(base.KVConnectorBase_V1, "set_xfer_handshake_metadata_pp_aware")
        if hears_ranks and needs_ranks(self._vllm_config, self._kv_cache_config):
            if self._role == KVConnectorRole.SCHEDULER:
                return  # until the ranks have reported the layers of all stages
            self._stages = layers_of_all_stages(self._kv_cache_config)
        self._describe_stages(self._stages)

    def _describe_stages(self, stages: Stages) -> None:
        try:
            self._kv = describe_model(
                *(self._vllm_config, self._kv_cache_config, self._settings.model_id, stages, self._settings.lossy_kv)
            )
            if not self._kv.fails_by_request:
                self._synchronous = "always" if self._in_process else self._settings.synchronous_loads
        except NOT_SERVED as error:
            self._refuse(refusal_of(error, "vLLM"))
        if self._role == KVConnectorRole.SCHEDULER and self._kv is not None:
            self._start()

    def _start(self) -> None:
        """Make the scheduler's side with `_serve`, after starting the engine's own server if it needs one."""
        raise NotImplementedError

    def _serve(self, address: str = "") -> None:
        """Make the scheduler's side. address: the server's address if it is not the configured one, else ""."""
        kv, transfer = self._kv, self._vllm_config.kv_transfer_config
        assert kv is not None
        endpoint = self._settings.endpoint(self._instance, "scheduler", address=address)
        groups = [
            GroupShape(one.layout, one.shards, one.group, share, one.stages)
            for one, share in zip(kv.groups, kv.shares, strict=True)
        ]
        events = self._events_of(kv)
        session = SchedulerSession(endpoint, *groups, follows=events is not None)
        self._scheduler = side = SchedulerSide(
            session,
            [
                GroupTable(one.block_tokens, one.reach_tokens, one.model.kind == "state", one.local_tokens)
                for one in kv.groups
            ],
            kv.ranks,
            numbers=[one.number for one in kv.groups],
            can_load=transfer.is_kv_consumer,
            can_store=transfer.is_kv_producer,
            synchronous=self._synchronous,
            logs=self._in_process,
            device=str(self._vllm_config.device_config.device_type),
            config=self._settings.config,
            zeroes=zeroes_first(self._vllm_config, self._kv_cache_config),
            names_items=names_items(self._vllm_config),
            adapts_items=adapts_items(self._vllm_config),
            events=events,
            blending=self._blending_of(kv),
        )
        side.bind_pool(self._pool)
        watch_resets(self._instance, side)
        if not wait_for_server((session,), self._server):
            side.requests.stop(NOT_STARTED)

    def _blending_of(self, kv: ModelKV) -> Blending | None:
        """Return how this engine blends; None, with a log line if that was asked for, if it does not."""
        settings = given_blending(self._vllm_config)
        if settings is None:
            return None
        try:
            refuse_blending(self._vllm_config, kv)
            return with_separator(self._vllm_config, settings)
        except LayoutError as error:
            logger.warning("Nothing is blended, only prefixes are reused: %s", error)
            return None

    def _events_of(self, kv: ModelKV) -> Events | None:
        """Return what makes KV events of the group that has all of a prompt; None if vLLM publishes none, or this engine loads
        nothing, so that routers gain nothing by sending it prompts that the server has."""
        config, first = getattr(self._vllm_config, "kv_events_config", None), kv.groups[0]
        loads = self._vllm_config.kv_transfer_config.is_kv_consumer
        if config is None or not config.enable_kv_cache_events or not loads:
            return None
        if first.reach_tokens:
            logger.info("LMCache publishes no KV events for a model all of whose layers have windows or states")
            return None
        from lmcache.integration.vllm.kv_event_structs import Structs

        return Structs(self._vllm_config, self._kv_cache_config, first.number, first.block_tokens)

    def _attach(self, kv_caches: dict[str, Any], address: str = "") -> None:
        """Make this rank's side. address: as for `_serve`."""
        logger.info("Registering kv caches!")
        kv = self._kv
        if kv is None:
            return
        try:
            number, served, registered = describe_rank(self._vllm_config, self._kv_cache_config, kv, kv_caches)
        except NOT_SERVED as error:
            self._refuse(refusal_of(error, "vLLM"))
            return
        endpoint = self._settings.endpoint(self._instance, "worker", number, address)
        # A drafter's layers are called in some forwards only, and vLLM does not recover from loads that fail for want of a call.
        drafts = draft_model_of(getattr(self._vllm_config, "speculative_config", None)) is not None
        layerwise = self._synchronous != "never" and self._settings.config.use_layerwise and not drafts
        held = [at for at, group in enumerate(kv.groups) if group.layer_names]
        groups = [
            RankGroup(
                *(one.layout, one.shard, one.paged, kv.groups[at].group, kv.shares[at]),
                *(kv.groups[at].state_tokens, kv.groups[at].block_tokens, kv.groups[at].stages),
                kv.groups[at].local_tokens,
            )
            for one, at in zip(served, held, strict=True)
        ]
        passages, no_blending = self._passages_of(kv, groups, registered, number, address)
        self._worker = WorkerSide(
            WorkerSession(endpoint, *groups),
            registered,
            [one.shard.index for one in served],
            held=held if kv.others else (),
            stores=[one.stores for one in served],
            number=number,
            logs=self._in_process,
            fails_by_request=kv.fails_by_request,
            layers=Layers(kv.layer_names, len(registered[0].paged.planes)) if layerwise and not kv.others else None,
            refusal=lambda: kv.identity.failure,
            passages=passages,
            no_blending=no_blending,
        )

    def _passages_of(
        self, kv: ModelKV, groups: Sequence[RankGroup], registered: Sequence[Registered], number: int, address: str
    ) -> tuple[Passages | None, str]:
        """Return what blends in this rank, None for nothing; and why not, "" if the scheduler knows by itself."""
        settings = given_blending(self._vllm_config)
        try:
            if settings is None:
                return None, ""
            refuse_blending(self._vllm_config, kv)
        except LayoutError:
            return None, ""
        from lmcache.integration.vllm.passages import passages_of

        endpoint = self._settings.endpoint(self._instance, "worker", kv.ranks + number, address)
        try:
            given = self._vllm_config, self._kv_cache_config, kv, settings, groups[0], registered[0], endpoint
            return passages_of(*given), ""
        except NOT_SERVED as error:
            return None, refusal_of(error, "vLLM")

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        if self._role == KVConnectorRole.SCHEDULER or self._kv is not None:
            logger.warning("LMCache serves nothing for this engine: %s", reason)

    def _plan(self) -> StepPlan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, LMCacheMetadata) else StepPlan()

    # Worker

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, LMCacheMetadata):
            self._worker.settle(kv_connector_metadata.plan)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._attach(kv_caches)

    def get_handshake_metadata(self) -> LMCacheHandshake | None:
        return LMCacheHandshake(self._stages) if self._stages else None

    def _begin(self) -> None:
        """Start the loads of the step. This does nothing more when it is called again for the same step."""
        plan, worker = self._plan(), self._worker
        if worker is not None:
            if self._in_process or plan.address:
                worker.wait_connected(plan)
            worker.settle(plan)
            worker.start_loads(plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the loads, and wait for those that the next forward reads."""
        self._begin()  # releases of vLLM differ in whether they bind the metadata before
        if self._worker is not None:
            self._worker.wait_before_forward(forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def wait_for_save(self) -> None:
        """Start the stores, which run beside the engine; it keeps the blocks until the stores have ended."""
        if self._worker is not None:
            self._worker.wait_after_forward()
            self._worker.start_stores(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        plan = self._plan()
        if self._worker is not None:
            self._worker.wait_after_forward()  # here too: with a drafter, vLLM asks this before it waits for stores
            sent, received = self._worker.finished(plan)
        else:
            sent = set(plan.closing)
            received = {str(load.request_id) for load in plan.loads if not load.synchronous}
            received |= {blend.request_id for blend in plan.blends}
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the ends of transfers. A model with several groups reports failed loads here, because numbers of blocks do not
        say which group they belong to."""
        sent, received = self.get_finished(finished_req_ids)
        failed: set[str] = set()
        if self._worker is not None:
            failed = self._worker.take_failed_requests()
        elif self._plan().fails_by_request:
            failed = {str(load.request_id) for load in self._plan().loads}
        return base.KVConnectorTransferResults(sent or set(), received or set(), failed)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._worker is not None:
            return self._worker.take_invalid_blocks()
        if self._plan().fails_by_request:
            return set()  # `get_transfer_results` reports the requests
        size = self._vllm_config.cache_config.block_size
        return {block for one in self._plan().filling for block in one.filled(size)}

    def build_connector_worker_meta(self) -> LMCacheWorkerMetadata | None:
        if self._worker is not None:
            report = self._worker.take_report()
        else:
            plan, refusal = self._plan(), self._refusal
            stored = {store.job_id: 1 for store in (*plan.stores, *(one.plan for one in plan.passages))}
            loaded = {load.job_id: 1 for load in plan.loads if load.synchronous}
            report, self._refusal = StepReport(stored, loaded, refusal=refusal), ""
        return LMCacheWorkerMetadata(report) if report else None

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker, self._server):
            if side is not None:
                side.close()
        self._server = None

    # Scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Describe the model if its ranks have reported the layers of all stages. vLLM's `MultiConnector` passes on what the
        first of its connectors has reported, which may be another one's."""
        ours = next(
            (one for one in metadata.values() if isinstance(one, LMCacheHandshake)), None
        )  # every rank's is the same
        if self._kv is None and (ours is not None or needs_ranks(self._vllm_config, self._kv_cache_config)):
            self._stages = ours.stages if ours is not None else ()
            self._describe_stages(self._stages)
        elif self._scheduler is not None and ours is not None and not self._stages:
            self._scheduler.requests.stop(
                "the layers of the first pipeline stage have KV of one shape and those of others do not; use other stages "
                "(--pipeline-parallel-size, or VLLM_PP_LAYER_PARTITION)"
            )

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool
        if self._scheduler is not None:
            self._scheduler.bind_pool(gpu_block_pool)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return the tokens that can be loaded, and whether the request waits for them, unscheduled; None while a tier loads, so
        that vLLM asks again at the next step."""
        tokens = self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else 0
        return tokens, bool(tokens and self._scheduler and not self._scheduler.is_synchronous(request))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

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
        failed = getattr(connector_output, "failed_recving", None) or ()
        self._scheduler.transferred(received, sent, invalid, report, failed)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        params = None
        if request.kv_transfer_params and request.status.name in _ENDED_WELL:
            params = self._scheduler.handed_over(request)
        return self._scheduler.finished(request), params

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def take_events(self) -> Iterable[Any]:
        """Return the KV events since the last call, if vLLM publishes them."""
        events = self._scheduler.events if self._scheduler is not None else None
        return events.take() if events is not None else ()

    def reset_cache(self) -> bool:
        """Serve none of the KV stored so far to this engine any more. Other engines keep their KV."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True
