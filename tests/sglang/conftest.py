"""What the tests with real SGLang share: the model, the daemon, the first engine and what it answered without a daemon."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import CHUNK, LONG, PYTHON, Daemons, Engine, World
from sglang_prompts import mixed

from ports import free_port
from servers import READY, Server, eventually

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
SGLANG_LEAVES = ("sglang_loads_*", "sem.mp-*")


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything lies. An SGLang that is killed leaves its own shared memory behind, which goes with the folder."""
    before = {path for pattern in SGLANG_LEAVES for path in SHARED_MEMORY.glob(pattern)}
    yield tmp_path_factory.mktemp("sglang")
    left = {path for pattern in SGLANG_LEAVES for path in SHARED_MEMORY.glob(pattern)} - before
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


@pytest.fixture(scope="session")
def world(folder: Path, model: Path, daemons: Daemons) -> Iterator[World]:
    """The engine starts before the daemon; until then it computes everything, and those answers are the measure."""
    port = free_port()
    first = Engine(folder, model, 1, {"mp_host": "127.0.0.1", "mp_port": port})
    try:
        expected = first.answers(mixed())
        first.flush()
        long = first.answer(LONG)
        first.flush()
        server = daemons(port, CHUNK)
        eventually(lambda: first.text().count("Connected to the LMCache server") == 2)
        yield World(server, first, expected, long)
    finally:
        first.end()
