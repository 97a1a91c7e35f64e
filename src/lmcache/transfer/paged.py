"""Descriptions of an engine's paged KV for the copiers: addresses and strides of each plane, whose axes may have any order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lmcache.chunks.forms import KINDS, Form
from lmcache.errors import LayoutError

ITEM_BYTES = (1, 2, 4, 8)
_ADDRESS_END = 1 << 63


@dataclass(frozen=True)
class Plane:
    """The K or the V of one layer (MLA: the latent) in one rank's paged KV. All strides are in bytes.

    Element (block b, token t of the block, head h, dim d) starts at
        address + b * block_stride
                + (t // token_group) * group_stride + (t % token_group) * token_stride
                + h * head_stride
                + (d // dim_group) * dim_group_stride + (d % dim_group) * dim_stride
    Tokens and dims have two levels each, because kernels for matrix units keep pairs or tiles of them together (VNNI).
    heads: KV heads of this rank. dims: elements of one head. form: how extents hold a head of a token; kind: the number of the
    elements' dtype (`KINDS`), where they are rounded. `PagedKV` checks the numbers.
    """

    address: int
    block_stride: int
    token_group: int
    group_stride: int
    token_stride: int
    heads: int
    head_stride: int
    dims: int
    dim_group: int
    dim_group_stride: int
    dim_stride: int
    form: Form = Form.EXACT
    kind: int = 0

    def row_bytes(self, item_bytes: int) -> int:
        """Return the bytes of one token in an extent. item_bytes: of one element in the paged KV."""
        return self.heads * self.form.head_bytes(self.dims, item_bytes)

    @classmethod
    def strided(
        cls,
        address: int,
        block_stride: int,
        token_stride: int,
        heads: int,
        head_stride: int,
        dims: int,
        dim_stride: int,
    ) -> Plane:
        """Return a plane whose tokens and dims have one stride each: the tensor's `stride()` times its item size."""
        return cls(
            address, block_stride, 1, token_stride, token_stride, heads, head_stride, dims, 1, dim_stride, dim_stride
        )

    @classmethod
    def of(cls, tensor: Any, axes: str, block_tokens: int = 0) -> Plane:
        """Return the plane of a PyTorch tensor.

        axes: the meaning of each dimension of the tensor, by its first letter: "b" block, "t" token, "h" head, "d" dim, such as
        "btd". Without "b", each `block_tokens` consecutive tokens are a block; without "h", there is one head.
        """
        sizes = dict(zip(axes, tensor.shape, strict=True))
        steps = {axis: step * tensor.element_size() for axis, step in zip(axes, tensor.stride(), strict=True)}
        block, heads = steps.get("b", steps["t"] * block_tokens), (sizes.get("h", 1), steps.get("h", 0))
        return cls.strided(tensor.data_ptr(), block, steps["t"], *heads, sizes["d"], steps["d"])


@dataclass(frozen=True)
class PagedKV:
    """One rank's paged KV: its planes in the order of an extent ([layer][K, V]; MLA: [layer]), all with the same blocks.

    block_tokens: tokens in a block. num_blocks: block ids are 0 .. num_blocks - 1. item_bytes: bytes of one element.
    keepalive: the owner of the memory, which this description keeps alive. device: the device's name in PyTorch.

    Raises:
        LayoutError: a number is out of range, elements of one plane overlap, or two planes begin at the same address. Planes that
            overlap otherwise are not detected.
    """

    planes: tuple[Plane, ...]
    block_tokens: int
    num_blocks: int
    item_bytes: int
    keepalive: object = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.planes:
            raise LayoutError("paged KV has no planes; give one for each layer for MLA, else K and V of each layer")
        for name in ("block_tokens", "num_blocks"):
            if getattr(self, name) < 1:
                raise LayoutError(f"paged KV: {name} is {getattr(self, name)}; it must be at least 1")
        if self.item_bytes not in ITEM_BYTES:
            raise LayoutError(f"paged KV: item_bytes is {self.item_bytes}; it must be one of {ITEM_BYTES}")
        for number, plane in enumerate(self.planes):
            _check_plane(self, number, plane)
        first_with: dict[int, int] = {}
        for number, plane in enumerate(self.planes):
            other = first_with.setdefault(plane.address, number)
            if other != number:
                raise LayoutError(
                    f"planes {other} and {number} both start at {plane.address:#x}; each needs its own memory"
                )

    def part(self, first_plane: int, end_plane: int, first_head: int, end_head: int) -> PagedKV:
        """Return these heads, counted from 0, of these planes."""
        planes = tuple(
            replace(plane, address=plane.address + first_head * plane.head_stride, heads=end_head - first_head)
            for plane in self.planes[first_plane:end_plane]
        )
        return replace(self, planes=planes)

    def rounded(self, forms: Sequence[Form], dtype: str) -> PagedKV:
        """Return this paged KV, of values of this dtype, for extents that hold the planes of a layer in these forms.

        Raises:
            LayoutError: a plane cannot be rounded.
        """
        planes = tuple(
            replace(plane, form=form, kind=KINDS.get(dtype, 0) if form else 0)
            for plane, form in zip(self.planes, itertools.cycle(forms), strict=False)
        )
        for number, plane in enumerate(planes):
            if not plane.form.takes(plane.dims, dtype):
                raise LayoutError(
                    f"plane {number}: heads of {plane.dims} values in {dtype} cannot be {plane.form.name}"
                )
        return replace(self, planes=planes)

    @functools.cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in an extent, in all planes together."""
        return sum(plane.row_bytes(self.item_bytes) for plane in self.planes)

    def shard_bytes(self, chunk_tokens: int) -> int:
        """Return the bytes of a shard of `chunk_tokens` tokens."""
        return self.token_bytes * chunk_tokens


@dataclass(frozen=True)
class ExtentShape:
    """Where the planes of paged KV are in an extent. planes: (offset of its first token, bytes from token to token) for each
    plane. size_bytes: of the complete extent, which may hold more layers and heads than the paged KV."""

    planes: tuple[tuple[int, int], ...]
    size_bytes: int

    @classmethod
    def of(cls, paged: PagedKV, tokens: int) -> ExtentShape:
        """Return the shape of extents of `tokens` tokens that hold these planes and nothing else."""
        rows = [plane.row_bytes(paged.item_bytes) for plane in paged.planes]
        starts = itertools.accumulate((tokens * row for row in rows), initial=0)
        return cls(tuple(zip(starts, rows, strict=False)), paged.shard_bytes(tokens))


def plane_span_bytes(paged: PagedKV, plane: Plane) -> int:
    """Return the bytes from the plane's address to the end of its last element."""
    return paged.item_bytes + sum((count - 1) * stride for _, count, stride in _axes(paged, plane))


def _axes(paged: PagedKV, plane: Plane) -> list[tuple[str, int, int]]:
    """Return (name of the stride, number of elements, stride in bytes) for each of the six axes."""
    return [
        ("block_stride", paged.num_blocks, plane.block_stride),
        ("group_stride", paged.block_tokens // plane.token_group, plane.group_stride),
        ("token_stride", plane.token_group, plane.token_stride),
        ("head_stride", plane.heads, plane.head_stride),
        ("dim_group_stride", plane.dims // plane.dim_group, plane.dim_group_stride),
        ("dim_stride", plane.dim_group, plane.dim_stride),
    ]


def _check_plane(paged: PagedKV, number: int, plane: Plane) -> None:
    for field in fields(plane):
        may_be_zero = field.name.endswith("_stride") or field.name in ("form", "kind")
        value, least = getattr(plane, field.name), 0 if may_be_zero else 1
        if value < least:
            raise LayoutError(f"plane {number}: {field.name} is {value}; it must be at least {least}")
    if paged.block_tokens % plane.token_group:
        raise LayoutError(
            f"plane {number}: token_group is {plane.token_group}; it must divide block_tokens={paged.block_tokens}"
        )
    if plane.dims % plane.dim_group:
        raise LayoutError(f"plane {number}: dim_group is {plane.dim_group}; it must divide dims={plane.dims}")
    _check_no_overlap(paged, number, plane)
    if plane.address + plane_span_bytes(paged, plane) >= _ADDRESS_END:
        raise LayoutError(f"plane {number}: its last element lies beyond the address space ({plane})")


def _check_no_overlap(paged: PagedKV, number: int, plane: Plane) -> None:
    """Check that a step of each axis passes all bytes that axes of smaller stride cover, as in any permuted or sliced tensor."""
    covered = paged.item_bytes
    for name, count, stride in sorted(_axes(paged, plane), key=lambda axis: axis[2]):
        if count == 1:
            continue
        if stride < covered:
            raise LayoutError(
                f"plane {number}: {name} is {stride} bytes, but one step must pass {covered}, else elements overlap"
            )
        covered += (count - 1) * stride
