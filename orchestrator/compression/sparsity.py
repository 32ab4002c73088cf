"""Zeros: the smallest weights of linear and convolution layers, over the whole network, are set to zero.

It brings no speed and no smaller file: dense kernels multiply zeros as anything else. It tells how much a network could do
without, and makes archives of it small. Zeros stay zero in training (``ReshapedNetwork``).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from orchestrator.compression.matrices import is_matrix
from orchestrator.compression.reshaping import Reshaping, Sample, answers
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Set this share of the weights to zero; embeddings, norms and biases are left alone."""
    sparse = copy.deepcopy(state.network)
    weights = [module.weight for module in sparse.modules() if is_sparse_kind(module)]
    if not weights:
        raise CompressionFailed("it has no linear or convolution layer", "leave sparsity out")
    with torch.no_grad():
        sizes = torch.cat([weight.abs().flatten().float() for weight in weights])  # type: ignore[operator]
        gone = round(share * len(sizes))
        if gone == 0:
            return state
        threshold = sizes.kthvalue(gone).values
        for weight in weights:
            weight.masked_fill_(weight.abs().float() <= threshold, 0.0)  # type: ignore[operator]
    if not bool(answers(sparse, sample).isfinite().all()):
        raise CompressionFailed("with zeros its answers are no numbers", "leave sparsity out")
    return replace(state, network=sparse)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    return Sensitivity()


def is_sparse_kind(module: nn.Module) -> bool:
    """Factored layers count by their two parts."""
    return isinstance(module, nn.modules.conv._ConvNd) or (is_matrix(module) and hasattr(module, "weight"))
