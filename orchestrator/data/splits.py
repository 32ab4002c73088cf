"""Which rows train, validate and test. Pure, and the same for the same seed.

In: labels, input groups, and the group, time or given split of each row. Out: a split per row, int8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator.data.cleaning import SPLITS, TEST, TRAIN, VALIDATION
from orchestrator.errors import DataError
from orchestrator.recipe import Split

UNSET = -1


def at_random(labels: np.ndarray, groups: np.ndarray, settings: Split, seed: int, names: Sequence[str]) -> np.ndarray:
    """Shares at random, stratified by label; rows of one ``group`` (the same input) stay together."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    shares = (settings.train, settings.validation, settings.test)
    if not settings.stratified:
        return _deal(len(first), shares, np.random.default_rng(seed))[inverse]
    return _stratified(labels[first], shares, seed, names)[inverse]


def validation_of(
    labels: np.ndarray, groups: np.ndarray, settings: Split, seed: int, names: Sequence[str]
) -> np.ndarray:
    """Train and validation out of given training rows, in the proportion of their shares."""
    return _part_of(labels, groups, settings, seed, names, settings.validation, VALIDATION)


def test_of(labels: np.ndarray, groups: np.ndarray, settings: Split, seed: int, names: Sequence[str]) -> np.ndarray:
    """Train and test out of given training rows, in the proportion of their shares."""
    return _part_of(labels, groups, settings, seed, names, settings.test, TEST)


def _part_of(
    labels: np.ndarray, groups: np.ndarray, settings: Split, seed: int, names: Sequence[str], part: float, code: int
) -> np.ndarray:
    share = part / (settings.train + part)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    drawn = _stratified(labels[first], (1.0 - share, share), seed, names)
    return np.where(drawn == 1, code, TRAIN).astype(np.int8)[inverse]


def by_group(groups: np.ndarray, settings: Split, seed: int) -> np.ndarray:
    """Whole groups, in random order, until each split has its share of the rows."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < len(SPLITS):
        raise DataError(f"split.by.group needs at least 3 groups, but the column has {len(names)}", "split another way")
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.cumsum(sizes[order]) / len(groups)
    middles = ends - sizes[order] / len(groups) / 2
    chosen = np.digitize(middles, [settings.train, settings.train + settings.validation]).astype(np.int8)
    for code in range(len(SPLITS)):  # however uneven the groups are, no split is empty
        if not (chosen == code).any():
            chosen[np.argmin(np.where(np.bincount(chosen, minlength=3)[chosen] > 1, sizes[order], np.inf))] = code
    result = np.empty(len(names), np.int8)
    result[order] = chosen
    return result[inverse]


def by_time(times: np.ndarray, settings: Split) -> np.ndarray:
    """The oldest rows train, the newest test; rows of the same time stay together."""
    values, inverse, counts = np.unique(times, return_inverse=True, return_counts=True)
    before = (np.cumsum(counts) - counts) / len(times)
    result = np.digitize(before, [settings.train, settings.train + settings.validation]).astype(np.int8)
    if len(set(result.tolist())) < len(SPLITS):
        raise DataError(
            f"split.by.time leaves a split empty: the column has {len(values)} distinct times",
            "use a finer time column, other shares, or a random split",
        )
    return result[inverse]


def check_labels(labels: np.ndarray, splits: np.ndarray, names: Sequence[str]) -> None:
    """Raises DataError when a split is empty, there is one class only, or a label is missing in train."""
    counts = np.stack([np.bincount(labels[splits == code], minlength=len(names)) for code in range(len(SPLITS))])
    for code, split in enumerate(SPLITS):
        if not counts[code].sum():
            raise DataError(f"no rows are left for {split} after cleaning", "add rows, or change data.split")
    present = np.flatnonzero(counts.sum(axis=0))
    if len(present) < 2:
        raise DataError(
            f"there is only one class: {names[int(present[0])]!r}", "a classifier needs at least two labels"
        )
    for code in (VALIDATION, TEST):
        unseen = np.flatnonzero((counts[code] > 0) & (counts[TRAIN] == 0))
        if len(unseen):
            label, rows = names[int(unseen[0])], int(counts[code][unseen[0]])
            raise DataError(
                f"the label {label!r} is in {SPLITS[code]} ({rows} rows) but not in train, so it cannot be learned",
                "correct the label, move rows of it to train, or remove them",
            )


def _stratified(labels: np.ndarray, shares: Sequence[float], seed: int, names: Sequence[str]) -> np.ndarray:
    generator = np.random.default_rng(seed)
    result = np.empty(len(labels), np.int8)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < len(shares):
            raise DataError(
                f"the label {names[int(label)]!r} has {len(rows)} distinct rows, but each of the {len(shares)} splits "
                "needs one",
                "add rows of it, remove it, or set data.split.stratified: false",
            )
        result[rows] = _deal(len(rows), shares, generator)
    return result


def _deal(rows: int, shares: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Exact shares by largest remainder, but at least one row for each while rows last; in random order."""
    exact = np.array(shares) * rows
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: rows - sizes.sum()]] += 1
    while rows >= len(shares) and (sizes == 0).any():
        sizes[np.argmin(sizes)] += 1
        sizes[np.argmax(sizes)] -= 1
    return generator.permutation(np.repeat(np.arange(len(shares), dtype=np.int8), sizes))
