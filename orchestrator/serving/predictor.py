"""From raw inputs to probabilities, with a saved model. No HTTP, no Ray: the endpoint and offline callers share it.

What shares a batch decides how far texts are padded, and padding changes the order of floating-point sums: the same
input alone and in a batch agree to about 1e-7, not to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image

from orchestrator.models.checkpoint import SavedModel, load_model
from orchestrator.serving.contract import Input
from orchestrator.tasks import TASKS


@dataclass(frozen=True)
class Prediction:
    """Either probabilities, one per label and in the labels' order, or the reason why the input has none."""

    probabilities: list[float] | None = None
    error: str | None = None


class Predictor:
    """A saved model that takes any number of raw inputs."""

    def __init__(self, model: SavedModel, max_batch_size: int = 32) -> None:
        """``max_batch_size``: rows per forward pass."""
        self.model, self.max_batch_size = model, max_batch_size
        self.task = TASKS[model.task]

    @classmethod
    def from_folder(cls, path: Path, device: str = "cpu", max_batch_size: int = 32) -> Self:
        """Raises IntegrityError when a file of the model is not the one that was saved."""
        return cls(load_model(path, device=device), max_batch_size)

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """One prediction per input, in the inputs' order. An unreadable input spoils no other."""
        if not inputs:
            return []
        encoded = self.model.encoder.encode(inputs)
        unreadable = {broken.index: broken.reason for broken in encoded.unreadable}
        rows = iter(self._probabilities(pa.table(encoded.columns)))
        return [
            Prediction(error=unreadable[index]) if index in unreadable else _prediction(next(rows))
            for index in range(len(inputs))
        ]

    def answer(self, prediction: Prediction) -> dict[str, Any]:
        """What a client gets for a readable input: label and scores."""
        return self.task.answer(prediction.probabilities or [], self.model.labels)

    def warm_up(self) -> None:
        """Run one input and one full batch, so that the first request finds memory and kernels ready."""
        sample = self.sample()
        for size in {1, self.max_batch_size}:
            self.predict([sample] * size)

    def sample(self) -> Input:
        """A harmless input of the model's kind."""
        if self.model.encoder.kind == "text":
            return "a text to warm up with"
        image = BytesIO()
        Image.new("RGB", (64, 64), "gray").save(image, "PNG")
        return image.getvalue()

    def _probabilities(self, table: pa.Table) -> np.ndarray:
        """Rows of similar length are computed together: less padding."""
        result = np.empty((table.num_rows, len(self.model.labels)), np.float32)
        order = np.argsort(self.model.encoder.lengths(table), kind="stable")
        for start in range(0, table.num_rows, self.max_batch_size):
            rows = order[start : start + self.max_batch_size]
            result[rows] = self.model.probabilities(table.take(rows))
        return result


def _prediction(probabilities: np.ndarray) -> Prediction:
    values = [float(value) for value in probabilities]
    if not all(map(math.isfinite, values)):
        return Prediction(error="makes the model answer a number that is not finite")
    return Prediction(values)
