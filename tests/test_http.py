"""The HTTP endpoint: a real one on a free port, with a small Control behind it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmcache import __version__
from lmcache.config import ServerConfig
from lmcache.errors import ConfigError
from lmcache.server import http, http_answers, http_routes, http_sockets
from lmcache.server.history import COLUMNS, INTERVAL_SECONDS, SAMPLES, History
from lmcache.server.http import HttpEndpoint
from lmcache.server.http_guards import why_refused
from lmcache.server.metrics import families
from servers import PATIENCE, eventually

TOKEN = "a-token-that-nobody-may-see"
get, post = partial(httpx.get, timeout=PATIENCE), partial(httpx.post, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def patient_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes no server unhealthy: tests of these bounds set their own."""
    monkeypatch.setattr(http_routes, "_CONTROL_SECONDS", PATIENCE)
    monkeypatch.setattr(http_sockets, "_REQUEST_SECONDS", PATIENCE)
    monkeypatch.setattr(http, "_START_SECONDS", PATIENCE)


class Server:
    """Control as the face sees it; tests swap what `health` and the rest do."""

    def __init__(self) -> None:
        self.cleared = 0
        self.healthy: Callable[[], tuple[bool, str]] = lambda: (True, "")
        self.troubles: list[str] = []

    def health(self) -> tuple[bool, str]:
        return self.healthy()

    def status(self) -> dict[str, object]:
        config = ServerConfig(api_token=TOKEN).redacted()
        return {"version": "1", "config": config, "engines": [{"instance": "<b>engine</b>", "layout": "x"}]}

    def requests(self, limit: int) -> dict[str, object]:
        return {"requests": [{"request": "r1"}], "limit": limit}

    def fetches(self) -> list[dict[str, object]]:
        return [{"request": "r1", "outcome": "late"}]

    def refused(self) -> list[str]:
        return []

    def history(self) -> tuple[list[str], list[tuple[float, ...]]]:
        return ["time", "chunks"], [(1.5, 2.0), (11.5, 3.0)]

    def degraded(self) -> list[str]:
        return self.troubles

    def clear(self, tiers: str = "") -> dict[str, object]:
        self.cleared += 1
        return {"cleared_chunks": 3, "cleared_tiers": tiers.split(",")}

    def counters(self) -> dict[str, float]:
        return {"stored_chunks_total": 3, 'missed_chunks_total{reason="not\n"here"}': 4, "chunks": 2}


