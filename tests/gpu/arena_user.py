"""An engine process on an arena that another one uses, too: `python arena_user.py ARENA DEVICE`, a command a line.

ready          once it has KV, and the arena
store PART     all its KV into that quarter of the arena; tells a digest of it
load PART      that quarter into its KV; tells a digest
copy A B ...   from and to those quarters, until killed
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from gpu_kv import paged_kv

from lmcache.memory.arena import Mapping
from lmcache.transfer.gpu.copier import CudaCopier


def digest_of(views: list[torch.Tensor], table: npt.NDArray[np.int32]) -> str:
    """Of the KV in the order of its tokens, wherever its blocks are."""
    index = torch.from_numpy(table.astype(np.int64)).to(views[0].device)
    digest = blake3()
    for view in views:
        digest.update(view[index].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def main(path: Path, device: str) -> None:
    from test_cuda_sharing import BLOCK, CHUNK, COUNT, DIMS, EXTENT, HEADS, LAYERS, PART, WHOLE

    descriptor = os.open(path, os.O_RDWR)
    mapping = Mapping(descriptor, path.stat().st_size)
    paged, views = paged_kv("HND [nb,2,H,bs,D]", LAYERS, HEADS, DIMS, BLOCK, COUNT, torch.bfloat16, device)
    copier = CudaCopier(paged, CHUNK)
    copier.adopt(mapping.address, mapping.size_bytes)
    copier._arena.wait_registered()
    table = np.random.default_rng(9).permutation(COUNT).astype(np.int32)

    def runs_of(part: str) -> npt.NDArray[np.int64]:
        return WHOLE + np.array([int(part) * PART * EXTENT, 0, 0, 0])

    def copy_for_ever(to: str, back: str) -> None:
        def one_way(copy: object, runs: npt.NDArray[np.int64]) -> None:
            while True:
                copy(mapping.address, table, runs, arena_bytes=mapping.size_bytes)  # type: ignore[operator]

        for copy, part in ((copier.gather, to), (copier.scatter, back)):
            threading.Thread(target=one_way, args=(copy, runs_of(part)), daemon=True).start()

    for line in sys.stdin:
        what, *parts = line.split()
        if what == "store":
            copier.gather(mapping.address, table, runs_of(parts[0]), arena_bytes=mapping.size_bytes)
        elif what == "load":
            copier.scatter(mapping.address, table, runs_of(parts[0]), arena_bytes=mapping.size_bytes)
        elif what == "copy":
            copy_for_ever(parts[0], parts[1])
        answer = {"ready": "ready", "copy": "begun"}.get(what) or digest_of(views, table)
        print(answer, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
