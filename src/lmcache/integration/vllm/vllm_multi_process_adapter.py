"""What vLLM's own connector class calls (LMCACHE_USE_UPSTREAM_MP=1, and vLLM releases that know no other).

That class works in whole blocks: it asserts hits of whole chunks of whole blocks, so with 128-token blocks a shared prefix
of 100 tokens shows nothing, whatever the chunk size. It tells its adapters neither LoRA adapter, nor images, nor prompt
embeddings, nor which blocks a preemption took away. So an engine with any of the first three is not cached through it, and
stores are waited for within the step. `LMCacheMPConnector` of `lmcache_mp_connector` has none of these limits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache.chunks import HASH_BYTES
from lmcache.engine import Hit, Load, Loading, SchedulerSession, Store, WorkerSession
from lmcache.errors import LayoutError
from lmcache.integration.vllm.caches import describe_caches, rank_of
from lmcache.integration.vllm.model import NOT_SERVED, ModelKV, describe_model, layer_range, refusal_of
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.rules import reads_nothing
from lmcache.integration.vllm.settings import (
    Settings,
    read_settings,
    recompute_failed_loads,
)
from lmcache.integration.vllm.weights import watch_weights, weight_changes
from lmcache.integration.vllm.worker import extents_of_shard
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_UPSTREAM = "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector"
STORE_SECONDS = 0.5
"""A step waits this long for its stores; then those that still wait for the server are dropped, so a silent one costs no more."""
_LIMITS = (
    "vLLM's own connector class caches whole blocks only, and no LoRA, multimodal or prompt-embedding requests; unset "
    'LMCACHE_USE_UPSTREAM_MP for ours. kv_load_failure_policy is "recompute"'
)


@dataclass
class LoadStoreOp:
    """Tokens [start, end) of a request and the blocks they lie in. The first `skip_first_n_tokens` of them are not loaded."""

    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    start: int = 0
    end: int = 0
    skip_first_n_tokens: int = 0

    def __len__(self) -> int:
        return len(self.block_ids)


@dataclass
class ParallelStrategy:
    """How the engine is split, in vLLM's order of fields."""

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
    settings: Settings

    @property
    def instance(self) -> str:
        return str(self.vllm_config.kv_transfer_config.engine_id)


