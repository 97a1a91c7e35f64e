"""The HTTP routes of the public project's controller, over `controller`. Paths, fields and answers are the public project's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmcache.server.controller import NO_COMPRESSION, Asked, Controller
from lmcache.server.http_answers import answer
from lmcache.server.http_guards import Endpoint
from lmcache.server.http_operating import answered, body_of, decoded

SECONDS = 20.0
_MOST_AT_ONCE = 4
Verb = Callable[[Controller, Asked], dict[str, object]]


class ControllerRoutes:
    """controller: returns it. wrap: as for `OperatingRoutes`."""

    def __init__(self, controller: Callable[[], Controller], wrap: Callable[[Endpoint, bool], Endpoint]) -> None:
        self._controller, self._wrap = controller, wrap
        self._limiter: anyio.CapacityLimiter | None = None

    def routes(self) -> list[Route]:
        verbs = (
            *(self.lookup, self.health, self.query_instance, self.check_finish),
            *(self.pin, self.clear, self.move, self.compress, self.decompress),
        )
        return [
            *(Route(f"/{one.__name__}", self._wrap(one, True), methods=["POST"]) for one in verbs),
            Route("/directory/lookup", self._wrap(self.lookup, True), methods=["POST"]),
            Route("/instances", self._wrap(self.instances, False)),
        ]

    async def lookup(self, request: Request) -> Response:
        """Answer where the beginning of `{"tokens": [...]}` is in L1, of this server and of those of --control-peers:
        `layout_info`, instance to [location, tokens], the most tokens first."""
        return await self._asked(request, Controller.lookup)

    async def health(self, request: Request) -> Response:
        """Answer `error_codes`: 0 if the server `{"instance_id": "..."}` is healthy, else 1."""
        return await self._asked(request, Controller.health)

    async def query_instance(self, request: Request) -> Response:
        """Answer the `instance_id` of the server at `{"ip": "..."}`."""
        return await self._asked(request, Controller.query_instance)

    async def check_finish(self, request: Request) -> Response:
        """Answer the `status` of `{"event_id": "..."}`: moving, finished, or why it failed."""
        return await self._asked(request, Controller.check_finish)

    async def pin(self, request: Request) -> Response:
        """Pin `{"tokens": [...], "instance_id": "...", "location": "LocalCPUBackend"}` for an hour."""
        return await self._asked(request, Controller.pin)

    async def clear(self, request: Request) -> Response:
        """Empty L1 of `{"instance_id": "..."}`, or remove `"tokens"` from it; `"location": "all"` also from tiers."""
        return await self._asked(request, Controller.clear)

    async def move(self, request: Request) -> Response:
        """Let the server of `"new_position": ["INSTANCE", "LocalCPUBackend"]` load `"tokens"` from its peers, and remove them
        from `"old_position"` then, unless `"copy": true`."""
        return await self._asked(request, Controller.move)

    async def compress(self, request: Request) -> Response:
        """Answer 501 and why: a tier's codec decides how KV is stored."""
        return answer({"status": "error", "reason": NO_COMPRESSION}, 501)

    async def decompress(self, request: Request) -> Response:
        """Answer 501 and why, as for compress."""
        return answer({"status": "error", "reason": NO_COMPRESSION}, 501)

    async def instances(self, request: Request) -> Response:
        """Answer the servers that the controller reaches now."""
        return await self._run(lambda: self._controller().instances())

    async def _asked(self, request: Request, verb: Verb) -> Response:
        body = await body_of(request)
        if body is None:
            return answer({"status": "error", "reason": "the body is too large"}, 413)
        return await self._run(lambda: verb(self._controller(), decoded(body, Asked)))

    async def _run(self, call: Callable[[], dict[str, object]]) -> Response:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_MOST_AT_ONCE)
        with anyio.fail_after(SECONDS):
            told, code = await anyio.to_thread.run_sync(
                partial(answered, call), abandon_on_cancel=True, limiter=self._limiter
            )
        return answer(told, code or 200)
