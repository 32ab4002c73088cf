"""Labels are the user's: mathematics, underscores, other scripts and markup are shown as they are written."""

import warnings

import numpy as np
import pytest

from orchestrator.evaluation import plots
from orchestrator.evaluation.metrics import Scorer


def rows(classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) + np.eye(classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", "_other", "&lt;", "<b>", "中文", "العربية", "😀", 'a"b', "a\\b"])
def test_any_label_is_drawn_as_it_is_written(name: str) -> None:
    labels, probabilities = rows(3)
    names = [name, "b", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plots.roc(labels, probabilities, names)
        table = plots.confusion(Scorer(labels, probabilities).confusion().astype(int), names)
    written = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f">{written}<" in drawn
    assert table.count(f">{written}<") >= 2


def test_a_hundred_thousand_rows_make_a_small_plot() -> None:
    labels, probabilities = rows(10, 100_000)
    assert len(plots.roc(labels, probabilities, "abcdefghij")) < 600_000
    assert len(plots.calibration(labels, probabilities)) < 60_000


def test_many_steps_and_losses_that_blew_up_are_drawn() -> None:
    steps = list(range(20_000))
    losses = list(np.exp(-np.arange(20_000) / 8000))
    losses[10], losses[11] = float("inf"), float("nan")
    assert len(plots.training_curves(steps, losses, [(100, 0.7, 0.5), (200, float("nan"), 0.6)])) < 300_000


def test_plots_follow_the_pages_colours_and_share_no_id() -> None:
    labels, probabilities = rows(3)
    drawn = [plots.roc(labels, probabilities, "abc"), plots.calibration(labels, probabilities)]
    assert all("var(--ink)" in svg and "#010203" not in svg for svg in drawn)
    ids = [{part.split('"')[0] for part in svg.split('id="')[1:]} for svg in drawn]
    assert ids[0] and not ids[0] & ids[1]


def test_only_the_most_frequent_of_many_classes_are_drawn() -> None:
    labels, probabilities = rows(100, 3000)
    names = [f"class {c}" for c in range(100)]
    assert plots.roc(labels, probabilities, names).count(">class ") == plots.MAX_CURVES
    matrix = Scorer(labels, probabilities).confusion().astype(int)
    assert plots.confusion(matrix, names).count(">class ") == 2 * plots.MAX_CONFUSION_CLASSES
