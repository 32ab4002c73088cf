"""Distillation (Hinton et al. 2015): a network learns what another one answers, beside what the labels say.

In: the student, the rows of a micro-batch, the losses of the labels. Out: the losses of the rows, of which the teacher has its
share. The teacher sees exactly what the student sees, blended and augmented images too (Beyer et al. 2022), but for the rows
that an adversary moves: there the student is to answer as the teacher does to the rows as they are (Goldblum et al. 2020).
Of texts it can also be asked what nobody wrote (``altered_texts.py``); nothing else here is drawn by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from orchestrator.data.encoder import Encoder
from orchestrator.errors import DataError, RecipeError
from orchestrator.models.backbones import Network, Watched
from orchestrator.models.checkpoint import SavedModel, load_model
from orchestrator.recipe import Distillation
from orchestrator.storage import Storage
from orchestrator.training.altered_texts import alter
from orchestrator.training.loop import MicroBatch, RowLosses

_TINY = 1e-12
_IDS = "input_ids"
_NO_STATES = (
    "training.distillation.hidden has no effect: teacher and student have no hidden states of the same kind to compare"
)


def require_teacher(distillation: Distillation | None, teacher: str | None) -> None:
    """Raises RecipeError when there is something to learn and nobody to learn it from."""
    if distillation and teacher is None:
        raise RecipeError(
            "training.distillation needs a teacher, and this run has none",
            "remove it; orchestrator compress gives the networks that it trains the model they come from as teacher",
        )


def saved_model(
    storage: Storage, location: str, encoder: Encoder, labels: tuple[str, ...], *, verify: bool
) -> SavedModel:
    """A saved model for a run on rows of ``encoder`` and ``labels``.

    Raises:
        DataError: it was trained for other inputs or labels. IntegrityError: its files are not what was saved.
    """
    model = load_model(storage.fetch(location, verify=verify), verify=False)
    if model.labels != labels:
        raise DataError(
            f"the labels of {location} are {', '.join(model.labels)}, but the dataset's {', '.join(labels)}",
            "give a model that was trained on this dataset",
        )
    require_same_inputs(location, model.encoder, encoder)
    return model


def require_same_inputs(location: str, model: Encoder, dataset: Encoder) -> None:
    """Raises DataError when the model at ``location`` cannot read the dataset's rows as its encoder would make them."""
    theirs, ours = model.describe(), dataset.describe()
    if different := [name for name in ours if theirs.get(name) != ours[name] and not _reads_less(name, theirs, ours)]:
        told = ", ".join(f"{name} {theirs.get(name)} instead of {ours[name]}" for name in different)
        raise DataError(
            f"{location} reads other inputs than this dataset holds: {told}", "prepare the data for its model"
        )


