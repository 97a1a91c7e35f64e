"""One call to a server's HTTP face, as the command line's verbs make it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Literal

from lmcache.config.hosts import connect
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.wire.knock import ZMQ, ZMQ_SPEAKS_FIRST, Listener, knock

DEFAULT_URL = "http://127.0.0.1:8080"
DEADLINE_SECONDS = 3.0
_KNOCK_SECONDS = 1.0
"""How long to wait for what a port says unasked, before it is asked; less than an HTTP server waits for a request."""
_LONGEST_ANSWER_BYTES = 16 << 20


def ask(
    url: str, path: str, method: str = "GET", token: str = "", seconds: float | None = None
) -> tuple[int, dict[str, Any]]:
    """(HTTP status, the JSON object of the answer). Proxies are not used; loopback needs no resolver.

    Raises:
        ConfigError: not a URL of a server.
        ServerUnavailable: nobody answers there within three seconds, or so many.
        ServerRefused: what answers is not an LMCache server's HTTP face.
    """
    parts = _parts(url)
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    request = urllib.request.Request(base + path, method=method, headers={"Accept": "application/json"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    deadline = DEADLINE_SECONDS if seconds is None else seconds
    try:
        status, body = _exchange(request, deadline)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, TimeoutError)
        spoken = "NULL" if isinstance(reason, _Zmq) else "" if late else _spoken(parts)
        if spoken in ZMQ:
            raise ServerRefused(
                f"{url} is an engines' port (ZMQ), where no HTTP is spoken: pass --url with the --http-port of "
                f"`lmcache server`, such as {DEFAULT_URL}"
            ) from None
        if spoken == "HTTP" and parts.scheme == "https":
            raise ServerRefused(f"{url} speaks HTTP without TLS: pass --url http://{parts.netloc}") from None
        why = f"no answer within {deadline:g} s" if late else f"{reason}"
        raise ServerUnavailable(f"no server at {url}: {why}: start `lmcache server`, or pass --url") from None
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServerRefused(f"{url}{path} answered {status}, but not as LMCache does: pass the --url of lmcache server")
    return status, answer


class _Zmq(http.client.HTTPException):
    """ZMQ is spoken there."""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock: socket.socket = connect(self.host, self.port, self.timeout or DEADLINE_SECONDS)

    def getresponse(self) -> http.client.HTTPResponse:
        if self.sock.recv(1, socket.MSG_PEEK) == ZMQ_SPEAKS_FIRST:
            raise _Zmq
        return super().getresponse()


class _TlsConnection(http.client.HTTPConnection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        plain = connect(self.host, self.port, self.timeout or DEADLINE_SECONDS)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _TlsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, request)


def _exchange(request: urllib.request.Request, deadline: float) -> tuple[int, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Handler, _TlsHandler)
    try:
        with opener.open(request, timeout=deadline) as response:
            return response.status, response.read(_LONGEST_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_LONGEST_ANSWER_BYTES)


def _spoken(parts: urllib.parse.SplitResult) -> Listener | Literal[""]:
    """What is spoken there instead. ZMQ with a key, for one, hangs up on HTTP before it says what it is."""
    try:
        return knock(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), _KNOCK_SECONDS)
    except OSError:
        return ""


def _parts(url: str) -> urllib.parse.SplitResult:
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    try:
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # a port that is none
    raise ConfigError(f"--url {url}: must be like {DEFAULT_URL}")
