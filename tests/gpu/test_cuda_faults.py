"""What a GPU or its driver refuses: a clear line or error, the engine's KV untouched, copies right as far as there are any.

Skips where there is no GPU.
"""

from __future__ import annotations

import logging
import mmap
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_kv import paged_kv  # noqa: E402

from lmcache.errors import LayoutError  # noqa: E402
from lmcache.transfer.gpu import copier as gpu_copier  # noqa: E402
from lmcache.transfer.gpu import pinned, ring  # noqa: E402
from lmcache.transfer.gpu.copier import CudaCopier  # noqa: E402
from lmcache.transfer.gpu.launch import Launcher  # noqa: E402

BLOCK, COUNT, CHUNK = 16, 512, 64


def small():
    return paged_kv("NHD [2,nb,bs,H,D]", 4, 8, 128, BLOCK, COUNT, torch.bfloat16)


def same(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    """Bit for bit: random bits are not numbers now and then."""
    return all(
        torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in zip(these, those, strict=True)
    )


def lines(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_copier, pinned, ring):
        monkeypatch.setattr(module.logger, "propagate", True)
    caplog.set_level(logging.INFO)


def test_no_memory_for_staging_is_a_layout_error(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, _ = small()
    monkeypatch.setattr(gpu_copier, "STAGING_BYTES", 1 << 50)
    with pytest.raises(LayoutError, match="LMCACHE_GPU_STAGING_MB"):
        CudaCopier(paged, CHUNK)


def test_an_arena_that_cannot_be_registered_is_copied_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    paged, views = small()
    size, extents = paged.shard_bytes(CHUNK), COUNT * BLOCK // CHUNK
    arena = np.frombuffer(mmap.mmap(-1, extents * size), dtype=np.uint8)
    other, copier = CudaCopier(paged, CHUNK), CudaCopier(paged, CHUNK)
    for one in (other, copier):  # pages that are registered already cannot be registered again
        one.adopt(arena.ctypes.data, arena.nbytes)
        one._arena.wait_registered()
    assert "cudaHostRegister failed at 0 MiB" in lines(caplog)
    other.close()
    table = np.random.default_rng(1).permutation(COUNT).astype(np.int32)
    runs = np.array([(i * size, i * CHUNK, CHUNK, 0) for i in range(extents)], dtype=np.int64)
    wanted = [view.clone() for view in views]
    copier.gather(arena.ctypes.data, table, runs, arena_bytes=arena.nbytes)
    for view in views:
        view.fill_(7)
    copier.scatter(arena.ctypes.data, table, runs, arena_bytes=arena.nbytes)
    assert same(views, wanted)
    copier.close()


def test_a_kernel_that_does_not_copy_right_is_not_launched_from_c(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a release of Triton that lays parameters out otherwise."""
    paged, views = small()
    launch = Launcher.launch

    def wrong(
        self: Launcher, base: int, registered_from: int, tables: object, runs: object, planes: range, at_once: int
    ) -> None:
        launch(self, base, registered_from, tables, runs, range(0, planes.stop - 1, planes.step), at_once)

    monkeypatch.setattr(Launcher, "launch", wrong)
    kept = [view.clone() for view in views]
    copier = CudaCopier(paged, CHUNK)
    assert all(one._launcher is None for one in copier._rings.values())
    assert "launched from Python" in lines(caplog)
    assert same(views, kept), "tried on memory of its own"
    arena = np.zeros(paged.shard_bytes(CHUNK), dtype=np.uint8)
    copier.gather(arena.ctypes.data, np.arange(4, dtype=np.int32), np.array([(0, 0, CHUNK, 0)]))
    assert (
        arena[: paged.shard_bytes(CHUNK) // 8] == views[0][:4].contiguous().view(torch.uint8).cpu().numpy().ravel()
    ).all()
    copier.close()


def test_an_error_of_the_driver_reaches_the_caller_and_the_next_copy_is_right() -> None:
    paged, views = small()
    copier, size = CudaCopier(paged, CHUNK), paged.shard_bytes(CHUNK)
    launcher = copier._rings[True]._launcher
    assert launcher is not None
    arena, runs = np.zeros(size, dtype=np.uint8), np.array([(0, 0, CHUNK, 0)])
    table = np.arange(4, dtype=np.int32)
    threads, launcher._ring["threads"] = launcher._ring["threads"].copy(), 1 << 20  # no GPU has such blocks
    with pytest.raises(RuntimeError, match="driver refused a copy: error 1"):
        copier.gather(arena.ctypes.data, table, runs)
    launcher._ring["threads"] = threads
    copier.gather(arena.ctypes.data, table, runs)
    assert (arena[: size // 8] == views[0][:4].contiguous().view(torch.uint8).cpu().numpy().ravel()).all()
    copier.close()


@pytest.mark.parametrize("launched_from", ["C", "Python"])
def test_an_engine_captures_cuda_graphs_meanwhile(launched_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines do so while they start, and a server may come, or come back, at any moment: it all happens in other threads."""
    if launched_from == "Python":
        monkeypatch.setattr(ring, "find_driver", lambda hip: None)
    paged, views = small()
    size, extents = paged.shard_bytes(CHUNK), COUNT * BLOCK // CHUNK
    runs = np.array([(i * size, i * CHUNK, CHUNK, 0) for i in range(extents)], dtype=np.int64)
    table = np.random.default_rng(1).permutation(COUNT).astype(np.int32)
    wanted, ended, found = [view.clone() for view in views], threading.Event(), list[bool]()
    torch.cuda.synchronize()

    def another_server() -> None:
        try:
            for _ in range(3):
                arena = np.frombuffer(mmap.mmap(-1, extents * size), dtype=np.uint8)
                copier = CudaCopier(paged, CHUNK)
                copier.adopt(arena.ctypes.data, arena.nbytes)
                copier.gather(arena.ctypes.data, table, runs, arena_bytes=arena.nbytes)
                copier._arena.wait_registered()
                copier.scatter(arena.ctypes.data, table, runs, arena_bytes=arena.nbytes)
                copier.close()
                found.append(True)
        finally:
            ended.set()

    thread, captured = threading.Thread(target=another_server), 0
    numbers = torch.zeros(1 << 16, device="cuda")
    thread.start()
    while not ended.is_set():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                numbers += 1
        captured += 1
        graph.replay()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 3
    assert captured > 1
    assert (numbers == 50 * captured).all()
    assert same(views, wanted)
