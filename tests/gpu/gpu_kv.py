"""Paged KV on a GPU, in every layout that engines use."""

from __future__ import annotations

import torch

from lmcache.transfer.paged import PagedKV, Plane

LAYOUTS = ("NHD [2,nb,bs,H,D]", "NHD [nb,2,bs,H,D]", "HND [2,nb,H,bs,D]", "HND [nb,2,H,bs,D]", "MLA [nb,bs,D]")


def paged_kv(
    layout: str, layers: int, heads: int, dims: int, block: int, count: int, dtype: torch.dtype, device: str = "cuda:0"
):
    """(PagedKV, one view [block][token][head][dim] a plane) of random KV on the GPU."""
    planes, views, owners = [], [], []
    for _ in range(layers):
        if layout.startswith("MLA"):
            shape, order = (count, block, dims), None
        else:
            inner = (block, heads, dims) if layout.startswith("NHD") else (heads, block, dims)
            shape = (2, count, *inner) if "[2,nb" in layout else (count, 2, *inner)
            order = layout
        raw = torch.randint(-128, 127, (*shape, dtype.itemsize), dtype=torch.int8, device=device)
        tensor = raw.view(dtype).squeeze(-1)
        owners.append(tensor)
        if order is None:
            parts = [tensor.unsqueeze(2)]
        else:
            parts = [tensor[i] if "[2,nb" in layout else tensor[:, i] for i in (0, 1)]
            if layout.startswith("HND"):
                parts = [part.transpose(1, 2) for part in parts]
        for part in parts:
            size = part.element_size()
            b, t, h, d = (stride * size for stride in part.stride())
            planes.append(Plane.strided(part.data_ptr(), b, t, part.shape[2], h, part.shape[3], d))
            views.append(part)
    return PagedKV(tuple(planes), block, count, dtype.itemsize, owners, device), views
