"""`UnifiedLMCacheMPConnector`: what the unified radix cache of SGLang 0.5.23 asks of LMCache.

The radix cache looks up a prompt when it arrives (`submit_lookup`, `poll_lookup`), takes slots of its own for what was found
and has them filled before the request is computed (`submit_load`, `prepare_load_on_stream`); after each prefill and at the
end it hands over what has been computed (`submit_store`), and holds those slots until the copy has ended. It unlocks and frees by
what `ready_prefix_count` says. All calls come from the scheduler's thread, on every rank in the same order.

Once `prepare_load_on_stream` has returned, SGLang computes with the slots, filled or not. So a load has ended by then, or cannot
fail any more and the forward waits for each of its layers (`layers.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache.chunks import TokenChain
from lmcache.engine import Hit, Loading
from lmcache.engine.jobs import Event
from lmcache.engine.prefill import PrefillRate
from lmcache.errors import LayoutError
from lmcache.integration.sglang.describe import describe_agreed
from lmcache.integration.sglang.layers import LayerLoads, layer_loads
from lmcache.integration.sglang.model import Buffers, Ranks, lora_enabled, pool_buffers
from lmcache.integration.sglang.ranks import (
    Agreement,
    Both,
    Copy,
    SGLangRank,
    Tokens,
    WholeDevice,
    block_table,
    cost,
    no_copy,
    stored_line,
    text_of,
)
from lmcache.integration.sglang.settings import read_settings
from lmcache.integration.sglang.weights import RadixTree, forget, on_new_weights
from lmcache.observability.log import init_logger
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

FRESH_SECONDS = 0.25
"""What `submit_lookup` was told is good for so long; a request that waits longer asks again when its turn comes."""
HIT_SECONDS = 5.0
"""A hit that waits longer than this for its load is given back: its lease keeps others out. The load then asks again."""
COMING = -1
"""In place of a number of tokens: a tier loads, ask again. Less than any number, so that all ranks wait for the slowest."""


@dataclass
class Lookup:
    """One request's question. lock_start: where the locks of SGLang's terms begin. mine: tokens that this rank can load, or
    `COMING`; hit_tokens: that all can."""

    request_id: str
    tokens: Tokens
    salt: str
    local_tokens: int
    lock_start: int = 0
    hit: Hit | None = None
    mine: int = 0
    hit_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    asked_at: float = 0.0


@dataclass
class LoadOperation:
    """device_indices: the slots to be filled, the token after `local_hit_tokens` first. result: None until it is complete.
    progress: where a forward can wait for it layer by layer."""

    request_id: str
    device_indices: Any
    local_hit_tokens: int
    future: Copy
    result: bool | None = None
    progress: Progress | None = None
    told: bool = False


@dataclass
class StoreOperation:
    request_id: str
    future: Copy
    result: bool | None = None


@dataclass
class Tracker:
    """What we know of a request. stored: chunks that the server has or was sent. copies: its stores, for the log. prompt_tokens,
    computed, since: its prompt, where nothing of it is loaded; of that, what is there; the rest is being computed since then."""

    tokens: Tokens
    salt: str
    epoch: bytes
    chain: TokenChain
    stored: int = 0
    copies: list[Copy] = field(default_factory=list)
    prompt_tokens: int = 0
    computed: int = 0
    since: float = 0.0


class UnifiedLMCacheMPConnector:
    """One rank's connector, at the name and with the arguments that SGLang has for it.

    Raises:
        ConfigError: a setting cannot be used. Whatever else is wrong, SGLang runs on without LMCache, and one line says why.
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
        tree_components: Sequence[Any] = (),
        mamba_component: Any = None,
        sliding_window_size: int | None = None,
        **others: Any,
    ) -> None:
        settings = read_settings(config_file)
        self.chunk_size = page_size
        """The steps in which SGLang hands over tokens: whole pages. Chunks are cut by us, and may have any size."""
        self.operation_timeout = settings.config.blocking_timeout_secs
        self._min_tokens = settings.config.min_retrieve_tokens
        self._page_size = page_size
        self._window = sliding_window_size or 0
        self._ranks = Ranks(tp_size, tp_rank, pp_size, pp_rank)
        self._agreement = Agreement((tp_group, tp_size), (pp_group, pp_size))
        self._trackers: dict[str, Tracker] = {}
        self._lookups: dict[str, Lookup] = {}
        self._name = self._agreement.name()
        self._generation = 0
        self._tree = RadixTree()
        self._stale: set[str] = set()
        """Requests of which something was computed with other weights than now."""
        self._forgone: dict[str, int] = {}
        """Tokens of requests that could not be stored, since no server was ever reached."""
        self._swept = 0.0
        self._stream: Any = None
        self._lora = lora_enabled()
        self._rank: SGLangRank | None = None
        self._layers: LayerLoads | None = None
        self._prefill = PrefillRate()
        self._vocabulary = 0

        def buffers() -> Buffers:
            _refuse_components(tree_components, mamba_component, self._window)
            return pool_buffers(token_to_kv_pool_allocator.get_kvcache())

        kv = describe_agreed(
            buffers,
            model_config,
            page_size,
            self._ranks,
            self._agreement,
            model_id=settings.model_id,
            engine_id=self._name,
        )
        if kv is None:
            return
        self._vocabulary = kv.vocabulary
        self._layers = layer_loads(
            token_to_kv_pool_allocator.get_kvcache(),
            kv.model.num_layers,
            len(kv.paged.planes),
            settings.config.use_layerwise,
        )
        self._rank = SGLangRank(settings, kv, self._ranks, self._name)
        self._report_chunks()
        on_new_weights(self._new_weights)

    # Lookup

    def build_cache_salt(self, cache_salt: str | None, extra_key: str | None) -> str:
        """Whatever, besides the tokens, one request's KV must have in common with another's."""
        parts = [cache_salt or "", extra_key or ""]
        if extra_key and self._lora:
            parts.append(self._name)  # the key may name an adapter, but not what is in it
        if self._generation:
            parts += [self._name, str(self._generation)]
        return json.dumps(parts) if any(parts) else ""

    def submit_lookup(self, request_id: str, tokens: Any, *, local_hit_tokens: int, cache_salt: str) -> Lookup:
        """Ask what there is of a prompt; `local_hit_tokens` are in the radix tree already. Tiers begin to load."""
        lookup = Lookup(request_id, text_of(tokens, self._vocabulary), cache_salt, local_hit_tokens)
        former = self._lookups.pop(request_id, None)
        if former is not None:
            self._give_back(former)
        self._lookups[request_id] = lookup
        self._ask(lookup)
        return lookup

    def poll_lookup(self, lookup: Lookup) -> int | None:
        """Tokens from the prompt's start that can be loaded, whole pages of them, the same on every rank. None: ask again."""
        if lookup.mine == COMING or time.monotonic() - lookup.asked_at > FRESH_SECONDS:
            self._give_back(lookup)
            self._ask(lookup)
        found = self._agreement.least(lookup.mine)
        if found == COMING:
            return None
        if found - lookup.local_tokens < self._min_tokens:
            found = 0
        lookup.hit_tokens = found
        if found <= lookup.local_tokens:
            self._give_back(lookup)
        tracker = self._trackers.get(lookup.request_id)
        if tracker is not None:
            tracker.stored = max(tracker.stored, found // tracker.chain.chunk_tokens)
            missed = found <= lookup.local_tokens  # else what comes next is a load as well
            tracker.prompt_tokens, tracker.computed = len(lookup.tokens) * missed, lookup.local_tokens
            tracker.since = time.monotonic()
        return found

    def free_lookup_locks(self, request_id: str, *, start: int, end: int) -> None:
        """Tokens [start, end) of the hit will not be loaded. Our lease is one thing: it goes when nothing is left to load."""
        lookup = self._lookups.get(request_id)
        if lookup is not None and end >= lookup.hit_tokens:
            self._give_back(lookup)

    # Load

    def device_indices_by_group(
        self, indices: Any, *, mamba_value: Any = None, mamba_transfer_tokens: int | None = None
    ) -> Any:
        """There is one group of layers."""
        return indices

    def submit_load(
        self,
        lookup: Lookup,
        indices: Any,
        *,
        local_hit_tokens: int,
        owned_device_indices: Any,
        producer_stream: Any = None,
    ) -> LoadOperation:
        """Begin to fill the slots with the tokens that follow the first `local_hit_tokens`."""
        self._stream = producer_stream
        start, end = local_hit_tokens, local_hit_tokens + len(indices)
        rank, hit = self._rank, self._valid_hit(lookup, start, end)
        copy, progress = no_copy(), Progress() if self._layers is not None else None
        if rank is not None and hit is not None:
            blocks, filled = block_table(indices, self._page_size, start)
            copy = rank.load(hit, start, end, blocks, self._device_event(filled), progress)
        return LoadOperation(lookup.request_id, owned_device_indices, start, copy, progress=progress)

    def prepare_load_on_stream(self, load: LoadOperation, stream: Any) -> bool:
        """Return when the slots are filled, or certainly will be while the forward waits for them, or will not be: then False,
        and SGLang computes these tokens."""
        rank = self._rank
        ok = rank is not None and load.future.tokens > 0 and rank.settle(load.future, load.progress)
        ok = bool(self._agreement.least(int(ok)))
        if ok and self._layers is not None and load.progress is not None and not load.future.ended():
            self._layers.begin(load.progress)
            return True
        if rank is not None and not ok:
            rank.settle(load.future)  # another rank's has failed: SGLang frees the slots
        self._end_load(load, ok)
        return ok

    def complete_load(self, load: LoadOperation, synchronize: bool = True) -> bool:
        """Its slots belong to the request now. Loads that did not work never come here."""
        load.result = load.future.ended() and load.future.ok
        self._end_load(load, load.result)
        return load.result

    # Store

    def get_store_start(self, request_id: str, length: int) -> int:
        """How many of the request's first `length` tokens need not be handed over again, in whole pages."""
        tracker = self._trackers.get(request_id)
        stored = 0
        if tracker is not None and self._rank is not None and tracker.epoch == self._rank.epoch:
            stored = tracker.stored * tracker.chain.chunk_tokens // self._page_size * self._page_size
        return self._agreement.least(min(stored, length))

    def submit_store(
        self, request_id: str, tokens: Any, indices: Any, *, device_indices_start: int, cache_salt: str
    ) -> StoreOperation | None:
        """Keep the full chunks of these tokens; `indices` are the slots of those from `device_indices_start` on."""
        rank = self._rank
        if rank is None:
            return None
        if request_id in self._stale or self._tree.outdated:
            return StoreOperation(request_id, no_copy())
        text = text_of(tokens, self._vocabulary)
        if rank.chunk_tokens is None:
            self._forgone[request_id] = len(text)
            return StoreOperation(request_id, no_copy())
        tracker = self._tracker(request_id, text, cache_salt)
        if tracker is None:
            return StoreOperation(request_id, no_copy())
        self._note_pace(tracker, len(text))
        size = tracker.chain.chunk_tokens
        chunks = tracker.chain.extend(text)
        first = max(tracker.stored, -(-device_indices_start // size))
        if chunks <= first:
            return StoreOperation(request_id, no_copy())
        blocks, filled = block_table(indices, self._page_size, device_indices_start)
        copy = rank.store(tracker.chain, first, chunks, blocks, self._device_event(filled))
        tracker.stored = chunks
        tracker.copies.append(copy)
        return StoreOperation(request_id, copy)

    def complete_store(self, operation: StoreOperation, synchronize: bool = True) -> bool:
        """SGLang lets go of the slots after this."""
        operation.result = operation.future.ended() and operation.future.ok
        return operation.result

    def ready_prefix_count(self, operations: Sequence[LoadOperation | StoreOperation]) -> int:
        """How many of the operations, from the first on, have ended on every rank. Asked at every step of the scheduler."""
        self._sweep()
        if not operations:
            return 0
        count = 0
        while count < len(operations) and operations[count].future.ended():
            count += 1
        return self._agreement.least(count)

    # Requests and the rest

    def parallel_all_reduce(self, tensor: Any, operation: Any) -> None:
        """All-reduce a CPU tensor over the ranks of this engine, in place."""
        self._agreement.reduce(tensor, operation)

    def finish_request(self, request_id: str) -> None:
        """The request has ended, and so have its stores."""
        self._done_with(request_id)
        self._stale.discard(request_id)
        forgone = self._forgone.pop(request_id, 0)
        if self._rank is not None:
            self._rank.forgone(forgone)
        tracker = self._trackers.pop(request_id, None)
        if tracker is not None:
            self._log_stores(request_id, tracker)

    def end_all_sessions(self) -> None:
        """SGLang's radix tree has been emptied, and no request runs."""
        self._tree.emptied()
        for request_id in [*self._lookups, *self._trackers, *self._stale, *self._forgone]:
            self.finish_request(request_id)

    def clear(self) -> bool:
        """Empty the server, for all its engines: SGLang's `/hicache/storage-backend/clear`."""
        self._trackers.clear()
        return self._rank is not None and self._rank.clear()

    def close(self) -> None:
        forget(self._new_weights)
        if self._rank is not None:
            self._rank.close()
            self._rank = None

    # What models with sliding windows or Mamba layers would need: they have no hits, so these are asked in vain

    def aligned_swa_window_size(self) -> int:
        """The sliding window in whole pages, 0 for a model without one."""
        return -(-self._window // self._page_size) * self._page_size

    def reset_mamba_checkpoint_metadata(self, slots: Any) -> None:
        """We keep no Mamba states, and so nothing about them."""

    # Within

    def _report_chunks(self) -> None:
        size = self._rank.chunk_tokens if self._rank is not None else None
        if size and size % self._page_size and self._page_size % size:
            logger.info(
                "Chunks of %d tokens and pages of %d: hits end with the last page that is whole", size, self._page_size
            )

    def _tracker(self, request_id: str, tokens: Tokens, salt: str) -> Tracker | None:
        """The request's tracker under the server of now, None while there is none; a fresh one if the text is another."""
        rank, tracker = self._rank, self._trackers.get(request_id)
        if rank is None:
            return None
        if tracker is not None and tracker.salt == salt and tracker.epoch == rank.epoch:
            shared = min(len(tokens), len(tracker.tokens))
            if np.array_equal(tokens[:shared], tracker.tokens[:shared]):
                if len(tokens) > shared:
                    tracker.tokens = tokens
                return tracker
        epoch, chain = rank.epoch, rank.new_chain(salt)
        if chain is None:
            return None
        self._trackers[request_id] = Tracker(tokens, salt, epoch, chain)
        return self._trackers[request_id]

    def _ask(self, lookup: Lookup) -> None:
        """Look up, and note how many whole pages' tokens there are, or that a tier brings more that is worth waiting for."""
        lookup.mine, lookup.asked_at = 0, time.monotonic()
        tracker = self._tracker(lookup.request_id, lookup.tokens, lookup.salt)
        if tracker is None or self._rank is None:
            return
        tracker.chain.extend(lookup.tokens)
        rate = self._prefill.tokens_per_second
        found = self._rank.poll(tracker.chain, lookup.local_tokens, lookup.request_id, rate)
        if isinstance(found, Loading):
            waited = lookup.asked_at - lookup.began
            lookup.mine = COMING if waited < self.operation_timeout else 0
        elif found is not None:
            lookup.hit = found
            tokens = min(found.chunks * tracker.chain.chunk_tokens, len(lookup.tokens))
            lookup.mine = tokens // self._page_size * self._page_size

    def _note_pace(self, tracker: Tracker, tokens: int) -> None:
        """The request's first so many tokens are there. It may have waited for its turn as well: then the pace seems slower,
        which counts little. Answers say nothing of prefill."""
        tokens, now = min(tokens, tracker.prompt_tokens), time.monotonic()
        self._prefill.took(tokens - tracker.computed, now - tracker.since)
        tracker.computed, tracker.since = max(tokens, tracker.computed), now

    def _valid_hit(self, lookup: Lookup, start: int, end: int) -> Hit | None:
        """The hit if it covers the tokens; asked for anew where it was given back, or the tree has lost some of its own."""
        if self._rank is None:
            return None
        size = self._rank.chunk_tokens or 1
        if lookup.hit is None or lookup.hit.first_chunk * size > start:
            self._give_back(lookup)
            lookup.local_tokens = start
            self._ask(lookup)
        hit = lookup.hit
        return hit if hit is not None and hit.first_chunk * size <= start < end <= hit.chunks * size else None

    def _give_back(self, lookup: Lookup) -> None:
        hit, lookup.hit = lookup.hit, None
        if hit is not None and self._rank is not None:
            self._rank.release(hit)

    def _sweep(self) -> None:
        """Give back hits that wait too long: their leases keep memory from others."""
        now = time.monotonic()
        if self._lookups and now - self._swept >= 1.0:
            self._swept = now
            for lookup in self._lookups.values():
                if lookup.hit is not None and now - lookup.asked_at > HIT_SECONDS:
                    self._give_back(lookup)

    def _done_with(self, request_id: str) -> None:
        """No load of the request will come any more."""
        lookup = self._lookups.pop(request_id, None)
        if lookup is not None:
            self._give_back(lookup)

    def _new_weights(self, kv_in_use: bool) -> None:
        """The KV of before is not served to this engine again, and that of the new weights to nobody else."""
        self._generation += 1
        self._tree.weights_change(kv_in_use)
        for lookup in self._lookups.values():
            lookup.tokens = lookup.tokens[:0]  # what was found is of the old weights
            self._give_back(lookup)
        self._stale |= set(self._trackers) | set(self._lookups)
        self._trackers.clear()
        logger.info("The weights of this engine change: what LMCache holds of it so far is not used any more")

    def _device_event(self, also: Event | None) -> Event | None:
        """The point behind which all that SGLang has launched so far is done, and `also`. None on a CPU."""
        if self._rank is None or self._rank.kv.paged.device == "cpu":
            return None
        import torch

        if self._stream is None:
            return WholeDevice(self._rank.kv.paged.device)
        event: Any = torch.cuda.Event(blocking=True)  # a waiting thread must not spin beside the engine's
        event.record(self._stream)
        recorded: Event = event
        return recorded if also is None else Both(recorded, also)

    def _end_load(self, load: LoadOperation, ok: bool) -> None:
        """Say what it did, once, and give back its lease."""
        lookup, done = self._lookups.get(load.request_id), load.future.done
        self._done_with(load.request_id)
        if load.told or not ok or self._rank is None or done is None:
            return
        load.told = True
        logger.info(
            "Retrieved %d out of %d required tokens (from %d total tokens). %s",
            load.future.tokens,
            load.future.tokens,
            len(lookup.tokens) if lookup is not None else load.local_hit_tokens + load.future.tokens,
            cost(load.future.tokens * self._rank.kv.token_bytes, done.seconds),
        )

    def _log_stores(self, request_id: str, tracker: Tracker) -> None:
        if self._rank is None:
            return
        done = [copy.done for copy in tracker.copies if copy.done is not None]
        chunked = len(tracker.chain) * tracker.chain.chunk_tokens
        line = stored_line(done, len(tracker.tokens), chunked, self._rank.kv.token_bytes)
        if line:
            logger.info("%s (request %s)", line, request_id)


def _refuse_components(components: Sequence[Any], mamba: Any, window: int) -> None:
    """Raises LayoutError: the radix tree keeps more than the KV of full attention."""
    names = [str(getattr(one, "name", one)).rpartition(".")[2].lower() for one in components]
    if mamba is not None or window or any(name != "full" for name in names):
        raise LayoutError(f"models with sliding windows or Mamba states are not supported yet ({', '.join(names)})")
