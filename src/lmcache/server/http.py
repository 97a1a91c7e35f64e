"""The HTTP endpoint serves health, status and metrics to people and tools, in one thread with an asyncio loop of its own.

Health, version and metrics are open to every caller that can connect. The other routes reveal paths, process ids and requests, or
change state. They need the API token, or a caller on this host: a loopback peer that addresses a loopback name without a proxy.
A request that changes state must not come from a web page, so it must lack the headers that browsers add.
"""

from __future__ import annotations

import dataclasses
import functools
import hmac
import json
import math
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lmcache import __version__
from lmcache.cache.records import MOST_RETURNED
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server import page
from lmcache.server.control import Control
from lmcache.server.http_controller import ControllerRoutes
from lmcache.server.http_operating import OperatingRoutes
from lmcache.server.http_sockets import Connection, is_loopback, listen
from lmcache.server.metrics import render

logger = init_logger(__name__)

_T = TypeVar("_T")

_CONTROL_SECONDS = 2.0
"""Timeout of calls to `Control`, which should return within one second."""
_TIER_SECONDS = 25.0
"""Timeout of attaching and removing a tier."""
_LONGEST_DRAIN_SECONDS = 3600.0
_CLEAR_SECONDS = 30.0
"""Timeout of clearing L1, which visits every chunk."""
_MOST_HEADER_BYTES = 16 << 10
_MOST_BODY_BYTES = 64 << 10
_START_SECONDS = 10.0
_LOCAL_NAME = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_TOKEN_NEEDED = "from this host too, this needs the header `Authorization: Bearer TOKEN`"
_WEB_PAGE_HEADERS = ("origin", "sec-fetch-site")
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
READS = "callers on the server's host, and those with the token"
CHANGES = "callers on the server's host, and those with the token; never a web page without it"
"""Who may use the guarded routes of each kind. Everybody who reaches the port may use the others."""
_OF_CONTROLLER = (
    "the controller's GET /instances and POST /lookup, /pin, /clear, /move, /health, /query_instance, /check_finish"
)
_ROUTES = (
    "GET /healthcheck, /livez, /readyz, /version, /metrics, /status, /config, /fetches, /requests, /history; "
    "POST /cache/clear, /cache/lookup, /cache/delete; GET, POST and DELETE /cache/pins and /cache/prefetches; "
    f"GET /cache/objects, /cache/models; {_OF_CONTROLLER}; "
    "GET and POST /tiers, DELETE /tiers/NAME, POST /tiers/NAME/pause and /resume"
)
"""The answer to a request for an unknown path: it names the paths that exist."""
_HEADERS = [("Connection", "close"), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]


