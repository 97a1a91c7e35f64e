"""Extents <-> paged KV on a GPU, against PCIe in the same run: store, load, both at once; large chunks, one chunk, small chunks.
Then the six groups of Gemma 3's shape, one of full attention and five with a window of 1,024 tokens.

usage: python -m benchmarks.gpu.pcie [--tokens 32768]      Qwen3-8B shape: 36 layers x 8 KV heads x 128, bf16, 16-token blocks
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from lmcache.memory.arena import Mapping
from lmcache.transfer.gpu.copier import STAGING_BYTES, CudaCopier, cuda_copiers
from lmcache.transfer.paged import PagedKV, Plane

LAYERS, HEADS, DIMS, BLOCK = 36, 8, 128, 16
GROUPS_TOKENS = 2048, 8192, 16384
GROUPS_BYTES = 6 * GROUPS_TOKENS[-1] * 8 * 2 * HEADS * 256 * 2
"""KV of the longest prompt in six groups of eight layers."""


def measured(call: Callable[[], object], rounds: int = 7) -> float:
    """Median seconds of a call that ends with the copy."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def paged_kv(blocks: int, layers: int = LAYERS, dims: int = DIMS) -> PagedKV:
    """Random KV in FlashAttention's order, [2, blocks, tokens, heads, dims] a layer."""
    kv = [
        torch.empty(2, blocks, BLOCK, HEADS, dims, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(layers)
    ]
    planes = []
    for part in (part for tensor in kv for part in tensor):
        block, token, head, dim = (stride * 2 for stride in part.stride())
        planes.append(Plane.strided(part.data_ptr(), block, token, HEADS, head, dims, dim))
    return PagedKV(tuple(planes), BLOCK, blocks, 2, kv, "cuda:0")


def shared_memory(size: int) -> Mapping:
    """Touched pages of a nameless file in /dev/shm, as an arena's are."""
    name = f"/dev/shm/lmcache-gpu-bench-{os.getpid()}"
    descriptor = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)
    os.unlink(name)
    os.ftruncate(descriptor, size)
    mapping = Mapping(descriptor, size)
    mapping.populate(0, size)
    return mapping


def pcie(size: int) -> dict[str, float]:
    """GB/s of plain copies of `size` bytes between pinned and device memory: each way, and both at once in sum."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def run(*ways: bool) -> None:
        for to_host, stream in zip(ways, streams, strict=False):
            with torch.cuda.stream(stream):
                (host if to_host else device).copy_(device if to_host else host, non_blocking=True)
        torch.cuda.synchronize()

    ways = {"to_host": (True,), "to_device": (False,), "both": (True, False)}
    return {name: len(way) * size / measured(partial(run, *way)) / 1e9 for name, way in ways.items()}


def rates(paged: PagedKV, mapping: Mapping, tokens: int, chunk: int, limit: dict[str, float]) -> dict[str, Any]:
    """What the copier reaches with chunks of `chunk` tokens, how much of PCIe that is, and the GPU memory that it takes."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    copier = CudaCopier(paged, chunk)
    copier.adopt(mapping.address, mapping.size_bytes)
    copier._arena.wait_registered()
    size, extent, chunks = paged.token_bytes * tokens, paged.shard_bytes(chunk), tokens // chunk
    rng = np.random.default_rng(0)
    table = rng.permutation(paged.num_blocks)[: tokens // BLOCK].astype(np.int32)
    runs = np.array([(i * extent, i * chunk, chunk, 0) for i in range(chunks)], dtype=np.int64)
    scattered, far = runs.copy(), runs + np.array([size, 0, 0, 0])
    scattered[:, 0] = rng.permutation(chunks) * extent
    store, load = partial(copier.gather, mapping.address, table), partial(copier.scatter, mapping.address, table)

    def both() -> None:
        other = threading.Thread(target=store, args=(far,))
        other.start()
        load(runs)
        other.join()

    out: dict[str, Any] = {}
    for name, these in (("in_order", runs), ("scattered", scattered)):
        spent = time.process_time()
        there, back = size / measured(partial(store, these)) / 1e9, size / measured(partial(load, these)) / 1e9
        out[name] = {
            "store": round(there, 1),
            "load": round(back, 1),
            "store_of_pcie": round(there / limit["to_host"], 3),
            "load_of_pcie": round(back / limit["to_device"], 3),
            "cpu_seconds_per_gb": round((time.process_time() - spent) / (16 * size / 1e9), 4),
        }
    rate = 2 * size / measured(both) / 1e9
    out["both_at_once"] = {"sum": round(rate, 1), "of_pcie": round(rate / limit["both"], 3)}
    one = {"store": partial(store, runs[:1]), "load": partial(load, runs[:1])}
    out["one_chunk"] = {name: round(extent / measured(call, 30) / 1e9, 1) for name, call in one.items()}
    torch.cuda.empty_cache()
    out["gpu_memory_mib"] = (free - torch.cuda.mem_get_info()[0]) >> 20
    copier.close()
    return out


def of_groups(mapping: Mapping, tokens: int, limit: dict[str, float], chunk: int = 256) -> dict[str, Any]:
    """What the copiers of Gemma 3's groups reach together: the store of a prompt in all groups, and the load of a hit, which is
    the whole prompt in one group and the last 1,024 tokens in the others. 8 layers a group, 8 heads x 256."""
    paged = [paged_kv(tokens // BLOCK + 64, 8, 256) for _ in range(6)]
    copiers = cuda_copiers([(one, chunk) for one in paged])
    copiers[0].adopt(mapping.address, mapping.size_bytes)
    copiers[0]._arena.wait_registered()
    table, extent, chunks = np.arange(tokens // BLOCK, dtype=np.int32), paged[0].shard_bytes(chunk), tokens // chunk
    runs = np.array([(i * extent, i * chunk, chunk, 0) for i in range(chunks)], dtype=np.int64)
    offsets = [runs + np.array([number * chunks * extent, 0, 0, 0]) for number in range(6)]
    window = max(0, chunks - 1024 // chunk)

    def store() -> None:
        for copier, these in zip(copiers, offsets, strict=True):
            copier.gather(mapping.address, table, these)

    def load() -> None:
        for number, (copier, these) in enumerate(zip(copiers, offsets, strict=True)):
            copier.scatter(mapping.address, table, these[window:] if number else these)

    stored, loaded = 6 * chunks * extent, (chunks + 5 * (chunks - window)) * extent
    there, back = stored / measured(store) / 1e9, loaded / measured(load) / 1e9
    for copier in copiers:
        copier.close()
    return {
        "tokens": tokens,
        "store": round(there, 1),
        "load": round(back, 1),
        "store_of_pcie": round(there / limit["to_host"], 3),
        "load_of_pcie": round(back / limit["to_device"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    tokens = parser.parse_args().tokens
    paged = paged_kv(tokens // BLOCK + 64)
    size = paged.token_bytes * tokens
    mapping = shared_memory(max(2 * size + (1 << 30), GROUPS_BYTES))
    limit = pcie(size)
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "tokens": tokens,
        "bytes": size,
        "staging_bytes": STAGING_BYTES,
    }
    out["pcie"] = {name: round(rate, 1) for name, rate in limit.items()}
    for chunk in (256, 16):
        out[f"{chunk}_token_chunks"] = rates(paged, mapping, tokens, chunk, limit)
    del paged
    torch.cuda.empty_cache()
    out["groups"] = [of_groups(mapping, length, limit) for length in GROUPS_TOKENS]
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
