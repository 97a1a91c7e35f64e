"""Pulls by NIXL: real servers whose movers read from each other's arenas over loopback TCP and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prompts import tokens
from servers import Server, eventually
from stores import nixl_environment
from test_peers import connected, nothing_lent, tier_of

IDS = tokens(640, 5)
NIXL = "--peer-transport", "nixl"
PATIENT = "--worth", "always"
Servers = Callable[..., Server]
Engines = Callable[..., Any]


@pytest.fixture(params=["tcp", "tcp,cma"], autouse=True)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL for all servers, over what UCX has here."""
    for name, value in nixl_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UCX_TLS", request.param)


def logged(server: Server, words: str) -> bool:
    return words in "".join(server.log)


def pulls_by_nixl(server: Server, port: int) -> None:
    eventually(lambda: logged(server, f"Peer 127.0.0.1:{port}: pulls go by NIXL"))


def two(start: Servers, **more: Any) -> tuple[Server, Server]:
    """Two servers, of which the second pulls from the first by NIXL."""
    here = start(flags=NIXL, **more)
    there = start(flags=("--peers", f"127.0.0.1:{here.port}", *PATIENT, *NIXL), **more)
    connected(there, here.port)
    pulls_by_nixl(there, here.port)
    return here, there


def test_kv_is_read_from_the_other_servers_arena(server: Servers, engine: Engines) -> None:
    here, there = two(server)
    assert engine(here, "writer").store(IDS) == 640
    assert engine(there, "reader").load(IDS) == 640
    assert tier_of(there)["counters"]["loaded_shards"] == 40
    counters = here.counters()
    assert counters["lent_by_nixl_bytes_total"] == counters["lent_bytes_total"] > 0
    nothing_lent(here)
    assert "127.0.0.1:" in "".join(line for line in here.log if "It listens on" in line)
