"""The index alone, in process: how the heart's lookup grows with the number of chunks, beside a dictionary of the same size."""

from __future__ import annotations

import random
import time

from benchmarks.rows import Goal, Row
from benchmarks.sides import Plan
from lmcache.cache import Heart

PROMPT_CHUNKS = 512
EXTENT_BYTES = 4096


class FilledHeart:
    """A heart with `chunks` committed chunks: prompts of 512 whose first hash is their number."""

    def __init__(self, chunks: int) -> None:
        self.heart = Heart(chunks * EXTENT_BYTES * 5 // 4 + (256 << 20))
        self.heart.join(1, "bench")
        self.space = self.heart.open_space(1, b"f" * 16, 1, 0, EXTENT_BYTES)
        self.prompts = max(1, chunks // PROMPT_CHUNKS)
        for prompt in range(self.prompts):
            grant = self.heart.reserve(0.0, 1, self.space, 0, b"", True, keys(prompt))
            if grant.refused:
                raise RuntimeError(f"the heart refused {grant.refused} chunks of prompt {prompt}: {grant.reason}")
            self.heart.commit(0.0, 1, grant.reservation, True)

    def lookups(self, count: int, rng: random.Random) -> list[float]:
        """Seconds of a lookup of a random prompt, each."""
        samples = []
        for _ in range(count):
            hashes = keys(rng.randrange(self.prompts))
            start = time.perf_counter()
            hit = self.heart.lookup(0.0, 1, self.space, hashes)
            samples.append(time.perf_counter() - start)
            assert hit.chunks == PROMPT_CHUNKS
            self.heart.release(1, hit.lease)
        return samples


def keys(prompt: int) -> bytes:
    """16-byte hashes, as evenly spread as real ones."""
    return random.Random(prompt).randbytes(16 * PROMPT_CHUNKS)


def dictionary(chunks: int) -> dict[bytes, int]:
    index: dict[bytes, int] = {}
    for prompt in range(max(1, chunks // PROMPT_CHUNKS)):
        joined = keys(prompt)
        for at in range(0, len(joined), 16):
            index[joined[at : at + 16]] = len(index)
    return index


def dictionary_lookups(index: dict[bytes, int], count: int, rng: random.Random) -> list[float]:
    """Seconds for the same question to a plain dictionary: slots of 512 keys."""
    samples = []
    for _ in range(count):
        hashes = keys(rng.randrange(len(index) // PROMPT_CHUNKS))
        start = time.perf_counter()
        for at in range(0, len(hashes), 16):
            index.get(hashes[at : at + 16])
        samples.append(time.perf_counter() - start)
    return samples


def index_in_process(plan: Plan, most: int) -> list[Row]:
    """Rows for 1,000 and `most` chunks and their quotient, and bytes of index a chunk."""
    rows = []
    medians: dict[str, list[float]] = {"ours": [], "limit": []}
    for chunks in (1_024, most):
        row = Row(f"index-{chunks}", f"512-chunk lookup in the heart, {chunks:,} chunks", "ms", None, "limit: a dict")
        filled, index = FilledHeart(chunks), dictionary(chunks)
        for _ in range(plan.rounds):
            row.add("ours", [one * 1e3 for one in filled.lookups(plan.count(100), plan.rng)])
            row.add("limit", [one * 1e3 for one in dictionary_lookups(index, plan.count(100), plan.rng)])
        for side, kept in medians.items():
            shown = row.figure(side)
            assert shown is not None
            kept.append(shown.median)
        rows.append(row)
    growth = Row(
        "index-growth", f"growth of that from 1,024 to {most:,} chunks", "x", Goal(1.2, "less", 1.0), "limit: a dict"
    )
    for side, (few, many) in medians.items():
        growth.add(side, [many / few])
    size = Row("index-bytes", "index memory a chunk", "bytes", Goal(300, "less"))
    size.add("ours", [filled.heart.index_bytes() / filled.heart.chunks])
    return [*rows, growth, size]
