"""Spans, as the SDK's own exporter in memory gets them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from orchestrator.errors import ServingFailed, UserError
from orchestrator.serving import traces
from orchestrator.serving.contract import ApiError
from orchestrator.serving.traces import PREDICT, READ, NoTracer, OpenTelemetry, tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"


class Traced:
    def __init__(self, share: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = OpenTelemetry(self.exporter, share)

    def spans(self) -> dict[str, ReadableSpan]:
        """By name, once all are sent."""
        self.tracer.close()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.tracer.close()


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


def test_a_request_and_its_phases_belong_to_the_clients_trace(traced: Traced) -> None:
    with traced.tracer.span("predict", HEADER) as span:
        span.set("model", "reviews")
        for phase in (READ, PREDICT):
            with traced.tracer.span(phase) as inner:
                inner.set("instances", 3)
        span.set("http.response.status_code", 200)
    spans = traced.spans()
    request = spans["predict"]
    assert list(spans) == [READ, PREDICT, "predict"]
    assert {trace_of(each) for each in spans.values()} == {TRACE}
    assert request.parent is not None and (f"{request.parent.span_id:016x}", request.parent.is_remote) == (PARENT, True)
    assert all(spans[phase].parent == request.context for phase in (READ, PREDICT))
    assert (request.kind, spans[READ].kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert request.attributes == {"model": "reviews", "http.response.status_code": 200}
    assert spans[READ].attributes == {"instances": 3}
    assert request.status.status_code == StatusCode.UNSET
    assert request.resource.attributes["service.name"] == "ray-orchestrator"


def test_requests_that_are_answered_at_a_time_do_not_mix(traced: Traced) -> None:
    async def request(number: int) -> None:
        with traced.tracer.span(f"request {number}", f"00-{number:032x}-{PARENT}-01"):
            await asyncio.sleep(0.001 * (5 - number))
            with traced.tracer.span(f"phase {number}"):
                await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(request(number) for number in range(1, 5)))

    asyncio.run(all_of_them())
    spans = traced.spans()
    for number in range(1, 5):
        assert trace_of(spans[f"request {number}"]) == trace_of(spans[f"phase {number}"]) == f"{number:032x}"
        assert spans[f"phase {number}"].parent == spans[f"request {number}"].context


@given(header=st.text() | st.from_regex(r"\A[0-9a-f]{2}-[0-9a-f]{30,34}-[0-9a-f]{14,18}-[0-9a-f]{1,3}.?\Z"))
@example(header="")
@example(header=f"00-{'0' * 32}-{PARENT}-01")
@example(header=f"00-{TRACE}-{'0' * 16}-01")
@example(header=f"ff-{TRACE}-{PARENT}-01")
@example(header=f"00-{TRACE}-{PARENT}-01-more")
@example(header=f"00-{TRACE.upper()}-{PARENT}-01")
@example(header=f"{HEADER}\n{HEADER}")
@example(header=f"01-{TRACE}-{PARENT}-01-{'x' * 300}")
@example(header=HEADER)
def test_only_a_well_formed_header_is_followed(header: str) -> None:
    context = traces._continued(header)
    fits = re.fullmatch(
        r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", header.strip(" \t")
    )
    if not fits or (fits[1] == "00" and fits[2]):
        assert context is None
    elif len(header) > 256:
        assert context is None, "nobody needs so long a one"
    else:
        assert context is not None
        assert f"{trace.get_current_span(context).get_span_context().trace_id:032x}" == header.strip(" \t")[3:35]


@pytest.mark.parametrize("header", [None, "garbage", "00-xyz"])
def test_without_a_clients_trace_one_begins(traced: Traced, header: str | None) -> None:
    with traced.tracer.span("predict", header):
        pass
    span = traced.spans()["predict"]
    assert span.parent is None and trace_of(span) != TRACE


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (ApiError(422, "invalid_request", "must be a text, but is 'my secret'"), "invalid_request", StatusCode.UNSET),
        (ApiError(503, "overloaded", "busy"), "overloaded", StatusCode.ERROR),
        (ValueError("my secret"), "ValueError", StatusCode.ERROR),
        (asyncio.CancelledError(), "CancelledError", StatusCode.UNSET),
    ],
)
def test_an_error_is_told_by_its_code_and_never_by_its_words(
    traced: Traced, error: BaseException, told: str, status: StatusCode
) -> None:
    with pytest.raises(type(error)), traced.tracer.span("predict", HEADER):
        raise error
    span = traced.spans()["predict"]
    assert (span.attributes, span.status.status_code) == ({"error.type": told}, status)
    assert "secret" not in span.to_json() and not span.events


def test_an_answer_from_500_on_is_a_failure_and_values_are_bounded(traced: Traced) -> None:
    with traced.tracer.span("predict") as span:
        span.set("route", "x" * 1_000)
        span.set("http.response.status_code", 503)
    span_ = traced.spans()["predict"]
    assert span_.status.status_code == StatusCode.ERROR
    assert span_.attributes is not None and span_.attributes["route"] == "x" * 128


def test_a_share_is_traced_but_clients_decide_for_their_own() -> None:
    traced = Traced(share=0.0)
    sampled, unsampled = HEADER, f"00-{TRACE}-{PARENT}-00"
    for name, header in (("none", None), ("asked for", sampled), ("declined", unsampled)):
        with traced.tracer.span(name, header):
            pass
    assert list(traced.spans()) == ["asked for"]


def test_a_collector_that_fails_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(InMemorySpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            raise ConnectionError("refused")

    failing = OpenTelemetry(Broken())
    with failing.span("predict") as span:
        span.set("instances", 1)
    failing.close()
    assert "Exception while exporting" in caplog.text


def test_nothing_is_traced_without_an_address() -> None:
    off = NoTracer()
    with off.span("predict", HEADER) as span, off.span(READ):
        span.set("instances", 3)
        assert not trace.get_current_span().get_span_context().is_valid
    with pytest.raises(ValueError, match="passes"), off.span("predict"):
        raise ValueError("passes")
    off.close()


@pytest.mark.parametrize(
    "given_", ["http://collector:4318", "http://collector:4318/", "http://collector:4318/v1/traces"]
)
def test_spans_go_to_the_collectors_path_for_traces(monkeypatch: pytest.MonkeyPatch, given_: str) -> None:
    asked: list[str] = []

    class Exporter(InMemorySpanExporter):
        def __init__(self, endpoint: str) -> None:
            super().__init__()
            asked.append(endpoint)

    monkeypatch.setattr(traces, "import_module", lambda name: SimpleNamespace(OTLPSpanExporter=Exporter))
    tracer(given_).close()
    assert asked == ["http://collector:4318/v1/traces"]


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", ""])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UserError, match="no address of a collector"):
        tracer(endpoint)


def test_without_the_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(traces, "import_module", missing)
    with pytest.raises(ServingFailed, match=r"ray-orchestrator\[trace\]"):
        tracer("http://127.0.0.1:4318")


def test_spans_arrive_at_a_collector_over_http() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        sending = tracer(f"http://127.0.0.1:{server.server_port}")
        with sending.span("POST", HEADER) as span:
            span.set("model", "reviews")
        sending.close()
        server.shutdown()
    (request,) = [ExportTraceServiceRequest.FromString(body) for body in received]
    (sent,) = request.resource_spans[0].scope_spans[0].spans
    assert (sent.name, sent.trace_id.hex(), sent.parent_span_id.hex()) == ("POST", TRACE, PARENT)
    assert [(each.key, each.value.string_value) for each in sent.attributes] == [("model", "reviews")]
