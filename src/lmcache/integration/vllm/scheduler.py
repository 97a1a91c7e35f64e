"""The scheduler's half of the connector: what to load before a request runs, and what to store after each step.

Blocks and who owns them. A load writes into blocks that the engine has given to the request, and the engine waits for
it. A store reads blocks while the engine goes on: so a request that ends keeps its blocks until its stores are done
(`request_finished` -> True, then `StepPlan.closing`), and where the engine takes blocks away (preemption) the ranks
settle the stores that read them before anything is computed (`StepPlan.settle`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lmcache.chunks import HASH_BYTES, TokenChain
from lmcache.chunks.hashing import Extras, encode_extra
from lmcache.engine import Hit, Loading, SchedulerSession
from lmcache.engine.prefill import PrefillRate
from lmcache.integration.vllm.identity import Adapters
from lmcache.integration.vllm.plan import LoadPlan, StepPlan, StepReport, StorePlan
from lmcache.integration.vllm.rules import reads_nothing
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_START_SECONDS = 30.0
_LOOK_SECONDS = 0.1
HIT_SECONDS = 5.0
"""A hit that waits longer than this for free blocks is given back and asked for again: its lease keeps others out."""
MISS_SECONDS = 0.25
"""A request that waits is asked about at every step; so soon after a miss the answer is the same."""
TIER_PAUSE_SECONDS = 0.001
MIN_GAIN_TOKENS = {"cpu": 16}
MIN_GAIN_TOKENS_ON_A_DEVICE = 64
"""Beyond a local hit, fewer tokens than this are computed sooner than fetched: a load costs a scheduler step, which is worth
milliseconds of a CPU's prefill, and hundreds of tokens of a GPU's."""


@dataclass
class Tracker:
    """What we know of one request. `stored` counts the chunks that the server has, or was sent, from the first on; `tail` is
    the hash of an unfull chunk that it has or was sent."""

    request: Any
    preemptions: int
    chain: TokenChain | None = None
    epoch: bytes | None = None
    adapter: tuple[str, str] | None = None
    """Name and content of the LoRA adapter, ("", "") without one; None: not known, and nothing of the request is cached."""
    cacheable: bool = True
    may_load: bool = True
    hit: Hit | None = None
    asked_at: float = float("-inf")
    asked_tokens: int = -1
    local_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    stored: int = 0
    tail: bytes = b""
    jobs: set[str] = field(default_factory=set)
    told: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class Copying:
    """A load that the ranks are at, and by how many of them it has not been ended."""

    request_id: str
    hit: Hit
    blocks: frozenset[int]
    ranks: int


class SchedulerSide:
    """ranks: reports that complete a job. can_load, can_store: what the KV role allows.

    synchronous: a load is part of the request's first step, whose forward waits for it; so the last token is always computed,
    and nothing is too little to be loaded. Otherwise the request waits, unscheduled. save_decode: whether generated tokens
    are stored. save_tail: whether the last, unfull chunk of a prompt is. min_hit: smaller hits are not loaded.
    priority_limit: requests with a larger priority number are left alone.
    """

    def __init__(
        self,
        session: SchedulerSession,
        block_tokens: int,
        ranks: int,
        *,
        can_load: bool = True,
        can_store: bool = True,
        synchronous: bool = False,
        save_decode: bool = True,
        save_tail: bool = False,
        min_hit: int = 0,
        priority_limit: int | None = None,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session: SchedulerSession | None = session
        """None once this engine runs without us."""
        self._lessor = session
        """Whom leases are given back to."""
        self._block_tokens = block_tokens
        self._ranks = ranks
        self._can_load = can_load
        self._can_store = can_store
        self._synchronous = synchronous
        self._save_decode = save_decode
        self._save_tail = save_tail
        self._min_hit = min_hit
        self._priority_limit = priority_limit
        self._min_gain = 1 if synchronous else MIN_GAIN_TOKENS.get(device, MIN_GAIN_TOKENS_ON_A_DEVICE)
        self._clock = clock
        self._trackers: dict[str, Tracker] = {}
        self._admitted: list[tuple[Tracker, Hit, int, int]] = []
        """Loads of the coming step: whose, from what, tokens [start, end)."""
        self._loading: dict[str, Copying] = {}
        """By the request, whose end of loading vLLM tells; by the job where a forward waits for it and ranks tell."""
        self._storing: dict[str, tuple[Tracker, int]] = {}
        """Store jobs in flight: whose, and how many ranks are still at it."""
        self._closing: dict[str, Tracker] = {}
        self._plan = StepPlan()
        self._jobs = 0
        self._resets = 0
        """How often what was kept has been given up."""
        self.adapters = Adapters()
        self._weights = 0
        """Changes of the ranks' weights that this half knows of."""
        self._salt_prefix = self._salt_before = ""
        self._emptied, self._emptied_before = 0, -1
        """How often vLLM's own prefix cache has been emptied: by now, and when the last of what a reset gave up was computed."""
        self._prefill = PrefillRate()
        self._tiers_load = False
        """Some request waits for a tier, in the step that is being planned."""

    def match(self, request: Any, local_tokens: int) -> int | None:
        """How many tokens beyond `local_tokens` can be loaded. Asked again for every step that the request waits.

        None: not known yet, since a tier is loading.
        """
        tracker = self._tracker(request)
        tracker.local_tokens = local_tokens
        if not (self._can_load and tracker.may_load and tracker.cacheable) or reads_nothing(request):
            return 0
        hit = self._current_hit(tracker)
        if isinstance(hit, Loading):
            self._tiers_load = True
            return None
        if hit is None or tracker.chain is None:
            if not local_tokens:
                self._log(tracker, 0, 0)
            return 0
        found = min(hit.chunks * tracker.chain.chunk_tokens, request.num_tokens)
        tracker.stored = max(tracker.stored, min(hit.chunks, len(tracker.chain)))
        if hit.chunks > len(tracker.chain):
            tracker.tail = tracker.chain.tail(request.all_token_ids)
        gain = min(found, request.num_tokens - self._synchronous) - local_tokens
        gain = gain if gain >= (self._min_gain if local_tokens else 1) and found >= self._min_hit else 0
        self._log(tracker, found, gain)
        return gain

    def allocated(self, request: Any, blocks: list[int], external_tokens: int) -> None:
        """The request's block table (empty where the step's output will tell), and how many tokens after the local hit it
        expects from us."""
        tracker = self._tracker(request)
        tracker.blocks = blocks
        if tracker.local_tokens and self._emptied <= self._emptied_before:
            # vLLM's own cache still has blocks from before the reset, and what is computed upon them is no better.
            tracker.cacheable = False
        hit, tracker.hit = tracker.hit, None
        if hit is None:
            return
        if external_tokens <= 0 or tracker.chain is None:
            self._release(hit)
            return
        self._admitted.append((tracker, hit, tracker.local_tokens, tracker.local_tokens + external_tokens))

    def plan_step(self, output: Any) -> StepPlan:
        """What the ranks are to do in the step that `output` (a SchedulerOutput) describes."""
        plan, self._plan = self._plan, StepPlan()
        plan.weights, plan.emptied = self._weights, self._emptied
        plan.forward = output.total_num_scheduled_tokens > 0
        self._prefill.step(self._clock(), output.total_num_scheduled_tokens)
        if self._tiers_load and not plan.forward:
            time.sleep(TIER_PAUSE_SECONDS)  # nobody computes: leave the cores to those who load
        self._tiers_load = False
        self._settle_preempted(plan)
        self._grow_tables(output)
        for admitted in self._admitted:
            plan.loads.append(self._plan_load(*admitted))
        self._admitted.clear()
        if self._can_store and self._session is not None:
            drafts = output.scheduled_spec_decode_tokens
            for request_id, scheduled in output.num_scheduled_tokens.items():
                tracker = self._trackers.get(request_id)
                if tracker is not None and tracker.cacheable:
                    self._plan_store(plan, tracker, scheduled - len(drafts.get(request_id, ())))
        return plan

    def transferred(
        self,
        finished_loads: Iterable[str] = (),
        closed: Iterable[str] = (),
        invalid_blocks: Iterable[int] = (),
        report: StepReport | None = None,
    ) -> None:
        """What all ranks have done: loads they ended, requests they closed, blocks they could not fill; their reports."""
        report = report or StepReport()
        invalid = frozenset(invalid_blocks)
        if invalid:
            for key, loading in self._loading.items():
                if not invalid & loading.blocks:
                    continue
                if self._synchronous:
                    self._plan.known_failures.append(key)
                if loading.request_id in self._trackers:
                    self._trackers[loading.request_id].may_load = False
        for request_id in finished_loads:
            done = self._loading.pop(request_id, None)
            if done is not None:
                self._release(done.hit)
        for job_id, count in report.loaded.items():
            self._count_loaded(job_id, count)
        for job_id, count in report.stored.items():
            self._count_stored(job_id, count)
        for request_id in closed:
            # Releases of vLLM without worker metadata tell of stores in no other way.
            for job_id in tuple(self._closing.pop(request_id).jobs if request_id in self._closing else ()):
                self._count_stored(job_id, self._ranks)
        if report.weights > self._weights:
            self._weights = report.weights
            logger.info("This engine's weights have changed: what was cached for the old ones is not used any more")
            self.reset(report.emptied)
        if report.refusal:
            self.stop(report.refusal)

    def finished(self, request: Any) -> bool:
        """The request has ended; whether the engine has to keep its blocks until we report it as sent."""
        tracker = self._trackers.pop(request.request_id, None)
        if tracker is None:
            return False
        self._give_back(tracker)
        if self._session is not None and self._can_store and tracker.cacheable and tracker.chain is None:
            self._session.forgone(request.num_computed_tokens)
        if not tracker.jobs or request.request_id in self._loading:  # vLLM frees the blocks when the load has ended
            return False
        if request.num_preemptions != tracker.preemptions:
            self._plan.settle.extend(tracker.jobs)
            return False
        self._plan.closing.append(request.request_id)
        self._closing[request.request_id] = tracker
        return True

    def reset(self, emptied: int | None = None) -> None:
        """Nothing kept so far is served to this engine again: its weights may have changed. Others keep what they have.

        emptied: how often vLLM's own prefix cache had been emptied when they changed; None for now.
        """
        self._emptied_before = max(self._emptied_before, self._emptied if emptied is None else emptied)
        self._resets += 1
        self._salt_before, self._salt_prefix = self._salt_prefix, f"\0reset {time.time_ns()} {self._resets}\0"
        for tracker in self._trackers.values():
            # What is computed already may be of the old weights, so these requests store no more.
            tracker.cacheable = False
            self._give_back(tracker)

    def emptied(self) -> None:
        """vLLM's own prefix cache is empty: what is computed from now on owes nothing to what was there."""
        self._emptied += 1

    @property
    def changes(self) -> tuple[int, int]:
        """How often what was kept has been given up, and which change of the ranks' weights this half knows of."""
        return self._resets, self._weights

    def take_back_reset(self, before: tuple[int, int]) -> None:
        """What was kept is served again, if there was one reset since `changes` was `before`, and no rank told of new weights."""
        if self.changes == (before[0] + 1, before[1]):
            self._salt_prefix = self._salt_before

    def wait_connected(self, starting: Callable[[], bool]) -> None:
        """Give a server the time to start, as long as it is `starting`. Without one the engine goes on."""
        deadline = time.monotonic() + _START_SECONDS
        while (
            (session := self._session) is not None and session.identified and not session.wait_connected(_LOOK_SECONDS)
        ):
            if not starting():
                self.stop("its own server has not started, and has said why")
            elif time.monotonic() > deadline:
                logger.warning("This engine's LMCache server was not up within %.0f s; it may come yet", _START_SECONDS)
                return

    def wait_for_server(self) -> None:
        """As `SchedulerSession.wait_for_server`, for a server that others have started."""
        if self._session is not None:
            self._session.wait_for_server()

    def stop(self, reason: str) -> None:
        """A rank cannot serve: from now on this engine runs without us."""
        if self._session is not None:
            logger.warning("LMCache serves nothing for this engine: %s", reason)
            for tracker in self._trackers.values():
                self._give_back(tracker)
            self._session = None
            self._hang_up_if_unused()

    def close(self) -> None:
        self._session = None
        self._lessor.close()

    def _tracker(self, request: Any) -> Tracker:
        """The request's tracker; a fresh one when the request was preempted since."""
        tracker = self._trackers.get(request.request_id)
        if tracker is not None and tracker.request is request and tracker.preemptions == request.num_preemptions:
            return tracker
        fresh = Tracker(request, request.num_preemptions)
        lora = getattr(request, "lora_request", None)
        fresh.adapter = self.adapters.identity(lora) if lora is not None else ("", "")
        fresh.cacheable = getattr(request, "prompt_embeds", None) is None and fresh.adapter is not None
        # Later inputs of a resumable session may bring images, which the chain made now would not include in its hashes.
        fresh.cacheable = fresh.cacheable and not getattr(request, "resumable", False)
        if self._priority_limit is not None and request.priority > self._priority_limit:
            fresh.cacheable = False
        if tracker is not None:
            fresh.may_load, fresh.cacheable = tracker.may_load, fresh.cacheable and tracker.cacheable
            if tracker.jobs:
                # Not settled yet: preempted outside a step (a reset of the engine's own prefix cache).
                self._plan.settle.extend(tracker.jobs)
            self._give_back(tracker)
        self._trackers[request.request_id] = fresh
        return fresh

    def _current_hit(self, tracker: Tracker) -> Hit | Loading | None:
        session, now, tokens = self._session, self._clock(), tracker.request.num_tokens
        if session is None:
            return None
        age, same = now - tracker.asked_at, tokens == tracker.asked_tokens and tracker.epoch == session.epoch
        if tracker.hit is not None:
            leased_from = tracker.hit.first_chunk * (tracker.chain.chunk_tokens if tracker.chain else 0)
            if same and age < HIT_SECONDS and leased_from <= tracker.local_tokens:
                return tracker.hit
            self._give_back(tracker)
        elif same and age < MISS_SECONDS:
            return None
        chain = self._chain(tracker)
        if chain is None:
            tracker.asked_at, tracker.asked_tokens = now, tokens
            return None
        chain.extend(tracker.request.all_token_ids)
        tail = chain.tail(tracker.request.all_token_ids) if self._save_tail else b""
        if len(chain) or tail:
            rate, request_id = self._prefill.tokens_per_second, tracker.request.request_id
            found = session.poll(chain, tracker.local_tokens, rate, tail, request_id)
            if isinstance(found, Loading):
                return found
            tracker.hit = found
        tracker.asked_at, tracker.asked_tokens = self._clock(), tokens
        return tracker.hit

    def _chain(self, tracker: Tracker) -> TokenChain | None:
        """The request's chain under the server of now; a new one, with nothing stored, when the server is another."""
        session = self._session
        if session is None:
            return None
        if tracker.chain is None or tracker.epoch != session.epoch:
            request, adapter = tracker.request, tracker.adapter or ("", "")
            salt = self._salt_prefix + (request.cache_salt or "")
            tracker.epoch, tracker.stored, tracker.tail = session.epoch, 0, b""
            tracker.chain = session.new_chain(salt, adapter[0], adapter[1], _extras(request))
        return tracker.chain

    def _grow_tables(self, output: Any) -> None:
        cached = output.scheduled_cached_reqs
        for new in output.scheduled_new_reqs:
            if new.req_id in self._trackers:
                self._trackers[new.req_id].blocks = list(new.block_ids[0])
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracker = self._trackers.get(request_id)
            if tracker is None or not new_blocks:
                continue
            if request_id in cached.resumed_req_ids:
                tracker.blocks = list(new_blocks[0])
            else:
                tracker.blocks.extend(new_blocks[0])

    def _plan_load(self, tracker: Tracker, hit: Hit, start: int, end: int) -> LoadPlan:
        """Raises RuntimeError where this release of vLLM does not say which blocks to fill: it takes them for filled."""
        assert tracker.chain is not None
        request_id, job_id = tracker.request.request_id, self._job("load")
        touched = tracker.blocks[start // self._block_tokens : -(-end // self._block_tokens)]
        if len(touched) * self._block_tokens < end - start:
            raise RuntimeError(f"vLLM has not told the blocks of request {request_id}: this release cannot be served")
        key = job_id if self._synchronous else request_id
        self._loading[key] = Copying(request_id, hit, frozenset(touched), self._ranks)
        return LoadPlan(
            job_id=job_id,
            request_id=request_id,
            arena=hit.arena,
            lease=hit.lease,
            first_leased=hit.first_chunk,
            extents=hit.extents,
            chunk_tokens=tracker.chain.chunk_tokens,
            start_token=start,
            end_token=end,
            blocks=list(tracker.blocks),
            request_tokens=tracker.request.num_tokens,
        )

    def _plan_store(self, plan: StepPlan, tracker: Tracker, scheduled: int) -> None:
        """Store the chunks that are full once this step has run, and the tail of a prompt that ends with it. Only known tokens
        count: drafts may be rejected."""
        request = tracker.request
        computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
        if not self._save_decode:
            computed = min(computed, request.num_prompt_tokens)
        session, size = self._session, tracker.chain.chunk_tokens if tracker.chain is not None else 1
        if session is None or session.chunk_tokens is None or self._awaits_ranks(tracker):
            return
        ends = self._save_tail and computed == request.num_prompt_tokens and computed % size > 0 and not tracker.tail
        if computed // size <= tracker.stored and not ends and tracker.epoch == session.epoch:
            return
        chain = self._chain(tracker)
        if chain is None:
            return
        size, first = chain.chunk_tokens, tracker.stored
        chunks = computed // size
        chain.extend(request.all_token_ids)
        tail = chain.tail(request.all_token_ids[:computed]) if ends else b""
        end = computed if tail else chunks * size
        needed = -(-end // self._block_tokens)
        if end <= first * size or needed > len(tracker.blocks):
            return
        job_id = self._job("store")
        hashes = chain.hashes[first * HASH_BYTES : chunks * HASH_BYTES] + tail
        blocks, whose = tracker.blocks[:needed], request.request_id
        plan.stores.append(
            StorePlan(job_id, whose, size, chain.parent(first), hashes, first, blocks, end if tail else 0)
        )
        tracker.stored, tracker.tail = chunks, tail or tracker.tail
        tracker.jobs.add(job_id)
        self._storing[job_id] = (tracker, self._ranks)

    def _awaits_ranks(self, tracker: Tracker) -> bool:
        """Its tokens are computed from a load that some rank may still fail, and other ranks would keep what comes of it."""
        if not self._synchronous or self._ranks == 1:
            return False
        return any(not load.blocks.isdisjoint(tracker.blocks) for load in self._loading.values())

    def _settle_preempted(self, plan: StepPlan) -> None:
        for job_id, (tracker, _) in self._storing.items():
            if tracker.request.num_preemptions != tracker.preemptions:
                plan.settle.append(job_id)

    def _count_stored(self, job_id: str, count: int) -> None:
        tracker, left = self._storing.get(job_id, (None, 0))
        if tracker is None:
            return
        if left > count:
            self._storing[job_id] = (tracker, left - count)
            return
        del self._storing[job_id]
        tracker.jobs.discard(job_id)

    def _count_loaded(self, job_id: str, count: int) -> None:
        loading = self._loading.pop(job_id, None)
        if loading is None:
            return
        if loading.ranks > count:
            self._loading[job_id] = replace(loading, ranks=loading.ranks - count)
        else:
            self._release(loading.hit)

    def _log(self, tracker: Tracker, found: int, gain: int) -> None:
        """The line that users of in-process mode look for, once for each answer."""
        if self._synchronous and tracker.told != (found, gain):
            tracker.told = found, gain
            request = tracker.request
            text = "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d"
            logger.info(text, request.request_id, request.num_tokens, found, gain)

    def _give_back(self, tracker: Tracker) -> None:
        """The hit that waits for the request to run, if there is one."""
        hit, tracker.hit = tracker.hit, None
        if hit is not None:
            self._release(hit)

    def _release(self, hit: Hit) -> None:
        self._lessor.release(hit)
        self._hang_up_if_unused()

    def _hang_up_if_unused(self) -> None:
        """Other ranks may still load what is leased when one has refused."""
        if self._session is None and not self._loading and not self._admitted:
            self._lessor.close()

    def _job(self, kind: str) -> str:
        self._jobs += 1
        return f"{kind}-{self._jobs}"


def _extras(request: Any) -> Extras | None:
    """What besides the tokens decides the numbers: the images, sounds ... that lie in a chunk, with their places."""
    items = [
        (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length, feature.identifier)
        for feature in getattr(request, "mm_features", None) or ()
    ]
    if not items:
        return None

    def encode(start: int, end: int) -> bytes:
        return b"".join(encode_extra(name, first) for first, last, name in items if first < end and last > start)

    return encode
