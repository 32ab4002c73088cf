"""The decision with many classes and rows, and with answers that do not line up."""

import tracemalloc

import numpy as np
import pytest

from orchestrator.recipe import Promotion
from orchestrator.registry.promotion import Answers, Keep, Promote, decide, probability_better


def answers(labels: np.ndarray, classes: int, accuracy: float, seed: int, kind: type = np.int64) -> Answers:
    generator = np.random.default_rng(seed)
    right = generator.random(len(labels)) < accuracy
    told = np.where(right, labels, generator.integers(0, classes, len(labels)))
    return Answers(np.arange(len(labels)), labels.astype(kind), told.astype(kind))


def probability_row_by_row(challenger: Answers, champion: Answers, metric: str, draws: int) -> float:
    from sklearn.metrics import accuracy_score, f1_score

    def value(mine: Answers, rows: np.ndarray) -> float:
        if metric == "accuracy":
            return float(accuracy_score(mine.labels[rows], mine.predicted[rows]))
        return float(f1_score(mine.labels[rows], mine.predicted[rows], average=metric[:-3]))

    generator, wins = np.random.default_rng(1), 0.0
    for _ in range(draws):
        rows = generator.integers(0, len(challenger.rows), len(challenger.rows))
        gain = value(challenger, rows) - value(champion, rows)
        wins += (gain > 1e-12) + 0.5 * (abs(gain) <= 1e-12)
    return wins / draws


@pytest.mark.parametrize("metric", ["macro_f1", "weighted_f1"])
def test_the_f1_probability_agrees_with_resampling_row_by_row(metric: str) -> None:
    labels = np.random.default_rng(0).choice(4, 300, p=[0.7, 0.2, 0.08, 0.02])
    challenger, champion = answers(labels, 4, 0.80, 2), answers(labels, 4, 0.77, 3)
    expected = probability_row_by_row(challenger, champion, metric, 300)
    assert probability_better(challenger, champion, metric, 0) == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_1500_classes_in_32_bits_are_decided_as_in_64(metric: str) -> None:
    generator = np.random.default_rng(0)
    labels = np.concatenate([np.arange(1500), generator.integers(0, 1500, 300)])
    wide, narrow = (
        probability_better(answers(labels, 1500, 0.70, 2, kind), answers(labels, 1500, 0.705, 3, kind), metric, 0)
        for kind in (np.int64, np.int32)
    )
    assert narrow == wide


def test_many_kinds_of_mistakes_stay_in_bounded_memory() -> None:
    labels = np.random.default_rng(0).integers(0, 60, 12_000)
    challenger, champion = answers(labels, 60, 0.5, 1), answers(labels, 60, 0.45, 2)
    tracemalloc.start()
    assert probability_better(challenger, champion, "accuracy", 0) > 0.99
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000_000


def test_the_decision_is_the_same_for_the_same_seed() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 500)
    first, second = answers(labels, 3, 0.8, 1), answers(labels, 3, 0.79, 2)
    assert decide(first, second, Promotion(), 5) == decide(first, second, Promotion(), 5)


def test_challenger_and_champion_swap_probabilities() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 500)
    first, second = answers(labels, 3, 0.8, 1), answers(labels, 3, 0.79, 2)
    there, back = probability_better(first, second, "macro_f1", 0), probability_better(second, first, "macro_f1", 0)
    assert there + back == pytest.approx(1.0, abs=0.05)


def test_rows_in_another_order_or_with_other_labels_are_not_compared() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 100)
    mine = answers(labels, 3, 0.9, 1)
    moved = Answers(mine.rows[::-1], mine.labels, mine.predicted)
    relabelled = Answers(mine.rows, (mine.labels + 1) % 3, mine.predicted)
    for other in (moved, relabelled):
        verdict = decide(mine, other, Promotion(), 0)
        assert isinstance(verdict, Keep)
        assert "evaluate both on the same data" in verdict.reason


def test_confidence_decides_where_a_gain_counts() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 400)
    champion = answers(labels, 2, 0.8, 1)
    wrong = np.flatnonzero(champion.predicted != labels)[:4]
    predicted = champion.predicted.copy()
    predicted[wrong] = labels[wrong]
    right = np.flatnonzero(champion.predicted == labels)[:1]
    predicted[right] = 1 - labels[right]
    challenger = Answers(champion.rows, labels, predicted)
    probability = probability_better(challenger, champion, "accuracy", 0)
    assert 0.8 < probability < 0.97
    lenient, strict = (Promotion(metric="accuracy", confidence=probability + d) for d in (-0.02, 0.02))
    assert isinstance(decide(challenger, champion, lenient, 0), Promote)
    assert isinstance(decide(challenger, champion, strict, 0), Keep)
