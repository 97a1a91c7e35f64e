"""What the tests with real vLLM share: two models, and a server for each file of tests."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_processes import PYTHON, Server

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
VLLM_LEAVES = ("psm_*", "sem.mp-*", "vllm_dist_*")


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs real vLLM; one worker runs it all, since engines starve each other on two cores."""
    skip = pytest.mark.skip(reason="LMCACHE_TEST_VLLM_PYTHON is not set (./run test sets it)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.xdist_group("vllm"))
            item.add_marker(pytest.mark.timeout(600))
            if not PYTHON:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything lies. What a vLLM that is killed leaves behind, in shared memory and in /tmp, goes with the folder."""
    if getattr(request.config.option, "loadgroup", False):  # a worker of xdist
        assert all("@vllm" in item.nodeid for item in request.session.items if item.get_closest_marker("vllm"))
    before = {path for pattern in VLLM_LEAVES for path in SHARED_MEMORY.glob(pattern)}
    with (
        tempfile.TemporaryDirectory(prefix="lmvllm-", ignore_cleanup_errors=True) as scratch,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", scratch)  # sockets and the like
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "torchinductor"))  # used again
        yield tmp_path_factory.mktemp("vllm")
    left = {path for pattern in VLLM_LEAVES for path in SHARED_MEMORY.glob(pattern)} - before
    for path in left - _mapped():
        path.unlink(missing_ok=True)


def _mapped() -> set[Path]:
    """Files in shared memory that some process still uses."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= {Path(line.split()[-1]) for line in maps.read_text().splitlines() if str(SHARED_MEMORY) in line}
    return used


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A model whose answer depends on the whole prompt."""
    path = folder / "model"
    subprocess.run([PYTHON, "-m", "demo.model", str(path)], check=True, cwd=ROOT, timeout=120)
    return path


@pytest.fixture(scope="session")
def other_model(folder: Path) -> Path:
    """The same shapes and configuration with other weights."""
    path = folder / "other-model"
    subprocess.run([PYTHON, "-m", "demo.model", str(path), "--seed", "7"], check=True, cwd=ROOT, timeout=120)
    return path


@pytest.fixture(scope="module")
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with 16-token chunks, eight to a block of vLLM-CPU."""
    made = Server(folder, name=f"server-of-{request.module.__name__}")
    yield made
    made.end()
