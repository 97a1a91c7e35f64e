"""Extents <-> paged KV on a GPU, against PCIe in the same run: store, load, both at once; large chunks, one chunk, small chunks.
Then the six groups of Gemma 3's shape, one of full attention and five with a window of 1,024 tokens.

usage: python -m benchmarks.gpu.pcie [--tokens 32768]      Qwen3-8B shape: 36 layers x 8 KV heads x 128, bf16, 16-token blocks
       python -m benchmarks.gpu.pcie --memory-gib 100 [--arena-dir DIR] [--huge-pages auto|always|never]
--memory-gib: only the GPU memory that a copier takes with an arena of this size, and the seconds of touching and registering it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.prefault import touched
from lmcache.config.server import HUGE_PAGES
from lmcache.memory.arena import Mapping, populate_all
from lmcache.memory.huge_pages import mapped_bytes
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


def memory(size: int, directory: Path, huge: str) -> dict[str, Any]:
    """MiB of GPU memory of the first copier of a process: the staging rings, and the driver's page tables of an arena of `size`
    bytes. The arena is mapped as an engine maps it."""
    arena, touching, _ = touched(directory, size, huge)
    mapping = Mapping(arena.descriptor, arena.size_bytes, huge != "never")
    begin = time.perf_counter()
    populate_all(mapping, threading.Event())
    mapping_seconds = time.perf_counter() - begin
    paged = paged_kv(64)
    pcie(64 << 20)  # PyTorch takes memory of its own for the first stream
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    copier = CudaCopier(paged, 256)
    torch.cuda.empty_cache()
    staged = torch.cuda.mem_get_info()[0]
    begin = time.perf_counter()
    copier.adopt(mapping.address, mapping.size_bytes)
    copier._arena.wait_registered()
    registering = time.perf_counter() - begin
    registered = torch.cuda.mem_get_info()[0]
    table, runs = np.arange(64, dtype=np.int32), np.array([(0, 0, 256, 0)], dtype=np.int64)
    copier.gather(mapping.address, table, runs)
    copier.scatter(mapping.address, table, runs)
    torch.cuda.empty_cache()
    left = torch.cuda.mem_get_info()[0]
    out = {
        "gpu": torch.cuda.get_device_name(),
        "arena_gib": round(size / 2**30, 2),
        "registered_gib": round(copier._arena._registered_bytes / 2**30, 2),
        "directory": str(directory),
        "huge_pages": huge,
        "pages": arena.pages,
        "huge_gib": round(arena.huge_bytes / 2**30, 2),
        "engine_huge_gib": round(mapped_bytes(mapping.address, mapping.size_bytes) / 2**30, 2),
        "touch_seconds_per_gib": round(touching / (size / 2**30), 3),
        "engine_map_seconds_per_gib": round(mapping_seconds / (size / 2**30), 4),
        "register_seconds": round(registering, 2),
        "staging_mib": (free - staged) >> 20,
        "page_tables_mib": (staged - registered) >> 20,
        "gpu_memory_mib": (free - left) >> 20,
    }
    copier.close()
    mapping.close()
    arena.close()
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
    parser.add_argument("--memory-gib", type=float, default=0.0)
    parser.add_argument("--arena-dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--huge-pages", choices=HUGE_PAGES, default="auto")
    asked = parser.parse_args()
    if asked.memory_gib:
        print(json.dumps(memory(int(asked.memory_gib * 2**30), asked.arena_dir, asked.huge_pages), indent=1))
        return
    tokens = asked.tokens
    paged = paged_kv(tokens // BLOCK + 64)
    size = paged.token_bytes * tokens
    arena, _, _ = touched(asked.arena_dir, max(2 * size + (1 << 30), GROUPS_BYTES), asked.huge_pages)
    mapping = arena.mapping
    limit = pcie(size)
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "tokens": tokens,
        "bytes": size,
        "staging_bytes": STAGING_BYTES,
        "pages": arena.pages,
    }
    out["pcie"] = {name: round(rate, 1) for name, rate in limit.items()}
    for chunk in (256, 16):
        out[f"{chunk}_token_chunks"] = rates(paged, mapping, tokens, chunk, limit)
    del paged
    torch.cuda.empty_cache()
    out["groups"] = [of_groups(mapping, length, limit) for length in GROUPS_TOKENS]
    print(json.dumps(out, indent=1))
    arena.close()


if __name__ == "__main__":
    main()
