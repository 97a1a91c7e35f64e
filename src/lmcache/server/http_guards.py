"""Who may use which HTTP route.

Health, version and metrics are open to every caller that can connect. The other routes reveal paths, process ids and requests, or
change state. They need the API token, or a caller on this host: a loopback peer that addresses a loopback name without a proxy.
Without the token, no web page of another origin may use them. A request that changes state must not come from any web page, so it
must lack the headers that browsers add.
"""

from __future__ import annotations

import functools
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response

from lmcache.observability.log import init_logger
from lmcache.server.http_answers import answer
from lmcache.server.http_sockets import Connection, is_loopback

logger = init_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]
READS = "callers on the server's host, and those with the token; never a web page of another origin without it"
CHANGES = "callers on the server's host, and those with the token; never a web page without it"
"""Who may use the guarded routes of each kind. Everybody who reaches the port may use the others."""
_LOCAL_NAME = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_TOKEN_NEEDED = "from this host too, this needs the header `Authorization: Bearer TOKEN`"
_WEB_PAGE_HEADERS = ("origin", "sec-fetch-site")
_OWN_SITE = ("none", "same-origin")
"""What browsers say in `Sec-Fetch-Site` of a person who has typed the address, and of the server's own page."""
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


class Guards:
    """token: returns the token that callers on other hosts need now; "" if they are refused. connections: (host, port) of a
    peer -> its open connection."""

    def __init__(self, token: Callable[[], str], connections: Mapping[tuple[str, int], Connection]) -> None:
        self._token, self._connections = token, connections
        self.failures = 0
        """How many requests failed with an unexpected exception; each is logged."""

    def wrap(self, route: Endpoint, changes: bool) -> Endpoint:
        """Restrict a route as `guarded` does, and answer its errors as `edge` does."""
        return self.edge(self.guarded(route, changes))

    def edge(self, route: Endpoint) -> Endpoint:
        """Wrap a route: a TimeoutError becomes status 503; any other exception becomes 500 and is logged."""

        @functools.wraps(route)  # the route's own docstring and `caller` are its documentation
        async def reply(request: Request) -> Response:
            client = request.client
            if client and (connection := self._connections.get((client.host, client.port))):
                connection.request_has_arrived()
            try:
                response = await route(request)
            except TimeoutError:
                response = answer({"status": "unhealthy", "reason": "the server's main loop does not answer"}, 503)
            except Exception as error:  # top of the request
                self.failures += 1
                logger.exception("HTTP %s %s failed", request.method, request.url.path)
                response = answer({"status": "error", "reason": f"internal error: {type(error).__name__}"}, 500)
            peer = client.host if client else "?"
            logger.debug("HTTP %s %s from %s: %d", request.method, request.url.path, peer, response.status_code)
            return response

        return reply

    def guarded(self, route: Endpoint, changes: bool = False, token: bool = False) -> Endpoint:
        """Restrict a route to callers on this host and callers with the token; with `token`, to callers with the token."""

        @functools.wraps(route)
        async def reply(request: Request) -> Response:
            refusal = self.refusal(request, changes, token)
            return answer({"status": "forbidden", "reason": refusal}, 403) if refusal else await route(request)

        vars(reply)["caller"] = CHANGES if changes else READS
        return reply

    def refusal(self, request: Request, changes: bool = False, token: bool = False) -> str:
        """Return why the caller of this request may not read or change the server's state; "" if it may."""
        peer = request.client.host if request.client else ""
        if token and "authorization" not in request.headers:
            return _TOKEN_NEEDED if self._token() else f"{_TOKEN_NEEDED}; start the server with --api-token-file"
        return why_refused(peer, request.headers, self._token(), changes)


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
    if _of_another_origin(headers):
        return "this came from a web page of another origin, so it needs the header `Authorization: Bearer TOKEN`"
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


def _of_another_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a browser says that a web page of another origin has made this request. Its answer would be hidden from that
    page, but asking must cost the server nothing either."""
    own = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
    return headers.get("sec-fetch-site", "none") not in _OWN_SITE or headers.get("origin", min(own)) not in own
