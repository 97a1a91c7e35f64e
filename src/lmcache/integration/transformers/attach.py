"""`attach`: lets a model's `generate` load KV from LMCache and store it there. A failure in LMCache is a miss, never an error."""

from __future__ import annotations

import atexit
import inspect
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lmcache.chunks import LOSSY_KV
from lmcache.chunks.passages import cut
from lmcache.engine import Copy, Request, StorePlan
from lmcache.engine.blending import Blending
from lmcache.engine.embedded import EmbeddedServer, embedded_address
from lmcache.engine.endpoint import Endpoint, given_address
from lmcache.engine.forks import Forks
from lmcache.engine.identity import Identity, named
from lmcache.engine.local import LocalRank
from lmcache.engine.points import stream_point
from lmcache.engine.prefill import PrefillRate
from lmcache.engine.served import NOT_SERVED
from lmcache.engine.tensors import weights_identity, weights_stamp
from lmcache.errors import LayoutError
from lmcache.integration.transformers.blend import Blender, given_blending
from lmcache.integration.transformers.model import kv_shape, refuse_unsupported, served_kv
from lmcache.integration.transformers.passages import Passages
from lmcache.integration.transformers.pool import BLOCK_TOKENS, PLACES, Pool, pooled_layers
from lmcache.observability.log import init_logger
from transformers import DynamicCache

logger = init_logger(__name__)

_ROOM_TOKENS = 1024
_FORESEEN_TOKENS = 2048
"""Tokens of the pool for an answer of unknown length. A longer answer goes on outside the pool, and its end is not stored."""
_COPY_THREADS = 8
_PLAIN_OPTIONS = (
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "cache_implementation",
    "prefill_chunk_size",
)
_PLAIN_TENSORS = ("inputs", "input_ids", "attention_mask")


def attach(
    model: Any,
    address: str = "tcp://localhost:5555",
    *,
    embedded_gb: float = 0.0,
    model_id: str = "",
    cache_salt: str = "",
    deadline_seconds: float = 2.0,
    lossy_kv: str = "none",
    enable_blending: bool | None = None,
    blending: Blending | None = None,
    tokenizer: Any = None,
) -> Attached:
    """Let `model.generate` use the LMCache server at `address`, until `close` is called on the result.

    Args:
        embedded_gb: if not 0, this process starts a server of its own with so many GiB and uses that instead of `address`. The
            server ends with the process, and its KV with it.
        model_id: a name for the weights, which you have to keep unique. Without one, every byte of the weights is hashed, now and
            after each change.
        cache_salt: only processes with the same salt share KV.
        deadline_seconds: how long one call of `generate` may wait for a server that does not answer.
        lossy_kv: "int8" accepts KV that tiers with codec=int8 have rounded, "int8-l1" and "k8v4-l1" round
            what is stored in memory, too (docs/codecs.md). "none": exact KV only.
        enable_blending: find texts between separators wherever they stand in a prompt. What is computed from them is not exactly
            what a model computes without LMCache (docs/blending.md). None: as LMCACHE_ENABLE_BLENDING says, by default not.
        blending: how, in place of LMCACHE_BLEND_* and the defaults; this alone switches blending on, too.
        tokenizer: the model's, for the separator; by default the one that is found under the model's name.

    Raises:
        ValueError: the address is not tcp://host:port, the deadline is out of range, or lossy_kv is no such name.
        ConfigError: the process's own server cannot be started, or a setting of blending is wrong.
    """
    if lossy_kv not in LOSSY_KV:
        raise ValueError(f"lossy_kv is {lossy_kv!r}; it must be one of {', '.join(LOSSY_KV)}")
    instance = f"transformers-{uuid.uuid4().hex}"
    if blending is None and enable_blending is not False:
        blending = given_blending(model, enable_blending, tokenizer)
    where = embedded_address(instance) if embedded_gb else given_address(address)
    endpoint = Endpoint(where, instance, "scheduler", deadline_seconds=deadline_seconds)
    own = EmbeddedServer(instance, l1_size_gb=embedded_gb) if embedded_gb else None
    blending = None if enable_blending is False else blending
    return Attached(model, endpoint, model_id, cache_salt, own, blending, lossy_kv)


@dataclass(frozen=True)
class _Begun:
    """The prompt of a running `generate`, and the cache that it works with. loaded: its leading tokens that were loaded. states:
    how many leading tokens are behind the copy of the states in each of the pool's places, ascending. passages: those of the
    prompt. exact: if some KV is blended, how many leading tokens have exact KV; only these are stored."""

    request: Request
    cache: DynamicCache
    loaded: int = 0
    states: list[int] = field(default_factory=list)
    passages: Passages | None = None
    exact: int | None = None


