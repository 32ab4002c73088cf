"""What one worker does from start to end: load, resume, step, validate, checkpoint.

In: a ``TrainJob`` (plain data, crosses processes) and this process's place among the workers. Out: the run's folder: the
best epoch's model, checkpoints, metrics. Runs alone as well as among many; knows no Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import distributed, nn

from orchestrator.data.augment import augment
from orchestrator.data.batches import evaluation_batches, plan_epoch, share
from orchestrator.data.dataset import Split
from orchestrator.data.encoders import load_encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.errors import TrainingFailed
from orchestrator.evaluation.metrics import summary
from orchestrator.models.checkpoint import save_model
from orchestrator.progress import Event
from orchestrator.recipe import Recipe
from orchestrator.storage import METRICS, MODEL, TENSORBOARD, Storage
from orchestrator.tasks import TASKS
from orchestrator.training.loop import Compute, MicroBatch, predict, train_step
from orchestrator.training.metrics_log import MetricsLog
from orchestrator.training.optim import build_optimizer, schedule_factor, set_learning_rate
from orchestrator.training.precision import resolve_precision
from orchestrator.training.state import Position, latest_state, load_tensors, save_state

_GROWING = (METRICS, TENSORBOARD)
_REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class TrainJob:
    recipe: Recipe
    run: str
    """Location of the run's folder."""
    dataset: str
    """Location of the prepared dataset."""
    labels: tuple[str, ...]
    attempt: int = 0


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    device: torch.device


Emit = Callable[[Event], None]


def train_worker(job: TrainJob, place: Place, emit: Emit) -> None:
    """Train to the end, or raise. Every worker of the group calls it with the same job."""
    _Worker(job, place, emit).run()


