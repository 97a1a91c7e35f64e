"""A double of TensorRT-LLM's PyTorch executor: what of it a KV connector sees, written down from its public sources.

Sources (NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/pyexecutor/): connectors/kv_cache_connector.py for the base classes, the two
dataclasses, what `build_scheduler_output` puts in them and how `get_finished` of all ranks is combined; py_executor.py for the
order of calls in a step and at a request's end; resource_manager.py and kv_cache_manager for when blocks are given out and for
the pool [blocks, layers, 2, elements], whose blocks are [head][token][dim]. No line is theirs.

The numbers: the KV of a token is a function of all tokens up to it, of layer, K or V, head and dim. "Attention" checks every
number that it would read; an answer's token follows from the last one's. Blocks that are given out are full of NaN.
"""

from __future__ import annotations

import pickle
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

_rank = threading.local()


@dataclass
class RequestData:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)


class _Base:
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: Any = None

    def bind_connector_meta(self, metadata: Any) -> None:
        self._metadata = metadata

    def register_forward_pass_callable(self) -> None:
        return None

    def wait_for_initialization(self) -> None:
        return None


class _SchedulerBase(_Base):
    """The forms of two callbacks for caches of layer groups; one group is passed on in the flat form."""

    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids_by_layer_group: list[list[int]]) -> None:
        self.update_state_after_alloc(request, *block_ids_by_layer_group)  # type: ignore[attr-defined]

    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: list[list[int]]) -> bool:
        return bool(self.request_finished(request, *cache_block_ids_by_layer_group))  # type: ignore[attr-defined]


class RanksDisagree(BaseException):
    """What would hang a real engine; no `except Exception` of the executor's takes it for a failed step."""


class Ranks:
    """MPI's collectives for ranks that are threads: each runs what it is given, and they meet."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=60)
        self._slots: list[Any] = [None] * count
        self._pool = ThreadPoolExecutor(count)

    def everywhere(self, call: Callable[[int], Any]) -> list[Any]:
        """call(rank) on all ranks at once; the first rank's error, when all have ended."""

        def on(rank: int) -> Any:
            _rank.number, _rank.ranks = rank, self
            return call(rank)

        futures = [self._pool.submit(on, rank) for rank in range(self.count)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            if len(errors) < self.count:
                raise RanksDisagree(f"some ranks went wrong alone, the others would wait for them for ever: {errors}")
            raise errors[0]
        return [future.result() for future in futures]

    def allgather(self, value: Any) -> list[Any]:
        self._slots[_rank.number] = pickle.dumps(value)
        self._barrier.wait()
        found = [pickle.loads(raw) for raw in self._slots]
        self._barrier.wait()
        return found


def install(old: bool = False) -> None:
    """Make the modules importable that a connector imports; `old`: at the place of earlier releases."""
    utils = types.ModuleType("tensorrt_llm._utils")
    utils.mpi_rank = lambda: _rank.number  # type: ignore[attr-defined]
    utils.mpi_allgather = lambda value: _rank.ranks.allgather(value)  # type: ignore[attr-defined]
    utils.mpi_broadcast = lambda value, root=0: _rank.ranks.allgather(value)[root]  # type: ignore[attr-defined]
    bases = types.ModuleType("bases")
    bases.KvCacheConnectorScheduler = type("KvCacheConnectorScheduler", (_SchedulerBase,), {})  # type: ignore[attr-defined]
    bases.KvCacheConnectorWorker = type("KvCacheConnectorWorker", (_Base,), {})  # type: ignore[attr-defined]
    home = "tensorrt_llm._torch.pyexecutor"
    packages = ["tensorrt_llm", "tensorrt_llm._torch", home] + ([] if old else [f"{home}.connectors"])
    for name in packages:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []  # a package
    sys.modules["tensorrt_llm._utils"] = utils
    sys.modules[f"{home}.kv_cache_connector" if old else f"{home}.connectors.kv_cache_connector"] = bases


class Request:
    """LlmRequest, what a connector may look at, and what the executor knows of it."""

    def __init__(self, request_id: int, tokens: list[int], new_tokens: int, **attributes: Any) -> None:
        self.request_id, self.prompt, self.wanted = request_id, len(tokens), new_tokens
        self.tokens = list(tokens)
        self.cache_salt: str | None = None
        self.lora_task_id: int | None = None
        self.__dict__.update(attributes)
        self.blocks: list[int] = []
        self.position = 0
        self.local = self.matched = 0
        self.state = "waiting"
        self.right = True

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self.tokens)


