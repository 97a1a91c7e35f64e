"""`lmcache proxy` in front of made-up engines: who gets what, what is streamed, and what happens when engines fail."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import pytest

from lmcache.cli.main import main
from lmcache.errors import ConfigError
from lmcache.proxy import app, connections, upstream
from lmcache.proxy.upstream import AVOIDED_SECONDS, in_turn, parse_engines
from ports import free_port
from servers import PATIENCE, Process, eventually

PARAMS = {"do_remote_prefill": True, "lmcache": {"v": 1, "tokens": 9}}
Json = dict[str, Any]


class Engine:
    """Answers all requests alike, by `say`, and keeps them."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.headers = name, list[tuple[str, Json]](), list[dict[str, str]]()
        self.status, self.params, self.go, self.cut = 200, None, threading.Event(), False
        """go: until it is set, a stream stands still after its first event. cut: the stream then ends too early."""
        self.trickles = False
        """Whether answers come a byte at a time, and never to their end."""
        self.hung_up = threading.Event()
        self.go.set()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                engine.asked.append((self.path, body))
                engine.headers.append({name.lower(): value for name, value in self.headers.items()})
                with contextlib.suppress(OSError):
                    if body.get("stream"):
                        self._stream()
                    else:
                        engine.go.wait(PATIENCE)
                        self._answer()

            def _answer(self) -> None:
                more = {"kv_transfer_params": engine.params} if engine.params else {}
                data = json.dumps({"from": engine.name, **more}).encode()
                self.send_response(engine.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data) + (1 << 30) * engine.trickles))
                if engine.status == 429:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(data)
                while engine.trickles:
                    try:
                        self.wfile.write(b" ")
                    except OSError:
                        engine.hung_up.set()
                        return
                    time.sleep(0.05)

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._event("data: 1\n\n")
                if engine.cut:
                    self.close_connection = True
                    return
                while not engine.go.wait(0.05):
                    try:
                        self._event(": waits\n\n")
                    except OSError:
                        engine.hung_up.set()
                        raise
                self._event("data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")

            def _event(self, text: str) -> None:
                self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
                self.wfile.flush()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()


class Bed:
    """A proxy of two engines of each kind."""

    def __init__(self, timeout: str = "600") -> None:
        self.prefill, self.decode = [Engine("p1"), Engine("p2")], [Engine("d1"), Engine("d2")]
        self.port = free_port()
        command = [sys.executable, "-m", "lmcache.cli.main", "proxy", "--port", str(self.port), "--timeout", timeout]
        for flag, engines in (("--prefill", self.prefill), ("--decode", self.decode)):
            command += [flag, ",".join(engine.url for engine in engines)]
        self.process = Process(command)
        eventually(self._healthy)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/health")[0] == 200
        return False

    def get(self, path: str) -> tuple[int, Json]:
        return self._ask(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Json]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method="POST"))

    @staticmethod
    def _ask(request: urllib.request.Request) -> tuple[int, Json]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, body: Json) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}))
        return connection.getresponse()

    def asked(self, engines: list[Engine]) -> list[Json]:
        return [body for engine in engines for _, body in engine.asked]

    def close(self) -> None:
        self.process.kill()
        for engine in self.prefill + self.decode:
            engine.stop()


