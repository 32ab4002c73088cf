"""The rows that a compression looks at: training rows to calibrate and to find out what matters, validation rows to judge by.

In: a prepared dataset and the encoder saved with the model. Out: collated batches, labels, raw inputs. Never the test rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.batches import evaluation_batches
from orchestrator.data.dataset import Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.evaluation.predictions import picture_of
from orchestrator.models.checkpoint import SavedModel

_IMPORTANCE_BATCH = 32
_COUNTED_ROWS = 10_000
_TOKENS = "input_ids"


class Rows:
    def __init__(self, folder: Path, seed: int) -> None:
        """``folder``: of the prepared dataset. ``seed``: which rows are drawn where not all are looked at."""
        self.train, self.validation, self.seed = Split(folder, "train"), Split(folder, "validation"), seed

    def some(self, split: Split, count: int) -> np.ndarray:
        """So many rows of the split at most, the same ones each time: int64."""
        drawn = np.random.default_rng(self.seed).permutation(len(split))[:count]
        return np.sort(drawn)

    def calibration(self, encoder: Encoder, count: int) -> list[dict[str, torch.Tensor]]:
        """Training rows as a network takes them, of similar length together."""
        return [inputs for inputs, _ in self.labelled(encoder, count)]

    def labelled(self, encoder: Encoder, count: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The same, each batch with its labels, int64 [batch]."""
        rows = self.some(self.train, count)
        lengths = self.train.lengths(encoder)[rows]
        for batch in evaluation_batches(lengths, _IMPORTANCE_BATCH):
            mine = rows[batch]
            labels = torch.from_numpy(self.train.labels[mine].astype(np.int64))
            yield encoder.collate(self.train.inputs(mine)), labels

    def tokens(self) -> Iterator[torch.Tensor]:
        """Those of all training rows, in parts: int64 [any]. Nothing for images."""
        for rows in np.array_split(np.arange(len(self.train)), math.ceil(len(self.train) / _COUNTED_ROWS)):
            inputs = self.train.inputs(rows)
            if _TOKENS in inputs.column_names:
                yield torch.from_numpy(inputs[_TOKENS].combine_chunks().flatten().to_numpy().astype(np.int64))

    def raw(self, encoder: Encoder, count: int) -> list[Any]:
        """Validation inputs as they come in: texts, or PNGs of the network's size."""
        rows = self.some(self.validation, count)
        if isinstance(encoder, ImageEncoder):
            return [picture_of(self.validation, int(row), encoder.image_size) for row in rows]
        return list(self.validation.column("raw", rows).to_pylist())

    def training_logits(self, model: SavedModel, batch_size: int) -> np.ndarray:
        """What the network says of all training rows, in their order: float32 [rows, classes]."""
        result = np.zeros((len(self.train), len(model.labels)), np.float32)
        with torch.inference_mode():
            for batch in evaluation_batches(self.train.lengths(model.encoder), batch_size):
                inputs = model.encoder.collate(self.train.inputs(batch))
                logits = model.network(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
                result[batch] = logits.float().cpu().numpy()
        return result

    def answers(self, model: SavedModel, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """The model's probabilities [rows, classes] of these validation rows, in their order."""
        lengths = self.validation.lengths(model.encoder)[rows]
        result = np.zeros((len(rows), len(model.labels)), np.float32)
        for batch in evaluation_batches(lengths, batch_size):
            result[batch] = model.probabilities(self.validation.inputs(rows[batch]))
        return result
