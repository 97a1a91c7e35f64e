"""Sends spans to an OpenTelemetry collector (OTLP over HTTP), in a thread of its own that the loop never waits for.

What does not fit into the queue, or cannot be sent in time, is dropped and counted. Nothing is sent without --otlp-endpoint.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

from lmcache import __version__
from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import init_logger, redacted
from lmcache.runtime import Runtime
from lmcache.wire.http_client import send

logger = init_logger(__name__)
T = TypeVar("T")
MOST_NOTES = 16384
"""Notes of the loop that may wait for the thread."""
MOST_SPANS = 4096
"""Spans that may wait to be sent."""
_BATCH = 512
_STEP_SECONDS = 0.5
_SEND_SECONDS = 5.0
_END_SECONDS = 3.0
"""The end of the server waits so long for what is queued."""
_SILENT_SECONDS = 60.0
"""A collector that does not take spans is complained of that often."""
Value = str | int | float | bool


@dataclass(slots=True)
class Span:
    """One span. trace, span, parent: ids of 16, 8 and 8 bytes; a root has no parent. start, end: seconds since the epoch."""

    name: str
    trace: bytes
    span: bytes
    parent: bytes
    start: float
    end: float
    attributes: dict[str, Value] = field(default_factory=dict)
    failed: bool = False


class Exporter(Generic[T]):
    """A queue of notes, the thread that makes spans of them, and what it has sent.

    make: returns the spans that are complete after these notes. The thread calls it about twice a second, and once with `True`
    when the server ends, for the spans of all requests that are still open.

    Raises:
        ConfigError: the endpoint is no URL, or the package that encodes spans is missing.
    """

    def __init__(
        self, runtime: Runtime, endpoint: str, instance: str, make: Callable[[Sequence[T], bool], Sequence[Span]]
    ) -> None:
        self._url, self._make, self._runtime = traces_url(endpoint), make, runtime
        self._encode = _encoder(instance)
        self._headers = _headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""))
        self._notes: deque[T] = deque()
        self._spans: deque[Span] = deque()
        self.lost_notes = self.dropped = self.sent = 0
        """Notes that found the queue full; spans that were dropped; spans that the collector has taken."""
        self._complain_at = float("-inf")
        self._stop = runtime.event()
        self._thread = runtime.start(self._run, "lmcache-otlp")

    def put(self, note: T) -> None:
        """Queue a note. Any thread may call; it takes less than a microsecond."""
        if len(self._notes) >= MOST_NOTES:
            self.lost_notes += 1
        else:
            self._notes.append(note)

    def close(self) -> None:
        """Send what is queued if that is quick, and end the thread."""
        self._stop.set()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(_STEP_SECONDS):
            self._step(_SEND_SECONDS)
        self._step(_END_SECONDS / 2, last=True)

    def _step(self, seconds: float, last: bool = False) -> None:
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        try:
            self._spans.extend(self._make(notes, last))
        except Exception:  # a bug, which must not end the thread
            self.lost_notes += len(notes)
            logger.exception("Spans could not be made; the server goes on without them")
        while len(self._spans) > MOST_SPANS:
            self._spans.popleft()
            self.dropped += 1
        while self._spans:
            batch = [self._spans[number] for number in range(min(_BATCH, len(self._spans)))]
            if not self._send(batch, seconds):
                return
            for _ in batch:
                self._spans.popleft()

    def _send(self, batch: Sequence[Span], seconds: float) -> bool:
        """Return whether the batch is done with: it was taken, or will never be."""
        try:
            body = self._encode(batch)
        except Exception:  # a bug, which must not end the thread
            self.dropped += len(batch)
            logger.exception("Spans could not be encoded and are dropped; the server goes on without them")
            return True
        try:
            status = send(self._url, body, self._headers, seconds)
        except LMCacheError as error:
            self._complain(str(error))
            return False
        if status in (429, 502, 503, 504):
            self._complain(f"it answers {status}")
            return False
        if 200 <= status < 300:
            self.sent += len(batch)
        else:
            self.dropped += len(batch)
            self._complain(f"it answers {status}, so the spans are dropped")
        return True

    def _complain(self, why: str) -> None:
        now = self._runtime.now()
        if now >= self._complain_at:
            self._complain_at = now + _SILENT_SECONDS
            grpc = (
                ". Port 4317 usually speaks gRPC: use the port for HTTP, 4318"
                if urlsplit(self._url).port == 4317
                else ""
            )
            logger.warning("Spans are not taken by %s: %s%s", self._url, why, grpc)


def traces_url(endpoint: str) -> str:
    """Return the URL that spans are sent to: /v1/traces where the endpoint names no path.

    Raises:
        ConfigError: it is no URL of HTTP.
    """
    try:
        parts = urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"--otlp-endpoint {redacted(endpoint)}: pass a URL such as http://localhost:4318")
    return endpoint if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


def _headers(text: str) -> dict[str, str]:
    pairs = (one.partition("=") for one in text.split(",") if "=" in one)
    given = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    return {**given, "Content-Type": "application/x-protobuf"}


def _encoder(instance: str) -> Callable[[Sequence[Span]], bytes]:
    """Return what encodes spans. instance: the server's id."""
    try:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
        from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
        from opentelemetry.proto.trace.v1 import trace_pb2
    except ImportError:
        raise ConfigError("--otlp-endpoint: needs opentelemetry-proto: pip install 'lmcache[otel]'") from None

    any_value: Any = AnyValue

    def value(one: Value) -> Any:
        kind = {bool: "bool_value", int: "int_value", float: "double_value"}.get(type(one), "string_value")
        return any_value(**{kind: one})

    def attributes(given: Mapping[str, Value]) -> list[Any]:
        return [KeyValue(key=name, value=value(one)) for name, one in given.items()]

    resource = {
        "service.name": os.environ.get("OTEL_SERVICE_NAME") or "lmcache",
        "service.instance.id": instance,
        "service.version": __version__,
    }

    def encode(spans: Sequence[Span]) -> bytes:
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add()
        group.resource.attributes.extend(attributes(resource))
        scope = group.scope_spans.add()
        scope.scope.name = "lmcache"
        for one in spans:
            status = trace_pb2.Status.STATUS_CODE_ERROR if one.failed else trace_pb2.Status.STATUS_CODE_UNSET
            scope.spans.add(
                trace_id=one.trace,
                span_id=one.span,
                parent_span_id=one.parent,
                name=one.name,
                kind=trace_pb2.Span.SPAN_KIND_SERVER
                if one.name == "lmcache.request"
                else trace_pb2.Span.SPAN_KIND_INTERNAL,
                start_time_unix_nano=int(one.start * 1e9),
                end_time_unix_nano=int(max(one.start, one.end) * 1e9),
                attributes=attributes(one.attributes),
                status=trace_pb2.Status(code=status),
            )
        return bytes(request.SerializeToString())

    return encode
