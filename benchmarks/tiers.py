"""The disk tier beside its device, in one run: direct I/O, the page cache, checksums, the index.

    python -m benchmarks.tiers --folder /mnt/nvme/bench [--quick] [--json FILE] [--update benchmarks/README.md]

*limit* is plain `pwrite` and `preadv` with O_DIRECT, of the same sizes, by as many threads, in a new file of the same folder,
in turns with ours; of warm loads, a buffered read that takes the same checksum; of the index, a plain dictionary of the
same keys. *peer* (`served`, with --peer-python): LMCache 0.5.6's server with its `fs_native`, in turns with ours. The folder
needs 4 GiB, the machine 3 GiB of memory, 6 GiB with the peer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import xxhash

from benchmarks.rows import Goal, Row, share
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import Side, sides_of
from benchmarks.tiers_served import Tier, last_written, ours_of, served
from lmcache.testing.conformance import shard_key
from lmcache.tiers import OK, Shard, ShardKey, frame
from lmcache.tiers.disk.journal import PUT, Journal
from lmcache.tiers.disk.shard_index import RECORD, tag_of
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import BLOCK_BYTES, Filesystem

MIB, GB = 1 << 20, 1e9
CALLS = 4
"""Calls under way at once, as the tier says of itself."""
ROUND_BYTES = 512 * MIB
SUM_SHARDS, SUM_PAIRS = 8, 60
"""Of what checksums cost: shards of 32 MiB a turn, turns with and without."""


class Bench:
    """One folder, and memory as the arena's: shared, aligned, touched."""

    def __init__(self, folder: Path, quick: bool, sides: tuple[Side, ...]) -> None:
        self.folder, self.rounds, self.sides = folder, 2 if quick else 7, sides
        self.quick = quick
        self.memory = memoryview(mmap.mmap(-1, ROUND_BYTES))
        block = random.Random(1).randbytes(MIB)
        for at in range(0, ROUND_BYTES, MIB):
            self.memory[at : at + MIB] = block
            self.memory[at : at + 8] = at.to_bytes(8, "little")

    @contextmanager
    def tier(self, io: str, max_bytes: int = 3 << 30) -> Iterator[DiskTier]:
        path = self.folder / "tier"
        shutil.rmtree(path, ignore_errors=True)
        tier = DiskTier(path, max_bytes, io)
        tier.open()
        try:
            yield tier
        finally:
            tier.close()
            shutil.rmtree(path)

    def parts(self, size: int) -> list[memoryview]:
        return [self.memory[at : at + size] for at in range(0, ROUND_BYTES, size)]


def side_by_side(call: Callable[[int], None], count: int) -> float:
    """Seconds for all the calls, `CALLS` at a time."""
    with ThreadPoolExecutor(CALLS) as pool:
        began = time.perf_counter()
        for _ in pool.map(call, range(count)):
            pass
        return time.perf_counter() - began


