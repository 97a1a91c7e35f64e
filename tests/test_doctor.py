"""`lmcache doctor`: each finding where it can be produced, and an exit code for scripts."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_process import Engine
from lmcache import __version__
from lmcache.cli import doctor
from lmcache.cli.main import main
from lmcache.cli.status import screen
from lmcache.config.server import ServerConfig
from servers import Server
from stores import RedisServer, binary_of

Servers, Engines = Callable[..., Server], Callable[..., Engine]


def findings(found: Any) -> dict[str, Any]:
    return {one.name: one for one in found}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*words: str) -> tuple[int, dict[str, Any]]:
        code = main(["doctor", "--json", *words])
        answer = json.loads(capsys.readouterr().out)
        assert answer["wrong"] == sum(one["state"] == "wrong" for one in answer["findings"])
        return code, {one["name"]: one for one in answer["findings"]}

    return run


def test_a_server_that_serves_is_all_right(
    server: Servers,
    engine: Engines,
    said: Callable[..., tuple[int, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = server()
    engine(cache)
    words = "--url", f"http://127.0.0.1:{cache.http_port}", "--arena-dir", str(cache.arena_dir)
    code, found = said(*words)
    assert found["server"]["state"] == found["user"]["state"] == found["clock"]["state"] == "ok"
    assert (
        found["engines"]["text"].startswith("2 engine processes") and __version__ in found["server's version"]["text"]
    )
    assert code == 0, found
    assert main(["doctor", *words]) == 0 and "checks found nothing wrong" in capsys.readouterr().out


def test_no_server_is_wrong_and_a_taken_port_too(said: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = findings(doctor.absent(ServerConfig(port=port), "no server there"))
    assert found["server"].state == "wrong"
    assert found[f"port {port} (--port)"].state == "wrong" and "--port" in found[f"port {port} (--port)"].text
    code, all_found = said("--url", f"http://127.0.0.1:{port}")
    assert (
        code == 1
        and all_found["server"]["state"] == "wrong"
        and "start `lmcache server`" in all_found["server"]["text"]
    )


def test_a_tier_that_does_not_answer_is_wrong(
    server: Servers, folders: Callable[[str], Path], said: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    store, lost = (RedisServer(binary_of("valkey"), folders("/tmp")) for _ in range(2))
    lost.end()
    cache = server(flags=("--l2", store.url("?name=good"), "--l2", lost.url("?name=lost")))
    code, found = said("--url", f"http://127.0.0.1:{cache.http_port}")
    store.end()
    assert found["tier good"]["state"] == "ok" and found["tier lost"]["state"] == "wrong" and code == 1, found
    assert "refused" in found["tier lost"]["text"] and "--l2" in found["tier lost"]["remedy"]


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(directory: Path) -> doctor.Finding:
        (found,) = doctor._shared_memory(directory)
        return found

    sizes = namedtuple("sizes", "f_blocks f_frsize f_bavail")
    with monkeypatch.context() as patch:  # whatever this machine has
        patch.setattr(os, "statvfs", lambda path: sizes(1 << 20, 4096, 1 << 20))
        assert of(Path("/dev/shm")).state == "ok"
    assert of(tmp_path / "none").state == "wrong"
    assert "not in memory" in of(Path("/proc")).text
    monkeypatch.setattr(os, "statvfs", lambda path: sizes(16384, 4096, 16384))
    assert of(Path("/dev/shm")).state == "wrong" and "--shm-size" in of(Path("/dev/shm")).remedy


def test_limits_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(doctor, "memory_available_bytes", lambda: 64 << 20)
    monkeypatch.setattr(doctor, "online_nodes", lambda: [0, 1])
    found = findings(doctor.machine(ServerConfig()))
    assert found["locked memory"].state == "note" and "memlock=-1" in found["locked memory"].remedy
    assert found["memory"].state == "note" and "64 MiB" in found["memory"].text
    assert "2 memory nodes" in found["NUMA"].text and "--numa" in found["NUMA"].remedy


def status(**changes: Any) -> dict[str, Any]:
    """What a server shows that is not on this host."""
    shown = {
        "version": __version__,
        "arena": {"path": "/nowhere"},
        "engines": [],
        "tiers": [],
        "config": {},
        "wall_seconds": time.time(),
        **changes,
    }
    return {"url": "u", "health": {"status": "healthy"}, "status": shown, "why": ""}


def test_what_a_server_elsewhere_shows(tmp_path: Path) -> None:
    frames = {"layout": {"model_id": "m"}, "payload_frames": True}
    found = findings(doctor.serving(status(version="0.1", wall_seconds=5.0, engines=[frames])))
    assert found["server's version"].state == "note" and found["clock"].state == "wrong"
    assert found["copies"].state == "note" and "--socket-dir" in found["copies"].remedy
    assert found["user"].state == "note" and "not visible" in found["user"].text
    found = findings(doctor.serving({**status(), "health": {"status": "unhealthy", "reason": "gone"}}))
    assert found["server"].state == "wrong" and "gone" in found["server"].text
    assert found["engines"].state == "note"
    refused = {"status": "healthy", "refused_engines": ["an engine of another user: run both as the same user"]}
    found = findings(doctor.serving({**status(), "health": refused, "status": {}, "why": "no token"}))
    assert found["engine refused"].state == found["status"].state == "wrong"


def test_another_user_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    found = findings(doctor.serving(status(arena={"path": str(tmp_path)})))
    assert found["user"].state == "wrong" and "--user" in found["user"].remedy
    keyed = status(arena={"path": str(tmp_path)}, config={"auth-key-file": "/key"})
    found = findings(doctor.serving(keyed))
    assert found["user"].state == "note" and not found["user"].remedy, "as an engine with the key, or root, may"


STRANGE: list[dict[str, Any]] = [
    {"version": "0.1"},
    {"version": None, "arena": [], "engines": {}, "tiers": "none", "config": 7, "wall_seconds": "noon"},
    {
        "version": "9",
        "engines": [{}, None],
        "tiers": [{"name": "disk"}],
        "arena": {"path": "/\0"},
        "counters": {},
        "index": 1,
    },
]
"""What servers of other versions, or other programs, may show."""


@pytest.mark.parametrize("shown", STRANGE)
def test_a_server_that_tells_less_is_said_to_do_so(shown: dict[str, Any]) -> None:
    answer = {"url": "u", "health": {"status": "healthy"}, "status": shown, "why": ""}
    found = list(doctor.serving(answer))
    assert found[-1].state == "wrong" and "does not tell" in found[-1].text
    assert "does not tell" in (said := "".join(screen("u", shown, {"status": "healthy"}))) and "uptime_seconds" in said
    lines = list(screen("u", shown, {"status": "healthy"}))
    assert lines[0].startswith("server    u is healthy")
