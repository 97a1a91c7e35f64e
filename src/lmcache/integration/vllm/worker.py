"""The worker's half of the connector: one rank's loads and stores, and what the engine asks about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lmcache.chunks import HASH_BYTES
from lmcache.config.options import GIB
from lmcache.engine import Done, Load, Store, WorkerSession
from lmcache.integration.vllm.layers import Layers
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import LoadPlan, StepPlan, StepReport, StorePlan
from lmcache.integration.vllm.weights import weight_changes
from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

LINGER_SECONDS = 0.002
"""A step without a forward waits this long for transfers: they take milliseconds, and the engine would spin."""
_SETTLE_SECONDS = 1.0
_WAIT_SECONDS = 1.0
_START_SECONDS = 5.0
_PAGE_NUMBER_BYTES = 4


class WorkerSide:
    """shard, shards: which of how many parts of a chunk this rank holds. stores: False where another rank stores it.

    synchronous: forwards wait for loads (`wait_loaded`), and the log tells of every copy, as users of in-process mode expect.
    layers: where they wait layer by layer, as far as that can be relied on. refusal: why this rank can never serve, "" while
    that is not so.
    """

    def __init__(
        self,
        session: WorkerSession,
        registered: Registered,
        shard: int,
        shards: int,
        *,
        stores: bool = True,
        synchronous: bool = False,
        layers: Layers | None = None,
        refusal: Callable[[], str] = str,
    ) -> None:
        self._session = session
        self._registered = registered
        self._block_tokens = registered.paged.block_tokens
        self._shard = shard
        self._shards = shards
        self._stores = stores
        self._synchronous = synchronous
        self._layers, self._refusal = layers, refusal
        self._arriving: list[Progress] = []
        """Of the loads of a step whose forward waits for each layer."""
        self._unread: set[str] = set()
        """Loads whose KV a forward may have read before it had arrived."""
        self._spoiled: dict[str, set[int]] = {}
        """Failed loads and their blocks, until the scheduler plans by it: what steps compute from them till then is wrong."""
        self._waited = False
        self._loading: dict[str, LoadPlan] = {}
        self._storing: dict[str, StorePlan] = {}
        """Store jobs in flight."""
        self._closing: set[str] = set()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._report = StepReport()
        self._started: StepPlan | None = None
        self._weights_before, self._weights = weight_changes(), 0
        """Changes of the weights before this half was made, and since."""
        self._emptied = -1
        """How often vLLM's own prefix cache had been emptied when the last step before the change was planned."""
        self.reports_stats = False
        self.loaded_tokens = self.stored_tokens = self.failed_loads = 0

    def settle(self, plan: StepPlan) -> None:
        """Return when the stores whose blocks were taken away no longer read them."""
        jobs = [job_id for job_id in plan.settle if job_id in self._storing]
        started, warned = time.monotonic(), False
        while jobs:
            jobs = list(self._session.wait(jobs, _SETTLE_SECONDS))
            if jobs and not warned:
                logger.warning("waiting for %d stores to let go of preempted blocks", len(jobs))
                warned = True
        if warned:
            logger.warning("preempted blocks were free after %.1f s", time.monotonic() - started)

    def start_loads(self, plan: StepPlan) -> None:
        """Start every load of the step, once. The copies run beside the engine, in the session's threads."""
        if plan is self._started:
            return
        self._notice_weights()
        self._started = plan
        for job_id in plan.known_failures:
            self._spoiled.pop(job_id, None)
        if self._layers is not None:
            self._layers.begin()
        fence = self._stream_point() if plan.loads and self._registered.loads_need_fence else None
        for load in plan.loads:
            if plan.weights != self._weights:
                self._fail(load)
                continue
            chunk = load.chunk_tokens
            first, leased = load.start_token // chunk, load.first_leased
            self._loading[load.job_id] = load
            progress = Progress() if self._layers is not None else None
            if progress is not None:
                self._arriving.append(progress)
            self._session.load(
                load.job_id,
                Load(
                    epoch=load.epoch,
                    lease=load.lease,
                    first_chunk=first,
                    extents=extents_of_shard(
                        load.extents, self._shard, self._shards, first - leased, -(-load.end_token // chunk) - leased
                    ),
                    start_token=load.start_token,
                    end_token=load.end_token,
                    blocks=self._registered.blocks(load.blocks),
                    lease_chunk=first - leased,
                    after=fence,
                    progress=progress,
                ),
            )

    def _notice_weights(self) -> None:
        """What loads under way bring is of the old weights once the weights have changed, so they count as failed."""
        changes = weight_changes() - self._weights_before
        if changes != self._weights:
            self._weights = changes
            self._emptied = self._started.emptied if self._started is not None else -1
            self._unread.update(self._loading)

    def wait_before_forward(self, forward_context: Any) -> None:
        """Return when the forward may begin: its loads have ended, or it will wait for each layer by itself."""
        if self._layers is None or not self._layers.will_wait(forward_context):
            self.wait_loaded()

    def wait_layer(self, name: str) -> None:
        """Return when work that reads this layer's KV may be launched."""
        if self._layers is not None:
            self._layers.wait(name, self._arriving)

    def wait_after_forward(self) -> None:
        """Return when no load of the step is under way. What the forward read before it had arrived counts as failed."""
        if self._layers is None:
            return
        complete = self._layers.end()
        if self._loading and not complete:
            logger.warning(
                "vLLM did not wait for the layers of %d loads: their tokens are computed", len(self._loading)
            )
            self._unread.update(self._loading)
        self.wait_loaded()

    def wait_loaded(self) -> None:
        """Return when no load is under way: those of the step are part of it."""
        while self._loading:
            self._session.wait_finished(_WAIT_SECONDS)
            self._collect()
        self._arriving.clear()
        self._unread.clear()

    def wait_connected(self, plan: StepPlan) -> None:
        """At the first step with something to copy, give the server the time to start: what is not stored is a later miss. A
        rank that does not know yet which weights it serves connects to none, and does not hold up the step."""
        if not self._waited and (plan.loads or plan.stores) and self._session.identified:
            self._waited = True
            self._session.wait_connected(_START_SECONDS)

    def start_stores(self, plan: StepPlan) -> None:
        """Start every store of the step, whose forward has ended."""
        now = self._stream_point() if plan.stores else None
        self._notice_weights()
        for store in plan.stores:
            if not self._stores:
                self._report.stored[store.job_id] = 1
                continue
            if plan.weights != self._weights:
                self._session.drop(len(store.hashes) // HASH_BYTES, "weights changed")
                self._report.stored[store.job_id] = 1
                continue
            if any(not blocks.isdisjoint(store.blocks) for blocks in self._spoiled.values()):
                self._session.drop(len(store.hashes) // HASH_BYTES, "computed from a failed load")
                self._report.stored[store.job_id] = 1
                continue
            self._storing[store.job_id] = store
            if self._synchronous:
                start, end = store.tokens
                text = "Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s"
                logger.info(text, end - start, end, start, store.request_id)
            self._session.store(store.job_id, self._store(store, now))

    def finished(self, plan: StepPlan) -> tuple[set[str], set[str]]:
        """(requests whose blocks we are done with, requests whose KV has arrived) since the last call."""
        self._closing.update(plan.closing)
        self._collect()
        if not plan.forward and not (self._sent or self._received):
            self._linger()
        sent, self._sent = self._sent, set()
        received, self._received = self._received, set()
        return sent, received

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that a load could not fill. To be asked after `finished`, in the same step."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> StepReport:
        report, self._report = self._report, StepReport()
        if self._started is not None and self._started.weights != self._weights:
            report.weights, report.emptied = self._weights, self._emptied
        report.refusal = self._refusal()
        return report

    def close(self) -> None:
        self._session.close()

    def _linger(self) -> None:
        if (self._loading or self._storing) and self._session.wait_finished(LINGER_SECONDS):
            self._collect()

    def _collect(self) -> None:
        self._notice_weights()
        for done in self._session.finished():
            if done.kind == "load":
                self._loaded(done)
            else:
                self._stored(done)
        busy = {store.request_id for store in self._storing.values()}
        ready = self._closing - busy
        self._closing -= ready
        self._sent |= ready

    def _stored(self, done: Done) -> None:
        store = self._storing.pop(done.job_id, None)
        self._report.stored[done.job_id] = 1
        self.stored_tokens += done.tokens if done.ok else 0
        if store is not None and done.ok and self._synchronous:
            start, end = store.tokens
            copied = f"offload_time: {done.seconds * 1e3:.2f} ms, put_time: {done.put_seconds * 1e3:.2f} ms"
            cost = self._cost(done.tokens, done.seconds + done.put_seconds)
            logger.info("Stored %d out of total %d tokens. %s; %s", done.tokens, end - start, cost, copied)

    def _cost(self, tokens: int, seconds: float) -> str:
        """How much was copied, how fast; GiB of this rank's part."""
        size = tokens * self._registered.paged.shard_bytes(1) / GIB
        return f"size: {size:.4f} gb, cost {seconds * 1e3:.2f} ms, throughput: {size / max(seconds, 1e-9):.2f} GB/s"

    def _loaded(self, done: Done) -> None:
        load = self._loading.pop(done.job_id, None)
        if load is None:
            return
        if not done.ok or done.job_id in self._unread:
            self._unread.discard(done.job_id)
            self._fail(load)
            return
        self._report_loaded(load)
        self.loaded_tokens += load.end_token - load.start_token
        if self._synchronous:
            counts = done.tokens, load.end_token, load.request_tokens
            cost = self._cost(done.tokens, done.seconds)
            logger.info("Retrieved %d out of %d required tokens (from %d total tokens). %s", *counts, cost)

    def _fail(self, load: LoadPlan) -> None:
        """Report a load that has ended, or never began, and whose blocks do not hold what was asked for."""
        self._report_loaded(load)
        self.failed_loads += 1
        blocks = _blocks_to_fill(load, self._block_tokens * self._registered.blocks_per_block)
        self._invalid.update(blocks)
        if self._synchronous:
            self._spoiled[load.job_id] = set(blocks)

    def _report_loaded(self, load: LoadPlan) -> None:
        if self._synchronous:
            self._report.loaded[load.job_id] = 1
        else:
            self._received.add(load.request_id)

    def _store(self, store: StorePlan, after: Any) -> Store:
        return Store(
            chunk_tokens=store.chunk_tokens,
            parent=store.parent,
            hashes=store.hashes,
            first_chunk=store.first_chunk,
            blocks=self._registered.blocks(store.blocks),
            after=after,
            end_token=store.end_token,
            request_id=store.request_id,
        )

    def _stream_point(self) -> Any:
        """Where the engine's device stream is now: what was launched before it comes before the copy. None on a CPU."""
        if self._registered.paged.device == "cpu":
            return None
        import torch

        point = torch.cuda.Event(blocking=True)  # a waiting thread must not spin beside the engine's
        point.record()
        return point


def extents_of_shard(slots: bytes, shard: int, shards: int, first: int, end: int) -> bytes:
    """One shard's pages of rows [first, end) of [chunk][shard], little-endian u32."""
    row, own = shards * _PAGE_NUMBER_BYTES, shard * _PAGE_NUMBER_BYTES
    return b"".join(slots[chunk * row + own : chunk * row + own + _PAGE_NUMBER_BYTES] for chunk in range(first, end))


def refuse_loads(plan: StepPlan, block_tokens: int) -> tuple[set[str], set[int]]:
    """(requests, blocks) of the loads of a step that a rank without a session cannot do."""
    blocks = {block for load in plan.loads for block in _blocks_to_fill(load, block_tokens)}
    return {load.request_id for load in plan.loads}, blocks


def _blocks_to_fill(load: LoadPlan, block_tokens: int) -> list[int]:
    return load.blocks[load.start_token // block_tokens : -(-load.end_token // block_tokens)]


def ended_stores(plan: StepPlan) -> dict[str, int]:
    """What a rank without a session reports of the stores of a step."""
    return {store.job_id: 1 for store in plan.stores}


def stats_of(half: Any) -> dict[str, int]:
    """Counters since the last call; they start again at 0."""
    counters = {name: getattr(half, name) for name in ("loaded_tokens", "stored_tokens", "failed_loads")}
    for name in counters:
        setattr(half, name, 0)
    return counters
