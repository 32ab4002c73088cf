"""What compression did to classes and slices."""

import numpy as np

from orchestrator.compression.changes import changes_of


def _sure(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[labels]


def test_a_drop_that_is_hidden_in_a_rare_class_is_flagged():
    labels = np.array([0] * 480 + [1] * 20)
    after = labels.copy()
    after[480:490] = 0  # half of the rare class is lost: 2% of all rows
    classes, _ = changes_of(labels, _sure(labels, 2), _sure(after, 2), ("common", "rare"), {}, 0.03)
    assert classes["rare"].is_flagged
    assert not classes["common"].is_flagged
    assert classes["rare"].before == 1.0
    assert classes["rare"].rows == 20


def test_one_row_of_a_small_class_is_chance():
    labels = np.array([0] * 480 + [1] * 20)
    after = labels.copy()
    after[480] = 0
    classes, _ = changes_of(labels, _sure(labels, 2), _sure(after, 2), ("common", "rare"), {}, 0.01)
    assert not classes["rare"].is_flagged


def test_a_slice_that_got_worse_is_flagged_and_the_others_are_not():
    labels = np.tile([0, 1], 100)
    after = labels.copy()
    after[:40] = 0
    columns = {"shop": ["north"] * 60 + ["south"] * 140}
    _, slices = changes_of(labels, _sure(labels, 2), _sure(after, 2), ("no", "yes"), columns, 0.01)
    assert slices["shop"]["north"].is_flagged
    assert not slices["shop"]["south"].is_flagged
    assert slices["shop"]["north"].rows == 60
