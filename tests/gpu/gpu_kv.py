"""Paged KV on a GPU, in every layout that engines use."""

from __future__ import annotations

import torch

from lmcache.transfer.paged import PagedKV, Plane

LAYOUTS = (
    *("NHD [2,nb,bs,H,D]", "NHD [nb,2,bs,H,D]", "HND [2,nb,H,bs,D]", "HND [nb,2,H,bs,D]"),
    *("NHD [nb,L,2,bs,H,D]", "HND [nb,L,2,H,bs,D]", "MLA [nb,bs,D]", "HND [nb,H,bs,2D]"),
)


def paged_kv(
    layout: str, layers: int, heads: int, dims: int, block: int, count: int, dtype: torch.dtype, device: str = "cuda:0"
):
    """(PagedKV, one view [block][token][head][dim] a plane) of random KV on the GPU."""
    owners: list[torch.Tensor] = []

    def random(*shape: int) -> torch.Tensor:
        raw = torch.randint(-128, 127, (*shape, dtype.itemsize), dtype=torch.int8, device=device)
        owners.append(raw.view(dtype).squeeze(-1))
        return owners[-1]

    inner = (block, heads, dims) if layout.startswith("NHD") else (heads, block, dims)
    if layout.startswith("MLA"):
        views = [random(count, block, dims).unsqueeze(2) for _ in range(layers)]
    elif "L" in layout:
        views = list(random(count, layers, 2, *inner).flatten(1, 2).unbind(1))
    elif "2D" in layout:
        views = [part for _ in range(layers) for part in random(count, heads, block, 2 * dims).chunk(2, -1)]
    elif "[2,nb" in layout:
        views = [part for _ in range(layers) for part in random(2, count, *inner).unbind(0)]
    else:
        views = [part for _ in range(layers) for part in random(count, 2, *inner).unbind(1)]
    if layout.startswith("HND"):
        views = [view.transpose(1, 2) for view in views]
    size = dtype.itemsize
    planes = []
    for view in views:
        b, t, h, d = (stride * size for stride in view.stride())
        planes.append(Plane.strided(view.data_ptr(), b, t, view.shape[2], h, view.shape[3], d))
    return PagedKV(tuple(planes), block, count, size, owners, device), views
