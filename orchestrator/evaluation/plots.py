"""The report's plots, as SVG text that takes its colours from the page. In: plain arrays. Out: one ``<svg>`` each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from orchestrator.evaluation.metrics import CALIBRATION_BINS, roc_curve
from orchestrator.page import COLORS, FAINT, figure, short, svg

MAX_CURVES = 10
MAX_CONFUSION_CLASSES = 25


def roc(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> str:
    """One-vs-rest ROC curves of the most frequent classes (of two classes, the second's alone)."""
    with figure() as (drawn, axes):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":")
        curves: list[Line2D] = []
        shown = [1] if len(names) == 2 else np.argsort(-np.bincount(labels, minlength=len(names)))[:MAX_CURVES]
        for color, c in zip(COLORS, shown, strict=False):
            false_rate, true_rate = roc_curve(labels == c, probabilities[:, c])
            curves += axes.plot(false_rate, true_rate, color=color)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
        axes.legend(curves, [short(names[c]) for c in shown], loc="lower right")
        return svg(drawn)


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> str:
    """Accuracy within each bin of confidence; the bars below show how many rows each bin holds."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = counts > 0
    with figure() as (drawn, axes):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":")
        centres = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
        axes.bar(centres, counts / counts.max() * 0.25, width=0.9 / CALIBRATION_BINS, color=FAINT, alpha=0.35)
        mean_confidence = np.bincount(bins, confidence, CALIBRATION_BINS)[filled] / counts[filled]
        accuracy = np.bincount(bins, correct, CALIBRATION_BINS)[filled] / counts[filled]
        axes.plot(mean_confidence, accuracy, color=COLORS[0], marker="o", markersize=4)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.01), ylim=(0, 1.01))
        return svg(drawn)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Rows: true labels; columns: predicted; shade by share of the row. The most frequent classes only."""
    shown = np.sort(np.argsort(-matrix.sum(axis=1), kind="stable")[:MAX_CONFUSION_CLASSES])
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix.sum(axis=1)[shown, None], 1)
    side = 2.4 + 0.28 * len(shown)
    with figure(side + 0.6, side) as (drawn, axes):
        axes.grid(visible=False)
        for (row, column), share in np.ndenumerate(shares):
            color = COLORS[0] if row == column else COLORS[1]
            axes.add_patch(_square(column, row, color, float(share)))
            if part[row, column]:
                axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize=8)
        ticks = range(len(shown))
        axes.set_xticks(ticks, [short(names[c]) for c in shown], rotation=0 if len(shown) <= 6 else 90)
        axes.set_yticks(ticks, [short(names[c]) for c in shown])
        axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(len(shown) - 0.5, -0.5), xlabel="predicted", ylabel="true")
        axes.set_aspect("equal")
        return svg(drawn)


def training_curves(steps: Sequence[int], losses: Sequence[float], epochs: Sequence[tuple[int, float, float]]) -> str:
    """Loss of each step (smoothed over it), and at each epoch's end (step, validation loss, best metric's value)."""
    with figure() as (drawn, axes):
        if steps:
            axes.plot(steps, losses, color=FAINT, linewidth=0.8, alpha=0.5)
            axes.plot(steps, _smooth(np.array(losses)), color=COLORS[0], label="training loss")
        axes.plot([s for s, _, _ in epochs], [v for _, v, _ in epochs], color=COLORS[1], marker="o", markersize=4,
                  label="validation loss")  # fmt: skip
        axes.plot([s for s, _, _ in epochs], [v for _, _, v in epochs], color=COLORS[2], marker="s", markersize=4,
                  label="validation metric")  # fmt: skip
        axes.set(xlabel="step", ylim=(0, None))
        axes.legend(loc="best")
        return svg(drawn)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    smoothed: np.ndarray = (sums[1:] - sums[starts]) / (np.arange(1, len(values) + 1) - starts)
    return smoothed


def _square(x: int, y: int, color: str, share: float) -> Patch:
    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=color, alpha=0.08 + 0.72 * share, linewidth=0)
