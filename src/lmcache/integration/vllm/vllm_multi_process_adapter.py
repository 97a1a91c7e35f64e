"""The adapters that vLLM's own connector class calls (LMCACHE_USE_UPSTREAM_MP=1, and vLLM releases that know no other class).

That class works in full blocks: it asserts that hits are full chunks of full blocks, so with 128-token blocks a shared prefix
of 100 tokens is no hit, whatever the chunk size. It gives its adapters neither the LoRA adapter, nor images, nor prompt
embeddings, nor the blocks that a preemption took away. So an engine with any of the first three is not cached through this class,
and each step waits for its stores. `LMCacheMPConnector` of `lmcache_mp_connector` has none of these limits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache.engine import Copy, Loading, LoadPlan, Request, Requests, SchedulerSession
from lmcache.engine.groups import GroupShape
from lmcache.engine.local import LocalRank
from lmcache.engine.served import NOT_SERVED, refusal_of
from lmcache.engine.settings import ServerSettings
from lmcache.errors import ConfigError, LayoutError
from lmcache.integration.vllm.blending import given_blending
from lmcache.integration.vllm.caches import describe_rank
from lmcache.integration.vllm.model import ModelKV, describe_model
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.rules import reads_nothing
from lmcache.integration.vllm.settings import read_settings, recompute_failed_loads
from lmcache.integration.vllm.weights import weight_changes
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_UPSTREAM = "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector"
STORE_SECONDS = 0.5
"""How long a step waits for its stores. Then it drops those that still wait for the server: a silent server costs no more."""
_LIMITS = (
    "vLLM's own connector class caches full blocks only, and no LoRA, multimodal or prompt-embedding requests; unset "
    'LMCACHE_USE_UPSTREAM_MP to use LMCache\'s own class. kv_load_failure_policy is "recompute"'
)


@dataclass
class LoadStoreOp:
    """Tokens [start, end) of a request, and their blocks. The first `skip_first_n_tokens` of them are not loaded."""

    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    start: int = 0
    end: int = 0
    skip_first_n_tokens: int = 0

    def __len__(self) -> int:
        return len(self.block_ids)


@dataclass
class ParallelStrategy:
    """The engine's parallel split, in vLLM's order of fields."""

    use_mla: bool = False
    kv_world_size: int = 1
    kv_worker_id: int = 0
    actual_world_size: int = 1
    actual_worker_id: int = 0
    tp_size: int = 1
    pp_size: int = 1


@dataclass(frozen=True)
class _Engine:
    """The engine that makes the adapter."""

    vllm_config: Any
    kv_cache_config: Any
    kv: ModelKV
    settings: ServerSettings

    @property
    def instance(self) -> str:
        return str(self.vllm_config.kv_transfer_config.engine_id)

    def scheduler_session(self) -> SchedulerSession:
        endpoint = self.settings.endpoint(self.instance, "scheduler")
        return SchedulerSession(endpoint, GroupShape(self.kv.layout, self.kv.shards, stages=self.kv.stages))


class LMCacheMPSchedulerAdapter:
    """The scheduler's adapter: it answers how much of a prompt is cached, in full blocks."""

    def __init__(self, server_url: str, *_: Any, **__: Any) -> None:
        self._requests: Requests[Request] | None = None
        self._found: dict[str, int] = {}
        """Request id -> tokens of the hit, as answered."""
        self._unit_tokens = 0
        """The smallest number of tokens that is a multiple of both chunk and block; fixed with the first server."""
        engine = _engine_of_caller()
        if engine is not None:
            self._block_tokens = engine.kv.block_tokens
            recompute_failed_loads(engine.vllm_config.kv_transfer_config)
            logger.info(_LIMITS)
            if given_blending(engine.vllm_config) is not None:
                logger.warning("Nothing is blended, only prefixes are reused: %s", _LIMITS)
            self._requests = Requests(engine.scheduler_session())

    def num_blocks_per_chunk(self) -> int:
        """Return the number of blocks in the smallest number of tokens that fills both chunks and blocks."""
        chunk_tokens = self._chunk_tokens()
        if not self._unit_tokens and chunk_tokens:
            self._unit_tokens = math.lcm(chunk_tokens, self._block_tokens)
        return max(1, self._unit_tokens // self._block_tokens) if self._requests is not None else 1

    def maybe_submit_lookup_request(self, request_id: str, token_ids: Sequence[int], cache_salt: str = "") -> None:
        """Look the request up, once and again while a tier loads for it. Takes at most the deadline."""
        requests = self._requests
        if requests is None or requests.session is None or request_id in self._found:
            return
        if requests.session.claim_seconds:
            # vLLM does not report the end of a load here. After the life of a claim, the ranks have leases of their own.
            requests.give_back_older(requests.session.claim_seconds)
        self.num_blocks_per_chunk()
        request = requests.open.setdefault(request_id, Request(request_id, cache_salt or ""))
        same_unit = math.lcm(self._chunk_tokens() or 1, self._block_tokens) == self._unit_tokens
        request.may_load = same_unit and not reads_nothing(_local_of_callers("request"))
        if not isinstance(requests.find(request, token_ids), Loading):
            self._found[request_id] = request.found_tokens // max(1, self._unit_tokens) * self._unit_tokens

    def check_lookup_result(self, request_id: str) -> int | None:
        """Return the cached tokens from the start of the prompt; None ("ask later") only while a tier loads."""
        waits = self._requests is not None and request_id in self._requests.open
        return self._found.get(request_id, None if waits else 0)

    def cleanup_lookup_result(self, request_id: str) -> None:
        """Answer 0 for this request from now on; it has its blocks, and the lease holds until the ranks have leases of their own.

        vLLM's class asks again when a load has failed, and after a hit would wait for ever for a second load, which it does not
        start.
        """
        if request_id in self._found:
            self._found[request_id] = 0

    def free_lookup_locks(self, *_: Any, **__: Any) -> None:
        """Do nothing: a part of a lease need not be released, since the complete lease ends within seconds."""

    def end_session(self, request_id: str) -> None:
        """End a request."""
        self._found.pop(request_id, None)
        if self._requests is not None:
            self._requests.finish(request_id)

    def report_block_allocations(self, records: Iterable[Any]) -> None:
        """Do nothing: block allocations are not used."""

    def shutdown(self) -> None:
        if self._requests is not None:
            self._requests.close()

    def _chunk_tokens(self) -> int | None:
        session = self._requests.session if self._requests is not None else None
        return session.chunk_tokens if session is not None else None


class LMCacheMPWorkerAdapter:
    """Loads and stores for one rank."""

    use_mla = False
    """False, so that this adapter and not vLLM's class decides which rank stores."""
    is_first_rank_of_pp_group = True

    def __init__(self, server_url: str, *_: Any, **__: Any) -> None:
        self._engine = _engine_of_caller()
        self._rank: LocalRank[Request] | None = None
        self._registered: Registered | None = None
        self._weights = 0
        """Number of changes of the weights before this rank began to serve."""
        self._received: set[Any] = set()
        self._invalid: set[int] = set()
        _stand_in_for_cuda()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Describe this rank's KV and connect. An engine that cannot be served runs on without LMCache."""
        engine = self._engine
        if engine is None:
            return
        kv = engine.kv
        try:
            number, (served,), (self._registered,) = describe_rank(
                engine.vllm_config, engine.kv_cache_config, kv, kv_caches
            )
        except NOT_SERVED as error:
            logger.warning("LMCache serves nothing for this engine: %s", refusal_of(error, "vLLM"))
            return
        self._weights = weight_changes()
        endpoint = engine.settings.endpoint(engine.instance, "worker", number)
        self._rank = LocalRank(endpoint, served, stages=kv.stages, ended=self._ended)

    def batched_submit_retrieve_requests(
        self,
        request_ids: Sequence[str],
        ops: Sequence[LoadStoreOp],
        event: Any = None,
        *,
        cache_salts: Sequence[str] = (),
    ) -> None:
        """Start the loads. A load that cannot be started is reported as failed, so vLLM computes its tokens."""
        salts = cache_salts or [""] * len(ops)
        for request_id, op, salt in zip(request_ids, ops, salts, strict=True):
            if not self._start_load(Request(request_id, salt or ""), op, event):
                self._received.add(request_id)
                self._invalid.update(op.block_ids[op.skip_first_n_tokens // self._block_tokens :])

    def batched_submit_store_requests(
        self,
        request_ids: Sequence[str],
        ops: Sequence[LoadStoreOp],
        event: Any = None,
        *,
        cache_salts: Sequence[str] = (),
    ) -> None:
        """Store, and return when the blocks are no longer read: vLLM's class does not report that it gives blocks away."""
        if self._rank is None or not self._rank.copies.stores:
            return
        salts = cache_salts or [""] * len(ops)
        begun = [self._start_store(Request("", salt or ""), op, event) for op, salt in zip(ops, salts, strict=True)]
        self._rank.copies.settle([copy for copy in begun if copy is not None], STORE_SECONDS)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return (sent, received). vLLM's class keeps the blocks of every ended request, so each is reported exactly once."""
        loading: set[Any] = set()
        if self._rank is not None:
            self._rank.copies.collect()
            loading = {copy.plan.request_id for copy in self._rank.copies.running(LoadPlan)} | self._received
        received, self._received = self._received, set()
        return finished_req_ids - loading or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid = self._invalid, set()
        return invalid

    def shutdown(self) -> None:
        if self._rank is not None:
            self._rank.close()

    def _start_load(self, request: Request, op: LoadStoreOp, event: Any) -> bool:
        rank, registered = self._rank, self._registered
        if rank is None or registered is None or self._weights_changed():
            return False
        requests = rank.requests
        start = op.start + op.skip_first_n_tokens
        requests.find(request, op.token_ids[: op.end], start, wait=True)
        if request.found_tokens < op.end:
            requests.give_back(request)
            return False
        plan = requests.load(request, start, op.end)
        plan.blocks = self._from_token_0(op)
        rank.copies.load(plan, registered.blocks(plan.blocks), self._after(event))
        return True

    def _start_store(self, request: Request, op: LoadStoreOp, event: Any) -> Copy | None:
        """Return the copy; None if there is nothing to store or this rank cannot store it."""
        rank, registered = self._rank, self._registered
        if rank is None or registered is None:
            return None
        if rank.scheduler.chunk_tokens is None:
            rank.requests.forgone(op.end - op.start)
        tokens = op.token_ids[: op.end]
        plan = None if self._weights_changed() else rank.requests.store(request, tokens, op.end, first_token=op.start)
        if plan is None:
            return None
        return rank.copies.store(plan, registered.blocks(self._from_token_0(op)), self._after(event))

    def _after(self, event: Any) -> Any:
        """Return the point in the stream that copies have to wait for."""
        return None if self._registered is None or self._registered.paged.device == "cpu" else event

    def _weights_changed(self) -> bool:
        """Return whether the weights changed; then this rank serves nothing more, as it cannot notify the scheduler's adapter."""
        return weight_changes() != self._weights

    def _from_token_0(self, op: LoadStoreOp) -> list[int]:
        """Return a block table from token 0 on; its entries before `op.start` are never used."""
        return [0] * (op.start // self._block_tokens) + list(op.block_ids)

    @property
    def _block_tokens(self) -> int:
        return self._engine.kv.block_tokens if self._engine is not None else 1

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, LoadPlan):
            self._received.add(copy.plan.request_id)
            if not copy.ok or self._weights_changed():
                self._invalid.update(copy.plan.filled(self._block_tokens))


def _engine_of_caller() -> _Engine | None:
    """Return the engine that makes an adapter; None, with one log line, if it cannot be served.

    vLLM's class hands over neither its configuration nor the KV's layout, without which KV of one dtype, revision or RoPE
    would be served to another. Both are in the frames of its constructor, so that is where they are taken from.

    Raises:
        ConfigError: a setting cannot be used.
    """
    try:
        vllm_config, kv_cache_config = _configs_of_callers()
        settings = read_settings(vllm_config.kv_transfer_config)
        _refuse_what_is_not_told(vllm_config)
        kv = describe_model(vllm_config, kv_cache_config, settings.model_id, lossy_kv=settings.lossy_kv)
        if kv.fails_by_request:
            raise LayoutError(
                "vLLM's own class of LMCacheMPConnector does not tell which blocks belong to which kind of KV of a model with "
                "sliding windows or Mamba states; unset LMCACHE_USE_UPSTREAM_MP, or use a later release of vLLM"
            )
        return _Engine(vllm_config, kv_cache_config, kv, settings)
    except ConfigError:
        raise
    except NOT_SERVED as error:
        logger.warning("LMCache serves nothing for this engine: %s", refusal_of(error, "vLLM"))
        return None


def _local_of_callers(name: str) -> Any:
    """Return the local variable of this name in the nearest caller that has one; None if no caller has it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_locals.get(name) is None:
        frame = frame.f_back
    return frame.f_locals[name] if frame is not None else None


def _configs_of_callers() -> tuple[Any, Any]:
    vllm_config, kv_cache_config = _local_of_callers("vllm_config"), _local_of_callers("kv_cache_config")
    if getattr(vllm_config, "kv_transfer_config", None) is None or kv_cache_config is None:
        raise LayoutError(
            "this release of vLLM does not show its configuration to the adapters; use LMCache's own LMCacheMPConnector"
        )
    return vllm_config, kv_cache_config


def _refuse_what_is_not_told(vllm_config: Any) -> None:
    model = vllm_config.model_config
    found = [
        name
        for name, present in (
            ("LoRA", getattr(vllm_config, "lora_config", None) is not None),
            ("multimodal content", getattr(model, "is_multimodal_model", False)),
            ("prompt embeddings", getattr(model, "enable_prompt_embeds", False)),
        )
        if present
    ]
    if found:
        raise LayoutError(
            f"vLLM's own connector class does not say which {' or '.join(found)} a request has. {_LIMITS}"
        )


def _stand_in_for_cuda() -> None:
    """Let vLLM's class run on a machine without CUDA.

    The class records a `torch.cuda.Event` on `torch.cuda.current_stream()` before it calls an adapter; both raise if torch has
    no CUDA. No order is needed there: the forward has ended before the call. So the name `torch` in that one module is replaced
    by an object with inert stand-ins for the two and everything else from torch. torch itself is not changed.
    """
    import torch

    module: Any = sys.modules.get(_UPSTREAM)
    if module is None or torch.cuda.is_available() or isinstance(module.torch, _TorchWithoutCuda):
        return
    module.torch = _TorchWithoutCuda(torch)


class _TorchWithoutCuda:
    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cuda = _NoCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


class _NoCuda:
    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, *_: Any) -> None: ...

    def current_stream(self) -> None:
        return None

    def stream(self, _: None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


__all__ = ["LMCacheMPSchedulerAdapter", "LMCacheMPWorkerAdapter", "LoadStoreOp", "ParallelStrategy"]
