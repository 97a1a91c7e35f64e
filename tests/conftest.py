"""What many tests share: real servers, engines, and folders for them that leave nothing behind."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from engine_process import Engine
from hashing import Turns
from lmcache.engine import identity
from lmcache.errors import ServerUnavailable
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier, ZmqCarrier
from ports import free_port
from servers import READY, EngineProcess, Impostor, Raw, Server

# The same examples in every run, however slow the machine: `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")

for name in ("http_proxy", "https_proxy", "all_proxy"):  # nothing that tests ask is behind one
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)


@pytest.fixture(autouse=True)
def old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine within a test's process counts as younger than the weights that the test has written, as engines are."""
    monkeypatch.setattr(identity, "process_started", lambda: math.inf)


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turns]:
    """Hashing in the background waits until the test gives its turns, and every model of 1,000 bytes counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_AT_ONCE_BYTES", 1000)
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    held = Turns(tmp_path / "cache" / "lmcache")
    yield held
    held.give()


@pytest.fixture
def folders() -> Iterator[Callable[[str], Path]]:
    """Short-lived folders with short names: sockets' paths are limited to 107 characters, arenas belong in memory."""
    made: list[Path] = []

    def make(parent: str = "/tmp") -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="lmtest-", dir=parent)))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(folders: Callable[[str], Path]) -> Iterator[Callable[..., Server]]:
    """Start servers: server(l1=64, chunk=16, port=..., flags=...). `l1` is MiB. Those of one test share their folders."""
    running: list[Server] = []
    socket_dir, arena_dir = folders("/tmp"), folders("/dev/shm")

    def start(
        l1: float = 64, chunk: int = 16, port: int = 0, flags: tuple[str, ...] = (), arena: Path | None = None
    ) -> Server:
        one = Server(socket_dir, arena or arena_dir, l1, chunk, port or free_port(), flags)
        running.append(one)
        one.line_with(READY)
        return one

    yield start
    for one in running:
        one.end()


@pytest.fixture
def hanging(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The FIFO of a `hanging_tier`, which is installed for all servers that are started."""
    folder = folders("/tmp")
    told = folder / "hanging_tier-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-tier\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[lmcache.tiers]\nhanging = hanging_tier:HangingTier\n")
    shutil.copy(Path(__file__).with_name("hanging_tier.py"), folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> list[m.Message]:
    """The requests of this process's engines that no server answered, each of which cost its caller a deadline at most. What a
    link says while it looks for a server is not among them: nobody waits for that."""
    found: list[m.Message] = []

    def watched(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def ask(carrier: Any, request: m.Message, *more: Any) -> Any:
            try:
                return exchange(carrier, request, *more)
            except ServerUnavailable:
                if not isinstance(request, m.Hello | m.Register | m.Hold):
                    found.append(request)
                raise

        return ask

    for kind in (UnixCarrier, ZmqCarrier):
        monkeypatch.setattr(kind, "exchange", watched(kind.exchange))
    return found


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Engines in the test's process: engine(server, ...) as `Engine` says, connected."""
    made: list[Engine] = []

    def make(server: Server, instance: str = "engine", *, connect: bool = True, **more: Any) -> Engine:
        made.append(Engine(server.address, instance, **more))
        return made[-1].connect() if connect else made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def engine_process() -> Iterator[Callable[..., EngineProcess]]:
    """Engines in processes of their own: engine_process(server, instance=..., ...), ready."""
    made: list[EngineProcess] = []

    def make(server: Server, instance: str = "other", prefix: tuple[str, ...] = (), **more: Any) -> EngineProcess:
        config = {"address": server.address, "instance": instance} | more
        made.append(EngineProcess(prefix, **config))
        assert made[-1].hear() == "ready"
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def raw() -> Iterator[Callable[..., Raw]]:
    """Clients that speak the messages themselves: raw(server, instance, shards=...)."""
    made: list[Raw] = []

    def make(server: Server, instance: str = "raw", **more: Any) -> Raw:
        made.append(Raw(server, instance, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def impostor() -> Iterator[Callable[..., Impostor]]:
    """Servers of somebody else: impostor(answers, port=...)."""
    made: list[Impostor] = []

    def make(answers: Callable[[int, m.Message], list[bytes] | None], port: int = 0) -> Impostor:
        made.append(Impostor(answers, port))
        return made[-1]

    yield make
    for one in made:
        one.close()