@pytest.fixture
def bed() -> Iterator[Callable[..., Bed]]:
    made: list[Bed] = []

    def make(**options: Any) -> Bed:
        made.append(Bed(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_prefill_engine_gets_one_token_and_the_decode_engine_everything(bed: Callable[..., Bed]) -> None:
    one = bed()
    asked = {"prompt": "a", "max_tokens": 50, "min_tokens": 7, "n": 2, "temperature": 0}
    assert one.post(asked, authorization="Bearer x")[1]["from"] == "d1"
    assert one.asked(one.prefill) == [
        {
            "prompt": "a",
            "max_tokens": 1,
            "min_tokens": 1,
            "n": 1,
            "temperature": 0,
            "stream": False,
            "kv_transfer_params": {"do_remote_decode": True},
        }
    ]
    assert one.asked(one.decode) == [asked], "without parameters of the first engine, none"
    assert all(engine.headers[0]["authorization"] == "Bearer x" for engine in (one.prefill[0], one.decode[0]))
    one.prefill[1].params = PARAMS
    chat = {"messages": [], "max_completion_tokens": 9, "stream_options": {"include_usage": True}}
    chat |= {"kv_transfer_params": {"remote_host": "192.0.2.1"}}
    with one.stream(chat) as answer:
        assert answer.read() == b"data: 1\n\ndata: [DONE]\n\n"
        assert answer.getheader("content-type") == "text/event-stream"
    path, first = one.prefill[1].asked[0]
    assert path == "/v1/chat/completions" and (first["max_tokens"], first["max_completion_tokens"]) == (1, 1)
    assert "stream_options" not in first and first["kv_transfer_params"] == {"do_remote_decode": True}
    assert one.decode[1].asked[0][1] == {**chat, "stream": True, "kv_transfer_params": PARAMS}
    assert one.get("/v1/models")[1]["from"] in ("d1", "d2")


def test_events_arrive_as_they_are_sent_and_a_client_that_hangs_up_ends_the_request(bed: Callable[..., Bed]) -> None:
    one = bed()
    one.decode[0].go.clear()
    with one.stream({"messages": []}) as answer:
        assert answer.readline() == b"data: 1\n"
        assert not one.decode[0].hung_up.is_set()
    assert one.decode[0].hung_up.wait(PATIENCE)
    assert one.post({"prompt": "b"})[0] == 200


def test_failing_engines(bed: Callable[..., Bed]) -> None:
    one = bed()
    for engine in one.prefill:
        engine.status = 500
    assert one.post({"prompt": "a"})[0] == 200 and len(one.asked(one.prefill)) == 2
    for engine in one.prefill:
        engine.stop()
    one.decode[0].status = 503
    assert one.post({"prompt": "b"})[1]["from"] == "d2"
    one.decode[0].stop()
    for _ in range(3):
        assert one.post({"prompt": "c"})[1]["from"] == "d2"
    one.decode[1].status = 400
    assert one.post({"prompt": "d"}) == (400, {"from": "d2"}), "the engine's own answer to a wrong request"
    one.decode[1].status = 500
    status, answer = one.post({"prompt": "e"})
    assert status == 502 and "no decode engine" in answer["error"]["message"]


def test_an_answer_that_breaks_off_is_not_taken_for_complete(bed: Callable[..., Bed]) -> None:
    one = bed()
    for engine in one.decode:
        engine.cut = True
    with one.stream({"messages": []}) as answer, pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answer.read()
    assert len(one.asked(one.decode)) == 1, "what has begun is not asked again"
    assert one.get("/health")[0] == 200


def test_an_engine_that_hangs_costs_the_timeout(bed: Callable[..., Bed]) -> None:
    one = bed(timeout="3")  # in which the engine that does not hang has to answer
    one.prefill[0].go.clear()
    one.decode[0].go.clear()
    assert one.post({"prompt": "a"})[1]["from"] == "d2"
    assert len(one.asked(one.prefill)) == 1, "the wait is not repeated with the next one"


def test_a_prefill_that_trickles_costs_the_timeout(bed: Callable[..., Bed]) -> None:
    one = bed(timeout="3")
    for engine in one.prefill:
        engine.trickles = True
    assert one.post({"prompt": "a"})[1]["from"] == "d1"
    assert len(one.asked(one.prefill)) == 1, "the wait is not repeated with the next one"
    assert next(engine for engine in one.prefill if engine.asked).hung_up.wait(PATIENCE), "its request has ended"


def test_a_client_that_hangs_up_ends_its_question_for_models_too(bed: Callable[..., Bed]) -> None:
    one = bed()
    for engine in one.decode:
        engine.trickles = True
    with socket.create_connection(("127.0.0.1", one.port), PATIENCE) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(1)
    assert next(engine for engine in one.decode if engine.asked).hung_up.wait(PATIENCE)


def test_a_prefill_engine_that_is_full_is_replaced_by_the_next(bed: Callable[..., Bed]) -> None:
    one = bed()
    one.prefill[0].status, one.prefill[1].params = 429, PARAMS
    assert one.post({"prompt": "a"})[1]["from"] == "d1"
    assert len(one.asked(one.prefill)) == 2 and one.asked(one.decode)[0]["kv_transfer_params"] == PARAMS


def test_an_engine_may_say_when_to_try_again(bed: Callable[..., Bed]) -> None:
    one = bed()
    for engine in one.decode:
        engine.status = 429
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=PATIENCE)
    connection.request("POST", "/v1/completions", "{}")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Retry-After")) == (429, "7")


@pytest.mark.parametrize(
    ("headers", "local", "refused"),
    [
        ({"host": "127.0.0.1:8000"}, True, False),
        ({"host": "gateway"}, True, False),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, True, False),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, True, True),
        ({"host": "evil.example:8000", "sec-fetch-site": "same-origin"}, True, True),
        ({"host": "gpu-7:8000", "origin": "http://gpu-7:8000", "sec-fetch-site": "same-origin"}, False, False),
        ({"host": "127.0.0.1:8000", "sec-fetch-site": "cross-site"}, False, True),
    ],
)
def test_pages_of_other_hosts_are_refused(headers: dict[str, str], local: bool, refused: bool) -> None:
    sent = ask([b"{}"], headers=headers, local=local)
    assert sent == [403 if refused else 502] * 2


