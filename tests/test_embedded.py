"""An engine's own server: started as a child, reached by the engine's name, and gone with the engine, however that ends."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_process import Engine
from lmcache.config.engine import EngineConfig
from lmcache.engine import Store
from lmcache.engine.embedded import EmbeddedServer, embedded_address, wait_for_server
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.hello import probe
from lmcache.errors import ConfigError, ServerUnavailable
from ports import free_port
from servers import PATIENCE, READY, Process, Server, beside, eventually
from stores import RedisServer, binary_of

OWNER = """
import os, sys
from lmcache.engine.embedded import EmbeddedServer
name, arenas, *flags = sys.argv[1:]
fork = "fork" in flags and flags.pop() == "fork"
server = EmbeddedServer(name, l1_size_gb=0.03125, chunk_size=16, flags=("--arena-dir", arenas, *flags))
print("server-pid", server.pid, flush=True)
if fork and not os.fork():
    os.read(0, 1)  # a child that outlives the engine, with all that it inherited
    os._exit(0)
sys.stdin.read()
"""
"""An engine that starts its server and waits to be ended."""
OURS = f"{os.getpid()}-{secrets.token_hex(4)}"
OWNERS_NAME = f"owner-{OURS}"
"""Names are of the whole machine, where other tests run."""


def engine_of(instance: str) -> Engine:
    """An engine whose server is its own, or will be."""
    return Engine(embedded_address(f"{instance}-{OURS}"), f"{instance}-{OURS}")


@pytest.fixture
def places(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the folder above that of sockets, the arenas' folder)"""
    sockets, arenas = folders("/tmp"), folders("/dev/shm")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets))
    return sockets, arenas


