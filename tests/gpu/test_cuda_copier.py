"""The GPU copier against a plain gather, bit for bit, over random layouts and block tables. Skips where there is no GPU."""

from __future__ import annotations

import mmap
import random
import threading

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_kv import LAYOUTS, paged_kv  # noqa: E402

from lmcache.chunks import Layout, Split  # noqa: E402
from lmcache.engine.groups import RankGroup  # noqa: E402
from lmcache.transfer.gpu import ring  # noqa: E402
from lmcache.transfer.gpu.copier import CudaCopier  # noqa: E402
from lmcache.transfer.progress import Progress  # noqa: E402


@pytest.fixture(params=["C", "Python"], autouse=True)
def launched_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pieces are launched from C, and where that cannot be, from Python: every test holds for both."""
    if request.param == "Python":
        monkeypatch.setattr(ring, "find_driver", lambda hip: None)
    return str(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize(("chunk", "block"), [(256, 16), (16, 128), (48, 32), (1, 16), (250, 64)])
def test_round_trip(layout: str, dtype: torch.dtype, chunk: int, block: int, launched_from: str) -> None:
    rng = random.Random(f"{layout}{dtype}{chunk}{block}")
    shapes = [
        (4, 2, 64),
        (3, 1, 128),
        (5, 8, 80),
        (3, 2, 132),
        (4, 8, 68),
    ]  # the last two as with a scale behind each head
    layers, heads, dims = rng.choice(shapes)
    count = 40 if block >= 64 else 200
    paged, views = paged_kv(layout, layers, heads, dims, block, count, dtype)
    copier = CudaCopier(paged, chunk)
    if paged.shard_bytes(chunk) // len(paged.planes) > 8:
        assert all((one._launcher is not None) == (launched_from == "C") for one in copier._rings.values())
    tokens = min(block * count // 2, chunk * 40) // chunk * chunk or chunk
    table = np.array(rng.sample(range(count), -(-tokens // block)), dtype=np.int32)
    chunks, size = tokens // chunk, paged.shard_bytes(chunk)
    stride = -(-size // 4096) * 4096
    arena = np.random.default_rng(1).integers(0, 255, (chunks + 1) * stride, dtype=np.uint8)
    order = rng.sample(range(chunks + 1), chunks)
    full = np.array([(order[i] * stride, i * chunk, chunk, 0) for i in range(chunks)], dtype=np.int64)
    poison = arena.copy()
    copier.gather(arena.ctypes.data, table, full, arena_bytes=arena.nbytes)
    index = torch.from_numpy(table.astype(np.int64)).cuda()
    want = [view[index].reshape(-1, *view.shape[2:])[:tokens].contiguous().view(torch.uint8).cpu() for view in views]
    for i, place in enumerate(order):
        extent = torch.from_numpy(arena[place * stride : place * stride + size])
        expected = torch.cat([plane[i * chunk : (i + 1) * chunk].reshape(-1) for plane in want])
        assert torch.equal(extent, expected)
        assert (
            arena[place * stride + size : (place + 1) * stride] == poison[place * stride + size : (place + 1) * stride]
        ).all()
    spare = ({*range(chunks + 1)} - {*order}).pop()
    assert (arena[spare * stride : (spare + 1) * stride] == poison[spare * stride : (spare + 1) * stride]).all()

    # Back into other blocks, a part only: what is not asked for stays as it was.
    other = np.array(rng.sample(range(count), len(table)), dtype=np.int32)
    before = [view.clone() for view in views]
    start, end = sorted(rng.sample(range(tokens + 1), 2)) if tokens > 1 else (0, 1)
    part = []
    for i, place in enumerate(order):
        first, last = max(start, i * chunk), min(end, (i + 1) * chunk)
        if first < last:
            part.append((place * stride, first, last - first, first - i * chunk))
    copier.scatter(arena.ctypes.data, other, np.array(part, dtype=np.int64), arena_bytes=arena.nbytes)
    position = np.arange(start, end)
    block_of, inside = (
        torch.from_numpy(other[position // block].astype(np.int64)).cuda(),
        torch.from_numpy(position % block).cuda(),
    )
    for view, old, plane in zip(views, before, want, strict=True):
        expected = old
        filled = plane[start:end].cuda().contiguous().view(dtype).reshape(end - start, *view.shape[2:])
        expected[block_of, inside] = filled
        assert torch.equal(view.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    copier.close()


SPLITS = [Split(stages, heads * max(1, len(stages))) for stages in ((), (1, 4), (2, 3, 4)) for heads in (1, 2, 4, 8)]


@pytest.mark.parametrize("layout", ["NHD [2,nb,bs,H,D]", "HND [nb,2,H,bs,D]", "NHD [nb,L,2,bs,H,D]"])
@pytest.mark.parametrize("dims", [64, 9])
@pytest.mark.parametrize("reader", SPLITS, ids=str)
def test_extents_of_another_split_are_put_together(layout: str, dims: int, reader: Split) -> None:
    """Of every other split, by the last rank, between loads of its own extents; what is not asked for stays as it was."""
    rng, model, chunk, block, count = random.Random(str(reader)), Layout("m", "bfloat16", 4, 8, dims, 48), 48, 16, 60
    own, tokens = reader.shard(model, reader.count - 1), 10 * 48
    paged, views = paged_kv(
        layout, own.end_layer - own.first_layer, own.end_head - own.first_head, dims, block, count, torch.bfloat16
    )
    copier, group = CudaCopier(paged, chunk), RankGroup(lambda tokens: model, own, paged)
    whole = torch.randint(-(1 << 15), 1 << 15, (4, 2, tokens, 8, dims), dtype=torch.int16)
    mine = whole[own.first_layer : own.end_layer, :, :, own.first_head : own.end_head].flatten(0, 1)
    table = np.array(rng.sample(range(count), tokens // block), dtype=np.int32)
    start, end = 5, tokens - 7
    for writer in SPLITS:
        before = [view.clone() for view in views]
        for index in range(writer.count):
            overlap = group.overlap(writer, index, chunk)
            if overlap is None:
                continue
            shard, size = writer.shard(model, index), overlap[1].size_bytes
            theirs = whole[shard.first_layer : shard.end_layer, :, :, shard.first_head : shard.end_head]
            order = rng.sample(range(10), 10)
            extents = np.empty((10, size), dtype=np.uint8)
            for at, place in enumerate(order):
                part = theirs[:, :, at * chunk : (at + 1) * chunk].contiguous()
                extents[place] = part.view(torch.uint8).flatten().numpy()
            runs = [
                (order[at] * size, first := max(start, at * chunk), min(end, (at + 1) * chunk) - first, first % chunk)
                for at in range(10)
            ]
            copies = copier.reader(overlap)
            copies.scatter(extents.ctypes.data, table, np.array(runs, dtype=np.int64), arena_bytes=extents.nbytes)
        at = np.arange(start, end)
        blocks = torch.from_numpy(table[at // block].astype(np.int64)).cuda()
        inside = torch.from_numpy(at % block).cuda()
        for view, old, plane in zip(views, before, mine, strict=True):
            old.view(torch.int16)[blocks, inside] = plane[start:end].cuda()
            assert torch.equal(view.view(torch.int16), old.view(torch.int16)), writer
            view.view(torch.int16).fill_(writer.count)
        arena = np.random.default_rng(2).integers(0, 255, copier._bounds._shard_bytes, dtype=np.uint8)
        run = np.array([(0, 0, chunk, 0)], dtype=np.int64)
        copier.scatter(arena.ctypes.data, table, run, arena_bytes=arena.nbytes)
        back = np.zeros_like(arena)
        copier.gather(back.ctypes.data, table, run, arena_bytes=back.nbytes)
        assert (back == arena).all(), "own extents"
    copier.close()


@pytest.mark.parametrize("chunk", [256, 48])
@pytest.mark.parametrize(("count", "in_extent"), [(1, 0), (17, 0), (40, 3), (47, 1)])
def test_beside_the_tokens_of_a_run_its_extent_is_zero(chunk: int, count: int, in_extent: int) -> None:
    """The slot goes to tiers as a whole, and staging memory holds what was copied before: other prompts' KV."""
    layers, heads, dims, block = 4, 2, 64, 16
    paged, views = paged_kv("NHD [2,nb,bs,H,D]", layers, heads, dims, block, 400, torch.bfloat16)
    copier, size = CudaCopier(paged, chunk), paged.shard_bytes(chunk)
    assert copier.zeroes_the_rest
    chunks = 6000 // chunk
    arena = np.full((chunks + 1) * size, 90, dtype=np.uint8)
    table = np.random.default_rng(1).permutation(400).astype(np.int32)
    full = np.array([(i * size, i * chunk, chunk, 0) for i in range(chunks)], dtype=np.int64)
    copier.gather(arena.ctypes.data, table, full, arena_bytes=arena.nbytes)
    run = np.array([(chunks * size, 5, count, in_extent)], dtype=np.int64)
    copier.gather(arena.ctypes.data, table, run, arena_bytes=arena.nbytes)
    rows = torch.from_numpy(table.astype(np.int64)).cuda()
    expected = torch.zeros(len(views), chunk, heads * dims, dtype=torch.bfloat16)
    for plane, view in zip(expected, views, strict=True):
        plane[in_extent : in_extent + count] = view[rows].reshape(-1, heads * dims)[5 : 5 + count].cpu()
    extent = torch.from_numpy(arena[chunks * size :])
    assert torch.equal(extent, expected.flatten().view(torch.uint8))
    copier.close()


