"""Who is champion: a pure decision from the answers of both models on the same test rows.

In: labels and predictions of challenger and champion. Out: ``Promote`` or ``Keep``, each with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.recipe import Promotion

_RESAMPLES = 2000
_AT_ONCE = 2_000_000
"""Counts of drawn rows that are in memory at a time."""


@dataclass(frozen=True)
class Answers:
    """A model's answers on the test rows."""

    rows: np.ndarray
    """int64 [rows]: each row's number in the dataset"""
    labels: np.ndarray
    """int [rows]: the true class"""
    predicted: np.ndarray
    """int [rows]: the class with the highest probability"""


@dataclass(frozen=True)
class Promote:
    reason: str


@dataclass(frozen=True)
class Keep:
    reason: str


def decide(
    challenger: Answers, champion: Answers | None, settings: Promotion, seed: int, allowed_drop: float | None = None
) -> Promote | Keep:
    """Promote when the challenger is better with ``settings.confidence``, by a paired bootstrap over the rows.

    ``allowed_drop``: of a challenger that is the champion, compressed: it is to be cheaper, and may be worse by so much.
    """
    metric = settings.metric
    value = score(challenger.labels, challenger.predicted, metric)
    if value < settings.at_least:
        return Keep(f"its {metric} {value:.4f} is below promotion.at_least {settings.at_least:g}")
    if champion is None:
        return Promote(f"the first champion, {metric} {value:.4f}")
    if not np.array_equal(challenger.rows, champion.rows) or not np.array_equal(challenger.labels, champion.labels):
        return Keep("it was tested on other rows than the champion; evaluate both on the same data")
    before = score(champion.labels, champion.predicted, metric)
    if allowed_drop is not None:
        told = f"the champion, compressed: {metric} {value:.4f} against {before:.4f}"
        kept = before - value <= allowed_drop
        return Promote(told) if kept else Keep(f"{told}, a larger drop than the limit of {allowed_drop:g}")
    probability = probability_better(challenger, champion, metric, seed)
    told = f"{metric} {value:.4f} against {before:.4f}, better with probability {probability:.3f}"
    if probability >= settings.confidence:
        return Promote(told)
    return Keep(f"{told}, less than promotion.confidence {settings.confidence:g}")


def probability_better(challenger: Answers, champion: Answers, metric: str, seed: int) -> float:
    """Share of paired resamples in which the challenger scores higher; a tie counts half.

    Each resample draws the same rows for both, so what makes a row hard for both cancels (Efron & Tibshirani 1993).
    """
    classes = int(max(challenger.labels.max(), challenger.predicted.max(), champion.predicted.max())) + 1
    generator = np.random.default_rng(seed)
    # All that matters of a row is its (label, answer, answer): rows of one kind are drawn together.
    kinds = (challenger.labels.astype(np.int64) * classes + challenger.predicted) * classes + champion.predicted
    names, counts = np.unique(kinds, return_counts=True)
    labels, first, second = names // classes**2, names // classes % classes, names % classes
    wins, at_once = 0.0, max(1, _AT_ONCE // len(names))
    for start in range(0, _RESAMPLES, at_once):
        drawn = generator.multinomial(len(kinds), counts / len(kinds), min(at_once, _RESAMPLES - start))
        gains = _scores(labels, first, drawn, classes, metric) - _scores(labels, second, drawn, classes, metric)
        wins += float(((gains > 0) + 0.5 * (gains == 0)).sum())
    return wins / _RESAMPLES


def score(labels: np.ndarray, predicted: np.ndarray, metric: str) -> float:
    """``accuracy``, ``macro_f1`` or ``weighted_f1``, as scikit-learn defines them."""
    classes = int(max(labels.max(), predicted.max())) + 1
    return float(_scores(labels, predicted, np.ones((1, len(labels))), classes, metric)[0])


def _scores(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int, metric: str) -> np.ndarray:
    """The metric of each row of ``weights`` [resamples, kinds]."""
    total = weights.sum(axis=1)
    if metric == "accuracy":
        return np.asarray(weights @ (labels == predicted) / total)
    is_label, is_predicted = (np.eye(classes)[values] for values in (labels, predicted))
    support, answered = weights @ is_label, weights @ is_predicted
    hits = weights @ (is_label * is_predicted)
    f1 = np.where(support + answered > 0, 2 * hits / np.maximum(support + answered, 1), 0.0)
    if metric == "weighted_f1":
        return np.asarray((f1 * support).sum(axis=1) / total)
    return np.asarray(f1.sum(axis=1) / np.maximum(((support + answered) > 0).sum(axis=1), 1))
