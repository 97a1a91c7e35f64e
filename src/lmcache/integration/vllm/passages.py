"""The worker's half of blending: passages are loaded beside the steps, and blended into requests when they have arrived.

Passages are copied through a room of their own, in plain order and with keys as if each began at position 0: from the server's
extents to the room by a session of its own, and between the room and the engine's blocks by this rank's copier. vLLM takes a
request up again only after it has been blended completely. Whatever fails is reported as blocks that could not be filled, so
vLLM computes the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lmcache.chunks.passages import Passage
from lmcache.engine import Copies, Copy, StorePlan, WorkerSession
from lmcache.engine.blending import Blending
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import RankGroup
from lmcache.engine.served import NOT_SERVED
from lmcache.errors import LayoutError
from lmcache.integration.vllm.blender import Blender
from lmcache.integration.vllm.model import ModelKV
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import BlendPlan, PassageStore, StepReport
from lmcache.observability.log import init_logger
from lmcache.transfer.copier import make_copiers
from lmcache.transfer.paged import PagedKV, Plane

logger = init_logger(__name__)
PLACE_TOKENS = 16
"""Passages begin at multiples of so many tokens of the room."""


class Room:
    """Memory for passages: [layer][K, V][token][KV head][head dim]. It is touched only where it is used.

    registered: the engine's KV, on a CPU. dtype: of it, in PyTorch. tokens: how many have room, at least."""

    def __init__(self, registered: Registered, dtype: Any, tokens: int) -> None:
        planes = registered.paged.planes
        places, heads, size = -(-tokens // PLACE_TOKENS), planes[0].heads, planes[0].dims
        self.tokens, self._registered = places * PLACE_TOKENS, registered
        self.kv = torch.empty((len(planes) // 2, 2, self.tokens, heads, size), dtype=dtype)
        flat = [Plane.of(one, "thd", PLACE_TOKENS) for layer in self.kv for one in layer]
        self.paged = PagedKV(tuple(flat), PLACE_TOKENS, places, self.kv.element_size(), self.kv)
        self._free = [Passage(0, self.tokens)]
        (self._copier,) = make_copiers([(registered.paged, self.tokens)])

    def take(self, tokens: int) -> int | None:
        """Return the place of `tokens` free tokens, which are not free any more; None if there is none."""
        wanted = -(-tokens // PLACE_TOKENS) * PLACE_TOKENS
        for number, (start, end) in enumerate(self._free):
            if end - start >= wanted:
                self._free[number : number + 1] = [Passage(start + wanted, end)] if end - start > wanted else []
                return start
        return None

    def give_back(self, place: int, tokens: int) -> None:
        """Make free what `take` has returned for so many tokens."""
        joined: list[Passage] = []
        for one in sorted([*self._free, Passage(place, place + -(-tokens // PLACE_TOKENS) * PLACE_TOKENS)]):
            if joined and joined[-1].end == one.start:
                joined[-1] = Passage(joined[-1].start, one.end)
            else:
                joined.append(one)
        self._free = joined

    def blocks(self, table: Sequence[int]) -> list[int]:
        """Return a block table of the scheduler in blocks of the engine's tensors."""
        return self._registered.blocks(table)

    def table(self, place: int, tokens: int) -> list[int]:
        """Return the block table of a passage at this place."""
        first = place // PLACE_TOKENS
        return list(range(first, first - (-tokens // PLACE_TOKENS)))

    def put(self, place: int, tokens: Passage, blocks: Sequence[int]) -> None:
        """Copy from this place to tokens of a request with these blocks."""
        self._copier.scatter(*self._copy(place, tokens, blocks))

    def get(self, place: int, tokens: Passage, blocks: Sequence[int]) -> None:
        """Copy tokens of a request with these blocks to this place."""
        self._copier.gather(*self._copy(place, tokens, blocks))

    def _copy(self, place: int, tokens: Passage, blocks: Sequence[int]) -> tuple[int, Any, Any]:
        table = np.asarray(self.blocks(blocks), dtype=np.int32)
        return self.kv.data_ptr(), table, np.array([[0, tokens.start, tokens.tokens, place]], dtype=np.int64)


@dataclass(eq=False)
class _Blending:
    """A request that is being blended. places: of its passages in the room. copies: of its loads; empty until it has places.
    forwards: of the blender, once it has begun; due: tokens of the next one. wanted: whether the request has not ended
    meanwhile."""

    plan: BlendPlan
    weights: int
    places: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    forwards: Iterator[int] | None = None
    due: int = 0
    wanted: bool = True


class Passages:
    """The passages of one rank. session: copies between extents and the room. shard: the index of this rank's shard."""

    def __init__(self, blender: Blender, room: Room, session: WorkerSession, shard: int) -> None:
        self._blender, self._room, self._session = blender, room, session
        self._copies = Copies(session, shard, ended=self._ended)
        self._waiting: list[_Blending] = []
        self._stored: dict[str, tuple[int, int]] = {}
        """Store job -> its place in the room, and its tokens."""
        self._jobs: set[str] = set()
        """Loads of prefixes: their ends are not reported as those of other loads."""
        self.report = StepReport()
        self.refusal = ""
        """Why nothing is blended any more, else ""."""

    def owns(self, copy: Copy) -> bool:
        """Return whether this load is a part of what is blended."""
        return copy.plan.job_id in self._jobs

    def begin(self, plans: Sequence[BlendPlan], weights: int, own: Copies, given_up: Collection[str] = ()) -> None:
        """Begin to load what is blended. weights: number of weight changes that the plan knows of. own: the rank's copies to its
        blocks. given_up: requests that are not to be blended any more."""
        self._waiting += [_Blending(plan, weights) for plan in plans]
        for one in self._waiting:
            one.wanted = one.wanted and one.plan.request_id not in given_up
        for one in self._waiting:
            if one.wanted and not one.places and not self._begin(one, own):
                break  # until another one has been blended

    def _begin(self, one: _Blending, own: Copies) -> bool:
        for passage, _ in one.plan.passages:
            place = self._room.take(passage.tokens)
            if place is None:
                self._free(one)
                return False
            one.places.append(place)
        for (passage, load), place in zip(one.plan.passages, one.places, strict=True):
            one.copies.append(self._copies.load(load, self._room.table(place, passage.tokens)))
        if one.plan.prefix is not None:
            self._jobs.add(one.plan.prefix.job_id)
            one.copies.append(own.load(one.plan.prefix, self._room.blocks(one.plan.blocks)))
        return True

    def finished(self, weights: int, wait_seconds: float) -> tuple[set[str], list[BlendPlan]]:
        """Blend what has arrived: one request, and no more of it at once than a forward, since this holds up a step. Return
        (requests that are blended or have failed, the plans of those that have failed). wait_seconds: how long to wait for copies
        if nothing has arrived."""
        self._copies.collect()
        if wait_seconds and self._waiting and self._arrived() is None:
            self._session.wait_finished(wait_seconds)
            self._copies.collect()
        one = self._arrived()
        if one is None:
            return set(), []
        ok: bool | None = True
        if one.wanted:
            ok = not self.refusal and one.weights == weights and all(copy.ok for copy in one.copies)
            ok = ok and self._blend(one)
        if ok is None:
            return set(), []
        self._waiting.remove(one)
        self._jobs -= {copy.plan.job_id for copy in one.copies}
        self._free(one)
        return {one.plan.request_id}, [] if ok else [one.plan]

    def _arrived(self) -> _Blending | None:
        """Return one whose copies have ended: first of those that nobody waits for, then one that has begun."""
        begun = (one for one in self._waiting if one.copies or not one.wanted)
        ready = [one for one in begun if all(copy.done is not None for copy in one.copies)]
        return min(ready, key=lambda one: (one.wanted, one.forwards is None), default=None)

    def _blend(self, one: _Blending) -> bool | None:
        """Blend this request, or a part of it. Return whether that has succeeded, None if there is more to compute."""
        plan, blended, left = one.plan, one.plan.blend.blended, self._blender.at_once
        try:
            with torch.inference_mode():
                if one.forwards is None:
                    for (passage, _), place, usable in zip(plan.passages, one.places, blended, strict=True):
                        first = usable.start - passage.start
                        self._turn(place + first, usable.tokens, first, usable.start)
                        self._room.put(place + first, usable, plan.blocks)
                    one.forwards = self._blender.compute(plan.tokens, plan.blocks, plan.blend)
                    one.due = next(one.forwards)
                while True:
                    left -= one.due
                    one.due = next(one.forwards)
                    if one.due > left:
                        return None
        except StopIteration as end:
            again = end.value
        except NOT_SERVED as error:  # also of PyTorch, such as too little memory
            self._refuse(error)
            return False
        self.report.blended[plan.request_id] = len(blended), plan.blend.tokens, len(again)
        return True

    def store(self, stores: Sequence[PassageStore], fresh: bool) -> None:
        """Store passages of prompts that were computed by now. fresh: whether by the weights that the plan knows of."""
        # A blend that waits for room comes first: what would be stored could keep the room for ever.
        short = any(one.wanted and not one.places for one in self._waiting)
        for one in stores:
            place = self._room.take(one.passage.tokens) if fresh and not (self.refusal or short) else None
            if place is None:
                self._copies.drop(one.plan, "queue full" if fresh else "weights changed")
                continue
            try:
                with torch.inference_mode():
                    self._room.get(place, one.passage, one.blocks)
                    self._turn(place, one.passage.tokens, one.passage.start, 0)
            except NOT_SERVED as error:
                self._refuse(error)
                self._room.give_back(place, one.passage.tokens)
                self._copies.drop(one.plan, "closed")
                continue
            self._stored[one.plan.job_id] = place, one.passage.tokens
            self._copies.store(one.plan, self._room.table(place, one.passage.tokens))

    def close(self) -> None:
        self._session.close()

    def _refuse(self, error: Exception) -> None:
        self.refusal = self.report.no_blending = str(error) or type(error).__name__
        logger.warning("Nothing is blended any more: %s", self.refusal)

    def _turn(self, place: int, tokens: int, come: int, go: int) -> None:
        """Turn keys at this place, of positions from `come` on, to positions from `go` on."""
        counted = torch.arange(tokens)
        for layer, turn in enumerate(self._blender.turns):
            keys = self._room.kv[layer, 0, place : place + tokens]
            keys.copy_(turn.turned(keys.transpose(0, 1), come + counted, go + counted).transpose(0, 1))

    def _ended(self, copy: Copy) -> None:
        if isinstance(copy.plan, StorePlan):
            self.report.stored[copy.plan.job_id] = 1
            if (had := self._stored.pop(copy.plan.job_id, None)) is not None:
                self._room.give_back(*had)

    def _free(self, one: _Blending) -> None:
        for (passage, _), place in zip(one.plan.passages, one.places, strict=False):
            self._room.give_back(place, passage.tokens)
        one.places = []


def passages_of(
    vllm_config: Any,
    kv_cache_config: Any,
    kv: ModelKV,
    settings: Blending,
    group: RankGroup,
    registered: Registered,
    endpoint: Endpoint,
) -> Passages:
    """Return what blends in the one rank of an engine. group, registered: its KV. endpoint: for a session of its own.

    Raises:
        LayoutError: this model's KV cannot be blended; the message says why.
    """
    spec, model = kv_cache_config.kv_cache_groups[kv.number].kv_cache_spec, vllm_config.model_config
    blender = Blender(vllm_config, kv.layer_names, spec, registered)
    if settings.choose == "deviation" and settings.check_layer >= len(blender.turns):
        raise LayoutError(
            f"blend_check_layers is {settings.check_layer}, and the model has {len(blender.turns)} layers"
        )
    room = Room(registered, model.dtype, settings.room(int(model.max_model_len), PLACE_TOKENS))
    return Passages(blender, room, WorkerSession(endpoint, replace(group, paged=room.paged)), group.shard.index)
