"""Quantisation-aware training (Jacob et al. 2018): the forward pass rounds to int8 what an int8 runtime will round.

In: a network. Out: within a block the same network, whose linear and convolution layers see rounded weights and inputs;
gradients pass the rounding as if it were not there. Outside of the block nothing is left of it, so checkpoints, validation and
the saved model are those of the plain network in fp32.

A layer's inputs are rounded within the range that they have in this micro-batch, and no range is remembered: there is nothing
to resume and nothing for workers to agree on, and it is what dynamic quantisation does when it answers. As with batch norms,
parts of a batch that are dealt otherwise may have other ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional

_LOWEST, _HIGHEST = -128, 127
_SMALLEST_STEP = 1e-12


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """To 255 steps between plus and minus the largest value of each output channel, the first axis."""
    scale = (weight.detach().abs().flatten(1).amax(1) / _HIGHEST).clamp_min(_SMALLEST_STEP)
    zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -_HIGHEST, _HIGHEST)


def rounded_activation(values: torch.Tensor) -> torch.Tensor:
    """To 256 steps between the smallest and the largest value of the tensor; 0 is one of them. fp32."""
    values = values.float()
    low, high = torch.aminmax(values.detach())
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (_HIGHEST - _LOWEST)).clamp_min(_SMALLEST_STEP)
    zero = (_LOWEST - low / scale).round().clamp(_LOWEST, _HIGHEST).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, _LOWEST, _HIGHEST)


class RoundedLinear(nn.Linear):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(rounded_activation(values), rounded_weight(self.weight), self.bias)


class RoundedConv2d(nn.Conv2d):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(rounded_activation(values), rounded_weight(self.weight), self.bias)


_ROUNDED: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv2d}


@contextlib.contextmanager
def rounding(network: nn.Module, *, on: bool = True) -> Iterator[None]:
    """In the block, forward and backward passes of the network round.

    Layers change their class and nothing else: names, weights and hooks stay. What computes with weights on its own, such as
    ``post_norm``, asks for plain layers, and leaves these to the library; torch's ``MultiheadAttention`` does not, and its
    projections stay as they are.
    """
    layers = [(module, type(module)) for module in network.modules() if type(module) in _ROUNDED] if on else []
    try:
        for layer, plain in layers:
            layer.__class__ = _ROUNDED[plain]
        yield
    finally:
        for layer, plain in layers:
            layer.__class__ = plain
