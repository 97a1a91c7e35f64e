"""Run in SGLang's environment: the connector over SGLang's own pools and allocators, for what its engine runs on GPUs only.

    python pools.py calls|tree windows|states CONFIG_FILE MODEL PAGE_SIZE CHUNK

`windows` has the pools of gpt-oss, `states` those of Qwen3-Next. With `calls` the script makes the calls of SGLang 0.5.23, with
`tree` SGLang's own `LMCacheUnifiedRadixCache` makes them. Prints one line of JSON on stdout: for each prefix, how much of it was
found, and whether its slots, and no others, were filled.
"""

from __future__ import annotations

import json
import sys
from array import array
from types import SimpleNamespace
from typing import Any

import torch
from tensors import model_config

from lmcache.integration.sglang.unified_lmcache_mp_connector import UnifiedLMCacheMPConnector

SLOTS, HEADS, DIMS, WINDOW = 4096, 2, 8, 127
TEXT = [(at * 37 + 11) % 900 + 1 for at in range(700)]
PLAIN = {"dtype": torch.float32, "head_num": HEADS, "head_dim": DIMS, "device": "cpu"}


class Windows:
    """A pool for layers of full attention, and one for those with windows."""

    components, more = ("FULL", "SWA"), {"sliding_window_size": WINDOW}

    def __init__(self, page_size: int) -> None:
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        self.pool = SWAKVPool(
            *(SLOTS, SLOTS // 2, page_size),
            **PLAIN,
            swa_attention_layer_ids=[0, 2],
            full_attention_layer_ids=[1, 3],
        )
        self.allocator = SWATokenToKVPoolAllocator(
            *(SLOTS, SLOTS // 2, page_size, torch.float32, "cpu", self.pool, False)
        )
        self.requests, self.reach = None, -(-WINDOW // page_size) * page_size

    @property
    def tensors(self) -> list[torch.Tensor]:
        pools = self.pool.full_kv_pool, self.pool.swa_kv_pool
        return [tensor for pool in pools for tensor in (*pool.k_buffer, *pool.v_buffer)]

    def allocate(self, tokens: int) -> tuple[torch.Tensor, None]:
        """As the radix cache does for a load: slots for windows at the end only."""
        slots, tail = self.allocator.full_attn_allocator.alloc(tokens), min(tokens, self.reach)
        self.allocator.set_full_to_swa_mapping(slots[-tail:], self.allocator.swa_attn_allocator.alloc(tail))
        return slots, None

    def rows(self, slots: torch.Tensor, state: None) -> list[torch.Tensor]:
        """Where each of the tensors has the KV of these tokens."""
        own = self.pool.translate_loc_from_full_to_swa(slots[-self.reach :])
        return [slots] * 4 + [own] * 4


class States:
    """A pool for a layer of full attention, and one for states of others."""

    components, more = ("FULL", "MAMBA"), {"mamba_component": object()}
    reach = 0

    def __init__(self, page_size: int) -> None:
        from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool

        split = {"tp_world_size": 1, "intermediate_size": 64, "n_groups": 2}
        sizes = {"num_heads": 4, "head_dim": 16, "state_size": 16, "conv_kernel": 4}
        self.requests = HybridReqToTokenPool(
            size=4,
            mamba_size=16,
            mamba_spec_state_size=0,
            max_context_len=SLOTS,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=Mamba2StateShape.create(**split, **sizes), layers=[0, 1, 2]),
            mamba_layer_ids=[0, 1, 2],
            enable_mamba_extra_buffer=True,
        )
        states = self.requests.mamba_pool
        self.pool = HybridLinearKVPool(
            *(SLOTS,), page_size=page_size, **PLAIN, full_attention_layer_ids=[3], mamba_pool=states
        )
        self.allocator = PagedTokenToKVPoolAllocator(SLOTS, page_size, torch.float32, "cpu", self.pool, False)

    @property
    def tensors(self) -> list[torch.Tensor]:
        plain, states = self.pool.full_kv_pool, self.requests.mamba_pool.mamba_cache
        layers = [layer for tensor in (*states.conv, states.temporal) for layer in tensor]
        return [*plain.k_buffer, *plain.v_buffer, *layers]

    def allocate(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.allocator.alloc(tokens), self.requests.mamba_allocator.alloc(1)

    def rows(self, slots: torch.Tensor, state: torch.Tensor) -> list[torch.Tensor]:
        return [slots] * 2 + [state] * 6


def calls(kind: str, config_file: str, model: str, page: str, chunk: str) -> list[tuple[int, bool]]:
    page_size, size = int(page), int(chunk)
    engine: Any = {"windows": Windows, "states": States}[kind](page_size)
    connector = UnifiedLMCacheMPConnector(
        config_file=config_file,
        model_config=SimpleNamespace(**vars(model_config(model)), num_key_value_heads=HEADS),
        tp_size=1,
        tp_rank=0,
        tp_group=None,
        pp_size=1,
        pp_rank=0,
        pp_group=None,
        page_size=page_size,
        token_to_kv_pool_allocator=engine.allocator,
        req_to_token_pool=engine.requests,
        tree_components=[SimpleNamespace(name=name) for name in engine.components],
        **engine.more,
    )
    noise = torch.Generator().manual_seed(1)
    for tensor in engine.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=noise))

    def load(name: str, tokens: list[int], have: torch.Tensor, before: torch.Tensor, state: Any) -> tuple[int, bool]:
        """Load what follows the slots `have`. before, state: where the text was computed."""
        lookup = connector.submit_lookup(name, tokens, local_hit_tokens=len(have), cache_salt="")
        found = connector.poll_lookup(lookup) or 0
        assert connector.chunk_size == size
        if found <= len(have):
            return found, True
        slots, own = engine.allocate(found - len(have))
        expected = [tensor.clone() for tensor in engine.tensors]
        wanted, source = engine.rows(slots, own), engine.rows(before[len(have) : found], state)
        for tensor, to, since in zip(expected, wanted, source, strict=True):
            tensor[to[-len(since) :]] = tensor[since[-len(to) :]]
        of_each = connector.device_indices_by_group(slots, mamba_value=own, mamba_transfer_tokens=found)
        operation = connector.submit_load(
            lookup, of_each, local_hit_tokens=len(have), owned_device_indices=slots, producer_stream=None
        )
        ok = connector.prepare_load_on_stream(operation, None)
        return found, ok and all(map(torch.equal, expected, engine.tensors))

    answers = []
    slots, state = engine.allocate(512)
    for length in (512, 512 + page_size):  # the second does not end at a chunk's end
        tokens = TEXT[:length]
        if length > 512:
            further, state_of_more = engine.allocate(page_size)
            path, after = torch.cat([slots, further]), state_of_more
        else:
            path, after = slots, state
        start = connector.get_store_start("a", length)
        operation = connector.submit_store(
            *("a", tokens, connector.device_indices_by_group(path[start:], mamba_value=after)),
            device_indices_start=start,
            cache_salt="",
        )
        assert operation is not None and operation.future.result(timeout=60) in (True, False)
    nothing = slots[:0]
    answers.append(load("b", TEXT, nothing, slots, state))
    answers.append(load("c", TEXT[:512], nothing, slots, state))
    answers.append(load("d", TEXT[: 512 - page_size], nothing, slots, state))
    answers.append(load("e", TEXT, slots[: 512 - size], slots, state))
    answers.append(load("f", TEXT, slots[: 256 - page_size], slots, state))
    connector.close()
    return answers


def tree(kind: str, config_file: str, model: str, page: str, chunk: str) -> list[tuple[int, bool]]:
    from sglang.srt.mem_cache.base_prefix_cache import (
        CacheRequestHandle,
        InitLoadBackParams,
        InsertParams,
        MatchPrefixParams,
    )
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.storage.lmcache.lmcache_unified_radix_cache import LMCacheUnifiedRadixCache
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    page_size = int(page)
    arguments = ServerArgs(model_path=model, device="cpu", page_size=page_size, attention_backend="torch_native")
    arguments.resolve_once()
    set_global_server_args_for_scheduler(arguments)
    engine: Any = {"windows": Windows, "states": States}[kind](page_size)
    requests = engine.requests or ReqToTokenPool(4, SLOTS, "cpu", False)
    params = CacheInitParams(
        *(False, requests, engine.allocator, page_size),
        enable_mamba_extra_buffer=True,
        sliding_window_size=engine.more.get("sliding_window_size"),
        tree_components=tuple(ComponentType[name] for name in engine.components),
    )
    cache = LMCacheUnifiedRadixCache(
        *(params,),
        model_config=model_config(model),
        tp_size=1,
        tp_rank=0,
        lmcache_config_file=config_file,
        forward_stream=None,
    )

    def key(count: int) -> Any:
        return RadixKey(array("q", TEXT[:count]), None)

    def ask(name: str) -> Any:
        """A request for the text; returns once its lookup has been answered."""
        names = dict.fromkeys(("extra_key", "cache_salt", "session", "session_id"))
        kv = SimpleNamespace(mamba_pool_idx=None, mamba_cow_src_index=None, mamba_needs_clear=True, holds_mamba=False)
        request = SimpleNamespace(**names, rid=name, kv=kv, cache_request_handle=CacheRequestHandle(name, 0))
        node = cache.match_prefix(MatchPrefixParams(key=key(0))).last_device_node
        cache.prefetch_from_storage(request.cache_request_handle, node, TEXT)
        while not cache.check_prefetch_progress(request.cache_request_handle):
            pass
        return request

    noise = torch.Generator().manual_seed(1)
    for tensor in engine.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=noise))
    ask("finds nothing, and learns the size of chunks")
    slots, state = engine.allocate(512)
    outside = {ComponentType.SWA: 512 - engine.reach} if engine.reach else {}
    cache.insert(InsertParams(key=key(512), value=slots, mamba_value=state, component_evicted_seqlens=outside))
    source = [tensor[rows].clone() for tensor, rows in zip(engine.tensors, engine.rows(slots, state), strict=True)]
    cache._submit_store(SimpleNamespace(rid="a", extra_key=None, cache_salt=None), array("q", TEXT[:512]))
    (pending,) = cache._pending_stores
    assert pending.operation.future.result(timeout=60)
    cache.check_hicache_events()
    cache.reset()
    for tensor in engine.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=noise))
    expected = [tensor.clone() for tensor in engine.tensors]
    request = ask("b")
    match = cache.match_prefix(MatchPrefixParams(key=key(len(TEXT)), req=request))
    cache.init_load_back(InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request))
    flow = cache._external_flows["b"]
    for tensor, rows, values in zip(
        expected, engine.rows(flow.load.device_indices, flow.mamba_value), source, strict=True
    ):
        tensor[rows] = values
    found = match.host_hit_length, all(map(torch.equal, expected, engine.tensors))
    cache.check_hicache_events()
    assert flow.load_completed and (flow.mamba_value is None or request.kv.mamba_cow_src_index is flow.mamba_value)
    cache.shutdown()
    return [found]


if __name__ == "__main__":
    print(json.dumps({"calls": calls, "tree": tree}[sys.argv[1]](*sys.argv[2:])))
