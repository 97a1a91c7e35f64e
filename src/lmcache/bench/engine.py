"""A stand-in for an engine: paged KV in NumPy, copied through the sessions that real engines use."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmcache.chunks import HASH_BYTES, Layout, TokenChain, shard_of_rank
from lmcache.engine import Done, Hit, Load, SchedulerSession, Store, WorkerSession
from lmcache.engine.connection import Connection
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.errors import ServerUnavailable
from lmcache.transfer.paged import PagedKV, Plane
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier

ITEM_BYTES = 2
CONNECT_SECONDS, DEADLINE_SECONDS = 10.0, 30.0


@dataclass(frozen=True)
class Model:
    """The sizes of a model's KV. Elements have 2 bytes; the paged order is [K, V][block][token][KV head][head dim]."""

    name: str
    layers: int
    heads: int
    head_size: int
    blocks: int
    block_tokens: int = 16

    def layout(self, chunk_tokens: int) -> Layout:
        return Layout(f"bench-{self.name}", "bfloat16", self.layers, self.heads, self.head_size, chunk_tokens)


class Prompt:
    """A request's tokens, its chunk hashes once they are computed, and the lease of its last lookup."""

    __slots__ = ("chain", "hit", "token_ids")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.chain: TokenChain | None = None
        self.hit: Hit | None = None


class BenchEngine:
    """One engine of one rank: scheduler and worker sessions over `model`'s KV. Every call waits for its result.

    Args:
        address: tcp://host:port of the server.
        threads: copy threads of the worker.
        scheduler_only: make no KV and no worker; `store` and `retrieve` must not be called.

    Raises:
        ServerUnavailable: no server answers there within 10 seconds.
    """

    def __init__(self, model: Model, address: str, threads: int = 1, scheduler_only: bool = False) -> None:
        self.model = model
        instance = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
        endpoint = functools.partial(Endpoint, address, instance, deadline_seconds=DEADLINE_SECONDS)
        self._jobs = itertools.count()
        self._scheduler = SchedulerSession(endpoint("scheduler"), GroupShape(model.layout, 1))
        self._pinger = Connection(endpoint("ping"), _nothing_to_register)
        self._worker: WorkerSession | None = None
        if not scheduler_only:
            self.paged = make_paged(model)
            shard = shard_of_rank(model.layout(1), 0, 1, 0, model.layers)
            group = RankGroup(model.layout, shard, self.paged)
            self._worker = WorkerSession(endpoint("worker"), group, threads=threads)
        waits = [self._scheduler.wait_connected, self._pinger.wait_connected]
        waits += [self._worker.wait_connected] if self._worker else []
        if not all(wait(CONNECT_SECONDS) for wait in waits):
            self.close()
            raise ServerUnavailable(f"no usable LMCache server at {address}: see the warnings above, or start one")
        assert self._scheduler.chunk_tokens is not None
        self.chunk_tokens: int = self._scheduler.chunk_tokens

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_tokens * self.model.layers * 2 * self.model.heads * self.model.head_size * ITEM_BYTES

    def prompt(self, token_ids: Sequence[int]) -> Prompt:
        return Prompt(token_ids)

    def lookup(self, prompt: Prompt) -> int:
        """Return the length of the hit in chunks, leased until `release`. Hashes the prompt unless that was done before."""
        prompt.hit = self._scheduler.lookup(self._chain(prompt))
        return prompt.hit.chunks if prompt.hit else 0

    def release(self, prompt: Prompt) -> None:
        if prompt.hit is not None:
            self._scheduler.release(prompt.hit)
            prompt.hit = None

    def store(self, prompt: Prompt, first: int, end: int, blocks: list[int]) -> bool:
        """Store chunks [first, end) from `blocks`, the block table from token 0 on. Return True when all were stored."""
        assert self._worker is not None
        chain, job = self._chain(prompt), str(next(self._jobs))
        hashes = chain.hashes[first * HASH_BYTES : end * HASH_BYTES]
        self._worker.store(job, Store(self.chunk_tokens, chain.parent(first), hashes, first, blocks))
        return self._finish(self._worker).tokens == (end - first) * self.chunk_tokens

    def retrieve(self, prompt: Prompt, chunks: int, blocks: list[int]) -> bool:
        """Load the first `chunks` chunks of the last lookup into `blocks`. Return whether that succeeded."""
        assert self._worker is not None
        hit = prompt.hit
        if hit is None or hit.chunks < chunks:
            return False
        tokens = chunks * self.chunk_tokens
        load = Load(hit.epoch, hit.lease, 0, hit.shard_extents(0)[: 4 * chunks], 0, tokens, blocks)
        self._worker.load(str(next(self._jobs)), load)
        return self._finish(self._worker).ok

    def empty_call(self) -> None:
        """Make the cheapest round trip: a ping over the same kind of connection."""
        self._pinger.call(m.Ping(), m.Ok)

    def close(self) -> None:
        """End the sessions, so that the server frees what this engine held."""
        for session in (self._scheduler, self._pinger, self._worker):
            if session is not None:
                session.close()

    def _chain(self, prompt: Prompt) -> TokenChain:
        if prompt.chain is None:
            chain = self._scheduler.new_chain()
            assert chain is not None  # __init__ has waited for the server
            chain.extend(prompt.token_ids)
            prompt.chain = chain
        return prompt.chain

    @staticmethod
    def _finish(worker: WorkerSession) -> Done:
        while True:
            worker.wait_finished(60.0)
            for done in worker.finished():
                return done


def make_paged(model: Model) -> PagedKV:
    """Return paged KV of the model in touched memory, with a different value in each plane."""
    shape = (2 * model.layers, model.blocks, model.block_tokens, model.heads, model.head_size)
    kv = np.empty(shape, dtype=np.uint16)
    kv[:] = np.arange(1, shape[0] + 1, dtype=np.uint16).reshape(-1, 1, 1, 1, 1)
    planes = []
    for plane in kv:
        block, token, head, dim = plane.strides
        planes.append(Plane.strided(plane.ctypes.data, block, token, model.heads, head, model.head_size, dim))
    return PagedKV(tuple(planes), model.block_tokens, model.blocks, ITEM_BYTES, keepalive=kv)


def _nothing_to_register(carrier: Carrier, welcome: m.Welcome, descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
