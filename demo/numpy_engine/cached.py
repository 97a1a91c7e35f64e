"""The engine's calls to LMCache: look up a prompt, load the KV that was found, store the KV that was computed.

Nothing here raises for what the cache does or fails to do: the worst it can say is "nothing is there".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from demo.numpy_engine.model import ModelConfig
from demo.numpy_engine.paged import RankKV
from lmcache.chunks import Layout, shard_of_rank
from lmcache.engine import Copies, Copy, Request, Requests, SchedulerSession, StorePlan, WorkerSession
from lmcache.engine.embedded import wait_connected
from lmcache.engine.endpoint import Endpoint, server_address
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.runtime import RUNTIME, Runtime


@dataclass
class Prompt(Request):
    """The state of one request. copies: those that may still touch paged KV."""

    copies: list[Copy] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """Tokens whose KV is in the blocks now, and whether a copy may still be writing to the blocks (then: use others)."""

    tokens: int
    stuck: bool = False


class CacheConnection:
    """The requests of the scheduler, and the copies of each rank."""

    def __init__(
        self,
        address: str,
        instance_id: str,
        model: ModelConfig,
        ranks: Sequence[RankKV],
        deadline_seconds: float = 2.0,
        transfer_mode: str = "auto",
        runtime: Runtime = RUNTIME,
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
        self._scheduler = SchedulerSession(scheduler, GroupShape(layout_for, count), runtime=runtime)
        self._workers = [
            WorkerSession(
                replace(scheduler, role="worker", rank=rank),
                RankGroup(layout_for, shard_of_rank(layout_for(1), rank, count, 0, model.layers), kv.describe()),
                runtime=runtime,
            )
            for rank, kv in enumerate(ranks)
        ]
        self._requests: Requests[Prompt] = Requests(self._scheduler, ranks=count)
        self._ranks = [
            Copies(worker, rank, requests=self._requests, ended=self._ended)
            for rank, worker in enumerate(self._workers)
        ]
        self._stored_tokens = 0

    @property
    def stored_tokens(self) -> int:
        """Tokens that each rank has stored so far."""
        return self._stored_tokens // len(self._ranks)

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size in tokens; None until a server has been reached."""
        return self._scheduler.chunk_tokens

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait until the scheduler and every rank have reached the server; False after the timeout."""
        return wait_connected((self._scheduler, *self._workers), timeout_seconds)

    def open(self, request_id: str, cache_salt: str = "") -> Prompt:
        """Begin a request."""
        return Prompt(request_id, cache_salt)

    def load(self, prompt: Prompt, token_ids: Sequence[int], blocks: Sequence[int], have: int) -> Loaded:
        """Fetch the KV of as many leading tokens as the cache holds; `have` of them are in the blocks already.

        The last token is never fetched, since the engine needs its logits.
        """
        self._requests.find(prompt, token_ids, have, wait=True)
        end = min(prompt.found_tokens, len(token_ids) - 1)
        if end <= have:
            self._requests.give_back(prompt)
            return Loaded(have)
        plan = self._requests.load(prompt, have, end)
        loads = [rank.load(plan, list(blocks)) for rank in self._ranks]
        prompt.copies += loads
        pairs = zip(self._ranks, loads, strict=True)
        filled = [rank.settle([load], self._deadline_seconds, 0.0) for rank, load in pairs]
        if not all(filled):
            prompt.stored = 0
            return Loaded(have, stuck=self.busy(loads))
        return Loaded(end)

    def store(self, prompt: Prompt, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Store the full chunks of `token_ids`, whose KV is in the blocks, that the cache does not hold; returns at once."""
        plan = self._requests.store(prompt, token_ids, len(token_ids))
        if plan is not None:
            prompt.copies += [rank.store(plan, list(blocks)) for rank in self._ranks]

    def computed(self, tokens: int, seconds: float) -> None:
        """Note how long computing so many tokens of a prompt took, which loads have to be faster than."""
        self._requests.prefill.took(tokens, seconds)

    @property
    def now(self) -> float:
        """The time of the clock that LMCache uses."""
        return self._scheduler.runtime.now()

    def poll(self) -> None:
        """Record the copies that have ended."""
        for rank in self._ranks:
            rank.collect()

    def busy(self, copies: Iterable[Copy]) -> bool:
        """Whether one of the copies may still touch paged KV, as of the last `poll`."""
        return any(copy.done is None for copy in copies)

    def flush(self, copies: Iterable[Copy] | None, timeout_seconds: float) -> bool:
        """Wait until the copies (None: all) have ended; False when some are running after the timeout."""
        now = self._scheduler.runtime.now
        end, wanted = now() + timeout_seconds, None if copies is None else set(copies)
        for rank in self._ranks:
            rank.collect()
            mine = [copy for copy in rank.running() if wanted is None or copy in wanted]
            if not rank.wait(mine, max(0.0, end - now())):
                return False
        return True

    def close(self) -> None:
        """End the sessions; whatever was not committed is dropped by the server."""
        for worker in self._workers:
            worker.close()
        self._requests.close()

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, StorePlan) and copy.done is not None:
            self._stored_tokens += copy.done.tokens


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
