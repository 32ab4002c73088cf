"""The loop: one optimiser step, and the predictions of one pass over the validation rows. Pure torch.

In: a network, micro-batches of tensors, an optimiser. Out: the mean loss. Knows no files, no recipe and no Ray; it calls
torch.distributed only if a process group is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn

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


@dataclass(frozen=True)
class Compute:
    """How this process computes."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world: int = 1


def train_step(
    network: nn.Module,
    micro_batches: Sequence[MicroBatch],
    optimizer: torch.optim.Optimizer,
    row_losses: RowLosses,
    compute: Compute,
    *,
    total_weight: float,
    max_grad_norm: float | None,
) -> float:
    """One optimiser step over a global batch; returns this worker's share of its loss.

    The loss is the weighted mean over the rows of *all* workers (``total_weight`` is the sum of their weights), so the
    result does not depend on how the batch was dealt. DDP averages gradients, hence the factor ``world``.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for index, batch in enumerate(micro_batches):
        last, lonely = index == len(micro_batches) - 1, len(batch.labels) == 1
        with (
            _synchronise(network, last=last),
            autocast(compute.precision, compute.device),
            _statistics(network, lonely),
        ):
            losses = row_losses(network(**batch.inputs).float(), batch.labels)
            loss = (losses * batch.weights).sum() * (compute.world / total_weight)
            loss.backward()
        loss_sum += loss.item() / compute.world
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    optimizer.step()
    return loss_sum


def _synchronise(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients cross the network once per step: with the last micro-batch."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        waiting: AbstractContextManager[None] = network.no_sync()
        return waiting
    return contextlib.nullcontext()


@contextlib.contextmanager
def _statistics(network: nn.Module, lonely: bool) -> Iterator[None]:
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
