"""Spans: what a collector gets of a request, whose trace it belongs to, and what is dropped when nobody takes it."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine_process import Engine
from lmcache.cache.accounts import Account
from lmcache.errors import ConfigError
from lmcache.server import otlp
from lmcache.server.otlp import MOST_NOTES, MOST_SPANS, Exporter, Span, traces_url
from lmcache.server.tracing import ENDED_SECONDS, MOST_OPEN, QUIET_SECONDS, Note, Tracing
from lmcache.wire import messages as m
from ports import free_port
from servers import Raw, Server, eventually
from test_accounts import chain
from test_requests import Bed

pb = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="pip install 'lmcache[otel]'"
)
CHUNK = 16
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """A real OTLP receiver: an HTTP server that decodes protobuf. answers: the status of each answer; the last one stays."""

    def __init__(self, *answers: int) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.paths: list[tuple[str, str, str]] = []
        answered = list(answers) or [200]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                headers = handler.headers
                self.paths.append((handler.path, headers["Content-Type"], headers.get("X-Key", "")))
                status = answered.pop(0) if len(answered) > 1 else answered[0]
                if status == 200:
                    for group in pb.ExportTraceServiceRequest.FromString(body).resource_spans:
                        self.resources.append({one.key: one.value.string_value for one in group.resource.attributes})
                        self.spans += [span for scope in group.scope_spans for span in scope.spans]
                handler.send_response(status)
                handler.end_headers()

            def log_message(self, *values: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def of(self, request: str) -> dict[str, Any]:
        """Name -> span, of the request with this id, once its own span has come."""
        traces = [one.trace_id for one in self.spans if told(one).get("gen_ai.request.id") == request]
        return {one.name: one for one in self.spans if one.trace_id in traces}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def told(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.fixture
def collector() -> Iterator[Callable[..., Collector]]:
    made: list[Collector] = []

    def make(*answers: int) -> Collector:
        made.append(Collector(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_request_is_one_span_with_its_lookup_loads_and_stores(
    server: Callable[..., Server], engine: Callable[..., Engine], collector: Callable[..., Collector], monkeypatch: Any
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20key")
    receiver = collector()
    cache = server(chunk=CHUNK, flags=("--otlp-endpoint", receiver.url))
    bed = Bed(engine(cache, "one", layers=8), name="one")
    ids = list(range(70))
    first = bed.open("first")
    bed.requests.find(first, ids, 0)
    bed.store(first, ids)
    bed.requests.finish("first")
    second = bed.open("second")
    second.trace = PARENT
    bed.requests.find(second, ids, 0)
    bed.requests.give_back(second)
    raw = Raw(cache, "one")  # another process of the engine
    raw.ask(m.Copied("load", 64, 0.5, 0, request="second"))
    raw.ask(m.Copied("store", 16, 0.25, 1, ok=False, request="second"))
    bed.requests.finish("second")
    raw.ask(m.Release([], ["second"]))
    raw.close()
    new = eventually(lambda: "lmcache.request" in (found := receiver.of("second")) and found)
    assert receiver.paths[0] == ("/v1/traces", "application/x-protobuf", "a key")
    assert receiver.resources[0]["service.name"] == "lmcache"
    assert receiver.resources[0]["service.instance.id"] == cache.status()["server_id"]
    assert set(new) == {"lmcache.request", "lmcache.lookup", "lmcache.load", "lmcache.store"}
    root = new["lmcache.request"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert told(root) | {} == {
        "gen_ai.request.id": "second",
        "lmcache.engine": "one",
        "lmcache.model": told(root)["lmcache.model"],
        "lmcache.tokens": 70,
        "lmcache.found.l1": 64,
        "lmcache.missed.below_chunk": 6,
    }
    children = [one for name, one in new.items() if name != "lmcache.request"]
    assert all(one.parent_span_id == root.span_id and one.trace_id == root.trace_id for one in children)
    load, store = new["lmcache.load"], new["lmcache.store"]
    assert told(load) == {"lmcache.tokens": 64, "lmcache.shard": 0} and not load.status.code
    assert load.end_time_unix_nano - load.start_time_unix_nano == pytest.approx(5e8, abs=1e6)
    assert store.status.code == 2 and told(store)["lmcache.shard"] == 1
    cache.end()  # what is open is sent at the end
    old = receiver.of("first")
    assert told(old["lmcache.lookup"])["lmcache.missed.never_seen"] == 64
    assert not old["lmcache.request"].parent_span_id and old["lmcache.request"].trace_id != root.trace_id
    assert str(ids[40:44])[1:-1] not in str(receiver.spans), "no tokens"


def test_a_wait_is_a_span_of_its_own(server: Callable[..., Server], collector: Callable[..., Collector]) -> None:
    receiver = collector()
    cache = server(chunk=CHUNK, flags=("--otlp-endpoint", receiver.url))
    writer, reader = Raw(cache, "writer"), Raw(cache, "reader")
    hashes = chain(1, 4)
    writer.ask(m.Lookup(writer.space, hashes, 0, request="w", engine="writer", prefill_rate=10.0))
    held = writer.reserve(hashes)
    assert reader.ask(m.Lookup(reader.space, hashes, 0, request="r", engine="reader", prefill_rate=10.0)).loading
    writer.ask(m.Commit(held.reservation, True))
    found = eventually(
        lambda: (answer := reader.ask(m.Lookup(reader.space, hashes, 0, request="r"))).loading == 0 and answer
    )
    assert found.chunks == 4
    reader.ask(m.Release([found.lease], ["r"]))
    spans = eventually(lambda: "lmcache.request" in (now := receiver.of("r")) and now)
    wait, lookup = spans["lmcache.wait"], spans["lmcache.lookup"]
    assert wait.parent_span_id == lookup.span_id and told(wait)["lmcache.outcome"] == "arrived"
    assert (
        lookup.start_time_unix_nano
        <= wait.start_time_unix_nano
        < wait.end_time_unix_nano
        <= lookup.end_time_unix_nano + 1000
    )
    assert told(lookup)["lmcache.found.other_engine"] == 64
    writer.close()
    reader.close()


def test_nothing_is_sent_and_nothing_imported_without_an_endpoint(server: Callable[..., Server]) -> None:
    code = "import sys, lmcache.server.main, lmcache.server.report, lmcache.server.http; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "opentelemetry" not in done.stdout and "lmcache.server.tracing" not in done.stdout
    cache = server()
    raw = Raw(cache, "raw")
    raw.ask(m.Lookup(raw.space, chain(1, 4), 0, request="r", trace=PARENT))
    assert not [name for name in cache.counters() if name.startswith("span")]
    raw.close()


def test_the_server_serves_while_nobody_takes_its_spans(
    server: Callable[..., Server], collector: Callable[..., Collector]
) -> None:
    receiver = collector(503, 400, 200)
    cache = server(chunk=CHUNK, flags=("--otlp-endpoint", receiver.url))
    raw = Raw(cache, "raw")
    for number in range(3):
        name = f"r{number}"
        raw.ask(m.Lookup(raw.space, chain(number, 4), 0, request=name))
        raw.ask(m.Release([], [name]))
        eventually(lambda name=name, number=number: len(receiver.paths) > number)
    eventually(lambda: cache.counters()["spans_sent_total"] > 0)
    counters = cache.counters()
    assert counters["spans_dropped_total"] > 0 and counters["span_notes_lost_total"] == 0
    cache.said_once("Spans are not taken by")
    raw.close()


def test_what_cannot_be_encoded_does_not_end_the_spans(
    server: Callable[..., Server], collector: Callable[..., Collector]
) -> None:
    receiver = collector()
    cache = server(chunk=CHUNK, flags=("--otlp-endpoint", receiver.url))
    raw = Raw(cache, "raw")
    for tokens, shard in ((1 << 63, 0), (16, 1 << 63)):
        assert raw.ask(m.Copied("load", tokens, 0.5, shard, request="odd")).code == "refused"
    raw.ask(m.Copied("load", 16, 0.5, 0, request="sound"))
    raw.ask(m.Release([], ["sound"]))
    eventually(lambda: "lmcache.request" in receiver.of("sound"))
    raw.close()


def test_spans_that_cannot_be_encoded_are_dropped_and_counted() -> None:
    one = exporter(lambda notes, last: [Span("x", b"t" * 16, b"s" * 8, b"", 0, 1, {"odd": 1 << 63})])
    one._step(0.5)
    assert one.dropped == 1 and not one._spans


def test_notes_keep_no_more_of_a_name_than_is_shown() -> None:
    clock, long = Clock(), "x" * 10_000
    one = tracing(clock)
    peer: Any = SimpleNamespace(instance="e")
    one.copied(peer, m.Copied("load", 16, 0.5, 0, request=long))
    one.ended(peer, long)
    copied, ended = notes = list(one.exporter._notes)
    assert len(str(copied)) < 1000 and copied.request == ended.request
    one.spans(notes)
    clock.at += ENDED_SECONDS + 0.1
    assert "lmcache.request" in [span.name for span in one.spans([])], "the request has ended"


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "http://x:y", "grpc://x:4317"])
def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        traces_url(url)


def test_the_path_is_added_where_there_is_none() -> None:
    assert traces_url("http://x:4318") == traces_url("http://x:4318/") == "http://x:4318/v1/traces"
    assert traces_url("https://x/otlp/v1/traces") == "https://x/otlp/v1/traces"
    assert traces_url("http://x:4318?key=a") == "http://x:4318/v1/traces?key=a"


# --- bounds


class Clock:
    """A runtime whose thread never runs; the test makes its steps."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at

    wall = now

    def event(self) -> threading.Event:
        return threading.Event()

    def start(self, run: Callable[[], object], name: str) -> Any:
        return SimpleNamespace(join=lambda seconds: None)