class Points(Progress):
    """Keeps what it is told, and the points in time of the copying stream."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, torch.cuda.Event]] = []

    def arrived(self, planes: int, point: torch.cuda.Event) -> None:
        self.told.append((planes, point))
        super().arrived(planes, point)


@pytest.mark.parametrize("layout", ["NHD [2,nb,bs,H,D]", "MLA [nb,bs,D]"])
@pytest.mark.parametrize("chunk", [256, 48])
def test_layers_can_be_read_as_they_arrive(layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream reads behind `wait` is there, bit for bit, while the copy of later layers is under way."""
    monkeypatch.setattr(ring, "_GROUP_BYTES", 1)
    layers, block, count = 12, 16, 2048
    paged, views = paged_kv(layout, layers, 8, 128, block, count, torch.bfloat16)
    copier, total = CudaCopier(paged, chunk), len(views)
    tokens = block * count // 2 // chunk * chunk
    table = np.random.default_rng(2).permutation(count)[: -(-tokens // block)].astype(np.int32)
    size = paged.shard_bytes(chunk)
    arena = np.frombuffer(mmap.mmap(-1, tokens // chunk * size), dtype=np.uint8)
    arena[:] = np.random.default_rng(1).integers(0, 255, arena.nbytes, dtype=np.uint8)
    copier.adopt(arena.ctypes.data, arena.nbytes)
    copier._arena.wait_registered()
    runs = np.array([(i * size, i * chunk, chunk, 0) for i in range(tokens // chunk)], dtype=np.int64)

    copier.scatter(arena.ctypes.data, table, runs)
    wanted = [view.clone() for view in views]
    for view in views:
        view.fill_(7)
    torch.cuda.synchronize()

    progress, read = Points(), []

    def copy() -> None:
        copier.scatter(arena.ctypes.data, table, runs, arena_bytes=arena.nbytes, progress=progress)
        progress.end()

    thread = threading.Thread(target=copy)
    thread.start()
    with torch.cuda.stream(torch.cuda.Stream()):
        for plane in range(total):
            progress.wait(plane + 1)
            read.append(views[plane].clone())
    thread.join()
    torch.cuda.synchronize()
    used = torch.from_numpy(table.astype(np.int64)).cuda()
    for have, want in zip(read, wanted, strict=True):
        assert torch.equal(have[used].view(torch.uint8), want[used].view(torch.uint8))
    for view, want in zip(views, wanted, strict=True):
        assert torch.equal(view[used].view(torch.uint8), want[used].view(torch.uint8))
    groups = [planes for planes, _ in progress.told]
    assert groups == [*range(2, total, 2), total]
    assert len({id(point) for _, point in progress.told}) == len(groups), "a point a group"
    copier.close()


def test_two_threads_load_while_one_stores() -> None:
    """Copies that were launched behind each other, of tables of any size, land where each of them belongs."""
    layers, block, count, chunk = 12, 16, 4096, 64
    paged, views = paged_kv("NHD [2,nb,bs,H,D]", layers, 8, 128, block, count, torch.bfloat16)
    copier, size = CudaCopier(paged, chunk), paged.shard_bytes(chunk)
    extents = 256
    arena = np.frombuffer(mmap.mmap(-1, 2 * extents * size), dtype=np.uint8)
    arena[: extents * size] = np.random.default_rng(1).integers(0, 255, extents * size, dtype=np.uint8)
    copier.adopt(arena.ctypes.data, arena.nbytes)
    copier._arena.wait_registered()
    rng = np.random.default_rng(3)
    in_chunk = chunk // block
    blocks = rng.permutation(count).astype(np.int32)
    mine = {thread: blocks[thread * 1024 : (thread + 1) * 1024] for thread in range(3)}
    places: dict[int, list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]] = {0: [], 1: []}
    last: dict[int, int] = {}
    """Chunk of blocks of both loading threads -> the slot that was loaded there last."""
    for thread in (0, 1):
        for _ in range(60):
            chunks = int(rng.integers(1, 250))
            chosen = rng.integers(0, extents, chunks)
            runs = np.stack([chosen * size, np.arange(chunks) * chunk, chunk + 0 * chosen, 0 * chosen], axis=1)
            places[thread].append((mine[thread], runs.astype(np.int64)))
            last.update({thread * 256 + at: int(extent) for at, extent in enumerate(chosen)})
    kept = [view[torch.from_numpy(mine[2].astype(np.int64)).cuda()].clone() for view in views]
    store = np.array([((extents + i) * size, i * chunk, chunk, 0) for i in range(extents)], dtype=np.int64)

    def load(thread: int) -> None:
        for table, runs in places[thread]:
            copier.scatter(arena.ctypes.data, table, runs)

    threads = [threading.Thread(target=load, args=(thread,)) for thread in (0, 1)]
    threads.append(threading.Thread(target=copier.gather, args=(arena.ctypes.data, mine[2], store)))
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for chunk_of_blocks, extent in last.items():
        thread, at = divmod(chunk_of_blocks, 256)
        where = torch.from_numpy(mine[thread][at * in_chunk : (at + 1) * in_chunk].astype(np.int64)).cuda()
        got = torch.cat([view[where].contiguous().view(torch.uint8).flatten() for view in views]).cpu()
        assert torch.equal(got, torch.from_numpy(arena[extent * size : (extent + 1) * size]))
    for i in range(extents):
        stored = torch.from_numpy(arena[(extents + i) * size : (extents + i + 1) * size])
        parts = [part[i * in_chunk : (i + 1) * in_chunk].contiguous().view(torch.uint8).flatten() for part in kept]
        assert torch.equal(stored, torch.cat(parts).cpu())
    copier.close()
