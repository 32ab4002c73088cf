"""An endpoint that answers otherwise than the model did when it was evaluated is found out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from orchestrator.errors import ServingFailed
from orchestrator.serving import known_answers
from orchestrator.serving.address import Endpoint
from orchestrator.serving.known_answers import check_known_answers, over_http

KNOWN = [{"input": f"text {n}", "scores": {"good": n / 31, "bad": 1 - n / 31}} for n in range(32)]
SCORES = {row["input"]: row["scores"] for row in KNOWN}


@contextmanager
def endpoint(answer: Callable[[list[Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v2/models/reviews/versions/3/infer", "no other version may answer for it"
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            (tensor,) = body["inputs"]
            assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("text", "BYTES", [len(tensor["data"])])
            status, values = answer(tensor["data"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def predictions(inputs: list[Any], wrong: int = 0) -> tuple[int, dict[str, Any]]:
    """As evaluated, but for the first rows of all, whose scores are swapped."""
    answers = []
    for given in inputs:
        scores = dict(SCORES[given])
        if int(given.split()[1]) < wrong:
            scores = {"good": scores["bad"], "bad": scores["good"]}
        answers.append((max(scores, key=lambda label: scores[label]), scores))
    outputs = {"label": [label for label, _ in answers],
               "probabilities": [score for _, scores in answers for score in (scores["bad"], scores["good"])]}  # fmt: skip
    told = [{"name": name, "data": data} for name, data in outputs.items()]
    return 200, {"parameters": {"labels": ["bad", "good"]}, "outputs": told}


def test_the_same_answers_pass_in_requests_that_are_not_too_large() -> None:
    sizes: list[int] = []

    def answer(inputs: list[Any]) -> tuple[int, dict[str, Any]]:
        sizes.append(len(inputs))
        return predictions(inputs)

    with endpoint(answer) as url:
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 12)
    assert sizes == [12, 12, 8]


def test_a_few_other_labels_are_rounding_and_more_are_not() -> None:
    with endpoint(lambda inputs: predictions(inputs, wrong=2)) as url:
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)
    told = r"3 of 32 labels differ, the largest difference of a probability is 1\b"
    with endpoint(lambda inputs: predictions(inputs, wrong=3)) as url, pytest.raises(ServingFailed, match=told):
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)


def test_an_image_is_sent_as_base64_and_a_version_that_is_not_known_yet_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_answers, "_POLL_S", 0.01)
    assert known_answers._request([{"b64": "AAAA"}])["inputs"][0] == {
        "name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}  # fmt: skip
    asked: list[int] = []

    def answer(inputs: list[Any]) -> tuple[int, dict[str, Any]]:
        asked.append(len(inputs))
        return (404, {}) if len(asked) == 1 else predictions(inputs)

    with endpoint(answer) as url:
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)
    assert len(asked) == 2


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answers, "_POLL_S", 0.01)
    asked: list[int] = []

    def busy(inputs: list[Any]) -> tuple[int, dict[str, Any]]:
        asked.append(len(inputs))
        return (503, {}) if len(asked) == 1 else predictions(inputs)

    with endpoint(busy) as url:
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)
    assert len(asked) == 2
    told = r"refuses rows that reviews was evaluated on: .*too long"
    refusal = 422, {"error": {"message": "too long"}}
    with endpoint(lambda inputs: refusal) as url, pytest.raises(ServingFailed, match=told):
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)


@pytest.mark.parametrize(
    "given",
    [{}, [], {"outputs": []}, {"parameters": {"labels": ["good"]}, "outputs": [{"name": "label", "data": ["good"]}]}],
)
def test_what_is_no_prediction_is_said_to_be_none(given: Any) -> None:
    told = "are no predictions of reviews"
    with endpoint(lambda inputs: (200, given)) as url, pytest.raises(ServingFailed, match=told):
        check_known_answers(over_http(Endpoint(url), "reviews", 3), "reviews", KNOWN, 32)


def test_versions_without_known_answers_are_not_asked() -> None:
    check_known_answers(over_http(Endpoint("http://127.0.0.1:9"), "reviews", 3), "reviews", [], 8)
