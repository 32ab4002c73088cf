"""Limits: bounds, misses, what nobody keeps, and which candidates are beyond doubt outside."""

import numpy as np
import pytest

from orchestrator.compression.limits import bounds_of, is_hopeless, misses, nobody_keeps
from orchestrator.recipe_compression import Limits

BEFORE = {"macro_f1": 0.90, "accuracy": 0.92, "latency_ms": 8.0, "size_mb": 90.0}
GOOD = {"macro_f1": 0.895, "accuracy": 0.92, "agreement": 0.97, "latency_ms": 1.0, "latency_p95_ms": 1.4, "size_mb": 15.0,
        "throughput_per_s": 900.0, "memory_mb": 400.0}  # fmt: skip
ALL = Limits(macro_f1_drop=0.01, accuracy_drop=0.01, agreement=0.95, latency_p50_ms=2.0, latency_p95_ms=3.0,
             throughput_per_s=500.0, size_bytes=20_000_000, memory_bytes=500_000_000)  # fmt: skip


def test_a_candidate_within_all_limits_misses_none():
    assert misses(ALL, GOOD, BEFORE) == []


@pytest.mark.parametrize(
    ("metric", "value", "limit", "measured"),
    [
        ("macro_f1", 0.88, "macro_f1_drop", 0.02), ("accuracy", 0.90, "accuracy_drop", 0.02),
        ("agreement", 0.9, "agreement", 0.9), ("latency_ms", 2.5, "latency_p50_ms", 2.5),
        ("latency_p95_ms", 4.0, "latency_p95_ms", 4.0), ("throughput_per_s", 400.0, "throughput_per_s", 400.0),
        ("size_mb", 21.0, "size_bytes", 21e6), ("memory_mb", 501.0, "memory_bytes", 501e6),
    ],
)  # fmt: skip
def test_each_limit_is_missed_alone_and_says_by_how_much(metric, value, limit, measured):
    (miss,) = misses(ALL, GOOD | {metric: value}, BEFORE)
    assert miss.limit == limit
    assert miss.measured == pytest.approx(measured)


def test_bounds_and_misses_agree_on_every_limit():
    """The search knows bounds, the choice knows limits: nobody may be inside of one and outside of the other."""
    bounds = bounds_of(ALL, BEFORE)
    assert len(bounds) == len(ALL.model_dump())
    for metric, bound in bounds.items():
        for nudge in (-1e-4, 1e-4):
            value = (bound.at_most if bound.at_most is not None else bound.at_least) * (1 + nudge)
            inside = value <= bound.at_most if bound.at_most is not None else value >= bound.at_least
            assert bool(misses(ALL, GOOD | {metric: value}, BEFORE)) is not inside, metric


def test_a_limit_that_is_not_set_is_kept_by_all():
    assert misses(Limits(macro_f1_drop=None), {"macro_f1": 0.1}, BEFORE) == []


def test_a_drop_that_equals_the_limit_is_kept_whatever_the_rounding():
    assert misses(Limits(macro_f1_drop=0.1), {"macro_f1": 0.8}, {"macro_f1": 0.9, "accuracy": 0.9}) == []


def test_the_error_names_the_nearest_candidates_and_limits_that_would_let_one_pass():
    tried = {3: GOOD | {"latency_ms": 9.0}, 5: GOOD | {"latency_ms": 2.2}, 7: GOOD | {"macro_f1": 0.5}}
    error = nobody_keeps(ALL, tried, BEFORE)
    assert error.exit_status == 1
    assert "candidate 5: latency_p50_ms 2.2 where 2 is asked" in str(error)
    assert str(error).index("candidate 5") < str(error).index("candidate 3")
    relaxed = ALL.model_copy(update={"latency_p50_ms": 2.201})
    assert "latency_p50_ms: 2.201" in str(error)
    assert misses(relaxed, tried[5], BEFORE) == []


def test_a_candidate_that_is_wrong_far_more_often_is_hopeless_and_one_that_may_be_chance_is_not():
    parent = np.ones(200, bool)
    few, many = parent.copy(), parent.copy()
    few[:4], many[:60] = False, False
    assert not is_hopeless(Limits(macro_f1_drop=0.01), few, parent)
    assert is_hopeless(Limits(macro_f1_drop=0.01), many, parent)


def test_without_a_limit_on_quality_nobody_is_hopeless():
    wrong = np.zeros(200, bool)
    assert not is_hopeless(Limits(macro_f1_drop=None), wrong, ~wrong)
