"""The engine: one request at a time, through paged KV, with chunked prefill, greedy decoding, and LMCache if there is one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import numpy as np

from demo.numpy_engine.cached import CacheConnection, Prompt
from demo.numpy_engine.model import Context, Floats, Model, ModelConfig
from demo.numpy_engine.paged import BlockPool, OutOfBlocks, RankKV
from lmcache.engine import Copy
from lmcache.runtime import RUNTIME, Runtime


class UnfilledKV(Exception):
    """The logits are not finite: attention read KV that was neither computed nor loaded."""


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs its model.

    prefill_tokens: the longest run of tokens in one forward pass. kv_order: one of `KV_ORDERS`. ranks: the KV heads are
    split among so many, each with arrays and a worker session of its own, as with tensor parallelism. prefix_caching:
    keep the last request's blocks, and begin the next request with those that fit. poison: fill freed blocks with NaN,
    so that KV that was never loaded is noticed (`UnfilledKV`).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    num_blocks: int = 512
    block_tokens: int = 16
    prefill_tokens: int = 512
    kv_order: str = "nhd"
    ranks: int = 1
    prefix_caching: bool = False
    poison: bool = True


@dataclass(frozen=True)
class Result:
    """An answer. `logits_first` [vocab] are those of its first token; `hit_tokens` were loaded from LMCache;
    `own_tokens` came from the engine's own prefix cache; times are from the call of `generate`."""

    tokens: list[int]
    logits_first: Floats
    ttft_seconds: float
    seconds: float
    hit_tokens: int
    own_tokens: int = 0


