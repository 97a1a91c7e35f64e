"""The scheduler's half of blending: which passages of a request are used, and what becomes of its blocks.

A request into which passages are blended claims everything before its question, as a load that it waits for, unscheduled. vLLM
hashes its blocks when the load has ended. The hash of the first block that is not exact is made up before that, and those after
it follow from it, so no other request can find them (`hide`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lmcache.chunks.passages import Passage
from lmcache.config.engine import load_blending
from lmcache.engine import Loading, LoadPlan, Request, Requests
from lmcache.engine.blending import DONOR, SEPARATOR, Blend, Blending, blending_of
from lmcache.engine.requests import MISS_SECONDS
from lmcache.engine.served import NOT_SERVED
from lmcache.errors import LayoutError
from lmcache.integration.vllm.model import ModelKV
from lmcache.integration.vllm.plan import BlendPlan, PassageStore, StepReport
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
KEY = "lmcache.blend"
"""In a request's `kv_transfer_params`: false blends nothing into it."""
_DTYPES = ("float32", "bfloat16")


def given_blending(vllm_config: Any) -> Blending | None:
    """Return how this engine blends, without a separator; None if it is not asked to.

    Raises:
        ConfigError: a setting is wrong.
    """
    given = _given(vllm_config)
    return blending_of(given, ()) if given.get("enable_blending", False) else None


def with_separator(vllm_config: Any, settings: Blending) -> Blending:
    """Return the settings with the tokens of `blend_special_str`.

    Raises:
        LayoutError: they are not known.
    """
    text = _given(vllm_config).get("blend_special_str", SEPARATOR)
    try:
        from vllm.tokenizers import cached_tokenizer_from_config

        tokens = cached_tokenizer_from_config(vllm_config.model_config).encode(text, add_special_tokens=False)
    except (*NOT_SERVED, ValueError) as error:
        raise LayoutError(f"the tokens of blend_special_str {text!r} are not known: {error}") from None
    if not tokens:
        raise LayoutError(f"blend_special_str {text!r} has no tokens")
    return replace(settings, separator=tuple(tokens))


