"""From raw inputs to probabilities, with a saved model. No HTTP, no Ray: the endpoint and offline callers share it.

What shares a batch decides how far texts are padded, and padding changes the order of floating-point sums: the same
input alone and in a batch agree to about 1e-7, not to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from orchestrator.data.images import MAX_PIXELS, ImageEncoder
from orchestrator.models.checkpoint import SavedModel, load_model
from orchestrator.models.runtimes import RuntimeNetwork
from orchestrator.serving.contract import Input
from orchestrator.serving.packing import packed, price_of_a_pass
from orchestrator.tasks import TASKS

_PASS_TOKENS = 40.0
"""Until it is measured: of a small transformer on a core."""
_MEASURED = 3


@dataclass(frozen=True)
class Prediction:
    """Either probabilities, one per label and in the labels' order, or the reason why the input has none."""

    probabilities: list[float] | None = None
    error: str | None = None
    tokens: int = 0
    """Of a text, as far as the model reads it; 0 for an image."""


class Predictor:
    """A saved model that takes any number of raw inputs."""

    def __init__(self, model: SavedModel, max_batch_size: int = 32) -> None:
        """``max_batch_size``: rows per forward pass."""
        self.model, self.max_batch_size = model, max_batch_size
        arranged = isinstance(model.network, RuntimeNetwork) and model.network.arranges_rows
        self.is_packed = model.encoder.kind == "text" and not arranged  # images are all of one size
        self.pass_tokens = _PASS_TOKENS if self.is_packed else math.inf
        self.task = TASKS[model.task]

    @classmethod
    def from_folder(
        cls, path: Path, device: str = "cpu", max_batch_size: int = 32, max_pixels: int = MAX_PIXELS
    ) -> Self:
        """``max_pixels``: of an image; larger ones are unreadable. Images are decoded by as many threads as torch computes
        with. Raises IntegrityError when a file of the model is not the one that was saved."""
        model = load_model(path, device=device)
        if isinstance(model.encoder, ImageEncoder):
            model.encoder.max_pixels, model.encoder.threads = max_pixels, torch.get_num_threads()
        return cls(model, max_batch_size)

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """One prediction per input, in the inputs' order. An unreadable input spoils no other."""
        if not inputs:
            return []
        encoded = self.model.encoder.encode(inputs)
        unreadable = {broken.index: broken.reason for broken in encoded.unreadable}
        table = pa.table(encoded.columns)
        rows = zip(self.probabilities(table), self._tokens(table), strict=True)
        return [
            Prediction(error=unreadable[index]) if index in unreadable else _prediction(*next(rows))
            for index in range(len(inputs))
        ]

    def _tokens(self, table: pa.Table) -> list[int]:
        if self.model.encoder.kind != "text":
            return [0] * table.num_rows
        lengths: list[int] = self.model.encoder.lengths(table).tolist()
        return lengths

    def answer(self, prediction: Prediction) -> dict[str, Any]:
        """What a client gets for a readable input: label and scores."""
        return self.task.answer(prediction.probabilities or [], self.model.labels)

    def warm_up(self) -> None:
        """Run one input and one full batch, so that the first request finds memory and kernels ready, and learn from it what a
        pass costs by itself."""
        sample = self.sample()
        self.predict([sample])
        if self.max_batch_size > 1:
            self.predict([sample] * self.max_batch_size)
        if self.max_batch_size > 1 and self.is_packed:
            one_s, many_s = (
                min(self._seconds(sample, size) for _ in range(_MEASURED)) for size in (1, self.max_batch_size)
            )
            length = int(self.model.encoder.lengths(pa.table(self.model.encoder.encode([sample]).columns))[0])
            self.pass_tokens = price_of_a_pass(one_s, many_s, self.max_batch_size, length)

    def _seconds(self, sample: Input, rows: int) -> float:
        began = time.perf_counter()
        self.predict([sample] * rows)
        return time.perf_counter() - began

    def sample(self) -> Input:
        """A harmless input of the model's kind."""
        if self.model.encoder.kind == "text":
            return "a text to warm up with"
        image = BytesIO()
        Image.new("RGB", (64, 64), "gray").save(image, "PNG")
        return image.getvalue()

    def probabilities(self, table: pa.Table) -> np.ndarray:
        """Encoded rows -> float32 [rows, labels]. Rows of similar length go together: less padding."""
        lengths = self.model.encoder.lengths(table).tolist()
        result = np.empty((table.num_rows, len(self.model.labels)), np.float32)
        for rows in packed(lengths, self.max_batch_size, self.pass_tokens):
            result[rows] = self.model.probabilities(table.take(rows))
        return result


def _prediction(probabilities: np.ndarray, tokens: int) -> Prediction:
    values = [float(value) for value in probabilities]
    if not all(map(math.isfinite, values)):
        return Prediction(error="makes the model answer a number that is not finite", tokens=tokens)
    return Prediction(values, tokens=tokens)