class Engine:
    """A model, its paged KV, and a session with LMCache at `address` ("host:port"; None runs alone).

    >>> engine = Engine(EngineConfig(model=ModelConfig.tiny(), num_blocks=64))
    >>> len(engine.generate(range(100), max_tokens=3).tokens)
    3
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        address: str | None = None,
        *,
        instance_id: str = "",
        deadline_seconds: float = 2.0,
        transfer_mode: str = "auto",
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.config = config = config or EngineConfig()
        if config.model.kv_heads % config.ranks:
            raise ValueError(f"{config.model.kv_heads} KV heads cannot be split evenly among ranks={config.ranks}")
        self.model = Model(config.model)
        self.pool = BlockPool(config.num_blocks)
        heads = config.model.kv_heads // config.ranks
        self.ranks = [
            RankKV(config.model, heads, config.num_blocks, config.block_tokens, config.kv_order)
            for _ in range(config.ranks)
        ]
        self.instance_id = instance_id or f"numpy-{uuid4().hex}"
        self.cache: CacheConnection | None = None
        if address is not None:
            self.cache = CacheConnection(
                address, self.instance_id, config.model, self.ranks, deadline_seconds, transfer_mode, runtime
            )
        self._requests = 0
        self._held: list[tuple[list[int], list[Copy]]] = []
        """Blocks of finished requests that copies may still touch."""
        self._kept_tokens: list[int] = []
        self._kept_blocks: list[int] = []

    def generate(self, token_ids: Sequence[int], max_tokens: int = 8, cache_salt: str = "") -> Result:
        """Answer greedily: look up, load, prefill the rest, store the full chunks, decode.

        Raises:
            OutOfBlocks: prompt and answer do not fit in the free blocks. UnfilledKV: unwritten KV was read.
        """
        began = time.perf_counter()
        tokens = [int(token) for token in token_ids]
        if not tokens or max_tokens < 1:
            raise ValueError(f"{len(tokens)} prompt tokens and max_tokens={max_tokens}: both must be at least 1")
        self._requests += 1
        prompt = self.cache.open(f"{self.instance_id[:12]}-{self._requests}", cache_salt) if self.cache else None
        blocks, own = self._begin(tokens, len(tokens) + max_tokens)
        try:
            ready = self._load(prompt, tokens, blocks, own)
            logits = self._prefill(prompt, tokens, blocks, ready)
            ttft, first = time.perf_counter() - began, logits
            answer = [int(logits.argmax())]
            while len(answer) < max_tokens:
                tokens.append(answer[-1])
                logits = self._forward(tokens, len(tokens) - 1, len(tokens), blocks)
                answer.append(int(logits.argmax()))
            self._store(prompt, tokens, blocks)
        except BaseException:
            self._retire(prompt, blocks)
            raise
        self._finish(prompt, tokens, blocks)
        return Result(answer, first, ttft, time.perf_counter() - began, ready - own, own)

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait for the server (an engine need not: without one it computes). False after the timeout."""
        return self.cache is not None and self.cache.wait_connected(timeout_seconds)

    def flush(self, timeout_seconds: float = 10.0) -> bool:
        """Wait until everything computed so far is stored (or has failed to be); False after the timeout."""
        done = self.cache is None or self.cache.flush(None, timeout_seconds)
        self._reclaim()
        return done

    def drop(self) -> None:
        """Forget all KV of the engine's own: give every block back, and fill the free ones with NaN."""
        self.flush()
        self._release(self._kept_blocks)
        self._kept_tokens, self._kept_blocks = [], []
        self._poison(self.pool.free_blocks())

    def close(self) -> None:
        """Flush for at most a second, and close the connection to the server."""
        self.flush(1.0)
        if self.cache is not None:
            self.cache.close()

    def _begin(self, tokens: list[int], length: int) -> tuple[list[int], int]:
        """Blocks for `length` tokens, and how many tokens the engine's own prefix cache has put in them."""
        size = self.config.block_tokens
        pairs = zip(tokens[:-1], self._kept_tokens, strict=False)
        same = next(
            (at for at, (new, old) in enumerate(pairs) if new != old), min(len(tokens) - 1, len(self._kept_tokens))
        )
        reused = same // size
        blocks, rest = self._kept_blocks[:reused], self._kept_blocks[reused:]
        self._kept_tokens, self._kept_blocks = [], []
        self._release(rest)
        try:
            return blocks + self._take(-(-length // size) - reused), reused * size
        except OutOfBlocks:
            self._release(blocks)
            raise

    def _take(self, count: int) -> list[int]:
        self._reclaim()
        if count > self.pool.free_count and self._held:
            self.flush()
        return self.pool.take(count)

    def _load(self, prompt: Prompt | None, tokens: list[int], blocks: list[int], own: int) -> int:
        """Tokens that need no prefill. Where a late copy may still write to the blocks, `blocks` is filled with others."""
        if self.cache is None or prompt is None:
            return own
        loaded = self.cache.load(prompt, tokens, blocks, own)
        if not loaded.stuck:
            return loaded.tokens
        fresh = self._take(len(blocks))
        self._held.append((list(blocks), list(prompt.copies)))
        prompt.copies.clear()
        blocks[:] = fresh
        return 0

    def _prefill(self, prompt: Prompt | None, tokens: list[int], blocks: list[int], ready: int) -> Floats:
        logits = np.empty(0, np.float32)
        while ready < len(tokens):
            end = min(ready + self.config.prefill_tokens, len(tokens))
            began = self.cache.now if self.cache else 0.0
            logits = self._forward(tokens, ready, end, blocks)
            if self.cache:
                self.cache.computed(end - ready, self.cache.now - began)
            self._store(prompt, tokens[:end], blocks)
            ready = end
        return logits

    def _forward(self, tokens: list[int], first: int, end: int, blocks: list[int]) -> Floats:
        context = self._context(np.asarray(blocks), first, end)
        logits = self.model.forward(np.asarray(tokens[first:end]), first, context)
        if not np.isfinite(logits).all():
            raise UnfilledKV(f"no finite logits for tokens {first} to {end}: KV before them was never filled")
        return logits

    def _context(self, table: np.ndarray[tuple[int], np.dtype[np.int64]], first: int, end: int) -> Context:
        size = self.config.block_tokens
        positions = np.arange(first, end)
        at, offset = table[positions // size], positions % size
        used = table[: -(-end // size)]

        def context(layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
            all_keys, all_values = [], []
            for rank, kv in enumerate(self.ranks):
                heads = slice(rank * kv.heads, (rank + 1) * kv.heads)
                kv.keys[layer][at, offset] = keys[:, heads]
                kv.values[layer][at, offset] = values[:, heads]
                all_keys.append(_read(kv.keys[layer], used, end))
                all_values.append(_read(kv.values[layer], used, end))
            return np.concatenate(all_keys), np.concatenate(all_values)

        return context

    def _store(self, prompt: Prompt | None, tokens: list[int], blocks: list[int]) -> None:
        if self.cache is not None and prompt is not None:
            self.cache.store(prompt, tokens, blocks)

    def _finish(self, prompt: Prompt | None, tokens: list[int], blocks: list[int]) -> None:
        """Keep the blocks for the next request, once no job touches them, or give them back."""
        if self.config.prefix_caching and self._settled(prompt):
            self._kept_tokens, self._kept_blocks = tokens, blocks
        else:
            self._retire(prompt, blocks)

    def _settled(self, prompt: Prompt | None) -> bool:
        return self.cache is None or prompt is None or self.cache.flush(prompt.copies, 2.0)

    def _retire(self, prompt: Prompt | None, blocks: list[int]) -> None:
        """Give the blocks back: at once, or when the last job that touches them has finished."""
        self._held.append((blocks, prompt.copies if prompt else []))
        self._reclaim()

    def _reclaim(self) -> None:
        """Give back the blocks of finished requests that no job touches any more."""
        if self.cache is not None:
            self.cache.poll()
        held, self._held = self._held, []
        for blocks, copies in held:
            if self.cache is not None and self.cache.busy(copies):
                self._held.append((blocks, copies))
            else:
                self._release(blocks)

    def _release(self, blocks: list[int]) -> None:
        if self.config.poison:
            self._poison(blocks)
        self.pool.give_back(blocks)

    def _poison(self, blocks: list[int]) -> None:
        for kv in self.ranks:
            kv.poison(blocks)


def _read(view: Floats, blocks: np.ndarray[tuple[int], np.dtype[np.int64]], end: int) -> Floats:
    """KV of the first `end` tokens, [head][token][dim]."""
    heads, dims = view.shape[2:]
    return np.ascontiguousarray(view[blocks].reshape(-1, heads, dims)[:end].transpose(1, 0, 2))
