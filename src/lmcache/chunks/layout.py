"""Layouts: everything that must be equal for KV bytes to be exchangeable, and the shard of it that one rank holds.

The engine's block size, strides and attention backend are not part of a layout: every extent has one canonical order
([layer][K, V][token][KV head][head dim]; MLA: [layer][token][latent]), and `lmcache.transfer` converts to and from it.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from lmcache.chunks.forms import KINDS, Form
from lmcache.errors import LayoutError

EXTENT_ORDER_VERSION = 1
LOSSY_KV = {"none": 0, "int8": 1, "int8-l1": 2, "k8v4-l1": 3}
"""Names of what an engine accepts -> `Layout.codec`. none: exact KV. int8: KV that the codec of that name may have rounded in a
tier. int8-l1: KV that the engine itself rounds, so that L1 and all behind it hold it in 8 bits. k8v4-l1:
the same with V in 4 bits."""
_IN_L1 = {
    LOSSY_KV["int8-l1"]: ("int8", (Form.INT8, Form.INT8)),
    LOSSY_KV["k8v4-l1"]: ("k8v4", (Form.INT8, Form.INT4)),
}
"""Numbers of `LOSSY_KV` whose KV is rounded in L1 -> the name of that, and the forms of K and V in extents."""
FINGERPRINT_BYTES = 16
MAX_NAME_CHARACTERS = 4096
"""The most characters in one text field of a layout, which is the longest path that Linux allows."""

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8_e4m3": 1,
    "fp8_e4m3fnuz": 1,
    "fp8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
PER_TOKEN_HEAD = "per_token_head"
"""Scales, of `SCALE_BYTES`, that the engine computes for each KV head of each token."""


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape, dtype and identity of a model's KV, independent of how ranks split it.

    model_id: identity of the weights (repository and commit, or a digest of a local directory). kv_dtype: a key of `DTYPE_BYTES`.
    kv_scales: `PER_TOKEN_HEAD` if the scale of each head of each token lies behind its elements and travels with them; "" where
    there are no scales, or where they are part of the weights. num_kv_heads: KV heads of the model before any parallel split (1
    for MLA). head_size: elements of one head's K or V (MLA: of the latent), with the bytes of its scale, if it has one. kind:
    `state` is what a recurrent layer (Mamba, linear attention) knows after a chunk, `head_size` elements for each of
    `num_kv_heads` parts that ranks hold; it is not divided by tokens. config_digest: digest of the RoPE settings and of every
    other override that changes the KV."""

    model_id: str
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    chunk_tokens: int
    kind: Literal["mha", "mla", "state"] = "mha"
    kv_scales: str = ""
    config_digest: str = ""
    slot_order: int = EXTENT_ORDER_VERSION
    """The field names are part of the fingerprint: with another name here, all stored KV would have another name, too."""
    codec: int = LOSSY_KV["none"]
    """What may have changed the KV of this name since it was computed, a number of `LOSSY_KV`."""

    def __post_init__(self) -> None:
        if self.kv_dtype not in DTYPE_BYTES:
            raise LayoutError(f"KV dtype {self.kv_dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        for name in ("num_layers", "num_kv_heads", "head_size", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("model_id", "kv_scales", "config_digest"):
            length = len(getattr(self, name))
            if length > MAX_NAME_CHARACTERS:
                raise LayoutError(f"{name} has {length} characters; at most {MAX_NAME_CHARACTERS} are allowed")

    @property
    def planes_per_layer(self) -> int:
        """2 (K and V); 1 for MLA, whose latent serves as both K and V, and for states."""
        return 2 if self.kind == "mha" else 1

    @property
    def rounded_row(self) -> int:
        """The elements of a row that `int8` may round with one scale: the head of a token. 0 if this KV must stay exact, or if
        rounding was never measured for its kind: latents of MLA, states, and KV that is quantized already."""
        return self.head_size if self.codec == LOSSY_KV["int8"] and self._plain else 0

    @property
    def _plain(self) -> bool:
        return self.kind == "mha" and self.kv_dtype in KINDS and not self.kv_scales

    @property
    def forms(self) -> tuple[Form, ...]:
        """How extents hold the planes of a layer. What may be rounded is what `rounded_row` says."""
        forms = _IN_L1[self.codec][1] if self.codec in _IN_L1 else ()
        if not forms or not self._plain or not all(one.takes(self.head_size, self.kv_dtype) for one in forms):
            return (Form.EXACT,) * self.planes_per_layer
        return forms

    @property
    def rounded_in_l1(self) -> bool:
        """Whether the engine rounds this KV when it stores it."""
        return any(self.forms)

    @property
    def l1_codec(self) -> str:
        """The name of what the engine asks for: `none`, or how its KV is rounded in L1. KV that cannot be rounded is exact
        nevertheless."""
        return _IN_L1[self.codec][0] if self.codec in _IN_L1 else "none"

    @property
    def stored_dtype(self) -> str:
        """The dtype of what extents hold, by which a tier chooses a lossless codec."""
        return "uint8" if self.rounded_in_l1 else self.kv_dtype

    @property
    def head_bytes(self) -> tuple[int, ...]:
        """For each plane of a layer the bytes of one head of a token in an extent."""
        return tuple(one.head_bytes(self.head_size, DTYPE_BYTES[self.kv_dtype]) for one in self.forms)

    @property
    def lossy_kv(self) -> str:
        """The name of what the engine accepts, as in `LOSSY_KV`; its number if this release does not know it."""
        return next((name for name, codec in LOSSY_KV.items() if codec == self.codec), str(self.codec))

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that are equal exactly for layouts whose KV may be exchanged."""
        return _fingerprint(self)


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of KV of a model that has several. The layout of a group describes the layers of that group only.

    layers: numbers of the group's layers in the model, ascending. reach_tokens: how many tokens before the end of a prefix the
    engine needs in order to go on from there, in complete blocks; 0 for all of them; 1 for states. An extent holds the last
    `kept_tokens` of its chunk."""

    layers: tuple[int, ...]
    reach_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.layers or any(a >= b for a, b in itertools.pairwise((-1, *self.layers))):
            raise LayoutError(f"layers {list(self.layers)[:20]} of a group are not ascending numbers from 0 on")
        if self.reach_tokens < 0:
            raise LayoutError(f"reach_tokens is {self.reach_tokens}; it must be 0 (everything) or more")

    def reach_chunks(self, chunk_tokens: int) -> int:
        """Return how many chunks before the end of a prefix are needed; 0 for all of them."""
        return -(-self.reach_tokens // chunk_tokens)

    def kept_tokens(self, chunk_tokens: int) -> int:
        """Return how many tokens of each chunk are stored, which are the last ones: the others are out of reach at its end."""
        return min(chunk_tokens, self.reach_tokens) if self.reach_tokens else chunk_tokens


def space_fingerprint(layout: Layout, stages: Sequence[int] = (), group: Group | None = None) -> bytes:
    """Return 16 bytes that identify a layout together with its pipeline split and, in a model with several kinds of KV, its
    group.

    stages: for each pipeline stage the first layer after it; empty or one entry for a model that is not split by layers. Shards
    are numbered by stage and head group, so 4 shards may be 4 head groups or 2 stages of 2, with equal sizes but different
    contents. The split in the fingerprint keeps these apart.

    Raises:
        LayoutError: the stages do not cover the layers in order.
    """
    if group is not None:
        one = space_fingerprint(layout, stages)
        return blake3(b"group" + one + msgspec.msgpack.encode(group, order="deterministic")).digest(FINGERPRINT_BYTES)
    if len(stages) < 2:
        return layout.fingerprint
    _check_stages(layout, stages)
    return blake3(layout.fingerprint + struct.pack(f"<{len(stages)}I", *stages)).digest(FINGERPRINT_BYTES)


def _check_stages(layout: Layout, stages: Sequence[int]) -> None:
    if stages[-1] != layout.num_layers or any(end <= start for start, end in itertools.pairwise((0, *stages))):
        raise LayoutError(
            f"pipeline stages that end before layers {list(stages)} do not cover {layout.num_layers} layers"
        )


@functools.lru_cache(maxsize=256)
def _fingerprint(layout: Layout) -> bytes:
    return blake3(b"lmcache layout v1" + msgspec.msgpack.encode(layout, order="deterministic")).digest(
        FINGERPRINT_BYTES
    )


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's part of every chunk: half-open ranges of layers and of KV heads, and its index among all `count` shards."""

    index: int
    count: int
    first_layer: int
    end_layer: int
    first_head: int
    end_head: int

    def shard_bytes(self, layout: Layout) -> int:
        """Return the bytes of this shard of one full chunk in an extent."""
        return self.token_bytes(layout) * layout.chunk_tokens

    def token_bytes(self, layout: Layout) -> int:
        """Return the bytes of this shard for one token in an extent."""
        layers, heads = self.end_layer - self.first_layer, self.end_head - self.first_head
        return layers * heads * sum(layout.head_bytes)


class Split(msgspec.Struct, frozen=True, array_like=True):
    """How the ranks of an engine divide each chunk of a layout into `count` shards.

    stages: for each pipeline stage the first layer after it; empty or one entry for a model that is not split by layers. Each
    stage has equally many shards, of equally many KV heads. A split by tokens (decode context parallel) is none of these."""

    stages: tuple[int, ...]
    count: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def stage_shards(self) -> int:
        """The number of shards of each stage."""
        return self.count // max(1, len(self.stages))

    def shard(self, layout: Layout, index: int) -> Shard:
        """Return the layers and heads of one shard, which is the one of `shard_of_rank` with the same index.

        Raises:
            LayoutError: the layout cannot be split like this.
        """
        stages = self.stages if len(self.stages) > 1 else (layout.num_layers,)
        _check_stages(layout, stages)
        parts, heads = self.stage_shards, layout.num_kv_heads
        if parts < 1 or self.count % len(stages) or heads % parts or not 0 <= index < self.count:
            raise LayoutError(
                f"there is no shard {index} of {self.count} in {len(stages)} stages of a model with {heads} KV heads"
            )
        stage, part = divmod(index, parts)
        first, width = (0, *stages)[stage], heads // parts
        return Shard(index, self.count, first, stages[stage], part * width, (part + 1) * width)


def tensor_splits(layout: Layout, most: int) -> list[Split]:
    """Return all splits of a layout by KV heads only, into at most `most` shards. An engine may claim any number of heads."""
    heads = layout.num_kv_heads
    return [Split((), count) for count in range(1, min(heads, most) + 1) if heads % count == 0]


def shard_of_rank(
    layout: Layout, tp_rank: int, tp_size: int, first_layer: int, end_layer: int, pp_rank: int = 0, pp_size: int = 1
) -> Shard:
    """Return the shard that a tensor-parallel rank holds.

    With MLA every tensor-parallel rank holds the same latent, so all share one shard. With more ranks than KV heads the engine
    replicates the heads, so groups of `tp_size / num_kv_heads` ranks share one shard.

    Raises:
        LayoutError: the KV heads do not divide among the ranks.
    """
    heads = layout.num_kv_heads
    parts = 1 if layout.kind == "mla" else min(tp_size, heads)
    if heads % parts or tp_size % parts:
        raise LayoutError(f"{heads} KV heads cannot be split evenly among tensor_parallel_size={tp_size}")
    part = tp_rank * parts // tp_size
    width = heads // parts
    return Shard(pp_rank * parts + part, pp_size * parts, first_layer, end_layer, part * width, (part + 1) * width)
