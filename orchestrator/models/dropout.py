"""Dropout whose masks cost little on a CPU.

In: a tensor and a probability. Out: the tensor with that share of its values zeroed and the others scaled up. torch draws
one random number for each value, one after the other; here one draw of 64 bits serves eight values, from a generator that
is twice as fast, and comparing them is vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

_BLOCK = 256
"""Values whose bytes are compared with the same threshold."""


def dropout(values: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """As ``torch.nn.functional.dropout``; random numbers come from torch's generator of the device."""
    if not training or probability == 0.0:
        return values
    if values.device.type != "cpu":
        return functional.dropout(values, probability)
    dropped: torch.Tensor = _Dropout.apply(values, probability)
    return dropped


def draw_kept(shape: torch.Size, probability: float) -> tuple[torch.Tensor, float]:
    """int8, on the CPU: 1 where a value is kept, 0 where it is dropped; and what kept values are multiplied with.

    A byte is drawn for each value, from NumPy's SFC64, which torch's generator gives its seed. A byte alone knows 256
    probabilities: the threshold that it is compared with is drawn too, between the two nearest, so that each value is
    dropped with the very probability that was asked for. At most 255 of 256 are dropped.
    """
    steps = min(probability * 256, 255.0)
    whole, blocks = min(int(steps), 254), -(-shape.numel() // _BLOCK)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(blocks * _BLOCK // 8)
    threshold = torch.rand(blocks, 1).lt(steps - whole).to(torch.int8).add_(whole - 128)
    kept = torch.from_numpy(words.view(np.int8)).view(blocks, _BLOCK).ge_(threshold)
    return kept.view(-1)[: shape.numel()].view(shape), 256 / (256 - steps)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        kept, gain = draw_kept(values.shape, probability)
        factor = kept.to(values.dtype).mul_(gain)
        context.save_for_backward(factor)
        return values * factor

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factor,) = context.saved_tensors
        return gradient * factor, None
