"""Run in SGLang's environment: the older connectors and the ranks' agreement, on PyTorch's own tensors and groups.

    python tensors.py layerwise CONFIG_FILE MODEL | multi_process CONFIG_FILE MODEL | agreement STORE RANK | fp8 DTYPE

The calls are those of `LMCRadixCache` in SGLang 0.5.10 and 0.5.17. Prints one line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

LAYERS, SLOTS, HEADS, DIMS, HAVE = 3, 512, 4, 8, 32
TEXT = [(at * 37 + 11) % 900 + 1 for at in range(135)]


def model_config(model: str) -> Any:
    return SimpleNamespace(
        model_path=model,
        hf_config={"a": 1},
        dtype=torch.bfloat16,
        quantization=None,
        vocab_size=1000,
        num_hidden_layers=LAYERS,
        get_total_num_kv_heads=lambda: HEADS,
    )


def pools() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """K and V of each layer, all different, and the slots of the text."""
    numbers = torch.arange(LAYERS * 2 * SLOTS * HEADS * DIMS, dtype=torch.float32) % 251
    whole = numbers.to(torch.bfloat16).view(LAYERS, 2, SLOTS, HEADS, DIMS).clone()
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))
    return [layer[0] for layer in whole], [layer[1] for layer in whole], slots


def same(pool: list[torch.Tensor], slots: torch.Tensor, others: torch.Tensor) -> bool:
    return all(torch.equal(layer[slots], layer[others]) for layer in pool)


def layerwise(config_file: str, model: str) -> dict[str, Any]:
    from lmcache.integration.sglang.sglang_adapter import LMCacheLayerwiseConnector, LoadMetadata, StoreMetadata

    os.environ["LMCACHE_CONFIG_FILE"] = config_file
    keys, values, slots = pools()
    connector = LMCacheLayerwiseConnector(
        sgl_config=model_config(model), tp_size=1, rank=0, k_pool=keys, v_pool=values, tp_group=None
    )
    connector.store_kv(StoreMetadata(last_node=None, token_ids=TEXT, kv_indices=slots[: len(TEXT)], offset=0))
    pad = HAVE % connector.chunk_size()
    fresh = slots[200 : 200 + len(TEXT) - HAVE]
    mapping = torch.cat([torch.full((HAVE,), -1, dtype=torch.int64), fresh])
    count = connector.start_load_kv(LoadMetadata(token_ids=TEXT, slot_mapping=mapping, offset=HAVE - pad)) - pad
    for layer in range(LAYERS):
        connector.load_kv_layerwise(layer)
    filled, source = fresh[:count], slots[HAVE : HAVE + count]
    connector.close()
    return {"loaded": count, "same": same(keys, filled, source) and same(values, filled, source)}


def multi_process(config_file: str, model: str) -> dict[str, Any]:
    from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
    from lmcache.integration.sglang.sglang_adapter import LoadMetadata, StoreMetadata
    from lmcache.integration.sglang.utils import lmcache_get_config

    found = lmcache_get_config(config_file)
    keys, values, slots = pools()
    connector = LMCacheMPConnector(
        page_size=1,
        host=found.mp_host,
        port=found.mp_port,
        sgl_config=model_config(model),
        tp_size=1,
        rank=0,
        k_pool=keys,
        v_pool=values,
        tp_group=None,
    )
    connector.store_kv(StoreMetadata(None, TEXT, slots[: len(TEXT)], 0, request_id="a"))
    connector.end_session("a")
    matched = connector.lookup_kv(TEXT, "b")
    fresh = slots[200 : 200 + matched - HAVE]
    mapping = torch.cat([torch.full((HAVE,), -1, dtype=torch.int64), fresh])
    count = connector.retrieve_kv(LoadMetadata(TEXT, mapping, offset=HAVE, prefix_pad=0, request_id="b"))
    connector.end_session("b")
    source = slots[HAVE : HAVE + count]
    connector.close()
    return {"loaded": count, "same": same(keys, fresh, source) and same(values, fresh, source)}


def agreement(store: str, rank: str) -> dict[str, Any]:
    from lmcache.engine.agreement import Agreement

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    together = Agreement((torch.distributed.group.WORLD, 2), (None, 1))
    answer = {"name": together.name("sglang"), "least": together.least(7 - int(rank))}
    torch.distributed.destroy_process_group()
    return answer


def fp8(name: str) -> dict[str, Any]:
    """Tokens that SGLang's own pool has quantized, copied to other slots."""
    import numpy as np
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import get_kv_cache_quant_method
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from lmcache.integration.sglang.model import paged_kv, pool_groups
    from lmcache.transfer.cpu import CpuCopier

    dtype, page = getattr(torch, name), 16
    method = get_kv_cache_quant_method("cpu_fp8_e4m3") if name == "float8_e4m3fn" else None
    shape = {"head_num": HEADS, "head_dim": DIMS, "layer_num": LAYERS}
    pool = MHATokenToKVPool(SLOTS, page, dtype, **shape, device="cpu", enable_memory_saver=False, quant_method=method)
    (buffers,) = pool_groups(pool, page)
    paged = paged_kv(buffers, page)
    source, target = torch.arange(64, 128), torch.arange(256, 320)
    tensors = (*buffers.keys, *buffers.values)
    for tensor in tensors:
        tensor[source] = torch.randn(64, HEADS, DIMS).to(dtype).view(tensor.dtype)
    extent = np.zeros(64 * paged.token_bytes, np.uint8)
    run, copier = np.array([(0, 0, 64, 0)], np.int64), CpuCopier(paged, 64)
    copier.gather(extent.ctypes.data, np.arange(4, 8, dtype=np.int32), run)
    copier.scatter(extent.ctypes.data, np.arange(16, 20, dtype=np.int32), run)
    bits = [tensor.view(torch.uint8) for tensor in tensors]
    copied = all(torch.equal(one[source], one[target]) and bool(one[target].any()) for one in bits)
    return {"dtype": buffers.dtype, "token_bytes": paged.token_bytes, "same": copied}


if __name__ == "__main__":
    scripts = {"layerwise": layerwise, "multi_process": multi_process, "agreement": agreement, "fp8": fp8}
    what = scripts[sys.argv[1]]
    print(json.dumps(what(*sys.argv[2:])))
