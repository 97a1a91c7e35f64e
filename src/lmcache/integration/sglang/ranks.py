"""One scheduler process of SGLang, which is also one rank of the model: its sessions with the server, and its copies.

Every rank runs the same scheduler and must come to the same decisions, so whatever a decision hangs on is agreed among them
(`Agreement`). Each rank looks up for itself and leases for itself; a load is of as many tokens as all of them were granted.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.chunks import HASH_BYTES, TokenChain
from lmcache.engine import Done, Hit, Load, Loading, SchedulerSession, Store, WorkerSession
from lmcache.engine.connection import Endpoint
from lmcache.engine.embedded import EmbeddedServer, embedded_address
from lmcache.engine.jobs import Event
from lmcache.errors import ConfigError
from lmcache.integration.sglang.model import RankKV, Ranks
from lmcache.integration.sglang.settings import Settings
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Blocks
from lmcache.transfer.progress import Progress

logger = init_logger(__name__)

Tokens = npt.NDArray[np.int64]
GIB = 1 << 30


class Agreement:
    """What the ranks of one engine say together.

    groups: each a process group and its size; those of one rank are left out. device: of the tensors that the groups reduce.
    """

    def __init__(self, *groups: tuple[Any, int], device: str = "cpu") -> None:
        self._groups = [group for group, size in groups if size > 1]
        self._device = device

    def reduce(self, tensor: Any, operation: Any) -> None:
        """All-reduce a tensor in place."""
        import torch

        for group in self._groups:
            torch.distributed.all_reduce(tensor, op=operation, group=group)

    def least(self, number: int) -> int:
        """The smallest of the numbers that the ranks have."""
        if not self._groups:
            return number
        import torch

        tensor = torch.tensor([number], dtype=torch.int64, device=self._device)
        self.reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor.item())

    def name(self) -> str:
        """A name for this engine that no other has, the same in all ranks."""
        return f"sglang-{self.least(secrets.randbits(62)):016x}"


@dataclass
class Copy:
    """A load or store under way. SGLang calls it a future: something with a `result(timeout)`."""

    rank: SGLangRank | None
    job_id: str
    tokens: int
    done: Done | None = None

    @property
    def ok(self) -> bool:
        """It has ended and did what it was to do."""
        return self.done is not None and self.done.ok

    def ended(self) -> bool:
        """Whether it touches paged KV no more; does not wait."""
        if self.done is None and self.rank is not None:
            self.rank.collect()
        return self.done is not None

    def result(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; True when it did what it was to do.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds.
        """
        if self.rank is not None and not self.rank.wait(self, timeout):
            raise TimeoutError(f"{self.job_id} of {self.tokens} tokens has not ended after {timeout} s")
        return self.ok


def no_copy() -> Copy:
    """A copy of nothing, which has ended."""
    return Copy(None, "none", 0, Done("none", "store", True, 0, 0.0))


