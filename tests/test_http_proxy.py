"""The tests' own HTTP proxy forwards what it gets, and answers itself what it is told to."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from http_proxy import HTTPProxy
from servers import PATIENCE

BODY = bytes(range(256)) * 1000


class _Echo(BaseHTTPRequestHandler):
    """Answers with the body it got, or with its path; chunked where the path says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = body or self.path.encode()
        self.send_response(200)
        self.send_header("X-Host", self.headers["Host"])
        chunked = "chunked" in self.path
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def through() -> Iterator[HTTPProxy]:
    echo = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=echo.serve_forever, args=(0.01,))
    thread.start()
    with closing(HTTPProxy(echo.server_port)) as one:
        yield one
    echo.shutdown()
    thread.join()
    echo.server_close()


@pytest.fixture
def client(through: HTTPProxy) -> Iterator[http.client.HTTPConnection]:
    one = http.client.HTTPConnection("127.0.0.1", through.port, timeout=PATIENCE)
    yield one
    one.close()


def ask(client: http.client.HTTPConnection, method: str, path: str, body: bytes = b"", chunked: bool = False) -> bytes:
    pieces = iter([body[:70_000], body[70_000:]]) if chunked else body
    client.request(method, path, pieces, {"Host": "as-signed:1"}, encode_chunked=chunked)
    with client.getresponse() as answer:
        assert answer.status == 200 and answer.headers["X-Host"] == "as-signed:1"
        return answer.read()


def test_bodies_pass_unchanged_both_ways_on_one_connection(
    through: HTTPProxy, client: http.client.HTTPConnection
) -> None:
    client.connect()
    first = client.sock
    for path in ("/a?x=%2F&y", "/chunked"):
        for chunked in (False, True):
            assert ask(client, "PUT", path, BODY, chunked) == BODY
        assert ask(client, "GET", path) == path.encode()
        assert ask(client, "HEAD", path) == b""
    assert client.sock is first and through.forwarded == {"PUT": 4, "GET": 2, "HEAD": 2} and not through.failed


def test_who_asks_whether_to_go_on_is_told_so(through: HTTPProxy) -> None:
    with socket.create_connection(("127.0.0.1", through.port), timeout=PATIENCE) as raw:
        raw.sendall(
            b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 100 ")
        raw.sendall(b"abc")
        said = b""
        while piece := raw.recv(1000):
            said += piece
    assert said.startswith(b"HTTP/1.1 200 ") and said.endswith(b"\r\n\r\nabc")


def test_the_verbs_that_are_to_fail_do_until_it_heals(through: HTTPProxy, client: http.client.HTTPConnection) -> None:
    def status(method: str, path: str) -> int:
        client.request(method, path, BODY if method == "PUT" else b"")
        with client.getresponse() as answer:
            said = answer.read()
            assert answer.status == 200 or (b"<Code>SlowDown</Code>" in said) == (method != "HEAD")
            return answer.status

    requests = {
        "PUT": ("PUT", "/b/k"),
        "GET": ("GET", "/b/k"),
        "HEAD": ("HEAD", "/b/k"),
        "DELETE": ("POST", "/b?delete"),
        "LIST": ("GET", "/b?list-type=2&prefix=k"),
    }
    for verb in requests:
        through.fail(verb, 503, "SlowDown")
        assert {other: status(*asked) for other, asked in requests.items()} == dict.fromkeys(requests, 200) | {
            verb: 503
        }
        through.heal()
    through.fail("PUT GET", 503, "SlowDown", times=2)
    assert [status(*requests["PUT"]) for _ in range(3)] == [503, 503, 200]
    assert through.failed["PUT"] == 3 and status("DELETE", "/b/k") == 200
