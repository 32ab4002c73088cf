"""Low rank: a linear layer [out, in] as two, [out, rank] after [rank, in].

The rank is that share of the one at which both cost the same, out * in / (out + in). The product is the nearest of its rank
for inputs as they come: each column counts by the root mean square of its input (Hsu et al. 2022 weight by the
gradient instead).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from orchestrator.compression.matrices import dense, input_size, is_matrix, is_transposed, output_size
from orchestrator.compression.ranking import round_to
from orchestrator.compression.reshaping import Reshaping, Sample, answers, without
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import LowRank, put

_MULTIPLE = 8


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Factor every linear layer that gets smaller by it, but the head.

    Raises CompressionFailed where there is none, or the architecture reads their weights.
    """
    ranks = {}
    for name in _body(state.network, sample):
        matrix = state.network.get_submodule(name)
        if rank := rank_for(output_size(matrix), input_size(matrix), share):
            ranks[name] = rank
    if not ranks:
        raise CompressionFailed(
            "it has no linear layer but its head that gets smaller as a product of two", "leave rank out"
        )
    factors = {name: _factors(state, name, rank) for name, rank in ranks.items()}

    def null(network: Network) -> None:
        for name, (left, right) in factors.items():
            _set_dense(network.get_submodule(name), left @ right)

    def remove(network: Network) -> None:
        for name, (left, right) in factors.items():
            put(network, name, _pair(network.get_submodule(name), left, right))

    smaller = without(state.network, [remove], null, sample, "the smallest parts of its matrices")
    return replace(state, network=smaller)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    return Sensitivity()


def rank_for(outputs: int, inputs: int, share: float) -> int:
    """0 where a product of two matrices would save nothing."""
    even = outputs * inputs / (outputs + inputs)
    rank = int(share * even)
    if rank >= 2 * _MULTIPLE:
        rank = round_to(rank, _MULTIPLE, rank)
    return rank if 0 < rank < even else 0


def _body(network: Network, sample: Sample) -> list[str]:
    """Linear layers that are called, in this order, but the last: a layer whose weight another module reads stays as it is."""
    called: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.setdefault(name)

    matrices = [(n, m) for n, m in network.named_modules() if is_matrix(m) and not isinstance(m, LowRank)]
    inside = {id(part) for m in network.modules() if isinstance(m, LowRank) for part in m}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in matrices if id(module) not in inside]
    try:
        answers(network, sample)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)[:-1]


def _factors(state: Reshaping, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, rank] and [rank, in], of like size."""
    matrix = dense(state.network.get_submodule(name))
    weight = matrix.double()
    scale = _scale(state.sensitivity.inputs, name, weight)
    seen = weight * scale
    if weight.shape[0] <= weight.shape[1]:
        left = _leading(seen @ seen.T, rank)
        right = left.T @ weight
    else:
        vectors = _leading(seen.T @ seen, rank)
        left, right = seen @ vectors, vectors.T / scale
    even = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-15)
    return (left * even).to(matrix.dtype), (right / even[:, None]).to(matrix.dtype)


def _scale(inputs: Mapping[str, Sequence[float]], name: str, weight: torch.Tensor) -> torch.Tensor:
    """[in]: root mean squares, none of them so small that its column would be lost."""
    squares = inputs.get(name, ())
    if len(squares) != weight.shape[1]:
        return torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
    scale = torch.tensor(squares, dtype=weight.dtype, device=weight.device).sqrt()
    return scale.clamp_min(max(1e-3 * float(scale.max()), 1e-12))


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors of the largest eigenvalues, as columns."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:]


def _set_dense(module: nn.Module, matrix: torch.Tensor) -> None:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    weight.data = matrix.T.contiguous() if is_transposed(module) else matrix


def _pair(module: nn.Module, left: torch.Tensor, right: torch.Tensor) -> LowRank:
    bias = getattr(module, "bias", None)
    pair = LowRank(right.shape[1], len(right), len(left), bias=bias is not None).to(left.device)
    pair[0].weight = nn.Parameter(right.contiguous())
    pair[1].weight = nn.Parameter(left.contiguous())
    if bias is not None:
        pair[1].bias = nn.Parameter(bias.detach().clone())
    return pair.train(module.training)
