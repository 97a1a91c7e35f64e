"""The engine's talk with LMCache: look up a prompt, load what is there, store what was computed.

Nothing here raises for what the cache does or fails to do: the worst it can say is "nothing is there".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmcache.chunks import HASH_BYTES, Layout, TokenChain, shard_of_rank
from lmcache.engine import Hit, Load, SchedulerSession, Store, WorkerSession
from lmcache.integration.numpy.model import ModelConfig
from lmcache.integration.numpy.paged import RankKV

_POLL_SECONDS = 0.0002
"""A worker tells of finished jobs only when asked, as engines ask once a step; a load takes some milliseconds."""


@dataclass
class Prompt:
    """What is known of one request's chunks: their hashes, and the first chunk that is not in the cache yet."""

    request_id: str
    chain: TokenChain
    epoch: int
    next_chunk: int = 0
    jobs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Loaded:
    """Tokens whose KV is in the blocks now, and whether a copy may still be writing to the blocks (then: use others)."""

    tokens: int
    stuck: bool = False


class CacheLink:
    """Sessions of the scheduler and of each rank's worker, and the jobs that still touch paged KV."""

    def __init__(
        self,
        address: str,
        instance_id: str,
        model: ModelConfig,
        ranks: Sequence[RankKV],
        deadline_seconds: float = 2.0,
        transfer_mode: str = "auto",
    ) -> None:
        def layout_for(chunk_tokens: int) -> Layout:
            return layout_of(model, chunk_tokens)

        count = len(ranks)
        self._deadline_seconds = deadline_seconds
        self._scheduler = SchedulerSession(address, instance_id, layout_for, count, deadline_seconds)
        shards = [shard_of_rank(layout_for(1), rank, count, 0, model.layers) for rank in range(count)]
        self._workers = [
            WorkerSession(address, instance_id, layout_for, shard, kv.describe(), deadline_seconds, transfer_mode)
            for shard, kv in zip(shards, ranks, strict=True)
        ]
        self._running: dict[str, int] = {}
        """Job -> ranks that have not finished it."""
        self._failed: set[str] = set()
        self._job_number = 0
        self.stored_tokens = 0
        """Tokens that every rank has stored so far."""

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size, None while no server has been reached."""
        return self._scheduler.chunk_tokens

    def open(self, request_id: str, cache_salt: str = "") -> Prompt | None:
        """Begin a request; None while there is no server, then nothing is looked up or stored for it."""
        epoch = self._scheduler.epoch
        chain = self._scheduler.new_chain(cache_salt=cache_salt)
        return Prompt(request_id, chain, epoch) if chain is not None else None

    def load(self, prompt: Prompt, token_ids: Sequence[int], blocks: Sequence[int], have: int) -> Loaded:
        """Fetch the KV of as many leading tokens as the cache holds; `have` of them are in the blocks already.

        The last token is never fetched, since the engine needs its logits.
        """
        chain = prompt.chain
        chain.extend(token_ids)
        hit = self._scheduler.lookup(chain, prompt.request_id) if len(chain) else None
        if hit is None:
            return Loaded(have)
        end = min(hit.chunks * chain.chunk_tokens, len(token_ids) - 1)
        if hit.epoch != prompt.epoch or end <= have:
            self._scheduler.release(hit)
            return Loaded(have)
        return self._copy_in(prompt, hit, blocks, have, end)

    def store(self, prompt: Prompt, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Store the full chunks of `token_ids`, whose KV is in the blocks, that the cache does not hold; returns at once."""
        chain = prompt.chain
        chain.extend(token_ids)
        first, end = prompt.next_chunk, len(token_ids) // chain.chunk_tokens
        if first >= end:
            return
        hashes = chain.hashes[first * HASH_BYTES : end * HASH_BYTES]
        job = self._new_job(prompt)
        for worker in self._workers:
            worker.store(job, Store(prompt.epoch, chain.parent(first), hashes, first, list(blocks)))
        prompt.next_chunk = end

    def poll(self) -> None:
        """Take note of the jobs that have finished."""
        for worker in self._workers:
            for done in worker.finished():
                if not done.ok:
                    self._failed.add(done.job_id)
                self._running[done.job_id] -= 1
                if not self._running[done.job_id]:
                    del self._running[done.job_id]
                    if done.kind == "store" and done.job_id not in self._failed:
                        self.stored_tokens += done.tokens

    def busy(self, jobs: Iterable[str]) -> bool:
        """Whether one of the jobs may still touch paged KV, as of the last `poll`."""
        return any(job in self._running for job in jobs)

    def flush(self, jobs: Iterable[str] | None, timeout_seconds: float) -> bool:
        """Wait until the jobs (None: all) have finished; False when some are running after the timeout."""
        wanted = None if jobs is None else list(jobs)
        deadline = time.monotonic() + timeout_seconds
        while True:
            self.poll()
            if not self.busy(self._running if wanted is None else wanted):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End the sessions; whatever was not committed is dropped by the server."""
        for worker in self._workers:
            worker.close()
        self._scheduler.close()

    def _new_job(self, prompt: Prompt) -> str:
        self._job_number += 1
        job = f"{prompt.request_id}/{self._job_number}"
        self._running[job] = len(self._workers)
        prompt.jobs.add(job)
        return job

    def _copy_in(self, prompt: Prompt, hit: Hit, blocks: Sequence[int], have: int, end: int) -> Loaded:
        began, size = time.perf_counter(), prompt.chain.chunk_tokens
        first = have // size
        slots = np.frombuffer(hit.slots, dtype="<u4").reshape(hit.chunks, len(self._workers))[first:]
        job = self._new_job(prompt)
        for rank, worker in enumerate(self._workers):
            pages = slots[:, rank].tobytes()
            worker.load(job, Load(hit.arena, hit.lease, first, pages, have, end, list(blocks)))
        done = self.flush([job], self._deadline_seconds)
        if not done:
            for worker in self._workers:
                worker.wait([job], 0.0)
            done = self.flush([job], 0.0)
        ok = done and job not in self._failed
        self._scheduler.release(hit, end - have if ok else 0, time.perf_counter() - began)
        if not ok:
            return Loaded(have, stuck=not done)
        prompt.next_chunk = hit.chunks
        return Loaded(end)


def layout_of(model: ModelConfig, chunk_tokens: int) -> Layout:
    """The layout of a model's KV. Weights follow from shape and seed, so those are the model's identity."""
    return Layout(
        model_id=f"numpy-decoder-v1/{model}",
        kv_dtype="float32",
        num_layers=model.layers,
        num_kv_heads=model.kv_heads,
        head_size=model.head_dim,
        chunk_tokens=chunk_tokens,
        config_digest=f"rope_theta={model.rope_theta}",
    )
