"""A GPU loads what ranks of other parallel splits have stored, bit for bit. Skips where there is no GPU."""

from __future__ import annotations

import itertools
import mmap
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_kv import LAYOUTS, paged_kv  # noqa: E402

from lmcache.chunks import Layout, Split  # noqa: E402
from lmcache.engine.groups import RankGroup  # noqa: E402
from lmcache.errors import LayoutError  # noqa: E402
from lmcache.memory.slabs import SECTOR_BYTES  # noqa: E402
from lmcache.transfer.gpu.copier import CudaCopier  # noqa: E402

LAYERS, HEADS, DIMS = 4, 8, 64
SPLITS = [Split((), 1), Split((), 2), Split((), 8), Split((1, 4), 2), Split((2, 4), 8)]
KIND = {torch.bfloat16: ("bfloat16", np.uint16), torch.int8: ("int8", np.uint8)}


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if not one.startswith("MLA")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("chunk", "block"), [(256, 16), (48, 32)])
@pytest.mark.parametrize("registered", [True, False])
def test_every_split_is_put_together_from_every_other_one(
    layout: str, dtype: torch.dtype, chunk: int, block: int, registered: bool
) -> None:
    """Three chunks, of which a part is loaded, from scattered extents into scattered blocks."""
    rng, (name, words) = random.Random(f"{layout}{dtype}{chunk}"), KIND[dtype]
    described = Layout("m", name, LAYERS, HEADS, DIMS, chunk)
    whole = np.random.default_rng(1).integers(0, np.iinfo(words).max, (LAYERS, 2, 3 * chunk, HEADS, DIMS), words)
    arena = np.frombuffer(mmap.mmap(-1, 32 << 20), dtype=np.uint8)
    start, end, count = 3, 3 * chunk - 5, 64
    table = np.array(rng.sample(range(count), -(-3 * chunk // block)), dtype=np.int32)
    position = np.arange(start, end)
    for reader, writer in itertools.product(SPLITS, SPLITS):
        own = reader.shard(described, rng.randrange(reader.count))
        layers, heads = range(own.first_layer, own.end_layer), slice(own.first_head, own.end_head)
        paged, views = paged_kv(layout, len(layers), own.end_head - own.first_head, DIMS, block, count, dtype)
        group, copier = RankGroup(lambda tokens: described, own, paged), CudaCopier(paged, chunk, staging_bytes=8 << 20)
        if registered:
            copier.adopt(arena.ctypes.data, arena.nbytes)
            assert copier._own_arena is not None
            copier._own_arena.wait_registered()
        before = [view.clone() for view in views]
        for number in range(writer.count):
            overlap = group.overlap(writer, number, chunk)
            if overlap is None:
                continue
            other = writer.shard(described, number)
            theirs = whole[other.first_layer : other.end_layer, :, :, other.first_head : other.end_head]
            size, runs = -(-overlap[1].size_bytes // SECTOR_BYTES) * SECTOR_BYTES, []
            for place, one in enumerate(rng.sample(range(3), 3)):
                extent = theirs[:, :, one * chunk : (one + 1) * chunk].tobytes()
                arena[place * size : place * size + len(extent)] = np.frombuffer(extent, np.uint8)
                first, last = max(start, one * chunk), min(end, (one + 1) * chunk)
                runs.append((place * size, first, last - first, first - one * chunk))
            loads = np.array(runs, dtype=np.int64)
            reading = copier.reader(overlap)
            reading.scatter(arena.ctypes.data, table, loads, arena_bytes=arena.nbytes)
            with pytest.raises(LayoutError):
                reading.scatter(arena.ctypes.data, table, loads, arena_bytes=2 * size)
        for plane, (view, old) in enumerate(zip(views, before, strict=True)):
            filled = whole[layers[plane // 2], plane % 2, start:end, heads]
            old[table[position // block], position % block] = torch.from_numpy(filled.copy()).cuda().view(dtype)
            assert torch.equal(view.contiguous().view(torch.uint8), old.contiguous().view(torch.uint8)), (
                reader,
                writer,
            )
        copier.close()
