"""The scheduler's side of the connector: it translates vLLM's requests and steps for `lmcache.engine.requests`.

Ownership of blocks: a load writes into blocks that the engine has given to the request, and the engine waits for the load. A
store reads blocks while the engine goes on. So a request that ends keeps its blocks until its stores have ended
(`request_finished` -> True, then `StepPlan.closing`). If the engine takes blocks away (preemption), the ranks settle the stores
that read these blocks before anything is computed (`StepPlan.settle`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmcache.chunks.hashing import Extras, encode_extra
from lmcache.config.engine import EngineConfig
from lmcache.engine import Loading, LoadPlan, Request, Requests, SchedulerSession
from lmcache.engine.blending import Blend, Blending
from lmcache.engine.prefill import TokenRate
from lmcache.engine.requests import GroupTable
from lmcache.engine.settings import WITH_A_DAEMON
from lmcache.integration.vllm import handover
from lmcache.integration.vllm.blending import Blends, hide
from lmcache.integration.vllm.held import HeldBlocks
from lmcache.integration.vllm.identity import Adapters
from lmcache.integration.vllm.kv_events import Events, KVEvents
from lmcache.integration.vllm.plan import NOT_ASKED, StepPlan, StepReport
from lmcache.integration.vllm.rules import reads_nothing
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

TIER_PAUSE_SECONDS = 0.001
MIN_GAIN_TOKENS = {"cpu": 16}
MIN_GAIN_TOKENS_ON_A_DEVICE = 64
"""Beyond a local hit, fewer tokens than this are computed faster than loaded: a load costs a scheduler step, in which a CPU
prefills for milliseconds, and a GPU hundreds of tokens."""
SHORT_LOAD_SECONDS = 0.002
"""A forward waits for a load that takes no longer than this even if other requests run: a load between steps costs its request
two steps."""
UNNAMED_ITEMS = (
    "Prompts with images, sounds or videos are not cached: with --mm-processor-cache-gb 0 and without prefix caching vLLM "
    "numbers them and does not name them by their content; leave one of the two options out"
)
OUTDATED_ITEMS = (
    "Prompts with images, sounds or videos are not cached until vLLM's encoder cache is emptied (POST /reset_encoder_cache): %s, "
    "and it may hold what was computed before"
)
Synchronous = Literal["never", "auto", "always"]
"""Which loads a forward waits for. auto: short ones, and all loads of a request that runs alone."""


@dataclass
class Tracker(Request):
    """preemptions: vLLM's count when tracking began. local_tokens: in vLLM's own prefix cache. logged: last line's numbers.
    synchronous: whether the forward of the request's first step is to wait for the load of its hit. blend: what is to be blended
    into the prompt. exact: if passages were blended, how many leading tokens have exact KV; only these are stored."""

    request: Any = None
    preemptions: int = 0
    local_tokens: int = 0
    logged: tuple[int, int] = (-1, -1)
    synchronous: bool = False
    blend: Blend | None = None
    exact: int | None = None


class SchedulerSide:
    """The scheduler's side. groups, numbers: the block tables of the model's groups, and vLLM's numbers of these. ranks: number
    of reports that complete a job. can_load, can_store: what the KV role allows.

    synchronous: which loads are part of the request's first step, whose forward waits for them; there the last token is always
    computed, and no hit is too small to be loaded. Otherwise the request waits, unscheduled. vLLM's newer model runner and its
    asynchronous scheduling do not recover from a synchronous load that fails. So loads are synchronous only while all ranks
    report that they have mapped the arena of the hit. config: settings of loads and stores. logs: whether each lookup is logged,
    as users of in-process mode expect. zeroes: whether vLLM writes zeros to the blocks that it gives out; its newer model runner
    does that before ranks settle the stores that read them. names_items, adapts_items: as in `rules`; prompts with images,
    sounds ... are not cached if vLLM does not name these. events: makes vLLM's KV events, if vLLM publishes them. blending: how
    passages are blended into prompts, None for not at all.
    """

    def __init__(
        self,
        session: SchedulerSession,
        groups: Sequence[GroupTable],
        ranks: int,
        *,
        numbers: Sequence[int] = (0,),
        can_load: bool = True,
        can_store: bool = True,
        synchronous: Synchronous = "never",
        logs: bool = False,
        config: EngineConfig = WITH_A_DAEMON,
        device: str = "cpu",
        zeroes: bool = False,
        names_items: bool = True,
        adapts_items: bool = False,
        events: Events | None = None,
        blending: Blending | None = None,
    ) -> None:
        self.requests: Requests[Tracker] = Requests(
            session,
            ranks=ranks,
            save_tail=config.save_unfull_chunk,
            groups=groups,
            stores=can_store,
            loads=can_load,
        )
        self.events = KVEvents(self.requests, groups[0].block_tokens, events) if events is not None else None
        """What vLLM's KV events tell of the server; None if vLLM publishes none."""
        block_tokens = groups[0].block_tokens
        self._blends = Blends(self.requests, blending, block_tokens, Tracker) if blending is not None else None
        self._groups, self._numbers = groups, numbers
        self._fails_by_request = len(set(numbers)) > 1 or groups[0].reach_tokens > 0  # as in `ModelKV`
        self._block_tokens, self._ranks = groups[0].block_tokens, ranks
        self._zeroes, self._holds = zeroes, zeroes or any(group.reach_tokens for group in groups)
        self._held = HeldBlocks(groups)
        """Blocks that vLLM may reuse while stores read them: those that leave a window, and where it writes zeros, those of
        preempted requests."""
        self._can_load, self._can_store = can_load, can_store
        self._names_items, self._adapts_items = names_items, adapts_items
        self._told = ""
        """Why prompts with images, sounds ... are not cached, as last logged."""
        self._outdated: dict[int, bool] = {}
        """By rank, whether its encoder cache may hold what older weights have made of images, sounds ..."""
        self._item_adapters: dict[str, tuple[int, str]] = {}
        """Name -> number and path of the adapters for which vLLM's encoder cache may hold anything."""
        self._filled = -1
        """How often vLLM's own prefix cache had been emptied when the last step was planned that may have filled it."""
        self._synchronous, self._logs, self._config = synchronous, logs, config
        self._min_gain = MIN_GAIN_TOKENS.get(device, MIN_GAIN_TOKENS_ON_A_DEVICE)
        self._copying = TokenRate()
        """The speed of loads, as the slowest rank measures it."""
        self._running: set[Hashable] = set()
        """Requests that have been scheduled and have not ended."""
        self._asked = NOT_ASKED if synchronous == "never" else 0
        self._mapped: dict[int, bytes] = {}
        """By rank, the epoch whose arena it has mapped, as reported since the question `_asked`."""
        self._admitted: list[tuple[Tracker, LoadPlan]] = []
        """Loads of the coming step."""
        self._closing: dict[str, Tracker] = {}
        self._plan = StepPlan()
        self.adapters = Adapters()
        self._weights = 0
        """Number of changes of the ranks' weights that this side knows of."""
        self._tiers_load = False
        """Whether a request waits for a tier, in the step that is being planned."""

    def match(self, request: Any, local_tokens: int) -> int | None:
        """Return how many tokens beyond `local_tokens` can be loaded. vLLM calls this for every step that the request waits.

        None: not known yet, since a tier is loading.
        """
        tracker = self._tracker(request)
        tracker.local_tokens = local_tokens
        if reads_nothing(request):
            return 0
        hit = self.requests.find(tracker, request.all_token_ids, local_tokens)  # or only an announcement
        if self.events is not None:
            self.events.looked_up(tracker)
        if isinstance(hit, Loading):
            self._tiers_load = True
            return None
        blend = self._find_blend(tracker, local_tokens)
        if isinstance(blend, Loading):
            self._tiers_load = True
            return None
        tracker.blend = blend
        if blend is not None:
            tracker.synchronous = False
            self._log(tracker, blend.have, blend.end - local_tokens)
            return blend.end - local_tokens
        if hit is None:
            if not local_tokens:
                self._log(tracker, 0, 0)
            return 0
        found = min(tracker.found_tokens, request.num_tokens - (tracker.tail_leaves or 0))
        tracker.synchronous = self._is_synchronous(tracker, found - local_tokens)
        gain = min(found, request.num_tokens - tracker.synchronous) - local_tokens
        least = self._min_gain if local_tokens and not tracker.synchronous else 1
        gain = gain if gain >= least and found >= self._config.min_retrieve_tokens else 0
        self._log(tracker, found, gain)
        return gain

    def _find_blend(self, tracker: Tracker, local_tokens: int) -> Blend | Loading | None:
        """Look up passages behind the prefix that was found. Return what is to be blended into the prompt, None for nothing."""
        plain = tracker.cacheable and tracker.may_load and tracker.extras is None and tracker.tail_leaves is None
        if self._blends is None or not plain or tracker.exact is not None:
            return None
        return self._blends.find(tracker, tracker.request.all_token_ids, max(local_tokens, tracker.found_tokens))

    def is_synchronous(self, request: Any) -> bool:
        """Return whether the load that `match` has offered is part of the request's first step."""
        return self.requests.open[request.request_id].synchronous

    def _is_synchronous(self, tracker: Tracker, tokens: int) -> bool:
        if self._synchronous == "never" or tracker.hit is None:
            return False
        epochs = self._mapped.values()
        if len(epochs) < self._ranks or any(epoch != tracker.hit.epoch for epoch in epochs):
            return False
        loading = [load.tokens for load in self.requests.loading.values()]
        if self._synchronous == "always" or not (loading or self._running - {tracker.id}):
            return True
        return sum(loading, tokens) <= SHORT_LOAD_SECONDS * self._copying.tokens_per_second

    def ask_ranks(self) -> None:
        """Expect of the ranks what may fail a load, such as other weights, until they have reported again."""
        if self._asked != NOT_ASKED:
            self._asked += 1
            self._mapped.clear()

    def bind_pool(self, pool: Any) -> None:
        if self._holds:
            self._held.bind(pool)

    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], external_tokens: int) -> None:
        """Record the request's block tables by vLLM's groups, and plan to load the `external_tokens` after the local hit."""
        tracker = self._tracker(request)
        self._set_tables(tracker, blocks)
        if tracker.local_tokens and self.requests.own_cache_outdated:
            tracker.cacheable = False
        blend, tracker.blend = tracker.blend, None
        if self._blends is not None and blend is not None and external_tokens > 0:
            if external_tokens != blend.end - tracker.local_tokens:  # vLLM takes them for filled
                raise RuntimeError(
                    f"vLLM has not taken what was blended into {tracker.id}: this release cannot be served"
                )
            tracker.exact = blend.exact
            hide(request, blend.exact, self._block_tokens)
            self._blends.plan(tracker, request.all_token_ids, blend, tracker.local_tokens)
            self.requests.stores_no_more(tracker)
            return
        if self._blends is not None:
            self._blends.not_used(request.request_id)
        loads = tracker.hit is not None and external_tokens > 0
        if not loads or tracker.synchronous:
            self._running.add(tracker.id)
        if not loads:
            self.requests.give_back(tracker)
            return
        start = tracker.local_tokens
        load = self.requests.load(tracker, start, start + external_tokens, request.num_tokens)
        for part in (load, *load.others):  # a rank may have layers of the further groups only
            part.synchronous = tracker.synchronous
        self._admitted.append((tracker, load))

    def plan_step(self, output: Any) -> StepPlan:
        """Return the ranks' plan for the step that `output` (a SchedulerOutput) describes."""
        plan, self._plan = self._plan, StepPlan()
        plan.weights, plan.emptied = self._weights, self.requests.emptied
        plan.asked, plan.fails_by_request = self._asked, self._fails_by_request
        plan.forward = output.total_num_scheduled_tokens > 0
        if plan.forward or self._admitted:
            self._filled = plan.emptied
        self._running.update(output.num_scheduled_tokens)
        runtime = self.requests.runtime
        # A step whose forward waits for a load, or that computes what is blended, does not measure prefill.
        blending = self._blends is not None and bool(self._blends.running)
        waits = blending or any(load.synchronous for _, load in self._admitted)
        self.requests.prefill.step(runtime.now(), 0 if waits else output.total_num_scheduled_tokens)
        if self._tiers_load and not plan.forward:
            runtime.sleep(TIER_PAUSE_SECONDS)  # nothing is computed: leave the cores to the loads
        self._tiers_load = False
        plan.settle += [job for job, tracker in self.requests.storing.items() if _was_preempted(tracker)]
        self._grow_tables(output)
        for tracker, load in self._admitted:
            for part, table in zip((load, *load.others), (tracker.blocks, *tracker.tables), strict=True):
                part.blocks = list(table)
            if len(load.filled(self._block_tokens)) * self._block_tokens < load.tokens:  # vLLM takes them for filled
                raise RuntimeError(
                    f"vLLM has not given the blocks of request {tracker.id}: this release cannot be served"
                )
            plan.loads.append(load)
        self._admitted.clear()
        if self._blends is not None:
            plan.blends = self._blends.take_plans()
        if self._can_store and self.requests.session is not None:
            drafts, several = output.scheduled_spec_decode_tokens, self._ranks > 1
            for request_id, scheduled in output.num_scheduled_tokens.items():
                known = self.requests.open.get(request_id)
                if known is not None and known.cacheable and not (several and self._awaits_ranks(known)):
                    self._plan_store(plan, known, scheduled - len(drafts.get(request_id, ())))
        return plan

    def transferred(
        self,
        finished_loads: Iterable[str] = (),
        closed: Iterable[str] = (),
        invalid_blocks: Iterable[int] = (),
        report: StepReport | None = None,
        failed: Iterable[str] = (),
    ) -> None:
        """Process the results of all ranks: ended loads, closed requests, blocks that could not be filled, and reports. failed:
        requests whose loads failed, of a model with several groups."""
        report, invalid = report or StepReport(), frozenset(invalid_blocks)
        requests = self.requests
        for job_id, load in requests.loading.items() if invalid else ():
            if invalid.isdisjoint(load.filled(self._block_tokens)):
                continue
            if load.synchronous:
                self._plan.known_failures.append(job_id)
            if load.request_id in requests.open:
                requests.open[load.request_id].may_load = False
        for blend in tuple(self._blends.running.values()) if self._blends is not None else ():
            if not invalid.isdisjoint(blend.filled(self._block_tokens)):
                failed = (*failed, blend.request_id)
        for request_id in failed:
            if request_id in requests.open:
                requests.open[request_id].may_load = False
        for job_id, seconds in report.seconds.items():
            if job_id in requests.loading:
                self._copying.took(requests.loading[job_id].tokens, seconds)
        mapped = {rank: epoch for rank, (asked, epoch) in report.mapped.items() if asked == self._asked}
        if any(self._mapped.get(rank, b"") not in (b"", epoch) for rank, epoch in mapped.items()):
            self.ask_ranks()  # by which the rank knows that it may unmap the arena that it had
        else:
            self._mapped |= mapped
        self._outdated |= report.outdated
        ended = set(finished_loads)
        for job_id in [
            job for job, load in requests.loading.items() if load.request_id in ended and not load.synchronous
        ]:
            requests.loaded(job_id)
        for job_id, count in report.loaded.items():
            requests.loaded(job_id, count)
        for job_id, count in report.stored.items():
            requests.stored(job_id, count)
        for request_id in closed:
            # Releases of vLLM without worker metadata report stores in no other way.
            for job_id in tuple(self._closing.pop(request_id).jobs if request_id in self._closing else ()):
                requests.stored(job_id)
        self._held.let_go([job for job in self._held.jobs if job not in requests.storing])
        if self._blends is not None:
            self._blends.transferred(ended, report)
        if report.weights > self._weights:
            self._weights = report.weights
            logger.info("This engine's weights have changed: KV of the old weights is not used any more")
            requests.reset(report.emptied)
        if report.refusal:
            requests.stop(report.refusal)

    def handed_over(self, request: Any) -> dict[str, Any] | None:
        """Return what the engine tells the router about a request that has ended well; None if it has not been asked to."""
        tracker = self.requests.open.get(request.request_id)
        stored = tracker is not None and tracker.stores_tail and tracker.cacheable and tracker.exact is None
        tokens = request.num_prompt_tokens if stored else 0
        return handover.answer(request.kv_transfer_params, tokens, list(request.output_token_ids[:1]))

    def finished(self, request: Any) -> bool:
        """End a request. Return whether the engine has to keep its blocks until the connector reports it as sent."""
        name = request.request_id
        self._running.discard(name)
        if self._blends is not None and self._blends.ended(name):
            self._plan.given_up.append(name)
        tracker = self.requests.finish(name, request.num_computed_tokens if self._can_store else 0)
        if tracker is not None and self.events is not None:
            self.events.ended(tracker)
        loads = any(load.request_id == name and not load.synchronous for load in self.requests.loading.values())
        if tracker is None or not tracker.jobs or loads:  # vLLM frees the blocks when the load has ended
            return False
        if _was_preempted(tracker):
            self._settle(tracker.jobs)
            return False
        self._plan.closing.append(name)
        self._closing[name] = tracker
        return True

    def release_blocks(self) -> None:
        """Give back the blocks that are held for stores: vLLM is about to take all blocks away."""
        self._settle(self._held.jobs)

    def _settle(self, jobs: Iterable[str]) -> None:
        """Let the ranks settle these stores before the next step. Nothing is written into their blocks before that, unless vLLM
        writes zeros to them first."""
        self._plan.settle.extend(jobs)
        if not self._zeroes:
            self._held.let_go(jobs)

    def reset(self) -> None:
        """Serve nothing that was computed before: the weights may be other ones from the next step on."""
        self.requests.reset(self._filled)

    def own_cache_emptied(self) -> None:
        """Record that vLLM's own prefix cache is empty."""
        self.requests.own_cache_emptied()
        if self.events is not None:
            self.events.own_cache_emptied()

    def items_emptied(self) -> None:
        """Record that vLLM's encoder cache is empty."""
        self._item_adapters.clear()

    @property
    def changes(self) -> tuple[int, int]:
        """The number of resets so far, and the number of changes of the ranks' weights that this side knows of."""
        return self.requests.resets, self._weights

    def take_back_reset(self, before: tuple[int, int]) -> None:
        """Undo the reset if it is the only one since `changes` was `before`, and no rank has reported new weights since."""
        if self.changes == (before[0] + 1, before[1]):
            self.requests.undo_reset()

    def close(self) -> None:
        self.requests.close()

    def _tracker(self, request: Any) -> Tracker:
        """Return the request's tracker; a new one if the request was preempted since."""
        tracker = self.requests.open.get(request.request_id)
        if tracker is not None and tracker.request is request and not _was_preempted(tracker):
            return tracker
        fresh = Tracker(request.request_id, request.cache_salt or "", extras=_extras(request), request=request)
        fresh.preemptions, fresh.trace = request.num_preemptions, _trace_of(request)
        lora = getattr(request, "lora_request", None)
        adapter = self.adapters.identity(lora) if lora is not None else ("", "")
        limit = self._config.priority_limit
        late = limit is not None and request.priority > limit
        # Later inputs of a resumable session may bring images, which the chain made now would not include in its hashes.
        resumable = getattr(request, "resumable", False)
        unknown = fresh.extras is not None and self._unknown_items(lora)
        if adapter is None or late or resumable or unknown or getattr(request, "prompt_embeds", None) is not None:
            fresh.cacheable = False
        fresh.adapter = adapter or fresh.adapter
        wanted = handover.asked(
            getattr(request, "kv_transfer_params", None), loads=self._can_load, stores=self._can_store
        )
        fresh.tail_leaves, fresh.stores_tail = wanted.tail_leaves, wanted.gives
        if tracker is not None:
            # What was blended into a request is in the blocks that only this request finds again, and may go on from.
            cacheable = tracker.cacheable and tracker.exact is None
            fresh.may_load, fresh.cacheable, fresh.exact = (
                tracker.may_load,
                fresh.cacheable and cacheable,
                tracker.exact,
            )
            # These jobs are not settled yet if the preemption came outside a step (a reset of the engine's prefix cache).
            self._plan.settle.extend(tracker.jobs)
            self.requests.give_back(tracker)
        self.requests.open[fresh.id] = fresh
        return fresh

    def _unknown_items(self, lora: Any) -> bool:
        """Return whether images, sounds ... of a request with this adapter may be other ones than their names say, or computed by
        other weights."""
        name, loaded = (lora.lora_name, (lora.lora_int_id, str(lora.lora_path))) if lora is not None else ("", (0, ""))
        why = "" if self._names_items else UNNAMED_ITEMS
        if any(self._outdated.values()):
            why = why or OUTDATED_ITEMS % "the weights have changed"
        if self._adapts_items and self._item_adapters.setdefault(name, loaded) != loaded:
            why = why or OUTDATED_ITEMS % f"there is another LoRA adapter {name!r} now"
        if why and why != self._told:
            logger.warning("%s", why)
        self._told = why or self._told
        return bool(why)

    def _grow_tables(self, output: Any) -> None:
        cached, known = output.scheduled_cached_reqs, self.requests.open
        for new in output.scheduled_new_reqs:
            if new.req_id in known:
                self._set_tables(known[new.req_id], new.block_ids)
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracker = known.get(request_id)
            if tracker is None or not new_blocks:
                continue
            if request_id in cached.resumed_req_ids:
                self._set_tables(tracker, new_blocks)
            else:
                for table, number in zip((tracker.blocks, *tracker.tables), self._numbers, strict=True):
                    table.extend(new_blocks[number])

    def _set_tables(self, tracker: Tracker, blocks: Sequence[Sequence[int]]) -> None:
        tracker.blocks, *tracker.tables = [list(blocks[number]) for number in self._numbers]

    def _plan_store(self, plan: StepPlan, tracker: Tracker, scheduled: int) -> None:
        """Plan to store the chunks that are full after this step, and the tail of a prompt that ends with it. Draft tokens do not
        count, since they may be rejected."""
        request = tracker.request
        computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
        if not self._config.save_decode_cache:
            computed = min(computed, request.num_prompt_tokens)
        if tracker.exact is not None:
            computed = min(computed, tracker.exact)
        if self._blends is not None:
            plan.passages += self._blends.stores(tracker, computed)
        ends = computed == request.num_prompt_tokens
        before = request.num_computed_tokens
        store = self.requests.store(tracker, request.all_token_ids, computed, ends=ends, before=before)
        if store is not None:
            self._held.hold(store)
            plan.stores.append(store)
            if self.events is not None:
                self.events.stores(tracker)

    def _awaits_ranks(self, tracker: Tracker) -> bool:
        """Return whether a rank may still fail a load that the request's tokens depend on: other ranks would store them."""
        loads = [load for load in self.requests.loading.values() if load.synchronous]
        blocks = set(tracker.blocks) if loads else set()
        return any(not blocks.isdisjoint(load.filled(self._block_tokens)) for load in loads)

    def _log(self, tracker: Tracker, found: int, gain: int) -> None:
        """Log the line that users of in-process mode look for, once per answer."""
        if self._logs and tracker.logged != (found, gain):
            tracker.logged = found, gain
            text = "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d"
            told = tracker.id, tracker.request.num_tokens, found, gain
            logger.info(text, *told, extra={"request": tracker.id})


def _trace_of(request: Any) -> str:
    """Return the request's W3C traceparent. vLLM has it only if it sends traces itself (--otlp-traces-endpoint)."""
    headers = getattr(request, "trace_headers", None) or {}
    return str(headers.get("traceparent", ""))[:128]


def _was_preempted(tracker: Tracker) -> bool:
    """Return whether vLLM has taken the blocks of this request away. A passage's own request has none."""
    return tracker.request is not None and bool(tracker.request.num_preemptions != tracker.preemptions)


def _extras(request: Any) -> Extras | None:
    """Return what besides the tokens changes the KV: the images, sounds ... in a chunk, with their positions."""
    items = [
        (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length, feature.identifier)
        for feature in getattr(request, "mm_features", None) or ()
    ]
    if not items:
        return None

    def encode(start: int, end: int) -> bytes:
        return b"".join(encode_extra(name, first) for first, last, name in items if first < end and last > start)

    return encode
