"""What computes a model while it is served, and in which numbers: torch as it was saved, torch in bf16, or OpenVINO.

In: a loaded model, what the recipe wants, and inputs whose answers matter. Out: the model, or another form of it that answers
alike and takes less time. What was compressed for a runtime stays as it was exported. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import RuntimeNetwork
from orchestrator.recipe_serving import Serving
from orchestrator.serving.contract import Input
from orchestrator.serving.converted import converted
from orchestrator.serving.predictor import Predictor

_LARGEST_DIFFERENCE = 0.01
"""Of a probability."""
_WORTH_IT = 1.1
_SLOW_S = 0.004
"""What takes less is not worth converting: HTTP takes as long."""
_ROWS, _ROUNDS = 8, 5


def settled(predictor: Predictor, settings: Serving, known: Sequence[Input], folder: Path | None = None) -> Predictor:
    """The fastest of the forms that ``settings.precision`` and ``settings.runtime`` allow, if it takes a tenth less time for a
    batch than the model as it was saved, gives all ``known`` inputs the same label and moves no probability by more than 0.01.
    ``folder``: of the model, for what is kept of it; None: torch computes it."""
    if isinstance(predictor.model.network, RuntimeNetwork):
        return predictor
    inputs = list(known) or [predictor.sample()]
    saved = predictor if settings.precision != "bf16" else _in_bf16(predictor)
    candidates = [saved]
    if settings.precision == "auto" and has_bf16(predictor.model.device):
        candidates.append(_in_bf16(predictor))
    if folder is not None and settings.runtime == "auto" and _seconds(saved, inputs[:1]) > _SLOW_S:
        other = converted(predictor.model, folder, settings.precision, inputs)
        candidates += [Predictor(other, predictor.max_batch_size)] if other else []
    agreeing = [saved, *(other for other in candidates[1:] if _agree(predictor, other, inputs))]
    return _fastest(agreeing, inputs)


def _in_bf16(predictor: Predictor) -> Predictor:
    model = predictor.model.in_bf16()
    unchanged = model.network is predictor.model.network  # an ensemble of what runtimes compute
    return predictor if unchanged else Predictor(model, predictor.max_batch_size)


def _agree(one: Predictor, other: Predictor, inputs: Sequence[Input]) -> bool:
    for before, after in zip(one.predict(inputs), other.predict(inputs), strict=True):
        if before.probabilities is None or after.probabilities is None:
            if before.error != after.error:
                return False
            continue
        old, new = np.array(before.probabilities), np.array(after.probabilities)
        if old.argmax() != new.argmax() or np.abs(old - new).max() > _LARGEST_DIFFERENCE:
            return False
    return True


def _fastest(predictors: Sequence[Predictor], inputs: Sequence[Input]) -> Predictor:
    """The first one, unless another is worth it. In turns, so that what else the machine does hits all."""
    first = predictors[0]
    if len(predictors) == 1:
        return first
    batch = (list(inputs) * _ROWS)[:_ROWS]
    taken = [[_seconds(predictor, batch, 1) for predictor in predictors] for _ in range(_ROUNDS)]
    medians = [statistics.median(times) for times in zip(*taken, strict=True)]
    best = min(range(len(predictors)), key=medians.__getitem__)
    return predictors[best] if medians[0] >= _WORTH_IT * medians[best] else first


def _seconds(predictor: Predictor, inputs: Sequence[Input], times: int = 3) -> float:
    """The shortest of so many times."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        predictor.predict(inputs)
        taken.append(time.perf_counter() - began)
    return min(taken)
