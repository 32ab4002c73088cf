"""Metrics with their bootstrap confidence intervals, metrics per slice, and the most confident mistakes.

In: labels and probabilities of the test rows. Out: plain values for the EvaluationRecord. Pure numpy, seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.evaluation.metrics import OVERALL, PER_CLASS, Scorer
from orchestrator.records import Interval

_MAX_SLICE_VALUES = 50
OTHER = "(other)"


@dataclass(frozen=True)
class Scores:
    metrics: dict[str, Interval]
    per_class: dict[str, dict[str, Interval]]
    confusion: tuple[tuple[int, ...], ...]


def evaluate_predictions(
    labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], *, samples: int, confidence: float, seed: int
) -> Scores:
    """All metrics with percentile bootstrap intervals (Efron & Tibshirani 1993) over ``samples`` resamples of the rows."""
    scorer = Scorer(labels, probabilities)
    overall, per_class = scorer.score()
    generator = np.random.default_rng(seed)
    resampled = [scorer.score(resample(generator, len(labels))) for _ in range(samples)]
    overall_bounds = _bounds(np.stack([values for values, _ in resampled]), confidence)
    class_bounds = _bounds(np.stack([values for _, values in resampled]), confidence)
    confusion = scorer.confusion().astype(int)
    support = confusion.sum(axis=1)
    return Scores(
        _intervals(OVERALL, overall, overall_bounds),
        {
            name: _intervals(PER_CLASS, per_class[:, c], class_bounds[:, :, c])
            | {"support": Interval(value=support[c], low=support[c], high=support[c])}
            for c, name in enumerate(names)
        },
        tuple(tuple(row) for row in confusion.tolist()),
    )


def resample(generator: np.random.Generator, rows: int) -> np.ndarray:
    """How often each row is drawn when ``rows`` rows are drawn with replacement: float64 [rows]."""
    return np.bincount(generator.integers(0, rows, rows), minlength=rows).astype(np.float64)


def slice_scores(
    labels: np.ndarray, probabilities: np.ndarray, values: Sequence[str | None]
) -> dict[str, dict[str, float]]:
    """Rows, accuracy and macro_f1 for each value of a column, the most frequent ones; the rest under ``(other)``."""
    names, codes = np.unique(np.array([v or "(none)" for v in values], object), return_inverse=True)
    by_size = np.argsort(-np.bincount(codes), kind="stable")
    result = {}
    for code in by_size[:_MAX_SLICE_VALUES]:
        result[str(names[code])] = _slice(labels, probabilities, codes == code)
    if len(names) > _MAX_SLICE_VALUES:
        result[OTHER] = _slice(labels, probabilities, np.isin(codes, by_size[_MAX_SLICE_VALUES:]))
    return result


def _slice(labels: np.ndarray, probabilities: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    overall = dict(zip(OVERALL, Scorer(labels[mask], probabilities[mask]).score()[0].tolist(), strict=True))
    return {"rows": int(mask.sum()), "accuracy": overall["accuracy"], "macro_f1": overall["macro_f1"]}


def confident_mistakes(labels: np.ndarray, probabilities: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the wrongly predicted rows, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:limit]


def _bounds(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Lower and upper percentile over the first axis, resamples in which a metric is undefined left out."""
    tail = (1.0 - confidence) / 2
    known = np.where(np.isnan(samples).all(axis=0), 0.0, samples)
    bounds: np.ndarray = np.nanquantile(known, [tail, 1.0 - tail], axis=0)
    return bounds


def _intervals(names: Sequence[str], values: np.ndarray, bounds: np.ndarray) -> dict[str, Interval]:
    """Undefined metrics are left out."""
    triples = zip(names, values.tolist(), bounds[0].tolist(), bounds[1].tolist(), strict=True)
    return {n: Interval(value=v, low=low, high=high) for n, v, low, high in triples if not np.isnan(v)}
