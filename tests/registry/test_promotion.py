"""The decision who is champion, without files."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from orchestrator.recipe import Promotion
from orchestrator.registry.promotion import Answers, Keep, Promote, decide, probability_better, score

GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, 3, 1000)


def answers(accuracy: float, seed: int = 0, labels: np.ndarray = LABELS) -> Answers:
    generator = np.random.default_rng(seed)
    right = generator.random(len(labels)) < accuracy
    return Answers(np.arange(len(labels)), labels, np.where(right, labels, (labels + 1) % 3))


def test_the_first_model_is_champion() -> None:
    assert isinstance(decide(answers(0.7), None, Promotion(), 0), Promote)


def test_a_clear_win_is_promoted_and_its_reverse_is_not() -> None:
    good, bad = answers(0.9, 1), answers(0.7, 2)
    assert isinstance(decide(good, bad, Promotion(), 0), Promote)
    verdict = decide(bad, good, Promotion(), 0)
    assert isinstance(verdict, Keep)
    assert "macro_f1 0.7" in verdict.reason


def test_a_gain_within_the_noise_is_held() -> None:
    champion = answers(0.8, 1)
    predicted = champion.predicted.copy()
    wrong = np.flatnonzero(predicted != champion.labels)[:2]
    predicted[wrong] = champion.labels[wrong]
    lucky = Answers(champion.rows, champion.labels, predicted)
    right_now_wrong = np.flatnonzero(predicted == champion.labels)[:1]
    predicted[right_now_wrong] = (champion.labels[right_now_wrong] + 1) % 3
    assert isinstance(decide(lucky, champion, Promotion(), 0), Keep)


def test_the_same_answers_are_as_likely_better_as_worse() -> None:
    assert probability_better(answers(0.8, 1), answers(0.8, 1), "accuracy", 0) == 0.5


def test_a_model_below_the_floor_is_never_promoted() -> None:
    verdict = decide(answers(0.7), None, Promotion(at_least=0.8), 0)
    assert isinstance(verdict, Keep)
    assert "promotion.at_least 0.8" in verdict.reason


def test_other_test_rows_are_not_compared() -> None:
    other = answers(0.5, 1, LABELS[:500])
    verdict = decide(answers(0.9), other, Promotion(), 0)
    assert isinstance(verdict, Keep)
    assert "other rows" in verdict.reason


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "weighted_f1"])
def test_scores_are_scikit_learns(metric: str) -> None:
    mine = answers(0.75, 3)
    expected = {
        "accuracy": accuracy_score(mine.labels, mine.predicted),
        "macro_f1": f1_score(mine.labels, mine.predicted, average="macro"),
        "weighted_f1": f1_score(mine.labels, mine.predicted, average="weighted"),
    }[metric]
    assert score(mine.labels, mine.predicted, metric) == pytest.approx(expected)


def test_the_probability_agrees_with_resampling_row_by_row() -> None:
    challenger, champion = answers(0.80, 4), answers(0.78, 5)
    generator = np.random.default_rng(1)
    wins = []
    for _ in range(2000):
        rows = generator.integers(0, 1000, 1000)
        gain = (challenger.predicted == LABELS)[rows].mean() - (champion.predicted == LABELS)[rows].mean()
        wins.append((gain > 0) + 0.5 * (gain == 0))
    assert probability_better(challenger, champion, "accuracy", 0) == pytest.approx(np.mean(wins), abs=0.03)


def test_a_hundred_thousand_rows_are_decided_at_once() -> None:
    labels = GENERATOR.integers(0, 3, 100_000)
    assert isinstance(decide(answers(0.81, 1, labels), answers(0.80, 2, labels), Promotion(), 0), Promote)
