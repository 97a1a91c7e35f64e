"""The proxy as an ASGI application: the prefill engine gets each prompt for one token, then a decode engine the whole request.

A prefill that fails costs time only, since the decode engine computes what it does not find. A decode engine that fails before
its answer has begun is replaced by another one. Clients that hang up end their requests in the engines, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from lmcache.observability.log import init_logger
from lmcache.proxy.upstream import FAILURES, Answer, Engine, call, in_turn

logger = init_logger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PATHS = "/v1/completions", "/v1/chat/completions"
MOST_BODY_BYTES = 64 << 20
MOST_HELD_BYTES = 256 << 20
"""The bodies of all requests together. Each takes several times its size while it is read and written as JSON."""
MOST_COMMAS = 1 << 20
"""In a body, as it comes before each value but the first: millions of values take seconds, in which nothing else is served."""
SILENCE_SECONDS = 60.0
"""A client may pause for so long while it sends a request."""
_PASSED_ON = "authorization", "x-request-id", "traceparent"
"""The headers of a request that the engines get."""
_ANSWERED = b"content-type", b"x-request-id", b"retry-after"
_LOCAL_NAME = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_TOO_MANY = 429
"""The status by which an engine refuses a request that another one may take."""
_NOT_FOR_PREFILL = "stream_options", "best_of", "prompt_logprobs", "use_beam_search"


class Proxy:
    """prefill, decode: the engines. seconds: how long one may send nothing before it counts as failed. local: whether the proxy
    listens on a loopback address."""

    def __init__(
        self, prefill: Sequence[Engine], decode: Sequence[Engine], seconds: float, local: bool = False
    ) -> None:
        self._prefill_engines, self._decode_engines, self._seconds = prefill, decode, seconds
        self._local = local
        self._held_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope.get("path", ""), scope.get("method", "")
        if scope["type"] != "http":
            return
        if path == "/health" and method == "GET":
            await _answer(send, 200, {"status": "ok"})
        elif _of_another_page(scope, self._local):
            await _answer(send, 403, _error("this came from a web page of another host"))
        elif path == "/v1/models" and method == "GET":
            async with _while_listening(receive):
                await self._decode(method, path, _headers(scope), b"", send)
        elif path not in PATHS:
            await _answer(send, 404, _error(f"there is POST {' and '.join(PATHS)}, GET /v1/models and /health"))
        elif method != "POST":
            await _answer(send, 405, _error(f"{path} is called with POST"))
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        parts, size, more = [], 0, True
        try:
            while more:
                with anyio.move_on_after(SILENCE_SECONDS) as pause:
                    message = await receive()
                if pause.cancelled_caught:
                    await _answer(send, 408, _error(f"nothing of the request has come for {SILENCE_SECONDS:g} s"))
                    return
                if message["type"] == "http.disconnect":
                    return
                part, more = message.get("body", b""), message.get("more_body", False)
                parts.append(part)
                size, self._held_bytes = size + len(part), self._held_bytes + len(part)
                if size > MOST_BODY_BYTES:
                    await _answer(send, 413, _error(f"the request is larger than {MOST_BODY_BYTES >> 20} MiB"))
                    return
                if self._held_bytes > MOST_HELD_BYTES:
                    await _answer(send, 503, _error("too many large requests are running: try again later"))
                    return
            body = b"".join(parts)
            parts.clear()
            if body.count(b",") > MOST_COMMAS:
                await _answer(send, 413, _error(f"the request has more than {MOST_COMMAS} commas"))
                return
            async with _while_listening(receive):
                await self._complete(scope["path"], _headers(scope), body, send)
        finally:
            self._held_bytes -= size

    async def _complete(self, path: str, headers: dict[str, str], body: bytes, send: Send) -> None:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            await _answer(send, 400, _error("the body is not a JSON object"))
            return
        request.pop("kv_transfer_params", None)  # by which clients could name hosts to engines of other connectors
        params = await self._prefill(path, headers, request)
        if params:
            request["kv_transfer_params"] = params
        await self._decode("POST", path, headers, json.dumps(request).encode(), send)

    async def _prefill(self, path: str, headers: dict[str, str], request: dict[str, Any]) -> dict[str, Any] | None:
        """Let a prefill engine compute the prompt. Return what it tells the decode engine, if anything."""
        once = {name: value for name, value in request.items() if name not in _NOT_FOR_PREFILL}
        once |= {name: 1 for name in ("min_tokens", "max_completion_tokens", "n") if name in request}
        once |= {"max_tokens": 1, "stream": False, "kv_transfer_params": {"do_remote_decode": True}}
        for engine in in_turn(self._prefill_engines, anyio.current_time()):
            try:
                with anyio.fail_after(self._seconds):  # for the complete answer, however slowly it comes
                    async with call(engine, "POST", path, headers, json.dumps(once).encode(), self._seconds) as answer:
                        if answer.status < 500 and answer.status != _TOO_MANY:
                            return _params(await _whole(answer))
                logger.warning("The prefill engine %s answered %d", engine, answer.status)
            except TimeoutError:
                logger.warning("The prefill engine %s has not answered within %g s", engine, self._seconds)
                engine.failed = anyio.current_time()
                break
            except FAILURES as error:
                logger.warning("The prefill engine %s has failed: %s", engine, error or type(error).__name__)
        return None  # the decode engine computes the prompt

    async def _decode(self, method: str, path: str, headers: dict[str, str], body: bytes, send: Send) -> None:
        for engine in in_turn(self._decode_engines, anyio.current_time()):
            begun = False
            try:
                async with call(engine, method, path, headers, body, self._seconds) as answer:
                    if answer.status < 500:
                        begun = True
                        await _pass_on(answer, send)
                        return
                logger.warning("The decode engine %s answered %d", engine, answer.status)
                engine.failed = anyio.current_time()
            except FAILURES as error:
                logger.warning("The decode engine %s has failed: %s", engine, error or type(error).__name__)
            if begun:
                return  # with the answer incomplete, the connection to the client is closed
        await _answer(send, 502, _error("no decode engine has answered: the log of `lmcache proxy` says why"))


def _headers(scope: Message) -> dict[str, str]:
    given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    return {"Content-Type": "application/json"} | {name: given[name] for name in _PASSED_ON if name in given}


def _of_another_page(scope: Message, local: bool) -> bool:
    """Return whether a web page of another host has sent this. Browsers add these headers. A page's name may have come to resolve
    to this host (DNS rebinding); then the page is its own host's for the browser."""
    given = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    site = given.get(b"sec-fetch-site", "")
    if site in ("cross-site", "same-site"):
        return True
    from_page = b"origin" in given or site == "same-origin"
    return local and from_page and not _LOCAL_NAME.fullmatch(given.get(b"host", ""))


@asynccontextmanager
async def _while_listening(receive: Receive) -> AsyncIterator[None]:
    """Run the body of the `with` statement, and cancel it when the client hangs up."""
    async with anyio.create_task_group() as group:
        group.start_soon(_end_with_client, receive, group.cancel_scope)
        yield
        group.cancel_scope.cancel()


async def _end_with_client(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _whole(answer: Answer) -> bytes:
    parts, size = [], 0
    async for part in answer.parts():
        parts.append(part)
        size += len(part)
        if size > MOST_BODY_BYTES:
            return b""
    return b"".join(parts)


def _params(body: bytes) -> dict[str, Any] | None:
    try:
        params = json.loads(body)["kv_transfer_params"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return params if isinstance(params, dict) else None


async def _pass_on(answer: Answer, send: Send) -> None:
    headers = [(name, value) for name, value in answer.headers.items() if name in _ANSWERED]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for part in answer.parts():
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _error(text: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "proxy_error"}}


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode() + b"\n"})
