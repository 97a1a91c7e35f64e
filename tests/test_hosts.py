"""Connections to hosts end within their time, whatever resolvers and networks do."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lmcache.config import hosts
from lmcache.engine import hello
from lmcache.engine.connection import Connection
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.hello import probe
from lmcache.errors import ServerUnavailable
from lmcache.tiers import TierError
from lmcache.tiers.registry import make_tier
from servers import PATIENCE, beside, eventually

NAME = "cache.invalid"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """One that answers nobody before `answers` is set, and then with `found`."""
    resolve, there = socket.getaddrinfo, SimpleNamespace(asked=0, answers=threading.Event(), found=["127.0.0.1"])

    def slow(host: str, *others: object, **more: object) -> list[object]:
        if host != NAME:
            return list(resolve(host, *others, **more))  # type: ignore[arg-type]
        there.asked += 1
        there.answers.wait(PATIENCE)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in there.found]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield there
    there.answers.set()
    eventually(lambda: not hosts._under_way)  # else the next test may get this one's answer


def test_a_resolver_that_does_not_answer_costs_a_tier_its_timeout_and_one_thread(resolver: SimpleNamespace) -> None:
    said: list[str] = []

    def open_them() -> None:
        for _ in range(3):
            with pytest.raises(TierError) as caught:
                make_tier(f"redis://{NAME}:6379/0?timeout=0.1").tier.open()
            said.append(f"{caught.value.reason}: {caught.value}")

    worker = threading.Thread(target=open_them, daemon=True)
    worker.start()
    worker.join(PATIENCE)
    try:
        assert len(said) == 3 and resolver.asked == 1
        assert all(f"unreachable: Redis at {NAME}:6379: host '{NAME}' was not resolved in" in one for one in said)
    finally:
        resolver.answers.set()
        worker.join()


def test_a_resolver_that_does_not_answer_holds_up_no_end_of_a_link(
    resolver: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "_CONNECT_SECONDS", 0.1)
    one = Connection(Endpoint(f"tcp://{NAME}:5555", "engine", "worker"), lambda *_: None)
    eventually(lambda: f"yet (host '{NAME}' was not resolved in 0.1 s" in caplog.text, PATIENCE / 2)
    beside(one.close).result(PATIENCE)
    eventually(lambda: not one._thread.is_alive(), PATIENCE / 2)
    with pytest.raises(ServerUnavailable, match="was not resolved in"):
        beside(lambda: probe(f"tcp://{NAME}:5555", 0.1)).result(PATIENCE / 2)
    assert not resolver.answers.is_set()


def test_a_name_that_resolves_later_is_connected_to(resolver: SimpleNamespace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=r"not resolved in 0\.05 s"):
            hosts.connect(NAME, port, 0.05)
        resolver.answers.set()
        hosts.connect(NAME, port, PATIENCE).close()


def test_all_addresses_of_a_host_share_one_timeout(resolver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two answer nothing, and the third refuses."""
    resolver.answers.set()
    resolver.found = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    clock, given = [100.0], []

    def create_connection(address: tuple[str, int], timeout_seconds: float) -> socket.socket:
        given.append(address[0])
        if address[0] == "192.0.2.3":
            raise ConnectionRefusedError
        clock[0] += timeout_seconds
        raise TimeoutError

    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: clock[0]), raising=False)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(TimeoutError):
        hosts.connect(NAME, 6379, 3.0)
    assert given == resolver.found and clock[0] == pytest.approx(102.0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # "is multi-threaded": that is what is tested
def test_a_child_forked_during_a_look_up_asks_for_itself(resolver: SimpleNamespace) -> None:
    """Its parent's thread is not there to answer, nor to let go of the lock."""
    with pytest.raises(OSError, match="not resolved in"):
        hosts.connect(NAME, 1, 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server, hosts._asking:
        child = os.fork()
        if not child:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(int(PATIENCE))
                resolver.answers = threading.Event()
                resolver.answers.set()
                hosts.connect(NAME, server.getsockname()[1], PATIENCE).close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_thread_that_cannot_be_started_fails_one_call(
    resolver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver.answers.set()

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with socket.create_server(("127.0.0.1", 0)) as server:
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", refused)
            with pytest.raises(OSError, match=f"host '{NAME}' could not be looked up: can't start new thread"):
                hosts.connect(NAME, server.getsockname()[1], PATIENCE)
        hosts.connect(NAME, server.getsockname()[1], PATIENCE).close()


def test_a_look_up_that_goes_wrong_fails_one_call(resolver: SimpleNamespace) -> None:
    resolver.answers.set()
    resolver.found = None
    with pytest.raises(TypeError):
        hosts.connect(NAME, 1, PATIENCE)
    resolver.found = ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        hosts.connect(NAME, server.getsockname()[1], PATIENCE).close()
