"""From rows to tensors: the batches of an epoch, and one worker's share of each in parts that pass the network together.

In: a prepared dataset, and where the run stands. Out: micro-batches to train on, inputs to validate on. Everything drawn by
chance follows from the seed and the position. Knows no network and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.augment import augment
from orchestrator.data.batches import evaluation_batches, mixed_seed, plan_epoch, share
from orchestrator.data.encoder import ENCODER, Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.recipe import Recipe
from orchestrator.training.folds import Fold, training_splits
from orchestrator.training.loop import Compute, MicroBatch, class_weights
from orchestrator.training.mixup import blend, plan_mixup
from orchestrator.training.state import Position

_ANY_ROW = np.zeros(1, np.int64)


class Feed:
    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        labels: tuple[str, ...],
        fold: Fold | None,
        compute: Compute,
        beat: Callable[[], None] = lambda: None,
        *,
        encoder: Encoder | None = None,
        answers: np.ndarray | None = None,
    ) -> None:
        """``folder``: of the prepared dataset; ``beat`` is called before each part. ``encoder``: what reads its rows, if not
        the dataset's own. ``answers``: a teacher's logits of the training rows, float32 [rows, classes]."""
        self.recipe, self.compute, self.beat, self.answers = recipe, compute, beat, answers
        self.encoder = encoder or load_encoder(folder / ENCODER)
        self.train, self.validation = training_splits(folder, fold)
        self._lengths, self._validation_lengths = (s.lengths(self.encoder) for s in (self.train, self.validation))
        self._class_weights = class_weights(recipe.training.class_weights, self.train.labels, labels)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch, each of row indices."""
        settings = self.recipe.training
        return plan_epoch(
            self._lengths, self.train.labels, batch_size=settings.batch_size, seed=self.recipe.seed, epoch=epoch,
            oversample=settings.oversample,
        )  # fmt: skip

    def weight(self, batch: np.ndarray) -> float:
        """Of all rows of a global batch together."""
        return float(self._class_weights[self.train.labels[batch]].sum())

    def micro_batches(self, batch: np.ndarray, at: Position, parts: int) -> Iterator[MicroBatch]:
        """This worker's rows of a global batch in so many parts, the same number of them on every worker."""
        partners, kept = plan_mixup(batch, self.recipe.training.mixup, self.recipe.seed, at.step)
        for part, mates in zip(self._dealt(batch, parts), self._dealt(partners, parts), strict=True):
            self.beat()
            idle = len(part) == 0
            micro_batch = self._micro_batch(_ANY_ROW if idle else part, at.epoch, idle=idle)
            if kept < 1.0:
                mixed_in = self._micro_batch(_ANY_ROW if idle else mates, at.epoch, idle=idle)
                micro_batch = blend(micro_batch, mixed_in, kept)
            yield micro_batch

    def _dealt(self, batch: np.ndarray, parts: int) -> list[np.ndarray]:
        return np.array_split(share(batch, self.compute.rank, self.compute.world), parts)

    def _micro_batch(self, rows: np.ndarray, epoch: int, *, idle: bool) -> MicroBatch:
        """An ``idle`` worker computes one row that weighs nothing."""
        labels = self.train.labels[rows]
        weights = np.zeros(1, np.float32) if idle else self._class_weights[labels]
        return MicroBatch(
            self._training_inputs(rows, epoch),
            torch.from_numpy(labels.astype(np.int64)).to(self.compute.device),
            torch.from_numpy(weights).to(self.compute.device),
            answers=None if self.answers is None else torch.from_numpy(self.answers[rows]).to(self.compute.device),
        )

    def _training_inputs(self, rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        """Images are augmented, each by its own seed."""
        table = self.train.inputs(rows)
        if not isinstance(self.encoder, ImageEncoder):
            return self._inputs(table)
        seeds = [mixed_seed(self.recipe.seed, epoch, int(row)) for row in rows]
        pixels = augment(self.encoder.pixels(table), self.recipe.training.augmentation, seeds)
        return self._on_device({"pixels": self.encoder.normalise(pixels)})

    def validation_batches(self, *, together: bool) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """This worker's validation rows and their inputs. ``together``: as many batches on every worker, for a network that
        computes together or not at all; rows that come twice have the same answers twice."""
        size, rank, world = self.recipe.evaluation.batch_size, self.compute.rank, self.compute.world
        shares = evaluation_batches(self._validation_lengths, size, rank, world)
        if together:
            most = len(evaluation_batches(self._validation_lengths, size, 0, world))
            shares += [_ANY_ROW] * (most - len(shares))
        for rows in shares:
            self.beat()
            yield rows, self._inputs(self.validation.inputs(rows))

    def _inputs(self, table: pa.Table) -> dict[str, torch.Tensor]:
        return self._on_device(self.encoder.collate(table))

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.compute.device, non_blocking=True) for name, tensor in inputs.items()}