def _reads_less(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """A text encoder cuts rows that are longer than its own."""
    return name == "max_tokens" and theirs.get(name, math.inf) < ours[name]


def asks_itself(distillation: Distillation, *, texts: bool) -> bool:
    """Whether the teacher has to be there: answers to the rows as they are, known before, would not do."""
    return bool(distillation.hidden or (distillation.altered and texts))


class Watching(nn.Module):
    """A network whose call gives its hidden states too; made to stand inside of DDP, which has to see each call."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: torch.Tensor) -> Watched:
        return self.network.watched(**inputs)


class Teacher:
    def __init__(
        self, network: Network | None, settings: Distillation, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """``network``: on its device; it stays as it is. None: all rows come with its answers, and nobody asks for hidden
        states or alters rows. ``tell`` is called once, should there be no hidden states."""
        self.network = network.eval().requires_grad_(False) if network else None
        self.settings, self._tell = settings, tell
        self._last: tuple[MicroBatch, MicroBatch, torch.Tensor] | None = None

    def watching(self, student: Network) -> nn.Module:
        """What has to be called instead of the student."""
        return Watching(student) if self.settings.hidden else student

    def teach(self, student: nn.Module, batch: MicroBatch, row_losses: RowLosses) -> tuple[torch.Tensor, RowLosses]:
        """The student's logits, fp32 [batch, classes], and the losses of the rows from now on.

        ``student``: what ``watching`` gave, or a parallel of it. A row's loss is (1 - weight) of that by its label, if it is
        as it was, weight T^2 KL(teacher || student) at temperature T, whose square keeps the size of the gradients, and
        ``hidden`` times its ``hidden_losses``.
        """
        settings = self.settings
        batch, by_label = self._altered(batch)
        inputs = batch.inputs
        with torch.no_grad():  # and no inference mode: autograd has to keep what the student is compared with
            theirs = self._ask(batch)
        ours = student(**inputs) if settings.hidden else Watched(student(**inputs))
        logits = ours.logits.float()
        taught = settings.weight * answer_losses(logits, theirs.logits.float(), settings.temperature)
        if settings.hidden:
            taught = taught + settings.hidden * self._hidden(ours, theirs, inputs.get("attention_mask"), taught)

        def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return by_label * row_losses(logits, labels) + taught

        return logits, losses

    def _altered(self, batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor]:
        """The rows that are learned, and what their labels' losses count: float32 [batch]. The same for all passes over a
        batch, of which an adversary makes two."""
        share = torch.full(batch.weights.shape, 1.0 - self.settings.weight, device=batch.weights.device)
        if not self.settings.altered or _IDS not in batch.inputs:
            return batch, share
        if self._last is None or self._last[0] is not batch:
            ids, altered = alter(batch.inputs[_IDS], batch.inputs["attention_mask"], self.settings.altered)
            rows = replace(batch, inputs=batch.inputs | {_IDS: ids})
            self._last = batch, rows, share.masked_fill(altered, 0.0)
        return self._last[1:]

    def _ask(self, batch: MicroBatch) -> Watched:
        if batch.answers is not None and not asks_itself(self.settings, texts=_IDS in batch.inputs):
            return Watched(batch.answers)
        assert self.network, "nobody knows the teacher's answers to these rows"
        return self.network.watched(**batch.inputs) if self.settings.hidden else Watched(self.network(**batch.inputs))

    def _hidden(self, ours: Watched, theirs: Watched, real: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        losses = hidden_losses(ours, theirs, real)
        if losses is None:
            self._tell(_NO_STATES)
            self._tell = lambda _: None
            return torch.zeros_like(like)
        return losses


def answer_losses(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of logits [batch, classes], at temperature T -> [batch]."""
    ours, theirs = (functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which layers are compared, as 0-based indices: each of the student's ``n`` with one of the teacher's ``m``.

    Counted from 1, layer i goes with layer i m / n, rounded half up and at least 1; so the last goes with the last.
    """
    if not teacher:
        return []
    return [(i - 1, max(1, math.floor(i * teacher / student + 0.5)) - 1) for i in range(1, student + 1)]


def hidden_losses(student: Watched, teacher: Watched, real: torch.Tensor | None = None) -> torch.Tensor | None:
    """How far the student's hidden states are from the teacher's: the mean over ``layer_pairs``, [batch].

    ``real``: [batch, tokens], 0 at padding. None: there is nothing to compare.
    """
    losses = []
    for i, j in layer_pairs(len(student.states), len(teacher.states)):
        ours, theirs, mask = student.states[i], teacher.states[j], real
        if ours.ndim != theirs.ndim:
            continue
        if student.places and theirs.shape[1] > 1:
            if teacher.places and not torch.equal(teacher.places[j], teacher.places[0]):
                ours, theirs = ours[:, :1], theirs[:, :1]  # of other tokens, but for the first
            else:
                theirs = theirs.gather(1, student.places[i][:, :, None].expand(-1, -1, theirs.shape[-1]))
                mask = real if real is None else real.gather(1, student.places[i])
        losses.append(_state_losses(ours, theirs, mask))
    return torch.stack(losses).mean(0) if losses else None


def _state_losses(ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Of one layer. States of one shape: squared error over the teacher's squares, both summed over the row's real tokens.
    Other numbers of channels: attention transfer (Zagoruyko & Komodakis 2017), the squared distance of the rows' maps."""
    if ours.ndim == 4:
        ours, theirs = _as_tokens(ours, theirs)
    if ours.shape[1] != theirs.shape[1]:  # of a last layer, which may have been computed for the first token alone
        ours, theirs = ours[:, :1], theirs[:, :1]
    ours, theirs = ours.float(), theirs.float()
    mask: Any = 1.0 if real is None else real[:, : ours.shape[1], None]
    if ours.shape == theirs.shape:
        errors, squares = (((x * mask) ** 2).sum((1, 2)) for x in (ours - theirs, theirs))
        return errors / squares.clamp_min(_TINY)
    one, other = (functional.normalize(((x * mask) ** 2).mean(2), dim=1, eps=_TINY) for x in (ours, theirs))
    return ((one - other) ** 2).sum(1)


def _as_tokens(*images: torch.Tensor) -> list[torch.Tensor]:
    """[batch, channels, height, width] -> [batch, positions, channels], with the positions of the smallest of them."""
    size = min(image.shape[2] for image in images), min(image.shape[3] for image in images)
    return [functional.adaptive_avg_pool2d(image, size).flatten(2).transpose(1, 2) for image in images]
