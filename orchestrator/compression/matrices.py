"""Linear layers in all their guises, made narrower: torch's, GPT-2's transposed ones, and factored ones.

In: a module and positions of its inputs or outputs. Out: the same module with fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from orchestrator.models.reshaped import LowRank


def is_matrix(module: nn.Module) -> bool:
    """A linear layer that computes by itself; subclasses have their weights read by others, or are not what they seem."""
    return type(module) is nn.Linear or is_transposed(module) or isinstance(module, LowRank)


def is_transposed(module: nn.Module) -> bool:
    """transformers' ``Conv1D``, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def input_size(module: nn.Module) -> int:
    if isinstance(module, LowRank):
        return input_size(module[0])
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0 if is_transposed(module) else 1]


def output_size(module: nn.Module) -> int:
    if isinstance(module, LowRank):
        return output_size(module[1])
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1 if is_transposed(module) else 0]


def keep_inputs(module: nn.Module, kept: Sequence[int]) -> None:
    """Leave these inputs, in this order."""
    if isinstance(module, LowRank):
        return keep_inputs(module[0], kept)
    _select(module, "weight", 0 if is_transposed(module) else 1, kept)
    _set_size(module, ("in_features", "nx"), len(kept))
    return None


def keep_outputs(module: nn.Module, kept: Sequence[int]) -> None:
    """Leave these outputs, in this order."""
    if isinstance(module, LowRank):
        return keep_outputs(module[1], kept)
    _select(module, "weight", 1 if is_transposed(module) else 0, kept)
    if getattr(module, "bias", None) is not None:
        _select(module, "bias", 0, kept)
    _set_size(module, ("out_features", "nf"), len(kept))
    return None


def keep_rows(module: nn.Module, parameter: str, kept: Sequence[int]) -> None:
    """Of a parameter that stands beside the matrices."""
    _select(module, parameter, 0, kept)


def zero_inputs(module: nn.Module, gone: Sequence[int]) -> None:
    """As if these inputs were always zero."""
    if isinstance(module, LowRank):
        return zero_inputs(module[0], gone)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.index_fill_(
            0 if is_transposed(module) else 1, torch.tensor(gone, dtype=torch.int64, device=weight.device), 0.0
        )
    return None


def dense(module: nn.Module) -> torch.Tensor:
    """The matrix [out, in] of a layer that is not factored."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().T if is_transposed(module) else weight.detach()


def _select(module: nn.Module, name: str, axis: int, kept: Sequence[int]) -> None:
    before: nn.Parameter = getattr(module, name)
    chosen = (
        before.detach().index_select(axis, torch.tensor(kept, dtype=torch.int64, device=before.device)).contiguous()
    )
    setattr(module, name, nn.Parameter(chosen, requires_grad=before.requires_grad))


def _set_size(module: Any, names: Sequence[str], size: int) -> None:
    for name in names:
        if name in vars(module):
            setattr(module, name, size)
