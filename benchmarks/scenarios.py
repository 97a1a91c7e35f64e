"""The timed loops, the same for every cache. They return raw samples; what they mean is decided by who called them.

Runs under the peer's Python as well: standard library only.
"""

from __future__ import annotations

import dataclasses
import random
import resource
import time
from typing import Any, Protocol

VOCABULARY = 150_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's KV in the engine: [layer][K, V][block][token][kv head][head dim], 2-byte elements."""

    name: str
    layers: int
    heads: int
    head_size: int
    blocks: int
    chunk_tokens: int = 256
    block_tokens: int = 16

    @property
    def planes(self) -> int:
        return 2 * self.layers

    @property
    def block_bytes(self) -> int:
        """Of one plane."""
        return self.block_tokens * self.heads * self.head_size * 2

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_tokens // self.block_tokens

    @property
    def chunk_bytes(self) -> int:
        return self.planes * self.blocks_per_chunk * self.block_bytes


SHAPES = {
    "big": Shape("big", 32, 8, 128, blocks=512),
    "mid": Shape("mid", 16, 4, 128, blocks=400),
    "small": Shape("small", 4, 2, 64, blocks=1024),
    "tiny": Shape("tiny", 1, 1, 1, blocks=64, chunk_tokens=16),
}


class Cache(Protocol):
    """What a scenario may ask of a cache. A prompt is whatever `prompt` returns."""

    shape: Shape

    def prompt(self, token_ids: list[int]) -> Any:
        """A request for these tokens of which nothing was computed yet."""

    def lookup(self, prompt: Any, pause_seconds: float = 0.0) -> int:
        """Chunks present, from the first on; they stay until `release`. pause_seconds: between questions while a tier loads."""

    def release(self, prompt: Any) -> None:
        """Give back what `lookup` held, and end the request."""

    def store(self, prompt: Any, first: int, end: int, blocks: list[int]) -> bool:
        """Store chunks [first, end); `blocks` is the block table from token 0. Returns when they can be found."""

    def retrieve(self, prompt: Any, chunks: int, blocks: list[int]) -> bool:
        """Load the first `chunks` chunks of the last lookup into `blocks`. Returns when the KV is in place."""

    def empty_call(self) -> None:
        """The cheapest round trip that there is."""


