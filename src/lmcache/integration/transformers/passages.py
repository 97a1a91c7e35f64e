"""The passages of one prompt: they are looked up, loaded and blended before `generate` computes, and stored after it.

A passage is stored as it was computed exactly, within some prompt, with its keys turned to the positions from 0 on, where any
prompt can turn them from. Blended KV is never stored: neither as a prefix, nor as a passage. So a passage that is not found, and
stands behind one that is, is computed apart, as if it stood behind the beginning of the prompt. That KV is exact and can be
stored, and it is blended into the prompt like what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmcache.chunks.passages import Passage
from lmcache.engine import Copy, Request
from lmcache.engine.blending import DONOR, Blend
from lmcache.engine.jobs import Event
from lmcache.engine.local import LocalRank
from lmcache.engine.points import stream_point
from lmcache.integration.transformers.blend import Blender
from lmcache.integration.transformers.pool import BLOCK_TOKENS, Pool


@dataclass
class _Part:
    """A passage, its own request, and where it lies in the pool's room apart while it is copied. apart: whether it was computed
    there, and not within the prompt."""

    passage: Passage
    request: Request
    place: int
    apart: bool = False


class Passages:
    """The passages of one prompt. No method raises what is not an error of PyTorch's.

    Args:
        blender: of the model.
        rank: whose server has the passages.
        pool: of which nothing runs.
        ids, tokens: the prompt, [1, tokens] and as a list.
        boundaries: in place of separators, as for `Blending.passages`.
        salt: only requests of the same salt share passages.

    Raises:
        ValueError: as `Blending.passages`.
    """

    def __init__(
        self,
        blender: Blender,
        rank: LocalRank[Request],
        pool: Pool,
        ids: torch.Tensor,
        tokens: list[int],
        boundaries: Sequence[int] | None,
        salt: str,
    ) -> None:
        self._blender, self._rank, self._pool, self._ids, self._tokens = blender, rank, pool, ids, tokens
        self.loaded: list[Passage] = []
        """The tokens that were loaded from the server, of those that `load` has put into the prompt."""
        found, self._end = blender.settings.passages(tokens, boundaries)
        self._parts: list[_Part] = []
        place = 0
        for passage in found:
            room = -(-passage.tokens // BLOCK_TOKENS) * BLOCK_TOKENS
            if place + room <= pool.apart_tokens:
                request = Request("", salt, passage=DONOR, tail_leaves=0, stores_tail=True)
                self._parts.append(_Part(passage, request, place))
                place += room

    def load(self, have: int, deadline_seconds: float) -> Blend | None:
        """Load the passages that the server has behind the first `have` tokens, and put them in their places in the prompt.
        Return what is to be computed; None if too little was found, or if a load has failed. Copies may still run then."""
        requests, now = self._rank.requests, self._rank.scheduler.runtime.now
        ends = now() + deadline_seconds
        wanted: list[tuple[_Part, Passage]] = []
        for part in self._parts:
            if now() > ends:  # each lookup may be answered late
                break
            start, end = part.passage
            requests.find(part.request, self._tokens[start:end], wait=True, wait_seconds=max(0.0, ends - now()))
            usable = Passage(max(start, have), start + min(part.request.found_tokens, part.passage.tokens))
            if usable.tokens > 0:
                wanted.append((part, usable))
            else:
                requests.give_back(part.request)
        if sum(usable.tokens for _, usable in wanted) < self._blender.settings.min_tokens:
            for part, _ in wanted:
                requests.give_back(part.request)
            return None
        after = stream_point(str(self._pool.kv(0).device))
        copies = [self._load(part, usable, after) for part, usable in wanted]
        if not self._rank.copies.settle(copies, deadline_seconds, 0.0):
            for part, _ in wanted:
                part.request.stored, part.request.tail = 0, b""
            return None
        for part, usable in wanted:
            self._blender.put(self._pool, usable, part.place, usable.start - part.passage.start)
        self.loaded = [usable for _, usable in wanted]
        found, exact = {part.passage: usable for part, usable in wanted}, wanted[0][1].start
        for part in self._parts:
            if part.passage.start >= exact and part.passage not in found:
                behind = Passage(have, exact)
                self._blender.compute_apart(self._pool, self._ids, part.passage, part.place, behind)
                self._blender.put(self._pool, part.passage, part.place, 0)
                part.apart, have, found[part.passage] = True, exact, part.passage
        return Blend(have, self._end, tuple(sorted(found.values())), self._blender.settings)

    def _load(self, part: _Part, usable: Passage, after: Event | None) -> Copy:
        start = part.passage.start
        plan = self._rank.requests.load(part.request, usable.start - start, usable.end - start)
        return self._rank.copies.load(plan, self._pool.apart(part.place), after=after)

    def compute(self, blend: Blend) -> int:
        """Compute as `Blender.compute` does. Return how many of the loaded tokens were computed again."""
        again = self._blender.compute(self._pool, self._ids, blend)
        return sum(int(((again >= start) & (again < end)).sum()) for start, end in self.loaded)

    def store(self, exact: int) -> None:
        """Store the passages that the server does not have: those within the first `exact` tokens, whose KV is exact, and those
        that were computed apart."""
        requests = self._rank.requests
        for part in self._parts:
            if part.passage.end > exact and not part.apart:
                continue
            tokens = self._tokens[part.passage.start : part.passage.end]
            plan = requests.store(part.request, tokens, len(tokens), ends=True)
            if plan is not None:
                if not part.apart:
                    self._blender.set_apart(self._pool, part.passage, part.place)
                after = stream_point(str(self._pool.kv(0).device))
                self._rank.copies.store(plan, self._pool.apart(part.place), after=after)
