"""`model.generate` with KV that is loaded from and stored in LMCache. No error of LMCache reaches it: a failure is a miss."""

from __future__ import annotations

import atexit
import threading
import uuid
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.chunks import Shard
from lmcache.engine import Copy, Request, StorePlan
from lmcache.engine.embedded import EmbeddedServer, embedded_address
from lmcache.engine.endpoint import Endpoint, given_address
from lmcache.engine.identity import Identity, named
from lmcache.engine.local import LocalRank
from lmcache.engine.points import stream_point
from lmcache.engine.prefill import PrefillRate
from lmcache.engine.served import NOT_SERVED, ServedKV
from lmcache.engine.tensors import weights_identity, weights_stamp
from lmcache.errors import LayoutError
from lmcache.integration.transformers.model import (
    kv_shape,
    layout_of,
    refuse_unsupported,
)
from lmcache.integration.transformers.pool import Pool
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_ROOM_TOKENS = 1024
_FORESEEN_TOKENS = 2048
"""Tokens of the pool for an answer; a longer answer goes on outside the pool, and its tail is not stored."""
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
    """The prompt that `generate` works on."""

    request: Request
    cache: Any


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
        """Why this model is not cached; "" if it is."""
        self.hit_tokens = self.stored_tokens = 0
        """Tokens whose KV was loaded from the cache so far, and tokens that were stored in it."""
        self._model, self._generate, self._endpoint = model, model.generate, endpoint
        self._model_id, self._salt, self._own = model_id, cache_salt, own
        self._rank: LocalRank[Request] | None = None
        self._pool: Pool | None = None
        self._prefill = PrefillRate()
        self._stamp = 0
        self._identity: Identity | None = None
        """The identity that was found for the weights while they had the stamp `_stamp`; None before that."""
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._shape = kv_shape(model)
            self._open(_ROOM_TOKENS)
        except NOT_SERVED as error:
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
        """Wait until the server has registered this model. Return False after the timeout, or if its own server has ended."""
        return self._rank is not None and self._rank.wait_connected(timeout_seconds, self._own)

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until all KV so far has been stored. Return False if some has not been after the timeout."""
        return self._rank is None or self._rank.copies.wait(self._rank.copies.running(), timeout_seconds)

    def close(self) -> None:
        """Finish the running stores, close the connection, and restore the model's own `generate`."""
        atexit.unregister(self.close)
        self._model.__dict__.pop("generate", None)
        self.flush()
        self._end_all()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One prompt

    def _begin(self, tokens: list[int], new_tokens: int) -> _Begun | None:
        """Return a cache for `generate` with LMCache's KV of the prompt; None if `generate` must run without LMCache."""
        try:
            if not self._ready(len(tokens) + new_tokens):
                if self._rank is not None:
                    self._rank.requests.forgone(len(tokens))
                return None
            return self._load(tokens)
        except NOT_SERVED as error:
            self._refuse(error)
            return None

    def _load(self, tokens: list[int]) -> _Begun | None:
        rank, pool = self._rank, self._pool
        if rank is None or pool is None:  # another thread has called `close` meanwhile
            return None
        requests, copies = rank.requests, rank.copies
        request, have = Request("", self._salt), 0
        requests.find(request, tokens, wait=True)
        if request.chain is None:
            return None
        if request.hit is not None:
            # The last token is always computed: its logits are what the answer begins with.
            have = min(request.found_tokens, len(tokens) - 1)
            copy = copies.load(
                requests.load(request, 0, have), pool.blocks, after=stream_point(str(self._shape.device))
            )
            loaded = copies.settle([copy], self._endpoint.deadline_seconds, 0.0)
            if copies.running():
                return None
            if not loaded:
                have = request.stored = 0
        self.hit_tokens += have
        return _Begun(request, pool.cache(have, self._step))

    def _step(self, tokens: int) -> None:
        """A forward over so many tokens begins; 0: none does, and the last one has ended."""
        if self._rank is not None:
            self._prefill.step(self._rank.requests.runtime.now(), tokens)

    def _end(self, begun: _Begun, answer: Any) -> None:
        """Store the full chunks that LMCache does not have yet; the copy runs while the caller goes on."""
        self._step(0)
        try:
            sequence = answer if isinstance(answer, torch.Tensor) else answer.sequences
            self._store(begun, sequence[0].tolist())
            # The caller may keep the cache that is in the answer, and the pool is for the next prompt.
            for layer in begun.cache.layers if sequence is not answer else ():
                layer.leave()
        except NOT_SERVED as error:
            self._refuse(error)

    def _store(self, begun: _Begun, sequence: list[int]) -> None:
        rank, pool = self._rank, self._pool
        if rank is None or pool is None:
            return
        filled = min(len(sequence), *(layer.tokens_in_pool for layer in begun.cache.layers))
        plan = rank.requests.store(begun.request, sequence[:filled], filled)
        if plan is not None:
            rank.copies.store(plan, pool.blocks, after=stream_point(str(self._shape.device)))

    def _ready(self, room: int) -> bool:
        """Whether there is a server, and a pool of our own that nothing touches and that is large enough.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        if not self._settle():
            return False
        reached = self._connected()
        if not reached and self._rank is not None and self._rank.scheduler.identified:
            # There is no server, and the weights need not be read: they are at the first call that has one.
            return False
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
        return self._rank is not None and self._rank.connected

    # Copies

    def _settle(self) -> bool:
        """Wait, a deadline at most, until no copy touches the pool. True when there is none."""
        if self._rank is None:
            return True
        copies = self._rank.copies
        # What has not begun never will; what has may end after all, and a later call sees it.
        copies.settle(copies.running(), self._endpoint.deadline_seconds, 0.0)
        return not copies.running()

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, StorePlan) and copy.done is not None:
            self.stored_tokens += copy.done.tokens

    # Sessions

    def _open(self, room: int, wait_seconds: float | None = None) -> None:
        """Make a pool for at least `room` tokens, and sessions for the weights as they are now. wait_seconds: how long to wait
        for the server, as for `LocalRank.wait_for_server`.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        shape, step = self._shape, max(_ROOM_TOKENS, 1 << max(0, room.bit_length() - 3))
        identity, layout = self._identified(), layout_of(self._model, shape)

        self._pool = Pool(shape, -(-room // step) * step)
        threads = min(_COPY_THREADS, torch.get_num_threads()) if shape.device.type == "cpu" else 1
        whole = Shard(0, 1, 0, shape.layers, 0, shape.heads)
        kv = ServedKV(identity, layout, whole, self._pool.describe(), stores=True)
        self._rank = LocalRank(self._endpoint, kv, threads=threads, ended=self._ended)
        self._rank.requests.prefill = self._prefill
        self._rank.wait_for_server(self._own, wait_seconds)

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
        if self._rank is not None:
            self._rank.close()
        self._rank = self._pool = None

    def _refuse(self, error: Exception) -> None:
        self._end_all()
        self.refusal = str(error) or type(error).__name__
        logger.warning("LMCache serves nothing for this model: %s", self.refusal)

    def _end_all(self) -> None:
        """End the hashing of weights, the sessions, and the server of one's own."""
        self._give_up_hashing()
        self._hang_up()
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def _log(self, why: str) -> None:
        if why not in self._logged:
            self._logged.add(why)
            logger.warning("generate goes on without LMCache: %s", why)


def _unsuited(model: Any, ids: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return why this call is not cached; "" for one prompt of plain tokens and plain decoding."""
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
