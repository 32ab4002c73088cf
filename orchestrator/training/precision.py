"""Which number format the forward pass computes in. Weights, gradients and the optimiser stay fp32."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch

from orchestrator.models.hardware import has_bf16
from orchestrator.recipe import Training

Precision = Literal["fp32", "bf16"]


def resolve_precision(training: Training, device: torch.device) -> Precision:
    """``auto``: bf16 only where hardware multiplies it; private gradients need fp32."""
    if training.precision != "auto":
        return training.precision
    if training.privacy:
        return "fp32"
    return "bf16" if has_bf16(device) else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
