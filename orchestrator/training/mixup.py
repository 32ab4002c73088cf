"""Mixup (Zhang et al. 2018): each image is blended with another of its batch, and so are their labels.

In: the rows of a global batch. Out: each row's partner and how much of itself it keeps, the same on every worker.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from orchestrator.training.loop import MicroBatch

_STREAM = 0x6D69
"""Sets these random numbers apart from others of the same seed."""


def plan_mixup(batch: np.ndarray, alpha: float, seed: int, step: int) -> tuple[np.ndarray, float]:
    """The batch's rows in another order, as partners, and the share within 0 and 1 that each row keeps of itself.

    The share is one draw from Beta(alpha, alpha) per batch; an ``alpha`` of 0 is no mixup: a share of 1.
    """
    if alpha == 0.0:
        return batch, 1.0
    generator = np.random.default_rng([seed, step, _STREAM])
    return generator.permutation(batch), float(generator.beta(alpha, alpha))


def blend(rows: MicroBatch, partners: MicroBatch, share: float) -> MicroBatch:
    """``share`` of ``rows`` and the rest of ``partners``: of the inputs here, of the losses through the weights."""
    inputs = {name: value * share + partners.inputs[name] * (1.0 - share) for name, value in rows.inputs.items()}
    return replace(
        rows, inputs=inputs, weights=rows.weights * share, partners=(partners.labels, partners.weights * (1.0 - share))
    )
