"""Classification metrics from probabilities, with a weight per row. Pure numpy; conventions are scikit-learn's.

In: labels [rows] and probabilities [rows, classes]. Out: numbers. Rows carry weights so that a bootstrap resample is the
same computation with each row's multiplicity. Undefined values are NaN here and left out of records.
"""

from __future__ import annotations

import numpy as np

from orchestrator.errors import StageError

OVERALL = (
    "accuracy", "macro_precision", "macro_recall", "macro_f1", "weighted_precision", "weighted_recall", "weighted_f1",
    "roc_auc", "average_precision", "log_loss", "calibration_error",
)  # fmt: skip
PER_CLASS = ("precision", "recall", "f1", "roc_auc", "average_precision")
CALIBRATION_BINS = 15


class Scorer:
    """Everything that does not depend on the weights, computed once: predictions, sort orders, bins."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Raises StageError for probabilities that are no numbers."""
        broken = ~np.isfinite(probabilities).all(axis=1)
        if broken.any():
            raise StageError(
                f"the model's answers are not finite in {broken.sum()} of {len(labels)} rows: training diverged",
                "lower training.learning_rate, or set training.precision: fp32",
            )
        self.labels = labels.astype(np.int64)
        self.probabilities = probabilities.astype(np.float64)
        self.rows, self.classes = probabilities.shape
        self.predicted = self.probabilities.argmax(axis=1)
        self.cells = self.labels * self.classes + self.predicted
        self.rankings = [_Ranking(self.labels == c, self.probabilities[:, c]) for c in range(self.classes)]
        true_probability = self.probabilities[np.arange(self.rows), self.labels]
        smallest = np.finfo(probabilities.dtype if probabilities.dtype.kind == "f" else np.float64).eps
        self.surprises = -np.log(np.clip(true_probability, smallest, 1.0))
        self.confidences = self.probabilities[np.arange(self.rows), self.predicted]
        self.bins = np.minimum((self.confidences * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        self.correct = (self.predicted == self.labels).astype(np.float64)

    def confusion(self, weights: np.ndarray | None = None) -> np.ndarray:
        """float64 [classes, classes]: true label by predicted label."""
        flat = np.bincount(self.cells, weights, minlength=self.classes**2)
        return flat.reshape(self.classes, self.classes).astype(np.float64)

    def score(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values of OVERALL [metrics] and of PER_CLASS [metrics, classes]."""
        weights = np.ones(self.rows) if weights is None else weights
        confusion = self.confusion(weights)
        precision, recall, f1 = precision_recall_f1(confusion)
        ranked = np.array([ranking.areas(weights) for ranking in self.rankings]).T
        support = confusion.sum(axis=1)
        seen = (support + confusion.sum(axis=0)) > 0
        total = weights.sum()
        per_class = np.stack([precision, recall, f1, *ranked])
        overall = [
            np.trace(confusion) / total,
            *(values[seen].mean() for values in (precision, recall, f1)),
            *((values * support).sum() / total for values in (precision, recall, f1)),
            *(_nanmean(areas) for areas in ranked),
            (self.surprises * weights).sum() / total,
            self._calibration_error(weights),
        ]
        return np.array(overall), per_class

    def _calibration_error(self, weights: np.ndarray) -> float:
        """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy over equal-width bins."""
        gaps = np.bincount(self.bins, weights * (self.correct - self.confidences), minlength=CALIBRATION_BINS)
        return float(np.abs(gaps).sum() / weights.sum())


class _Ranking:
    """Rows by falling score of one class, ties together."""

    def __init__(self, positive: np.ndarray, scores: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
        self.positive = positive[self.order].astype(np.float64)

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives at each distinct threshold."""
        ranked = weights[self.order]
        hits = np.cumsum(ranked * self.positive)[self.ends]
        return hits, np.cumsum(ranked)[self.ends] - hits

    def areas(self, weights: np.ndarray) -> tuple[float, float]:
        """Area under the ROC curve (trapezoids) and average precision (steps); NaN without positives or negatives."""
        hits, misses = self.counts(weights)
        if not hits[-1]:
            return float("nan"), float("nan")
        precision = hits / np.maximum(hits + misses, 1e-300)
        average_precision = float((np.diff(hits, prepend=0.0) * precision).sum() / hits[-1])
        if not misses[-1]:
            return float("nan"), average_precision
        middle_hits = hits - np.diff(hits, prepend=0.0) / 2
        return float((np.diff(misses, prepend=0.0) * middle_hits).sum() / (hits[-1] * misses[-1])), average_precision


def precision_recall_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each [classes]; 0 where a ratio is undefined."""
    hits, predicted, support = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, from (0, 0) to (1, 1), of a boolean label."""
    hits, misses = _Ranking(labels, scores).counts(np.ones(len(labels)))
    return np.append(0.0, _ratio(misses, misses[-1:])), np.append(0.0, _ratio(hits, hits[-1:]))


def summary(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """What a validation pass tells: loss, accuracy, macro_f1, weighted_f1."""
    overall = dict(zip(OVERALL, Scorer(labels, probabilities).score()[0].tolist(), strict=True))
    return {"loss": overall["log_loss"]} | {name: overall[name] for name in ("accuracy", "macro_f1", "weighted_f1")}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / np.where(denominator == 0, 1.0, denominator) * (denominator != 0)


def _nanmean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
