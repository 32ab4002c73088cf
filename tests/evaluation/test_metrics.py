"""Every figure agrees with scikit-learn's."""

import time

import numpy as np
import pytest
from sklearn import metrics as sk

from orchestrator.evaluation.metrics import OVERALL, PER_CLASS, Scorer, roc_curve, summary
from orchestrator.evaluation.scores import OTHER, confident_mistakes, evaluate_predictions, slice_scores


def made(rows: int, classes: int, seed: int, *, tied: bool = False, skew: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1, dtype=float) ** -skew
    labels = generator.choice(classes, rows, p=shares / shares.sum())
    labels[:classes] = np.arange(classes)
    logits = generator.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[labels]
    if tied:
        logits = np.round(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


CASES = [made(200, 2, 0), made(300, 5, 1), made(300, 4, 2, tied=True), made(150, 3, 3, skew=3.0), made(8, 3, 4)]


@pytest.mark.parametrize(("labels", "probabilities"), CASES)
def test_overall_metrics_are_scikit_learns(labels: np.ndarray, probabilities: np.ndarray) -> None:
    classes = probabilities.shape[1]
    predicted, one_hot = probabilities.argmax(axis=1), np.eye(classes)[labels]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "log_loss": sk.log_loss(labels, probabilities, labels=range(classes)),
        "roc_auc": sk.roc_auc_score(one_hot, probabilities, average="macro"),
        "average_precision": sk.average_precision_score(one_hot, probabilities, average="macro"),
    }
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        expected |= {f"{average}_precision": precision, f"{average}_recall": recall, f"{average}_f1": f1}
    ours = dict(zip(OVERALL, Scorer(labels, probabilities).score()[0], strict=True))
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize(("labels", "probabilities"), CASES)
def test_metrics_per_class_are_scikit_learns(labels: np.ndarray, probabilities: np.ndarray) -> None:
    classes = probabilities.shape[1]
    expected = sk.precision_recall_fscore_support(
        labels, probabilities.argmax(axis=1), labels=range(classes), zero_division=0
    )
    ours = dict(zip(PER_CLASS, Scorer(labels, probabilities).score()[1], strict=True))
    for name, values in zip(("precision", "recall", "f1"), expected, strict=False):
        np.testing.assert_allclose(ours[name], values, atol=1e-12)
    for c in range(classes):
        assert ours["roc_auc"][c] == pytest.approx(sk.roc_auc_score(labels == c, probabilities[:, c]))
        assert ours["average_precision"][c] == pytest.approx(
            sk.average_precision_score(labels == c, probabilities[:, c])
        )


def test_a_weight_is_a_repetition() -> None:
    labels, probabilities = made(100, 3, 5, tied=True)
    weights = np.random.default_rng(0).integers(0, 4, 100)
    weighted = Scorer(labels, probabilities).score(weights.astype(float))
    repeated = Scorer(np.repeat(labels, weights), np.repeat(probabilities, weights, axis=0)).score()
    np.testing.assert_allclose(weighted[0], repeated[0], atol=1e-12)
    np.testing.assert_allclose(weighted[1], repeated[1], atol=1e-12)


def test_the_roc_curve_is_scikit_learns() -> None:
    labels, probabilities = made(80, 2, 6, tied=True)
    theirs = sk.roc_curve(labels == 1, probabilities[:, 1], drop_intermediate=False)
    ours = roc_curve(labels == 1, probabilities[:, 1])
    np.testing.assert_allclose(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1])


def test_calibration_error_of_known_cases() -> None:
    sure = np.tile([0.9, 0.1], (10, 1))
    index = OVERALL.index("calibration_error")
    assert Scorer(np.array([0] * 9 + [1]), sure).score()[0][index] == pytest.approx(0.0, abs=1e-12)
    assert Scorer(np.array([0] * 5 + [1] * 5), sure).score()[0][index] == pytest.approx(0.4)


def test_a_class_that_the_test_rows_lack_leaves_no_nan_in_the_record() -> None:
    labels, probabilities = made(60, 3, 7)
    keep = labels != 2
    scores = evaluate_predictions(labels[keep], probabilities[keep], "abc", samples=100, confidence=0.95, seed=0)
    assert "roc_auc" not in scores.per_class["c"]
    assert scores.per_class["c"]["support"].value == 0
    assert all(np.isfinite([i.value, i.low, i.high]).all() for i in scores.metrics.values())


def test_intervals_hold_the_value_and_are_the_same_for_the_same_seed() -> None:
    labels, probabilities = made(300, 3, 8)
    first, second = (
        evaluate_predictions(labels, probabilities, "abc", samples=200, confidence=0.95, seed=3) for _ in range(2)
    )
    assert first == second
    for name in ("accuracy", "macro_f1", "roc_auc", "log_loss"):
        interval = first.metrics[name]
        assert interval.low < interval.value < interval.high


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 tests of a model that is right 80 % of the time: a 90 % interval of 150 rows should hold 0.8 in about 180."""
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        correct = generator.random(150) < 0.8
        labels = generator.integers(0, 2, 150)
        told = np.where(correct, labels, 1 - labels)
        interval = evaluate_predictions(labels, np.eye(2)[told], "ab", samples=100, confidence=0.9, seed=seed).metrics
        covered += interval["accuracy"].low <= 0.8 <= interval["accuracy"].high
    assert 160 <= covered <= 196


def test_a_thousand_resamples_of_ten_thousand_rows_take_seconds() -> None:
    labels, probabilities = made(10_000, 10, 9)
    started = time.process_time()
    evaluate_predictions(labels, probabilities, "abcdefghij", samples=100, confidence=0.95, seed=0)
    assert time.process_time() - started < 6.0


def test_slices_of_a_column_and_the_rest_of_many_values() -> None:
    labels, probabilities = made(400, 2, 10)
    shops = [f"shop {i % 60}" for i in range(399)] + [None]
    result = slice_scores(labels, probabilities, shops)
    assert len(result) == 51
    assert sum(values["rows"] for values in result.values()) == 400
    assert OTHER in result
    mask = np.array([s == "shop 0" for s in shops])
    expected = sk.accuracy_score(labels[mask], probabilities[mask].argmax(axis=1))
    assert result["shop 0"]["accuracy"] == pytest.approx(expected)


def test_the_most_confident_mistakes_come_first() -> None:
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.4, 0.6], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    assert confident_mistakes(labels, probabilities, 10).tolist() == [1, 3, 0]
    assert confident_mistakes(labels, probabilities, 1).tolist() == [1]


def test_the_summary_of_a_validation_pass() -> None:
    labels, probabilities = made(100, 3, 11)
    values = summary(labels, probabilities)
    assert values["macro_f1"] == pytest.approx(sk.f1_score(labels, probabilities.argmax(axis=1), average="macro"))
    assert set(values) == {"loss", "accuracy", "macro_f1", "weighted_f1"}
