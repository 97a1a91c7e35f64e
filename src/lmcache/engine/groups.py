"""The groups of a model with several kinds of KV, as sessions register them. A model with one kind has one group, `None`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.chunks import Group, Layout, Shard, Split
from lmcache.chunks.layout import DTYPE_BYTES
from lmcache.engine.session import LayoutFor
from lmcache.errors import LayoutError
from lmcache.transfer.bounds import Runs
from lmcache.transfer.paged import ExtentShape, PagedKV
from lmcache.wire import messages as m

_REACH_TO_KEEP_ALL = 2048
"""Tokens. A group with a shorter reach needs a part of the memory only, since prompts are longer."""


class GroupShape(NamedTuple):
    """A group as the scheduler knows it. shards: how many shards a chunk has in this group. share: as in `shares`. stages: as for
    `RankGroup`."""

    layout_for: LayoutFor
    shards: int
    group: Group | None = None
    share: float = 1.0
    stages: tuple[int, ...] = ()

    def registration(self, chunk_tokens: int, shard: int = -1, shard_bytes: int = 0, main: int = -1) -> m.Register:
        """Return the request that registers the group, as the scheduler or as a rank that holds `shard`. main: as there."""
        layout, stages = self.layout_for(chunk_tokens), list(self.stages)
        return m.Register(layout, self.shards, shard, shard_bytes, stages, self.group, self.share, main)


@dataclass(frozen=True)
class RankGroup:
    """A group as one rank knows it. shard: the part of every chunk that the rank holds. paged: the rank's paged KV. share: as in
    `shares`."""

    layout_for: LayoutFor
    shard: Shard
    paged: PagedKV
    group: Group | None = None
    share: float = 1.0
    state_tokens: int = 0
    """For states: a block of the engine's table holds the state after so many tokens, or a multiple of them. 0 for KV of
    tokens."""
    block_tokens: int = 0
    """Tokens of a block of the engine's scheduler; 0 if it has the blocks of the paged KV."""
    stages: tuple[int, ...] = ()
    """The layer of the group before which each pipeline stage with layers of it ends, if there are several."""

    local_tokens: int = 0
    """As in `GroupTable`."""

    @property
    def shape(self) -> GroupShape:
        """The group as the scheduler knows it."""
        return GroupShape(self.layout_for, self.shard.count, self.group, self.share, self.stages)

    def first_token(self, chunk: npt.NDArray[np.int64], chunk_tokens: int) -> npt.NDArray[np.int64]:
        """Return the first token of each of these chunks that its extent holds."""
        return (chunk + 1) * chunk_tokens - self.kept_tokens(chunk_tokens)

    def in_table(self, runs: Runs) -> Runs:
        """Return runs that count the engine's tokens as runs of the paged KV, where a state is one token."""
        if self.state_tokens:
            runs[:, 1] //= self.state_tokens
        return runs

    def kept_tokens(self, chunk_tokens: int) -> int:
        """Return how many tokens of a chunk an extent holds.

        Raises:
            LayoutError: chunks do not end where blocks end. Of the first block in reach a load would then fill a part only, and
                the engine would later use all of it for a shorter prefix.
        """
        reach = self.group.reach_tokens if self.group is not None else 0
        block = self.block_tokens or self.paged.block_tokens
        if reach and chunk_tokens % block:
            raise LayoutError(
                f"chunks of {chunk_tokens} tokens do not end where the engine has the state or the window of its layers, "
                f"which is every {block} tokens: start the server with --chunk-size {block} or a multiple of it"
            )
        if self.local_tokens and chunk_tokens % self.local_tokens and self.local_tokens % chunk_tokens:
            raise LayoutError(
                f"chunks of {chunk_tokens} tokens do not end where chunks of attention do, which is every {self.local_tokens} "
                f"tokens: start the server with --chunk-size {self.local_tokens}, or a multiple or divisor of it"
            )
        return self.group.kept_tokens(chunk_tokens) if self.group is not None else chunk_tokens

    def stored(self, chunk_tokens: int) -> PagedKV:
        """Return the paged KV as extents hold it, which may be rounded.

        Raises:
            IdentityUnknown: there is no layout yet.
            LayoutError: the planes do not have the layout's heads, so these cannot be rounded.
        """
        layout = self.layout_for(chunk_tokens)
        if not layout.rounded_in_l1:
            return self.paged
        self._check_heads(layout, "rounded")
        return self.paged.rounded(layout.forms, layout.kv_dtype)

    def _check_heads(self, layout: Layout, what: str) -> None:
        wanted = self.shard.end_head - self.shard.first_head, layout.head_size * DTYPE_BYTES[layout.kv_dtype]
        for plane in self.paged.planes:
            held = plane.heads, plane.dims * self.paged.item_bytes
            if held != wanted:
                raise LayoutError(
                    f"planes of {held[0]} heads of {held[1]} bytes cannot be {what}: describe the {wanted[0]} KV heads of "
                    f"{wanted[1]} bytes that this rank has"
                )

    def overlap(self, split: Split, index: int, chunk_tokens: int) -> tuple[PagedKV, ExtentShape] | None:
        """Return the part of the paged KV that shard `index` of another split holds, too, and the shape of that shard's extents;
        None if they have nothing in common.

        Raises:
            LayoutError: the layout cannot be split like this, or the planes do not have its heads.
        """
        layout, own, paged = self.layout_for(chunk_tokens), self.shard, self.stored(chunk_tokens)
        other = split.shard(layout, index)
        self._check_heads(layout, "filled from shards of another split")
        layers = range(max(own.first_layer, other.first_layer), min(own.end_layer, other.end_layer))
        heads = range(max(own.first_head, other.first_head), min(own.end_head, other.end_head))
        if not layers or not heads:
            return None
        kept, per_layer = self.kept_tokens(chunk_tokens), len(layout.head_bytes)
        first, end = ((layer - own.first_layer) * per_layer for layer in (layers.start, layers.stop))
        planes, start = [], 0
        for plane, head in enumerate(layout.head_bytes * (layers.stop - other.first_layer)):
            row = (other.end_head - other.first_head) * head
            if plane >= (layers.start - other.first_layer) * per_layer:
                planes.append((start + (heads.start - other.first_head) * head, row))
            start += kept * row
        part = paged.part(first, end, heads.start - own.first_head, heads.stop - own.first_head)
        return part, ExtentShape(tuple(planes), other.token_bytes(layout) * kept)

    def shard_bytes(self, chunk_tokens: int) -> int:
        """Return the bytes of an extent.

        Raises:
            LayoutError: the KV tensors do not have the layout's size.
        """
        kept = self.kept_tokens(chunk_tokens)
        of_layout = self.shard.token_bytes(self.layout_for(chunk_tokens)) * kept
        of_tensors = self.stored(chunk_tokens).shard_bytes(kept)
        if of_tensors != of_layout:
            raise LayoutError(f"the KV tensors make shards of {of_tensors} bytes, the layout {of_layout}")
        return of_layout


