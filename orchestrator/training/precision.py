"""Which number format the forward pass computes in. Weights, gradients and the optimiser stay fp32."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch

from orchestrator.models.hardware import has_bf16

Precision = Literal["fp32", "bf16"]


def resolve_precision(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """``auto``: bf16 only where hardware multiplies it."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16(device) else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
