"""A record says how its model was trained; what a runtime computes is asked as it was exported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator import evaluate
from orchestrator.evaluate import EvaluateStage
from orchestrator.evaluation.on_ray import PredictJob


@pytest.mark.parametrize(
    ("precision", "form", "is_bf16"),
    [("bf16", None, True), ("fp32", None, False), ("bf16", "openvino-int8", False)],
)
def test_validation_rows_are_asked_in_the_format_of_the_training_but_of_a_compressed_model(
    precision: str, form: str | None, is_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PredictJob] = []
    job = PredictJob("/nowhere", "model", "dataset", "validation", 8, "cpu")

    def predict(job: PredictJob, *_: Any) -> np.ndarray:
        asked.append(job)
        return np.zeros((1, 2))

    monkeypatch.setattr(evaluate, "predict_split", predict)
    monkeypatch.setattr(EvaluateStage, "_job", lambda *_: (job, None))
    stage: Any = object.__new__(EvaluateStage)
    object.__setattr__(stage, "report", None)
    model = SimpleNamespace(precision=precision, form=form, model_location="model")
    dataset = SimpleNamespace(splits={"validation": SimpleNamespace(rows=1)})
    stage.validated(model, dataset, SimpleNamespace(workers=1, cpus_per_worker=1))
    assert [job.bf16 for job in asked] == [is_bf16]
