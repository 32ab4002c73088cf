"""What one worker does from start to end: load, resume, step, validate, checkpoint.

In: a ``TrainJob`` (plain data, crosses processes) and this process's place among the workers. Out: the run's folder: the
best epoch's model, checkpoints, metrics. Runs alone as well as among many; knows no Ray.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import distributed

from orchestrator.data.batches import mixed_seed
from orchestrator.data.encoder import ENCODER, Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.errors import IntegrityError, TrainingFailed
from orchestrator.evaluation.metrics import summary
from orchestrator.models.backbones import Network
from orchestrator.models.checkpoint import save_model
from orchestrator.progress import Event
from orchestrator.recipe import Recipe
from orchestrator.storage import ANSWERS, METRICS, TENSORBOARD, Storage, best_location
from orchestrator.tasks import TASKS
from orchestrator.training import lora
from orchestrator.training.adversarial import FastGradient
from orchestrator.training.averaging import Average
from orchestrator.training.distillation import Teacher, asks_itself, require_same_inputs, require_teacher, saved_model
from orchestrator.training.failure import Diverged
from orchestrator.training.fake_int8 import rounding
from orchestrator.training.feed import Feed
from orchestrator.training.folds import Fold
from orchestrator.training.freezing import freeze, frozen_sha256, load_trained_state, trained_state
from orchestrator.training.loop import Compute, predict, train_step
from orchestrator.training.metrics_log import MetricsLog, Scores
from orchestrator.training.optim import build_optimizer, schedule_factor, set_learning_rate
from orchestrator.training.parallel import copied, is_sharded, load_optimizer, place, state_of
from orchestrator.training.precision import resolve_precision
from orchestrator.training.privacy import (
    Noise,
    PrivateGradients,
    draw_batches,
    epsilon_spent,
    freeze_batch_norms,
    sample_rate,
)
from orchestrator.training.saving import BackgroundWriter
from orchestrator.training.state import (
    Position,
    latest_state,
    load_tensors,
    publish_model,
    read_remedies,
    save_state,
)

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
    state_bytes: int = 0
    """About what a run keeps on disk: two checkpoints and two models."""
    fold: Fold | None = None
    """Train on the other folds of train and validation, and validate on this one."""
    is_trial: bool = False
    """It is one of many, and most of them are thrown away: it is written down by the clock alone, not after each epoch, and
    when it is finished there is nothing to go on from."""
    start: str | None = None
    """Location of a saved model whose network, head included, training begins with. None: the recipe's backbone."""
    teacher: str | None = None
    """Location of a saved model whose answers are learned, if ``training.distillation`` says so."""
    answers: str | None = None
    """Location of what it says of all training rows (``storage.ANSWERS``), where that does not depend on chance. None: it
    is asked anew each time."""


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    device: torch.device


Emit = Callable[[Event], None]


GoOn = Callable[[Position, Scores], bool]
"""Asked between two epochs: whether the run trains another."""


def train_worker(
    job: TrainJob, place: Place, emit: Emit, beat: Callable[[], None] = lambda: None, go_on: GoOn | None = None
) -> None:
    """Train to the end, or raise. Every worker of the group calls it with the same job.

    ``beat`` is called whenever something is done: the worker that no longer does is hung. ``go_on`` is asked on the
    first worker; when it says no, the run is finished as if early stopping had ended it.

    Raises:
        Diverged: the loss or the gradients are no numbers; the last checkpoint's are.
        DiskFull, IntegrityError: of the run's folder.
    """
    if not latest_state(Storage(job.recipe.storage), job.run)[0].finished:
        _Worker(job, place, emit, beat, go_on).run()


