"""Duplicates, conflicts and leaks, from hashes alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.cleaning import (
    TEST,
    TRAIN,
    VALIDATION,
    Verdict,
    count,
    find_leaks,
    find_repeats,
    group_by_hash,
    hash_inputs,
)
from orchestrator.recipe import Cleaning

DROP, KEEP = Cleaning(), Cleaning(duplicates="keep", conflicts="keep", leaks="keep")


def repeats(
    inputs: list[str], labels: list[int], scope: list[int] | None = None, settings: Cleaning = DROP
) -> list[int]:
    groups = group_by_hash(hash_inputs(inputs))
    scopes = np.array(scope if scope is not None else [-1] * len(inputs), np.int8)
    return find_repeats(groups, np.array(labels, np.int32), scopes, settings).tolist()


def test_the_first_of_equal_rows_is_kept() -> None:
    assert repeats(["a", "b", "a", "a"], [0, 1, 0, 0]) == [0, 0, Verdict.DUPLICATE, Verdict.DUPLICATE]


def test_all_rows_of_a_contradiction_are_set_aside() -> None:
    assert repeats(["a", "b", "a", "a"], [0, 1, 1, 0]) == [Verdict.CONFLICT, 0, Verdict.CONFLICT, Verdict.CONFLICT]


def test_rows_of_different_given_splits_are_no_duplicates() -> None:
    assert repeats(["a", "a", "a"], [0, 0, 0], [0, 2, 2]) == [0, 0, Verdict.DUPLICATE]


def test_the_recipe_may_keep_them() -> None:
    assert repeats(["a", "a", "a"], [0, 1, 0], settings=KEEP) == [0, 0, 0]


def test_surrounding_white_space_makes_no_difference_and_inner_does() -> None:
    assert group_by_hash(hash_inputs(["a b", " a b\n", "a  b"])).tolist() == [0, 0, 1]


def test_a_leak_leaves_train_and_stays_in_test() -> None:
    groups = np.array([0, 1, 2, 0, 1, 2, 3])
    splits = np.array([TRAIN, TRAIN, TRAIN, TEST, VALIDATION, TRAIN, TEST], np.int8)
    assert find_leaks(groups, splits, DROP).tolist() == [True, True, False, False, False, False, False]
    assert not find_leaks(groups, splits, KEEP).any()


def test_validation_rows_of_the_test_set_are_leaks_too() -> None:
    splits = np.array([VALIDATION, TEST], np.int8)
    assert find_leaks(np.array([0, 0]), splits, DROP).tolist() == [True, False]


def test_the_counts_add_up() -> None:
    counts = count(np.array([0, 0, 1, 2, 2, 3, 4, 5, 5, 5], np.int8))
    assert (counts.rows_read, counts.kept, counts.duplicates, counts.conflicts) == (10, 2, 1, 2)
    assert (counts.leaks, counts.missing, counts.unreadable) == (1, 1, 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=60))
def test_after_cleaning_an_input_has_one_row_and_one_label_per_split(rows: list[tuple[int, int, int]]) -> None:
    inputs, labels, scope = (np.array(column) for column in zip(*rows, strict=True))
    verdicts = find_repeats(inputs, labels.astype(np.int32), scope.astype(np.int8), DROP)
    kept = [(s, i) for (i, _, s), verdict in zip(rows, verdicts, strict=True) if verdict == Verdict.KEPT]
    assert len(kept) == len(set(kept))
    for (i, _, s), verdict in zip(rows, verdicts, strict=True):
        contradicted = len({label for j, label, t in rows if (j, t) == (i, s)}) > 1
        assert contradicted == (verdict == Verdict.CONFLICT)
