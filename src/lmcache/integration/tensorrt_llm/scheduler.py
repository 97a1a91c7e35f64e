"""The scheduler's half: what to load before a request's first forward, and what to store after each.

Loads are synchronous, in the step that runs the request first: only there can the engine be told that one has failed. Hits end
with a block of the engine's (`tokens_per_block`), wherever that is in a chunk. Stores run on while the engine does; a request
that ends keeps its blocks until they are done (`finished` -> True).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lmcache.chunks import HASH_BYTES, TokenChain
from lmcache.engine import Hit, SchedulerSession
from lmcache.engine.prefill import PrefillRate
from lmcache.integration.tensorrt_llm.plan import LoadPlan, StepPlan, StorePlan
from lmcache.integration.tensorrt_llm.ranks import RankWatch
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

NO_BLOCK = -1
"""What the engine calls a block that has no page (outside a sliding window)."""
_BESIDE_TOKENS = ("multimodal_hashes", "multimodal_embedding", "prompt_embedding_table", "mrope_rotary_cos_sin")


@dataclass
class Tracker:
    """One request.

    computed: tokens that could have been stored. asked: the engine wanted to know of hits. matched: tokens that it had itself.
    granted: tokens after those that it takes from us. stored: chunks from the first on that the server has, or was sent.
    prompt_tokens: 0 until the first step.
    """

    salt: str
    cacheable: bool
    computed: int = 0
    asked: bool = False
    chain: TokenChain | None = None
    epoch: bytes = b""
    matched: int = 0
    granted: int = 0
    hit: Hit | None = None
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    stored: int = 0
    jobs: list[str] = field(default_factory=list)


class SchedulerSide:
    """stores_answers: whether generated tokens are stored too. least_gain: tokens that a load must bring."""

    def __init__(
        self,
        session: SchedulerSession,
        watch: RankWatch,
        block_tokens: int,
        *,
        stores_answers: bool = True,
        least_gain: int = 1,
    ) -> None:
        self._session, self.watch, self._block_tokens = session, watch, block_tokens
        self._stores_answers, self._least_gain = stores_answers, max(1, least_gain)
        self._trackers: dict[int, Tracker] = {}
        self._loading: dict[str, Hit] = {}
        self._settle: list[str] = []
        self._jobs = 0
        self._told: set[str] = set()
        self._prefill = PrefillRate()

    def match(self, request: Any, computed_tokens: int) -> int:
        """How many tokens beyond `computed_tokens` the request may take from us."""
        tracker = self._begin(request)
        tracker.asked, tracker.matched = True, computed_tokens
        tokens = request.get_tokens(0)
        chain = self._chain(tracker)
        if chain is None:
            return 0
        chain.extend(tokens)
        if not self.watch.all_have(self._session.epoch):
            return 0
        rate = self._prefill.tokens_per_second
        hit = self._session.lookup(chain, computed_tokens, rate, request_id=str(request.request_id))
        if hit is None:
            return 0
        tracker.stored = hit.chunks
        # The last token is computed for its logits, and what is loaded ends with a block.
        end = min(hit.chunks * chain.chunk_tokens, len(tokens) - 1) // self._block_tokens * self._block_tokens
        if end - computed_tokens < self._least_gain or not self.watch.all_have(hit.epoch):
            self._release(hit)
            return 0
        tracker.hit, tracker.granted = hit, end - computed_tokens
        return tracker.granted

    def allocated(self, request: Any, blocks: list[int]) -> None:
        """The request's blocks so far."""
        tracker = self._trackers.get(request.request_id)
        if tracker is None:  # an engine without block reuse does not ask
            tracker = self._begin(request)
        tracker.blocks = list(blocks)

    def cancelled(self, request: Any, start: int) -> None:
        """The engine will not take what lies from token `start` on."""
        tracker = self._trackers.get(request.request_id)
        if tracker is None or tracker.hit is None:
            return
        tracker.granted = max(0, min(tracker.granted, start - tracker.matched))
        if not tracker.granted:
            self._drop_hit(tracker)

    def plan_step(self, output: Any) -> StepPlan:
        """What the ranks are to do in the step that `output` (a SchedulerOutput) describes."""
        plan = StepPlan(settle=self._settle)
        self._settle = []
        scheduled = (data.num_scheduled_tokens for data in (*output.new_requests, *output.cached_requests))
        self._prefill.step(time.monotonic(), sum(scheduled))
        for data in output.new_requests:
            tracker = self._trackers.get(data.request_id)
            if tracker is None:
                continue
            tracker.tokens, tracker.prompt_tokens = list(data.new_tokens), len(data.new_tokens)
            tracker.blocks = list(data.new_block_ids) or tracker.blocks
            start, position = self._plan_load(plan, tracker), data.computed_position
            # Releases differ in whether the position counts what comes from us; a cache of layer groups may have taken less.
            grouped = bool(getattr(data, "new_block_ids_by_layer_group", None))
            if tracker.asked and not grouped and position == tracker.matched:
                position = start
            self._plan_store(plan, data.request_id, tracker, position + data.num_scheduled_tokens)
        for data in output.cached_requests:
            tracker = self._trackers.get(data.request_id)
            if tracker is None:
                continue
            tracker.tokens.extend(data.new_tokens)
            tracker.blocks.extend(data.new_block_ids)
            self._plan_store(plan, data.request_id, tracker, data.computed_position + data.num_scheduled_tokens)
        return plan

    def loaded(self, plan: StepPlan) -> None:
        """Every rank has ended the loads of this step."""
        for load in plan.loads:
            hit = self._loading.pop(load.job_id, None)
            if hit is not None:
                self._release(hit)

    @property
    def owes(self) -> bool:
        """Whether there are hits that the engine was promised and no rank has been told of."""
        return any(tracker.hit is not None for tracker in self._trackers.values())

    def finished(self, request: Any) -> bool:
        """The request has ended or its blocks are to go; whether the engine has to wait until ranks report it as saved."""
        tracker = self._trackers.pop(request.request_id, None)
        if tracker is None:
            return False
        self._drop_hit(tracker)
        if tracker.cacheable and tracker.chain is None:
            self._session.forgone(tracker.computed)
        return bool(tracker.jobs)

    def reset(self, request: Any) -> list[str]:
        """The request's blocks are gone already, and it will begin anew. Its store jobs, which the next step's plan settles."""
        tracker = self._trackers.pop(request.request_id, None)
        if tracker is None:
            return []
        self._drop_hit(tracker)
        self._settle.extend(tracker.jobs)
        return tracker.jobs

    def close(self) -> None:
        self.watch.close()
        self._session.close()

    def _begin(self, request: Any) -> Tracker:
        """A new tracker: the engine asks once for each allocation."""
        self.reset(request)
        salt = getattr(request, "cache_salt", None)
        number = getattr(request, "cache_salt_id", None)
        tracker = Tracker(salt or ("" if number is None else f"\0{number}"), self._cacheable(request))
        self._trackers[request.request_id] = tracker
        return tracker

    def _cacheable(self, request: Any) -> bool:
        """Whether the tokens and the salt alone decide the KV."""
        if getattr(request, "lora_task_id", None) is not None:
            self._log(
                "requests with LoRA adapters are not cached: the engine tells a number of theirs, not what they hold"
            )
            return False
        beside = [name for name in _BESIDE_TOKENS if getattr(request, name, None) is not None]
        if beside:
            self._log(f"requests with inputs beside their tokens ({beside[0]}) are not cached")
        return not beside

    def _chain(self, tracker: Tracker) -> TokenChain | None:
        """The request's chain under the server of now; a new one, with nothing stored, when the server is another."""
        if not tracker.cacheable:
            return None
        if tracker.chain is None or tracker.epoch != self._session.epoch:
            tracker.epoch, tracker.stored = self._session.epoch, 0
            tracker.chain = self._session.new_chain(cache_salt=tracker.salt)
        return tracker.chain

    def _plan_load(self, plan: StepPlan, tracker: Tracker) -> int:
        """The token that the engine's own work begins with."""
        hit, start = tracker.hit, tracker.matched
        if hit is None or tracker.chain is None:
            return start
        # Blocks that are not there yet are none that the engine has taken from us.
        end = min(start + tracker.granted, len(tracker.blocks) * self._block_tokens)
        if end <= start:
            self._drop_hit(tracker)
            return start
        job_id = self._job("load")
        plan.loads.append(LoadPlan(job_id, hit, tracker.chain.chunk_tokens, start, end, list(tracker.blocks)))
        tracker.hit, self._loading[job_id] = None, hit
        return end

    def _plan_store(self, plan: StepPlan, request_id: int, tracker: Tracker, computed: int) -> None:
        """Store the chunks that are full once this step has run. Drafts are no known tokens, so they do not count."""
        computed = min(computed, len(tracker.tokens) if self._stores_answers else tracker.prompt_tokens)
        tracker.computed = computed
        if self._session.chunk_tokens is None:
            return
        chain = self._chain(tracker)
        if chain is None:
            return
        size, first = chain.chunk_tokens, tracker.stored
        chunks = computed // size
        needed = -(-chunks * size // self._block_tokens)
        if chunks <= first or needed > len(tracker.blocks) or NO_BLOCK in tracker.blocks[:needed]:
            return
        chain.extend(tracker.tokens)
        job_id = self._job("store")
        hashes = chain.hashes[first * HASH_BYTES : chunks * HASH_BYTES]
        plan.stores.append(
            StorePlan(job_id, request_id, size, chain.parent(first), hashes, first, tracker.blocks[:needed])
        )
        tracker.stored = chunks
        tracker.jobs.append(job_id)

    def _drop_hit(self, tracker: Tracker) -> None:
        hit, tracker.hit = tracker.hit, None
        if hit is not None:
            self._release(hit)

    def _release(self, hit: Hit) -> None:
        self._session.release(hit)

    def _job(self, kind: str) -> str:
        self._jobs += 1
        return f"{kind}-{self._jobs}"

    def _log(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s", what)
