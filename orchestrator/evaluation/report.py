"""The report: one self-contained HTML page that opens from the disk, with no script and no network.

In: the records of the path so far, the test rows and their probabilities. Out: a file. Everything that comes from the
user's data is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from orchestrator.evaluation import plots
from orchestrator.evaluation.scores import confident_mistakes
from orchestrator.page import render
from orchestrator.records import DatasetRecord, EvaluationRecord, Interval, ModelRecord

_TEMPLATE = Path(__file__).with_name("report.html")
_HEADLINES = (
    ("accuracy", "accuracy"), ("macro_f1", "macro F1"), ("roc_auc", "ROC AUC"), ("log_loss", "log loss"),
    ("calibration_error", "calibration error"),
)  # fmt: skip
_MAX_TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class TestRows:
    """What the page shows of the test rows, aligned with each other."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    labels: np.ndarray
    probabilities: np.ndarray
    raw: Sequence[str]
    """The texts, or the images' names."""
    picture: Callable[[int], bytes] | None = None
    """PNG of a row's image."""


def write_report(
    path: Path, evaluation: EvaluationRecord, model: ModelRecord, dataset: DatasetRecord, rows: TestRows,
    step_losses: Sequence[tuple[int, float]], mistakes: int,
) -> None:  # fmt: skip
    """Render the page. ``step_losses``: (step, training loss); ``mistakes``: how many to show at most."""
    values = {
        "evaluation": evaluation, "model": model, "dataset": dataset,
        "headlines": [(title, evaluation.metrics[name]) for name, title in _HEADLINES if name in evaluation.metrics],
        "plots": _plots(evaluation, model, dataset, rows, step_losses),
        "mistakes": _mistakes(dataset, rows, mistakes),
        "max_curves": plots.MAX_CURVES, "max_confusion": plots.MAX_CONFUSION_CLASSES,
    }  # fmt: skip
    path.write_text(render(_TEMPLATE, values, {"interval": _interval, "number": _number}), encoding="utf-8")


def _plots(
    evaluation: EvaluationRecord, model: ModelRecord, dataset: DatasetRecord, rows: TestRows,
    step_losses: Sequence[tuple[int, float]],
) -> dict[str, Markup]:  # fmt: skip
    metric = model.best_metric if model.best_metric != "loss" else "macro_f1"
    epochs = [(e.step, e.validation["loss"], e.validation[metric]) for e in model.epochs]
    drawn = {
        "confusion": plots.confusion(np.array(evaluation.confusion), dataset.labels),
        "roc": plots.roc(rows.labels, rows.probabilities, dataset.labels),
        "calibration": plots.calibration(rows.labels, rows.probabilities),
        "training": plots.training_curves([s for s, _ in step_losses], [v for _, v in step_losses], epochs),
    }
    # Drawn by us from numbers; labels inside were escaped by matplotlib's own XML writer.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _mistakes(dataset: DatasetRecord, rows: TestRows, limit: int) -> list[dict[str, Any]]:
    shown = []
    for index in confident_mistakes(rows.labels, rows.probabilities, limit):
        predicted = int(rows.probabilities[index].argmax())
        picture = base64.b64encode(rows.picture(int(index))).decode() if rows.picture else None
        shown.append({
            "true": dataset.labels[int(rows.labels[index])], "predicted": dataset.labels[predicted],
            "confidence": float(rows.probabilities[index, predicted]),
            "raw": rows.raw[index][:_MAX_TEXT_CHARACTERS], "picture": picture,
        })  # fmt: skip
    return shown


def _interval(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