class HttpEndpoint:
    """The HTTP endpoint of a server. `start` returns when it serves, and `stop` when its thread has ended.

    whole: False for a process that is only a controller of other servers; it has the routes of that, and health.
    """

    def __init__(self, config: ServerConfig, control: Control, whole: bool = True) -> None:
        self._config = config
        self._control, self._whole = control, whole
        self._started = threading.Event()
        self._server: uvicorn.Server | None = None
        self._connections: dict[tuple[str, int], Connection] = {}
        """(host, port) of the peer -> open connection."""
        self._thread: threading.Thread | None = None
        self.port = config.http_port
        """The port that it listens on; for `--http-port 0` it is known after `start`."""
        self.failures = 0
        """How many requests failed with an unexpected exception; each is logged."""

    def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the address cannot be bound, or the endpoint did not start.
        """
        host, second = self._config.http_host, self._config.prometheus_port
        listeners = [listen(host, self._config.http_port, self._connections)]
        self.port = listeners[0].getsockname()[1]
        if second:
            try:
                listeners.append(listen(host, second, self._connections, "--prometheus-port"))
            except ConfigError:
                listeners[0].close()
                raise
        self._server = uvicorn.Server(self._uvicorn())
        self._thread = threading.Thread(target=self._run, args=(listeners,), name="lmcache-http", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_SECONDS) or not self.serving:
            self.stop()
            raise ConfigError(f"--http-port {self.port}: the HTTP endpoint did not start; the log says why")

    def use_token(self, token: str) -> None:
        """Ask callers on other hosts for this token from now on; "": refuse them. Any thread may call."""
        self._config = dataclasses.replace(self._config, api_token=token)

    @property
    def token(self) -> str:
        """The token that callers on other hosts need now; "" if they are refused."""
        return self._config.api_token

    @property
    def serving(self) -> bool:
        """Whether the endpoint's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Stop listening, wait up to a second for running answers, and end the thread."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_START_SECONDS)

    def _uvicorn(self) -> uvicorn.Config:
        return uvicorn.Config(
            self._app(),
            callback_notify=self._serves,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # malformed requests are not logged; failures of routes are logged in `_edge`
            access_log=False,
            proxy_headers=False,  # a header must not change the peer's address
            server_header=False,
            date_header=False,
            headers=_HEADERS,
            backlog=128,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            timeout_graceful_shutdown=1,
        )

    async def _serves(self) -> None:
        """Note that uvicorn serves. Uvicorn calls this when it has started, and periodically afterwards."""
        self._started.set()

    def _run(self, listeners: list[socket.socket]) -> None:
        assert self._server is not None
        try:
            self._server.run(sockets=listeners)
        except BaseException:  # top of the thread; health checks fail from now on
            logger.exception("The HTTP endpoint has failed; restart the server to get it back")
        finally:
            for listener in listeners:
                listener.close()
            self._started.set()

    # --- routes -------------------------------------------------------------------------------------------------------

    def _app(self) -> Starlette:
        routes = [
            Route("/", self._edge(self._root)),
            Route("/healthcheck", self._edge(self._healthcheck)),
            Route("/livez", self._edge(self._livez)),
            Route("/readyz", self._edge(self._readyz)),
            Route("/version", self._edge(self._version)),
            Route("/status", self._edge(self._guarded(self._status))),
            Route("/fetches", self._edge(self._guarded(self._fetches))),
            Route("/history", self._edge(self._guarded(self._history))),
            Route("/requests", self._edge(self._guarded(self._requests))),
            Route("/metrics", self._edge(self._metrics)),
            Route("/config", self._edge(self._guarded(self._settings))),
            *(
                Route(path, self._edge(self._guarded(self._clear, changes=True)), methods=["POST"])
                for path in ("/clear-cache", "/cache/clear")
            ),
        ]
        routes += [
            Route("/tiers", self._edge(self._guarded(self._tiers))),
            *(
                Route(path, self._edge(self._guarded(route, changes=True, token=True)), methods=[method])
                for path, method, route in (
                    ("/tiers", "POST", self._add_tier),
                    ("/tiers/{name}", "DELETE", self._remove_tier),
                    ("/tiers/{name}/{action}", "POST", self._pause_tier),
                )
            ),
        ]

        def wrap(
            route: Callable[[Request], Awaitable[Response]], changes: bool
        ) -> Callable[[Request], Awaitable[Response]]:
            return self._edge(self._guarded(route, changes))

        controller = ControllerRoutes(lambda: self._control.controller, wrap).routes()
        if self._whole:
            routes += [*OperatingRoutes(lambda: self._control.operating, wrap).routes(), *controller]
        else:
            routes = [
                *(Route(path, self._edge(self._livez)) for path in ("/healthcheck", "/healthz", "/livez")),
                *controller,
            ]
        known = _ROUTES if self._whole else f"GET /healthcheck, /livez; {_OF_CONTROLLER}"
        return Starlette(routes=routes, exception_handlers={HTTPException: functools.partial(_http_error, known)})

    def _edge(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Wrap a route: a TimeoutError becomes status 503; any other exception becomes 500 and is logged."""

        @functools.wraps(route)  # the route's own docstring and `caller` are its documentation
        async def answer(request: Request) -> Response:
            client = request.client
            if client and (connection := self._connections.get((client.host, client.port))):
                connection.request_has_arrived()
            try:
                response = await route(request)
            except TimeoutError:
                response = _json({"status": "unhealthy", "reason": "the server's main loop does not answer"}, 503)
            except Exception as error:  # top of the request
                self.failures += 1
                logger.exception("HTTP %s %s failed", request.method, request.url.path)
                response = _json({"status": "error", "reason": f"internal error: {type(error).__name__}"}, 500)
            peer = client.host if client else "?"
            logger.debug("HTTP %s %s from %s: %d", request.method, request.url.path, peer, response.status_code)
            return response

        return answer

    def _refusal(self, request: Request, changes: bool = False, token: bool = False) -> str:
        peer = request.client.host if request.client else ""
        if token and "authorization" not in request.headers:
            return (
                _TOKEN_NEEDED if self._config.api_token else f"{_TOKEN_NEEDED}; start the server with --api-token-file"
            )
        return why_refused(peer, request.headers, self._config.api_token, changes)

    def _guarded(
        self, route: Callable[[Request], Awaitable[Response]], changes: bool = False, token: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """Restrict a route to callers on this host and callers with the token; with `token`, to callers with the token."""

        @functools.wraps(route)
        async def answer(request: Request) -> Response:
            refusal = self._refusal(request, changes, token)
            return _json({"status": "forbidden", "reason": refusal}, 403) if refusal else await route(request)

        vars(answer)["caller"] = CHANGES if changes else READS
        return answer

    async def _healthcheck(self, request: Request) -> Response:
        """Answer whether the server is healthy. Reasons contain paths and addresses, so only callers allowed to read the status
        get them."""
        open_to_caller = not self._refusal(request)
        serving, reason = await _ask(self._control.health)
        if not serving:
            return _json({"status": "unhealthy", **({"reason": reason} if open_to_caller else {})}, 503)
        details: dict[str, list[str]] = {}
        if open_to_caller:
            details = {
                "degraded": await _ask(self._control.degraded),
                "refused_engines": await _ask(self._control.refused),
            }
        return _json({"status": "healthy", **{name: listed for name, listed in details.items() if listed}})

    async def _livez(self, request: Request) -> Response:
        """Answer that the server's main loop runs. If this route fails, the server has to be restarted."""
        await _ask(self._control.health)
        return _json({"status": "alive"})

    async def _readyz(self, request: Request) -> Response:
        """Answer whether engines may use the server: it is healthy and, with --l2-required, all its tiers serve."""
        serving, _ = await _ask(self._control.health)
        if serving and self._config.l2_required:
            serving = not await _ask(self._control.degraded)
        return _json({"status": "ready"}) if serving else _json({"status": "not ready"}, 503)

    async def _version(self, request: Request) -> Response:
        """Answer the version of the server."""
        return _json({"version": __version__})

    async def _status(self, request: Request) -> Response:
        """Answer configuration (secrets as `***`), memory, index, engines, refused engines, tiers and counters."""
        return _json(await _ask(self._control.status))

    async def _fetches(self, request: Request) -> Response:
        """Answer what tiers and other engines did for the last requests that needed them, the latest first."""
        return _json({"fetches": await _ask(self._control.fetches)})

    async def _requests(self, request: Request) -> Response:
        """Answer where the tokens of the last requests came from, and why others were missing. `?request=` (the beginning of an
        id), `misses=1`, `since=` (seconds since the epoch), `limit=`, and `before=` with the `next` of the page before."""
        try:
            asked = _records_asked(request.query_params)
            return _json(await _ask(lambda: self._control.requests(**asked)))
        except ConfigError as error:
            return _json({"status": "error", "reason": str(error)}, 400)

    async def _metrics(self, request: Request) -> Response:
        """Answer all metrics in the text format of Prometheus, or as OpenMetrics if the header `Accept` asks for it."""
        counters = await _ask(self._control.counters)
        body, content_type = render(counters, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def _clear(self, request: Request) -> Response:
        """Empty L1, safely even while engines read, and end all pins. `?tiers=all` also empties the tiers, `?tiers=disk` those of
        these names."""
        if _declared_length(request) > _MOST_BODY_BYTES:
            return _json({"status": "error", "reason": f"the body is larger than {_MOST_BODY_BYTES} bytes"}, 413)
        for name in request.query_params:
            if name != "tiers":
                return _json(
                    {"status": "error", "reason": f"{name}=: write tiers=all, or tiers= and names with commas"}, 400
                )
        tiers = request.query_params.get("tiers", "")
        try:
            details = await _ask(lambda: self._control.clear(tiers), _CLEAR_SECONDS)
        except ConfigError as error:
            return _json({"status": "error", "reason": str(error)}, 404)
        if details.get("failed_tiers"):
            return _json({"status": "incomplete", **details}, 503)
        told = details if tiers else {name: count for name, count in details.items() if name == "ended_pins"}
        return _json({"status": "ok", **told})  # exactly the documented answer, unless there is more to say

    async def _tiers(self, request: Request) -> Response:
        """List the tiers, nearest first, with their states."""
        return _json(await _ask(self._control.tiers))

    async def _add_tier(self, request: Request) -> Response:
        """Add the tier of `{"url": "disk:///path?max_gb=200", "before": "NAME"}`; without `before` it is the farthest."""
        try:
            given = await _object(request, {"url": str, "before": str})
            if not given.get("url"):
                raise ConfigError('send {"url": "disk:///var/lib/lmcache?max_gb=200"}')
            url, before = given["url"], given.get("before", "")
            answer = await _ask(lambda: self._control.add_tier(url, before), _TIER_SECONDS)
        except ConfigError as error:
            return _json({"status": "error", "reason": str(error)}, 400)
        return _json({"status": "ok", **answer})

    async def _remove_tier(self, request: Request) -> Response:
        """Remove a tier once its queued writes have ended, for at most `?drain_seconds=` seconds. What it stores stays there."""
        name, text = request.path_params["name"], request.query_params.get("drain_seconds")
        try:
            seconds = None if text is None else float(text)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0 <= seconds <= _LONGEST_DRAIN_SECONDS:
            reason = f"drain_seconds={text[:40] if text else ''}: must be from 0 to {_LONGEST_DRAIN_SECONDS:g}"
            return _json({"status": "error", "reason": reason}, 400)
        try:
            answer = await _ask(lambda: self._control.remove_tier(name, seconds), _TIER_SECONDS)
        except ConfigError as error:
            return _json({"status": "error", "reason": str(error)}, 404)
        return _json({"status": "ok", **answer}, 202 if answer.get("state") == "leaving" else 200)

    async def _pause_tier(self, request: Request) -> Response:
        """Ask a tier nothing and write nothing to it (`pause`), until `resume`."""
        name, action = request.path_params["name"], request.path_params["action"]
        if action not in ("pause", "resume"):
            return _json({"status": "error", "reason": "there is POST /tiers/NAME/pause and /tiers/NAME/resume"}, 404)
        try:
            answer = await _ask(lambda: self._control.pause_tier(name, action == "pause"))
        except ConfigError as error:
            return _json({"status": "error", "reason": str(error)}, 404)
        return _json({"status": "ok", **answer})

    async def _settings(self, request: Request) -> Response:
        """Answer every setting of the server by its name; secrets as `***`."""
        return _json(self._config.redacted())

    async def _root(self, request: Request) -> Response:
        """Answer programs with a line, and people with the page. Neither reveals anything; the page asks for the status."""
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            return _json({"status": "ok", "service": "LMCache HTTP API"})
        return HTMLResponse(page.HTML, headers={"Content-Security-Policy": page.POLICY})

    async def _history(self, request: Request) -> Response:
        """Answer a few counters of the last hour, one sample every ten seconds; `?format=csv` as CSV."""
        columns, samples = await _ask(self._control.history)
        if request.query_params.get("format") != "csv":
            return _json({"columns": columns, "samples": samples})
        lines = [",".join(columns), *(",".join(map(str, sample)) for sample in samples)]
        return Response("\n".join(lines) + "\n", media_type="text/csv")


def _records_asked(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `Control.requests` that a query gives.

    Raises:
        ConfigError: an unknown name, or a value that is not a number.
    """
    asked: dict[str, Any] = {}
    for name, value in given.items():
        kind = {"request": str, "misses": int, "since": float, "before": int, "limit": int}.get(name)
        try:
            if kind is None:
                raise ConfigError(f"{name}=: there is request=, misses=1, since=, before= and limit=")
            asked[name] = kind(value) if value.isascii() or kind is str else int("")
        except ValueError:
            raise ConfigError(f"{name}={value[:40]}: must be a number") from None
    if "misses" in asked:
        asked["misses"] = bool(asked["misses"])
    if not 0 < asked.get("limit", 1) <= MOST_RETURNED or asked.get("before", 0) < 0:
        raise ConfigError(f"limit= must be from 1 to {MOST_RETURNED}, and before= not negative")
    return asked


def why_refused(peer: str, headers: Mapping[str, str], token: str, changes: bool) -> str:
    """Return why this caller may not read the server's state or, if `changes`, change it; "" if it may.

    peer: the caller's address. headers: with lower-case names. token: the server's token, or "".
    """
    authorization = headers.get("authorization")
    if authorization is not None:
        return _token_refusal(authorization, token)
    if not is_loopback(peer):
        return (
            "from other hosts this needs the header `Authorization: Bearer TOKEN`"
            if token
            else "no API token is set, so only callers on the server's host may do this: start the server with --api-token-file"
        )
    if any(name in headers for name in _PROXY_HEADERS):
        return "this came through a proxy, so it needs the header `Authorization: Bearer TOKEN`"
    if changes and any(name in headers for name in _WEB_PAGE_HEADERS):
        return "this came from a web page, so it needs the header `Authorization: Bearer TOKEN`"
    if not _LOCAL_NAME.fullmatch(headers.get("host", "")):  # DNS rebinding: a web page's name may resolve to this host
        return "without a token, ask localhost or 127.0.0.1, not another name of this host"
    return ""


def _token_refusal(authorization: str, token: str) -> str:
    scheme, _, given = authorization.partition(" ")
    if not token:
        return "a token was sent, but the server has none: start it with --api-token-file, or send none from this host"
    if scheme.lower() != "bearer":
        return "send the token as `Authorization: Bearer TOKEN`"
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    return "" if same else "the token is not the server's"


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isdigit() and len(text) < 19 else _MOST_BODY_BYTES + 1


async def _object(request: Request, fields: Mapping[str, type]) -> dict[str, Any]:
    """Return the JSON object of a body that may have these fields.

    Raises:
        ConfigError: the body is too large, or is something else.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BODY_BYTES:
            raise ConfigError(f"the body is larger than {_MOST_BODY_BYTES} bytes")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    known = ", ".join(f'"{name}"' for name in fields)
    if not isinstance(given, dict) or not given.keys() <= fields.keys():
        raise ConfigError(f"send a JSON object with {known}")
    for name, value in given.items():
        if not isinstance(value, fields[name]):
            raise ConfigError(f'"{name}" must be of the type {fields[name].__name__}')
        if isinstance(value, str) and not value.strip().isprintable():
            raise ConfigError(f'"{name}" must not contain control characters or halves of surrogate pairs')
    return given


async def _ask(call: Callable[[], _T], seconds: float = 0.0) -> _T:
    """Make a blocking call to `Control` in a thread, and drop a late answer.

    Raises:
        TimeoutError: the call has not returned in time.
    """
    with anyio.fail_after(seconds or _CONTROL_SECONDS):
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


def _json(content: dict[str, Any], status_code: int = 200) -> Response:
    dump = functools.partial(json.dumps, default=str, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)
    try:
        body = dump(content)
    except ValueError:  # a counter that is no number, which JSON cannot express
        body = dump(_without_nan(content))
    return Response(body + "\n", status_code, media_type="application/json")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


async def _http_error(known: str, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: "no such path", 405: f"not with {request.method}"}.get(error.status_code, error.detail)
    response = _json({"status": "error", "reason": f"{reason}: there is {known}"}, error.status_code)
    response.headers.update(error.headers or {})
    return response
