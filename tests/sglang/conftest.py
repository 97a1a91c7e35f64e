"""What the tests with real SGLang share: the model, the daemon, the first engine and what it answered without a daemon."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import CHUNK, LONG, PYTHON, Daemons, Engine, World

from ports import free_port
from prompts import mixed
from real_engines import make_model, mark, swept
from servers import READY, Server


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, Path(__file__).parent, "sglang", timeout=1800)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything lies. An SGLang that is killed leaves its own shared memory behind, which goes with the folder."""
    with swept("sglang_loads_*", "sem.mp-*"):
        yield tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A model whose answer depends on the whole prompt."""
    return make_model(PYTHON, folder / "model")


@pytest.fixture(scope="session")
def daemons() -> Iterator[Daemons]:
    """Start daemons: daemons(port, chunk=16, flags=()). They share their folders, as the same user's on one machine do."""
    running: list[Server] = []
    sockets, arenas = (Path(tempfile.mkdtemp(prefix="lmtest-", dir=parent)) for parent in ("/tmp", "/dev/shm"))

    def start(port: int = 0, chunk: int = 16, flags: tuple[str, ...] = ()) -> Server:
        running.append(Server(sockets, arenas, 512, chunk, port or free_port(), flags))
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
        first.connected()
        yield World(server, first, expected, long)
    finally:
        first.end()
