"""The HTTP routes of operators: pins, prefetches, lookups, lists and deletions. A thin skin over `operating`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmcache.cache import Refusal
from lmcache.chunks import TENANT_BYTES
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.server.http_answers import answer
from lmcache.server.http_guards import Endpoint
from lmcache.server.named import MOST_BODY_BYTES, Prompt, Unknown
from lmcache.server.operating import LISTED, Looked, Operating, ToDelete, ToPin, ToPrefetch

T = TypeVar("T", bound=msgspec.Struct)
SECONDS = 15.0
"""Timeout of these routes, which covers the answers of a tokenizer and of tiers."""
_MOST_AT_ONCE = 4
"""So many of these calls run at a time, so that they leave threads for health checks; others wait."""


class OperatingRoutes:
    """operating: returns the verbs. wrap: guards a route and answers its unexpected errors; its second argument says whether the
    route is closed to web pages."""

    def __init__(self, operating: Callable[[], Operating], wrap: Callable[[Endpoint, bool], Endpoint]) -> None:
        self._operating, self._wrap = operating, wrap
        self._limiter: anyio.CapacityLimiter | None = None

    def routes(self) -> list[Route]:
        routes: tuple[tuple[str, str, Endpoint], ...] = (
            ("POST", "/cache/lookup", self.lookup),
            ("GET", "/cache/models", self.models),
            ("GET", "/cache/usage", self.usage),
            ("GET", "/cache/objects", self.objects),
            ("DELETE", "/cache/objects", self.delete),
            ("POST", "/cache/delete", self.delete),
            ("GET", "/cache/pins", self.pins),
            ("POST", "/cache/pins", self.pin),
            ("DELETE", "/cache/pins", self.unpin_prompt),
            ("DELETE", "/cache/pins/{name}", self.unpin),
            ("GET", "/cache/prefetches", self.prefetches),
            ("POST", "/cache/prefetches", self.prefetch),
            ("GET", "/cache/prefetches/{name}", self.prefetched),
            ("DELETE", "/cache/prefetches/{name}", self.cancel),
        )
        return [Route(path, self._wrap(route, method != "GET"), methods=[method]) for method, path, route in routes]

    # The docstrings of routes are their documentation

    async def lookup(self, request: Request) -> Response:
        """Answer for each model how many tokens of a prompt are in L1, and how many more each tier has, peers among them:
        `{"tokens": [...]}` or `{"text": "..."}` or `{"hashes": [...]}`, with `"model"`, `"cache_salt"`, `"lora_name"` and
        `"lora_id"` where they matter. Nothing is touched or counted."""
        return await self._prompt(request, Looked, lambda one: self._operating().lookup(one))

    async def models(self, request: Request) -> Response:
        """Answer the models that the other routes can name."""
        return await self._call(lambda: self._operating().models())

    async def usage(self, request: Request) -> Response:
        """Answer what each tenant of each model has in L1, and what its lookups asked for and found since the server's start: of
        the 20 that use most, and of all others together. A tenant is an id of the `cache_salt`, never the salt itself;
        `?tenant=` answers this one alone."""

        def tenants() -> dict[str, object]:
            return self._operating().usage(_tenant_asked(request.query_params))

        return await self._call(tenants)

    async def objects(self, request: Request) -> Response:
        """Answer chunks of L1, a page at a time: `?model=`, `limit=`, and `space=` and `after=` with the `next` of the page
        before."""

        def page() -> dict[str, object]:
            return self._operating().objects(**_page_asked(request.query_params))

        return await self._call(page)

    async def pins(self, request: Request) -> Response:
        """Answer all pins, and how many bytes they hold and may hold."""
        return await self._call(lambda: self._operating().pins())

    async def pin(self, request: Request) -> Response:
        """Keep what L1 has of a prompt for `"seconds"` (an hour by default, a week at most), with a `"note"` for people."""
        return await self._prompt(request, ToPin, lambda one: self._operating().pin(one))

    async def unpin(self, request: Request) -> Response:
        """End a pin. Its chunks stay in L1 until memory is needed."""
        name = request.path_params["name"]
        return await self._call(lambda: self._operating().unpin(name))

    async def unpin_prompt(self, request: Request) -> Response:
        """End the pins of a prompt, named as it was pinned. Pins of its beginnings, such as a system prompt, stay."""
        return await self._prompt(request, Prompt, lambda one: self._operating().unpin_prompt(one))

    async def delete(self, request: Request) -> Response:
        """Remove a prompt from L1 and, with `"tiers"` (`all`, or names), from tiers. What other prompts share with it, what is
        pinned and what engines use stays, and is counted in the answer."""
        return await self._prompt(request, ToDelete, lambda one: self._operating().delete(one))

    async def prefetch(self, request: Request) -> Response:
        """Begin to load a prompt from tiers into L1, and pin it there for `"pin_seconds"`. The answer names the prefetch."""
        return await self._prompt(request, ToPrefetch, lambda one: self._operating().prefetch(one), 202)

    async def prefetches(self, request: Request) -> Response:
        """Answer the prefetches that run, and the last that have ended."""
        return await self._call(lambda: self._operating().prefetches())

    async def prefetched(self, request: Request) -> Response:
        """Answer how far a prefetch is: loading, done, partial, absent, cancelled or failed."""
        name = request.path_params["name"]
        return await self._call(lambda: self._operating().prefetched(name))

    async def cancel(self, request: Request) -> Response:
        """End a prefetch that runs. What it has loaded stays."""
        name = request.path_params["name"]
        return await self._call(lambda: self._operating().cancel(name))

    # What they share

    async def _prompt(
        self, request: Request, kind: type[T], verb: Callable[[T], dict[str, object]], status: int = 200
    ) -> Response:
        body = await body_of(request)
        if body is None:
            return answer({"status": "error", "reason": f"the body is larger than {MOST_BODY_BYTES} bytes"}, 413)
        return await self._call(lambda: verb(decoded(body, kind)), status)

    async def _call(self, call: Callable[[], dict[str, object]], status: int = 200) -> Response:
        """Run a verb in a thread. Raises TimeoutError if it does not return in time."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_MOST_AT_ONCE)
        with anyio.fail_after(SECONDS):
            told, code = await anyio.to_thread.run_sync(
                lambda: answered(call), abandon_on_cancel=True, limiter=self._limiter
            )
        return answer(told, code or status)


