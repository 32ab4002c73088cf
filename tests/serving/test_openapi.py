"""The endpoint does what ``/openapi.json`` says: schemathesis makes requests from it, and holds every answer against it.

Statuses, content types, the shape of each answer, methods that are not declared, and data that the description forbids. What a
body can be beyond that, and images that are none, is tests/serving/test_hostile.py's.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_gateway import LABELS, Fake

from orchestrator.serving.binary_tensors import JSON_LENGTH
from orchestrator.serving.contract import Explained, ExplainRequest, Input, Limits
from orchestrator.serving.gateway import build_app
from orchestrator.storage import Storage

load_all_checks()


class Whole(Fake):
    """Explains as a replica does, and has no limit that a generated body would meet."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        limits = Limits(max_instances=100, max_body_bytes=1_000_000, request_timeout_s=5.0)
        self.infos = {name: info.model_copy(update={"limits": limits}) for name, info in self.infos.items()}

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        explanation = {"label": asked.label or "good", "score": 0.75, "baseline_score": 0.5, "method": "occlusion",
                       "parts": [{"text": "a", "start": 0, "end": 1, "weight": 0.25}], "heatmap": None}  # fmt: skip
        return Explained(version="3", explanation=explanation)

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        pass


app = build_app(Whole(Storage(tempfile.gettempdir())))
api = schemathesis.openapi.from_asgi("/openapi.json", app)
api.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
WHERE = {"name": ("reviews", "digits"), "version": ("3", "3")}


def sensible(case: Case, location: ParameterLocation) -> bool:
    """Whether it is not meant to be wrong there."""
    part = case.meta.components.get(location) if case.meta else None
    return part is None or part.mode.is_positive


def lead(case: Case) -> None:
    """To the models there are, most of the time: made up names and labels are refused, and no more is seen of the route."""
    chance = random.Random(repr(case.body) + repr(case.path_parameters))
    if case.path_parameters and sensible(case, ParameterLocation.PATH) and chance.random() < 0.9:
        model = chance.randrange(2)
        case.path_parameters = {name: WHERE[name][model] for name in case.path_parameters}
    if case.media_type == "application/json" and sensible(case, ParameterLocation.HEADER):
        case.headers.pop(JSON_LENGTH, None)  # with it, any bytes are an image
    body = case.body
    if sensible(case, ParameterLocation.BODY) and isinstance(body, dict) and chance.random() < 0.9:
        if isinstance(body.get("label"), str):
            body["label"] = chance.choice(LABELS)
        for tensor in body.get("inputs", []):
            tensor["shape"] = [len(tensor.get("data") or [0])]


def check(case: Case) -> None:
    lead(case)
    # Which labels a model has, and whether it takes texts or images, is nothing a schema can say of all models.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


quiet = settings(database=None, suppress_health_check=list(HealthCheck))


@api.parametrize()
@settings(quiet, max_examples=40, derandomize=True)
def test_every_route_does_what_is_said_of_it(case: Case) -> None:
    check(case)


@pytest.mark.slow
@api.parametrize()
@settings(quiet, max_examples=1_000)
def test_every_route_does_what_is_said_of_it_ten_thousand_times(case: Case) -> None:
    check(case)
