"""What the index costs: looking up a prompt of 512 known chunks among 1,000 and 1,000,000, beside a plain dict.

    python benchmarks/table.py [--records 1000 1000000] [--chunks 512]

The hashes of "one prompt" were stored one after another, "scattered" ones in random order, the worst case for memory.
No prompt is asked for twice in a row. Times are medians, with the 99th percentile in brackets.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

from lmcache.cache.table import Table

KEY_BYTES = 16


def build(records: int, shards: int, chunks: int) -> tuple[Table, list[bytes], float, float]:
    """A table of chains of `chunks` records; its hashes, seconds an insert, and the longest insert in seconds."""
    table = Table(shards)
    keys = [os.urandom(KEY_BYTES) for _ in range(records)]
    longest, parent, began = 0.0, -1, time.perf_counter()
    before = began
    for number, key in enumerate(keys):
        parent = table.insert(key, parent if number % chunks else -1)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    each = (before - began) / records
    for number, key in enumerate(keys):
        record = table.get(key)
        for shard in range(shards):
            table.begin_fill(record, shard, number)
            table.end_fill(record, shard, True)
    return table, keys, each, longest


def prompts(keys: list[bytes], chunks: int, scattered: bool, count: int) -> Iterator[bytes]:
    dice = random.Random(1)
    chunks = min(chunks, len(keys))
    for _ in range(count):
        first = dice.randrange(len(keys) // chunks) * chunks
        yield b"".join(dice.sample(keys, chunks) if scattered else keys[first : first + chunks])


def dict_match(index: dict[bytes, int], hashes: bytes) -> list[int]:
    """What a plain dict needs for the same answer."""
    found = []
    for start in range(0, len(hashes), KEY_BYTES):
        record = index.get(hashes[start : start + KEY_BYTES])
        if record is None:
            break
        found.append(record)
    return found


def timed(call: Callable[[bytes], object], asked: list[bytes]) -> str:
    times = []
    for hashes in asked:
        began = time.perf_counter()
        call(hashes)
        times.append((time.perf_counter() - began) * 1e6)
    times.sort()
    return f"{statistics.median(times):8.1f} us ({times[int(len(times) * 0.99)]:.0f})"


def lookup_and_lease(table: Table) -> Callable[[bytes], object]:
    """All that a lookup asks of the table, and the end of its lease."""

    def call(hashes: bytes) -> object:
        ids = table.match(hashes)
        table.touch(ids)
        table.pin(ids)
        extents = table.extents(ids)
        table.unpin(ids)
        return extents

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--chunks", type=int, default=512)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    for records in options.records:
        table, keys, each, longest = build(records, options.shards, options.chunks)
        index = {key: number for number, key in enumerate(keys)}
        print(f"{records:,} records, {options.shards} shard(s), {type(table).__module__}.{type(table).__name__}")
        print(f"  insert {each * 1e6:.2f} us, the longest {longest * 1e3:.2f} ms")
        print(f"  {table.memory_bytes() / records:.0f} bytes a record")
        for name, scattered in (("scattered", True), ("one prompt", False)):
            asked = list(prompts(keys, options.chunks, scattered, options.rounds))
            assert all(len(table.match(hashes)) == len(hashes) // 4 for hashes in asked[:5])
            print(f"  {name:10} match            {timed(table.match, asked)}")
            print(f"  {name:10} plain dict       {timed(functools.partial(dict_match, index), asked)}")
            print(f"  {name:10} lookup and lease {timed(lookup_and_lease(table), asked)}")
        for key in keys[options.chunks - 1 :: options.chunks]:
            table.touch_path(table.get(key))
        began, evictions = time.perf_counter(), records // 2
        for _ in range(evictions):
            table.free(int.from_bytes(table.detach(table.victim()), "little"))
        print(f"  evict {(time.perf_counter() - began) / evictions * 1e6:.2f} us")


if __name__ == "__main__":
    main()