class Attached:
    """A model whose `generate` uses LMCache. As a context manager, it calls `close` at the end."""

    def __init__(
        self,
        model: Any,
        endpoint: Endpoint,
        model_id: str = "",
        cache_salt: str = "",
        own: EmbeddedServer | None = None,
        blending: Blending | None = None,
        lossy_kv: str = "none",
    ) -> None:
        self.refusal = self.blending_refusal = ""
        """Why this model is not cached, and why nothing is blended although that was asked for; "" if it is."""
        self.hit_tokens = self.stored_tokens = 0
        """How many tokens were loaded from the cache so far, and how many were stored in it."""
        self.blended_requests = self.blended_tokens = self.recomputed_tokens = 0
        """In how many prompts passages were blended, how many tokens these had, and how many of them were computed again."""
        self._model, self._generate, self._endpoint = model, model.generate, endpoint
        self._model_id, self._salt, self._own, self._lossy_kv = model_id, cache_salt, own, lossy_kv
        self._rank: LocalRank[Request] | None = None
        self._pool: Pool | None = None
        self._blender: Blender | None = None
        self._prefill, self._forks = PrefillRate(), Forks()
        self._stamp = 0
        self._identity: Identity | None = None
        """The identity of the weights when they had the stamp `_stamp`; None before the first one."""
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._shape = kv_shape(model)
            if blending is not None:
                self._blender = self._made_blender(blending)
            self._open(_ROOM_TOKENS)
        except NOT_SERVED as error:
            self._refuse(error)
            return
        model.generate = self.generate
        atexit.register(self.close)

    def generate(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        """Call the model's own `generate` with these arguments, and with KV from LMCache where possible. Return its answer.

        blend_boundaries: a further option, in place of separators: the tokens at which passages begin, and last the one at which
        the question does. Without blending it has no effect."""
        boundaries = options.pop("blend_boundaries", None)
        ids: Any = inputs if inputs is not None else options.get("input_ids")
        if boundaries is not None and isinstance(ids, torch.Tensor):
            cut(ids.shape[-1], boundaries)  # a mistake of the caller's is theirs to hear of
        unsuited = self.refusal or _unsuited(self._model, ids, args, options)
        if unsuited or not self._lock.acquire(blocking=False):
            self._log(unsuited or "another thread is in generate")
            return self._generate(inputs, *args, **options)
        try:
            begun = self._begin(ids, _foreseen_tokens(self._model, args, options), boundaries)
            if begun is None:
                return self._generate(inputs, *args, **options)
            with self._watched(begun):
                answer = self._generate(inputs, *args, past_key_values=begun.cache, **options)
            self._end(begun, answer)
            return answer
        finally:
            self._lock.release()

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait until the server has accepted this model. Return False after the timeout, or if its own server has ended."""
        return self._rank is not None and self._rank.wait_connected(timeout_seconds, self._own)

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until all running stores have ended. Return False if some are still running after the timeout."""
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

    def _begin(self, ids: torch.Tensor, new_tokens: int, boundaries: Sequence[int] | None = None) -> _Begun | None:
        """Return a cache for `generate` with LMCache's KV of the prompt; None if `generate` must run without LMCache."""
        tokens: list[int] = ids[0].tolist()
        try:
            if not self._ready(len(tokens) + new_tokens):
                if self._rank is not None:
                    self._rank.requests.forgone(len(tokens))
                return None
            begun = self._load(ids, tokens, boundaries)
            if begun is not None and self._shape.states:
                with self._watched(begun):
                    self._compute_to_boundaries(begun, ids)
            return begun
        except NOT_SERVED as error:
            self._refuse(error)
            return None

    def _load(self, ids: torch.Tensor, tokens: list[int], boundaries: Sequence[int] | None) -> _Begun | None:
        rank, pool = self._rank, self._pool
        if rank is None or pool is None:  # another thread has called `close` meanwhile
            return None
        requests, copies = rank.requests, rank.copies
        request, have = Request("", self._salt), 0
        requests.find(request, tokens, wait=True)
        if request.chain is None:
            return None
        if request.hit is not None:
            # The last token is always computed, since the answer begins with its logits.
            have = min(request.found_tokens, len(tokens) - 1)
            first, *others = pool.tables()
            point = stream_point(str(self._shape.device))
            copy = copies.load(requests.load(request, 0, have), first, after=point, others=others)
            loaded = copies.settle([copy], self._endpoint.deadline_seconds, 0.0)
            if copies.running():
                return None
            if not loaded:
                have = request.stored = 0
        self.hit_tokens += have
        begun = _Begun(request, pool.cache(have, self._step), have)
        if self._blender is None:
            return begun
        begun = self._blend(self._blender, begun, ids, tokens, boundaries)
        return None if copies.running() else begun

    def _blend(
        self, blender: Blender, begun: _Begun, ids: torch.Tensor, tokens: list[int], boundaries: Sequence[int] | None
    ) -> _Begun:
        """Blend passages into the prompt. Return where `generate` goes on; what was begun, if nothing is blended."""
        rank, pool, blend = self._rank, self._pool, None
        assert rank is not None and pool is not None
        try:
            passages = Passages(blender, rank, pool, ids, tokens, boundaries, self._salt)
            blend = passages.load(begun.loaded, self._endpoint.deadline_seconds)
            if blend is None:
                return replace(begun, passages=passages)
            again = passages.compute(blend)
        except (*NOT_SERVED, RuntimeError) as error:  # also of PyTorch, such as too little memory
            self._blender, self.blending_refusal = None, str(error) or type(error).__name__
            logger.warning("Nothing is blended any more: %s", self.blending_refusal)
            return begun
        self.blended_requests += 1
        loaded = sum(one.tokens for one in passages.loaded)
        self.blended_tokens += loaded
        self.recomputed_tokens += again
        rank.scheduler.blended("", len(passages.loaded), loaded, again)
        cache = pool.cache(blend.end, self._step)
        return replace(begun, cache=cache, passages=passages, exact=blend.exact)

    def _made_blender(self, blending: Blending) -> Blender | None:
        try:
            return Blender(self._model, self._shape, blending)
        except LayoutError as error:
            self.blending_refusal = str(error)
            logger.warning("Nothing is blended, only prefixes are reused: %s", error)
            return None

    def _compute_to_boundaries(self, begun: _Begun, ids: torch.Tensor) -> None:
        """Compute the prompt in forwards that end where its states are to be kept, up to the end of its last whole chunk."""
        done, chain = begun.cache.get_seq_length(), begun.request.chain
        if chain is None:
            return
        once = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        for end in self._forks.boundaries(chain, ids.shape[1]):
            if end > done:
                with torch.no_grad():
                    self._model(ids[:, done:end], past_key_values=begun.cache, use_cache=True, **once)
                done = end

    @contextmanager
    def _watched(self, begun: _Begun) -> Iterator[None]:
        """Keep copies of the states behind full chunks meanwhile."""
        if not self._shape.states:
            yield
            return
        hook = self._model.register_forward_hook(partial(self._keep_states, begun), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _keep_states(self, begun: _Begun, _model: Any, _args: Any, options: dict[str, Any], _output: Any) -> None:
        """Keep the states at the end of a forward if a full chunk ends there. The pool's last place is used again and again."""
        pool, chain = self._pool, begun.request.chain
        tokens, ours = begun.cache.get_seq_length(), options.get("past_key_values") is begun.cache
        if pool is None or chain is None or not ours or tokens % chain.chunk_tokens:
            return
        if any(layer.tokens_in_pool < tokens for layer in pooled_layers(begun.cache)):
            return
        try:
            if len(begun.states) == PLACES:
                begun.states.pop()
            pool.keep_states(begun.cache, len(begun.states))
            begun.states.append(tokens)
        except NOT_SERVED as error:
            self._refuse(error)

    def _step(self, tokens: int) -> None:
        """Note that a forward over so many tokens begins; 0: the last one has ended and no other begins."""
        if self._rank is not None:
            self._prefill.step(self._rank.requests.runtime.now(), tokens)

    def _end(self, begun: _Begun, answer: Any) -> None:
        """Store the full chunks that LMCache does not have yet; the copy runs while the caller goes on."""
        self._step(0)
        try:
            sequence = answer if isinstance(answer, torch.Tensor) else answer.sequences
            self._store(begun, sequence[0].tolist())
            # The caller may keep the cache that is in the answer, so its KV must leave the pool, which the next prompt needs.
            for layer in pooled_layers(begun.cache) if sequence is not answer else ():
                layer.leave()
        except NOT_SERVED as error:
            self._refuse(error)

    def _store(self, begun: _Begun, sequence: list[int]) -> None:
        rank, pool = self._rank, self._pool
        if rank is None or pool is None:
            return
        filled = min(len(sequence), *(layer.tokens_in_pool for layer in pooled_layers(begun.cache)))
        if begun.exact is not None:
            filled = min(filled, begun.exact)
        # A model with states goes on only where there is a copy of these.
        ends = [end for end in begun.states if end <= filled] if self._shape.states else [filled]
        for place, end in enumerate(ends):
            # Of a window the pool lacks what was out of reach of what was loaded, and a new server is sent all chunks there are.
            plan = rank.requests.store(begun.request, sequence[:end], end, before=begun.loaded)
            if plan is not None:
                first, *others = pool.tables(place)
                rank.copies.store(plan, first, after=stream_point(str(self._shape.device)), others=others)
        if begun.passages is not None:
            begun.passages.store(filled)

    def _ready(self, room: int) -> bool:
        """Make ready for a prompt and its answer of together `room` tokens. Return False if `generate` must run without LMCache.

        It needs a server, and a pool that is large enough and that no copy touches.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        if not self._settle():
            return False
        reached = self._connected()
        if not reached and self._rank is not None and self._rank.scheduler.identified:
            # There is no server, so the weights need not be read for a change now. The first call with a server does that.
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
        """Wait until no copy touches the pool, for one deadline at most. Return whether that is so."""
        if self._rank is None:
            return True
        copies = self._rank.copies
        # Copies that have not begun are cancelled. One that runs longer may end later, and a later call sees that.
        copies.settle(copies.running(), self._endpoint.deadline_seconds, 0.0)
        return not copies.running()

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, StorePlan) and copy.done is not None:
            self.stored_tokens += copy.done.tokens

    # Sessions

    def _open(self, room: int, wait_seconds: float | None = None) -> None:
        """Make a pool for at least `room` tokens, and sessions for the weights as they are now.

        wait_seconds: how long to wait for the server, as for `LocalRank.wait_for_server`; None for the usual time.

        Raises:
            LayoutError: this model's KV cannot be cached.
        """
        shape, step = self._shape, max(_ROOM_TOKENS, 1 << max(0, room.bit_length() - 3))
        identity = self._identified()
        tokens = -(-room // step) * step
        apart = self._blender.settings.room(tokens, BLOCK_TOKENS) if self._blender is not None else 0
        self._pool = Pool(shape, tokens, apart)
        threads = min(_COPY_THREADS, torch.get_num_threads()) if shape.device.type == "cpu" else 1
        first, *others = served_kv(self._model, shape, self._pool, identity.accepting(self._lossy_kv))
        self._rank = LocalRank(self._endpoint, first, threads=threads, ended=self._ended, others=others)
        self._rank.requests.prefill = self._prefill
        self._rank.wait_for_server(self._own, wait_seconds)

    def _identified(self) -> Identity:
        """Return the identity of the weights as they are now. They are hashed again only after a change.

        Raises:
            LayoutError: the weights cannot be identified.
        """
        if self._model_id:
            return named(self._model_id)
        refuse_unsupported(self._model)  # again, since an adapter may have been added
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
    """Return why this call is not cached; "" for a call with one prompt of plain tokens and plain decoding, which is."""
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
    if mask is None and _taken_for_padding(model, ids, args, options):
        return "the padding token is in input_ids, and Transformers hides it; pass attention_mask with a one for each token"
    if options.get("past_key_values") is not None or _option(model, "use_cache", args, options) is False:
        return "past_key_values are the caller's, or there are none"
    used = [name for name in _PLAIN_OPTIONS if _option(model, name, args, options)]
    if used:
        return f"{used[0]} is given"
    if any((_option(model, name, args, options) or 1) > 1 for name in ("num_beams", "num_return_sequences")):
        return "several sequences for one prompt"
    return ""


def _taken_for_padding(model: Any, ids: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Return whether `generate` makes a mask that hides some of these tokens: it does without `attention_mask`, unless the
    padding token also ends answers."""
    padding, end = (_option(model, name, args, options) for name in ("pad_token_id", "eos_token_id"))
    ends = torch.as_tensor([] if end is None else end)
    return padding is not None and not bool((ends == padding).any()) and bool((ids == padding).any())


def _foreseen_tokens(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Return the number of tokens that the pool needs for the answer."""
    asked = _option(model, "max_new_tokens", args, options)
    return min(int(asked), _FORESEEN_TOKENS) if asked else _FORESEEN_TOKENS


def _option(model: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return a setting of this call: from its arguments, else from its generation config, else from the model's."""
    config = args[0] if args else options.get("generation_config")
    own = options.get(name)
    return own if own is not None else getattr(config or model.generation_config, name, None)