class _Worker:
    def __init__(self, job: TrainJob, place: Place, emit: Emit) -> None:
        recipe = job.recipe
        self.job, self.settings, self.emit = job, recipe.training, emit
        self.storage, self.task = Storage(recipe.storage), TASKS[recipe.task]
        precision = resolve_precision(self.settings.precision, place.device)
        self.compute = Compute(place.device, precision, place.rank, place.world)
        self.leads = place.rank == 0
        self.reported_at = 0.0
        self._load_data()
        self._build(recipe)
        self._resume()

    def _load_data(self) -> None:
        folder = self.storage.fetch(self.job.dataset, verify=self.leads)
        self.encoder = load_encoder(folder / "encoder")
        self.train, self.validation = Split(folder, "train"), Split(folder, "validation")
        self.train_lengths, self.validation_lengths = (s.lengths(self.encoder) for s in (self.train, self.validation))
        self.class_weights = class_weights(self.settings.class_weights, self.train.labels, self.job.labels)

    def _build(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)  # the head's weights, the same on every worker
        self.network = self.task.network(recipe.model, self.job.labels).to(self.compute.device).train()
        self.peak_rate = self.task.learning_rate(recipe)
        self.optimizer = build_optimizer(self.network, self.peak_rate, self.settings.weight_decay)
        self.total_steps = self.settings.epochs * len(self._plan(0))

    def _resume(self) -> None:
        self.position, folder = latest_state(self.storage, self.job.run)
        if folder is not None:
            tensors = load_tensors(folder, self.compute.device)
            self.network.load_state_dict(tensors["network"])
            self.optimizer.load_state_dict(tensors["optimizer"])
            self.position = replace(self.position, resumed=self.position.resumed + 1)
        self.parallel: nn.Module = self.network
        if self.compute.world > 1:
            cuda = [self.compute.device] if self.compute.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.network, device_ids=cuda)

    def run(self) -> None:
        self.log = self._open_log() if self.leads else None
        try:
            while not self.position.finished:
                self._epoch()
        finally:
            if self.log:
                self.log.close()

    def _open_log(self) -> MetricsLog:
        """The run may go on in another place than it began."""
        for name in _GROWING:
            self.storage.pull(f"{self.job.run}/{name}")
        return MetricsLog(self.storage.path(self.job.run), self.position.step)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        return plan_epoch(
            self.train_lengths, self.train.labels, batch_size=self.settings.batch_size, seed=self.job.recipe.seed,
            epoch=epoch, oversample=self.settings.oversample,
        )  # fmt: skip

    def _epoch(self) -> None:
        plan = self._plan(self.position.epoch)
        for batch in plan[self.position.batch :]:
            self._step(batch, len(plan))
        self._end_epoch(len(plan))

    def _step(self, batch: np.ndarray, batches: int) -> None:
        started, at = time.perf_counter(), self.position
        rate = self.peak_rate * schedule_factor(
            at.step, self.total_steps, self.settings.warmup_fraction, self.settings.schedule
        )
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(_mix(self.job.recipe.seed, at.step, self.compute.rank))
        loss = train_step(
            self.parallel, list(self._micro_batches(batch)), self.optimizer, self._row_losses, self.compute,
            total_weight=float(self.class_weights[self.train.labels[batch]].sum()),
            max_grad_norm=self.settings.max_grad_norm,
        )  # fmt: skip
        loss = self._sum_over_workers(loss)
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at step {at.step + 1} (epoch {at.epoch + 1}, learning rate {rate:.3g})",
                "lower training.learning_rate, set training.precision: fp32, or check the backbone's weights",
            )
        seconds = time.perf_counter() - started
        self.position = replace(
            at, batch=at.batch + 1, step=at.step + 1, loss_sum=at.loss_sum + loss, seconds=at.seconds + seconds
        )
        self._log_step(loss, rate, len(batch) / seconds, batches)
        every = self.settings.checkpoint_every_steps
        if every and self.position.step % every == 0 and self.position.batch < batches:
            self._checkpoint()

    def _row_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.task.row_losses(logits, labels, self.settings.label_smoothing)

    def _micro_batches(self, batch: np.ndarray) -> Iterator[MicroBatch]:
        """This worker's rows in ``accumulate_steps`` parts, the same number of parts on every worker."""
        mine = share(batch, self.compute.rank, self.compute.world)
        for part in np.array_split(mine, self.settings.accumulate_steps):
            idle = len(part) == 0
            rows = batch[:1] if idle else part  # an idle worker computes one row that weighs nothing
            labels = self.train.labels[rows]
            weights = np.zeros(1, np.float32) if idle else self.class_weights[labels]
            yield MicroBatch(
                self._inputs(self.train.inputs(rows), rows),
                torch.from_numpy(labels.astype(np.int64)).to(self.compute.device),
                torch.from_numpy(weights).to(self.compute.device),
            )

    def _inputs(self, table: pa.Table, rows: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Tensors on the device; with ``rows``, training images are augmented, each by its own seed."""
        if rows is not None and isinstance(self.encoder, ImageEncoder):
            seeds = [_mix(self.job.recipe.seed, self.position.epoch, int(row)) for row in rows]
            pixels = augment(self.encoder.pixels(table), self.settings.augmentation, seeds)
            inputs = {"pixels": self.encoder.normalise(pixels)}
        else:
            inputs = self.encoder.collate(table)
        return {name: tensor.to(self.compute.device, non_blocking=True) for name, tensor in inputs.items()}

    def _sum_over_workers(self, value: float) -> float:
        if self.compute.world == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.compute.device)
        distributed.all_reduce(total)
        return float(total.item())

    def _log_step(self, loss: float, rate: float, samples_per_s: float, batches: int) -> None:
        if not self.log:
            return
        position = self.position
        self.log.write("train", position.step, {"epoch": position.epoch, "loss": loss, "learning_rate": rate,
                                                "samples_per_s": samples_per_s})  # fmt: skip
        now = time.monotonic()
        if now - self.reported_at >= _REPORT_EVERY_S:
            self.reported_at = now
            figures: dict[str, float | str] = {"epoch": f"{position.epoch + 1}/{self.settings.epochs}", "loss": loss,
                       "samples/s": samples_per_s}  # fmt: skip
            self.emit(Event("train", done=position.step, total=self.total_steps, figures=figures))

    def _end_epoch(self, batches: int) -> None:
        scores = self._validate()
        position = self.position
        value = -scores["loss"] if self.settings.best_metric == "loss" else scores[self.settings.best_metric]
        gain = self.settings.early_stopping.min_gain if self.settings.early_stopping else 0.0
        is_best = position.best_epoch < 0 or value > position.best_value + gain
        if is_best:
            position = replace(position, best_epoch=position.epoch, best_value=value)
            self._save_best()
        self._log_epoch(scores, batches, is_best)
        early = self._should_stop(position)
        finished = early or position.epoch + 1 >= self.settings.epochs
        self.position = replace(position.next_epoch(), finished=finished, stopped_early=early)
        self._checkpoint()

    def _should_stop(self, position: Position) -> bool:
        stopping = self.settings.early_stopping
        return bool(stopping) and position.epoch - position.best_epoch >= (stopping.patience_epochs if stopping else 0)

    def _validate(self) -> dict[str, float]:
        size = self.job.recipe.evaluation.batch_size
        shares = evaluation_batches(self.validation_lengths, size, self.compute.rank, self.compute.world)
        batches = ((rows, self._inputs(self.validation.inputs(rows))) for rows in shares)
        probabilities = predict(self.network, batches, len(self.validation.labels), self.compute)
        return summary(self.validation.labels, probabilities)

    def _save_best(self) -> None:
        if self.leads:
            with self.storage.publish(f"{self.job.run}/{MODEL}") as folder:
                save_model(folder, self.network, self.encoder, self.job.labels, self.task.name)

    def _log_epoch(self, scores: dict[str, float], batches: int, is_best: bool) -> None:
        if not self.log:
            return
        position = self.position
        rate = self.optimizer.param_groups[0]["lr"]
        speed = position.step * self.settings.batch_size / max(position.seconds, 1e-9)
        values: dict[str, Any] = {"epoch": position.epoch, "train_loss": position.loss_sum / batches, **scores,
                                  "learning_rate": rate, "samples_per_s": speed}  # fmt: skip
        self.log.write("validation", position.step, values)
        shown = f"loss {values['train_loss']:.4f}, validation " + ", ".join(
            f"{name} {scores[name]:.4f}" for name in ("loss", "accuracy", "macro_f1")
        )
        line = f"epoch {position.epoch + 1}/{self.settings.epochs}: {shown}{' (best)' if is_best else ''}"
        self.emit(Event("train", message=line))

    def _checkpoint(self) -> None:
        if self.log:
            self.log.flush()  # the log first: whoever goes on from the checkpoint finds the lines of all steps before it
            for name in _GROWING:
                self.storage.push(f"{self.job.run}/{name}")
            save_state(
                self.storage, self.job.run, self.position, self.network.state_dict(), self.optimizer.state_dict()
            )
        if self.compute.world > 1:
            distributed.barrier()


def class_weights(setting: str | dict[str, float], labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Weight of each class in the loss: float32 [classes]. ``balanced`` is n / (classes * n_class)."""
    if setting == "none":
        return np.ones(len(names), np.float32)
    if isinstance(setting, dict):
        return np.array([setting.get(name, 1.0) for name in names], np.float32)
    counts = np.bincount(labels, minlength=len(names))
    return (len(labels) / (len(names) * np.maximum(counts, 1))).astype(np.float32)


def _mix(*numbers: int) -> int:
    """A seed from several numbers, well spread: the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
