"""`model.generate` with KV that comes from LMCache and goes there. Nothing of ours raises into it: trouble is a miss."""

from __future__ import annotations

import atexit
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmcache.chunks import HASH_BYTES, Layout, Shard, TokenChain
from lmcache.engine import Load, SchedulerSession, Store, WorkerSession
from lmcache.engine.connection import Endpoint, given_address
from lmcache.engine.embedded import EmbeddedServer, embedded_address
from lmcache.engine.prefill import PrefillRate
from lmcache.errors import LayoutError, LMCacheError
from lmcache.integration.identity import Identity, named
from lmcache.integration.transformers.model import (
    kv_shape,
    layout_of,
    refuse_unsupported,
    weights_identity,
    weights_stamp,
)
from lmcache.integration.transformers.pool import Pool
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_NOT_OURS = (AttributeError, ImportError, KeyError, LMCacheError, OSError, RuntimeError, TypeError, ValueError)
"""What a model, or a release of transformers that we do not know, may raise where we look into it: it runs on without us."""
_ROOM_TOKENS = 1024
_FORESEEN_TOKENS = 2048
"""Room for an answer; a longer one goes on outside the pool, and its tail is not stored."""
_START_SECONDS = 30.0
"""For a server of one's own to start, on a machine that is busy; `attach` waits for it as long as it runs."""
_COPY_THREADS = 8
_PLAIN_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "cache_implementation")
_PLAIN_TENSORS = ("inputs", "input_ids", "attention_mask")


def attach(
    model: Any,
    address: str = "tcp://localhost:5555",
    *,
    embedded_gb: float = 0.0,
    model_id: str = "",
    cache_salt: str = "",
    deadline_seconds: float = 2.0,
) -> Attached:
    """Let `model.generate` use the LMCache server at `address`, until `close`.

    embedded_gb: where it is not 0, a server of this process's own with so many GiB takes the place of `address`; what it holds
    ends with it. model_id: a name for the weights that is yours to keep unique; without one every byte of them is hashed, once
    and again whenever they have changed. cache_salt: only who gives the same one shares. deadline_seconds: the most that a
    silent server may cost a call.

    Raises:
        ValueError: an address that is not tcp://host:port, or a deadline out of range.
        ConfigError: the server of one's own cannot be started.
    """
    instance = f"transformers-{uuid.uuid4().hex}"
    where = embedded_address(instance) if embedded_gb else given_address(address)
    endpoint = Endpoint(where, instance, "scheduler", deadline_seconds=deadline_seconds)
    own = EmbeddedServer(instance, l1_size_gb=embedded_gb) if embedded_gb else None
    return Attached(model, endpoint, model_id, cache_salt, own)


@dataclass(frozen=True)
class _Begun:
    """A prompt that `generate` is at: its chunks, the cache, and how many whole chunks LMCache has got."""

    chain: TokenChain
    cache: Any
    held_chunks: int


