"""What a model that torch computes multiplies in while it is served.

In: a loaded model, what the recipe wants, and inputs whose answers matter. Out: the model, or a copy of it in bf16. Knows
neither Ray nor HTTP.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import RuntimeNetwork
from orchestrator.recipe_serving import Precision
from orchestrator.serving.contract import Input
from orchestrator.serving.predictor import Predictor

_LARGEST_DIFFERENCE = 0.01
"""Of a probability."""
_WORTH_IT = 1.2
_ROWS, _ROUNDS = 8, 3


def settled(predictor: Predictor, wanted: Precision, known: Sequence[Input]) -> Predictor:
    """``auto``: bf16 where the hardware multiplies it, all ``known`` inputs keep their labels, no probability moves by more
    than 0.01, and a batch takes at least a sixth less time. What a runtime computes stays as it was exported."""
    model = predictor.model
    if wanted == "fp32" or isinstance(model.network, RuntimeNetwork):
        return predictor
    if wanted == "auto" and not has_bf16(model.device):
        return predictor
    candidate = Predictor(model.in_bf16(), predictor.max_batch_size)
    if candidate.model.network is model.network:  # an ensemble of what runtimes compute
        return predictor
    inputs = list(known) or [predictor.sample()]
    if wanted == "bf16" or (_agree(predictor, candidate, inputs) and _is_worth_it(predictor, candidate, inputs)):
        return candidate
    return predictor


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


def _is_worth_it(one: Predictor, other: Predictor, inputs: Sequence[Input]) -> bool:
    """Both in turns, so that what else the machine does hits both."""
    batch = (list(inputs) * _ROWS)[:_ROWS]
    taken: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(_ROUNDS):
        for number, predictor in enumerate((one, other)):
            began = time.perf_counter()
            predictor.predict(batch)
            taken[number].append(time.perf_counter() - began)
    return statistics.median(taken[0]) >= _WORTH_IT * statistics.median(taken[1])
