"""The user's limits: as bounds on what is measured, and what each would have to be for a candidate to keep it. Pure.

In: ``compression.limits`` and what was measured of the uncompressed model. Out: bounds, verdicts, the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.errors import CompressionFailed
from orchestrator.recipe_compression import Limits
from orchestrator.recipe_tuning import Bound

_MB = 1e6
_STANDARD_ERRORS = 2.0
"""A drop on a few rows counts as beyond doubt when it is larger than the limit by so many."""
_NEAREST = 3


@dataclass(frozen=True)
class Miss:
    """A limit that a candidate does not keep."""

    limit: str
    """Its name in the recipe."""
    asked: float
    measured: float
    """In the limit's unit: what it would have to be."""


def bounds_of(limits: Limits, parent: Mapping[str, float]) -> dict[str, Bound]:
    """Per metric, from the limits that are set. ``parent``: the uncompressed model's metrics."""
    found = {
        "macro_f1": _at_least(limits.macro_f1_drop, lambda drop: parent["macro_f1"] - drop),
        "accuracy": _at_least(limits.accuracy_drop, lambda drop: parent["accuracy"] - drop),
        "agreement": _at_least(limits.agreement, float),
        "throughput_per_s": _at_least(limits.throughput_per_s, float),
        "latency_ms": _at_most(limits.latency_p50_ms),
        "latency_p95_ms": _at_most(limits.latency_p95_ms),
        "size_mb": _at_most(limits.size_bytes, _MB),
        "memory_mb": _at_most(limits.memory_bytes, _MB),
    }
    return {metric: bound for metric, bound in found.items() if bound is not None}


def _at_least(limit: float | None, value: Callable[[float], float]) -> Bound | None:
    return None if limit is None else Bound(at_least=value(limit))


def _at_most(limit: float | None, unit: float = 1.0) -> Bound | None:
    return None if limit is None else Bound(at_most=limit / unit)


def misses(limits: Limits, metrics: Mapping[str, float], parent: Mapping[str, float]) -> list[Miss]:
    """The limits that these metrics do not keep. One that was not measured is not kept."""
    measured = {
        "macro_f1_drop": parent["macro_f1"] - metrics.get("macro_f1", 0.0),
        "accuracy_drop": parent["accuracy"] - metrics.get("accuracy", 0.0),
        "latency_p50_ms": metrics.get("latency_ms", np.inf), "latency_p95_ms": metrics.get("latency_p95_ms", np.inf),
        "size_bytes": metrics.get("size_mb", np.inf) * _MB, "memory_bytes": metrics.get("memory_mb", np.inf) * _MB,
        "agreement": metrics.get("agreement", 0.0), "throughput_per_s": metrics.get("throughput_per_s", 0.0),
    }  # fmt: skip
    asked = {name: limit for name, limit in limits.model_dump().items() if limit is not None}
    return [
        Miss(name, float(limit), float(measured[name]))
        for name, limit in asked.items()
        if (measured[name] < limit if name in _FLOORS else measured[name] > limit + _ROUNDING)
    ]


_FLOORS = ("agreement", "throughput_per_s")
_ROUNDING = 1e-9


def is_hopeless(limits: Limits, right: np.ndarray, parent_right: np.ndarray) -> bool:
    """Whether a candidate's drop on some rows is beyond doubt larger than the limits allow.

    ``right``: bool [rows], which rows the candidate labels rightly; ``parent_right``: the same of the uncompressed model. The
    standard error is that of a paired difference, sqrt(discordant rows) / rows (McNemar). The drop in accuracy stands for
    the one in macro-F1.
    """
    allowed = [limit for limit in (limits.macro_f1_drop, limits.accuracy_drop) if limit is not None]
    if not allowed:
        return False
    drop = float(parent_right.mean() - right.mean())
    doubt = _STANDARD_ERRORS * float(np.sqrt((right != parent_right).sum())) / len(right)
    return drop - doubt > min(allowed)


def nobody_keeps(
    limits: Limits, candidates: Mapping[int, Mapping[str, float]], parent: Mapping[str, float]
) -> CompressionFailed:
    """The nearest candidates, and what each limit would have to be for the one nearest to it. ``candidates``: metrics by
    trial number, at least one."""
    far = {number: misses(limits, metrics, parent) for number, metrics in candidates.items()}
    nearest = sorted(far, key=lambda number: (max(map(_distance, far[number])), number))[:_NEAREST]
    told = "; ".join(
        f"candidate {n}: " + ", ".join(f"{m.limit} {m.measured:.4g} where {m.asked:.4g} is asked" for m in far[n])
        for n in nearest
    )
    relaxed = ", ".join(f"{name}: {value:.4g}" for name, value in _relaxed(far[nearest[0]]).items())
    return CompressionFailed(
        f"none of {len(candidates)} candidates keeps compression.limits; the nearest are {told}",
        f"relax them ({{{relaxed}}} would let candidate {nearest[0]} pass), widen compression.space or raise "
        "compression.trials, then run the same command again: what was tried is kept",
    )


def _relaxed(missed: Sequence[Miss]) -> dict[str, float]:
    """Rounded away from the measurement, so that what is written here would do."""
    return {
        m.limit: float(np.format_float_positional(m.measured * (0.9995 if m.limit in _FLOORS else 1.0005), 4, fractional=False))
        for m in missed
    }  # fmt: skip


def _distance(miss: Miss) -> float:
    """As a share of the limit."""
    return abs(miss.measured - miss.asked) / (abs(miss.asked) or 1.0)
