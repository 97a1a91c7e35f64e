"""The HTTP endpoint serves health, status and metrics to people and tools, in one thread with an asyncio loop of its own."""

from __future__ import annotations

import dataclasses
import functools
import socket
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server.control import Control
from lmcache.server.http_answers import answer
from lmcache.server.http_controller import ControllerRoutes
from lmcache.server.http_guards import Guards
from lmcache.server.http_operating import OperatingRoutes
from lmcache.server.http_routes import ServerRoutes
from lmcache.server.http_sockets import Connection, listen

logger = init_logger(__name__)

_MOST_HEADER_BYTES = 16 << 10
_START_SECONDS = 10.0
_OF_CONTROLLER = (
    "the controller's GET /instances and POST /lookup, /pin, /clear, /move, /health, /query_instance, /check_finish"
)
_ROUTES = (
    "GET /healthcheck, /livez, /readyz, /version, /metrics, /status, /overview, /config, /fetches, /requests, /history; "
    "POST /cache/clear, /cache/lookup, /cache/delete; GET, POST and DELETE /cache/pins and /cache/prefetches; "
    f"GET /cache/objects, /cache/models, /cache/usage; {_OF_CONTROLLER}; "
    "GET and POST /tiers, DELETE /tiers/NAME, POST /tiers/NAME/pause and /resume"
)
"""The answer to a request for an unknown path: it names the paths that exist."""
_HEADERS = [
    ("Connection", "close"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


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
        self._guards = Guards(lambda: self.token, self._connections)
        self._thread: threading.Thread | None = None
        self.port = config.http_port
        """The port that it listens on; for `--http-port 0` it is known after `start`."""

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
    def failures(self) -> int:
        """How many requests failed with an unexpected exception; each is logged."""
        return self._guards.failures

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
            log_level="critical",  # malformed requests are not logged; failures of routes are logged in `Guards.edge`
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

    def _app(self) -> Starlette:
        own = ServerRoutes(lambda: self._config, self._control, self._guards)
        controller = ControllerRoutes(lambda: self._control.controller, self._guards.wrap).routes()
        if self._whole:
            operating = OperatingRoutes(lambda: self._control.operating, self._guards.wrap).routes()
            routes, known = [*own.routes(), *operating, *controller], _ROUTES
        else:
            routes = [*own.routes_of_controller(), *controller]
            known = f"GET /healthcheck, /livez; {_OF_CONTROLLER}"
        return Starlette(routes=routes, exception_handlers={HTTPException: functools.partial(_http_error, known)})


async def _http_error(known: str, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: "no such path", 405: f"not with {request.method}"}.get(error.status_code, error.detail)
    response = answer({"status": "error", "reason": f"{reason}: there is {known}"}, error.status_code)
    response.headers.update(error.headers or {})
    return response
