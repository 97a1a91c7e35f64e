"""What every engine's scheduler does for its requests: hash, look up, hold the hit, give it back, plan loads and stores.

An integration translates the engine's requests into `Request`s, and the plans into messages to the engine's ranks. No function
here raises, and none waits longer than the session's deadline.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from lmcache.chunks import HASH_BYTES, TokenChain, tenant_of
from lmcache.chunks.hashing import Extras
from lmcache.engine.nearest import Nearest
from lmcache.engine.plans import LoadPlan, StorePlan
from lmcache.engine.prefill import PrefillRate
from lmcache.engine.scheduler import Hit, Loading, SchedulerSession
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

HIT_SECONDS = 5.0
"""A hit that waits longer than this for its load is given back and looked up again: its lease keeps extents occupied."""
MISS_SECONDS = 0.25
"""A miss is the answer again for this time: schedulers ask about a waiting request at every step."""
WAIT_SHARE = 0.05
"""A lookup that waits is asked again after this share of the time that it has waited, at the latest after `MISS_SECONDS`: a
scheduler with a hundred such requests would spend its steps on asking."""
_NEVER = float("-inf")


class Wait(NamedTuple):
    """A lookup that waits: since when, its last answer, and when it is asked again."""

    began: float
    answer: Loading
    asks_at: float


@dataclass
class Request:
    """The state of one request.

    salt: only requests of the same salt share KV. adapter: name and content name of the LoRA adapter. extras: what else changes
    the KV. cacheable: whether the request may be loaded and stored. hit: the hit that is not being loaded yet; asked_from: the
    token from which on it was asked for, at the start of a chunk; asked_last: the last hash of what was asked for. wait: if the
    last answer was `Loading`. blocks: the engine's block table from token 0 on; tables: those of the model's further groups.
    stored: number of leading chunks that the server has or was sent; tail: hash of the unfull chunk that it has or was sent.
    promised: how many leading chunks, with the tail, other engines may expect to be stored. jobs: running stores, each with the
    number of ranks that have not ended it.

    passage: if the tokens are not a prompt but a passage of one, how its KV is computed (`chunk_root`).

    tail_leaves: how many of the prompt's last tokens its tail leaves out, None for no tail, in an engine that does not store the
    tail of every prompt. stores_tail: whether this engine stores it; else another one does.

    trace: the W3C traceparent that the request has come with, for the server's spans."""

    id: Hashable
    salt: str = ""
    adapter: tuple[str, str] = ("", "")
    extras: Extras | None = None
    cacheable: bool = True
    may_load: bool = True
    chain: TokenChain | None = None
    epoch: bytes | None = None
    hit: Hit | None = None
    asked_at: float = _NEVER
    asked_tokens: int = -1
    asked_last: bytes = b""
    asked_from: int = 0
    wait: Wait | None = None
    blocks: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    stored: int = 0
    tail: bytes = b""
    promised: int = 0
    jobs: dict[str, int] = field(default_factory=dict)
    tail_leaves: int | None = None
    stores_tail: bool = False
    trace: str = ""
    passage: str = ""

    def all_tables(self, groups: int) -> list[list[int]]:
        """Return the block table of each group; empty ones if only the ranks know them."""
        return [self.blocks, *(self.tables or [[] for _ in range(groups - 1)])]

    @property
    def found_tokens(self) -> int:
        """Tokens of the hit from the start of the prompt, counting an unfull chunk as full; 0 without a hit."""
        return self.hit.chunks * self.chain.chunk_tokens if self.hit is not None and self.chain is not None else 0


RequestT = TypeVar("RequestT", bound=Request)


class GroupTable(NamedTuple):
    """What a scheduler knows of the block tables of one group. block_tokens: tokens of a block; 0 if only the ranks know the
    tables. reach_tokens: as in `Group`. only_last: the engine has only what is in reach where a step ends, nothing before it.
    local_tokens: a token sees nothing before the last multiple of so many tokens (chunked local attention); 0 otherwise."""

    block_tokens: int
    reach_tokens: int = 0
    only_last: bool = False
    local_tokens: int = 0

    def needed_from(self, end: int) -> int:
        """Return the first token that the engine needs in order to go on from `end`. It has no memory for those before."""
        first = max(0, end - self.reach_tokens) if self.reach_tokens else 0
        return max(first, end - end % self.local_tokens) if self.local_tokens else first