class _Worker:
    def __init__(self, job: TrainJob, place: Place, emit: Emit, beat: Callable[[], None], go_on: GoOn | None) -> None:
        recipe = job.recipe
        self.job, self.settings, self.emit, self.beat, self.go_on = job, recipe.training, emit, beat, go_on
        self.storage, self.task = Storage(recipe.storage), TASKS[recipe.task]
        precision = resolve_precision(self.settings, place.device)
        self.compute = Compute(place.device, precision, place.rank, place.world)
        self.leads = place.rank == 0
        self.reported_at, self.saved_at = 0.0, time.monotonic()
        self.unsaved: Network | None = None
        """The best epoch's network, while it is in no checkpoint."""
        self.dataset = self.storage.fetch(job.dataset, verify=self.leads)
        self.feed = Feed(self.dataset, recipe, job.labels, job.fold, self.compute, beat,
                         encoder=self._own_encoder(), answers=self._known_answers())  # fmt: skip
        self.rows = len(self.feed.train.labels)
        self.teacher = self._teacher()
        self._build(recipe)

    def _build(self, recipe: Recipe) -> None:
        """The network and its optimiser, as new or as the last checkpoint has them."""
        torch.manual_seed(recipe.seed)  # the head's weights, the same on every worker
        self.network = self._new_network().train()
        if self.settings.lora:
            lora.adapt(self.network, self.settings.lora)
        freeze(self.network, self.settings.freeze)
        if self.settings.privacy:
            freeze_batch_norms(self.network)
        self.frozen_sha256 = frozen_sha256(self.network)
        if self.settings.gradient_checkpointing:
            self.network.recompute()
        batches = math.ceil(self.rows / self.settings.batch_size)
        self.peak_rate, self.total_steps = self.task.learning_rate(recipe), self.settings.epochs * batches
        self.remedies = read_remedies(self.storage, self.job.run)
        self.position, folder = latest_state(self.storage, self.job.run)
        tensors = None if folder is None else load_tensors(folder)
        if tensors is not None:
            if tensors["frozen_sha256"] != self.frozen_sha256:
                raise IntegrityError(f"the backbone is not the one that {self.job.run} began with", "restore its files")
            load_trained_state(self.network, tensors["network"])
        self.noise = self._noise(tensors)
        world = 1 if self.noise else self.compute.world  # private gradients are summed after they are clipped
        called = self.teacher.watching(self.network) if self.teacher else self.network
        self.parallel = place(called, self.settings.strategy, self.compute.device, world)
        self.optimizer = build_optimizer(
            self.network, self.peak_rate, self.settings.weight_decay, self.settings.layer_decay
        )
        averaging, epsilon = self.settings.averaging, self.settings.adversarial
        self.average = Average(self.network, averaging, self.total_steps) if averaging else None
        self.adversary = FastGradient(self.network, epsilon) if epsilon else None
        max_norm, batch_size = self.settings.max_grad_norm, self.settings.batch_size
        self.private = (
            PrivateGradients(self.network, self.noise, max_norm, batch_size) if self.noise and max_norm else None
        )
        if tensors is not None:
            load_optimizer(self.network, self.optimizer, tensors["optimizer"])
            if self.average:
                self.average.load_state_dict(tensors["average"])
            self.position = replace(self.position, resumed=self.position.resumed + 1)

    def _new_network(self) -> Network:
        """Before anything of the recipe's has changed it."""
        if self.job.start is None:
            return self.task.network(self.job.recipe.model, self.job.labels)
        return self._saved(self.job.start)

    def _own_encoder(self) -> Encoder | None:
        """Of the model that training begins with: it may cut texts that the dataset has whole."""
        if self.job.start is None:
            return None
        own = load_encoder(self.storage.fetch(self.job.start, verify=False))
        require_same_inputs(self.job.start, own, load_encoder(self.dataset / ENCODER))
        return own

    def _teacher(self) -> Teacher | None:
        """Raises RecipeError: there is none to learn from."""
        require_teacher(self.settings.distillation, self.job.teacher)
        if self.settings.distillation is None or self.job.teacher is None:
            return None
        texts = self.task.input_kind == "text"
        known = self.job.answers and not asks_itself(self.settings.distillation, texts=texts)
        network = None if known else self._saved(self.job.teacher).to(self.compute.device)
        return Teacher(network, self.settings.distillation, self._tell)

    def _known_answers(self) -> np.ndarray | None:
        return np.load(self.storage.fetch(self.job.answers) / ANSWERS) if self.job.answers else None

    def _saved(self, location: str) -> Network:
        """Of this dataset. Every worker loads it, and the first one verifies it."""
        encoder = load_encoder(self.dataset / ENCODER)
        return saved_model(self.storage, location, encoder, self.job.labels, verify=self.leads).network

    def _tell(self, message: str) -> None:
        if self.leads:
            self.emit(Event("train", message=message))

    def _noise(self, tensors: dict[str, Any] | None) -> Noise | None:
        """Of the run so far; a new run has a new one."""
        if self.settings.privacy is None:
            return None
        if tensors is not None:
            return Noise(**tensors["noise"])
        return Noise.agreed(self.settings.privacy, self._sample_rate(), self.total_steps, self.compute.world)

    def _sample_rate(self) -> float:
        return sample_rate(self.rows, self.settings.batch_size)

    def run(self) -> None:
        self.log, self.writer = self._open_log() if self.leads else None, BackgroundWriter(self.beat)
        try:
            while not self.position.finished:
                if self._is_told_to_stop():
                    self.position = replace(self.position, finished=True, stopped_early=True)
                    self._checkpoint()
                else:
                    self._epoch()
            self.writer.finish()
        finally:
            self.writer.close()
            if self.log:
                self.log.close()

    def _is_told_to_stop(self) -> bool:
        if self.go_on is None or self.position.epoch == 0 or self.position.batch > 0:
            return False
        at = self.position
        no = self.log is not None and not self.go_on(at, self.log.scores(at.best_epoch, at.epoch - 1))
        return self._sum_over_workers(float(no))[0] > 0

    def _open_log(self) -> MetricsLog:
        """The run may go on in another place than it began."""
        for name in _GROWING:
            self.storage.pull(f"{self.job.run}/{name}")
        return MetricsLog(self.storage.path(self.job.run), self.position.step)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        if self.noise:
            return draw_batches(self.rows, self.settings.batch_size, self.noise.secret, epoch)
        return self.feed.plan(epoch)

    def _epoch(self) -> None:
        plan = self._plan(self.position.epoch)
        for batch in plan[self.position.batch :]:
            self._step(batch, len(plan))
        self._end_epoch(len(plan))

    def _step(self, batch: np.ndarray, batches: int) -> None:
        started, at = time.perf_counter(), self.position
        rate = self._learning_rate()
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(mixed_seed(self.job.recipe.seed, at.step, self.compute.rank))
        try:
            loss, grad_norm = self._private_step(batch) if self.private else self._plain_step(batch)
        except Diverged as error:
            raise self._diverged(error.message) from None
        loss, due = self._sum_over_workers(loss, float(self.leads and self._checkpoint_is_due(at.step + 1)))
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss:g}")
        if self.average:
            self.average.update(self.network, at.step)
        seconds = time.perf_counter() - started
        self.position = replace(
            at, batch=at.batch + 1, step=at.step + 1, loss_sum=at.loss_sum + loss, seconds=at.seconds + seconds
        )
        self._log_step(
            {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "samples_per_s": len(batch) / seconds}
        )
        if due and self.position.batch < batches:
            self._checkpoint()

    def _plain_step(self, batch: np.ndarray) -> tuple[float, float]:
        with rounding(self.network, on=self.settings.fake_int8):
            return train_step(
                self.parallel, self.feed.micro_batches(batch, self.position, self._parts), self.optimizer,
                self._row_losses, self.compute, total_weight=self.feed.weight(batch),
                max_grad_norm=self.settings.max_grad_norm, adversary=self.adversary,
                teach=self.teacher.teach if self.teacher else None,
            )  # fmt: skip

    def _private_step(self, batch: np.ndarray) -> tuple[float, float]:
        assert self.private and self.noise
        # What is done again after a rollback, with another rate, must not show the same noise on other gradients.
        seed = mixed_seed(self.noise.secret, self.position.step, self.remedies.rollbacks)
        parts = self.feed.micro_batches(batch, self.position, self._parts)
        result = self.private.step(parts, self._row_losses, seed, self.compute.world)
        self.optimizer.step()
        return result

    @property
    def _parts(self) -> int:
        """Of a step, on each worker."""
        return self.settings.accumulate_steps * self.remedies.accumulate_factor

    def _learning_rate(self) -> float:
        settings, step = self.settings, self.position.step
        factor = schedule_factor(step, self.total_steps, settings.warmup_fraction, settings.schedule)
        return self.peak_rate * self.remedies.rate_factor * factor

    def _diverged(self, what: str) -> TrainingFailed:
        at = self.position
        told = f"{what} at step {at.step + 1} (epoch {at.epoch + 1}, learning rate {self._learning_rate():.3g})"
        if at.step == 0:  # no learning rate has had a part in it
            return TrainingFailed(told, "set training.precision: fp32, or check the backbone's weights and the inputs")
        return Diverged(told, "lower training.learning_rate, or set training.precision: fp32")

    def _checkpoint_is_due(self, step: int) -> bool:
        """After this step. The leader decides, by its clock."""
        steps, seconds = self.settings.checkpoint_every_steps, self.settings.checkpoint_every_s
        if steps and step % steps == 0:
            return True
        return seconds is not None and time.monotonic() - self.saved_at >= seconds

    def _row_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.task.row_losses(logits, labels, self.settings.label_smoothing, self.settings.focal_gamma)

    def _sum_over_workers(self, *values: float) -> tuple[float, ...]:
        if self.compute.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.compute.device)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def _log_step(self, values: dict[str, float]) -> None:
        if not self.log:
            return
        position = self.position
        self.log.write("train", position.step, {"epoch": position.epoch, **values})
        now = time.monotonic()
        if now - self.reported_at >= _REPORT_EVERY_S:
            self.reported_at = now
            figures: dict[str, float | str] = {"epoch": f"{position.epoch + 1}/{self.settings.epochs}",
                       "loss": values["loss"], "samples/s": values["samples_per_s"]}  # fmt: skip
            self.emit(Event("train", done=position.step, total=self.total_steps, figures=figures))

    def _end_epoch(self, batches: int) -> None:
        scores = self._validate()
        position = self.position
        value = -scores["loss"] if self.settings.best_metric == "loss" else scores[self.settings.best_metric]
        gain = self.settings.early_stopping.min_gain if self.settings.early_stopping else 0.0
        is_best = position.best_epoch < 0 or value > position.best_value + gain
        if is_best:
            position = replace(position, best_epoch=position.epoch, best_value=value)
        self._log_epoch(scores, batches, is_best)
        early = self._should_stop(position)
        finished = early or position.epoch + 1 >= self.settings.epochs
        self.position = replace(position.next_epoch(), finished=finished, stopped_early=early)
        if not self.job.is_trial or is_sharded(self.network) or finished or self._checkpoint_is_due(position.step):
            self._checkpoint(with_model=is_best)
        elif is_best and self.leads:
            self.unsaved = copy.deepcopy(self._result()).cpu()

    def _should_stop(self, position: Position) -> bool:
        stopping = self.settings.early_stopping
        return bool(stopping) and position.epoch - position.best_epoch >= (stopping.patience_epochs if stopping else 0)

    def _validate(self) -> dict[str, float]:
        batches = self.feed.validation_batches(together=is_sharded(self.network))
        if self.average:
            self.average.agree()
        labels = self.feed.validation.labels
        return summary(labels, predict(self._result(), batches, len(labels), self.compute))

    def _result(self) -> Network:
        """The network that is validated and saved."""
        return self.average.network if self.average else self.network

    def _log_epoch(self, scores: dict[str, float], batches: int, is_best: bool) -> None:
        if not self.log:
            return
        position = self.position
        rate = self.optimizer.param_groups[0]["lr"]
        speed = position.step * self.settings.batch_size / max(position.seconds, 1e-9)
        values: dict[str, Any] = {"epoch": position.epoch, "train_loss": position.loss_sum / batches, **scores,
                                  "learning_rate": rate, "samples_per_s": speed}  # fmt: skip
        if self.noise and self.settings.privacy:
            values |= {"noise_multiplier": self.noise.multiplier, "epsilon": epsilon_spent(
                self.settings.privacy, self.noise.multiplier, self._sample_rate(), position.step)}  # fmt: skip
        self.log.write("validation", position.step, values)
        shown = f"loss {values['train_loss']:.4f}, validation " + ", ".join(
            f"{name} {scores[name]:.4f}" for name in ("loss", "accuracy", "macro_f1")
        )
        shown += f", epsilon {values['epsilon']:.2f}" if "epsilon" in values else ""
        self._tell(f"epoch {position.epoch + 1}/{self.settings.epochs}: {shown}{' (best)' if is_best else ''}")

    def _checkpoint(self, *, with_model: bool = False) -> None:
        """Have everything written that a run needs to go on from here; ``with_model``: these weights are the best so far."""
        self.saved_at = time.monotonic()
        self.writer.finish()  # before memory is taken for another copy
        state = self._state()
        if not self.log:
            return
        model = self._detached_model(state) if with_model else self.unsaved
        self.unsaved = None
        log, position = self.log, self.position
        if self.job.is_trial and position.finished:
            state = {}
        self.writer.submit(lambda: self._write(log, position, state, model))

    def _state(self) -> dict[str, Any]:
        state = state_of(self.network, self.optimizer) | {"frozen_sha256": self.frozen_sha256}
        state["network"] = trained_state(self.network, state["network"])
        if self.average:
            state["average"] = copied(self.average.state_dict())
        if self.noise:
            state["noise"] = asdict(self.noise)
        return state

    def _detached_model(self, state: dict[str, Any]) -> Network:
        """A network of its own with these weights."""
        if not is_sharded(self.network):
            return copy.deepcopy(self._result()).cpu()
        network = self._new_network()
        freeze(network, self.settings.freeze)
        load_trained_state(network, state["network"])
        return network

    def _write(self, log: MetricsLog, position: Position, state: dict[str, Any], model: Network | None) -> None:
        """What the later needs comes first: the log and the best model, then the checkpoint that counts on them."""
        run = self.job.run
        log.flush()
        for name in _GROWING:
            self.storage.push(f"{run}/{name}")
        if model is not None:
            if self.settings.lora:
                lora.merge(model)
            with self.storage.publish(best_location(run, position.best_epoch)) as folder:
                save_model(folder, model, self.feed.encoder, self.job.labels, self.task.name)
        if position.finished:
            publish_model(self.storage, run, position.best_epoch)
        save_state(self.storage, run, position, state)
