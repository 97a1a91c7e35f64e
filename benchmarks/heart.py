"""What the heart's decisions cost, in process: lookups, stores, evictions, a clear, a region that changes hands, and headers.

    python benchmarks/heart.py [--chunks 1000 1000000] [--json]

Prompts have 512 chunks whose hashes are known. Times are the least and the median, of one call or a chunk; 15 seconds in all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lmcache.cache import KINDS, Heart
from lmcache.memory.headers import Headers

PROMPT_CHUNKS = 512
EXTENT_BYTES = 4096
HASH_BYTES = 16
Figure = tuple[float, float]  # least and median, microseconds


def measure(call: Callable[[], object], count: int) -> Figure:
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begin) * 1e6)
    return min(samples), statistics.median(samples)


class Filled:
    """A heart that is full: whole prompts, each stored by one reservation."""

    def __init__(self, chunks: int) -> None:
        self.dice, self.prompts = random.Random(1), max(1, chunks // PROMPT_CHUNKS)
        self.heart = Heart(self.prompts * PROMPT_CHUNKS * EXTENT_BYTES)
        self.heart.join(1, "bench")
        self.space = self.heart.open_space(1, b"f" * 16, 1, 0, EXTENT_BYTES)
        self.fill = measure(lambda: self.store(self.prompts), 1)[0] / self.prompts / PROMPT_CHUNKS
        self.keys = list(self.stored)

    def store(self, prompts: int = 1) -> None:
        self.stored = [self.dice.randbytes(PROMPT_CHUNKS * HASH_BYTES) for _ in range(prompts)]
        for hashes in self.stored:
            grant = self.heart.reserve(0.0, 1, self.space, 0, b"", True, hashes)
            assert not grant.refused
            self.heart.commit(0.0, 1, grant.reservation, True)

    def lookup(self) -> None:
        hit = self.heart.lookup(0.0, 1, self.space, self.dice.choice(self.keys))
        assert hit.chunks == PROMPT_CHUNKS
        self.heart.release(1, hit.lease)

    def take_region(self) -> None:
        """Another layout comes, and gets its first region."""
        self.heart.join(2, "other")
        space = self.heart.open_space(2, b"g" * 16, 1, 0, 2 * EXTENT_BYTES)
        assert not self.heart.reserve(0.0, 2, space, 0, b"", True, bytes(HASH_BYTES)).refused


def headers_of(chunks: int) -> Figure:
    """Microseconds a slot, to write its header and to erase it."""
    sectors, keys = range(chunks), bytes(HASH_BYTES * chunks)
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        headers = Headers(Path(name) / "bench.headers", bytes(16), chunks * EXTENT_BYTES)

        def both() -> None:
            headers.committed(bytes(16), 1, 0, EXTENT_BYTES, sectors, keys, keys)
            headers.freed(sectors)

        least, median = measure(both, 20)
        headers.close()
    return least / chunks / 2, median / chunks / 2


def figures(chunks: int) -> dict[str, Figure | float]:
    filled = Filled(chunks)
    rows: dict[str, Figure | float] = {
        "lookup and release of 512 chunks, us": measure(filled.lookup, 300),
        "reserve and commit into free memory, us a chunk": filled.fill,
    }
    least, median = measure(filled.store, 100)
    rows["reserve and commit with an eviction each, us a chunk"] = least / PROMPT_CHUNKS, median / PROMPT_CHUNKS
    rows["index bytes a chunk"] = filled.heart.index_bytes() / filled.heart.chunks
    rows["a region goes to another layout, us"] = measure(filled.take_region, 1)[0]
    rows["clear, us"] = measure(filled.heart.clear, 1)[0]
    filled.heart.events.listen(KINDS, lambda event: None)
    filled.store()
    filled.keys = filled.stored
    rows["the same lookup, with a listener to everything, us"] = measure(filled.lookup, 300)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    results: dict[str, dict[str, Figure | float]] = {f"{chunks:,} chunks": figures(chunks) for chunks in options.chunks}
    results["any size"] = {"a slot's header, written or erased, us": headers_of(4096)}
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        return
    for title, rows in results.items():
        print(title)
        for name, figure in rows.items():
            shown = f"{figure[0]:10.2f} {figure[1]:10.2f}" if isinstance(figure, tuple) else f"{figure:10.2f}"
            print(f"  {name:55} {shown}")


if __name__ == "__main__":
    main()