def refuse_blending(vllm_config: Any, kv: ModelKV) -> None:
    """Return if prompts of this engine can be blended, as far as its configuration says.

    Raises:
        LayoutError: they cannot; the message says why.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    device = str(vllm_config.device_config.device_type)
    reasons = {
        f"on {device}: it was tried on CPUs only": device != "cpu",
        "with Model Runner V2": bool(getattr(vllm_config, "use_v2_model_runner", False)),
        "with compiled models or CUDA graphs: start vLLM with --enforce-eager": not model.enforce_eager,
        "with several ranks": kv.ranks > 1 or parallel.data_parallel_size > 1,
        "with several kinds of KV": bool(kv.others) or bool(kv.reach_tokens) or bool(kv.local_tokens),
        f"with KV of kind {kv.model.kind}": kv.model.kind != "mha",
        "with speculative decoding": vllm_config.speculative_config is not None,
        "with LoRA adapters": vllm_config.lora_config is not None,
        "with images, sounds ...": bool(model.is_multimodal_model),
        f"of runner type {model.runner_type}": model.runner_type != "generate",
        f"with KV of dtype {kv.model.kv_dtype}": kv.model.kv_dtype not in _DTYPES
        or str(model.dtype) != f"torch.{kv.model.kv_dtype}",
        "with KV events": bool(getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False)),
        f"for kv_role {transfer.kv_role}": not (transfer.is_kv_consumer and transfer.is_kv_producer),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise LayoutError(f"blending is not there {reason}")


class _Part(NamedTuple):
    """A passage of a prompt, its own request, and its tokens."""

    passage: Passage
    request: Request
    tokens: list[int]


class Blends:
    """What is blended into the requests of one scheduler. block_tokens: of a scheduler block. new: makes a request of `requests`,
    for a passage."""

    def __init__(
        self, requests: Requests[Any], settings: Blending, block_tokens: int, new: Callable[..., Request]
    ) -> None:
        self._new = new
        self._requests, self._settings, self._block_tokens = requests, settings, block_tokens
        self._parts: dict[str, tuple[list[_Part], int]] = {}
        """By request, the passages of which something is not in the prefix that was found, and where the question begins."""
        self._asks_at: dict[str, float] = {}
        """By request of which too little was found, when its passages are looked up again."""
        self._planned: list[BlendPlan] = []
        self.running: dict[str, BlendPlan] = {}
        """The plan of each request that is being blended, by the request's id."""
        self.refusal = ""
        """Why nothing is blended any more, else ""."""

    def find(self, tracker: Any, tokens: Sequence[int], have: int) -> Blend | Loading | None:
        """Look up the passages of a prompt behind the first `have` tokens, which are exact. Return what is blended, None for
        nothing. A prompt that is not to be blended has passages that can be stored, all the same."""
        if tracker.id not in self._parts:  # called at every step that the request waits
            prompt = list(tokens)
            passages, end = self._settings.passages(prompt)
            new = [self._part(tracker, passage, prompt) for passage in passages if passage.end > have]
            self._parts[tracker.id] = new, end
        parts, end = self._parts[tracker.id]
        if self.refusal or not _wanted(tracker.request):
            return None
        now = self._requests.runtime.now()
        if now < self._asks_at.get(tracker.id, now):
            return None
        usable: list[Passage] = []
        waits: Loading | None = None
        for passage, request, own in parts:  # all of them, so that tiers load them at the same time
            found = self._requests.find(request, own)
            if isinstance(found, Loading):
                waits = found
                continue
            tokens_found = request.found_tokens if found is not None else 0  # a hit of before may be there still
            one = Passage(max(passage.start, have), passage.start + min(tokens_found, passage.tokens))
            if one.tokens > 0:
                usable.append(one)
            elif request.hit is not None:
                self._requests.give_back(request)
        if waits is not None:
            return waits
        if sum(one.tokens for one in usable) < self._settings.min_tokens:
            self._give_back(parts)
            self._asks_at[tracker.id] = now + MISS_SECONDS
            return None
        return Blend(have, end, tuple(usable), self._settings)

    def plan(self, tracker: Any, tokens: Sequence[int], blend: Blend, local: int) -> None:
        """Plan to blend what `find` has returned, into the blocks that the request has been given."""
        prefix = None
        if tracker.hit is not None and blend.have > local:
            prefix = self._requests.load(tracker, local, blend.have, len(tokens))
        else:
            self._requests.give_back(tracker)
        loads: list[tuple[Passage, LoadPlan]] = []
        for passage, request, _ in self._parts[tracker.id][0]:
            usable = next((one for one in blend.blended if passage.start <= one.start < passage.end), None)
            if usable is None or request.hit is None:
                self._requests.give_back(request)
                continue
            load = self._requests.load(request, usable.start - passage.start, usable.end - passage.start)
            load.request_id, load.blocks = tracker.id, []
            loads.append((passage, load))
        plan = BlendPlan(tracker.id, list(tokens), blend, local, prefix, loads)
        self._planned.append(plan)
        self.running[tracker.id] = plan

    def take_plans(self) -> list[BlendPlan]:
        """Return what was planned since the last call, with the requests' blocks."""
        plans, self._planned = self._planned, []
        for plan in plans:
            plan.blocks = (
                list(self._requests.open[plan.request_id].blocks) if plan.request_id in self._requests.open else []
            )
            if plan.prefix is not None:
                plan.prefix.blocks = plan.blocks
        return plans

    def stores(self, tracker: Any, exact: int) -> list[PassageStore]:
        """Return the stores of passages within the first `exact` tokens, which are exact, that the server does not have."""
        found = []
        parts, _ = self._parts.get(tracker.id, ((), 0))
        for passage, request, own in parts:
            known = passage.end > exact or request.jobs
            plan = self._requests.store(request, own, len(own), ends=True) if not known else None
            if plan is not None:
                plan.blocks = []
                blocks = tracker.blocks[: -(-passage.end // self._block_tokens)]
                found.append(PassageStore(plan, passage, list(blocks)))
        return found

    def transferred(self, ended: Collection[str], report: StepReport) -> None:
        """Note which loads have ended, and what a rank has blended."""
        for request_id in [one for one in self.running if one in ended]:
            del self.running[request_id]
        for request_id, told in report.blended.items():
            if self._requests.session is not None:
                self._requests.session.blended(request_id, *told)
        self.refusal = self.refusal or report.no_blending

    def not_used(self, request_id: str) -> None:
        """Give back what a request has found that goes on without it."""
        self._give_back(self._parts.get(request_id, ((), 0))[0])

    def ended(self, request_id: str) -> bool:
        """Give back what a request that has ended has found. Return whether it is still being blended, in vain."""
        in_vain = self.running.pop(request_id, None) is not None
        self._asks_at.pop(request_id, None)
        self._give_back(self._parts.pop(request_id, ((), 0))[0])
        return in_vain

    def _give_back(self, parts: Sequence[_Part]) -> None:
        for _, request, _ in parts:
            self._requests.give_back(request)

    def _part(self, tracker: Any, passage: Passage, prompt: list[int]) -> _Part:
        request = self._new("", tracker.salt, tracker.adapter, passage=DONOR, tail_leaves=0, stores_tail=True)
        request.blocks = list(range(-(-passage.tokens // self._block_tokens)))  # whose numbers mean nothing
        return _Part(passage, request, prompt[passage.start : passage.end])


def hide(request: Any, exact: int, block_tokens: int) -> None:
    """Let no other request find this one's blocks in vLLM's own prefix cache, but for those of its first `exact` tokens.

    vLLM has not hashed any other of them yet. Hashes follow from those before, so one that is made up hides all after it."""
    hashes = request.block_hashes
    if not hashes:
        return  # vLLM has no prefix cache
    kept = exact // block_tokens if len(hashes) == request.num_tokens // block_tokens else 0
    if kept < len(hashes):
        made_up = type(hashes[0])(secrets.token_bytes(len(hashes[0])))
        request.block_hashes = [*hashes[:kept], made_up]
        request.update_block_hashes()


def _wanted(request: Any) -> bool:
    """Return whether passages may be blended into this request: it has computed nothing yet, and has not asked for none. Who says
    anything but true wants an exact answer."""
    params = getattr(request, "kv_transfer_params", None)
    asked = params.get(KEY, True) if isinstance(params, dict) else True
    return asked is True and bool(request.num_tokens == request.num_prompt_tokens)


def _given(vllm_config: Any) -> Mapping[str, Any]:
    extra = getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None) or {}
    return load_blending(extra=extra)
