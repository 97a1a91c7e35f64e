"""`UnifiedLMCacheMPConnector`: the connector of the unified radix cache of SGLang 0.5.23.

The radix cache looks up a prompt when it arrives (`submit_lookup`, `poll_lookup`). It allocates slots of SGLang's KV pool for the
tokens that were found, and has them filled before the request is computed (`submit_load`, `prepare_load_on_stream`). After each
prefill and at the end of a request it passes the computed tokens (`submit_store`), and keeps their slots until the copy has
ended, which it learns from `ready_prefix_count`. All calls come from the scheduler's thread, on every rank in the same order.

Once `prepare_load_on_stream` has returned, SGLang computes with the slots, filled or not. So a load has ended by then, or it can
no longer fail and the forward waits for each of its layers (`layers.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache.engine import Loading
from lmcache.engine.agreement import Agreement
from lmcache.engine.jobs import Event
from lmcache.engine.points import Both, WholeDevice, stream_point
from lmcache.engine.requests import HIT_SECONDS
from lmcache.errors import LayoutError
from lmcache.integration.sglang.layers import LayerLoads, layer_loads
from lmcache.integration.sglang.model import Buffers, Ranks, lora_enabled, pool_groups
from lmcache.integration.sglang.ranks import Future, SGLangRank, Tokens, Tracker, open_rank
from lmcache.integration.sglang.settings import read_settings
from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

FRESH_SECONDS = 0.25
"""How long the answer of `submit_lookup` is valid; a request that waits longer is looked up again when its turn comes."""
LONG_CHUNKS = (
    "Chunks of %d tokens are longer than pages of %d: SGLang keeps the sliding window before a prompt's last complete page, and "
    "few prompts have a chunk's end there. Start the server with --chunk-size %d, or SGLang with the variable "
    "SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS=0"
)
COMING = -1
"""In place of a number of tokens: a tier is loading, so ask again. Less than any number, so all ranks wait for the slowest."""


@dataclass
class Lookup:
    """The lookup of one request.

    local_tokens: leading tokens that the radix tree has. tracker: None if LMCache serves nothing. lock_start: `start` of
    `free_lookup_locks`. mine: tokens that this rank can load, or `COMING`. began: time of the first question.
    """

    request_id: str
    local_tokens: int
    tracker: Tracker | None = None
    tokens: Tokens | Sequence[int] = ()
    lock_start: int = 0
    mine: int = 0
    began: float = 0.0


@dataclass
class LoadOperation:
    """One load. device_indices: the slots of the tokens from `local_hit_tokens` on. result: None until `complete_load`.
    progress: lets a forward wait for the load layer by layer; None if the load has to end before the forward."""

    request_id: str
    device_indices: Any
    local_hit_tokens: int
    future: Future
    result: bool | None = None
    progress: Progress | None = None


@dataclass
class StoreOperation:
    request_id: str
    future: Future = field(default_factory=Future)
    result: bool | None = None


class UnifiedLMCacheMPConnector:
    """The connector of one rank, under the name and with the arguments that SGLang expects.

    Raises:
        ConfigError: a setting cannot be used. After any other failure SGLang runs without LMCache, and one log line says why.
    """

    def __init__(
        self,
        *,
        config_file: str | None,
        model_config: Any,
        tp_size: int,
        tp_rank: int,
        tp_group: Any,
        pp_size: int,
        pp_rank: int,
        pp_group: Any,
        page_size: int,
        token_to_kv_pool_allocator: Any,
        req_to_token_pool: Any = None,
        tree_components: Sequence[Any] = (),
        mamba_component: Any = None,
        sliding_window_size: int | None = None,
        **others: Any,
    ) -> None:
        settings = read_settings(config_file)
        self.chunk_size = page_size
        """The unit of SGLang's calls in tokens. One page: LMCache cuts chunks itself, and they may have any size. Of a model with
        windows or states one chunk, once it is known: SGLang then passes prefixes for storing that end at a chunk's end."""
        self.operation_timeout = settings.deadline_seconds
        self._min_tokens = settings.config.min_retrieve_tokens
        self._page_size = page_size
        self._window = sliding_window_size or 0
        self._ranks = Ranks(tp_size, tp_rank, pp_size, pp_rank)
        self._agreement = Agreement((tp_group, tp_size), (pp_group, pp_size))
        self._name = self._agreement.name("sglang")
        self._swept = 0.0
        self._stream: Any = None
        self._lora = lora_enabled()
        self._layers: LayerLoads | None = None
        self._reaching = False
        """Whether the model has layers of which SGLang keeps only what is in reach."""

        self._pool: Any = None
        self._states_of = req_to_token_pool

        def buffers() -> list[Buffers]:
            self._pool = token_to_kv_pool_allocator.get_kvcache()
            groups = pool_groups(self._pool, page_size, self._window)
            _refuse_other_components(tree_components, groups)
            return groups

        self._rank: SGLangRank | None = open_rank(
            settings, buffers, model_config, page_size, self._ranks, self._agreement, self._name
        )
        if self._rank is None:
            return
        kv, alike = self._rank.kv, len(self._rank.groups) == 1
        # Forwards copy states before they read the first layer, and count the layers of a group in another way.
        wanted = settings.config.use_layerwise and alike
        self._layers = layer_loads(self._pool, kv.model.num_layers, len(kv.paged.planes), wanted)
        self._reaching = not alike
        size = self._rank.scheduler.chunk_tokens
        if size and size % page_size and page_size % size:
            logger.info("Chunks of %d tokens and pages of %d: hits end with the last complete page", size, page_size)
        if size and size > page_size and self._window and not alike:
            logger.warning(LONG_CHUNKS, size, page_size, page_size)

    # Lookup

    def build_cache_salt(self, cache_salt: str | None, extra_key: str | None) -> str:
        """Return what two requests must have in common, besides their tokens, to share KV."""
        parts = [cache_salt or "", extra_key or ""]
        if extra_key and self._lora:
            parts.append(self._name)  # the key may name a LoRA adapter, but does not identify its content
        return json.dumps(parts) if any(parts) else ""

    def submit_lookup(self, request_id: str, tokens: Any, *, local_hit_tokens: int, cache_salt: str) -> Lookup:
        """Look up a prompt, of which the radix tree has the first `local_hit_tokens` tokens. Tiers begin to load."""
        lookup, rank = Lookup(request_id, local_hit_tokens), self._rank
        if rank is not None:
            lookup.tokens = text = rank.text_of(tokens)
            size = rank.scheduler.chunk_tokens
            if size and self._page_size % size == 0:  # what follows the last complete page is neither loaded nor stored
                lookup.tokens = text[: len(text) // self._page_size * self._page_size]
            lookup.tracker, lookup.began = (
                self._tracker(rank, request_id, text, cache_salt),
                rank.requests.runtime.now(),
            )
            rank.requests.give_back(lookup.tracker)
            self._ask(rank, lookup, lookup.tracker)
        return lookup

    def poll_lookup(self, lookup: Lookup) -> int | None:
        """Return how many leading tokens can be loaded, in complete pages, the same on every rank. None: ask again."""
        rank, tracker = self._rank, lookup.tracker
        if rank is not None and tracker is not None:
            self._ask(rank, lookup, tracker)
        if self._reaching:  # the ranks have to agree on what SGLang's collective calls depend on
            size = rank.scheduler.chunk_tokens if rank is not None else None
            self.chunk_size = self._agreement.least(size or self._page_size)
        found = self._agreement.least(lookup.mine)
        if found == COMING:
            return None
        found = found if found - lookup.local_tokens >= self._min_tokens else 0
        if rank is not None and tracker is not None:
            missed = found <= lookup.local_tokens
            if missed:
                rank.requests.give_back(tracker)
            tracker.hit_tokens = found
            tracker.prompt_tokens, tracker.computed = len(lookup.tokens) * missed, lookup.local_tokens
            tracker.since = rank.requests.runtime.now()
        return found

    def free_lookup_locks(self, request_id: str, *, start: int, end: int) -> None:
        """Note that tokens [start, end) of the hit will not be loaded. The lease ends when nothing of the hit is left to load."""
        tracker = self._rank.requests.open.get(request_id) if self._rank is not None else None
        if self._rank is not None and tracker is not None and end >= tracker.hit_tokens:
            self._rank.requests.give_back(tracker)

    # Load

    def device_indices_by_group(
        self, indices: Any, *, mamba_value: Any = None, mamba_transfer_tokens: int | None = None
    ) -> list[Any]:
        """Return for each group of layers the slots of the tokens whose slots of full attention are `indices`, or of the state
        that follows them, which SGLang calls `mamba_value`."""
        slots = []
        for one in self._rank.groups if self._rank is not None else ():
            if one.model.kind == "state":
                slots.append(self._states_of.translate_mamba_indices(mamba_value))
            else:
                slots.append(self._pool.translate_loc_from_full_to_swa(indices) if one.only_last else indices)
        return slots

    def submit_load(
        self,
        lookup: Lookup,
        indices: Sequence[Any],
        *,
        local_hit_tokens: int,
        owned_device_indices: Any,
        producer_stream: Any = None,
    ) -> LoadOperation:
        """Begin to fill the slots with the tokens that follow the first `local_hit_tokens`. indices: as
        `device_indices_by_group` has returned them."""
        self._stream = producer_stream
        start, end = local_hit_tokens, local_hit_tokens + len(owned_device_indices)
        future, progress = Future(), Progress() if self._layers is not None else None
        rank, tracker = self._rank, lookup.tracker
        if rank is not None and tracker is not None:
            # A hit that had waited too long was given back, and the radix tree may have evicted some of its own tokens since.
            rank.requests.find(tracker, lookup.tokens, start, ends=False)
            most = tracker.found_tokens
            if self._reaching and end < most:  # another rank has found less, for which other extents are in reach
                rank.requests.find(tracker, lookup.tokens[:end], start, ends=False)
                most = tracker.found_tokens
            if start < end <= most:
                (blocks, *others), filled = rank.tables(indices, self._page_size, start, end)
                plan = rank.requests.load(tracker, start, end, len(lookup.tokens))
                copy = rank.copies.load(plan, blocks, self._device_event(rank, filled), progress, others)
                future = Future(rank.copies, copy)
        return LoadOperation(lookup.request_id, owned_device_indices, start, future, progress=progress)

    def prepare_load_on_stream(self, load: LoadOperation, stream: Any) -> bool:
        """Return True when the slots are filled, or when the load can no longer fail and the forward waits for its layers.
        False: the load has failed on a rank, so SGLang frees the slots and computes these tokens."""
        rank = self._rank
        ok = rank is not None and rank.settle(load.future, load.progress)
        ok = bool(self._agreement.least(int(ok)))
        if rank is not None and not ok:
            rank.settle(load.future)  # another rank's load has failed, so SGLang frees the slots
        if ok and self._layers is not None and load.progress is not None and not load.future.ended():
            self._layers.begin(load.progress)
        return ok

    def complete_load(self, load: LoadOperation, synchronize: bool = True) -> bool:
        """Note that the load's slots belong to the request now. SGLang does not call this for failed loads."""
        load.result = load.future.ended() and load.future.ok
        return load.result

    # Store

    def get_store_start(self, request_id: str, length: int) -> int:
        """Return how many of the request's first `length` tokens need not be passed to `submit_store`, in complete pages."""
        rank, stored = self._rank, 0
        tracker = rank.requests.open.get(request_id) if rank is not None else None
        if rank is not None and tracker is not None and tracker.chain and tracker.epoch == rank.scheduler.epoch:
            stored = tracker.stored * tracker.chain.chunk_tokens // self._page_size * self._page_size
        return self._agreement.least(min(stored, length))

    def submit_store(
        self, request_id: str, tokens: Any, indices: Sequence[Any], *, device_indices_start: int, cache_salt: str
    ) -> StoreOperation | None:
        """Store the full chunks of these tokens. indices: as `device_indices_by_group` has returned them for the tokens from
        `device_indices_start` on."""
        rank = self._rank
        if rank is None:
            return None
        if rank.requests.own_cache_outdated:  # an update of weights need not empty the radix tree
            return StoreOperation(request_id)
        text = rank.text_of(tokens)
        if self._reaching and len(text) < len(tokens):  # windows and states are those behind an image
            return StoreOperation(request_id)
        tracker = self._tracker(rank, request_id, text, cache_salt)
        tracker.handed = len(text)
        self._note_pace(rank, tracker)
        plan = rank.requests.store(tracker, text, len(text), first_token=device_indices_start)
        if plan is None:
            return StoreOperation(request_id)
        (blocks, *others), filled = rank.tables(indices, self._page_size, device_indices_start, len(tokens))
        copy = rank.copies.store(plan, blocks, self._device_event(rank, filled), others)
        tracker.copies.append(copy)
        return StoreOperation(request_id, Future(rank.copies, copy))

    def complete_store(self, operation: StoreOperation, synchronize: bool = True) -> bool:
        """Return whether the store has succeeded. SGLang may free the slots after this call."""
        operation.result = operation.future.ended() and operation.future.ok
        return operation.result

    def ready_prefix_count(self, operations: Sequence[LoadOperation | StoreOperation]) -> int:
        """Return how many leading operations have ended on every rank. SGLang asks at every step of its scheduler."""
        rank = self._rank
        if rank is not None:
            rank.copies.collect()
            now = rank.requests.runtime.now()
            if now - self._swept >= 1.0:
                self._swept = now
                rank.requests.give_back_older(HIT_SECONDS)
        if not operations:
            return 0
        count = 0
        while count < len(operations) and operations[count].future.ended():
            count += 1
        return self._agreement.least(count)

    # Requests, and all others

    def parallel_all_reduce(self, tensor: Any, operation: Any) -> None:
        """All-reduce a CPU tensor over the ranks of this engine, in place."""
        self._agreement.reduce(tensor, operation)

    def finish_request(self, request_id: str) -> None:
        """Note that the request and its stores have ended."""
        rank = self._rank
        tracker = rank.requests.open.get(request_id) if rank is not None else None
        if rank is not None and tracker is not None:
            rank.requests.finish(request_id, tracker.handed if rank.kv.stores else 0)
            chunked = len(tracker.chain) * tracker.chain.chunk_tokens if tracker.chain is not None else 0
            rank.log_stores(tracker.copies, len(tracker.tokens), chunked, f" (request {request_id})")

    def end_all_sessions(self) -> None:
        """Note that SGLang's radix tree has been emptied and no request runs."""
        if self._rank is not None:
            self._rank.requests.own_cache_emptied()
            for request_id in list(self._rank.requests.open):
                self.finish_request(str(request_id))

    def clear(self) -> bool:
        """Empty the server, for all its engines: SGLang's `/hicache/storage-backend/clear`."""
        if self._rank is None:
            return False
        for tracker in self._rank.requests.open.values():
            tracker.epoch = None  # the server no longer has anything of it
        return self._rank.scheduler.clear()

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()
            self._rank = None

    # For models with sliding windows or Mamba layers

    def aligned_swa_window_size(self) -> int:
        """Return the sliding window in tokens, rounded up to complete pages; 0 for a model without one."""
        return -(-self._window // self._page_size) * self._page_size

    def reset_mamba_checkpoint_metadata(self, slots: Any) -> None:
        """Do nothing: models whose states have metadata are refused."""

    # Internal

    def _tracker(self, rank: SGLangRank, request_id: str, tokens: Tokens, salt: str) -> Tracker:
        """Return the request's tracker; a new one if the request's text or salt has changed."""
        former = rank.requests.open.get(request_id)
        shared = min(len(tokens), len(former.tokens)) if former is not None else 0
        if former is not None and former.salt == salt and np.array_equal(tokens[:shared], former.tokens[:shared]):
            if len(tokens) > shared:
                former.tokens = tokens
            return former
        fresh = rank.requests.open[request_id] = Tracker(request_id, salt, tokens=tokens)
        if former is not None:
            fresh.cacheable = former.cacheable
            rank.requests.give_back(former)
        return fresh

    def _ask(self, rank: SGLangRank, lookup: Lookup, tracker: Tracker) -> None:
        """Look up, and set `lookup.mine`: the tokens found, in complete pages, or `COMING` while a tier loads more."""
        # SGLang leaves the prompt's last token out: it computes that one in any case.
        asked = tracker, lookup.tokens, lookup.local_tokens
        found = rank.requests.find(*asked, fresh=FRESH_SECONDS, ends=False)
        if isinstance(found, Loading):
            if rank.requests.runtime.now() - lookup.began < self.operation_timeout:
                lookup.mine = COMING
                return
            rank.requests.find(*asked, wait=True, wait_seconds=0.0, ends=False)  # what is there by now
        lookup.mine = min(tracker.found_tokens, len(lookup.tokens)) // self._page_size * self._page_size

    def _note_pace(self, rank: SGLangRank, tracker: Tracker) -> None:
        """Note that SGLang has computed the tokens that it passed, and how long that took, waits in its queue included."""
        tokens, now = min(tracker.handed, tracker.prompt_tokens), rank.requests.runtime.now()
        rank.requests.prefill.took(tokens - tracker.computed, now - tracker.since)
        tracker.computed, tracker.since = max(tokens, tracker.computed), now

    def _device_event(self, rank: SGLangRank, also: Event | None) -> Event | None:
        """Return the event after all that SGLang has launched so far, and after `also`; None on a CPU."""
        device = rank.kv.paged.device
        if self._stream is None and device != "cpu":
            return WholeDevice(device)
        recorded: Event | None = stream_point(device, self._stream)
        return recorded if also is None or recorded is None else Both(recorded, also)


def _refuse_other_components(components: Sequence[Any], groups: Sequence[Buffers]) -> None:
    """Raise LayoutError if the radix tree holds anything but the KV of these groups."""
    names = [str(getattr(one, "name", one)).rpartition(".")[2].lower() for one in components]
    known = dict.fromkeys("mamba" if one.state else "swa" if one.reach_tokens else "full" for one in groups)
    if names != list(known):
        raise LayoutError(f"SGLang's radix tree keeps {', '.join(names)}, its pools hold {', '.join(known)}")
