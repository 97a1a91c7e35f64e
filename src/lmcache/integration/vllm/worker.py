"""The worker's side of the connector: it runs one rank's copies in vLLM's steps and reports their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache.engine import Copies, Copy, Done, LoadPlan, StorePlan, WorkerSession
from lmcache.engine.copies import retrieved_line, stored_line
from lmcache.engine.points import stream_point
from lmcache.integration.vllm.layers import Layers
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import NOT_ASKED, BlendPlan, PassageStore, StepPlan, StepReport
from lmcache.integration.vllm.weights import encoder_emptyings, weight_changes
from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

if TYPE_CHECKING:
    from lmcache.integration.vllm.passages import Passages

logger = init_logger(__name__)
PlanT = TypeVar("PlanT", LoadPlan, StorePlan)

LINGER_SECONDS = 0.002
"""A step without a forward waits this long for transfers: they take milliseconds, and the engine would spin."""
_START_SECONDS = 5.0


class WorkerSide:
    """The worker's side. registered, shards: for each group of which this rank has layers, where its KV lies, and the index of
    this rank's shard. held: numbers of these groups among those of a plan (empty: all). stores: as for `Copies`.

    number: the rank's number. logs: whether every copy is logged, as users of in-process mode expect. fails_by_request: whether
    failed loads are reported as requests (`take_failed_requests`) instead of blocks. layers: if given, reliable forwards wait for
    synchronous loads layer by layer. refusal: returns why this rank can never serve, "" as long as it may. passages: what
    blends, None for nothing. no_blending: why not, if the scheduler does not know.
    """

    def __init__(
        self,
        session: WorkerSession,
        registered: Sequence[Registered],
        shards: Sequence[int],
        *,
        held: Sequence[int] = (),
        stores: bool | Sequence[bool] = True,
        number: int = 0,
        logs: bool = False,
        fails_by_request: bool = False,
        layers: Layers | None = None,
        refusal: Callable[[], str] = str,
        passages: Passages | None = None,
        no_blending: str = "",
    ) -> None:
        self._session, self._registered, self._groups = session, registered[0], registered
        self._held = held or range(len(registered))
        self._copies = Copies(session, shards, stores=stores, ended=self._ended)
        self._block_tokens = registered[0].paged.block_tokens * registered[0].blocks_per_block
        """Tokens of a scheduler block."""
        self._number, self._layers, self._refusal, self._passages = number, layers, refusal, passages
        self._logs, self._fails_by_request = logs, fails_by_request
        self._arriving: list[Progress] = []
        """The progress of loads of a step whose forward waits for each layer."""
        self._mapped: tuple[int, bytes] | None = None
        """The last answer to the scheduler's question which arena is mapped."""
        self._unread: set[str] = set()
        """Jobs of loads whose KV a forward may have read before it had arrived."""
        self._spoiled: dict[str, set[int]] = {}
        """Blocks of failed loads by job, until a plan of the scheduler reflects the failure: tokens computed before are wrong."""
        self._waited = False
        self._received: set[Any] = set()
        self._invalid: set[int] = set()
        self._failed: set[Any] = set()
        """Requests with a failed load, of a model with several groups."""
        self._report = StepReport(no_blending=no_blending)
        if no_blending:
            logger.warning("Nothing is blended, only prefixes are reused: %s", no_blending)
        self._started: StepPlan | None = None
        self._weights_before, self._weights = weight_changes(), 0
        """Number of changes of the weights before this side was made, and since."""
        self._emptyings, self._filled, self._outdated, self._told_outdated = encoder_emptyings(), False, False, False
        """How often the encoder cache was emptied; whether a step since then may have filled it; and whether it may hold what
        older weights have made: now, and as last reported."""
        self._emptied = -1
        """How often vLLM's own prefix cache had been emptied when the last step before the change was planned."""
        self.reports_stats = number == 0
        self.loaded_tokens = self.stored_tokens = self.failed_loads = 0

    def settle(self, plan: StepPlan) -> None:
        """Return when stores whose blocks were taken away no longer read these blocks."""
        self._copies.let_go(plan.settle)

    def start_loads(self, plan: StepPlan) -> None:
        """Start every load of the step, once. The copies run beside the engine, in the session's threads."""
        if plan is self._started:
            return
        self._notice_weights()
        self._started = plan
        if self._mapped is not None and plan.asked not in (NOT_ASKED, self._mapped[0]):
            self._session.count_on_nothing()  # the scheduler does not rely on that answer any more
        self._filled = self._filled or plan.forward
        for job_id in plan.known_failures:
            self._spoiled.pop(job_id, None)
        if self._layers is not None:
            self._layers.begin()
        fenced = plan.loads and self._registered.loads_need_fence
        fence = stream_point(self._registered.paged.device) if fenced else None
        for load in plan.loads:
            if plan.weights != self._weights:
                self._fail(load)
                continue
            progress = Progress() if load.synchronous and self._layers is not None else None
            if progress is not None:
                self._arriving.append(progress)
            part = self._part(load)
            table, *tables = self._tables(part)
            self._copies.load(part, table, fence, progress, tables)

        if self._passages is not None:
            self._passages.begin(plan.blends, plan.weights, self._copies)
        else:
            self._fail_blends(plan.blends)

    def _fail_blends(self, blends: Iterable[BlendPlan]) -> None:
        """Report what was to be blended as failed: vLLM computes the prompts."""
        for blend in blends:
            self.failed_loads += 1
            self._received.add(blend.request_id)
            self._invalid.update(blend.filled(self._block_tokens))

    def _notice_weights(self) -> None:
        """Count running loads as failed if the weights have changed, since their KV is of the old weights."""
        if (emptyings := encoder_emptyings()) != self._emptyings:
            self._emptyings, self._filled, self._outdated = emptyings, False, False
        changes = weight_changes() - self._weights_before
        if changes != self._weights:
            self._weights = changes
            self._outdated = self._outdated or self._filled
            self._emptied = self._started.emptied if self._started is not None else -1
            self._distrust_loads()

    def wait_before_forward(self, forward_context: Any) -> None:
        """Return when the forward may begin: its synchronous loads have ended, or it will wait for each layer by itself."""
        if self._layers is None or not self._layers.will_wait(forward_context):
            self.wait_loaded()

    def wait_layer(self, name: str) -> None:
        """Return when work that reads this layer's KV may be launched."""
        if self._layers is not None:
            self._layers.wait(name, self._arriving)

    def wait_after_forward(self) -> None:
        """Return when no synchronous load runs. Loads whose KV the forward read before it had arrived count as failed."""
        if self._layers is None:
            return
        complete, loads = self._layers.end(), self._synchronous_loads()
        if loads and not complete:
            logger.warning("vLLM did not wait for the layers of %d loads: their tokens are computed", len(loads))
            self._unread.update(copy.plan.job_id for copy in loads)
        self.wait_loaded()

    def wait_loaded(self) -> None:
        """Return when no synchronous load runs: a step is complete only with these."""
        self._notice_weights()
        self._copies.wait(self._synchronous_loads())
        self._arriving.clear()

    def wait_connected(self, plan: StepPlan) -> None:
        """At the first step with copies, wait for the server's start: KV that is not stored is a later miss. A rank whose weights
        are not identified yet does not connect, so it does not wait."""
        if not self._waited and (plan.loads or plan.stores) and self._session.identified:
            self._waited = True
            self._session.wait_connected(_START_SECONDS)

    def start_stores(self, plan: StepPlan) -> None:
        """Start every store of the step, whose forward has ended."""
        now = stream_point(self._registered.paged.device) if plan.stores else None
        self._notice_weights()
        spoiled = set[int]().union(*self._spoiled.values())
        fine = list[PassageStore]()
        for one in plan.passages:
            if spoiled.isdisjoint(one.blocks):
                fine.append(one)
            else:
                self._copies.drop(one.plan, "computed from a failed load")
        if self._passages is not None:
            self._passages.store(fine, plan.weights == self._weights)
        else:
            self._report.stored |= {one.plan.job_id: 1 for one in fine}
        for store in plan.stores:
            if plan.weights != self._weights:
                self._copies.drop(store, "weights changed")
            elif not spoiled.isdisjoint(store.blocks):
                self._copies.drop(store, "computed from a failed load")
            else:
                if self._logs and self._copies.stores:
                    text = "Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s"
                    told = store.tokens, store.end, store.start, store.request_id
                    logger.info(text, *told, extra={"request": store.request_id})
                part = self._part(store)
                table, *tables = self._tables(part)
                self._copies.store(part, table, now, tables)

    def finished(self, plan: StepPlan) -> tuple[set[str], set[str]]:
        """Return (requests whose blocks are no longer read, requests whose KV has arrived) since the last call."""
        self._notice_weights()
        sent = self._copies.closed(plan.closing)
        if not plan.forward and not (sent or self._received) and self._copies.running():
            self._session.wait_finished(LINGER_SECONDS)
            sent |= self._copies.closed(())
        if self._passages is not None:
            idle = not plan.forward and not (sent or self._received)
            ended, failed = self._passages.finished(self._weights, LINGER_SECONDS if idle else 0.0)
            self._received |= ended
            self._fail_blends(failed)
        received, self._received = self._received, set()
        return sent, received

    def take_invalid_blocks(self) -> set[int]:
        """Return the blocks that loads could not fill. Call this after `finished`, in the same step."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_failed_requests(self) -> set[Any]:
        """Return the requests with loads that failed, of a model with several groups. Call this after `finished`, in the same
        step."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> StepReport:
        report, self._report = self._report, StepReport()
        report.refusal = self._refusal()
        if self._passages is not None:
            more, self._passages.report = self._passages.report, StepReport()
            report.merge(more)
        if self._outdated != self._told_outdated:
            self._told_outdated = report.outdated[self._number] = self._outdated
        if self._started is not None:
            if self._started.weights != self._weights:
                report.weights, report.emptied = self._weights, self._emptied
            asked = self._started.asked
            mapped = (asked, self._session.count_on_arena()) if asked != NOT_ASKED else None
            if mapped is not None and mapped != self._mapped:
                self._mapped = report.mapped[self._number] = mapped
        return report

    def take_stats(self) -> dict[str, int]:
        """Return the counters since the last call, and reset them to 0."""
        names = "loaded_tokens", "stored_tokens", "failed_loads"
        stats = {name: getattr(self, name) for name in names}
        vars(self).update(dict.fromkeys(names, 0))
        return stats

    def close(self) -> None:
        if self._passages is not None:
            self._passages.close()
        self._session.close()

    def _part(self, plan: PlanT) -> PlanT:
        """Return the plan for the groups of which this rank has layers."""
        groups: list[Any] = [plan, *plan.others]
        if len(groups) == len(self._held):
            return plan
        first, *others = [groups[number] for number in self._held]
        part: PlanT = replace(first, others=others)
        return part

    def _tables(self, plan: LoadPlan | StorePlan) -> list[list[int]]:
        """Return the plan's block table of each group, in blocks of the tensors."""
        return [own.blocks(part.blocks) for own, part in zip(self._groups, (plan, *plan.others), strict=True)]

    def _ended(self, copy: Copy) -> None:
        plan, done = copy.plan, copy.done
        assert done is not None
        if self._passages is not None and self._passages.owns(copy):
            self._unread.discard(plan.job_id)
            return
        if isinstance(plan, LoadPlan):
            self._loaded(plan, done)
            return
        self._report.stored[plan.job_id] = 1
        self.stored_tokens += done.tokens if done.ok else 0
        if self._logs and done.ok and done.tokens:
            logger.info("%s", stored_line([copy], plan.tokens, self._registered.paged.token_bytes))

    def _loaded(self, load: LoadPlan, done: Done) -> None:
        if not done.ok or load.job_id in self._unread:
            self._fail(load)
            return
        self._report_loaded(load)
        self._report.seconds[load.job_id] = done.seconds
        self.loaded_tokens += load.tokens
        if self._logs:
            logger.info("%s", retrieved_line(load, done, self._registered.paged.token_bytes))

    def _distrust_loads(self) -> None:
        """Mark all running loads so that they count as failed."""
        self._unread.update(copy.plan.job_id for copy in self._copies.running(LoadPlan))

    def _fail(self, load: LoadPlan) -> None:
        """Report a load that has ended or never began as failed: its blocks do not hold the KV."""
        self._unread.discard(load.job_id)
        self._report_loaded(load)
        self.failed_loads += 1
        blocks = load.filled(self._block_tokens)
        if self._fails_by_request:
            self._failed.add(load.request_id)
        else:
            self._invalid.update(blocks)
        if load.synchronous:
            self._spoiled[load.job_id] = set(blocks)

    def _report_loaded(self, load: LoadPlan) -> None:
        if load.synchronous:
            self._report.loaded[load.job_id] = 1
        else:
            self._received.add(load.request_id)

    def _synchronous_loads(self) -> list[Copy]:
        """The running loads that the step's forward waits for."""
        return [
            copy for copy in self._copies.running(LoadPlan) if isinstance(copy.plan, LoadPlan) and copy.plan.synchronous
        ]
