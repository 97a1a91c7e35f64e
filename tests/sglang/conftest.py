"""What the tests with real SGLang share: a folder, and the model."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import PYTHON, Daemons

from servers import READY, Server, free_port

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs real SGLang; one worker runs it all, since engines starve each other on two cores."""
    skip = pytest.mark.skip(reason="LMCACHE_TEST_SGLANG_PYTHON is not set (./run test sets it)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.xdist_group("sglang"))
            item.add_marker(pytest.mark.timeout(600))
            if not PYTHON:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A model whose answer depends on the whole prompt."""
    path = folder / "model"
    subprocess.run([PYTHON, "-m", "demo.model", str(path)], check=True, cwd=ROOT, timeout=120)
    return path


@pytest.fixture(scope="module")
def daemons() -> Iterator[Daemons]:
    """Start daemons: daemons(port, chunk=16). They share their folders, as the same user's on one machine do."""
    running: list[Server] = []
    sockets, arenas = (Path(tempfile.mkdtemp(prefix="lmtest-", dir=parent)) for parent in ("/tmp", "/dev/shm"))

    def start(port: int = 0, chunk: int = 16) -> Server:
        running.append(Server(sockets, arenas, 512, chunk, port or free_port(), ()))
        running[-1].line_with(READY)
        return running[-1]

    yield start
    for one in running:
        one.end()
    for folder in (sockets, arenas):
        shutil.rmtree(folder, ignore_errors=True)
