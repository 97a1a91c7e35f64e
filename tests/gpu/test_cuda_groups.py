"""Groups on a GPU: the copiers of one rank share the registered arena and the staging memory, and extents are those of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from lmcache.transfer.paged import PagedKV, Plane  # noqa: E402
from servers import Server  # noqa: E402
from test_groups import BLOCK, BLOCKS, CHUNK, HybridEngine, Kind, ids_of  # noqa: E402


class CudaEngine(HybridEngine):
    """The same engine, whose paged KV is in GPU memory."""

    def _paged(self, kind: Kind, kv: npt.NDArray[np.uint16]) -> PagedKV:
        tensor = torch.from_numpy(kv.view(np.int16)).cuda()
        self.mirrors = [*getattr(self, "mirrors", []), (kv, tensor)]
        if kind.state:
            planes = [Plane.strided(one.data_ptr(), 24, 0, 1, 0, 24, 1) for one in tensor]
            return PagedKV(tuple(planes), 1, BLOCKS, 1, tensor, str(tensor.device))
        flat = tensor.reshape(-1, *tensor.shape[2:])
        planes = [Plane.of(one, "bthd") for one in flat]
        return PagedKV(tuple(planes), BLOCK, BLOCKS, 2, tensor, str(tensor.device))

    def upload(self) -> None:
        for kv, tensor in self.mirrors:
            tensor.copy_(torch.from_numpy(kv.view(np.int16)))
        torch.cuda.synchronize()

    def download(self) -> None:
        torch.cuda.synchronize()
        for kv, tensor in self.mirrors:
            kv[...] = tensor.cpu().numpy().view(np.uint16)


@pytest.fixture
def both(server: Callable[..., Server]) -> Iterator[tuple[CudaEngine, HybridEngine]]:
    one = server(chunk=CHUNK)
    pair = CudaEngine(one.address, name="gpu"), HybridEngine(one.address, name="cpu")
    yield pair
    for engine in pair:
        engine.close()


def test_what_a_gpu_stores_of_all_kinds_a_gpu_and_a_cpu_load(both: tuple[CudaEngine, HybridEngine]) -> None:
    gpu, cpu = both
    ids = ids_of(1, 200)
    gpu.compute(ids, [64, 96, 160, 192, 200])
    assert gpu.load(ids) == gpu.load(ids, have=64) == cpu.load(ids) == 192


def test_what_a_cpu_stores_of_all_kinds_a_gpu_loads(both: tuple[CudaEngine, HybridEngine]) -> None:
    gpu, cpu = both
    for seed in range(2, 6):
        ids = ids_of(seed, 200)
        cpu.compute(ids, [64, 96, 160, 192, 200])
        assert gpu.load(ids) == 192