class Attached:
    """A model whose `generate` uses LMCache. A context manager: leaving it is `close`."""

    def __init__(
        self,
        model: Any,
        endpoint: Endpoint,
        model_id: str = "",
        cache_salt: str = "",
        own: EmbeddedServer | None = None,
    ) -> None:
        self.refusal = ""
        """Why this model is not cached; "" where it is."""
        self.hit_tokens = self.stored_tokens = 0
        """Tokens whose KV came from the cache, and that went there, so far."""
        self._model, self._generate, self._endpoint = model, model.generate, endpoint
        self._model_id, self._salt, self._own = model_id, cache_salt, own
        self._scheduler: SchedulerSession | None = None
        self._worker: WorkerSession | None = None
        self._pool: Pool | None = None
        self._prefill = PrefillRate()
        self._stamp = 0
        self._identity: Identity | None = None
        """The identity that was found for the weights while they had the stamp `_stamp`; None before that."""
        self._jobs = 0
        self._running: set[str] = set()
        """Jobs that may touch the pool."""
        self._told: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._shape = kv_shape(model)
            self._open(_ROOM_TOKENS, None if own is None else _START_SECONDS)
        except _NOT_OURS as error:
            self._refuse(error)
            return
        model.generate = self.generate
        atexit.register(self.close)

    def generate(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        """`model.generate`, with its arguments and its answer."""
        ids: Any = inputs if inputs is not None else options.get("input_ids")
        unsuited = self.refusal or _unsuited(self._model, ids, args, options)
        if unsuited or not self._lock.acquire(blocking=False):
            self._log(unsuited or "another thread is in generate")
            return self._generate(inputs, *args, **options)
        try:
            begun = self._begin(ids[0].tolist(), _foreseen_tokens(self._model, args, options))
            if begun is None:
                return self._generate(inputs, *args, **options)
            answer = self._generate(inputs, *args, past_key_values=begun.cache, **options)
            self._end(begun, answer)
            return answer
        finally:
            self._lock.release()

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait until the server has taken this model; False when it has not after the timeout, or when its own has ended."""
        deadline = time.monotonic() + timeout_seconds
        while not self._connected():
            remaining, own = deadline - time.monotonic(), self._own
            if remaining <= 0 or self._scheduler is None or (own is not None and not own.running):
                return False
            for session in (self._scheduler, self._worker):
                if session is not None:
                    session.wait_connected(min(remaining, 0.1))
        return True

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until all KV so far has been stored; False when some is not after the timeout."""
        worker = self._worker
        while worker is not None and self._running:
            if not worker.wait_finished(timeout_seconds):
                break
            self._collect(worker)
        return not self._running

    def close(self) -> None:
        """Store what is still on its way, hang up, and give the model its own `generate` back."""
        atexit.unregister(self.close)
        self._model.__dict__.pop("generate", None)
        self.flush()
        self._give_up_hashing()
        self._hang_up()
        self._end_own()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One prompt

    def _begin(self, tokens: list[int], new_tokens: int) -> _Begun | None:
        """A cache for `generate`, with what LMCache has of the prompt; None where it has to go on without us."""
        try:
            if not self._ready(len(tokens) + new_tokens):
                if self._scheduler is not None:
                    self._scheduler.forgone(len(tokens))
                return None
            return self._load(tokens)
        except _NOT_OURS as error:
            self._refuse(error)
            return None

    def _load(self, tokens: list[int]) -> _Begun | None:
        assert self._scheduler is not None and self._worker is not None and self._pool is not None
        chain = self._scheduler.new_chain(cache_salt=self._salt)
        if chain is None:
            return None
        chain.extend(tokens)
        hit = self._scheduler.lookup(chain, prefill_rate=self._prefill.tokens_per_second)
        if hit is None:
            return _Begun(chain, self._pool.cache(0, self._step), 0)
        # The last token is always computed: its logits are what the answer begins with.
        have = min(hit.chunks * chain.chunk_tokens, len(tokens) - 1)
        slots = hit.extents[: 4 * -(-have // chain.chunk_tokens)]
        load = Load(hit.arena, hit.lease, 0, slots, 0, have, self._pool.blocks, after=self._stream_point())
        self._worker.load(self._start_job("load"), load)
        loaded = self._settle()
        self._scheduler.release(hit)
        if self._running:
            return None
        if not loaded:
            return _Begun(chain, self._pool.cache(0, self._step), 0)
        self.hit_tokens += have
        return _Begun(chain, self._pool.cache(have, self._step), hit.chunks)

    def _step(self, tokens: int) -> None:
        """A forward over so many tokens begins; 0: none does, and the last one has ended."""
        self._prefill.step(time.monotonic(), tokens)

    def _end(self, begun: _Begun, answer: Any) -> None:
        """Store the full chunks that LMCache has not got yet; the copy runs while the caller goes on."""
        self._step(0)
        try:
            sequence = answer if isinstance(answer, torch.Tensor) else answer.sequences
            self._store(begun, sequence[0].tolist())
            if (
                sequence is not answer
            ):  # the caller may keep the cache that is in it, and the pool is for the next prompt
                for layer in begun.cache.layers:
                    layer.leave()
        except _NOT_OURS as error:
            self._refuse(error)

    def _store(self, begun: _Begun, sequence: list[int]) -> None:
        assert self._worker is not None and self._pool is not None
        chain, held = begun.chain, begun.held_chunks
        filled = min(len(sequence), *(layer.tokens_in_pool for layer in begun.cache.layers))
        chain.extend(sequence[:filled])
        if len(chain) <= held:
            return
        hashes = chain.hashes[held * HASH_BYTES :]
        store = Store(
            chain.chunk_tokens, chain.parent(held), hashes, held, self._pool.blocks, after=self._stream_point()
        )
        self._worker.store(self._start_job("store"), store)

    def _ready(self, room: int) -> bool:
        """Whether there is a server, and a pool of our own that nothing touches and that is large enough.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        if not self._settle():
            return False
        reached = self._connected()
        if not reached and self._scheduler is not None and self._scheduler.identified:
            return (
                False  # there is no server, and the weights need not be read: they are at the first call that has one
            )
        pool, stamp = self._pool, self._stamp
        if not self._model_id:
            stamp = weights_stamp(self._model)
        if pool is None or pool.tokens < room or stamp != self._stamp:
            self._hang_up()
            self._open(room, self._endpoint.deadline_seconds if reached else 0.0)
        if self._identity is not None and self._identity.failure:
            raise LayoutError(self._identity.failure)
        return self._connected()

    def _connected(self) -> bool:
        return all(session is not None and session.connected for session in (self._scheduler, self._worker))

    # Jobs

    def _start_job(self, kind: str) -> str:
        self._jobs += 1
        job = f"{kind}-{self._jobs}"
        self._running.add(job)
        return job

    def _settle(self) -> bool:
        """Wait, a deadline at most, until no copy touches the pool. True when there is none and no load has failed."""
        worker, loads_failed = self._worker, False
        while worker is not None and self._running:
            if not worker.wait_finished(self._endpoint.deadline_seconds):
                # What has not begun never will; what has may end after all, and a later call sees it.
                worker.wait(self._running, 0.0)
                if not worker.wait_finished(0.0):
                    return False
            loads_failed |= self._collect(worker)
        return not loads_failed

    def _collect(self, worker: WorkerSession) -> bool:
        """Take note of the jobs that have ended; True when a load among them has failed."""
        failed = False
        for done in worker.finished():
            self._running.discard(done.job_id)
            self.stored_tokens += done.tokens if done.kind == "store" else 0
            failed |= done.kind == "load" and not done.ok
        return failed

    def _stream_point(self) -> Any:
        """Where the device's stream is now: what was launched before it comes before a copy. None on a CPU."""
        if self._shape.device.type == "cpu":
            return None
        point = torch.cuda.Event(blocking=True)
        point.record(torch.cuda.current_stream(self._shape.device))
        return point

    # Sessions

    def _open(self, room: int, wait_seconds: float | None) -> None:
        """A pool for at least `room` tokens, and sessions for the weights as they are now, which are waited for so long.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        shape, step = self._shape, max(_ROOM_TOKENS, 1 << max(0, room.bit_length() - 3))
        identity, layout = self._identified(), layout_of(self._model, shape)

        def layout_for(chunk_tokens: int) -> Layout:
            return identity.layout(layout, chunk_tokens)

        self._pool = Pool(shape, -(-room // step) * step)
        self._scheduler = SchedulerSession(self._endpoint, layout_for, shards=1)
        threads = min(_COPY_THREADS, torch.get_num_threads()) if shape.device.type == "cpu" else 1
        whole, rank = Shard(0, 1, 0, shape.layers, 0, shape.heads), replace(self._endpoint, role="worker")
        self._worker = WorkerSession(rank, layout_for, whole, self._pool.describe(), threads)
        if self._own is None or wait_seconds is None:
            self._scheduler.wait_for_server(wait_seconds)
            self._worker.wait_for_server(wait_seconds)
        elif self._scheduler.identified:
            self.wait_connected(wait_seconds)

    def _identified(self) -> Identity:
        """The identity of the weights as they are now, which are hashed once for as long as they stay so.

        Raises:
            LayoutError: they have none.
        """
        if self._model_id:
            return named(self._model_id)
        refuse_unsupported(self._model)  # as it is now: an adapter may have been put in
        stamp = weights_stamp(self._model)
        if self._identity is None or stamp != self._stamp:
            self._give_up_hashing()
            self._identity, self._stamp = weights_identity(self._model), stamp
        return self._identity

    def _give_up_hashing(self) -> None:
        if self._identity is not None:
            self._identity.give_up()

    def _hang_up(self) -> None:
        for session in (self._worker, self._scheduler):
            if session is not None:
                session.close()
        self._worker = self._scheduler = self._pool = None
        self._running.clear()

    def _refuse(self, error: Exception) -> None:
        self._give_up_hashing()
        self._hang_up()
        self._end_own()
        self.refusal = str(error) or type(error).__name__
        logger.warning("LMCache serves nothing for this model: %s", self.refusal)

    def _end_own(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def _log(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("generate goes on without LMCache: %s", why)


def _unsuited(model: Any, ids: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Why this call is none for us; "" for one prompt of plain tokens and plain decoding."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return "no input_ids of shape [1, tokens]"
    if ids.shape[0] != 1 or ids.shape[1] < 1:
        return f"a batch of {ids.shape[0]} prompts; give one at a time"
    if model.training:
        return "the model is in training mode; call model.eval()"
    more = [name for name, value in options.items() if isinstance(value, torch.Tensor) and name not in _PLAIN_TENSORS]
    if more:
        return f"input {more[0]} beside the tokens"
    mask = options.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        return "padding in attention_mask"
    if options.get("past_key_values") is not None or _option(model, "use_cache", args, options) is False:
        return "past_key_values are the caller's, or there are none"
    used = [name for name in _PLAIN_OPTIONS if _option(model, name, args, options)]
    if used:
        return f"{used[0]} is given"
    if any((_option(model, name, args, options) or 1) > 1 for name in ("num_beams", "num_return_sequences")):
        return "several sequences for one prompt"
    return ""


def _foreseen_tokens(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Tokens to have room for behind the prompt."""
    asked = _option(model, "max_new_tokens", args, options)
    return min(int(asked), _FORESEEN_TOKENS) if asked else _FORESEEN_TOKENS


def _option(model: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A setting of this call: its own, or that of its generation config, or the model's."""
    config = args[0] if args else options.get("generation_config")
    own = options.get(name)
    return own if own is not None else getattr(config or model.generation_config, name, None)