def refuse_unrounded(layouts: Sequence[Layout]) -> None:
    """Return if a layout of an engine's groups is rounded in L1, or none is meant to be.

    Raises:
        LayoutError: all of the KV is of kinds that cannot be rounded.
    """
    if any(one.l1_codec != "none" for one in layouts) and not any(one.rounded_in_l1 for one in layouts):
        kinds = sorted({f"{one.kind} in {one.kv_dtype}, {one.head_size} values a head" for one in layouts})
        raise LayoutError(
            f"lossy_kv={layouts[0].lossy_kv} cannot be served: only K and V in bfloat16, float16 or float32 that the engine has "
            "not quantized can be rounded, and V to 4 bits only in heads of a multiple of 32 values. This KV is "
            f"{'; '.join(kinds)}: set lossy_kv to none"
        )


def shares(groups: Sequence[tuple[int, int]]) -> list[float]:
    """Return which part of a model's memory each of its groups should hold when memory is short; the sum is 1.

    groups: (bytes of a token, reach in tokens or 0 for everything). A prompt of many tokens is usable with few tokens of a group
    with a reach. These are kept at several places of it: where prompts begin to differ, and where each of them ends.
    """
    needed = [size * min(1.0, reach / _REACH_TO_KEEP_ALL if reach else 1.0) for size, reach in groups]
    return [one / sum(needed) for one in needed]