class SGLangRank:
    """Lookups, loads and stores of one rank, in chunks and page numbers. Nothing raises."""

    def __init__(self, settings: Settings, kv: RankKV, ranks: Ranks, name: str) -> None:
        self.kv = kv
        self._copies: dict[str, Copy] = {}
        self._jobs = 0
        address = settings.address or embedded_address(name)
        self._server = None if settings.address or ranks.number else _own_server(settings, name)
        # Each rank leases and copies for itself, in one process, so each is an engine of its own to the server.
        instance = f"{name}-{ranks.number}"

        def endpoint(role: str) -> Endpoint:
            return Endpoint(
                address, instance, role, ranks.number, deadline_seconds=settings.config.blocking_timeout_secs
            )

        self._scheduler = SchedulerSession(endpoint("scheduler"), kv.layout, kv.shard.count)
        self._worker = WorkerSession(endpoint("worker"), kv.layout, kv.shard, kv.paged)
        self._stores = _is_first_of_its_shard(kv, ranks)
        self._timeout_seconds = settings.config.blocking_timeout_secs
        self._scheduler.wait_for_server()
        self._worker.wait_for_server()

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size; None while none was ever reached."""
        return self._scheduler.chunk_tokens

    @property
    def epoch(self) -> bytes:
        """Changes whenever the server does: chains and hits of another epoch are void."""
        return self._scheduler.epoch

    def new_chain(self, salt: str) -> TokenChain | None:
        """The chunk hashes of one prompt; None while no server was ever reached."""
        return self._scheduler.new_chain(cache_salt=salt)

    def poll(self, chain: TokenChain, have_tokens: int, request_id: str, prefill_rate: float) -> Hit | Loading | None:
        """The leading chunks that are there, with a lease on those past the first `have_tokens` tokens. One deadline at most.
        prefill_rate: tokens a second that the engine computes; what takes longer to load is not waited for. 0: not known."""
        return self._scheduler.poll(chain, have_tokens, prefill_rate, request_id=request_id)

    def lookup(self, chain: TokenChain, have_tokens: int, wait_seconds: float | None = None) -> Hit | None:
        """As `poll`, and wait for what comes from tiers, for `wait_seconds` at most (None: a deadline)."""
        return self._scheduler.lookup(chain, have_tokens, wait_seconds=wait_seconds)

    def forgone(self, tokens: int) -> None:
        """So many tokens of a prompt that has no chain have been computed."""
        if self._stores:
            self._scheduler.forgone(tokens)

    def release(self, hit: Hit) -> None:
        """Nothing reads the hit's slots any more."""
        self._scheduler.release(hit)

    def load(
        self,
        hit: Hit,
        start: int,
        end: int,
        blocks: Blocks,
        after: Event | None = None,
        progress: Progress | None = None,
    ) -> Copy:
        """Fill tokens [start, end). blocks: as `block_table` makes them. progress: is told of layers as they arrive."""
        shard, chunk = self.kv.shard.index, self._scheduler.chunk_tokens or 1
        first, last = start // chunk, -(-end // chunk)
        skipped = first - hit.first_chunk
        slots = hit.shard_extents(shard)[4 * skipped : 4 * (last - hit.first_chunk)]
        job = Load(
            hit.arena, hit.lease, first, slots, start, end, blocks, lease_chunk=skipped, after=after, progress=progress
        )
        copy = self._copy("load", end - start)
        self._worker.load(copy.job_id, job)
        return copy

    def store(self, chain: TokenChain, first: int, chunks: int, blocks: Blocks, after: Event | None = None) -> Copy:
        """Keep chunks [first, chunks) of the chain. blocks: as `block_table` makes them."""
        if chunks <= first or not self._stores:
            return no_copy()
        copy = self._copy("store", (chunks - first) * chain.chunk_tokens)
        hashes = chain.hashes[first * HASH_BYTES : chunks * HASH_BYTES]
        job = Store(chain.chunk_tokens, chain.parent(first), hashes, first, blocks, after=after)
        self._worker.store(copy.job_id, job)
        return copy

    def wait(self, copy: Copy, timeout: float | None) -> bool:
        """Until the copy has ended, or `timeout` seconds have passed; whether it has."""
        end = None if timeout is None else time.monotonic() + timeout
        while not copy.ended():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._worker.wait_finished(60.0 if left is None else left)
        return True

    def settle(self, copy: Copy, progress: Progress | None = None) -> bool:
        """Wait for a load, a deadline at most: then it is called off. It touches paged KV no more. True when it succeeded.

        progress: of the load, where it need not have ended. Then wait until all of it has been handed to the device: from there
        on it cannot fail, short of the device itself.
        """
        end = time.monotonic() + self._timeout_seconds
        if progress is not None and progress.wait_recorded(len(self.kv.paged.planes), self._timeout_seconds):
            return not copy.ended() or copy.ok
        if not self.wait(copy, max(0.0, end - time.monotonic())):
            self._worker.wait([copy.job_id])
            self.wait(copy, self._timeout_seconds)
        return copy.ok

    def collect(self) -> None:
        """Take note of the copies that have ended; never waits."""
        for done in self._worker.finished():
            copy = self._copies.pop(done.job_id, None)
            if copy is not None:
                copy.done = done

    def clear(self) -> bool:
        """Empty the server's memory, for all its engines. False when it did not answer."""
        return self._scheduler.clear()

    def close(self) -> None:
        self._worker.close()
        self._scheduler.close()
        if self._server is not None:
            self._server.close()

    def _copy(self, kind: str, tokens: int) -> Copy:
        self._jobs += 1
        copy = Copy(self, f"{kind}-{self._jobs}", tokens)
        self._copies[copy.job_id] = copy
        return copy