class Served:
    """A running face and how to ask it."""

    def __init__(self, token: str = "", **more: Any) -> None:
        self.server = Server()
        self.endpoint = HttpEndpoint(
            ServerConfig(http_host="0.0.0.0", http_port=0, api_token=token, **more), self.server
        )
        self.endpoint.start()
        self.url = f"http://localhost:{self.endpoint.port}"

    def clear(self, url: str = "", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return post((url or self.url) + "/clear-cache", headers=named, trust_env=False)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.endpoint.stop()


@pytest.fixture
def guarded() -> Iterator[Served]:
    one = Served(TOKEN)
    yield one
    one.endpoint.stop()


@pytest.fixture
def elsewhere() -> str:
    """An address of this host that is not loopback: to the face, a caller from it is another host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address: str = probe.getsockname()[0]
    return address


# --- reading ----------------------------------------------------------------------------------------------------------


def test_healthcheck_is_the_documented_one(served: Served) -> None:
    answer = get(served.url + "/healthcheck")
    assert (answer.status_code, answer.json()) == (200, {"status": "healthy"})
    assert answer.text.strip() == '{"status": "healthy"}'


def test_an_unhealthy_server_says_why(served: Served) -> None:
    served.server.healthy = lambda: (False, "the arena file is gone")
    answer = get(served.url + "/healthcheck")
    assert (answer.status_code, answer.json()) == (503, {"status": "unhealthy", "reason": "the arena file is gone"})


def test_a_heart_that_times_out_is_unhealthy(served: Served) -> None:
    def late() -> tuple[bool, str]:
        raise TimeoutError("no answer within 1 s")

    served.server.healthy = late
    answer = get(served.url + "/healthcheck")
    assert answer.status_code == 503 and "does not answer" in answer.json()["reason"]


def test_a_heart_that_hangs_is_unhealthy_and_stops_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = threading.Event()
    served.server.healthy = lambda: (freed.wait(PATIENCE), "it has waited for the end of the test")
    try:
        with monkeypatch.context() as hasty:
            hasty.setattr(http_routes, "_CONTROL_SECONDS", 0.2)
            answer = get(served.url + "/healthcheck")
        assert answer.status_code == 503 and "does not answer" in answer.json()["reason"]
        assert get(served.url + "/status").status_code == 200
    finally:
        freed.set()


def test_a_fault_of_ours_is_counted_and_stops_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> tuple[bool, str]:
        raise ZeroDivisionError("secret detail")

    served.server.healthy = broken
    answer = get(served.url + "/healthcheck")
    assert answer.status_code == 500 and "secret detail" not in answer.text
    assert served.endpoint.failures == 1
    assert get(served.url + "/status").status_code == 200


def test_status_shows_no_secret(guarded: Served) -> None:
    for path in ("/status", "/", "/metrics", "/fetches"):
        answer = get(f"{guarded.url}{path}")
        assert answer.status_code == 200 and TOKEN not in answer.text
    assert get(guarded.url + "/status").json()["config"]["api-token"] == "***"


@pytest.mark.parametrize("path", ["/status", "/fetches", "/history", "/config"])
def test_other_hosts_read_the_state_with_the_token_only(
    path: str, served: Served, guarded: Served, elsewhere: str
) -> None:
    answer = get(f"http://{elsewhere}:{served.endpoint.port}{path}")
    assert answer.status_code == 403 and "--api-token-file" in answer.json()["reason"]
    url = f"http://{elsewhere}:{guarded.endpoint.port}{path}"
    answer = get(url)
    assert answer.status_code == 403 and "Authorization: Bearer" in answer.json()["reason"]
    assert get(url, headers={"Authorization": "Bearer wrong"}).status_code == 403
    assert get(url, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    for header in ({"X-Forwarded-For": "10.0.0.1"}, {"Host": "evil.example"}):
        assert get(served.url + path, headers=header).status_code == 403
    assert get(served.url + path, headers={"Sec-Fetch-Site": "none"}).status_code == 200, "a person's browser"


def test_other_hosts_learn_health_and_version_and_no_reasons(served: Served, elsewhere: str) -> None:
    url = f"http://{elsewhere}:{served.endpoint.port}"
    assert get(url + "/version").json() == {"version": __version__}
    assert (get(url + "/livez").json(), get(url + "/readyz").json()) == (
        {"status": "alive"},
        {"status": "ready"},
    )
    assert get(url + "/metrics").status_code == 200
    served.server.troubles = ["disk: no room at /secret/path"]
    assert get(url + "/healthcheck").json() == {"status": "healthy"}
    assert get(served.url + "/healthcheck").json()["degraded"] == served.server.troubles
    served.server.healthy = lambda: (False, "the arena file /dev/shm/x is gone")
    assert get(url + "/healthcheck").json() == {"status": "unhealthy"}
    assert (get(url + "/livez").status_code, get(url + "/readyz").status_code) == (200, 503)


def test_a_required_tier_that_does_not_serve_is_not_ready() -> None:
    one = Served(l2_required=True)
    try:
        assert get(one.url + "/readyz").status_code == 200
        one.server.troubles = ["redis: no answer"]
        assert (get(one.url + "/readyz").status_code, get(one.url + "/healthcheck").status_code) == (
            503,
            200,
        )
    finally:
        one.endpoint.stop()


def test_metrics_are_prometheus(served: Served) -> None:
    answer = get(served.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert found["lmcache_stored_chunks"].type == "counter"
    assert (
        found["lmcache_stored_chunks"].documentation
        == "Chunks that became complete: L1 holds stored - evicted - cleared complete chunks."
    )
    assert found["lmcache_chunks"].type == "gauge" and found["lmcache_chunks"].samples[0].value == 2
    (missed,) = found["lmcache_missed_chunks"].samples
    assert (missed.name, missed.labels, missed.value) == ("lmcache_missed_chunks_total", {"reason": 'not\n"here'}, 4)
    assert "process_resident_memory_bytes" in found


def test_openmetrics_when_asked_for(served: Served) -> None:
    answer = get(served.url + "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_a_counter_with_and_without_label_is_one_family() -> None:
    (family,) = families({"x_total": 1, 'x_total{reason="a"}': 2})
    assert [(sample.labels, sample.value) for sample in family.samples] == [({}, 1), ({"reason": "a"}, 2)]
    with pytest.raises(ValueError):
        list(families({"Not a name": 1}))


def test_unknown_paths_and_methods_are_json(served: Served) -> None:
    answer = get(served.url + "/nope")
    assert answer.status_code == 404 and "/healthcheck" in answer.json()["reason"]
    answer = get(served.url + "/clear-cache")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["status"] == "error"
    assert post(served.url + "/status").status_code == 405
    assert served.server.cleared == 0


# --- doors ------------------------------------------------------------------------------------------------------------


def test_the_documented_curl_works_as_written(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """`curl -X POST http://localhost:8080/clear-cache`: no body, no header but Host, User-Agent and Accept."""
    answer = served.clear(user_agent="curl/8.5.0", accept="*/*")
    assert (answer.status_code, answer.text.strip()) == (200, '{"status": "ok"}')
    assert served.server.cleared == 1
    told = post(served.url + "/clear-cache?tiers=disk", trust_env=False).json()
    assert told == {"status": "ok", "cleared_chunks": 3, "cleared_tiers": ["disk"]}
    refused = post(served.url + "/clear-cache?tier=all", trust_env=False)
    assert refused.status_code == 400 and "tier=: write tiers=all" in refused.json()["reason"]
    assert served.server.cleared == 2
    failed = {"cleared_chunks": 3, "cleared_tiers": [], "failed_tiers": {"disk": "read-only"}}
    monkeypatch.setattr(served.server, "clear", lambda tiers: failed)
    answer = post(served.url + "/clear-cache?tiers=disk", trust_env=False)
    assert (answer.status_code, answer.json()) == (503, {"status": "incomplete", **failed})


def test_loopback_needs_no_token_even_when_there_is_one(guarded: Served) -> None:
    assert guarded.clear(f"http://127.0.0.1:{guarded.endpoint.port}").status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Origin": "http://localhost:8080"}, "web page"),
        ({"Origin": "null"}, "web page"),
        ({"Sec_Fetch_Site": "cross-site"}, "web page"),
        ({"Host": "evil.example"}, "localhost"),
        ({"Host": "localhost.evil.example:8080"}, "localhost"),
        ({"Host": "127.0.0.1.evil.example"}, "localhost"),
        ({"X_Forwarded_For": "127.0.0.1"}, "proxy"),
        ({"Forwarded": "for=127.0.0.1"}, "proxy"),
        ({"Via": "1.1 proxy"}, "proxy"),
        ({"X_Real_IP": "10.0.0.9"}, "proxy"),
        ({"Authorization": "Bearer anything"}, "the server has none"),
    ],
)
def test_a_web_page_or_proxy_may_not_change_anything(served: Served, headers: dict[str, str], reason: str) -> None:
    answer = served.clear(**headers)
    assert answer.status_code == 403 and reason in answer.json()["reason"]
    assert served.server.cleared == 0


def test_another_host_needs_the_token(served: Served, guarded: Served, elsewhere: str) -> None:
    answer = served.clear(f"http://{elsewhere}:{served.endpoint.port}")
    assert answer.status_code == 403 and "--api-token-file" in answer.json()["reason"]
    url = f"http://{elsewhere}:{guarded.endpoint.port}"
    answer = guarded.clear(url)
    assert answer.status_code == 403 and "Bearer" in answer.json()["reason"]
    assert guarded.clear(url, x_forwarded_for="127.0.0.1", host="localhost").status_code == 403
    assert guarded.clear(url, authorization="Bearer wrong").status_code == 403
    assert guarded.clear(url, authorization=f"Basic {TOKEN}").status_code == 403
    assert (served.server.cleared, guarded.server.cleared) == (0, 0)
    assert guarded.clear(url, authorization=f"Bearer {TOKEN}").status_code == 200
    assert guarded.clear(url, authorization=f"bearer {TOKEN}", origin="http://x").status_code == 200


def test_a_wrong_token_is_refused_from_loopback_too(guarded: Served) -> None:
    answer = guarded.clear(authorization="Bearer wrong")
    assert answer.status_code == 403 and TOKEN not in answer.text


@pytest.mark.parametrize(
    ("peer", "host", "may"),
    [
        ("127.0.0.1", "localhost", True),
        ("127.9.9.9", "LOCALHOST:8080", True),
        ("::1", "[::1]:8080", True),
        ("::ffff:127.0.0.1", "127.0.0.1:8080", True),
        ("::ffff:10.0.0.1", "localhost", False),
        ("10.0.0.1", "localhost", False),
        ("", "localhost", False),
        ("unix", "localhost", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "localhost:8080:1", False),
        ("127.0.0.1", "localhost@evil", False),
        ("127.0.0.1", "1270.0.0.1", False),
    ],
)
def test_who_is_local(peer: str, host: str, may: bool) -> None:
    for token in ("", TOKEN):
        for changes in (False, True):
            assert (why_refused(peer, {"host": host}, token, changes) == "") is may


# --- strangers --------------------------------------------------------------------------------------------------------


def raw(served: Served, data: bytes) -> bytes:
    """Send bytes, read until the other side closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", served.endpoint.port), timeout=PATIENCE) as peer:
        try:
            peer.sendall(data)
            while part := peer.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


def test_garbage_is_answered_or_dropped_and_stops_nothing(served: Served) -> None:
    for data in (b"\x00\xff" * 100 + b"\r\n\r\n", b"GET\r\n\r\n", b"POST /clear-cache HTTP/1.1\r\nHost: \xff\r\n\r\n"):
        assert re.match(rb"HTTP/1.1 40[03]|$", raw(served, data))
    assert served.server.cleared == 0
    assert get(served.url + "/healthcheck").status_code == 200


def test_headers_and_bodies_are_bounded(served: Served) -> None:
    start = b"GET /healthcheck HTTP/1.1\r\nHost: localhost\r\nX: "
    assert raw(served, start + b"x" * 4096 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert not raw(served, start + b"x" * (1 << 20) + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    huge = b"POST /clear-cache HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nx"
    assert raw(served, huge).startswith(b"HTTP/1.1 413")
    assert served.server.cleared == 0


def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_sockets, "_REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(http_sockets, "_CONNECTION_SECONDS", 3600.0)
    served = Served()
    try:
        assert raw(served, b"GET /healthcheck HTTP/1.1\r\nHost:") == b""
    finally:
        served.endpoint.stop()


def test_a_connection_whose_answer_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_sockets, "_CONNECTION_SECONDS", 0.5)
    served = Served()
    served.server.fetches = lambda: [{"much": "x" * (16 << 20)}]  # type: ignore[method-assign]
    try:
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", served.endpoint.port))
            peer.sendall(b"GET /fetches HTTP/1.1\r\nHost: localhost\r\n\r\n")
            raw(served, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")  # accepted after the other one
            eventually(lambda: not served.endpoint._connections)
    finally:
        served.endpoint.stop()


def test_other_hosts_cannot_take_all_connections(monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    monkeypatch.setattr(http_sockets, "_MOST_CONNECTIONS", 4)
    monkeypatch.setattr(
        http_sockets, "_REQUEST_SECONDS", 10 * PATIENCE
    )  # none of them ends before the last one is refused
    served = Served()
    held: list[socket.socket] = []
    try:
        for _ in range(10):
            held.append(socket.create_connection((elsewhere, served.endpoint.port), timeout=PATIENCE))
        with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
            get(f"http://{elsewhere}:{served.endpoint.port}/healthcheck")
        assert get(served.url + "/healthcheck").status_code == 200
    finally:
        for one in held:
            one.close()
        served.endpoint.stop()


# --- life -------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_a_config_error(served: Served) -> None:
    second = HttpEndpoint(ServerConfig(http_host="0.0.0.0", http_port=served.endpoint.port), served.server)
    with pytest.raises(ConfigError, match=f"--http-port {served.endpoint.port}"):
        second.start()
    second.stop()


def test_stop_frees_the_port_and_the_thread() -> None:
    served = Served()
    thread = served.endpoint._thread
    assert thread is not None and served.endpoint.serving
    served.endpoint.stop()
    assert not thread.is_alive() and not served.endpoint.serving
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("0.0.0.0", served.endpoint.port))


def test_ipv6_loopback() -> None:
    try:
        endpoint = HttpEndpoint(ServerConfig(http_host="::1", http_port=0), Server())
        endpoint.start()
    except ConfigError:
        pytest.skip("no IPv6 here")
    try:
        answer = post(f"http://[::1]:{endpoint.port}/clear-cache")
        assert answer.status_code == 200 and json.loads(answer.text)["status"] == "ok"
    finally:
        endpoint.stop()


def test_the_page_is_the_same_for_everybody_and_runs_no_other_script(served: Served, elsewhere: str) -> None:
    page = get(served.url.replace("localhost", elsewhere))
    assert page.status_code == 200 and "<b>engine" not in page.text and TOKEN not in page.text
    policy = page.headers["Content-Security-Policy"]
    for element in ("script", "style"):
        (inside,) = re.findall(f"<{element}>(.*?)</{element}>", page.text, re.DOTALL)
        assert f"{element}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "innerHTML" not in page.text and not re.search(r"(src|href)=.?(https?:)?//", page.text)


def test_all_who_look_at_the_page_within_a_second_get_one_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_routes, "_SHARED_SECONDS", 3600.0)
    made, status = list[float](), served.server.status
    served.server.status = lambda: made.append(1) or status()  # type: ignore[method-assign, func-returns-value]
    served.server.troubles = ["disk: no room"]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(get, [f"{served.url}/overview"] * 8))
    told = answers[0].json()
    assert {one.text for one in answers} == {answers[0].text} and len(made) == 1
    assert told["health"] == {"status": "healthy", "reason": "", "degraded": ["disk: no room"], "refused_engines": []}
    assert told["status"] == get(served.url + "/status").json() and told["requests"]["limit"] == 20
    assert "history" not in told
    assert get(served.url + "/overview?history=1").json()["history"] == get(served.url + "/history").json()
    made.clear()
    monkeypatch.setattr(http_routes, "_SHARED_SECONDS", 0.0)
    for _ in range(3):
        get(served.url + "/overview")
    assert len(made) == 3, "and later it is a new one"


def test_the_page_says_why_there_are_no_records(served: Served) -> None:
    def none(limit: int) -> dict[str, object]:
        raise ConfigError("no records are kept: --records-mb is 0")

    served.server.requests = none  # type: ignore[method-assign]
    assert get(served.url + "/overview").json()["requests"] == {"reason": "no records are kept: --records-mb is 0"}


def test_a_server_that_hangs_keeps_nobody_waiting_for_who_waits(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = threading.Event()
    served.server.healthy = lambda: (freed.wait(PATIENCE), "")
    try:
        with monkeypatch.context() as hasty:
            hasty.setattr(http_routes, "_CONTROL_SECONDS", 0.2)
            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(get, [f"{served.url}/overview"] * 4))
        assert {one.status_code for one in answers} == {503}
    finally:
        freed.set()


def test_the_last_hour(served: Served) -> None:
    assert get(served.url + "/history").json() == {"columns": ["time", "chunks"], "samples": [[1.5, 2.0], [11.5, 3.0]]}
    answer = get(served.url + "/history?format=csv")
    assert answer.text == "time,chunks\n1.5,2.0\n11.5,3.0\n" and answer.headers["Content-Type"].startswith("text/csv")


def test_an_hour_of_samples_is_kept() -> None:
    time, counters = [100.0], {"chunks": 0.0, 'lookup_tokens_total{source="disk"}': 5.0, "requested_tokens_total": 9.0}
    history = History(lambda: time[0], lambda: time[0] + 1e9, lambda: counters)
    for _ in range(3 * SAMPLES):
        for _ in range(40):
            time[0] += 0.25
            history.tick()
        counters["chunks"] += 1
    samples = history.samples()
    assert len(samples) == SAMPLES and len(samples[0]) == len(COLUMNS)
    assert {later[0] - sooner[0] for sooner, later in pairwise(samples)} == {INTERVAL_SECONDS}
    chunks = COLUMNS.index("chunks")
    assert samples[-1][chunks] - samples[0][chunks] == SAMPLES - 1
    told = dict(zip(COLUMNS, samples[0], strict=True))
    assert (
        told["requested_tokens_total"] == 9 and told["tokens_found_elsewhere"] == 5 and not told["tokens_found_in_l1"]
    )


def test_answers_are_json_even_if_a_counter_is_no_number() -> None:
    assert (
        http_answers.answer({"a": [float("inf"), 1.5], "b": {"c": float("nan")}}).body
        == b'{"a": [null, 1.5], "b": {"c": null}}\n'
    )
