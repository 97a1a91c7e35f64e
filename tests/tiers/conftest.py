"""Stores that the tests of a process share: started once, ended by pid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy import Proxy
from stores import (
    ACCESS,
    MOONCAKE,
    SECRET,
    InfiniStoreServer,
    MooncakeClient,
    MooncakeMaster,
    RedisServer,
    Seaweed,
    binary_of,
    mooncake_environment,
    version_of,
)

VALKEY_AND_REDIS = ["valkey", pytest.param("redis", marks=pytest.mark.xdist_group("debian"))]
"""The tests of one kind run one after another, and those of the other kind beside them."""


@pytest.fixture(scope="session", params=VALKEY_AND_REDIS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a password that all tests of one kind share; each cleans up by `FLUSHALL` (see `empty`)."""
    one = RedisServer(binary_of(request.param), tmp_path_factory.mktemp(request.param), password="geheim")
    yield one
    one.end()


@pytest.fixture
def empty(store: RedisServer) -> RedisServer:
    """The shared server, with nothing in it and default limits."""
    store.raw.config_set("maxmemory", 0)
    store.raw.config_set("maxmemory-policy", "noeviction")
    store.raw.flushall()
    return store


@pytest.fixture(params=VALKEY_AND_REDIS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Servers of a test's own: start(*options, port=, password=)."""
    running: list[RedisServer] = []
    binary = binary_of(request.param)

    def make(*options: str, **more: Any) -> RedisServer:
        if "--cluster-port" in options and version_of(binary) < 7:
            pytest.skip(f"{binary} is older than 7: its clusters need ports above those that are free")
        folder = tmp_path / f"store{len(running)}"
        folder.mkdir()
        running.append(RedisServer(binary, folder, *options, **more))
        return running[-1]

    yield make
    for one in running:
        one.end()


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Proxies: proxy(port, tls=...)."""
    running: list[Proxy] = []

    def make(port: int, **more: Any) -> Proxy:
        running.append(Proxy(port, **more))
        return running[-1]

    yield make
    for one in running:
        one.close()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    one = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield one
    one.end()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of SeaweedFS, in the environment, and no files of the user's."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def mooncake_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process and its children find Mooncake, which is not in their environment."""
    for name, value in mooncake_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path, str(MOONCAKE / "site")])


@pytest.fixture(scope="session")
def shared_mooncake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MooncakeMaster, MooncakeClient]]:
    master = MooncakeMaster(tmp_path_factory.mktemp("mooncake"))
    lender = MooncakeClient(master, 768)
    yield master, lender
    lender.kill()
    master.kill()


@pytest.fixture
def mooncake(
    shared_mooncake: tuple[MooncakeMaster, MooncakeClient], mooncake_paths: None
) -> tuple[MooncakeMaster, MooncakeClient]:
    """A store that all tests of a process share, and a client that lends it memory. It is empty."""
    assert shared_mooncake[1].ask("remove_all", True) >= 0
    return shared_mooncake


@pytest.fixture
def start_mooncake(
    tmp_path: Path, mooncake_paths: None
) -> Iterator[Callable[..., tuple[MooncakeMaster, list[MooncakeClient]]]]:
    """Stores of a test's own: start_mooncake(*flags, segments=[MiB of each lender])."""
    running: list[MooncakeMaster | MooncakeClient] = []

    def make(*flags: str, segments: tuple[int, ...] = (256,)) -> tuple[MooncakeMaster, list[MooncakeClient]]:
        master = MooncakeMaster(tmp_path, *flags)
        running.append(master)
        lenders = []
        for segment in segments:
            lenders.append(MooncakeClient(master, segment))
            running.append(lenders[-1])
        return master, lenders

    yield make
    for one in running:
        if one.child.poll() is None:
            one.thaw()
            one.kill()


@pytest.fixture(scope="session")
def infinistore() -> Iterator[InfiniStoreServer]:
    """A server that all tests of a process share; it cannot be emptied, so each has a prefix of its own."""
    one = InfiniStoreServer()
    yield one
    one.kill()


@pytest.fixture
def own_infinistore() -> Iterator[InfiniStoreServer]:
    one = InfiniStoreServer()
    yield one
    one.kill()
