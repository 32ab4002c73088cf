"""Dropout whose masks cost little on a CPU.

In: a tensor and a probability. Out: the tensor with that share of its values zeroed and the others scaled up. torch draws
one random number for each value, one after the other; here one draw of 64 bits serves four values, and comparing them is
vectorised. The probability is rounded to a multiple of 1/65536, and the scale is that of the rounded one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_STEPS = 65_536
_LOWEST = -32_768
"""Of int16: what the random bits are read as."""


def dropout(values: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """As ``torch.nn.functional.dropout``; random numbers come from torch's generator of the device."""
    if not training or probability == 0.0:
        return values
    if values.device.type != "cpu":
        return functional.dropout(values, probability)
    kept: torch.Tensor = _Dropout.apply(values, probability)
    return kept


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        dropped = min(round(probability * _STEPS), _STEPS - 1)
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
        bits = words.view(torch.int16)[: values.numel()].view(values.shape)
        factor = bits.ge_(_LOWEST + dropped).to(values.dtype).mul_(_STEPS / (_STEPS - dropped))
        context.save_for_backward(factor)
        return values * factor

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factor,) = context.saved_tensors
        return gradient * factor, None