class Requests(Generic[RequestT]):
    """The requests of one scheduler.

    Args:
        session: the scheduler's session. It is closed with this object, or once `stop` was called and no load runs.
        block_tokens: tokens of a block in the requests' block tables; 0 if only the ranks know the tables.
        ranks: how many ranks have to end a job.
        save_tail: whether the last, unfull chunk of every prompt is also stored. If not, each request says for itself whether it
            has a tail. There is none if a group has a reach.
        name: the engine's name, the same in all of its schedulers. It names KV that no other engine may share, so it must be
            unique; "" generates one.
        groups: the groups of a model with several kinds of KV, in place of `block_tokens`.
        stores: whether the engine, by any of its ranks, stores what it computes. Other engines may wait for that.
        loads: if false, `find` only announces what the engine will store, and finds nothing.
    """

    def __init__(
        self,
        session: SchedulerSession,
        *,
        block_tokens: int = 0,
        ranks: int = 1,
        save_tail: bool = False,
        name: str = "",
        groups: Sequence[GroupTable] = (),
        stores: bool = True,
        loads: bool = True,
    ) -> None:
        self.session: SchedulerSession | None = session
        """None once `stop` or `close` was called: this engine then runs without a cache."""
        self.runtime = session.runtime
        self.prefill = PrefillRate()
        self.open: dict[Hashable, RequestT] = {}
        self.loading: dict[str, LoadPlan] = {}
        """Loads that at least one rank has not ended yet, by job."""
        self.resets = self._generation = self._generation_before = 0
        self.emptied, self._emptied_before = 0, -1
        """How often the engine's own cache was emptied: by now, and when the last KV that a reset invalidated was computed."""
        self._lessor = session
        """The session that leases are given back to, even after `stop`."""
        self._groups = tuple(groups) or (GroupTable(block_tokens),)
        self._reaching = any(group.reach_tokens for group in self._groups)
        """Whether the engine keeps of some layers only what is in reach."""
        self._ranks, self._save_tail = ranks, save_tail and not self._reaching
        self._name, self._stores, self._loads = name or secrets.token_hex(8), stores, loads
        self._left: dict[str, int] = {}
        """Number of ranks that have not ended a load, by job."""
        self.storing: dict[str, RequestT] = {}
        """Requests with a store that at least one rank has not ended yet, by job."""
        self._jobs = 0
        self._nearest = Nearest()

    # Lookups

    def find(
        self,
        request: RequestT,
        tokens: Any,
        have: int = 0,
        *,
        fresh: float = HIT_SECONDS,
        wait: bool = False,
        wait_seconds: float | None = None,
        ends: bool = True,
    ) -> Hit | Loading | None:
        """Look up which of these tokens the server has beyond the first `have`, which the engine has. None is a miss.

        A hit is stored in the request and returned again for `fresh` seconds; a miss for `MISS_SECONDS`. wait: return when tiers
        have loaded or `wait_seconds` (None: the deadline of a call) have passed, and never return `Loading`. ends: whether the
        prompt ends with these tokens.
        """
        session, now = self.session, self.runtime.now()
        if session is None or not (request.cacheable and (request.may_load or not self._loads)):
            return None
        age = now - request.asked_at
        same = len(tokens) == request.asked_tokens and request.epoch == session.epoch
        if request.hit is not None:
            if same and age < fresh and request.asked_from <= have:
                return request.hit
            self.give_back(request)
        elif same and age < MISS_SECONDS:
            return None
        elif request.wait is not None and same and now < request.wait.asks_at and not wait:
            return request.wait.answer
        chain, tail = self.chain(request), b""
        found: Hit | Loading | None = None
        if chain is not None:
            chain.extend(tokens)
            tail = self._tail(request, chain, tokens, len(tokens))
        stores_tail = bool(tail) and self._stores_tail(request)
        if chain is not None and (len(chain) or tail):
            ask: Callable[..., Hit | Loading | None] = (
                partial(session.lookup, wait_seconds=wait_seconds) if wait else session.poll
            )
            # The engine computes at least the last token, for which a window reaches one token less far back than the hit's end.
            most = (len(tokens) - ends) // chain.chunk_tokens if self._reaching else None
            named = {
                "tail": tail,
                "request_id": str(request.id),
                "chunks": most,
                "engine": self._name if self._stores else "",
                "again": same,
                "stores_tail": stores_tail,
                "tokens": len(tokens),
                "trace": request.trace,
                "passage": bool(request.passage),
            }
            if not self._loads:
                ask = partial(session.poll, loads=False)
            found = ask(chain, have, self.prefill.tokens_per_second, any_split=True, **named)
        elif chain is not None and len(tokens) and not same and not request.passage:
            session.too_short(len(tokens), str(request.id))
        if isinstance(found, Loading):
            began = request.wait.began if request.wait is not None else now
            request.wait = Wait(began, found, now + min(MISS_SECONDS, WAIT_SHARE * (now - began)))
            request.promised, request.asked_tokens = 0, len(tokens)
            return found
        if chain is not None and not same and self._loads and not request.passage:
            missing = found.chunks if found is not None else have // chain.chunk_tokens
            position = self._nearest.missed(chain, tokens, missing) if missing < len(chain) else -1
            if position >= 0:
                session.differs(position, str(request.id))
        request.wait = None
        request.asked_last = (tail or chain.hashes[-HASH_BYTES:]) if chain is not None and not request.passage else b""
        request.promised = len(chain) + stores_tail if chain is not None and self._stores else 0
        if found is not None and chain is not None:
            request.stored = max(request.stored, min(found.chunks, len(chain)))
            request.tail = tail if found.chunks > len(chain) else request.tail
        request.hit, request.asked_at, request.asked_tokens = found, self.runtime.now(), len(tokens)
        request.asked_from = have - have % chain.chunk_tokens if chain is not None else 0
        return found

    def chain(self, request: RequestT) -> TokenChain | None:
        """Return the request's chain for the current server: a new one, with nothing stored, if the server has changed."""
        session = self.session
        if session is None or not request.cacheable:
            return None
        if request.chain is None or request.epoch != session.epoch:
            request.epoch, request.stored, request.tail = session.epoch, 0, b""
            generation = f"\0reset {self._name} {self._generation}\0" if self._generation else ""
            request.chain = session.new_chain(
                *(generation + request.salt, *request.adapter, request.extras, request.passage), tenant_of(request.salt)
            )
        return request.chain

    def _stores_tail(self, request: RequestT) -> bool:
        return self._stores and not self._reaching and (self._save_tail or request.stores_tail)

    def _tail(self, request: RequestT, chain: TokenChain, tokens: Any, end: int) -> bytes:
        """Return the hash of the unfull chunk of a prompt that ends at `end`, b"" if it has none or its chunks are full."""
        leaves = 0 if self._save_tail else request.tail_leaves
        if leaves is None or self._reaching or not end % chain.chunk_tokens:
            return b""
        return chain.tail(tokens, end - leaves)

    def give_back(self, request: RequestT) -> None:
        """Release the request's hit without loading it. A later load needs another `find`."""
        hit, request.hit, request.asked_at, request.wait = request.hit, None, _NEVER, None
        if hit is not None:
            self.release(hit)

    def give_back_older(self, seconds: float) -> None:
        """Give back all hits that have waited for their load longer than `seconds`."""
        now = self.runtime.now()
        for request in self.open.values():
            if request.hit is not None and now - request.asked_at > seconds:
                self.give_back(request)

    def release(self, hit: Hit) -> None:
        """End the hit's lease. The caller ensures that nothing reads the hit's extents any more."""
        self._lessor.release(hit)
        self._hang_up_if_unused()

    # Loads and stores

    def load(self, request: RequestT, start: int, end: int, total: int = 0) -> LoadPlan:
        """Plan to load tokens [start, end) of the request's hit. The lease holds until `loaded` was called for all ranks. The
        plan's blocks may be filled in later. total: tokens of the request, for the log."""
        assert request.hit is not None and request.chain is not None
        job, size, hit = self._job("load"), request.chain.chunk_tokens, request.hit
        plans = [
            LoadPlan(*(job, request.id, part, size), max(start, group.needed_from(end)), end, list(blocks), total)
            for group, part, blocks in zip(
                self._groups, (hit, *hit.others), request.all_tables(len(self._groups)), strict=True
            )
        ]
        plan = replace(plans[0], others=plans[1:]) if len(plans) > 1 else plans[0]
        request.hit = None
        self.loading[plan.job_id], self._left[plan.job_id] = plan, self._ranks
        return plan

    def loaded(self, job_id: str, ranks: int = 0) -> None:
        """Record that `ranks` ranks (0: all) have ended this load, with success or without."""
        left = self._left.get(job_id, 0) - (ranks or self._ranks)
        if left > 0:
            self._left[job_id] = left
            return
        self._left.pop(job_id, None)
        plan = self.loading.pop(job_id, None)
        if plan is not None:
            self.release(plan.hit)

    def store(
        self,
        request: RequestT,
        tokens: Any,
        computed: int,
        *,
        first_token: int = 0,
        ends: bool = False,
        before: int = 0,
    ) -> StorePlan | None:
        """Plan to store the chunks that the first `computed` of these tokens fill, and that were not stored before.

        first_token: tokens before it are not available for storing. ends: the prompt ends at `computed`, so an unfull chunk is
        its tail. before: tokens computed before this step. A group with a reach still has only the tokens in reach of these, so
        its chunks that ended earlier are not stored. Return None if there is nothing to store, or the blocks of the tokens are
        not known.
        """
        session, chain = self.session, request.chain
        if session is None or not request.cacheable:
            return None
        ends = ends and self._stores_tail(request)
        if chain is not None and request.epoch == session.epoch:  # called at every step, mostly with nothing to store
            size = chain.chunk_tokens
            if computed // size <= request.stored and (request.tail or not (ends and computed % size)):
                return None
        chain = self.chain(request) if session.chunk_tokens is not None else None
        if chain is None:
            return None
        size = chain.chunk_tokens
        first, chunks = max(request.stored, -(-first_token // size)), computed // size
        chain.extend(tokens)
        tail = self._tail(request, chain, tokens, computed) if ends and not request.tail else b""
        end = computed - (0 if self._save_tail else request.tail_leaves or 0) if tail else chunks * size
        if end <= first * size:
            return None
        job, plans = self._job("store"), []
        for group, blocks in zip(self._groups, request.all_tables(len(self._groups)), strict=True):
            needed = -(-end // group.block_tokens) if group.block_tokens else 0
            if needed > len(blocks):
                return None
            # Where `before` is a boundary, what is in reach of it is still there. With asynchronous scheduling a chunk that ends
            # in an answer is stored only then, one step late, because its last token is not known earlier.
            last = before - (group.needed_from(before) < before)
            begin = min(max(first, last // size), chunks) if group.reach_tokens else first
            if group.only_last:  # the first chunk of which all that is stored is in reach
                begin = max(begin, -(-(computed - group.reach_tokens + min(size, group.reach_tokens)) // size) - 1)
            hashes = chain.hashes[begin * HASH_BYTES : chunks * HASH_BYTES] + tail
            plans.append(
                StorePlan(
                    *(job, request.id, size, chain.parent(begin), hashes, begin, blocks[:needed]),
                    end_token=end if tail else 0,
                )
            )
        plan = replace(plans[0], others=plans[1:]) if len(plans) > 1 else plans[0]
        request.stored, request.tail = chunks, tail or request.tail
        request.jobs[plan.job_id], self.storing[plan.job_id] = self._ranks, request
        return plan

    def stored(self, job_id: str, ranks: int = 0) -> None:
        """Record that `ranks` ranks (0: all) have ended this store, with success or without."""
        request = self.storing.get(job_id)
        if request is None:
            return
        request.jobs[job_id] -= ranks or self._ranks
        if request.jobs[job_id] <= 0:
            del request.jobs[job_id], self.storing[job_id]
            if request.promised and not request.jobs and request.id not in self.open and self.session is not None:
                request.promised = 0  # a rank may have failed to store what was promised
                self.session.withdraw(str(request.id))

    def _job(self, kind: str) -> str:
        self._jobs += 1
        return f"{kind}-{self._jobs}"

    # Ends

    def finish(self, request_id: Hashable, computed: int = 0) -> RequestT | None:
        """End a request; its stores may still run. computed: tokens that could have been stored."""
        request = self.open.pop(request_id, None)
        if request is not None:
            self._withdraw(request)
            self.give_back(request)
            if request.cacheable and request.chain is None:
                self.forgone(computed)
            if request.asked_last and computed > request.asked_tokens and self.session is not None:
                self.session.answered(request.asked_last, computed - request.asked_tokens)
        return request

    def _withdraw(self, request: RequestT) -> None:
        """Tell the server if the request waits no longer, or stores no more of what it has announced: ranks may have failed to
        store it. What running stores bring is still promised, so that whoever asks for it now waits for them."""
        less = request.promised > request.stored + bool(request.tail)
        ended = request.promised > 0 and not request.jobs
        if (request.wait is not None or less or ended) and self.session is not None:
            self.session.withdraw(str(request.id))
        if less or ended:
            request.promised = 0

    def stores_no_more(self, request: RequestT) -> None:
        """Tell the server that the request stores less than it has announced, so that nobody waits for the rest."""
        if request.promised and self.session is not None:
            self.session.withdraw(str(request.id))
        request.promised = 0

    def forgone(self, tokens: int) -> None:
        """Count tokens of a prompt that were computed but could be neither looked up nor stored, for want of a server."""
        if self.session is not None:
            self.session.forgone(tokens)

    def reset(self, emptied: int | None = None) -> None:
        """Serve none of the KV stored so far to this engine again, since its weights may have changed. Other engines keep theirs.

        emptied: how often the engine's own cache had been `emptied` when the last KV of the old weights was computed; None for
        now, -1 if the engine holds no such KV.
        """
        self._emptied_before = max(self._emptied_before, self.emptied if emptied is None else emptied)
        self.resets += 1
        self._generation_before, self._generation = self._generation, self.resets
        for request in self.open.values():
            request.cacheable = False  # a part of its KV may be of the old weights, so it must not be stored
            self._withdraw(request)
            self.give_back(request)

    def own_cache_emptied(self) -> None:
        """Record that the engine's own cache is empty: KV computed from now on does not depend on its former contents."""
        self.emptied += 1

    @property
    def own_cache_outdated(self) -> bool:
        """Whether the engine's own cache may hold KV from before a reset: then KV computed from it is outdated too."""
        return self.emptied <= self._emptied_before

    def undo_reset(self) -> None:
        """Undo the last reset: the weights are again those of before it."""
        self._generation = self._generation_before

    def stop(self, reason: str) -> None:
        """Serve this engine no more, for `reason`: from now on it runs without a cache."""
        if self.session is not None:
            logger.warning("LMCache serves nothing for this engine: %s", reason)
            for request in self.open.values():
                self.give_back(request)
            self.session = None
            self._hang_up_if_unused()

    def close(self) -> None:
        self.session = None
        self._lessor.close()

    def _hang_up_if_unused(self) -> None:
        """After `stop`, close the session once no load runs: ranks that can be served may still load what is leased."""
        if self.session is None and not self.loading:
            self._lessor.close()
