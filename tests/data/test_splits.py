"""Which rows train, validate and test."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.cleaning import TEST, TRAIN, VALIDATION
from orchestrator.data.splits import at_random, by_group, by_time, check_labels, validation_of
from orchestrator.errors import DataError
from orchestrator.recipe import Split

NAMES = ("a", "b", "c")


def test_shares_are_exact_in_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    splits = at_random(labels, np.arange(160), Split(), 1, NAMES)
    for label, sizes in ((0, [80, 10, 10]), (1, [40, 5, 5]), (2, [8, 1, 1])):
        assert np.bincount(splits[labels == label], minlength=3).tolist() == sizes


def test_the_seed_decides() -> None:
    labels = np.arange(200) % 2
    one, same, other = (at_random(labels, np.arange(200), Split(), seed, NAMES) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


@given(st.lists(st.integers(0, 15), min_size=30, max_size=80), st.booleans())
def test_the_same_input_never_straddles_splits(groups: list[int], stratified: bool) -> None:
    inputs = np.concatenate([np.array(groups), np.arange(100, 130)])
    labels = inputs % 2
    splits = at_random(labels, inputs, Split(stratified=stratified), 3, NAMES)
    for value in np.unique(inputs):
        assert len(set(splits[inputs == value].tolist())) == 1


def test_a_class_with_too_few_rows_is_an_error_with_figures() -> None:
    with pytest.raises(DataError, match=r"label 'b' has 2 distinct rows, but each of the 3 splits"):
        at_random(np.array([0] * 10 + [1] * 2), np.arange(12), Split(), 1, NAMES)


def test_a_missing_validation_set_is_drawn_from_train() -> None:
    labels = np.arange(180) % 2
    splits = validation_of(labels, np.arange(180), Split(), 1, NAMES)
    assert np.bincount(splits, minlength=3).tolist() == [160, 20, 0]


@given(st.integers(3, 30), st.integers(0, 5))
def test_groups_stay_whole_and_no_split_is_empty(groups: int, seed: int) -> None:
    members = np.random.default_rng(seed).integers(0, groups, 300)
    members[:groups] = np.arange(groups)
    splits = by_group(members, Split(), seed)
    assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}
    assert all(len(set(splits[members == group].tolist())) == 1 for group in range(groups))


def test_many_groups_meet_the_shares() -> None:
    sizes = np.bincount(by_group(np.arange(3000) // 3, Split(), 1)) / 3000
    assert np.allclose(sizes, [0.8, 0.1, 0.1], atol=0.01)


def test_too_few_groups_are_an_error() -> None:
    with pytest.raises(DataError, match="at least 3 groups, but the column has 2"):
        by_group(np.array([1, 1, 2]), Split(), 1)


def test_the_oldest_train_and_the_newest_test() -> None:
    times = np.random.default_rng(0).permutation(100)
    splits = by_time(times, Split())
    assert times[splits == TRAIN].max() < times[splits == VALIDATION].min()
    assert times[splits == VALIDATION].max() < times[splits == TEST].min()
    assert np.bincount(splits).tolist() == [80, 10, 10]


def test_rows_of_the_same_time_stay_together_or_it_is_an_error() -> None:
    with pytest.raises(DataError, match="2 distinct times"):
        by_time(np.array([1] * 50 + [2] * 50), Split())


def test_one_class_only_is_an_error() -> None:
    with pytest.raises(DataError, match="only one class: 'a'"):
        check_labels(np.zeros(6, int), np.array([0, 0, 1, 1, 2, 2]), NAMES)


def test_a_label_seen_only_in_test_is_an_error_with_figures() -> None:
    with pytest.raises(DataError, match=r"label 'b' is in test \(2 rows\) but not in train"):
        check_labels(np.array([0, 0, 2, 1, 1, 2]), np.array([0, 1, 0, 2, 2, 2]), NAMES)


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows are left for validation"):
        check_labels(np.array([0, 1, 0, 1]), np.array([0, 0, 2, 2]), NAMES)