def _own_server(settings: Settings, name: str) -> EmbeddedServer | None:
    """The server inside this engine; None, and a line in the log, where it cannot be started."""
    config = settings.config
    quiet = () if "LMCACHE_LOG_LEVEL" in os.environ else ("--log-level", "WARNING")
    try:
        return EmbeddedServer(
            name,
            l1_size_gb=config.max_local_cpu_size,
            chunk_size=config.chunk_size,
            flags=(*quiet, *config.server_flags),
        )
    except ConfigError as error:
        logger.warning("LMCache serves nothing for this engine: %s", error)
        return None


def _is_first_of_its_shard(kv: RankKV, ranks: Ranks) -> bool:
    """Ranks that hold the same heads share a shard; one of them stores it."""
    return ranks.tp_rank * min(kv.model.num_kv_heads, ranks.tp_size) % ranks.tp_size == 0


def numbers(tokens: Any) -> Tokens:
    """Token ids, in a copy of their own: SGLang's arrays grow under our hands."""
    return np.array(tokens, dtype=np.int64)


def block_table(indices: Any, page_size: int, start: int) -> tuple[Blocks, Event | None]:
    """Pages from token 0 on of which those before token `start`, which begins a page, are never looked at.

    indices: a tensor [tokens] on any device, the slots of the tokens from `start` on. Returns int32 [pages], and the point behind
    which they are filled: to wait for a GPU's here would be to wait for the forward that it computes. None: they are.
    """
    slots, before = indices[::page_size], start // page_size
    if not getattr(slots, "is_cuda", False):
        pages = np.asarray(slots, dtype=np.int64) // page_size
        return np.concatenate((np.zeros(before, np.int32), pages.astype(np.int32))), None
    import torch

    table = torch.zeros(before + len(slots), dtype=torch.int32, pin_memory=True)
    table[before:].copy_((slots // page_size).to(torch.int32), non_blocking=True)
    filled: Any = torch.cuda.Event(blocking=True)
    filled.record()
    return table.numpy(), filled


def text_of(tokens: Any, vocabulary: int) -> Tokens:
    """The leading tokens that are text. SGLang writes numbers beyond the vocabulary for what is in an image."""
    ids = numbers(tokens)
    other = (ids < 0) | (ids >= vocabulary)
    return ids[: int(other.argmax())] if other.any() else ids


def cost(size_bytes: int, seconds: float) -> str:
    """What a copy has cost, as the log tells it; GiB of this rank's part."""
    size = size_bytes / GIB
    return f"size: {size:.4f} gb, cost {seconds * 1e3:.2f} ms, throughput: {size / max(seconds, 1e-9):.2f} GB/s"


def stored_line(done: Sequence[Done], total: int, chunked: int, token_bytes: int) -> str:
    """What the stores of one request have come to: of `total` tokens `chunked` are in full chunks. "" where nothing was copied.

    Those that are in full chunks and were not copied were there before, or got no room.
    """
    tokens = sum(one.tokens for one in done)
    if not tokens:
        return ""
    copying, putting = sum(one.seconds for one in done), sum(one.put_seconds for one in done)
    return (
        f"Stored {tokens} out of total {total} tokens. {cost(tokens * token_bytes, copying + putting)}; "
        f"offload_time: {copying * 1e3:.2f} ms, put_time: {putting * 1e3:.2f} ms; skipped: {chunked - tokens} tokens"
    )


class Both:
    """Two points in a device's streams."""

    def __init__(self, one: Event, other: Event) -> None:
        self._points = one, other

    def query(self) -> bool:
        """Whether the device has passed both."""
        return all(point.query() for point in self._points)

    def synchronize(self) -> None:
        """Wait for both."""
        for point in self._points:
            point.synchronize()


class WholeDevice:
    """Everything that was launched on a device, where it is not known on which stream the engine computes."""

    def __init__(self, device: str) -> None:
        self._device = device

    def query(self) -> bool:
        """Done, as far as one can tell without waiting."""
        return True

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        import torch

        torch.cuda.synchronize(self._device)
