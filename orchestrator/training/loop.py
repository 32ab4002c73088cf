"""The loop: one optimiser step, and the predictions of one pass over the validation rows. Pure torch.

In: a network, micro-batches of tensors, an optimiser. Out: the mean loss. Knows no files, no recipe and no Ray; it calls
torch.distributed only if a process group is there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn

from orchestrator.training.adversarial import FastGradient
from orchestrator.training.failure import Diverged
from orchestrator.training.parallel import clip_gradients, synchronise
from orchestrator.training.precision import Precision, autocast

RowLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits [batch, classes], labels [batch] -> losses [batch]."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the network together."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    """int64 [batch]"""
    weights: torch.Tensor
    """float32 [batch]: each row's share of the loss; 0 for a row that only keeps an idle worker in step."""
    partners: tuple[torch.Tensor, torch.Tensor] | None = None
    """Labels and weights of the rows that these are blended with."""
    answers: torch.Tensor | None = None
    """float32 [batch, classes]: a teacher's logits, where they are known."""


Teach = Callable[[nn.Module, MicroBatch, RowLosses], tuple[torch.Tensor, RowLosses]]
"""Network, rows, the losses of the labels -> its logits, and losses in which a teacher has its share."""


@dataclass(frozen=True)
class Compute:
    """How this process computes."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world: int = 1


def train_step(
    network: nn.Module,
    micro_batches: Iterable[MicroBatch],
    optimizer: torch.optim.Optimizer,
    row_losses: RowLosses,
    compute: Compute,
    *,
    total_weight: float,
    max_grad_norm: float | None,
    adversary: FastGradient | None = None,
    teach: Teach | None = None,
) -> tuple[float, float]:
    """One optimiser step over a global batch; returns this worker's share of its loss, and the norm of the gradients.

    The loss is the weighted mean over the rows of *all* workers (``total_weight`` is the sum of their weights), so the
    result does not depend on how the batch was dealt. DDP averages gradients, hence the factor ``world``. With an
    ``adversary`` the gradients of its second pass are added; the loss is that of the first.

    Raises:
        Diverged: the gradients are no numbers, on every worker alike. The weights are as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for batch, last in _told_the_last(micro_batches):
        for number, final in enumerate(adversary.passes() if adversary else (True,)):
            with (
                synchronise(network, last=last and final),
                autocast(compute.precision, compute.device),
                _statistics(network, lonely=len(batch.labels) == 1),
            ):
                loss = _weighted_loss(network, batch, row_losses, teach) * (compute.world / total_weight)
                loss.backward()
            loss_sum += loss.item() / compute.world if number == 0 else 0.0
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    norm = clip_gradients(network, limit)
    if not math.isfinite(norm):
        raise Diverged(f"the loss is {loss_sum:g} and the norm of the gradients {norm:g}")
    optimizer.step()
    return loss_sum, norm


def class_weights(setting: str | dict[str, float], labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Weight of each class in the loss: float32 [classes]. ``balanced`` is n / (classes * n_class)."""
    if setting == "none":
        return np.ones(len(names), np.float32)
    if isinstance(setting, dict):
        return np.array([setting.get(name, 1.0) for name in names], np.float32)
    counts = np.bincount(labels, minlength=len(names))
    return (len(labels) / (len(names) * np.maximum(counts, 1))).astype(np.float32)


def _weighted_loss(
    network: nn.Module, batch: MicroBatch, row_losses: RowLosses, teach: Teach | None = None
) -> torch.Tensor:
    if teach:
        logits, row_losses = teach(network, batch, row_losses)
    else:
        logits = network(**batch.inputs).float()
    loss = (row_losses(logits, batch.labels) * batch.weights).sum()
    if batch.partners:
        labels, weights = batch.partners
        loss = loss + (row_losses(logits, labels) * weights).sum()
    return loss


def _told_the_last(batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Each with whether it is the last one; one is made ahead."""
    iterator = iter(batches)
    batch = next(iterator)
    for following in iterator:
        yield batch, False
        batch = following
    yield batch, True


@contextlib.contextmanager
def _statistics(network: nn.Module, *, lonely: bool) -> Iterator[None]:
    """One row alone has no variance: batch norms then use their running statistics, and leave them as they are."""
    norms = (
        [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        if lonely
        else []
    )
    try:
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm in norms:
            norm.train()


def predict(
    network: nn.Module, batches: Iterable[tuple[np.ndarray, dict[str, torch.Tensor]]], rows: int, compute: Compute
) -> np.ndarray:
    """Probabilities [rows, classes] of all rows, on every worker, each row computed exactly once over all workers.

    ``batches`` gives this worker's share: row indices and inputs.
    """
    network.eval()
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode(), autocast(compute.precision, compute.device):
        for indices, inputs in batches:
            mine.append((indices, network(**inputs).float().softmax(dim=-1).cpu().numpy()))
    network.train()
    parts = [part for share in _gather(mine, compute.world) for part in share]
    result = np.zeros((rows, parts[0][1].shape[1]), dtype=np.float32)
    for indices, probabilities in parts:
        result[indices] = probabilities
    return result


def _gather(mine: list[tuple[np.ndarray, np.ndarray]], world: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    if world == 1:
        return [mine]
    shares: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(world)]
    distributed.all_gather_object(shares, mine)
    return shares
