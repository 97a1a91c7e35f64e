"""Calls to the engines behind the proxy, over HTTP/1.1: one connection for each call, so that its end ends the request."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
import h11
from anyio.abc import ByteStream

from lmcache.config.hosts import in_url
from lmcache.errors import ConfigError

CONNECT_SECONDS = 5.0
AVOIDED_SECONDS = 10.0
"""An engine that has failed is asked only after the others for so long."""
_READ_BYTES = 65536
FAILURES = OSError, TimeoutError, h11.RemoteProtocolError, anyio.BrokenResourceError
"""What ends a call to an engine that has gone, hangs, or does not speak HTTP."""


@dataclass(eq=False)
class Engine:
    """An engine's HTTP endpoint. running: calls that have not ended. used: number of calls. failed: when a call failed last. tls:
    how to speak TLS with it; None for HTTP."""

    host: str
    port: int
    path: str = ""
    running: int = 0
    used: int = 0
    failed: float = float("-inf")
    tls: ssl.SSLContext | None = None

    @property
    def address(self) -> str:
        return f"{in_url(self.host)}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}{self.path}"


def parse_engines(flag: str, text: str, tls: ssl.SSLContext | None = None) -> list[Engine]:
    """Parse URLs with commas between them. tls: for `https://`; None: such URLs are no engines'.

    Raises:
        ConfigError: one of them is no URL of an HTTP endpoint.
    """
    engines, schemes = list[Engine](), ("http", "https") if tls else ("http",)
    for url in filter(None, (one.strip() for one in text.split(","))):
        parts = urlsplit(url)
        try:
            if parts.scheme not in schemes or not parts.hostname or parts.username or parts.query or parts.port == 0:
                raise ValueError
            h11.Request(method="GET", target=parts.path or "/", headers=[("Host", parts.hostname)])
            used = tls if parts.scheme == "https" else None
            engines.append(
                Engine(parts.hostname, parts.port or (443 if used else 80), parts.path.rstrip("/"), tls=used)
            )
        except (ValueError, h11.LocalProtocolError):
            shown = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}" if "@" in parts.netloc else url
            raise ConfigError(
                f"{flag} {shown}: must be like http://127.0.0.1:8100, without a path such as /v1"
            ) from None
    if not engines:
        raise ConfigError(f"{flag} {text!r}: name at least one engine, such as http://127.0.0.1:8100")
    return engines


def in_turn(engines: Sequence[Engine], now: float) -> list[Engine]:
    """Return the engines in the order in which to ask them: those that have failed lately last, the others by their load."""
    return sorted(engines, key=lambda one: (one.failed > now - AVOIDED_SECONDS, one.running, one.used))


class Answer:
    """An engine's answer, of which status and headers have arrived."""

    def __init__(self, stream: ByteStream, protocol: h11.Connection, seconds: float) -> None:
        self._stream, self._protocol, self._seconds = stream, protocol, seconds
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    async def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            with anyio.fail_after(self._seconds):
                try:
                    data = await self._stream.receive(_READ_BYTES)
                except anyio.EndOfStream:
                    data = b""
            self._protocol.receive_data(data)
        return event

    async def read_head(self) -> None:
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("the connection was closed without an answer")
        self.status, self.headers = event.status_code, dict(event.headers)

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)


async def _connected(engine: Engine) -> ByteStream:
    if engine.tls is None:
        return await anyio.connect_tcp(engine.host, engine.port)
    try:
        return await anyio.connect_tcp(
            engine.host,
            engine.port,
            ssl_context=engine.tls,
            tls_hostname=engine.host,
            tls_standard_compatible=False,  # many servers end a connection without saying so; lengths tell what is missing
        )
    except anyio.EndOfStream:
        raise ConnectionError("the connection was closed during the TLS handshake") from None


@asynccontextmanager
async def call(
    engine: Engine, method: str, path: str, headers: dict[str, str], body: bytes, seconds: float
) -> AsyncIterator[Answer]:
    """Send a request, and yield the answer once its head has arrived. Leaving ends the request. seconds: how long the engine
    may send nothing. Raises one of `FAILURES`."""
    engine.running, engine.used = engine.running + 1, engine.used + 1
    try:
        try:
            with anyio.fail_after(CONNECT_SECONDS):
                stream = await _connected(engine)
        except TimeoutError:  # not `seconds`, for which an engine may work
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from None
        async with stream:
            protocol = h11.Connection(h11.CLIENT)
            sent = {
                "Host": engine.address,
                "Connection": "close",
                **headers,
                "Content-Length": str(len(body)),
            }
            fields = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
            head = h11.Request(method=method, target=engine.path + path, headers=fields)
            raw = (protocol.send(head) or b"") + (protocol.send(h11.Data(body)) or b"")
            with anyio.fail_after(seconds):
                await stream.send(raw + (protocol.send(h11.EndOfMessage()) or b""))
            answer = Answer(stream, protocol, seconds)
            await answer.read_head()
            yield answer
    except FAILURES:
        engine.failed = anyio.current_time()
        raise
    finally:
        engine.running -= 1