def exporter(make: Callable[..., Any]) -> Exporter[Any]:
    return Exporter(Clock(), f"http://127.0.0.1:{free_port()}", "id", make)  # type: ignore[arg-type]


def test_notes_and_spans_that_nobody_takes_are_dropped_and_counted() -> None:
    one = exporter(lambda notes, last: [Span("x", b"t" * 16, b"s" * 8, b"", 0, 1) for _ in notes])
    for _ in range(MOST_NOTES + 7):
        one.put(None)
    assert one.lost_notes == 7
    one._step(0.5)
    assert one.dropped == MOST_NOTES - MOST_SPANS and one.sent == 0 and len(one._spans) == MOST_SPANS


def tracing(clock: Clock) -> Tracing:
    return Tracing(clock, "http://127.0.0.1:1", "id", lambda process: ("", ""))  # type: ignore[arg-type]


def test_a_span_ends_with_its_request_or_when_nothing_more_is_heard() -> None:
    clock = Clock()
    one = tracing(clock)
    assert (
        one.spans([Note("asked", 1000.0, "e", "a"), Note("asked", 1000.0, "e", "b"), Note("ended", 1001.0, "e", "a")])
        == []
    )
    clock.at = 1001.0 + ENDED_SECONDS + 0.1
    (ended,) = one.spans([])
    assert ended.attributes["gen_ai.request.id"] == "a" and (ended.start, ended.end) == (1000.0, 1001.0)
    clock.at = 1000.0 + QUIET_SECONDS + 0.1
    assert [span.attributes["gen_ai.request.id"] for span in one.spans([Note("ended", clock.at, "e", "unknown")])] == [
        "b"
    ]
    many = one.spans([Note("asked", clock.at, "e", f"r{number}") for number in range(MOST_OPEN + 5)])
    assert [span.attributes["gen_ai.request.id"] for span in many] == [f"r{number}" for number in range(5)]
    assert len(one.spans([], True)) == MOST_OPEN and not one._open


@pytest.mark.parametrize(
    "trace, sent, joined",
    [
        (PARENT, True, True),
        (PARENT[:-1] + "0", False, True),
        ("00-" + "0" * 32 + PARENT[35:], True, False),
        ("rubbish", True, False),
        (PARENT.upper(), True, False),
        ("", True, False),
    ],
)
def test_the_engines_trace_is_joined_and_its_sampling_kept(trace: str, sent: bool, joined: bool) -> None:
    clock = Clock()
    account = Account(1, "a", 0.5, 16, {"l1": 16}, {}, None)
    made = tracing(clock).spans(
        [Note("asked", 1.0, "e", "a", trace), Note("accounted", 2.0, "e", "a", account=account)], True
    )
    assert bool(made) == sent
    assert all((span.trace.hex() == PARENT[3:35]) == joined for span in made)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"lmcache\[otel\]"):
        otlp._encoder("id")
