"""What is told of requests: lines in the log, spans, metrics; and what never is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from test_gateway import Client, Fake

from orchestrator.serving import logs
from orchestrator.serving.access import Keys, create_key
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.traces import PREDICT, READ, OpenTelemetry
from orchestrator.storage import Storage

TRACE = "0af7651916cd43dd8448eb211c80319c"
SECRET = "my secret diary"


class Observed(Client):
    """A gateway whose log and spans are looked at."""

    def __init__(self, root: Path) -> None:
        self.fake, self.stream, self.exporter = Fake(Storage(str(root))), io.StringIO(), InMemorySpanExporter()
        self.tracer, self.metrics = OpenTelemetry(self.exporter), Metrics()
        self.outlet = logs.configure("INFO", self.stream)
        super().__init__(self.fake, metrics=self.metrics, tracer=self.tracer, is_logged=True)

    def texts(self, *texts: str, **more: Any) -> httpx.Response:
        return self.predict(texts, **more)

    def told(self) -> list[dict[str, Any]]:
        """Lines of the log so far."""
        logs.stop(self.outlet)
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def spans(self) -> dict[str, ReadableSpan]:
        self.tracer._provider.force_flush()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Observed]:
    observed = Observed(tmp_path)
    yield observed
    logs.stop(observed.outlet)
    observed.tracer.close()


def test_a_line_for_each_request_with_its_id(seen: Observed) -> None:
    response = seen.texts("a", "b", headers={"x-request-id": "mine-1"})
    seen.texts("overload")
    seen("GET", "/nowhere")
    good, bad, lost = seen.told()
    assert good["request_id"] == response.headers["x-request-id"] == "mine-1"
    assert (good["model"], good["version"], good["route"], good["status"]) == ("reviews", "3", "predict", 200)
    assert (good["instances"], good["batch_size"], good["error"], good["level"]) == (2, 2, "", "INFO")
    assert good["bytes_in"] == len(response.request.content) and 0 < good["ms"] < 1000
    assert (bad["status"], bad["error"], bad["level"]) == (503, "overloaded", "WARNING")
    assert (lost["status"], lost["error"], lost["route"]) == (404, "not_found", "other")


def test_neither_inputs_nor_keys_are_told(seen: Observed, tmp_path: Path) -> None:
    keys = Keys(seen.fake.storage)
    key, text = create_key(seen.fake.storage, "shop")
    keys.refresh()
    seen.fake.locks["reviews"] = keys
    headers = {"authorization": f"Bearer {text}", "cookie": SECRET, "traceparent": SECRET}
    assert seen.texts(SECRET, headers=headers).status_code == 200
    assert seen.texts(SECRET, "fail", headers=headers, params={"q": SECRET}).status_code == 500
    assert seen(
        "POST", "/v1/models/reviews:predict", content=f'{{"instances": ["{SECRET}"', headers=headers
    ).is_client_error
    assert seen.texts(SECRET, headers={"x-api-key": text[:-1]}).status_code == 401
    lines = seen.told()
    assert [line["status"] for line in lines if "status" in line] == [200, 500, 400, 401]
    assert [line["key_id"] for line in lines if "status" in line] == [key.id, key.id, key.id, ""]
    spans = "".join(span.to_json() for span in seen.exporter.get_finished_spans())
    for kept in (seen.stream.getvalue(), spans):
        assert SECRET not in kept and text.rpartition("_")[2] not in kept


def test_a_request_is_a_span_of_the_clients_trace_with_its_phases(seen: Observed) -> None:
    seen.texts("a", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    spans = seen.spans()
    request, phases = spans["POST"], [spans[READ], spans[PREDICT]]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert all(phase.parent == request.context for phase in phases)
    told = dict(request.attributes or {})
    assert (told["model"], told["version"], told["route"], told["instances"]) == ("reviews", "3", "predict", 1)
    assert told["http.response.status_code"] == 200 and request.status.status_code == StatusCode.UNSET


@pytest.mark.parametrize(("text", "status", "failed"), [("overload", 503, True), ("fail", 500, True), ("", 200, False)])
def test_a_span_fails_where_the_endpoint_did(seen: Observed, text: str, status: int, failed: bool) -> None:
    assert seen.texts(text).status_code == status
    assert (seen.spans()["POST"].status.status_code == StatusCode.ERROR) == failed


def test_what_a_replica_tells_is_counted(seen: Observed) -> None:
    for _ in range(3):
        seen.texts("a", "b")
    text = seen.metrics.text().decode()
    assert 'orchestrator_instances_total{arm="stable",model="reviews",version="3"} 6.0' in text
    assert 'orchestrator_queue_seconds_count{model="reviews"} 3.0' in text
    assert 'orchestrator_cache_hits_total{model="reviews"}' not in text, "nothing came from memory"


def test_no_line_is_written_unless_it_is_asked_for(tmp_path: Path) -> None:
    stream = io.StringIO()
    outlet = logs.configure("INFO", stream)
    assert Client(Fake(Storage(str(tmp_path))))("GET", "/v1/models").status_code == 200
    logs.stop(outlet)
    assert stream.getvalue() == ""
