"""One student, some forms."""

from typing import Any

import pytest

from orchestrator.compression.presets import FORM
from orchestrator.families import Families
from orchestrator.recipe import Recipe
from orchestrator.records import TrialRecord

RECIPE = Recipe.model_validate({
    "name": "r", "task": "text_classification", "data": {"source": "x.csv"}, "compression": {"trials": 9},
})  # fmt: skip
FORMS = ("torch-fp32", "openvino-int8", "onnxruntime-int8", "openvino-bf16")
ROWS = 500


def point(form: str, layers: float = 1.0) -> dict[str, Any]:
    return {"compression.layers": layers, FORM: form}


def ended(values: dict[str, Any], *, outside: float = -1.0, state: str = "complete", **metrics: float) -> TrialRecord:
    return TrialRecord(number=0, state=state, parameters=values, metrics=metrics, violations=(outside,), location="t/0")


@pytest.fixture
def made() -> set[str]:
    return set()


@pytest.fixture
def families(made: set[str]) -> Families:
    return Families(RECIPE, FORMS, "latency_ms", ROWS, made.__contains__)


def test_candidates_that_differ_in_their_form_alone_have_one_name(families: Families) -> None:
    assert families.name(point("torch-fp32", 0.5)) == families.name(point("openvino-int8", 0.5))
    assert families.name(point("torch-fp32", 0.5)) != families.name(point("torch-fp32", 0.34))


def test_the_whole_network_has_no_student_so_that_nobody_waits(families: Families) -> None:
    assert families.name(point("torch-fp32")) != families.name(point("openvino-int8"))


def test_a_student_is_tried_in_the_forms_that_were_best_for_the_whole_network(
    families: Families, made: set[str]
) -> None:
    assert families.after(ended(point("openvino-int8"), outside=0.1, latency_ms=5.0)) == []
    assert families.after(ended(point("onnxruntime-int8"), latency_ms=7.0)) == []
    assert families.after(ended(point("openvino-bf16"), latency_ms=6.0)) == []
    student = ended(point("torch-fp32", 0.5), latency_ms=3.0, rows=ROWS)
    assert families.after(student) == [], "it was not made"
    made.add(families.name(student.parameters))
    assert families.after(student) == [point("openvino-bf16", 0.5), point("onnxruntime-int8", 0.5)], (
        "what is outside of the limits comes after what is not"
    )
    assert families.after(ended(point("openvino-bf16", 0.5), latency_ms=3.0, rows=ROWS)) == [], "once is enough"


def test_a_form_that_fails_says_nothing_of_the_others_but_a_hopeless_student_does(
    families: Families, made: set[str]
) -> None:
    made.update(families.name(point("torch-fp32", layers)) for layers in (0.5, 0.34))
    assert families.after(ended(point("torch-fp32", 0.5), latency_ms=1.0, rows=200.0)) == []
    assert len(families.after(ended(point("torch-fp32", 0.34), state="failed"))) == 2