def test_a_client_that_stops_amid_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENCE_SECONDS", 0.01)
    assert ask([b"{"], silent=True) == [408, 408]


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import uvicorn

    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.05)
    release = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await app._answer(send, 200, {})

    async def run() -> None:
        config = uvicorn.Config(
            slow, http=connections.Connection, lifespan="off", log_config=None, timeout_keep_alive=600
        )
        server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listener]))
        where = listener.getsockname()[:2]
        idle, _ = await asyncio.open_connection(*where)
        half, sends = await asyncio.open_connection(*where)
        sends.write(b"GET / HTT")
        busy, asks = await asyncio.open_connection(*where)
        asks.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await asyncio.wait_for(idle.read(), PATIENCE) == b""
        assert await asyncio.wait_for(half.read(), PATIENCE) == b""
        release.set()
        assert b"200" in await asyncio.wait_for(busy.readline(), PATIENCE), "a request that runs is not idle"
        assert await asyncio.wait_for(busy.read(), PATIENCE), "idle again, and closed"
        server.should_exit = True
        await serving

    asyncio.run(run())


def test_wrong_requests(bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch) -> None:
    one = bed()
    for body in (b"", b"[1]", b"{", b"[" * 100_000):
        assert one.post(body)[0] == 400
    assert one.post({}, "/v1/embeddings")[0] == 404 and one.get("/v1/completions")[0] == 405
    assert not one.asked(one.prefill + one.decode)
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=PATIENCE)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(app.MOST_BODY_BYTES + 1))
    connection.endheaders()
    block = bytes(1 << 20)
    with contextlib.suppress(ConnectionError):
        for _ in range(app.MOST_BODY_BYTES // len(block)):
            connection.send(block)
        connection.send(b"1")
    with contextlib.suppress(ConnectionError):
        assert connection.getresponse().status == 413
    assert one.get("/health")[0] == 200


def test_a_header_that_is_not_ascii_is_passed_on_as_it_is(bed: Callable[..., Bed]) -> None:
    one = bed()
    assert one.post({"prompt": "a"}, authorization="Bearer \u00e9")[0] == 200
    assert one.decode[0].headers[0]["authorization"] == "Bearer \u00e9"


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:1", "--port", port]
        assert main(["proxy", *flags]) != 0
    assert f"--port {port}: cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_a_prefill_engine_that_takes_no_connections_is_replaced_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_SECONDS", 0.01)

    async def hangs(*_: Any) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(anyio, "connect_tcp", hangs)

    async def connect() -> None:
        async with upstream.call(*parse_engines("--prefill", "http://a"), "POST", "/", {}, b"", 600.0):
            pass

    with pytest.raises(ConnectionError, match="no connection"):  # no `TimeoutError`, after which no other one is asked
        anyio.run(connect)


def ask(
    body: list[bytes], hang_up: bool = False, silent: bool = False, local: bool = False, headers: Any = None
) -> list[int]:
    """What a proxy without engines answers to a body in these parts."""
    sent: list[int] = []

    async def run() -> None:
        parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        parts[-1]["more_body"] = hang_up or silent
        given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

        async def receive() -> Any:
            if parts:
                return parts.pop(0)
            if not hang_up:
                await anyio.sleep_forever()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.extend([message["status"]] if "status" in message else [])

        proxy = app.Proxy([], [], 600.0, local)
        for _ in range(2):  # the first one is not held any more
            held = list(parts)
            await proxy({"type": "http", "path": "/v1/completions", "method": "POST", "headers": given}, receive, send)
            parts[:] = held

    anyio.run(run)
    return sent


def test_bodies_are_bounded_together_and_in_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_HELD_BYTES", 30)
    monkeypatch.setattr(app, "MOST_COMMAS", 3)
    assert ask([b'{"a": ', b"[1, 2, 3, 4]}"]) == [502, 502], "it is read, and there is no engine"
    assert ask([b'{"a": ', b"[1, 2, 3, 4, 5]}"]) == [413, 413]
    assert ask([b'{"a": ', b" " * 30, b"1}"]) == [503, 503]
    assert ask([b'{"a": 1}'], hang_up=True) == [], "a request that has not come whole is not begun"


def test_urls_of_engines() -> None:
    one, other = parse_engines("--decode", "http://h:1/base/, http://[::1]:2")
    assert (str(one), other.host, other.port) == ("http://h:1/base", "::1", 2)
    for text in (
        "",
        "h:1",
        "https://h",
        "ftp://h",
        "http://",
        "http://h:x",
        "http://u@h",
        "http://h:0",
        "http://h/a b",
    ):
        with pytest.raises(ConfigError, match="--decode"):
            parse_engines("--decode", text)


def test_engines_that_have_failed_lately_come_last() -> None:
    busy, failed, idle = parse_engines("--decode", "http://a,http://b,http://c")
    busy.running, failed.failed, idle.used = 3, 100.0, 9
    assert in_turn([busy, failed, idle], 101.0) == [idle, busy, failed]
    assert in_turn([busy, failed, idle], 101.0 + AVOIDED_SECONDS) == [failed, idle, busy]
