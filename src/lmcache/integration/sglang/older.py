"""What the two connectors for the radix cache of SGLang before 0.5.20 have in common (`multi_process_adapter`, `sglang_adapter`).

SGLang passes complete sequences of tokens: a prompt to look up and load, and the tokens of a finished request. Loads and
stores end within the call, since SGLang does not say when it overwrites slots. Its lookups do not tell a request's `extra_key`,
so KV of requests with such a key is never stored, and engines with LoRA adapters are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache.engine.agreement import Agreement
from lmcache.engine.points import WholeDevice
from lmcache.engine.served import kv_dtype
from lmcache.engine.settings import ServerSettings
from lmcache.errors import LayoutError
from lmcache.integration.sglang.model import DTYPES, Buffers, Ranks, lora_enabled
from lmcache.integration.sglang.ranks import Tokens, Tracker, block_table, open_rank


@dataclass
class LoadMetadata:
    """What SGLang asks for. token_ids: the prompt. slot_mapping [tokens]: each token's slot, -1 for tokens in the radix tree.
    offset: the number of tokens in the radix tree, rounded down to a multiple of `chunk_size()`; the answer counts from there."""

    token_ids: Any
    slot_mapping: Any
    offset: int
    prefix_pad: int = 0
    request_id: str = ""


@dataclass
class StoreMetadata:
    """What SGLang passes of a finished request: its tokens and their slots [tokens], from token `offset` on, which is 0."""

    last_node: Any
    token_ids: Any
    kv_indices: Any
    offset: int
    request_id: str = ""


class OlderConnector:
    """The base class of both connectors. No method raises except the constructor.

    Raises:
        ConfigError: a setting cannot be used. After any other failure SGLang runs without LMCache, and one log line says why.
    """

    def __init__(
        self,
        settings: ServerSettings,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Any,
        v_pool: Any,
        tp_group: Any = None,
        page_size: int = 1,
    ) -> None:
        self._page_size = page_size
        ranks = Ranks(tp_size, rank)
        self._agreement = Agreement((tp_group, tp_size), device=str(k_pool[0].device))

        def buffers() -> list[Buffers]:
            if lora_enabled():
                raise LayoutError("this release of SGLang does not tell whose KV a LoRA adapter's is; 0.5.23 does")
            return [Buffers(tuple(k_pool), tuple(v_pool), kv_dtype(k_pool[0].dtype, DTYPES))]

        self._rank = open_rank(
            settings, buffers, sgl_config, page_size, ranks, self._agreement, self._agreement.name("sglang")
        )

    def chunk_size(self) -> int:
        """Return the unit of loads in tokens: one page. LMCache cuts chunks itself, and they may have any size."""
        return self._page_size

    def store_kv(self, store: StoreMetadata) -> None:
        """Store the full chunks that the server does not have. Return when SGLang may reuse the slots."""
        rank = self._rank
        if (
            rank is None
            or rank.requests.own_cache_outdated
            or store.offset
            or getattr(getattr(store.last_node, "key", None), "extra_key", None)
        ):
            return
        if rank.scheduler.chunk_tokens is None:
            rank.requests.forgone(len(store.token_ids) if rank.kv.stores else 0)
        tokens, request = rank.text_of(store.token_ids), Tracker("")
        plan = rank.requests.store(request, tokens, len(tokens))
        if plan is not None:
            blocks, _ = block_table(store.kv_indices[: plan.end], self._page_size, 0)
            copy = rank.copies.store(plan, blocks, self._fence())
            rank.copies.settle([copy], rank.deadline_seconds)
            rank.log_stores([copy], len(store.token_ids), plan.end)

    def reset(self) -> None:
        """Record that SGLang has emptied its radix tree. LMCache's KV stays valid."""
        if self._rank is not None:
            self._rank.requests.own_cache_emptied()

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()
            self._rank = None

    def _find(self, token_ids: Any, have: int, request_id: str = "") -> Tracker | None:
        """Look up a prompt of which the radix tree has `have` tokens. Return the request; its `hit_tokens` are those in complete
        pages, from the start of the prompt on, that all ranks can load. Return None if these are no more than `have`."""
        rank = self._rank
        if rank is None:
            return None
        tokens, request = rank.text_of(token_ids), Tracker(request_id)
        rank.requests.open[request_id] = request
        rank.requests.find(request, tokens, have, wait=True)
        count = min(request.found_tokens, len(tokens)) // self._page_size * self._page_size
        request.hit_tokens = self._agreement.least(count)
        if request.hit_tokens > have:
            return request
        rank.requests.finish(request_id)
        return None

    def _fill(self, request: Tracker, have: int, load: LoadMetadata) -> int:
        """Fill the slots of the hit's tokens from token `have` on. Return how many tokens from `load.offset` on are there then, 0
        if they were not filled on all ranks."""
        rank, end, ok = self._rank, request.hit_tokens, False
        if rank is not None and request.hit is not None:
            blocks, _ = block_table(load.slot_mapping[have:end], self._page_size, have)
            plan = rank.requests.load(request, have, end, len(load.token_ids))
            ok = rank.copies.settle([rank.copies.load(plan, blocks, self._fence())], rank.deadline_seconds)
        if rank is not None:
            rank.requests.finish(request.id)
        return end - load.offset if self._agreement.least(int(ok)) else 0

    def _fence(self) -> WholeDevice | None:
        """Return an event after everything that SGLang has launched, since it does not name its stream; None on a CPU.
        The block table is filled by then, too."""
        device = self._rank.kv.paged.device if self._rank is not None else "cpu"
        return None if device == "cpu" else WholeDevice(device)


def tokens_had(slot_mapping: Any) -> int:
    """Return how many leading tokens have no slot of their own, because the radix tree has them."""
    host = slot_mapping.cpu() if hasattr(slot_mapping, "cpu") else slot_mapping
    slots: Tokens = np.asarray(host, dtype=np.int64)
    return int((slots < 0).sum())