class Executor:
    """An engine with `ranks` tensor-parallel ranks in threads of this process.

    grouped: as with KVCacheManagerV2: blocks are given out chunk by chunk, and only what they cover of a hit is taken. tells:
    by `cancel_load`, as newer releases do. windows: with KVCacheManagerV2, the attention window of each layer group, None for
    full attention; such a cache is described instead of passed on as one tensor, and its blocks are told for each group. Nothing
    of the double slides: it is for connectors that refuse such caches.
    """

    def __init__(
        self,
        module: Any,
        prefix: str,
        llm_args: Any,
        *,
        heads: int = 4,
        dims: int = 8,
        layers: int = 2,
        parts: int = 2,
        block_tokens: int = 8,
        blocks: int = 64,
        chunk_tokens: int = 1 << 20,
        reuse: bool = False,
        grouped: bool = False,
        tells: bool = True,
        flat: bool = True,
        windows: list[int | None] | None = None,
    ) -> None:
        self.ranks = Ranks(llm_args.tensor_parallel_size)
        self.block_tokens, self.chunk_tokens = block_tokens, chunk_tokens
        self.grouped, self.tells, self.windows = grouped, tells, windows
        self.layers, self.parts = layers, parts
        own = max(1, heads // self.ranks.count)
        self.heads = [(rank * heads // self.ranks.count, own) for rank in range(self.ranks.count)]
        inner = (own * block_tokens * dims,) if flat else (own, block_tokens, dims)
        self.pools = [torch.full((blocks, layers, parts, *inner), torch.nan) for _ in range(self.ranks.count)]
        self._views = [pool.view(blocks, layers, parts, own, block_tokens, dims) for pool in self.pools]
        self.free = list(range(blocks))[::-1]
        self.cached: dict[tuple[int, ...], int] | None = {} if reuse else None
        self.users: dict[int, int] = {}
        self.requests: dict[int, Request] = {}
        self.seen: dict[int, tuple[int, int]] = {}
        self.external: dict[int, int] = {}
        self.saving: dict[int, Request] = {}
        self.new_saving: list[int] = []
        self.saved = [set[int]() for _ in self.pools]
        made: list[Any] = [None]

        def make(rank: int) -> Any:
            if rank == 0:
                made[0] = getattr(module, f"{prefix}KvConnectorScheduler")(llm_args)
            return getattr(module, f"{prefix}KvConnectorWorker")(llm_args)

        self.workers = self.ranks.everywhere(make)
        self.scheduler = made[0]
        if windows is None:
            self.ranks.everywhere(lambda rank: self.workers[rank].register_kv_caches(self.pools[rank]))
        else:
            forms = "update_state_after_alloc_by_layer_group", "request_finished_by_layer_group"
            flat_only = [name for name in forms if getattr(type(self.scheduler), name) is getattr(_SchedulerBase, name)]
            if flat_only:
                raise NotImplementedError(f"the scheduler must implement {' and '.join(flat_only)}")
            groups = tuple(SimpleNamespace(layer_group_id=at, window_size=one) for at, one in enumerate(windows))
            layout = SimpleNamespace(tokens_per_block=block_tokens, groups=groups, as_single_pool_tensor=lambda: None)
            self.ranks.everywhere(lambda rank: self.workers[rank].register_kv_cache_layout(layout))
        self.scheduler.wait_for_initialization()

    def add(self, request: Request) -> Request:
        self.requests[request.request_id] = request
        return request

    def step(self) -> None:
        """One turn of the executor's loop."""
        batch = self._prepare()
        if batch:
            plan = pickle.dumps(self.scheduler.build_connector_meta(self._output(batch)))
            self.ranks.everywhere(lambda rank: self.workers[rank].bind_connector_meta(pickle.loads(plan)))
        if self.workers[0]._metadata is not None:
            self.ranks.everywhere(lambda rank: self.workers[rank].start_load_kv(None))
        if batch:
            self._forward(batch)
        self._get_finished()

    def run(self, *requests: Request) -> None:
        """Until these have been answered and their blocks are free."""
        for request in requests:
            self.add(request)
        while any(request.state not in ("done", "failed") for request in requests):
            self.step()

    def terminate(self, request: Request, state: str = "done") -> None:
        """The end of a request, answered or cancelled."""
        if request.state != "waiting" and self._finished(request):
            request.state = "saving"
            self.saving[request.request_id] = request
            self.new_saving.append(request.request_id)
        else:
            self._give_back(request)
            request.state = state
        self.requests.pop(request.request_id, None)
        self.seen.pop(request.request_id, None)

    def pause(self, request: Request) -> None:
        """Its blocks are taken away, and it begins anew (KVCacheManagerV2's free_resources of a request that runs again)."""
        self._give_back(request)
        self.scheduler.request_reset(request)
        self.seen.pop(request.request_id, None)
        request.state, request.position = "waiting", 0

    # The parts of a step

    def _prepare(self) -> list[tuple[Request, int]]:
        """(request, tokens that this step computes) of all that have blocks."""
        batch = []
        for request in list(self.requests.values()):
            if request.state == "waiting":
                if self._available() < -(-(len(request.tokens) + request.wanted) // self.block_tokens):
                    continue
                request.state = "running"
                request.local = self._match_own(request)
                matched, asynchronous = self.scheduler.get_num_new_matched_tokens(request, request.local)
                assert not asynchronous and 0 <= matched < len(request.tokens) - request.local
                if self.grouped:
                    covered = -(-min(len(request.tokens), request.local + self.chunk_tokens) // self.block_tokens)
                    taken = max(0, min(matched, covered * self.block_tokens - request.local))
                    if taken < matched and self.tells:
                        end = request.local + matched
                        self.scheduler.cancel_load(request, request.local + taken, end)
                    matched = taken
                    self._grow(request, covered * self.block_tokens)
                else:
                    self._grow(request, len(request.tokens))
                self.external[request.request_id] = request.matched = matched
                request.position = request.local + matched
                if self.windows is None:
                    self.scheduler.update_state_after_alloc(request, list(request.blocks))
                else:
                    self.scheduler.update_state_after_alloc_by_layer_group(request, self._by_group(request.blocks))
            scheduled = min(self.chunk_tokens, len(request.tokens) - request.position)
            self._grow(request, request.position + scheduled)
            batch.append((request, scheduled))
        return batch

    def _output(self, batch: list[tuple[Request, int]]) -> SchedulerOutput:
        output = SchedulerOutput()
        for request, scheduled in batch:
            key = request.request_id
            tokens, blocks = self.seen.get(key, (0, 0))
            position = request.position - self.external.pop(key, 0)
            fresh = request.blocks[blocks:]
            groups = [list(fresh)] if self.grouped else []
            if self.windows is not None:
                fresh, groups = [], self._by_group(fresh)
            data = RequestData(key, request.tokens[tokens:], fresh, position, scheduled, groups)
            (output.cached_requests if key in self.seen else output.new_requests).append(data)
            self.seen[key] = (len(request.tokens), len(request.blocks))
        return output

    def _forward(self, batch: list[tuple[Request, int]]) -> None:
        try:
            self.ranks.everywhere(lambda rank: self._forward_on(rank, batch))
        except Exception as error:  # as _forward_step: the requests of the step fail, the engine lives
            print("the step failed:", error, file=sys.stderr)
            for request, _ in batch:
                self.terminate(request, "failed")
                request.state = "failed" if request.state != "saving" else request.state
                request.right = False
            return
        for request, scheduled in batch:
            request.position += scheduled
            if request.position < len(request.tokens):
                continue
            self._remember(request)
            request.tokens.append(_marks(request.tokens)[-1] % 1000)
            if len(request.tokens) - request.prompt == request.wanted:
                self.terminate(request)

    def _forward_on(self, rank: int, batch: list[tuple[Request, int]]) -> None:
        worker = self.workers[rank]
        for layer in range(self.layers):
            worker.wait_for_layer_load(layer, None)
            for request, scheduled in batch:
                end = request.position + scheduled
                truth = self._truth(rank, layer, request.tokens[:end])
                places = torch.arange(end)
                table = torch.tensor(request.blocks)[places // self.block_tokens]
                view = self._views[rank][:, layer].permute(0, 3, 1, 2, 4)  # [block, token, part, head, dim]
                new = slice(request.position, end)
                view[table[new], places[new] % self.block_tokens] = truth[new]
                if not torch.equal(view[table, places % self.block_tokens], truth):
                    request.right = False
            worker.save_kv_layer(layer, None)
        worker.wait_for_save(None)

    def _get_finished(self) -> None:
        fresh, self.new_saving = self.new_saving, []
        found = self.ranks.everywhere(lambda rank: self.workers[rank].get_finished(list(fresh), []))
        for mine, (saved, loaded) in zip(self.saved, found, strict=True):
            assert not loaded and set(saved) <= set(self.saving) - mine
            mine.update(saved)
        for key in set.intersection(*self.saved):
            request = self.saving.pop(key)
            for mine in self.saved:
                mine.discard(key)
            self._give_back(request)
            request.state = "done" if request.right else "failed"

    def _finished(self, request: Request) -> bool:
        if self.windows is None:
            return bool(self.scheduler.request_finished(request, list(request.blocks)))
        return bool(self.scheduler.request_finished_by_layer_group(request, self._by_group(request.blocks)))

    def _by_group(self, blocks: list[int]) -> list[list[int]]:
        return [list(blocks) for _ in self.windows or ()]

    # Blocks

    def _grow(self, request: Request, tokens: int) -> None:
        while len(request.blocks) * self.block_tokens < tokens:
            block = self._take()
            for view in self._views:
                view[block] = torch.nan
            request.blocks.append(block)
            self.users[block] = 1

    def _available(self) -> int:
        running = sum(
            -(-(r.prompt + r.wanted) // self.block_tokens) for r in self.requests.values() if r.state == "running"
        )
        held = sum(len(r.blocks) for r in self.requests.values() if r.state == "running")
        return len(self.free) + len(self._idle()) - (running - held)

    def _idle(self) -> list[tuple[int, ...]]:
        """What is kept for reuse and nobody uses."""
        return [key for key, block in (self.cached or {}).items() if not self.users.get(block)]

    def _take(self) -> int:
        if not self.free:
            assert self.cached is not None
            self.free.append(self.cached.pop(self._idle()[0]))
        return self.free.pop()

    def _match_own(self, request: Request) -> int:
        """Whole blocks that the engine itself still has, all but the last token's."""
        end = 0
        while self.cached is not None and end + self.block_tokens < len(request.tokens):
            block = self.cached.get(tuple(request.tokens[: end + self.block_tokens]))
            if block is None:
                break
            request.blocks.append(block)
            self.users[block] = self.users.get(block, 0) + 1
            end += self.block_tokens
        return end

    def _remember(self, request: Request) -> None:
        for number in range(len(request.tokens) // self.block_tokens if self.cached is not None else 0):
            assert self.cached is not None
            self.cached.setdefault(tuple(request.tokens[: (number + 1) * self.block_tokens]), request.blocks[number])

    def _give_back(self, request: Request) -> None:
        kept = set(self.cached.values()) if self.cached else set()
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block] and block not in kept:
                self.free.append(block)
        request.blocks = []

    def _truth(self, rank: int, layer: int, tokens: list[int]) -> torch.Tensor:
        """[token, part, head, dim] of one rank and layer."""
        first, count = self.heads[rank]
        dims = self._views[rank].shape[-1]
        marks = torch.tensor(_marks(tokens), dtype=torch.float32)
        part = torch.arange(self.parts)[:, None, None] * 64
        head = (first + torch.arange(count))[None, :, None] * 8
        offset = (layer * 128 + part + head + torch.arange(dims)) / 1024
        return marks[:, None, None, None] + offset[None]


def _marks(tokens: list[int]) -> list[int]:
    """A number for each token that all before it decide."""
    found, mark = [], 7
    for token in tokens:
        mark = (mark * 31 + token + 1) % 8191
        found.append(mark)
    return found
