"""What compression did to each class and each slice: a drop that the whole hides. Pure.

In: labels, the probabilities before and after. Out: ``Change`` per class, and per value of each sliced column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.evaluation.metrics import PER_CLASS, Scorer
from orchestrator.evaluation.scores import slice_scores
from orchestrator.records import Change

_DEFAULT_ALLOWED, _WORSE = 0.01, 2.0
"""A part may lose so many times what the whole may, before it is flagged."""
_ROWS = 2
"""A change that fewer rows make is chance."""


def changes_of(
    labels: np.ndarray, before: np.ndarray, after: np.ndarray, names: Sequence[str],
    columns: Mapping[str, Sequence[str | None]], allowed: float | None,
) -> tuple[dict[str, Change], dict[str, dict[str, Change]]]:  # fmt: skip
    """``before``, ``after``: probabilities [rows, classes]; ``columns``: slices' values [rows]; ``allowed``: drop of the
    macro-F1."""
    limit = _WORSE * (_DEFAULT_ALLOWED if allowed is None else allowed)
    f1 = PER_CLASS.index("f1")
    old, new = (Scorer(labels, probabilities).score()[1][f1] for probabilities in (before, after))
    rows = np.bincount(labels, minlength=len(names))
    classes = {name: _change(int(rows[c]), float(old[c]), float(new[c]), limit) for c, name in enumerate(names)}
    slices = {}
    for column, values in columns.items():
        was, now = slice_scores(labels, before, values), slice_scores(labels, after, values)
        slices[column] = {
            value: _change(int(now[value]["rows"]), was[value]["macro_f1"], now[value]["macro_f1"], limit)
            for value in now
        }
    return classes, slices


def _change(rows: int, before: float, after: float, limit: float) -> Change:
    chance = _ROWS / rows if rows else 1.0
    return Change(rows=rows, before=before, after=after, is_flagged=before - after > max(limit, chance))
