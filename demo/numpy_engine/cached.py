"""The engine's talk with LMCache: look up a prompt, load what is there, store what was computed.

Nothing here raises for what the cache does or fails to do: the worst it can say is "nothing is there".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from demo.numpy_engine.model import ModelConfig
from demo.numpy_engine.paged import RankKV
from lmcache.chunks import HASH_BYTES, Layout, TokenChain, shard_of_rank
from lmcache.engine import Hit, Load, SchedulerSession, Store, WorkerSession
from lmcache.engine.connection import Endpoint, server_address


@dataclass
class Prompt:
    """What is known of one request's chunks: their hashes, and the first chunk that is not in the cache yet."""

    request_id: str
    chain: TokenChain
    next_chunk: int = 0
    jobs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Loaded:
    """Tokens whose KV is in the blocks now, and whether a copy may still be writing to the blocks (then: use others)."""

    tokens: int
    stuck: bool = False


class CacheConnection:
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

        host, _, port = address.rpartition(":")
        self._deadline_seconds = deadline_seconds
        scheduler = Endpoint(
            server_address(host or "localhost", int(port)),
            instance_id,
            "scheduler",
            deadline_seconds=deadline_seconds,
            transfer_mode=transfer_mode,
        )
        count = len(ranks)
        self._scheduler = SchedulerSession(scheduler, layout_for, count)
        self._workers = [
            WorkerSession(
                replace(scheduler, role="worker", rank=rank),
                layout_for,
                shard_of_rank(layout_for(1), rank, count, 0, model.layers),
                kv.describe(),
            )
            for rank, kv in enumerate(ranks)
        ]
        self._running: list[set[str]] = [set() for _ in ranks]
        """Jobs that a rank has not finished."""
        self._failed: set[str] = set()
        self._job_number = 0
        self.stored_tokens = 0
        """Tokens that the first rank has stored so far."""

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size, None while no server has been reached."""
        return self._scheduler.chunk_tokens

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait until the scheduler and every rank have reached the server; False after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        waits = [self._scheduler.wait_connected, *(worker.wait_connected for worker in self._workers)]
        return all(wait(max(0.0, deadline - time.monotonic())) for wait in waits)

    def open(self, request_id: str, cache_salt: str = "") -> Prompt | None:
        """Begin a request; None while there is no server, then nothing is looked up or stored for it."""
        chain = self._scheduler.new_chain(cache_salt=cache_salt)
        return Prompt(request_id, chain) if chain is not None else None

    def load(self, prompt: Prompt, token_ids: Sequence[int], blocks: Sequence[int], have: int) -> Loaded:
        """Fetch the KV of as many leading tokens as the cache holds; `have` of them are in the blocks already.

        The last token is never fetched, since the engine needs its logits.
        """
        chain = prompt.chain
        chain.extend(token_ids)
        hit = self._scheduler.lookup(chain, have, request_id=prompt.request_id)
        if hit is None:
            return Loaded(have)
        end = min(hit.chunks * chain.chunk_tokens, len(token_ids) - 1)
        if end <= have:
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
            worker.store(job, Store(chain.chunk_tokens, chain.parent(first), hashes, first, list(blocks)))
        prompt.next_chunk = end

    def poll(self) -> None:
        """Take note of the jobs that have finished."""
        for worker, running in zip(self._workers, self._running, strict=True):
            for done in worker.finished():
                running.discard(done.job_id)
                if not done.ok:
                    self._failed.add(done.job_id)
                elif done.kind == "store" and worker is self._workers[0]:
                    self.stored_tokens += done.tokens

    def busy(self, jobs: Iterable[str]) -> bool:
        """Whether one of the jobs may still touch paged KV, as of the last `poll`."""
        wanted = set(jobs)
        return any(wanted & running for running in self._running)

    def flush(self, jobs: Iterable[str] | None, timeout_seconds: float) -> bool:
        """Wait until the jobs (None: all) have finished; False when some are running after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        wanted = None if jobs is None else set(jobs)
        for worker, running in zip(self._workers, self._running, strict=True):
            self.poll()
            while running if wanted is None else running & wanted:
                left = deadline - time.monotonic()
                if left <= 0 or not worker.wait_finished(left):
                    return False
                self.poll()
        return True

    def close(self) -> None:
        """End the sessions; whatever was not committed is dropped by the server."""
        for worker in self._workers:
            worker.close()
        self._scheduler.close()

    def _new_job(self, prompt: Prompt) -> str:
        self._job_number += 1
        job = f"{prompt.request_id}/{self._job_number}"
        for running in self._running:
            running.add(job)
        prompt.jobs.add(job)
        return job

    def _copy_in(self, prompt: Prompt, hit: Hit, blocks: Sequence[int], have: int, end: int) -> Loaded:
        job = self._new_job(prompt)
        for rank, worker in enumerate(self._workers):
            extents = hit.shard_extents(rank)
            worker.load(job, Load(hit.epoch, hit.lease, hit.first_chunk, extents, have, end, list(blocks)))
        done = self.flush([job], self._deadline_seconds)
        if not done:
            for worker in self._workers:
                worker.wait([job], 0.0)
            done = self.flush([job], 0.0)
        ok = done and job not in self._failed
        self._scheduler.release(hit)
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