def plain(bench: Bench, size: int) -> tuple[float, float]:
    """GB/s of writing and reading a new file with O_DIRECT."""
    path, parts = bench.folder / "plain", bench.parts(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.ftruncate(fd, ROUND_BYTES)
        write = side_by_side(lambda at: _complete(os.pwrite(fd, parts[at], at * size), size), len(parts))
        read = side_by_side(lambda at: _complete(os.preadv(fd, [parts[at]], at * size), size), len(parts))
    finally:
        os.close(fd)
        path.unlink()
    return ROUND_BYTES / write / GB, ROUND_BYTES / read / GB


def _complete(done: int, size: int) -> None:
    assert done == size


def ours(tier: DiskTier, parts: list[memoryview], batch: int, first: int) -> tuple[float, float, float, float]:
    """GB/s of storing and of loading, CPU seconds a GB of each."""
    size, calls = parts[0].nbytes, len(parts) // batch

    def store(call: int) -> None:
        numbers = range(call * batch, (call + 1) * batch)
        shards = [Shard(shard_key(first + number), bytes(16), parts[number]) for number in numbers]
        assert tier.store(shards) == [OK] * batch

    def load(call: int) -> None:
        numbers = range(call * batch, (call + 1) * batch)
        said = tier.load([shard_key(first + number) for number in numbers], [parts[number] for number in numbers])
        assert said == [OK] * batch

    before = _cpu_seconds()
    write = side_by_side(store, calls)
    between = _cpu_seconds()
    read = side_by_side(load, calls)
    total = size * calls * batch / GB
    return total / write, total / read, (between - before) / total, (_cpu_seconds() - between) / total


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def device(bench: Bench) -> list[Row]:
    """Direct I/O beside the device, for large shards one a call and small chunks in batches."""
    rows: list[Row] = []
    for what, size, batch in (("32 MiB, one a call", 32 * MIB, 1), ("0.5 MiB, 32 a call", MIB // 2, 32)):
        goal = Goal(0.95, "more")
        store, load = (
            Row(f"store_{size}", f"disk: store, {what}", "GB/s", None),
            Row("", f"disk: load, {what}", "GB/s", None),
        )
        store_part = Row("", f"disk: store, {what}: part of plain O_DIRECT", "", goal)
        load_part = Row("", f"disk: load, {what}: part of plain O_DIRECT", "", goal)
        cpu_store, cpu_load = (
            Row("", f"disk: CPU seconds a GB, {one}, {what}", "s/GB", None) for one in ("store", "load")
        )
        rows += [store, store_part, load, load_part, cpu_store, cpu_load]
        parts = bench.parts(size)
        with bench.tier("direct") as tier:
            for number in range(bench.rounds + 1):
                order = [plain, ours] if number % 2 else [ours, plain]
                for side in order:
                    if side is plain:
                        limit = plain(bench, size)
                    else:
                        mine = ours(tier, parts, batch, number * len(parts))
                        tier.clear()
                if not number:
                    continue  # to warm up
                for at, row, part in ((0, store, store_part), (1, load, load_part)):
                    row.add("limit", [limit[at]])
                    row.add("ours", [mine[at]])
                    part.add("ours", [mine[at] / limit[at]])
                cpu_store.add("ours", [mine[2]])
                cpu_load.add("ours", [mine[3]])
    return rows


def evicting(bench: Bench) -> list[Row]:
    """Storing into a full tier: every shard needs another to go."""
    row = Row("", "disk: store, 32 MiB, each evicts another", "GB/s", None)
    with bench.tier("direct", ROUND_BYTES + 128 * MIB) as tier:
        parts = bench.parts(32 * MIB)
        for number in range(bench.rounds + 1):
            limit = plain(bench, 32 * MIB)
            mine = ours(tier, parts, 1, number * len(parts))
            if number:
                row.add("limit", [limit[0]])
                row.add("ours", [mine[0]])
    return [row]


def warm(bench: Bench) -> list[Row]:
    """Loads through the page cache beside a buffered read with the same checksum."""
    row = Row("", "disk: load, io=buffered, in the page cache, 32 MiB", "GB/s", None)
    part = Row("", "disk: the same: part of a buffered read with checksum", "", Goal(0.8, "more"))
    parts = bench.parts(32 * MIB)
    keys = [shard_key(at) for at in range(len(parts))]
    with bench.tier("buffered") as tier:
        ours(tier, parts, 1, 0)
        path = bench.folder / "plain"
        with path.open("wb") as file:
            for one in parts:
                file.write(one)
        fd = os.open(path, os.O_RDONLY)
        try:

            def checked(at: int) -> None:
                _complete(os.preadv(fd, [parts[at]], at * 32 * MIB), 32 * MIB)
                xxhash.xxh3_128_digest(parts[at])

            for number in range(bench.rounds + 1):
                limit = ROUND_BYTES / side_by_side(checked, len(parts)) / GB
                seconds = side_by_side(lambda at: _ok(tier.load([keys[at]], [parts[at]])), len(parts))
                mine = ROUND_BYTES / seconds / GB
                if number:
                    row.add("limit", [limit])
                    row.add("ours", [mine])
                    part.add("ours", [mine / limit])
        finally:
            os.close(fd)
            path.unlink()
    return [row, part]


def _ok(outcomes: list[str]) -> None:
    assert outcomes == [OK]


def checksums(bench: Bench) -> list[Row]:
    """How much longer it takes than with a checksum that looks at nothing, in short turns: the device's speed wanders. Native
    code cannot leave it out, so the turns without are read by Python."""
    parts = bench.parts(32 * MIB)[:SUM_SHARDS]
    sides: dict[bool, list[tuple[float, float, float, float]]] = {False: [], True: []}
    with bench.tier("direct") as tier:
        for number in range(1 + (4 if bench.quick else SUM_PAIRS)):
            for blind in (False, True) if number % 2 else (True, False):
                with ExitStack() as patches:
                    if blind:
                        patches.enter_context(mock.patch.object(frame.Checksum, "update", _count_only))
                        patches.enter_context(mock.patch.object(Filesystem, "read_frames", _read_blindly))
                    figures = ours(tier, parts, 1, 0)
                tier.clear()
                sides[blind] += [figures] if number else []  # the first to warm up
    rows: list[Row] = []
    for at, one in enumerate(("store", "load")):
        seconds = {blind: [1 / figures[at] for figures in side] for blind, side in sides.items()}
        rows += share(
            f"disk: checksums' share of the time, {one}, 32 MiB", Goal(3, "less"), seconds[False], seconds[True]
        )
        cpu = Row("", f"disk: checksums' CPU seconds a GB, {one}, 32 MiB", "s/GB", None)
        cpu.add("ours", [median(side[2 + at] for side in sides[False]) - median(side[2 + at] for side in sides[True])])
        rows.append(cpu)
    return rows


def _count_only(checksum: frame.Checksum, piece: memoryview) -> None:
    checksum._payload_bytes += memoryview(piece).nbytes


def _read_blindly(
    self: Filesystem, fd: int, frames: Sequence[tuple[int, int, int]], piece_bytes: int
) -> list[tuple[int, bytes, bytes]]:
    """Read complete blocks, and answer with the digests that the headers hold."""
    found = []
    for offset, size, address in frames:
        payload, end = memoryview((ctypes.c_uint8 * size).from_address(address)), mmap.mmap(-1, BLOCK_BYTES)
        for at in range(0, size, piece_bytes):
            last = [memoryview(end)] if at + piece_bytes >= size else []
            self.read(fd, [payload[at : at + piece_bytes], *last], offset + at)
        header = end[: frame.HEADER_BYTES]
        found.append((0, header, header[-16:]))
    return found


def index(bench: Bench) -> list[Row]:
    """A million records: the start, memory, and a question about a prompt of 4,096 shards."""
    count = 100_000 if bench.quick else 1_000_000
    rows = [
        Row("", f"disk: open {count:,} records, journal just rewritten", "s", Goal(2, "less")),
        Row("", f"disk: open {count:,} records, the last tenth in entries of 4", "s", Goal(2, "less")),
        Row("", "disk: index memory a shard", "bytes", Goal(200, "less")),
        Row("", "disk: index memory a shard, by the process's RSS", "bytes", Goal(200, "less")),
        Row("", f"disk: 4,096 shards known, of {count:,}", "ms", None),
    ]
    keys = np.random.default_rng(1).integers(0, 256, (count, 36), dtype=np.uint8)
    packed = [key.tobytes() for key in keys]
    records = np.zeros(count, RECORD)
    records["key"], records["payload"] = keys.view("V36").ravel(), MIB // 2
    a_file = np.uint64(1900)
    numbers = np.arange(count, dtype=np.uint64)
    records["place"] = (numbers // a_file + np.uint64(1)) << np.uint64(32) | numbers % a_file * np.uint64(528384 // 64)
    records["tag"] = [tag_of(key) for key in packed]
    asked = [ShardKey.unpack(key) for key in random.Random(1).sample(packed, 4096)]
    plain_dict = dict.fromkeys(packed[:count], 1)
    began = time.perf_counter()
    assert all(key.packed in plain_dict for key in asked)
    rows[4].add("limit", [(time.perf_counter() - began) * 1e3])
    del packed, plain_dict
    gc.collect()
    for number in range(3):
        for row, rewritten in ((rows[0], count), (rows[1], count - count // 10)):
            path = bench.folder / "tier"
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o700)
            journal = Journal(Filesystem(), path)
            journal.open()
            journal.restart(records[:rewritten], count)
            for at in range(rewritten, count, 4):
                journal.append((PUT, records[at : at + 4].tobytes()))
            journal.close()
            tier = DiskTier(path, 4 << 40)
            before = _rss()
            began = time.perf_counter()
            tier.open()
            row.add("ours", [time.perf_counter() - began])
            if rewritten == count and not number:
                rows[3].add("ours", [(_rss() - before) / count])
            rows[2].add("ours", [tier._index.memory_bytes() / count])
            began = time.perf_counter()
            assert all(tier.known(asked))
            rows[4].add("ours", [(time.perf_counter() - began) * 1e3])
            tier.close()
            shutil.rmtree(path)
    return rows


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def behind_servers(bench: Bench) -> list[Row]:
    """Ours beside the peer's `fs_native`, the faster of its two for files, each in its server. What was just written is in the
    page cache unless I/O is direct."""
    rows: list[Row] = []
    for io in ("buffered", "direct"):
        mine, theirs = bench.folder / f"served-{io}", bench.folder / f"peer-{io}"
        theirs.mkdir()
        adapter = {"type": "fs_native", "base_path": str(theirs), "use_odirect": io == "direct"}
        tiers = {
            "ours": ours_of(f"disk://{mine}?io={io}&max_gb=2", last_written(mine)),
            "peer": Tier(("--l2-adapter", json.dumps(adapter)), last_written(theirs), lambda _: _unlink(theirs)),  # noqa: B023
        }
        rows += served(f"disk, io={io}", tiers, bench.sides, bench.quick)
    return rows


def _unlink(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "device": device,
    "evicting": evicting,
    "warm": warm,
    "checksums": checksums,
    "index": index,
    "served": behind_servers,
}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    rows: list[Row] = []
    sides = sides_of(options.peer_python)
    with tempfile.TemporaryDirectory(prefix="lmcache-tiers-", dir=options.folder) as name:
        bench = Bench(Path(name).resolve(), options.quick, sides)
        for group in options.only or GROUPS:
            began = time.perf_counter()
            print(f"{group} ... ", end="", file=sys.stderr, flush=True)
            rows += GROUPS[group](bench)
            print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    facts = about(sides, argv, "benchmarks.tiers")
    give_out(options, facts, rows, "tiers")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments("tiers", __doc__)
    parser.add_argument(
        "--folder", metavar="DIR", default=".", help="on the device to measure. Default: the working one"
    )
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with LMCache 0.5.6")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(GROUPS), help=f"groups: {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it work, not how fast is it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
