"""Servers that pull from each other: real servers, real engines, and the KV compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prompts import tokens
from servers import Server, eventually

IDS = tokens(640, 5)
PATIENT = "--worth", "always"


def peers_of(server: Server) -> dict[str, Any]:
    """The tier of peers in /status."""
    (tier,) = [one for one in server.status()["tiers"] if one["name"] == "peers"]
    found: dict[str, Any] = tier
    return found


def connected(server: Server, to: Server) -> None:
    """Wait until `server` may pull from `to`."""
    eventually(lambda: f"Peer 127.0.0.1:{to.port}: connected" in "".join(server.log))


def pulling_from(start: Callable[..., Server], *others: Server, **more: Any) -> Server:
    """A server that is connected to these others."""
    names = ",".join(f"127.0.0.1:{one.port}" for one in others)
    flags = ("--peers", names, *PATIENT, *more.pop("flags", ()))
    one = start(flags=flags, **more)
    for other in others:
        connected(one, other)
    return one


def test_what_one_server_has_is_a_hit_at_another(server: Callable[..., Server], engine: Callable[..., Any]) -> None:
    here = server()
    there = pulling_from(server, here)
    assert engine(here, "writer").store(IDS) == 640
    assert engine(there, "reader").load(IDS) == 640
    assert peers_of(there)["counters"]["loaded_shards"] == 40
    here.clear()
    assert engine(there, "again").load(IDS) == 640  # it has its own copy now
    eventually(lambda: here.status()["index"]["leases"] == 0)
