"""The scheduler's side: it translates the engine's requests and steps for `lmcache.engine.requests`.

Loads are synchronous, in the step that runs the request first: only there can the engine be told that one has failed. Hits end
with a block of the engine's (`tokens_per_block`), wherever that is in a chunk. Stores run on while the engine does; a request
that ends keeps its blocks until they are done (`finished` -> True).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmcache.config.engine import EngineConfig
from lmcache.engine import Request, Requests, SchedulerSession, plans
from lmcache.engine.rank_arenas import RankWatch
from lmcache.engine.settings import WITH_A_DAEMON
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_BESIDE_TOKENS = ("multimodal_hashes", "multimodal_embedding", "prompt_embedding_table", "mrope_rotary_cos_sin")


@dataclass
class StepPlan(plans.StepPlan):
    """The plan of a step, which the engine pickles and broadcasts. broken: loads that the engine relies on were not planned."""

    broken: bool = False


@dataclass
class Tracker(Request):
    """computed: tokens that could have been stored. given: number of leading blocks that the engine has given. asked: whether it
    asked for hits. matched: tokens that it had itself. granted: tokens after those that it loads from LMCache. prompt_tokens: 0
    until the first step."""

    computed: int = 0
    given: int = 0
    asked: bool = False
    matched: int = 0
    granted: int = 0
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0


class SchedulerSide:
    """config: settings of loads and stores."""

    def __init__(
        self, session: SchedulerSession, watch: RankWatch, block_tokens: int, config: EngineConfig = WITH_A_DAEMON
    ) -> None:
        self.requests: Requests[Tracker] = Requests(session, block_tokens=block_tokens)
        self.session, self.watch, self._block_tokens = session, watch, block_tokens
        self._stores_answers, self._least_gain = config.save_decode_cache, max(1, config.min_retrieve_tokens)
        self.settle: list[str] = []
        """Store jobs of blocks that are gone, which no plan has told the ranks of."""
        self._logged: set[str] = set()

    def match(self, request: Any, computed_tokens: int) -> int:
        """Return how many tokens beyond `computed_tokens` the request may load."""
        tracker = self._begin(request)
        tracker.asked, tracker.matched = True, computed_tokens
        tokens = request.get_tokens(0)
        if not self.watch.all_have(self.session.epoch):
            return 0
        self.requests.find(tracker, tokens, computed_tokens, wait=True)
        # The last token is computed for its logits, and what is loaded ends with a block.
        end = min(tracker.found_tokens, len(tokens) - 1) // self._block_tokens * self._block_tokens
        tracker.granted = end - computed_tokens
        if tracker.granted < self._least_gain or tracker.hit is None or not self.watch.all_have(tracker.hit.epoch):
            self.requests.give_back(tracker)
            return 0
        return tracker.granted

    def allocated(self, request: Any, blocks: list[int]) -> None:
        """Record the request's blocks so far."""
        # An engine without block reuse does not ask.
        tracker = self.requests.open.get(request.request_id) or self._begin(request)
        tracker.blocks = list(blocks)

    def cancelled(self, request: Any, start: int) -> None:
        """Record that the engine will not load the tokens from `start` on."""
        tracker = self.requests.open.get(request.request_id)
        if tracker is not None and tracker.hit is not None:
            tracker.granted = max(0, min(tracker.granted, start - tracker.matched))
            if not tracker.granted:
                self.requests.give_back(tracker)

    def plan_step(self, output: Any) -> StepPlan:
        """What the ranks are to do in the step that `output` (a SchedulerOutput) describes."""
        plan = StepPlan(settle=self.settle)
        scheduled = (data.num_scheduled_tokens for data in (*output.new_requests, *output.cached_requests))
        self.requests.prefill.step(self.requests.runtime.now(), sum(scheduled))
        for data in output.new_requests:
            tracker = self.requests.open.get(data.request_id)
            if tracker is None:
                continue
            tracker.tokens, tracker.prompt_tokens = list(data.new_tokens), len(data.new_tokens)
            tracker.blocks = list(data.new_block_ids) or tracker.blocks
            start, position = self._plan_load(plan, tracker), data.computed_position
            # Releases differ in whether the position counts loaded tokens; a cache of layer groups may have taken fewer.
            grouped = bool(getattr(data, "new_block_ids_by_layer_group", None))
            if tracker.asked and not grouped and position == tracker.matched:
                position = start
            self._plan_store(plan, tracker, position + data.num_scheduled_tokens)
        for data in output.cached_requests:
            tracker = self.requests.open.get(data.request_id)
            if tracker is None:
                continue
            tracker.tokens.extend(data.new_tokens)
            tracker.blocks.extend(data.new_block_ids)
            self._plan_store(plan, tracker, data.computed_position + data.num_scheduled_tokens)
        self.settle = []
        return plan

    def loaded(self) -> None:
        """Every rank has ended the loads of the step, and others are not planned yet."""
        for job_id in tuple(self.requests.loading):
            self.requests.loaded(job_id)

    @property
    def owes(self) -> bool:
        """Whether there are hits that the engine was promised and no rank has loaded."""
        return bool(self.requests.loading) or any(tracker.hit is not None for tracker in self.requests.open.values())

    def finished(self, request: Any) -> bool:
        """End a request, or release its blocks. Return whether the engine has to wait until ranks report it as saved."""
        return bool(self._end(request.request_id))

    def reset(self, request: Any) -> list[str]:
        """Restart a request whose blocks are taken away already. Return its store jobs, which the next step's plan settles."""
        jobs = self._end(request.request_id)
        self.settle += jobs
        return jobs

    def close(self) -> None:
        self.watch.close()
        self.requests.close()

    def _begin(self, request: Any) -> Tracker:
        """Make a new tracker: the engine asks once for each allocation."""
        self.reset(request)
        salt, number = getattr(request, "cache_salt", None), getattr(request, "cache_salt_id", None)
        tracker = Tracker(request.request_id, salt or ("" if number is None else f"\0{number}"))
        tracker.cacheable = self._cacheable(request)
        self.requests.open[tracker.id] = tracker
        return tracker

    def _end(self, request_id: int) -> list[str]:
        """Return the request's store jobs. The ranks report their end to the engine, so it is not counted here."""
        tracker = self.requests.open.get(request_id)
        if tracker is None:
            return []
        self.requests.finish(request_id, tracker.computed)
        jobs = list(tracker.jobs)
        for job_id in jobs:
            self.requests.stored(job_id)
        return jobs

    def _cacheable(self, request: Any) -> bool:
        """Return whether only the tokens and the salt determine the KV."""
        if getattr(request, "lora_task_id", None) is not None:
            self._log(
                "requests with LoRA adapters are not cached: the engine gives an adapter's number, not its weights"
            )
            return False
        beside = [name for name in _BESIDE_TOKENS if getattr(request, name, None) is not None]
        if beside:
            self._log(f"requests with inputs beside their tokens ({beside[0]}) are not cached")
        return not beside

    def _plan_load(self, plan: StepPlan, tracker: Tracker) -> int:
        """Plan the load; return the first token that the engine computes itself."""
        start = tracker.matched
        # The engine loads only into blocks that it has given.
        end = min(start + tracker.granted, len(tracker.blocks) * self._block_tokens)
        if tracker.hit is None or end <= start:
            self.requests.give_back(tracker)
            return start
        plan.loads.append(self.requests.load(tracker, start, end))
        return end

    def _plan_store(self, plan: StepPlan, tracker: Tracker, computed: int) -> None:
        """Plan to store the chunks that are full after this step. Draft tokens do not count, since they may be rejected. From the
        first block with the number -1 on nothing is stored: such a block does not exist."""
        tracker.computed = min(computed, len(tracker.tokens) if self._stores_answers else tracker.prompt_tokens)
        while tracker.given < len(tracker.blocks) and tracker.blocks[tracker.given] >= 0:
            tracker.given += 1
        end = min(tracker.computed, tracker.given * self._block_tokens)
        store = self.requests.store(tracker, tracker.tokens, end)
        if store is not None:
            plan.stores.append(store)

    def _log(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s", what)
