"""What stays takes over the work of what went: least squares on the inputs that a matrix really gets.

In: a network, the same one with fewer inputs of some matrices, and calibration batches. Out: the smaller one, whose matrices
give results as near to the former ones as their inputs allow. No training and no labels: one pass over the batches, then a
linear system per matrix (the reconstruction of He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks";
for transformers Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from orchestrator.compression.matrices import dense, is_transposed
from orchestrator.compression.reshaping import Sample, without_kept
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import LowRank, library_logits

_STIFFNESS = 1e-3
"""Weight of the distance from the weights there were, in mean squares of the inputs: keeps what few rows say little about."""


def refit(before: Network, smaller: Network, kept: Mapping[str, Sequence[int]], batches: Sequence[Sample]) -> None:
    """Change, in ``smaller``, the weights and biases of the matrices in ``kept``: path -> which of its inputs it still has.

    ``batches``: inputs of ``before``; none: all stays as it is.
    """
    narrowed = {path: left for path, left in kept.items() if not isinstance(before.get_submodule(path), LowRank)}
    if not batches or not narrowed:
        return
    with _moments(before, list(narrowed)) as moments, torch.no_grad():
        training, device = before.training, next(before.parameters()).device
        before.eval()
        for inputs in batches:
            library_logits(before, {name: tensor.to(device) for name, tensor in inputs.items()})
        before.train(training)
    for path, left in narrowed.items():
        _take_over(before.get_submodule(path), smaller.get_submodule(path), left, moments[path])


@contextmanager
def _moments(network: Network, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """In the block, forward passes add up x x^T of each of these matrices' inputs, with a last one that is always 1."""
    sums: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            values = arguments[0].detach().float().flatten(0, -2)
            values = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
            sums[path] = sums.get(path, 0.0) + values.T @ values

        return hook

    handles = [network.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _take_over(before: nn.Module, after: nn.Module, kept: Sequence[int], moments: torch.Tensor) -> None:
    """W' = W_kept + W_gone E[x_gone x_kept^T] (E[x_kept x_kept^T] + s I)^-1, of which the last column is the bias."""
    size = len(moments) - 1
    gone = without_kept(size, kept)
    if not gone:
        return
    own = [*kept, *([size] if getattr(after, "bias", None) is not None else [])]
    system, moments = moments[own][:, own].double(), moments.double()
    system.diagonal().add_(_STIFFNESS * float(system.diagonal().mean()))
    lost = dense(before).double()[:, gone] @ moments[gone][:, own]
    change = torch.linalg.solve(system, lost.T).T
    weight: torch.Tensor = after.weight  # type: ignore[assignment]
    columns = change[:, : len(kept)]
    with torch.no_grad():
        weight.add_((columns.T if is_transposed(after) else columns).to(weight.dtype))
        if len(own) > len(kept):
            after.bias.add_(change[:, -1].to(weight.dtype))  # type: ignore[operator]