def answered(call: Callable[[], dict[str, object]]) -> tuple[dict[str, object], int]:
    """Return the answer of a verb, and the HTTP status of its error; 0 if there was none."""
    try:
        return {"status": "ok", **call()}, 0
    except Unknown as error:
        return {"status": "error", "reason": str(error)}, 404
    except ConfigError as error:
        return {"status": "error", "reason": str(error)}, 400
    except Refusal as error:
        return {"status": "refused", "reason": str(error)}, 409
    except (ServerUnavailable, ServerRefused) as error:
        return {"status": "error", "reason": str(error)}, 502


def decoded(body: bytes, kind: type[T]) -> T:
    """Return the JSON object of a body.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fields = ", ".join(f'"{one.name}"' for one in msgspec.structs.fields(kind))
        raise ConfigError(f"{str(error)[:300]}: send a JSON object with some of {fields}") from None


async def body_of(request: Request) -> bytes | None:
    """Return the body of a request; None if it is too large."""
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _tenant_asked(given: Mapping[str, str]) -> bytes | None:
    """Return the tenant that a query names; None for all.

    Raises:
        ConfigError: an unknown name, or a value that is no tenant.
    """
    text = given.get("tenant")
    if given.keys() - {"tenant"}:
        raise ConfigError("there is tenant=, with an id of the list")
    if text is None or re.fullmatch(f"([0-9a-f]{{{2 * TENANT_BYTES}}})?", text):
        return None if text is None else bytes.fromhex(text)
    raise ConfigError(f"tenant={text[:40]}: must be an id of the list, of {2 * TENANT_BYTES} hexadecimal digits")


def _page_asked(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `Operating.objects` that a query gives.

    Raises:
        ConfigError: an unknown name, or a value that is not a number.
    """
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if name == "model":
            asked[name] = value
        elif name not in ("space", "after", "limit"):
            raise ConfigError(f"{name[:40]}=: there is model=, limit=, space= and after=")
        elif not (value.isascii() and value.isdecimal() and len(value) < 11 and int(value) < 1 << 32):
            raise ConfigError(f"{name}={value[:40]}: must be a number")
        else:
            asked[name] = int(value)
    if not 0 < asked.get("limit", 1) <= LISTED:
        raise ConfigError(f"limit= must be from 1 to {LISTED}")
    return asked
