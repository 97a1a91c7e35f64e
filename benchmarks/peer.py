"""LMCache 0.5.6, driven through its own public client classes the way its vLLM adapter drives them.

Runs under the peer's Python, where `lmcache` is the peer.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import torch
import zmq
from lmcache.v1.multiprocess.group_view import EngineGroupInfo
from lmcache.v1.multiprocess.transfer_context import create_transfer_context
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

from benchmarks.scenarios import Shape
from lmcache.utils import EngineType
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

DEADLINE_SECONDS = 120


class PeerPrompt:
    """One request: its tokens, and the chunks that its last lookup locked."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids
        self.request_id = ""
        self.locked = 0


class PeerCache:
    """`benchmarks.scenarios.Cache` over the peer's engine-driven transfer (its best mode on a CPU)."""

    _requests = itertools.count()

    def __init__(self, shape: Shape, address: str, threads: int, scheduler_only: bool = False) -> None:
        torch.set_num_threads(threads)
        self.shape = shape
        self._client = RequestClientFactory.create(address, context=zmq.Context())
        served = int(self._client.get_chunk_size().result(timeout=DEADLINE_SECONDS))
        if served != shape.chunk_tokens:
            raise RuntimeError(
                f"the peer's server has chunks of {served} tokens, the benchmark wants {shape.chunk_tokens}"
            )
        if not scheduler_only:
            self._register()

    def _register(self) -> None:
        shape = self.shape
        size = (2, shape.blocks, shape.block_tokens, shape.heads, shape.head_size)
        self._kv = {
            f"layer.{layer}": torch.full(size, layer + 1, dtype=torch.bfloat16) for layer in range(shape.layers)
        }
        self._transfer = create_transfer_context(
            self._kv, mode="engine_driven", instance_id=os.getpid(), req_client=self._client
        )
        group = EngineGroupInfo(
            engine_group_id=0, layer_indices=tuple(range(shape.layers)), tokens_per_block=shape.block_tokens
        )
        self._transfer.register(
            self._kv,
            shape.name,
            1,
            shape.blocks_per_chunk,
            float(DEADLINE_SECONDS),
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[group],
            engine_type=EngineType.VLLM,
        )

    def prompt(self, token_ids: list[int]) -> PeerPrompt:
        return PeerPrompt(tuple(token_ids))

    def lookup(self, prompt: PeerPrompt, pause_seconds: float = 0.0) -> int:
        prompt.request_id = f"{os.getpid()}-{next(self._requests)}"
        chunks = len(prompt.token_ids) // self.shape.chunk_tokens
        self._client.lookup(self._key(prompt, 0, chunks, None), 1).result(timeout=DEADLINE_SECONDS)
        while True:
            found = self._client.query_prefetch_status(prompt.request_id).result(timeout=DEADLINE_SECONDS)
            if found is not None:
                prompt.locked = int(found)
                return prompt.locked
            if pause_seconds:
                time.sleep(pause_seconds)

    def release(self, prompt: PeerPrompt) -> None:
        if prompt.locked:
            key = self._key(prompt, 0, prompt.locked, None)
            self._client.free_lookup_locks(key, 1).result(timeout=DEADLINE_SECONDS)
            prompt.locked = 0
        self._client.end_session(prompt.request_id).result(timeout=DEADLINE_SECONDS)

    def store(self, prompt: PeerPrompt, first: int, end: int, blocks: list[int]) -> bool:
        per_chunk = self.shape.blocks_per_chunk
        return bool(
            self._transfer.submit_store(
                prompt.request_id,
                self._key(prompt, first, end, 0),
                self._kv,
                [blocks[first * per_chunk : end * per_chunk]],
                self._transfer.create_recorded_event(),
                per_chunk,
            ).result(timeout=DEADLINE_SECONDS)
        )

    def retrieve(self, prompt: PeerPrompt, chunks: int, blocks: list[int]) -> bool:
        per_chunk = self.shape.blocks_per_chunk
        done = self._transfer.submit_retrieve(
            prompt.request_id,
            self._key(prompt, 0, chunks, 0),
            self._kv,
            [blocks[: chunks * per_chunk]],
            self._transfer.create_recorded_event(),
            per_chunk,
            skip_first_n_tokens=0,
        ).result(timeout=DEADLINE_SECONDS)
        prompt.locked = 0  # a retrieve takes the locks with it
        return bool(done)

    def empty_call(self) -> None:
        self._client.get_chunk_size().result(timeout=DEADLINE_SECONDS)

    def _key(self, prompt: PeerPrompt, first: int, end: int, worker: int | None) -> Any:
        return IPCCacheServerKey(
            model_name=self.shape.name,
            world_size=1,
            num_kv_readers=1,
            worker_id=worker,
            token_ids=prompt.token_ids,
            start=first * self.shape.chunk_tokens,
            end=end * self.shape.chunk_tokens,
            request_id=prompt.request_id,
        )
