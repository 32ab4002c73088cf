"""Whatever the rows: figures are scikit-learn's, also for ties, absent classes, weights and 32-bit probabilities."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from orchestrator.errors import StageError
from orchestrator.evaluation.metrics import OVERALL, PER_CLASS, Scorer
from orchestrator.evaluation.scores import confident_mistakes, evaluate_predictions, resample, slice_scores

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def weighted_rows(draw: st.DrawFn) -> Rows:
    """Labels, probabilities with many ties, and how often each row counts; classes may be absent."""
    classes, rows = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    points = draw(
        st.lists(st.lists(st.integers(1, 4), min_size=classes, max_size=classes), min_size=rows, max_size=rows)
    )
    weights = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows).filter(any))
    probabilities = np.array(points, dtype=float)
    return np.array(labels), probabilities / probabilities.sum(axis=1, keepdims=True), np.array(weights, dtype=float)


@settings(max_examples=60)
@given(weighted_rows())
def test_weighted_figures_are_scikit_learns(rows: Rows) -> None:
    labels, probabilities, weights = rows
    classes, predicted = probabilities.shape[1], probabilities.argmax(axis=1)
    overall, per_class = Scorer(labels, probabilities).score(weights)
    ours = dict(zip(OVERALL, overall, strict=True))
    kept = weights > 0
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted, sample_weight=weights))
    assert ours["log_loss"] == pytest.approx(
        sk.log_loss(labels, probabilities, labels=range(classes), sample_weight=weights)
    )
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(
            labels[kept], predicted[kept], average=average, sample_weight=weights[kept], zero_division=0
        )
        found = [ours[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx(list(expected[:3]), abs=1e-12)
    for c in range(classes):
        _check_ranking(labels == c, probabilities[:, c], weights, dict(zip(PER_CLASS, per_class[:, c], strict=True)))


def _check_ranking(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, ours: dict[str, float]) -> None:
    has_positives, has_negatives = weights[positive].any(), weights[~positive].any()
    assert np.isnan(ours["average_precision"]) == (not has_positives)
    assert np.isnan(ours["roc_auc"]) == (not (has_positives and has_negatives))
    if has_positives:
        expected = sk.average_precision_score(positive, scores, sample_weight=weights)
        assert ours["average_precision"] == pytest.approx(expected, abs=1e-12)
    if has_positives and has_negatives:
        assert ours["roc_auc"] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weights), abs=1e-12)


@settings(max_examples=25)
@given(weighted_rows())
def test_any_rows_give_a_record_of_finite_numbers_and_no_warning(rows: Rows) -> None:
    labels, probabilities, _ = rows
    names = "abcde"[: probabilities.shape[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate_predictions(labels, probabilities, names, samples=100, confidence=0.9, seed=0)
    for interval in [*scores.metrics.values(), *(i for c in scores.per_class.values() for i in c.values())]:
        assert np.isfinite([interval.value, interval.low, interval.high]).all()
        assert interval.low <= interval.high


@settings(max_examples=30)
@given(weighted_rows())
def test_the_calibration_error_is_its_definition(rows: Rows) -> None:
    labels, probabilities, weights = rows
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for number in range(15):
        inside = np.minimum(np.floor(confidence * 15), 14) == number
        share = weights[inside].sum()
        if share:
            gap = np.average(correct[inside], weights=weights[inside]) - np.average(
                confidence[inside], weights=weights[inside]
            )
            expected += share / weights.sum() * abs(gap)
    found = Scorer(labels, probabilities).score(weights)[0][OVERALL.index("calibration_error")]
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_perfect_and_a_reversed_model_are_the_ends_of_the_scale() -> None:
    labels = np.array([0, 1] * 20)
    perfect = dict(zip(OVERALL, Scorer(labels, np.eye(2)[labels]).score()[0], strict=True))
    reversed_ = dict(zip(OVERALL, Scorer(labels, np.eye(2)[1 - labels]).score()[0], strict=True))
    for name in ("accuracy", "macro_f1", "weighted_f1", "roc_auc"):
        assert (perfect[name], reversed_[name]) == (1.0, 0.0), name
    assert perfect["log_loss"] == perfect["calibration_error"] == 0.0
    assert reversed_["calibration_error"] == 1.0


def test_sure_mistakes_in_32_bits_cost_what_scikit_learn_says() -> None:
    labels, probabilities = np.array([0, 1, 1]), np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    found = Scorer(labels, probabilities).score()[0][OVERALL.index("log_loss")]
    assert found == pytest.approx(sk.log_loss(labels, probabilities), abs=1e-6)


def test_a_model_that_answers_with_nan_is_an_error_with_a_next_step() -> None:
    with pytest.raises(StageError, match=r"not finite in 1 of 2 rows: .*learning_rate"):
        Scorer(np.array([0, 1]), np.array([[np.nan, np.nan], [0.5, 0.5]]))


def test_a_resample_draws_each_row_once_on_average() -> None:
    generator = np.random.default_rng(0)
    drawn = np.stack([resample(generator, 50) for _ in range(2000)])
    assert (drawn.sum(axis=1) == 50).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1.0, atol=0.12)
    np.testing.assert_allclose(drawn.var(axis=0).mean(), 0.98, atol=0.03)  # of a binomial(50, 1/50)


def test_a_wider_confidence_is_a_wider_interval_and_more_rows_a_narrower_one() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 2000)
    told = np.eye(2)[np.where(generator.random(2000) < 0.8, labels, 1 - labels)]

    def width(rows: int, confidence: float) -> float:
        scores = evaluate_predictions(labels[:rows], told[:rows], "ab", samples=300, confidence=confidence, seed=0)
        return scores.metrics["accuracy"].high - scores.metrics["accuracy"].low

    assert width(200, 0.8) < width(200, 0.95) < width(200, 0.99)
    # The normal approximation: 2 * 1.96 * sqrt(0.8 * 0.2 / 2000).
    assert width(2000, 0.95) == pytest.approx(0.035, rel=0.15)


def test_one_very_long_slice_value_costs_no_memory() -> None:
    import tracemalloc

    labels, probabilities = np.zeros(5000, dtype=int), np.tile([0.9, 0.1], (5000, 1))
    values = ["short"] * 4999 + ["x" * 20_000]
    tracemalloc.start()
    result = slice_scores(labels, probabilities, values)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {v["rows"] for v in result.values()} == {4999, 1}
    assert peak_bytes < 20_000_000


def test_a_model_without_mistakes_has_none_to_show() -> None:
    assert confident_mistakes(np.array([0, 1]), np.eye(2), 10).tolist() == []
