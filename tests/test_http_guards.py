"""Who may use which HTTP route: every route that is registered, asked by every kind of caller over a real connection."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache.config import ServerConfig
from lmcache.server import http_routes, http_sockets
from lmcache.server.http import HttpEndpoint
from lmcache.server.http_guards import CHANGES, READS, why_refused
from servers import PATIENCE

TOKEN = "a-token-that-nobody-may-see"
OPEN = {"/", "/healthcheck", "/healthz", "/livez", "/readyz", "/version", "/metrics"}
"""The routes that everybody who reaches the port may use; SECURITY.md says so."""
NEED_THE_TOKEN = {("POST", "/tiers"), ("DELETE", "/tiers/{name}"), ("POST", "/tiers/{name}/{action}")}
"""The routes that need the token from this host, too, since they let the server open files and dial addresses."""
NOTHING = {"open"}
READING = NOTHING | {"reads"}
ANYTHING_HERE = READING | {"changes"}
EVERYTHING = ANYTHING_HERE | {"token"}
CALLERS: dict[str, tuple[dict[str, str], set[str]]] = {
    "curl on this host": ({}, ANYTHING_HERE),
    "the server's own page": ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, READING),
    "a person who has typed the address": ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, READING),
    "a web page elsewhere": ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, NOTHING),
    "an image in a web page": ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, NOTHING),
    "another port of this host": ({"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-site"}, NOTHING),
    "an old browser": ({"Origin": "http://evil.example"}, NOTHING),
    "a sandboxed frame": ({"Origin": "null"}, NOTHING),
    "a name that resolves to this host": ({"Host": "evil.example"}, NOTHING),
    "its web page": (
        {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        NOTHING,
    ),
    "a proxy on this host": ({"X-Forwarded-For": "10.0.0.1"}, NOTHING),
    "somebody who guesses": ({"Authorization": "Bearer wrong"}, NOTHING),
    "a tool with the token": ({"Authorization": f"Bearer {TOKEN}"}, EVERYTHING),
    "a proxy with the token": ({"Authorization": f"Bearer {TOKEN}", "Via": "1.1 x", "Host": "lmcache"}, EVERYTHING),
    "the page with the token": ({"Authorization": f"Bearer {TOKEN}", "Sec-Fetch-Site": "same-origin"}, EVERYTHING),
}
"""Caller -> (its headers, the kinds of routes that it may use)."""


class Absent:
    """Stands for whatever a route asks, which fails: what matters is whether it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@pytest.fixture(params=[True, False], ids=["server", "controller"])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpEndpoint]:
    monkeypatch.setattr(http_routes, "_CONTROL_SECONDS", PATIENCE)
    monkeypatch.setattr(http_sockets, "_REQUEST_SECONDS", PATIENCE)
    one = HttpEndpoint(ServerConfig(http_port=0, api_token=TOKEN), Absent(), whole=request.param)  # type: ignore[arg-type]
    one.start()
    yield one
    one.stop()


def kind_of(method: str, path: str) -> str:
    if path in OPEN:
        return "open"
    if (method, path) in NEED_THE_TOKEN:
        return "token"
    return "reads" if method in ("GET", "HEAD") else "changes"


def asked(endpoint: HttpEndpoint, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=PATIENCE)
    try:
        connection.request(method, path.replace("{", "").replace("}", ""), headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer
    finally:
        connection.close()


@pytest.mark.parametrize("caller", CALLERS)
def test_every_route_is_closed_to_whom_it_is_not_for(caller: str, endpoint: HttpEndpoint) -> None:
    headers, may = CALLERS[caller]
    routes: list[Any] = list(endpoint._app().routes)
    pairs = [(method, route.path) for route in routes for method in sorted(route.methods)]
    assert len(pairs) > 10
    wrong = []
    for method, path in pairs:
        answer = asked(endpoint, method, path, headers)
        if (answer.status != 403) != (kind_of(method, path) in may):
            wrong.append(f"{method} {path}: {answer.status}")
        assert answer.getheader("cross-origin-resource-policy") == "same-origin"
        assert not any(name.lower().startswith("access-control-") for name, _ in answer.getheaders())
    assert wrong == []


def test_every_route_says_who_may_use_it(endpoint: HttpEndpoint) -> None:
    """The documentation is made from this."""
    routes: list[Any] = list(endpoint._app().routes)
    for route in routes:
        for method in route.methods:
            said = {"open": "", "reads": READS}.get(kind_of(method, route.path), CHANGES)
            assert getattr(route.endpoint, "caller", "") == said, route.path


@pytest.mark.parametrize("changes", [False, True])
def test_other_hosts_need_the_token(changes: bool) -> None:
    headers = {"host": "localhost"}
    assert "Bearer" in why_refused("10.0.0.1", headers, TOKEN, changes)
    assert "--api-token-file" in why_refused("10.0.0.1", headers, "", changes)
    assert not why_refused("10.0.0.1", headers | {"authorization": f"Bearer {TOKEN}"}, TOKEN, changes)


@pytest.mark.parametrize("origin", ["http://localhost:8080", "https://localhost:8080"])
def test_the_origin_of_the_server_is_its_own(origin: str) -> None:
    headers = {"host": "localhost:8080", "origin": origin}
    assert not why_refused("127.0.0.1", headers, "", changes=False)
    assert "web page" in why_refused("127.0.0.1", headers, "", changes=True)
