"""One arena, several GPU processes: two on one GPU, one that is killed in the middle of a DMA, one on each of several GPUs.

Skips where there is no GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_kv import paged_kv  # noqa: E402

from lmcache.memory.arena import Mapping  # noqa: E402
from lmcache.transfer.gpu.copier import CudaCopier  # noqa: E402

LAYERS, HEADS, DIMS, BLOCK, COUNT, CHUNK = 8, 8, 128, 16, 1024, 256
EXTENT = LAYERS * 2 * CHUNK * HEADS * DIMS * 2
SLOTS = 256
WHOLE = np.array([(i * EXTENT, i * CHUNK, CHUNK, 0) for i in range(COUNT * BLOCK // CHUNK)], dtype=np.int64)
"""Runs of all of an engine's KV, into as many slots as it takes: a quarter of the arena."""
PART = len(WHOLE)


class Other:
    """Another engine process on the arena: `tests/gpu/arena_user.py`."""

    def __init__(self, path: Path, device: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("arena_user.py")), str(path), device]
        path_of_modules = ":".join(filter(None, sys.path))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path_of_modules},
        )

    def do(self, what: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


@pytest.fixture
def arena() -> Iterator[tuple[Path, Mapping, npt.NDArray[np.uint8]]]:
    path = Path(f"/dev/shm/lmcache-test-{os.getpid()}")
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(descriptor, SLOTS * EXTENT)
    mapping = Mapping(descriptor, SLOTS * EXTENT)
    try:
        yield (
            path,
            mapping,
            np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (SLOTS * EXTENT)).from_address(mapping.address)),
        )
    finally:
        path.unlink()
        os.close(descriptor)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_what_one_engine_stored_another_loads(arena: tuple[Path, Mapping, npt.NDArray[np.uint8]], device: str) -> None:
    """Both on one GPU, or each on its own."""
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip(f"no {device} here")
    path, mapping, _ = arena
    paged, views = paged_kv("NHD [2,nb,bs,H,D]", LAYERS, HEADS, DIMS, BLOCK, COUNT, torch.bfloat16)
    copier, other = CudaCopier(paged, CHUNK), Other(path, device)
    try:
        copier.adopt(mapping.address, mapping.size_bytes)
        table = np.random.default_rng(5).permutation(COUNT).astype(np.int32)
        assert other.do("ready") == "ready"
        theirs = other.do("store 1")  # a digest of its KV in token order
        for view in views:
            view.fill_(7)
        runs = WHOLE + np.array([PART * EXTENT, 0, 0, 0])
        copier.scatter(mapping.address, table, runs, arena_bytes=mapping.size_bytes)
        assert digest(views, table) == theirs
        copier.gather(mapping.address, table[::-1].copy(), WHOLE, arena_bytes=mapping.size_bytes)
        assert other.do("load 0") == digest(views, table[::-1].copy())
    finally:
        other.end()
        copier.close()


def test_an_engine_killed_in_the_middle_of_its_copies_harms_no_other(
    arena: tuple[Path, Mapping, npt.NDArray[np.uint8]],
) -> None:
    path, mapping, data = arena
    paged, views = paged_kv("NHD [2,nb,bs,H,D]", LAYERS, HEADS, DIMS, BLOCK, COUNT, torch.bfloat16)
    copier = CudaCopier(paged, CHUNK)
    copier.adopt(mapping.address, mapping.size_bytes)
    table = np.random.default_rng(5).permutation(COUNT).astype(np.int32)
    wanted = digest(views, table)
    copier.gather(mapping.address, table, WHOLE, arena_bytes=mapping.size_bytes)
    kept = data[: PART * EXTENT].copy()
    try:
        for _ in range(3):
            other = Other(path, "cuda:0")
            assert other.do("ready") == "ready"
            assert other.do("copy 1 2 for ever") == "begun"
            for _ in range(5):
                copier.scatter(mapping.address, table, WHOLE, arena_bytes=mapping.size_bytes)
            other.process.send_signal(signal.SIGKILL)
            copier.scatter(mapping.address, table[::-1].copy(), WHOLE, arena_bytes=mapping.size_bytes)
            other.end()
            assert digest(views, table[::-1].copy()) == wanted
            copier.scatter(mapping.address, table, WHOLE, arena_bytes=mapping.size_bytes)
            assert digest(views, table) == wanted
        assert (data[: PART * EXTENT] == kept).all(), "what it wrote lies in its own slots"
    finally:
        copier.close()


def digest(views: list[torch.Tensor], table: npt.NDArray[np.int32]) -> str:
    from arena_user import digest_of

    return str(digest_of(views, table))