class Scenarios:
    """One cache, one source of random prompts, and the loops."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.shape = cache.shape
        self._random = random.Random(seed)
        self._kept: dict[int, tuple[list[int], Any]] = {}
        self._filled: list[Any] = []
        self._drawn: list[int] = []
        self._order = list(range(self.shape.blocks))
        self._random.shuffle(self._order)

    def tokens(self, chunks: int) -> list[int]:
        return self._random.choices(range(VOCABULARY), k=chunks * self.shape.chunk_tokens)

    def blocks(self, chunks: int, turn: int = 0) -> list[int]:
        """A block table for `chunks` chunks: scattered over the paged memory, another place each turn."""
        needed, order = chunks * self.shape.blocks_per_chunk, self._order
        start = turn * needed % len(order)
        return [order[(start + number) % len(order)] for number in range(needed)]

    # Round trips

    def empty_calls(self, count: int) -> list[float]:
        return [_timed(self.cache.empty_call) for _ in range(count)]

    def keep(self, chunks: int) -> int:
        """Store a prompt of so many chunks, for `lookups`; returns how many of them can be found."""
        token_ids, step = self.tokens(chunks), max(1, self.shape.blocks // self.shape.blocks_per_chunk)
        prompt = self.cache.prompt(token_ids)
        self.cache.lookup(prompt)
        for first in range(0, chunks, step):
            self.cache.store(prompt, first, min(chunks, first + step), self.blocks(chunks))
        self.cache.release(prompt)
        prompt = self.cache.prompt(token_ids)
        found = self.cache.lookup(prompt)
        self.cache.release(prompt)
        self._kept[chunks] = token_ids, prompt
        return found

    def kept_tokens(self, chunks: int) -> list[int]:
        """What `keep` stored, for another process's `expect`."""
        return self._kept[chunks][0]

    def expect(self, token_ids: list[int]) -> None:
        """Let `lookups_for` ask for what another process has kept."""
        self._kept[len(token_ids) // self.shape.chunk_tokens] = token_ids, None

    def lookups(self, chunks: int, count: int, known: bool) -> list[float]:
        """Seconds of a full hit each: from a Python list, or (`known`) with the hashes of an earlier lookup."""
        token_ids, prompt = self._kept[chunks]
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            if not known:
                prompt = self.cache.prompt(token_ids)
            found = self.cache.lookup(prompt)
            samples.append(time.perf_counter() - start)
            self.cache.release(prompt)
            if found != chunks:
                raise RuntimeError(f"a lookup of {chunks} stored chunks found {found}")
        return samples

    def lookups_for(self, seconds: float) -> dict[str, float]:
        """As many one-chunk lookups (and releases) as fit."""
        token_ids, _ = self._kept[1]
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            prompt = self.cache.prompt(token_ids)
            if self.cache.lookup(prompt) != 1:
                raise RuntimeError("a chunk that is kept was not found")
            self.cache.release(prompt)
            done += 1
        return {"lookups": done, "seconds": time.perf_counter() - start}

    # Large indexes

    def fill(self, prompts: int, chunks: int) -> None:
        """Store so many new prompts, and remember their hashes for `filled_lookups`. Ours only."""
        for _ in range(prompts):
            prompt = self.cache.prompt(self.tokens(chunks))
            if not self.cache.store(prompt, 0, chunks, self.blocks(chunks)):
                raise RuntimeError(f"a prompt of {chunks} chunks was not stored whole")
            prompt.token_ids = []  # hashed by now, and a million chunks of ids are a lot
            self._filled.append(prompt)

    def filled_lookups(self, chunks: int, count: int) -> list[float]:
        """Seconds for a lookup of a random filled prompt, hashes known."""
        samples = []
        for _ in range(count):
            prompt = self._random.choice(self._filled)
            start = time.perf_counter()
            found = self.cache.lookup(prompt)
            samples.append(time.perf_counter() - start)
            self.cache.release(prompt)
            if found != chunks:
                raise RuntimeError(f"a stored prompt of {chunks} chunks has only {found}")
        return samples

    # Copies

    def stores(self, chunks: int, count: int) -> dict[str, Any]:
        """Seconds of storing a new prompt of so many chunks, each; all of them must be found afterwards."""
        samples, found, prompts, before = [], 0, [], cpu_seconds()
        for turn in range(count):
            prompt = self.cache.prompt(self.tokens(chunks))
            blocks = self.blocks(chunks, turn)
            self.cache.lookup(prompt)
            start = time.perf_counter()
            self.cache.store(prompt, 0, chunks, blocks)
            samples.append(time.perf_counter() - start)
            self.cache.release(prompt)
            prompts.append(prompt)
        cpu = cpu_seconds() - before
        for prompt in prompts:
            found += self.cache.lookup(prompt)
            self.cache.release(prompt)
        if found < chunks * count:
            raise RuntimeError(f"of {chunks * count} chunks that were stored, {found} can be found")
        self._kept[chunks] = [], prompts[-1]
        return {"seconds": samples, "cpu": cpu}

    def retrieves(self, chunks: int, count: int) -> dict[str, Any]:
        """Seconds of loading the prompt that `stores` left last, into other blocks each time."""
        prompt, samples, before = self._kept[chunks][1], [], cpu_seconds()
        for turn in range(count):
            blocks = self.blocks(chunks, turn + 1)
            found = self.cache.lookup(prompt)
            start = time.perf_counter()
            done = self.cache.retrieve(prompt, chunks, blocks) if found == chunks else False
            samples.append(time.perf_counter() - start)
            self.cache.release(prompt)
            if not done:
                raise RuntimeError(f"a retrieve of {chunks} chunks failed; the lookup found {found}")
        return {"seconds": samples, "cpu": cpu_seconds() - before}

    # Tiers

    def draw(self, chunks: int) -> None:
        """A new prompt for `put` and `fetch`."""
        self._drawn = self.tokens(chunks)

    def put(self) -> float:
        """Seconds of storing the drawn prompt, until L1 has it. Nobody has looked for it: our server remembers for a second that
        no tier had a prompt, and `fetch` may come sooner."""
        chunks = len(self._drawn) // self.shape.chunk_tokens
        blocks, start = self.blocks(chunks), time.perf_counter()
        prompt = self.cache.prompt(self._drawn)
        stored = self.cache.store(prompt, 0, chunks, blocks)
        seconds = time.perf_counter() - start
        self.cache.release(prompt)
        if not stored:
            raise RuntimeError(f"a prompt of {chunks} chunks was not stored")
        return seconds

    def fetch(self, pause_seconds: float) -> float:
        """Seconds from the lookup of the drawn prompt until L1 has all of it, ready to be retrieved; then retrieve it."""
        chunks = len(self._drawn) // self.shape.chunk_tokens
        start = time.perf_counter()
        prompt = self.cache.prompt(self._drawn)
        found = self.cache.lookup(prompt, pause_seconds)
        seconds = time.perf_counter() - start
        done = found == chunks and self.cache.retrieve(prompt, chunks, self.blocks(chunks))
        self.cache.release(prompt)
        if not done:
            raise RuntimeError(f"of {chunks} chunks that a tier had, {found} came and could not be retrieved whole")
        return seconds

    # Full caches

    def burst(self, chunks: int, documents: int, bytes_per_second: float) -> dict[str, float]:
        """Offer new documents at a steady rate, and look for each right after its store."""
        period = chunks * self.shape.chunk_bytes / bytes_per_second
        kept, start = 0, time.perf_counter()
        for turn in range(documents):
            prompt = self.cache.prompt(self.tokens(chunks))
            self.cache.lookup(prompt)
            self.cache.store(prompt, 0, chunks, self.blocks(chunks, turn))
            self.cache.release(prompt)
            kept += self.cache.lookup(prompt)
            self.cache.release(prompt)
            time.sleep(max(0.0, start + (turn + 1) * period - time.perf_counter()))
        seconds = time.perf_counter() - start
        return {
            "kept": kept / (documents * chunks),
            "bytes_per_second": documents * chunks * self.shape.chunk_bytes / seconds,
        }

    def hit_rate(self, chunks: int, documents: int, accesses: list[int], measured_from: int) -> dict[str, float]:
        """Chunks found among chunks asked, when each access loads what is there and stores the rest."""
        library = [self.tokens(chunks) for _ in range(documents)]
        hits = 0
        for turn, document in enumerate(accesses):
            prompt = self.cache.prompt(library[document])
            blocks = self.blocks(chunks, turn)
            found = self.cache.lookup(prompt)
            if turn >= measured_from:
                hits += found
            if found:
                self.cache.retrieve(prompt, found, blocks)
            if found < chunks:
                self.cache.store(prompt, found, chunks, blocks)
            self.cache.release(prompt)
        return {"rate": hits / (chunks * (len(accesses) - measured_from))}


def cpu_seconds() -> float:
    """CPU time of this process so far, user and kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
