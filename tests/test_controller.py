"""The public project's controller, over real servers: served by a server, by a process in front of them, and in a router."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_process import Engine
from lmcache.errors import ConfigError
from lmcache.server.controller import Asked, Controller, There
from lmcache.server.named import Unknown
from lmcache.v1.cache_controller import controller_manager
from lmcache.v1.cache_controller.message import LookupMsg, QueryInstMsg
from ports import free_port
from servers import PATIENCE, Process, Server, eventually

StartServer = Callable[..., Server]
StartEngine = Callable[..., Engine]
CHUNK = 16


def prompt(seed: int, tokens: int = 160) -> list[int]:
    return [(seed * 7919 + at * 31) % 50000 for at in range(tokens)]


def ask(port: int, path: str, content: Any, status: int = 200, **more: Any) -> Any:
    answer = httpx.post(f"http://127.0.0.1:{port}{path}", json=content, timeout=PATIENCE, trust_env=False, **more)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
def pair(server: StartServer, folders: Callable[[str], Path]) -> tuple[Server, Server]:
    """Two servers, each a peer of the other; the first one is also the controller."""
    ports = free_port(), free_port()

    def start(number: int, *flags: str) -> Server:
        peer = f"127.0.0.1:{ports[1 - number]}"
        named = "--instance-id", f"instance-{number}", "--peers", peer, "--worth", "always", "--insecure-no-auth"
        return server(l1=4, chunk=CHUNK, port=ports[number], flags=(*named, *flags))

    second = start(1)
    return start(0, "--control-peers", f"http://127.0.0.1:{second.http_port}"), second


def connected(one: Server) -> bool:
    return bool(one.status()["tiers"][0]["state"] == "serving" and one.status()["pulling_servers"])


def test_a_server_answers_for_itself_and_for_its_fellows(pair: tuple[Server, Server], engine: StartEngine) -> None:
    first, second = pair
    eventually(lambda: connected(first) and connected(second))
    one, other = engine(first, "one"), engine(second, "other")
    long, short = prompt(1), prompt(1)[:80]
    one.store(short)
    other.store(long)
    told = ask(first.http_port, "/lookup", {"tokens": long})
    assert told["layout_info"] == {"instance-1": ["LocalCPUBackend", 160], "instance-0": ["LocalCPUBackend", 80]}
    assert next(iter(told["layout_info"])) == "instance-1" and told["event_id"].startswith("lookup")
    assert ask(first.http_port, "/directory/lookup", {"tokens": prompt(5)})["layout_info"] == {}
    assert ask(second.http_port, "/lookup", {"tokens": long})["layout_info"] == {"instance-1": ["LocalCPUBackend", 160]}

    at = {"instance_id": "instance-1", "location": "LocalCPUBackend"}
    assert ask(first.http_port, "/pin", {"tokens": short, **at})["num_tokens"] == 80
    assert second.counters()["pins"] == 1 and first.counters()["pins"] == 0
    cleared = ask(first.http_port, "/clear", {"tokens": long, **at})
    assert (cleared["num_tokens"], cleared["success"]) == (80, True), "what is pinned stays"
    assert ask(first.http_port, "/health", {"instance_id": "instance-1"})["error_codes"] == {"0": 0}
    assert ask(first.http_port, "/query_instance", {"ip": "127.0.0.1"})["instance_id"] in ("instance-0", "instance-1")
    assert "no server" in ask(first.http_port, "/query_instance", {"ip": "10.1.2.3"}, 404)["reason"]
    assert ask(first.http_port, "/clear", at)["success"] and second.counters()["complete_chunks"] == 0
    assert "instance-0, instance-1" in ask(first.http_port, "/pin", {"tokens": [1], "instance_id": "x"}, 404)["reason"]
    assert "codec" in ask(first.http_port, "/compress", {"tokens": [1]}, 501)["reason"]
    assert "location" in ask(first.http_port, "/pin", {"tokens": [1], "location": "NixlBackend"}, 400)["reason"]
    assert '"tokens"' in ask(first.http_port, "/lookup", {}, 400)["reason"]
    nowhere = {"instance_id": "instance-1", "location": "a tier &ä#"}
    assert "a tier &ä#: there is no such tier" in ask(first.http_port, "/clear", nowhere, 404)["reason"]

    second.kill()
    lost = ask(first.http_port, "/lookup", {"tokens": long})
    assert lost["layout_info"] == {"instance-0": ["LocalCPUBackend", 80]} and lost["unanswered"] == ["127.0.0.1"]


def test_a_move_is_a_pull_by_the_new_place_and_a_removal_at_the_old_one(
    pair: tuple[Server, Server], engine: StartEngine
) -> None:
    first, second = pair
    eventually(lambda: connected(first) and connected(second))
    one, other = engine(first, "one"), engine(second, "other")
    one.store(prompt(1))
    places = {"old_position": ["instance-0", "LocalCPUBackend"], "new_position": ["instance-1", "LocalCPUBackend"]}

    def moved(**more: Any) -> Any:
        told = ask(first.http_port, "/move", {"tokens": prompt(1), **places, **more})
        assert told["num_tokens"] == 160
        event = {"event_id": told["event_id"]}
        return eventually(
            lambda: (status := ask(first.http_port, "/check_finish", event)["status"]) != "moving" and status
        )

    assert moved(copy=True) == "finished"
    assert first.counters()["complete_chunks"] == second.counters()["complete_chunks"] == 10
    assert second.counters()['lookup_tokens_total{source="l1"}'] == 0 and first.counters()["lent_shards_total"] == 10
    engine(first, "third", model="another").store(prompt(1))
    assert moved() == "finished"
    assert (first.counters()["complete_chunks"], second.counters()["complete_chunks"]) == (10, 10), "of another model"
    other.poison()
    hit = other.lookup(prompt(1))
    assert hit is not None
    assert other.wait(other.submit_load(hit, CHUNK, 0, 160, prompt(1))).ok and other.right(prompt(1), 0, 160)
    again = {"tokens": prompt(1), "model": "model", **places}
    assert "has nothing" in ask(first.http_port, "/move", again, 404)["reason"]
    assert "no such move" in ask(first.http_port, "/check_finish", {"event_id": "move1"}, 404)["reason"]


def test_a_move_of_what_the_old_place_loses_meanwhile_does_not_count_as_finished(
    pair: tuple[Server, Server], engine: StartEngine
) -> None:
    first, second = pair
    eventually(lambda: connected(first) and connected(second))
    engine(first).store(prompt(1))

    class Late(There):
        def call(self, verb: str, content: Any) -> dict[str, Any]:
            if verb == "prefetch":
                first.clear()
            return super().call(verb, content)

    old, new = (kind(f"http://127.0.0.1:{at.http_port}", lambda: "") for kind, at in ((There, first), (Late, second)))
    controller = Controller([old, new])
    positions: Any = {"old_position": ("instance-0", ""), "new_position": ("instance-1", "")}
    engine(second)  # so that it knows the model
    told = controller.move(Asked(tokens=prompt(1), **positions))
    assert told["num_tokens"] == 160
    event = Asked(event_id=str(told["event_id"]))
    status = eventually(lambda: (now := str(controller.check_finish(event)["status"])) != "moving" and now)
    assert status.startswith("failed: 0 of 160 tokens have arrived"), status


def test_the_process_in_front_of_servers_needs_their_token_and_its_own(
    server: StartServer, engine: StartEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    secret.chmod(0o600)
    cache = server(l1=4, chunk=CHUNK, flags=("--api-token-file", str(secret), "--instance-id", "the-one"))
    engine(cache).store(prompt(1))
    port, url = free_port(), f"http://127.0.0.1:{cache.http_port},http://localhost:{cache.http_port}"
    flags = "--host", "localhost", "--port", str(port), "--monitor-port", "9001", "--servers", url
    shim = Process([sys.executable, "-m", "lmcache.cli.coordinator", *flags, "--api-token-file", str(secret)])
    try:
        shim.line_with("LMCache controller: http://127.0.0.1")
        assert "--monitor-port: has no effect" in "".join(shim.log)
        assert ask(port, "/lookup", {"tokens": prompt(1)})["layout_info"] == {"the-one": ["LocalCPUBackend", 160]}
        assert ask(port, "/pin", {"tokens": prompt(1), "instance_id": "the-one"})["num_tokens"] == 160
        proxied = {"X-Forwarded-For": "10.0.0.1"}
        ask(port, "/lookup", {"tokens": [1]}, 403, headers=proxied)
        ask(port, "/pin", {"tokens": [1]}, 403, headers=proxied)
        good = proxied | {"Authorization": "Bearer secret"}
        assert ask(port, "/lookup", {"tokens": prompt(1)}, headers=good)["layout_info"]
        listed = httpx.get(f"http://127.0.0.1:{port}/instances", timeout=PATIENCE, trust_env=False).json()
        assert listed["instances"] == [{"instance_id": "the-one", "host": host} for host in ("127.0.0.1", "localhost")]
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE, trust_env=False).status_code == 200
        known = ask(port, "/cache/pins", {"tokens": [1]}, 404)["reason"]
        assert "/query_instance" in known and "/cache/pins" not in known and "/metrics" not in known
    finally:
        assert shim.end() == 0


@pytest.fixture
def fellows() -> Iterator[tuple[list[int], list[str]]]:
    """Two servers of one name that know no prompt, and have much to say: their ports, and the tokens that they were sent."""
    tokens: list[str] = []

    class Fellow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            if self.path == "/cache/models":
                return self._answer(200, {"instance_id": "twin", "server_id": str(self.server.server_port)})  # type: ignore[attr-defined]
            self._answer(404, {"reason": "line\n" * 1000})

        do_POST = do_GET

        def _answer(self, status: int, told: Any) -> None:
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    both = [ThreadingHTTPServer(("127.0.0.1", 0), Fellow) for _ in range(2)]
    for one in both:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield [one.server_port for one in both], tokens
    for one in both:
        one.shutdown()
        one.server_close()


def test_what_other_servers_say_is_cut_and_two_of_one_name_are_told_apart(fellows: tuple[list[int], list[str]]) -> None:
    members = [There(f"http://user:secret@127.0.0.1:{port}", lambda: "") for port in fellows[0]]
    with pytest.raises(Unknown) as said:
        Controller(members[:1]).pin(Asked(tokens=[1]))
    assert "user:***@" in str(said.value) and "secret" not in str(said.value)
    assert len(str(said.value)) < 600 and str(said.value).isprintable()
    with pytest.raises(ConfigError, match="'twin': 2 servers are called so: give each an --instance-id"):
        Controller(members).pin(Asked(tokens=[1], instance_id="twin"))


def test_what_one_of_two_servers_of_one_name_has_is_found_whichever_answers_last(
    server: StartServer, engine: StartEngine
) -> None:
    second = server(l1=4, chunk=CHUNK, flags=("--instance-id", "same"))
    named = "--instance-id", "same", "--control-peers", f"http://127.0.0.1:{second.http_port}"
    first = server(l1=4, chunk=CHUNK, flags=named)
    engine(first, "one").store(prompt(1))
    engine(second, "other").store(prompt(2))
    for seed in (1, 2):
        found = ask(first.http_port, "/lookup", {"tokens": prompt(seed)})["layout_info"]
        assert found == {"same": ["LocalCPUBackend", 160]}
    assert "2 servers are called so" in ask(first.http_port, "/clear", {"instance_id": "same"}, 400)["reason"]


def test_a_new_token_is_the_one_that_others_are_sent(
    server: StartServer, fellows: tuple[list[int], list[str]], tmp_path: Path
) -> None:
    ports, tokens = fellows
    secret = tmp_path / "token"
    secret.write_text("the-first-token-of-all")
    secret.chmod(0o600)
    cache = server(l1=4, flags=("--api-token-file", str(secret), "--control-peers", f"http://127.0.0.1:{ports[0]}"))

    def sent() -> str:
        told = httpx.get(f"http://127.0.0.1:{cache.http_port}/instances", timeout=PATIENCE, trust_env=False).json()
        assert len(told["instances"]) == 2, told
        return tokens[-1]

    assert sent() == "Bearer the-first-token-of-all"
    secret.write_text("the-second-token-of-all")
    cache.signal(signal.SIGHUP)
    cache.line_with("in effect now: api-token")
    assert sent() == "Bearer the-second-token-of-all"


def test_the_router_of_the_production_stack_finds_its_names(
    server: StartServer, engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = server(l1=4, chunk=CHUNK, flags=("--instance-id", "the-one"))
    engine(cache).store(prompt(1))
    monkeypatch.setenv("LMCACHE_CONTROLLER_SERVERS", f"http://127.0.0.1:{cache.http_port}")
    urls = {"pull": "0.0.0.0:9000", "reply": None}
    manager = controller_manager.LMCacheControllerManager(urls, health_check_interval=5, lmcache_worker_timeout=30)

    async def route() -> None:
        await manager.start_all()
        found = await manager.handle_orchestration_message(LookupMsg(tokens=prompt(1)))
        assert list(found.layout_info) == ["the-one"] and found.layout_info["the-one"][1] == 160
        at = await manager.handle_orchestration_message(QueryInstMsg(ip="127.0.0.1"))
        assert at.instance_id == "the-one"
        cache.kill()
        assert not (await manager.handle_orchestration_message(LookupMsg(event_id="e", tokens=[1]))).layout_info
        with pytest.raises(TypeError, match="LookupMsg and QueryInstMsg"):
            await manager.handle_orchestration_message("nonsense")

    asyncio.run(route())
