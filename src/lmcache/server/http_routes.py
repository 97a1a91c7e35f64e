"""The HTTP routes of the server itself: health, status, records, metrics, clears, and tiers. A thin skin over `Control`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lmcache import __version__
from lmcache.cache.records import MOST_RETURNED
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.server import page
from lmcache.server.control import Control
from lmcache.server.http_answers import answer
from lmcache.server.http_guards import Guards
from lmcache.server.metrics import render

_T = TypeVar("_T")

_CONTROL_SECONDS = 2.0
"""Timeout of calls to `Control`, which should return within one second."""
_TIER_SECONDS = 25.0
"""Timeout of attaching and removing a tier."""
_LONGEST_DRAIN_SECONDS = 3600.0
_CLEAR_SECONDS = 30.0
"""Timeout of clearing L1, which visits every chunk."""
_MOST_BODY_BYTES = 64 << 10
_SHARED_SECONDS = 1.0
"""Everybody who looks at the page within this time gets the same answer, which is made once."""
_SHOWN_REQUESTS = 20


class ServerRoutes:
    """config: returns the settings in force. guards: decide who may use which route."""

    def __init__(self, config: Callable[[], ServerConfig], control: Control, guards: Guards) -> None:
        self._config, self._control, self._guards = config, control, guards
        self._making: anyio.Lock | None = None
        self._overviews: dict[bool, tuple[float, Response]] = {}
        """Whether the answer has the last hour -> the time when it was made, and the answer."""

    def routes(self) -> list[Route]:
        edge, guarded = self._guards.edge, self._guards.guarded
        return [
            *(
                Route(path, edge(route))
                for path, route in (
                    ("/", self.root),
                    ("/healthcheck", self.healthcheck),
                    ("/livez", self.livez),
                    ("/readyz", self.readyz),
                    ("/version", self.version),
                    ("/metrics", self.metrics),
                )
            ),
            *(
                Route(path, edge(guarded(route)))
                for path, route in (
                    ("/overview", self.overview),
                    ("/status", self.status),
                    ("/fetches", self.fetches),
                    ("/history", self.history),
                    ("/requests", self.requests),
                    ("/config", self.settings),
                    ("/tiers", self.tiers),
                )
            ),
            *(
                Route(path, edge(guarded(self.clear, changes=True)), methods=["POST"])
                for path in ("/clear-cache", "/cache/clear")
            ),
            *(
                Route(path, edge(guarded(route, changes=True, token=True)), methods=[method])
                for path, method, route in (
                    ("/tiers", "POST", self.add_tier),
                    ("/tiers/{name}", "DELETE", self.remove_tier),
                    ("/tiers/{name}/{action}", "POST", self.pause_tier),
                )
            ),
        ]

    def routes_of_controller(self) -> list[Route]:
        """Return the routes that a process has which is only a controller of other servers."""
        return [Route(path, self._guards.edge(self.livez)) for path in ("/healthcheck", "/healthz", "/livez")]

    # The docstrings of routes are their documentation

    async def overview(self, request: Request) -> Response:
        """Answer what the page shows: `health`, `status`, `requests` and, with `?history=1`, `history`. The answer is made once a
        second at most, however many ask."""
        whole = request.query_params.get("history") == "1"
        self._making = self._making or anyio.Lock()
        with anyio.fail_after(2 * _CONTROL_SECONDS):  # with the wait for who makes it
            async with self._making:
                made, response = self._overviews.get(whole, (0.0, None))
                if response is None or anyio.current_time() - made >= _SHARED_SECONDS:
                    response = answer(await _ask(lambda: self._overview(whole), 2 * _CONTROL_SECONDS))
                    self._overviews[whole] = anyio.current_time(), response
        return response

    def _overview(self, whole: bool) -> dict[str, Any]:
        control = self._control
        serving, reason = control.health()
        health: dict[str, Any] = {"status": "healthy" if serving else "unhealthy", "reason": reason}
        health |= {"degraded": control.degraded(), "refused_engines": control.refused()}
        try:
            requests = control.requests(limit=_SHOWN_REQUESTS)
        except ConfigError as error:
            requests = {"reason": str(error)}
        told = {"health": health, "status": control.status(), "requests": requests}
        if whole:
            told["history"] = dict(zip(("columns", "samples"), control.history(), strict=True))
        return told

    async def healthcheck(self, request: Request) -> Response:
        """Answer whether the server is healthy. Reasons contain paths and addresses, so only callers allowed to read the status
        get them."""
        open_to_caller = not self._guards.refusal(request)
        serving, reason = await _ask(self._control.health)
        if not serving:
            return answer({"status": "unhealthy", **({"reason": reason} if open_to_caller else {})}, 503)
        details: dict[str, list[str]] = {}
        if open_to_caller:
            details = {
                "degraded": await _ask(self._control.degraded),
                "refused_engines": await _ask(self._control.refused),
            }
        return answer({"status": "healthy", **{name: listed for name, listed in details.items() if listed}})

    async def livez(self, request: Request) -> Response:
        """Answer that the server's main loop runs. If this route fails, the server has to be restarted."""
        await _ask(self._control.health)
        return answer({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """Answer whether engines may use the server: it is healthy and, with --l2-required, all its tiers serve."""
        serving, _ = await _ask(self._control.health)
        if serving and self._config().l2_required:
            serving = not await _ask(self._control.degraded)
        return answer({"status": "ready"}) if serving else answer({"status": "not ready"}, 503)

    async def version(self, request: Request) -> Response:
        """Answer the version of the server."""
        return answer({"version": __version__})

    async def status(self, request: Request) -> Response:
        """Answer configuration (secrets as `***`), memory, index, engines, refused engines, tiers and counters."""
        return answer(await _ask(self._control.status))

    async def fetches(self, request: Request) -> Response:
        """Answer what tiers and other engines did for the last requests that needed them, the latest first."""
        return answer({"fetches": await _ask(self._control.fetches)})

    async def requests(self, request: Request) -> Response:
        """Answer where the tokens of the last requests came from, and why others were missing. `?request=` (the beginning of an
        id), `misses=1`, `since=` (seconds since the epoch), `limit=`, and `before=` with the `next` of the page before."""
        try:
            asked = _records_asked(request.query_params)
            return answer(await _ask(lambda: self._control.requests(**asked)))
        except ConfigError as error:
            return answer({"status": "error", "reason": str(error)}, 400)

    async def metrics(self, request: Request) -> Response:
        """Answer all metrics in the text format of Prometheus, or as OpenMetrics if the header `Accept` asks for it."""
        counters = await _ask(self._control.counters)
        body, content_type = render(counters, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def clear(self, request: Request) -> Response:
        """Empty L1, safely even while engines read, and end all pins. `?tiers=all` also empties the tiers, `?tiers=disk` those of
        these names."""
        if _declared_length(request) > _MOST_BODY_BYTES:
            return answer({"status": "error", "reason": f"the body is larger than {_MOST_BODY_BYTES} bytes"}, 413)
        for name in request.query_params:
            if name != "tiers":
                return answer(
                    {"status": "error", "reason": f"{name}=: write tiers=all, or tiers= and names with commas"}, 400
                )
        tiers = request.query_params.get("tiers", "")
        try:
            details = await _ask(lambda: self._control.clear(tiers), _CLEAR_SECONDS)
        except ConfigError as error:
            return answer({"status": "error", "reason": str(error)}, 404)
        if details.get("failed_tiers"):
            return answer({"status": "incomplete", **details}, 503)
        told = details if tiers else {name: count for name, count in details.items() if name == "ended_pins"}
        return answer({"status": "ok", **told})  # exactly the documented answer, unless there is more to say

    async def tiers(self, request: Request) -> Response:
        """List the tiers, nearest first, with their states."""
        return answer(await _ask(self._control.tiers))

    async def add_tier(self, request: Request) -> Response:
        """Add the tier of `{"url": "disk:///path?max_gb=200", "before": "NAME"}`; without `before` it is the farthest."""
        try:
            given = await _object(request, {"url": str, "before": str})
            if not given.get("url"):
                raise ConfigError('send {"url": "disk:///var/lib/lmcache?max_gb=200"}')
            url, before = given["url"], given.get("before", "")
            told = await _ask(lambda: self._control.add_tier(url, before), _TIER_SECONDS)
        except ConfigError as error:
            return answer({"status": "error", "reason": str(error)}, 400)
        return answer({"status": "ok", **told})

    async def remove_tier(self, request: Request) -> Response:
        """Remove a tier once its queued writes have ended, for at most `?drain_seconds=` seconds. What it stores stays there."""
        name, text = request.path_params["name"], request.query_params.get("drain_seconds")
        try:
            seconds = None if text is None else float(text)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0 <= seconds <= _LONGEST_DRAIN_SECONDS:
            reason = f"drain_seconds={text[:40] if text else ''}: must be from 0 to {_LONGEST_DRAIN_SECONDS:g}"
            return answer({"status": "error", "reason": reason}, 400)
        try:
            told = await _ask(lambda: self._control.remove_tier(name, seconds), _TIER_SECONDS)
        except ConfigError as error:
            return answer({"status": "error", "reason": str(error)}, 404)
        return answer({"status": "ok", **told}, 202 if told.get("state") == "leaving" else 200)

    async def pause_tier(self, request: Request) -> Response:
        """Ask a tier nothing and write nothing to it (`pause`), until `resume`."""
        name, action = request.path_params["name"], request.path_params["action"]
        if action not in ("pause", "resume"):
            return answer({"status": "error", "reason": "there is POST /tiers/NAME/pause and /tiers/NAME/resume"}, 404)
        try:
            told = await _ask(lambda: self._control.pause_tier(name, action == "pause"))
        except ConfigError as error:
            return answer({"status": "error", "reason": str(error)}, 404)
        return answer({"status": "ok", **told})

    async def settings(self, request: Request) -> Response:
        """Answer every setting of the server by its name; secrets as `***`."""
        return answer(self._config().redacted())

    async def root(self, request: Request) -> Response:
        """Answer programs with a line, and people with the page. Neither reveals anything; the page asks for the status."""
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            return answer({"status": "ok", "service": "LMCache HTTP API"})
        return HTMLResponse(page.HTML, headers={"Content-Security-Policy": page.POLICY})

    async def history(self, request: Request) -> Response:
        """Answer a few counters of the last hour, one sample every ten seconds; `?format=csv` as CSV."""
        columns, samples = await _ask(self._control.history)
        if request.query_params.get("format") != "csv":
            return answer({"columns": columns, "samples": samples})
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
