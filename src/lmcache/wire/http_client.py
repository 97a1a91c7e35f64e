"""One call to a server's HTTP endpoint, for the subcommands of the command line."""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from lmcache.config.hosts import connect, seconds_left
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable, plainly
from lmcache.wire.knock import ZMQ, ZMQ_SPEAKS_FIRST, Listener, knock

DEFAULT_URL = "http://127.0.0.1:8080"
DEADLINE_SECONDS = 3.0
_KNOCK_SECONDS = 1.0
"""How long to wait for a port to send something unasked; shorter than an HTTP server waits for a request."""
_LONGEST_ANSWER_BYTES = 16 << 20


def ask(
    url: str, path: str, method: str = "GET", token: str = "", seconds: float | None = None, content: Any = None
) -> tuple[int, dict[str, Any]]:
    """Call the server and return (HTTP status, the JSON object of the answer). No proxy is used and no redirect followed, and
    loopback needs no resolver. content: sent as JSON, unless it is None.

    Raises:
        ConfigError: not a URL of a server.
        ServerUnavailable: nobody listens there, or what listens there does not answer within three seconds, or so many.
        ServerRefused: what answers is not an LMCache server's HTTP endpoint.
    """
    status, body = _call(url, path, method, token, seconds, content)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ServerRefused(f"{url}{path} answered {status}, but not as LMCache does: pass the --url of lmcache server")
    return status, answer


def status_of(url: str, path: str) -> int:
    """Call any HTTP server, such as an engine's, and return the status of its answer. Raises what `ask` does."""
    return _call(url, path, "GET", "", None)[0]


def send(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> int:
    """Post the body to any HTTP server and return the status of its answer, of which little is read. No proxy is used and no
    redirect followed.

    Raises:
        ConfigError: not a URL of a server.
        ServerUnavailable: nobody listens there, or the answer has not come within so many seconds.
    """
    parts = _parts(url)
    connection = _Connection(parts, time.monotonic() + seconds)
    try:
        connection.request("POST", parts.path + (f"?{parts.query}" if parts.query else ""), body, dict(headers))
        with connection.getresponse() as response:
            response.read(1 << 16)
            return response.status
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else str(error)
        raise ServerUnavailable(f"{why or type(error).__name__}") from None
    finally:
        connection.close()


def _call(
    url: str, path: str, method: str, token: str, seconds: float | None, content: Any = None
) -> tuple[int, bytes]:
    parts = _parts(url)
    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    body = None if content is None else json.dumps(content).encode()
    headers |= {} if body is None else {"Content-Type": "application/json"}
    deadline = DEADLINE_SECONDS if seconds is None else seconds
    connection = _Connection(parts, time.monotonic() + deadline)
    try:
        connection.request(method, parts.path.rstrip("/") + path, body, headers)
        with connection.getresponse() as response:
            status, answer = response.status, response.read(_LONGEST_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError)
        spoken = "NULL" if isinstance(error, _Zmq) else "" if late else _spoken(parts)
        if spoken in ZMQ:
            raise ServerRefused(
                f"{url} is an engines' port (ZMQ), which does not speak HTTP: pass --url with the --http-port of "
                f"`lmcache server`, such as {DEFAULT_URL}"
            ) from None
        if spoken == "HTTP" and parts.scheme == "https":
            raise ServerRefused(f"{url} speaks HTTP without TLS: pass --url http://{parts.netloc}") from None
        why = f"no answer within {deadline:g} s" if late else plainly(error)
        if late and not isinstance(error, _NoConnection):
            later = " (it may still do what it was asked to, once it goes on)" if method != "GET" else ""
            raise ServerUnavailable(
                f"{url} accepts connections, but there was {why}{later}: if this is `lmcache server`, its process is stopped, "
                "hangs or is overloaded: look at its state (ps) and its log, and restart it if need be; otherwise pass --url"
            ) from None
        raise ServerUnavailable(f"no server at {url}: {why}: start `lmcache server`, or pass --url") from None
    finally:
        connection.close()
    return status, answer


class _Zmq(http.client.HTTPException):
    """The peer speaks ZMQ."""


class _NoConnection(TimeoutError):
    """No connection could be made in time."""


class _Timely(socket.socket):
    """A socket that reads nothing after `deadline`, however little arrives at a time."""

    deadline = math.inf

    def recv_into(self, *arguments: Any, **more: Any) -> int:  # the only method by which http.client reads
        self.settimeout(seconds_left(self.deadline))
        return super().recv_into(*arguments, **more)


class _TimelyTls(_Timely, ssl.SSLSocket):
    """A `_Timely` over TLS."""


class _Connection(http.client.HTTPConnection):
    """An HTTP connection, over TLS for https, that fails after `deadline`, however slowly bytes come."""

    def __init__(self, parts: urllib.parse.SplitResult, deadline: float) -> None:
        self._deadline, self._tls = deadline, parts.scheme == "https"
        self.default_port = http.client.HTTPS_PORT if self._tls else http.client.HTTP_PORT
        super().__init__(parts.hostname or "", parts.port or self.default_port)

    def connect(self) -> None:
        try:
            plain = connect(self.host, self.port, seconds_left(self._deadline))
        except TimeoutError as error:
            raise _NoConnection from error
        with plain:
            plain.settimeout(seconds_left(self._deadline))  # for a handshake
            if self._tls:
                context = ssl.create_default_context()
                context.sslsocket_class = _TimelyTls
                timely: Any = context.wrap_socket(plain, server_hostname=self.host)
            else:
                timely = _Timely(fileno=plain.detach())
        self.sock, timely.deadline = timely, self._deadline
        timely.settimeout(seconds_left(self._deadline))  # for sending

    def getresponse(self) -> http.client.HTTPResponse:
        self.sock.settimeout(seconds_left(self._deadline))
        if not self._tls and self.sock.recv(1, socket.MSG_PEEK) == ZMQ_SPEAKS_FIRST:
            raise _Zmq
        return super().getresponse()


def _spoken(parts: urllib.parse.SplitResult) -> Listener | Literal[""]:
    """Find out which protocol the port speaks instead of HTTP. ZMQ with a key, for example, hangs up on HTTP at once."""
    try:
        return knock(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), _KNOCK_SECONDS)
    except OSError:
        return ""


def _parts(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # the port is not a number, or a bracket is missing
    raise ConfigError(f"--url {url}: must be like {DEFAULT_URL}")
