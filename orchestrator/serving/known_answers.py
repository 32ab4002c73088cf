"""Whether an endpoint answers as the model did when it was evaluated: some test rows are sent to it as any client would.

In: the endpoint, and the rows with their probabilities as evaluation wrote them. Out: nothing, or an error. What is
compared is the whole way: registered files, the replica's runtime and threads, encoding, batches, HTTP.
"""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from typing import Any

from orchestrator.errors import ServingFailed
from orchestrator.serving.address import Endpoint

Ask = Callable[[list[Any]], list[dict[str, Any]]]
_ALLOWED = 1 / 16
"""Share of the labels. Numbers of int8 depend on what else is in a batch, and turn what is nearly undecided."""
_PATIENCE_S, _TIMEOUT_S, _POLL_S = 30.0, 60.0, 0.5


def check_known_answers(ask: Ask, name: str, known: Sequence[Mapping[str, Any]], at_once: int) -> None:
    """``known``: as ``evaluation.predictions.read_samples`` gives them. ``at_once``: inputs per request, at most.

    Raises ServingFailed: more than a sixteenth of the labels differ, or what is answered are no predictions.
    """
    wrong, largest = 0, 0.0
    for start in range(0, len(known), at_once):
        part = known[start : start + at_once]
        try:
            for row, answer in zip(part, ask([row["input"] for row in part]), strict=True):
                scores: Mapping[str, float] = row["scores"]
                largest = max(largest, *(abs(answer["scores"][label] - score) for label, score in scores.items()))
                wrong += answer["label"] != max(scores, key=lambda label: scores[label])
        except (KeyError, TypeError, ValueError, HTTPException) as error:
            raise ServingFailed(
                f"what it answers are no predictions of {name} ({type(error).__name__}: {error})",
                "see Serve's logs, and whether something else listens there",
            ) from None
    if wrong > _ALLOWED * len(known):
        raise ServingFailed(
            f"{name} does not answer as it did when it was evaluated: {wrong} of {len(known)} labels differ, "
            f"the largest difference of a probability is {largest:.3g}",
            "its runtime computes differently on this machine: choose another compression.form, or an earlier version",
        )


def over_http(endpoint: Endpoint, name: str, version: int) -> Ask:
    """As any client would that names the version, so that no other answers for it in a rollout; an endpoint that is busy, or
    that does not know the version yet, is asked again."""
    return partial(_ask, endpoint, name, version)


def _ask(endpoint: Endpoint, name: str, version: int, inputs: list[Any]) -> list[dict[str, Any]]:
    """Predictions in the inputs' order. Raises ServingFailed where the endpoint refuses them."""
    path, body = f"/v2/models/{name}/versions/{version}/infer", json.dumps(_request(inputs)).encode()
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with endpoint.open(path, body, _TIMEOUT_S) as answer:
                return _predictions(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code not in {404, 503} or time.monotonic() >= deadline:
                told = error.read(2000).decode(errors="replace")
                raise ServingFailed(
                    f"{endpoint.url} refuses rows that {name} was evaluated on: {told}", "see Serve's logs"
                ) from None
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ServingFailed(f"{endpoint.url} does not answer ({error})", "see Serve's logs") from None
        time.sleep(_POLL_S)


def _request(inputs: list[Any]) -> dict[str, Any]:
    """In the Open Inference Protocol."""
    kind = "text" if isinstance(inputs[0], str) else "image"
    data = [given if isinstance(given, str) else given["b64"] for given in inputs]
    return {"inputs": [{"name": kind, "shape": [len(data)], "datatype": "BYTES", "data": data}]}


def _predictions(answer: dict[str, Any]) -> list[dict[str, Any]]:
    columns, outputs = answer["parameters"]["labels"], {each["name"]: each["data"] for each in answer["outputs"]}
    flat = outputs["probabilities"]
    rows = [flat[start : start + len(columns)] for start in range(0, len(flat), len(columns))]
    return [
        {"label": label, "scores": dict(zip(columns, row, strict=True))}
        for label, row in zip(outputs["label"], rows, strict=True)
    ]
