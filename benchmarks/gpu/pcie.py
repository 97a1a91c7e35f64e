"""Slot <-> paged KV on a GPU, against PCIe in the same run: store, load, both at once; large chunks, one chunk, small chunks.

usage: python -m benchmarks.gpu.pcie [--tokens 32768]      Qwen3-8B shape: 36 layers x 8 KV heads x 128, bf16, 16-token blocks
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time

import numpy as np
import torch

from lmcache.memory.arena import Mapping
from lmcache.transfer.cuda import CudaCopier
from lmcache.transfer.paged import PagedKV, Plane

LAYERS, HEADS, DIMS, BLOCK = 36, 8, 128, 16


def measured(call, rounds: int = 7) -> float:
    """Median seconds of a call that ends with the copy."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    tokens = parser.parse_args().tokens
    count = tokens // BLOCK + 64
    kv = [torch.empty(2, count, BLOCK, HEADS, DIMS, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(LAYERS)]
    planes = []
    for tensor in kv:
        for part in tensor:
            b, t, h, d = (stride * 2 for stride in part.stride())
            planes.append(Plane.strided(part.data_ptr(), b, t, HEADS, h, DIMS, d))
    paged = PagedKV(tuple(planes), BLOCK, count, 2, kv, "cuda:0")
    size = paged.token_bytes * tokens
    arena_bytes = 2 * size + (1 << 30)
    descriptor = os.open("/dev/shm/lmcache-gpu-bench", os.O_CREAT | os.O_RDWR, 0o600)
    os.unlink("/dev/shm/lmcache-gpu-bench")
    os.ftruncate(descriptor, arena_bytes)
    mapping = Mapping(descriptor, arena_bytes)
    mapping.populate(0, arena_bytes)
    table = np.random.default_rng(0).permutation(count)[: tokens // BLOCK].astype(np.int32)
    out: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "tokens": tokens, "bytes": size}

    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def dma(to_host: bool, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            (pinned if to_host else device).copy_(device if to_host else pinned, non_blocking=True)

    def limit(*ways: bool) -> float:
        def call() -> None:
            for way, stream in zip(ways, streams, strict=False):
                dma(way, stream)
            torch.cuda.synchronize()

        return len(ways) * size / measured(call) / 1e9

    out["pcie_to_host"], out["pcie_to_device"], out["pcie_both"] = limit(True), limit(False), limit(True, False)
    for chunk, label in ((256, "256"), (16, "16")):
        copier = CudaCopier(paged, chunk)
        copier.adopt(mapping.address, arena_bytes)
        copier._register_thread.join()
        slot = paged.slot_bytes(chunk)
        chunks = tokens // chunk
        runs = np.array([(i * slot, i * chunk, chunk, 0) for i in range(chunks)], dtype=np.int64)
        shuffled = runs.copy()
        shuffled[:, 0] = np.random.default_rng(1).permutation(chunks) * slot
        far = runs + np.array([size, 0, 0, 0])
        for name, these in ((label, runs), (label + "_scattered_slots", shuffled)):
            cpu = time.process_time()
            store = size / measured(lambda these=these: copier.gather(mapping.address, table, these)) / 1e9
            load = size / measured(lambda these=these: copier.scatter(mapping.address, table, these)) / 1e9
            spent = (time.process_time() - cpu) / (16 * size / 1e9)
            out[f"chunk_{name}"] = dict(
                store=round(store, 1), load=round(load, 1), cpu_seconds_per_gb=round(spent, 4),
                store_of_pcie=round(store / out["pcie_to_host"], 3), load_of_pcie=round(load / out["pcie_to_device"], 3),
            )  # fmt: skip

        def both(copier=copier, runs=runs, far=far) -> None:
            other = threading.Thread(target=copier.gather, args=(mapping.address, table, far))
            other.start()
            copier.scatter(mapping.address, table, runs)
            other.join()

        both_rate = 2 * size / measured(both) / 1e9
        one = runs[:1]
        single = slot / measured(lambda: copier.gather(mapping.address, table, one), 30) / 1e9
        single_load = slot / measured(lambda: copier.scatter(mapping.address, table, one), 30) / 1e9
        out[f"chunk_{label}_both"] = dict(sum=round(both_rate, 1), of_pcie=round(both_rate / out["pcie_both"], 3))
        out[f"chunk_{label}_one"] = dict(store=round(single, 1), load=round(single_load, 1))
        copier.close()
    out["staging_mib"] = int(os.environ.get("LMCACHE_GPU_STAGING_MB", "128"))
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
