"""Connections to hosts end within their time, whatever resolvers and networks do."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest

from lmcache.config import hosts
from lmcache.tiers import TierError
from lmcache.tiers.registry import make_tier
from servers import PATIENCE

NAME = "cache.invalid"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One that answers nobody before `answers` is set, and then with `found`."""
    resolve, there = socket.getaddrinfo, SimpleNamespace(asked=0, answers=threading.Event(), found=["127.0.0.1"])

    def slow(host: str, *others: object, **more: object) -> list[object]:
        if host != NAME:
            return list(resolve(host, *others, **more))  # type: ignore[arg-type]
        there.asked += 1
        there.answers.wait(PATIENCE)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in there.found]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    return there


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