class LMCacheMPSchedulerAdapter:
    """Answers how much of a prompt is there, in whole blocks."""

    def __init__(self, server_url: str, *_: Any, **__: Any) -> None:
        self._session: SchedulerSession | None = None
        self._hits: dict[str, tuple[int, Hit | None, float]] = {}
        self._waiting: set[str] = set()
        """Requests for which a tier is loading."""
        self._unit_tokens = 0
        """Tokens of the smallest run that is both whole chunks and whole blocks; settled with the first server."""
        engine = _engine_of_caller()
        if engine is not None:
            self._block_tokens = engine.kv.block_tokens
            recompute_failed_loads(engine.vllm_config.kv_transfer_config)
            logger.info(_LIMITS)
            endpoint = engine.settings.endpoint(engine.instance, "scheduler")
            self._session = SchedulerSession(endpoint, engine.kv.layout, engine.kv.shards, engine.kv.stages)

    def num_blocks_per_chunk(self) -> int:
        """Blocks of that smallest run."""
        if self._session is None:
            return 1
        if not self._unit_tokens and self._session.chunk_tokens:
            self._unit_tokens = math.lcm(self._session.chunk_tokens, self._block_tokens)
        return max(1, self._unit_tokens // self._block_tokens)

    def maybe_submit_lookup_request(self, request_id: str, token_ids: Sequence[int], cache_salt: str = "") -> None:
        """Ask the server, once for each request and again while a tier loads for it; takes at most the deadline."""
        if self._session is None or request_id in self._hits:
            return
        self._drop_old_leases()
        self.num_blocks_per_chunk()
        chain = self._session.new_chain(cache_salt or "")
        hit = None
        if reads_nothing(_local_of_callers("request")):
            chain = None
        if chain is not None and math.lcm(chain.chunk_tokens, self._block_tokens) == self._unit_tokens:
            chain.extend(token_ids)
            found = self._session.poll(chain, request_id=request_id)
            if isinstance(found, Loading):
                self._waiting.add(request_id)
                return
            hit = found
        self._waiting.discard(request_id)
        tokens = hit.chunks * chain.chunk_tokens // self._unit_tokens * self._unit_tokens if hit and chain else 0
        self._hits[request_id] = tokens, hit, time.monotonic()

    def check_lookup_result(self, request_id: str) -> int | None:
        """Tokens that are there, from the prompt's start. None, which means "ask later", only while a tier loads."""
        if request_id in self._waiting:
            return None
        return self._hits[request_id][0] if request_id in self._hits else 0

    def cleanup_lookup_result(self, request_id: str) -> None:
        """The request has its blocks; the lease holds until the ranks have taken theirs.

        From now on nothing is there for it: vLLM's class asks again when a load has failed, and would then wait for ever
        for a second one, which it does not start.
        """
        if request_id in self._hits:
            self._hits[request_id] = 0, *self._hits[request_id][1:]

    def free_lookup_locks(self, *_: Any, **__: Any) -> None:
        """Of parts of a lease: not needed, since all of it ends within seconds."""

    def end_session(self, request_id: str) -> None:
        """The request has ended."""
        self._waiting.discard(request_id)
        _, hit, _ = self._hits.pop(request_id, (0, None, 0.0))
        if hit is not None and self._session is not None:
            self._session.release(hit)

    def report_block_allocations(self, records: Iterable[Any]) -> None:
        """Of no use to us."""

    def shutdown(self) -> None:
        if self._session is not None:
            self._session.close()

    def _drop_old_leases(self) -> None:
        """The scheduler is not told when a load has ended. After the life of a claim, the ranks have leases of their own."""
        session, now = self._session, time.monotonic()
        if session is None or not session.claim_seconds:
            return
        for request_id, (tokens, hit, at) in list(self._hits.items()):
            if hit is not None and now - at > session.claim_seconds:
                session.release(hit)
                self._hits[request_id] = tokens, None, at


class LMCacheMPWorkerAdapter:
    """Loads and stores for one rank."""

    use_mla = False
    """Which rank stores is decided here, not by vLLM's class."""
    is_first_rank_of_pp_group = True

    def __init__(self, server_url: str, *_: Any, **__: Any) -> None:
        self._engine = _engine_of_caller()
        self._lookups: SchedulerSession | None = None
        self._session: WorkerSession | None = None
        self._registered: Registered | None = None
        self._shard = 0
        self._stores = True
        self._weights = 0
        """Changes of the weights before this rank began to serve."""
        self._jobs = 0
        self._loading: dict[str, tuple[str, Hit, list[int]]] = {}
        self._storing: set[str] = set()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        _stand_in_for_cuda()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Describe this rank's KV and connect; an engine that cannot be served runs on without us."""
        engine = self._engine
        if engine is None:
            return
        try:
            tp_rank, pp_rank = rank_of()
            shard = engine.kv.shard(tp_rank, pp_rank, layer_range(engine.vllm_config, engine.kv))
            registered = describe_caches(engine.vllm_config, engine.kv_cache_config, engine.kv, kv_caches)
        except NOT_SERVED as error:
            logger.warning("LMCache serves nothing for this engine: %s", refusal_of(error))
            return
        watch_weights(engine.vllm_config)
        self._weights = weight_changes()
        rank = pp_rank * engine.kv.tp_size + tp_rank
        self._shard, self._stores, self._registered = shard.index, engine.kv.stores(tp_rank), registered
        self._lookups = SchedulerSession(
            engine.settings.endpoint(engine.instance, "scheduler", rank),
            engine.kv.layout,
            engine.kv.shards,
            engine.kv.stages,
        )
        endpoint = engine.settings.endpoint(engine.instance, "worker", rank)
        self._session = WorkerSession(endpoint, engine.kv.layout, shard, registered.paged, stages=engine.kv.stages)

    def batched_submit_retrieve_requests(
        self,
        request_ids: Sequence[str],
        ops: Sequence[LoadStoreOp],
        event: Any = None,
        *,
        cache_salts: Sequence[str] = (),
    ) -> None:
        """Start the loads. What cannot be started is reported as failed, so its tokens are computed."""
        salts = cache_salts or [""] * len(ops)
        for request_id, op, salt in zip(request_ids, ops, salts, strict=True):
            if not self._start_load(request_id, op, salt or "", event):
                self._received.add(request_id)
                self._invalid.update(self._blocks_to_fill(op))

    def batched_submit_store_requests(
        self,
        request_ids: Sequence[str],
        ops: Sequence[LoadStoreOp],
        event: Any = None,
        *,
        cache_salts: Sequence[str] = (),
    ) -> None:
        """Store, and return when the blocks are no longer read: nobody would tell us that they were given away."""
        session = self._session
        if session is None or not self._stores:
            return
        salts = cache_salts or [""] * len(ops)
        jobs = {job for op, salt in zip(ops, salts, strict=True) if (job := self._start_store(op, salt or "", event))}
        self._storing |= jobs
        end = time.monotonic() + STORE_SECONDS
        while jobs & self._storing and time.monotonic() < end:
            session.wait_finished(0.05)
            self._collect()
        while jobs & self._storing:
            self._storing -= jobs - session.wait(jobs & self._storing, 1.0)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """vLLM's class keeps the blocks of every request that ends, so each is reported: once, and not by its load too."""
        self._collect()
        loading = {request_id for request_id, _, _ in self._loading.values()} | self._received
        sent = {request_id for request_id in finished_req_ids if request_id not in loading}
        received, self._received = self._received, set()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid = self._invalid, set()
        return invalid

    def shutdown(self) -> None:
        for session in (self._session, self._lookups):
            if session is not None:
                session.close()

    def _start_load(self, request_id: str, op: LoadStoreOp, salt: str, event: Any) -> bool:
        session, lookups, registered = self._session, self._lookups, self._registered
        chain = lookups.new_chain(salt) if lookups is not None and not self._weights_changed() else None
        if session is None or lookups is None or registered is None or chain is None:
            return False
        chain.extend(op.token_ids[: op.end])
        start = op.start + op.skip_first_n_tokens
        hit = lookups.lookup(chain, start, request_id=request_id)
        size = chain.chunk_tokens
        if hit is None or hit.chunks * size < op.end:
            if hit is not None:
                lookups.release(hit)
            return False
        first = start // size
        slots = extents_of_shard(
            hit.extents, self._shard, hit.shards, first - hit.first_chunk, -(-op.end // size) - hit.first_chunk
        )
        self._jobs += 1
        job_id = f"load-{self._jobs}"
        self._loading[job_id] = request_id, hit, self._blocks_to_fill(op)
        blocks = registered.blocks(self._from_token_0(op))
        after = None if registered.paged.device == "cpu" else event
        load = Load(hit.epoch, hit.lease, first, slots, start, op.end, blocks, first - hit.first_chunk, after)
        session.load(job_id, load)
        return True

    def _start_store(self, op: LoadStoreOp, salt: str, event: Any) -> str:
        """The job's id, "" where there is nothing to store or nobody to store it."""
        session, lookups, registered = self._session, self._lookups, self._registered
        if lookups is not None and lookups.chunk_tokens is None:
            lookups.forgone(op.end - op.start)
            return ""
        chain = lookups.new_chain(salt) if lookups is not None and not self._weights_changed() else None
        if session is None or registered is None or chain is None:
            return ""
        size = chain.chunk_tokens
        first, chunks = -(-op.start // size), op.end // size
        if chunks <= first:
            return ""
        chain.extend(op.token_ids[: op.end])
        self._jobs += 1
        job_id = f"store-{self._jobs}"
        hashes = chain.hashes[first * HASH_BYTES : chunks * HASH_BYTES]
        blocks = registered.blocks(self._from_token_0(op))
        after = None if registered.paged.device == "cpu" else event
        session.store(job_id, Store(size, chain.parent(first), hashes, first, blocks, after))
        return job_id

    def _weights_changed(self) -> bool:
        """Once they have, this rank serves nothing any more: nobody here can tell the scheduler's adapter of it."""
        return weight_changes() != self._weights

    def _blocks_to_fill(self, op: LoadStoreOp) -> list[int]:
        return op.block_ids[op.skip_first_n_tokens // self._manager_block_tokens() :]

    def _from_token_0(self, op: LoadStoreOp) -> list[int]:
        """A block table whose first entries, before `op.start`, are never looked at."""
        return [0] * (op.start // self._manager_block_tokens()) + list(op.block_ids)

    def _manager_block_tokens(self) -> int:
        return self._engine.kv.block_tokens if self._engine is not None else 1

    def _collect(self) -> None:
        if self._session is None or self._lookups is None:
            return
        for done in self._session.finished():
            self._storing.discard(done.job_id)
            request_id, hit, blocks = self._loading.pop(done.job_id, ("", None, []))
            if hit is None:
                continue
            self._lookups.release(hit)
            self._received.add(request_id)
            if not done.ok or self._weights_changed():
                self._invalid.update(blocks)


def _engine_of_caller() -> _Engine | None:
    """The engine that is making an adapter; None, and one line, where it cannot be served.

    vLLM's class hands over neither its configuration nor the KV's layout, without which KV of one dtype, revision or RoPE
    would be served to another. Both are in the frames of its constructor, so that is where they are taken from.
    """
    try:
        vllm_config, kv_cache_config = _configs_of_callers()
        settings = read_settings(vllm_config.kv_transfer_config)
        _refuse_what_is_not_told(vllm_config)
        return _Engine(
            vllm_config, kv_cache_config, describe_model(vllm_config, kv_cache_config, settings.model_id), settings
        )
    except NOT_SERVED as error:
        logger.warning("LMCache serves nothing for this engine: %s", refusal_of(error))
        return None


def _local_of_callers(name: str) -> Any:
    """The local variable of this name of our nearest caller that has one; None where no caller has."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_locals.get(name) is None:
        frame = frame.f_back
    return frame.f_locals[name] if frame is not None else None


def _configs_of_callers() -> tuple[Any, Any]:
    vllm_config, kv_cache_config = _local_of_callers("vllm_config"), _local_of_callers("kv_cache_config")
    if getattr(vllm_config, "kv_transfer_config", None) is None or kv_cache_config is None:
        raise LayoutError(
            "this release of vLLM does not show its configuration to the adapters; use LMCacheMPConnector of ours"
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

    It records a `torch.cuda.Event` on `torch.cuda.current_stream()` before it calls us, and both raise where torch has no
    CUDA. There is nothing to order there: the forward has ended when it calls. So the name `torch` in that one module is
    replaced by one that gives inert stand-ins for the two and everything else from torch. torch itself stays as it is.
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
