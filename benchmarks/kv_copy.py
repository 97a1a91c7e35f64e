"""How fast KV moves between paged memory and slots on this machine, beside what its memory can do at all.

    python benchmarks/kv_copy.py [--seconds 0.5] [--threads 1 2] [--only big small ...] [--splits | --rounded]

Every row copies 8 chunks a call between anonymous memory and a mapping of /dev/shm whose pages were touched, both far
larger than the caches. GB/s counts the bytes of KV once (1 GB = 1e9 bytes). `memcpy` and `contiguous` are the limits: the C
library's copy, and ours of one long run. With `--splits`, rank 0 of each tensor-parallel size loads what each size has stored,
and the last columns are the times (median, best) divided by those of an equal split. With `--rounded`, copies that round
(`lossy_kv`) are measured in turns with plain ones, and the last columns are the times divided by those of plain ones. Machines
are noisy: compare rows of one run, and read the best beside the median.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmcache.chunks import Layout, Split
from lmcache.chunks.forms import Form
from lmcache.engine.groups import RankGroup
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import PagedKV, Plane

CHUNKS = 8
ROUNDED = ((Form.INT8, Form.INT8), (Form.INT8, Form.INT4))


@dataclass(frozen=True)
class Model:
    """kind: NHD [2][block][token][head][dim], HND [2][block][head][token][dim], or vLLM's CPU layout
    [block][head](K [dim][token], V [token][dim])."""

    kind: str
    layers: int
    heads: int
    dims: int
    item_bytes: int
    block_tokens: int
    chunk_tokens: int = 256


MODELS = {
    "big": Model("NHD", 32, 8, 128, 2, 16),
    "big HND": Model("HND", 32, 8, 128, 2, 16),
    "small": Model("NHD", 4, 2, 64, 2, 16),
    "vLLM-CPU fp32": Model("CPU", 8, 4, 64, 4, 128),
    "vLLM-CPU bf16": Model("CPU", 8, 4, 64, 2, 128),
    "vLLM-CPU bf16, AMX": Model("AMX", 8, 4, 64, 2, 128),
}


def touched(size: int, shared: bool) -> mmap.mmap:
    if not shared:
        area = mmap.mmap(-1, size)
    else:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            area = mmap.mmap(file.fileno(), size)
    np.frombuffer(area, dtype=np.uint8)[:] = 1
    return area


def address_of(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data)


def paged_kv(model: Model, num_blocks: int) -> PagedKV:
    item, tokens = model.item_bytes, model.block_tokens
    head = model.dims * item
    row = head * model.heads
    layer_bytes = 2 * num_blocks * tokens * row
    area = touched(model.layers * layer_bytes, shared=False)
    planes = []
    for layer in range(model.layers):
        start = address_of(area) + layer * layer_bytes
        for v in range(2):
            if model.kind == "NHD":
                at = start + v * layer_bytes // 2
                plane = Plane.strided(at, tokens * row, row, model.heads, head, model.dims, item)
            elif model.kind == "HND":
                at = start + v * layer_bytes // 2
                plane = Plane.strided(at, tokens * row, head, model.heads, tokens * head, model.dims, item)
            else:
                at, block, per_head = start + v * tokens * head, 2 * tokens * row, 2 * tokens * head
                if model.kind == "AMX" and v:  # [dims / 16][token pairs][16 dims][2 tokens]
                    dims = (model.dims, 16, tokens * 16 * item, 2 * item)
                    plane = Plane(at, block, 2, 32 * item, item, model.heads, per_head, *dims)
                elif model.kind == "AMX":  # [token / 16][dim pairs][16 tokens][2 dims]
                    dims = (model.dims, 2, 32 * item, item)
                    plane = Plane(at, block, 16, 16 * head, 2 * item, model.heads, per_head, *dims)
                elif v:
                    plane = Plane.strided(at, block, head, model.heads, per_head, model.dims, item)
                else:
                    plane = Plane.strided(at, block, item, model.heads, per_head, model.dims, tokens * item)
            planes.append(plane)
    return PagedKV(tuple(planes), tokens, num_blocks, item, area)


def rate(call: Callable[[int], None], size: int, seconds: float) -> str:
    """`call(i)` moves `size` bytes, i counts up."""
    call(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - start)
    median, best = statistics.median(times), min(times)
    return f"{size / median / 1e9:7.2f} {size / best / 1e9:7.2f} {median * 1e6:10.1f}"


def limits(seconds: float, threads: list[int]) -> None:
    size, count = 32 << 20, 16
    here, there = touched(size * count, shared=False), touched(size * count, shared=True)
    source, target = address_of(here), address_of(there)
    print(f"{'memcpy':34} {1:3} {rate(lambda i: _move(target, source, i % count * size, size), size, seconds)}")
    # One block as large as a chunk: a single run of bytes a plane.
    planes = tuple(Plane.strided(source + i * size // 4, size, 8192, 1, 8192, 4096, 2) for i in range(4))
    paged = PagedKV(planes, 1024, count - 1, 2, here)
    for number in threads:
        copier = CpuCopier(paged, 1024, number)
        runs = [np.array([(i * size, i * 1024, 1024, 0)], dtype=np.int64) for i in range(count - 1)]
        table = np.arange(count - 1, dtype=np.int32)
        for name, copy in (("gather", copier.gather), ("scatter", copier.scatter)):
            text = rate(functools.partial(_one, copy, target, [table] * len(runs), runs), size, seconds)
            print(f"{'contiguous ' + name:34} {number:3} {text}")


def _one(copy: Callable[..., None], base: int, tables: list[Any], runs: list[Any], i: int) -> None:
    copy(base, tables[i % len(tables)], runs[i % len(runs)])


def _move(target: int, source: int, offset: int, size: int) -> None:
    ctypes.memmove(target + offset, source + offset, size)


def measure(name: str, model: Model, seconds: float, threads: list[int], isa: int) -> None:
    """Eight chunks a call, and one; block tables are random and differ from call to call."""
    chunk_blocks = -(-model.chunk_tokens // model.block_tokens)
    extent = 2 * model.layers * model.heads * model.dims * model.item_bytes * model.chunk_tokens
    sets = max(2, (256 << 20) // (CHUNKS * extent))  # enough that nothing is in the caches when its turn comes
    paged = paged_kv(model, sets * CHUNKS * chunk_blocks)
    arena = touched(sets * CHUNKS * extent, shared=True)
    base = address_of(arena)
    blocks = np.random.default_rng(7).permutation(paged.num_blocks).astype(np.int32).reshape(sets, -1)
    for number in threads:
        copier = CpuCopier(paged, model.chunk_tokens, number)
        copier._isa = isa
        for chunks in (CHUNKS, 1):
            tokens = model.chunk_tokens
            total = sets * CHUNKS
            rows = [(c * extent, c % CHUNKS * tokens, tokens, 0) for c in range(total)]
            runs = np.array(rows, dtype=np.int64).reshape(total // chunks, chunks, 4)
            tables = np.repeat(blocks, CHUNKS // chunks, axis=0)
            for way, copy in (("gather", copier.gather), ("scatter", copier.scatter)):
                call = functools.partial(_one, copy, base, list(tables), list(runs))
                text = rate(call, chunks * extent, seconds)
                print(f"{f'{name}, {chunks} x {extent / (1 << 20):g} MiB {way}':34} {number:3} {text}", flush=True)


def measure_splits(name: str, model: Model, seconds: float) -> None:
    """One chunk a call, in CPU time of one thread. Both splits divide the KV heads only. Each is measured in turn with an equal
    split, call by call."""
    tokens, total = model.chunk_tokens, 2 * CHUNKS
    dtype = {2: "bfloat16", 4: "float32"}[model.item_bytes]
    layout = Layout("bench", dtype, model.layers, model.heads, model.dims, tokens)
    sizes = [size for size in (1, 2, 4, 8) if model.heads % size == 0]
    arena = touched(total * Split((), 1).shard(layout, 0).shard_bytes(layout), shared=True)
    for reader in sizes:
        own = Split((), reader).shard(layout, 0)
        paged = paged_kv(replace(model, heads=model.heads // reader), total * -(-tokens // model.block_tokens))
        tables = np.random.default_rng(7).permutation(paged.num_blocks).astype(np.int32).reshape(total, -1)
        copier, group = CpuCopier(paged, tokens), RankGroup(lambda tokens: layout, own, paged)

        def load(i: int, copy: tuple[Callable[..., None], int, int], tables: Any = tables) -> float:
            scatter, shards, size = copy
            runs = [((shard * total + i % total) * size, 0, tokens, 0) for shard in range(shards)]
            begin = time.thread_time()
            scatter(address_of(arena), tables[i % total], np.array(runs, dtype=np.int64))
            return time.thread_time() - begin

        equal = copier.scatter, 1, paged.shard_bytes(tokens)
        for writer in sizes:
            found = [group.overlap(Split((), writer), index, tokens) for index in range(writer)]
            overlaps = [overlap for overlap in found if overlap is not None]
            copies = copier.reader(*overlaps).scatter, len(overlaps), overlaps[0][1].size_bytes
            times, end = [], time.perf_counter() + seconds
            while len(times) < 3 * total or time.perf_counter() < end:
                i = len(times)
                times.append((load(i, equal), load(i + CHUNKS, copies if writer != reader else equal)))
            medians, best = (tuple(map(how, zip(*times, strict=True))) for how in (statistics.median, min))
            text = (
                f"{paged.shard_bytes(tokens) / medians[1] / 1e9:7.2f} {paged.shard_bytes(tokens) / best[1] / 1e9:7.2f}"
            )
            ratios = f"{medians[1] / medians[0]:7.2f} {best[1] / best[0]:7.2f}"
            print(
                f"{f'{name}, TP {reader} loads of TP {writer}':34}   1 {text} {medians[1] * 1e6:10.1f} {ratios}",
                flush=True,
            )


def measure_rounded(name: str, model: Model, seconds: float) -> None:
    """One chunk a call, in CPU time of one thread; each copy that rounds in turn with a plain one of the same tokens."""
    tokens, total = model.chunk_tokens, 2 * CHUNKS
    plain = paged_kv(model, total * -(-tokens // model.block_tokens))
    area = np.frombuffer(plain.keepalive, dtype=np.uint8)  # type: ignore[call-overload]
    values = np.random.default_rng(1).standard_normal(1 << 20, dtype=np.float32).view(np.uint32)
    area[:] = np.resize(
        (values if model.item_bytes == 4 else (values >> 16).astype(np.uint16)).view(np.uint8), len(area)
    )
    tables = np.random.default_rng(7).permutation(plain.num_blocks).astype(np.int32).reshape(total, -1)
    arena = touched(2 * total * plain.shard_bytes(tokens), shared=True)
    dtype = {2: "bfloat16", 4: "float32"}[model.item_bytes]
    size = plain.shard_bytes(tokens)
    for forms in ROUNDED:
        rounded = plain.rounded(forms, dtype)
        copiers = [CpuCopier(paged, tokens) for paged in (plain, rounded)]
        for way in ("gather", "scatter"):

            def spent(i: int, which: int, way: str = way, copiers: list[CpuCopier] = copiers) -> float:
                run = np.array([((which * total + i % total) * size, 0, tokens, 0)], dtype=np.int64)
                copy = getattr(copiers[which], way)
                begin = time.thread_time()
                copy(address_of(arena), tables[i % total], run)
                return time.thread_time() - begin

            times, end = [], time.perf_counter() + seconds
            while len(times) < 3 * total or time.perf_counter() < end:
                times.append((spent(len(times), 0), spent(len(times) + CHUNKS, 1)))
            medians, best = (tuple(map(how, zip(*times[total:], strict=True))) for how in (statistics.median, min))
            text = f"{size / medians[1] / 1e9:7.2f} {size / best[1] / 1e9:7.2f} {medians[1] * 1e6:10.1f}"
            ratios = f"{medians[1] / medians[0]:7.2f} {best[1] / best[0]:7.2f}"
            label = f"{name} {way}, {'/'.join(form.name for form in forms)}"
            print(f"{label:34}   1 {text} {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row (default 0.5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=["limits", *MODELS], help="these rows only")
    parser.add_argument("--isa", type=int, default=-1, help="number of the instruction set (default: the best)")
    parser.add_argument("--splits", action="store_true", help="loads of other parallel splits only")
    parser.add_argument("--rounded", action="store_true", help="copies that round only, beside plain ones")
    options = parser.parse_args()
    print(f"{'what':34} {'thr':>3} {'GB/s':>7} {'best':>7} {'us':>10}")
    if not (options.splits or options.rounded) and (not options.only or "limits" in options.only):
        limits(options.seconds, options.threads)
    for name, model in MODELS.items():
        if options.splits and (not options.only or name in options.only):
            measure_splits(name, model, options.seconds)
        elif options.rounded and (not options.only or name in options.only):
            measure_rounded(name, model, options.seconds)
        elif not (options.splits or options.rounded) and (not options.only or name in options.only):
            measure(name, model, options.seconds, options.threads, options.isa)


if __name__ == "__main__":
    main()