@pytest.fixture
def embedded(places: tuple[Path, Path]) -> Iterator[Callable[..., EmbeddedServer]]:
    made: list[EmbeddedServer] = []

    def start(
        instance: str = "engine", l1: float = 64, chunk: int = 16, flags: tuple[str, ...] = (), **more: Any
    ) -> EmbeddedServer:
        where = ("--arena-dir", str(places[1]))
        name = f"{instance}-{OURS}"
        made.append(EmbeddedServer(name, l1_size_gb=l1 / 1024, chunk_size=chunk, flags=(*where, *flags), **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


def left(places: tuple[Path, Path]) -> list[Path]:
    return [path for place in places for path in place.rglob("*") if path.is_file() or path.is_socket()]


class Ended:
    """Waits for the end of a process that is not ours to wait for; all of its threads, so that its files are closed."""

    def __init__(self, pid: int) -> None:
        self.pid, self._pidfd = pid, os.pidfd_open(pid)

    def wait(self) -> None:
        try:
            assert select.select([self._pidfd], [], [], PATIENCE)[0], f"process {self.pid} still runs"
        finally:
            os.close(self._pidfd)


def test_an_engine_that_is_there_first_finds_its_server(embedded: Callable[..., EmbeddedServer]) -> None:
    """Ranks are made before the scheduler, which starts the server; what one stores, the other loads."""
    engine = engine_of("engine")
    try:
        assert not engine.worker.connected
        server = embedded()
        assert server.address == embedded_address(f"engine-{OURS}") != embedded_address("another")
        engine.connect()
        tokens = list(range(64))
        engine.store(tokens)
        assert engine.hit_tokens(tokens) == 64
    finally:
        engine.close()


def test_a_start_waits_for_its_own_server_while_that_runs(embedded: Callable[..., EmbeddedServer]) -> None:
    server, engine = embedded(), engine_of("engine")
    try:
        assert engine.scheduler is not None
        sessions = engine.scheduler, engine.worker
        assert wait_for_server(sessions, server, PATIENCE) and engine.scheduler.connected and engine.worker.connected
        other = engine_of("other")
        ended = embedded("other", flags=("--numa", "9999"))
        try:
            assert not wait_for_server((other.worker,), ended, 1000 * PATIENCE), (
                "it has ended, so nothing is waited for"
            )
            assert not ended.running
        finally:
            other.close()
    finally:
        engine.close()


def test_nothing_has_a_name_while_it_runs_and_nothing_is_left(
    embedded: Callable[..., EmbeddedServer], places: tuple[Path, Path]
) -> None:
    server = embedded()
    engine = Engine(server.address, "engine").connect()
    try:
        assert left(places) == [], "the memory file is reached by descriptor only, the socket by a name that is no file"
    finally:
        engine.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_engine(places: tuple[Path, Path], number: int) -> None:
    owner = Process([sys.executable, "-c", OWNER, OWNERS_NAME, str(places[1])])
    try:
        server = Ended(int(owner.line_with("server-pid").split()[1]))
        eventually(lambda: any(READY in line for line in owner.log))
        owner.signal(number)
        server.wait()
        assert left(places) == []
    finally:
        owner.end()


def test_a_forked_child_of_the_engine_does_not_hold_it_up(places: tuple[Path, Path]) -> None:
    owner = Process([sys.executable, "-c", OWNER, OWNERS_NAME, str(places[1]), "fork"])
    try:
        server = Ended(int(owner.line_with("server-pid").split()[1]))
        owner.kill()
        server.wait()
    finally:
        owner.end()  # closes the pipe that the forked child reads


def test_killed_with_its_engine_it_leaves_no_memory(places: tuple[Path, Path]) -> None:
    """Both at once, so that the server cannot tidy up."""
    owner = Process([sys.executable, "-c", OWNER, OWNERS_NAME, str(places[1])])
    try:
        server = Ended(int(owner.line_with("server-pid").split()[1]))
        eventually(lambda: any(READY in line for line in owner.log))
        os.kill(server.pid, signal.SIGSTOP)
        owner.kill()
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        assert left(places) == []
    finally:
        owner.end()


def test_what_it_is_told_counts_and_a_daemons_settings_do_not(
    embedded: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_SERVER_CHUNK_SIZE", "7")
    monkeypatch.setenv("LMCACHE_SERVER_AUTH_KEY_FILE", "/nowhere")
    engine = Engine(embedded(chunk=8).address, "engine").connect()
    try:
        assert engine.chain([]).chunk_tokens == 8
    finally:
        engine.close()


class Said:
    """What this process and its servers write to standard error, in a file, from `begin` on. (Pytest's own capture loses what a
    server writes between its reading and its truncating, and this is read again and again.)"""

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, -1

    def begin(self) -> None:
        """To be called in the test itself: pytest redirects standard error anew after the fixtures."""
        self._before = os.dup(2)
        with self._path.open("ab") as file:
            os.dup2(file.fileno(), 2)

    def __call__(self) -> str:
        return self._path.read_text(errors="replace")

    def end(self) -> None:
        os.dup2(self._before, 2)
        os.close(self._before)
        print(self())  # shown where the test fails


@pytest.fixture
def said(tmp_path: Path) -> Said:
    return Said(tmp_path / "said")


def test_http_is_there_where_it_is_asked_for(embedded: Callable[..., EmbeddedServer], said: Said) -> None:
    import httpx

    def url() -> str:
        return next((word for word in said().split() if word.startswith("http://")), "")

    said.begin()
    try:
        embedded(flags=("--http-host", "127.0.0.1", "--http-port", "0"))
        answer: Any = httpx.get(f"{eventually(url)}/healthcheck", timeout=PATIENCE)
        assert answer.json() == {"status": "healthy"}
    finally:
        said.end()


def test_a_second_engine_of_the_same_name_is_told(embedded: Callable[..., EmbeddedServer]) -> None:
    embedded("twice")
    with pytest.raises(ConfigError, match="another server listens at unix://@lmcache-"):
        embedded("twice")


def test_too_little_memory_is_one_line_of_the_log(
    embedded: Callable[..., EmbeddedServer], capfd: pytest.CaptureFixture[str], places: tuple[Path, Path]
) -> None:
    server = embedded(l1=1 << 30)
    eventually(lambda: not server.running)
    assert "--l1-size-gb" in capfd.readouterr().err
    assert left(places) == []


def test_the_socket_of_a_daemon_will_do(server: Callable[..., Server]) -> None:
    daemon = server()
    engine = Engine(f"unix://{daemon.socket_path()}", "engine").connect()
    try:
        engine.store(list(range(32)))
        assert engine.hit_tokens(list(range(32))) == 32
    finally:
        engine.close()


@pytest.mark.parametrize("ends", ["the server is closed", "its engine is killed"])
def test_what_went_to_disk_is_found_again(
    ends: str, embedded: Callable[..., EmbeddedServer], places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Memory is the engine's own and gone with it; `local_disk` is not, and what was still to be written has been."""
    flags = EngineConfig(local_disk=str(tmp_path), max_local_disk_size=0.25).server_flags
    ids = list(range(160))
    if ends == "the server is closed":
        server = embedded("owner", flags=flags)
        engine = engine_of("owner").connect()
        assert engine.store(ids) == 160
        engine.close()
        server.close()
    else:
        owner = Process([sys.executable, "-c", OWNER, OWNERS_NAME, str(places[1]), *flags])
        try:
            process = Ended(int(owner.line_with("server-pid").split()[1]))
            engine = engine_of("owner").connect()
            assert engine.store(ids) == 160
            owner.kill()
            process.wait()
            engine.close()
        finally:
            owner.end()
    embedded("again", flags=flags)
    again = engine_of("again").connect()
    try:
        assert again.load(ids) == 160, "and every byte is right"
    finally:
        again.close()


@pytest.mark.parametrize("drain_seconds", [0.0, 3600.0])
def test_its_end_is_that_of_a_daemon(
    embedded: Callable[..., EmbeddedServer],
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
    drain_seconds: float,
) -> None:
    """It is not killed while its time to write lasts, nor where a tier hangs beyond that time."""
    store = RedisServer(binary_of("valkey"), folders("/tmp"))

    def says(word: str) -> bool:
        return word in said()

    said.begin()
    try:
        if drain_seconds:
            monkeypatch.setattr("lmcache.engine.embedded._STOP_SECONDS", 0.0)
        server = embedded("slow", flags=("--l2", store.url("?timeout=3600")), drain_seconds=drain_seconds)
        engine = engine_of("slow").connect()
        store.child.send_signal(signal.SIGSTOP)
        assert engine.store(list(range(160))) == 160
        engine.close()
        closing = threading.Thread(target=server.close)
        closing.start()
        if drain_seconds:
            eventually(lambda: says("Writing 10 chunks to tiers before the server ends"))
            assert server.running
            store.child.send_signal(signal.SIGCONT)
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert says("has stopped") and not says("it is killed")
        assert says("Tier redis is abandoned") != bool(drain_seconds)
        assert not drain_seconds or len(store.raw.keys("{lmcache}/*/*-0-1")) == 10
    finally:
        said.end()
        store.end()


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_the_unfull_end_of_a_prompt_comes_back(server: Callable[..., Server], mode: str) -> None:
    """Stored and loaded by the number of its tokens; found by the same prompt only; and nobody's parent."""
    daemon = server(chunk=16)
    engine = Engine(daemon.address, "engine", mode=mode).connect()
    assert engine.scheduler is not None
    ids = list(range(100, 160))
    try:
        engine.store(list(range(64)))
        daemon.clear()
        chain = engine.chain(ids)
        tail = chain.tail(ids)
        engine.fill(ids)
        job = Store(16, chain.root, chain.hashes + tail, 0, engine.table(60), end_token=60)
        engine.worker.store("job", job)
        assert engine.wait("job").tokens == 60
        hit = engine.scheduler.lookup(chain, tail=tail)
        assert hit is not None and hit.chunks == 4
        assert engine.load(ids, 20, 59, engine.scheduler.lookup(chain, 20, tail=tail)) == 39
        assert engine.wait(engine.submit_load(hit, 16, 0, 64, [*ids, 0, 0, 0, 0])).ok
        assert not engine.tokens(64)[:, :, 60:].any(), "nothing of what lay in the slot before"
        engine.scheduler.release(hit)
        longer = engine.chain([*ids, 1, 2, 3, 4])
        assert longer.hashes[:48] == chain.hashes and longer.hashes[48:] != tail
        assert engine.hit_tokens([*ids, 1, 2, 3, 4]) == 48
        assert engine.store([*ids, 1, 2, 3, 4], 3) == 16, "the full chunk hangs on the full one before it"
    finally:
        engine.close()


def test_a_server_answers_where_it_is_and_nothing_where_it_is_not(server: Callable[..., Server]) -> None:
    daemon = server()
    probe(daemon.address, PATIENCE)
    nowhere = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnavailable, match="refused"):  # at once
        beside(lambda: probe(nowhere, 3600.0)).result(PATIENCE)
    with socket.create_server(("127.0.0.1", 0)) as stranger, pytest.raises(ServerUnavailable, match="no answer"):
        probe(f"tcp://127.0.0.1:{stranger.getsockname()[1]}", 0.3)


def test_payload_frames_need_a_port() -> None:
    with pytest.raises(ValueError, match=r"payload frames do not travel over unix:///run/x\.sock"):
        Endpoint("unix:///run/x.sock", "engine", "worker", transfer_mode="payload")
