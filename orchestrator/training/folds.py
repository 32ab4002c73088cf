"""Cross-validation and ensembles: which runs a recipe asks for, which rows each sees, what comes out of all together.

In: the recipe; labels and groups of the rows; the runs' records. Out: ``Run``s, a fold for each row, one record. Pure, and
the same for the same seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.data.dataset import Split
from orchestrator.errors import DataError
from orchestrator.recipe import Recipe
from orchestrator.records import CrossValidation, Ensemble, ModelRecord, RunMetrics
from orchestrator.storage import FOLDS, MEMBERS, MODEL, part_location


@dataclass(frozen=True)
class Fold:
    """The rows of one fold validate, those of the others train."""

    number: int
    """From 0 to ``of`` - 1."""
    of: int
    seed: int
    stratified: bool


@dataclass(frozen=True)
class Run:
    """One training run of a recipe."""

    name: str
    """For people: ``fold 2/5``; empty for the recipe's only run."""
    location: str
    seed: int
    fold: Fold | None = None


def fold_runs(recipe: Recipe, location: str) -> tuple[Run, ...]:
    """The runs that the cross-validation takes, below the train run's ``location``; none without ``training.folds``."""
    of, stratified = recipe.training.folds or 0, recipe.data.split.stratified
    return tuple(
        Run(f"fold {i + 1}/{of}", part_location(location, FOLDS, i), recipe.seed, Fold(i, of, recipe.seed, stratified))
        for i in range(of)
    )


def model_runs(recipe: Recipe, location: str) -> tuple[Run, ...]:
    """The runs that the model is made of: the usual one, or an ensemble's members, of which the first has its seed."""
    size = recipe.training.ensemble
    if size == "folds":
        return fold_runs(recipe, location)
    if size == 1:
        return (Run("", location, recipe.seed),)
    return tuple(
        Run(f"member {i + 1}/{size}", part_location(location, MEMBERS, i), member_seed(recipe.seed, i))
        for i in range(size)
    )


def member_seed(seed: int, member: int) -> int:
    """The recipe's own seed for member 0, else one drawn from both: at least 0, below 2 ** 32."""
    return seed if member == 0 else int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint32)[0])


def side_by_side(slots: int, runs: int, workers_alone: int, *, may_shrink: bool) -> tuple[int, int]:
    """Workers of each of several equal runs, and how many runs go on at a time, in so many slots (GPUs or CPUs).

    ``workers_alone``: what one run alone would take; with ``may_shrink`` it takes fewer, so that more go on at a time:
    workers of different runs need not wait for each other.
    """
    if not may_shrink:
        return workers_alone, max(1, min(runs, slots // workers_alone))
    at_once = max(1, min(runs, slots))
    return max(1, min(workers_alone, slots // at_once)), at_once


# -------------------------------------------------------------------------------------------------------- which rows


def deal(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int, *, stratified: bool = True) -> np.ndarray:
    """The fold of each row: int8 [rows], from 0 to ``folds`` - 1.

    ``labels``: int [rows], class indices; ``groups``: int [rows], rows of one group share a fold. Without groups of
    several rows, each class is spread over the folds to within one row, and so is the number of rows. Groups of several
    rows are dealt first, the largest first, each to the fold where its classes are rarest (the idea of scikit-learn's
    StratifiedGroupKFold); the single rows then even out what they can.

    Raises:
        DataError: fewer groups than folds.
    """
    classes = labels if stratified else np.zeros_like(labels)
    generator, filled = np.random.default_rng([seed, folds]), np.zeros((folds, int(classes.max()) + 1), np.int64)
    _, group_of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < folds:
        raise DataError(f"{folds} folds need as many groups, but train and validation have {len(sizes)}",
                        f"set training.folds to at most {len(sizes)}")  # fmt: skip
    result = np.empty(len(labels), np.int8)
    for rows in _large_groups(group_of_row, sizes, generator):
        present, counts = np.unique(classes[rows], return_counts=True)
        shares = (filled[:, present] * (counts / len(rows))).sum(axis=1)
        fold = np.lexsort((filled.sum(axis=1), shares))[0]
        result[rows] = fold
        filled[fold, present] += counts
    single = sizes[group_of_row] == 1
    for code in np.unique(classes[single]):
        rows = generator.permutation(np.flatnonzero(single & (classes == code)))
        given = _even(filled[:, code], filled.sum(axis=1), len(rows))
        result[rows] = np.repeat(np.arange(folds, dtype=np.int8), given)
        filled[:, code] += given
    return result


def _large_groups(group_of_row: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Row numbers of each group of several rows, the largest first, equal ones in random order."""
    order, ends = np.argsort(group_of_row, kind="stable"), np.cumsum(sizes)
    large = generator.permutation(np.flatnonzero(sizes > 1))
    large = large[np.argsort(-sizes[large], kind="stable")]
    return [order[ends[group] - sizes[group] : ends[group]] for group in large]


def _even(filled: np.ndarray, totals: np.ndarray, rows: int) -> np.ndarray:
    """How many of ``rows`` each fold gets, so that all hold as equal a number of the class as they can.

    ``filled``: what each holds of the class already; ``totals``: of all classes, by which the last few are dealt.
    """
    levels = range(int(filled.max()) + rows + 1)
    level = bisect.bisect_right(levels, rows, key=lambda level: int(np.maximum(level - filled, 0).sum())) - 1
    given: np.ndarray = np.maximum(level - filled, 0)
    open_folds = np.flatnonzero(filled <= level)
    open_folds = open_folds[np.argsort((totals + given)[open_folds], kind="stable")]
    given[open_folds[: rows - int(given.sum())]] += 1
    return given


def fold_sizes(recipe: Recipe, folder: Path, names: Sequence[str]) -> list[int]:
    """Rows of each fold of a prepared dataset; none without ``training.folds``. ``names``: of the labels.

    Raises:
        DataError: fewer groups than folds, or a label that some fold's run could not learn, since the fold has all of it.
    """
    fold = next((run.fold for run in fold_runs(recipe, "")), None)
    if fold is None:
        return []
    rows = Split(folder, "train", "validation")
    fold_of_row = _fold_of_rows(rows, fold)
    for code in np.unique(rows.labels).tolist():
        mine = fold_of_row[rows.labels == code]
        if (mine == mine[0]).all():
            raise DataError(
                f"the label {names[code]!r} lies in fold {mine[0] + 1} of {fold.of} alone ({len(mine)} rows), so the run "
                "that is validated on it cannot learn it",
                "add rows or groups of it, remove it, or leave training.folds out",
            )
    sizes: list[int] = np.bincount(fold_of_row, minlength=fold.of).tolist()
    return sizes


def _fold_of_rows(rows: Split, fold: Fold) -> np.ndarray:
    return deal(rows.labels, rows.groups, fold.of, fold.seed, stratified=fold.stratified)


def training_splits(folder: Path, fold: Fold | None) -> tuple[Split, Split]:
    """The rows to train on and those to validate on, of a prepared dataset; no row is copied for it."""
    if fold is None:
        return Split(folder, "train"), Split(folder, "validation")
    rows = Split(folder, "train", "validation")
    held_out = _fold_of_rows(rows, fold) == fold.number
    return rows.only(~held_out), rows.only(held_out)


# --------------------------------------------------------------------------------------------------- what comes out


def cross_validation(records: Sequence[ModelRecord], rows: Sequence[int]) -> CrossValidation:
    """``records``: of the folds' runs; ``rows``: how many each was validated on."""
    runs = tuple(run_metrics(record, number) for record, number in zip(records, rows, strict=True))
    values = {name: [run.validation[name] for run in runs] for name in runs[0].validation}
    return CrossValidation(
        runs=runs,
        mean={name: float(np.mean(v)) for name, v in values.items()},
        deviation={name: float(np.std(v, ddof=1)) for name, v in values.items()},
    )


def run_metrics(record: ModelRecord, rows: int) -> RunMetrics:
    best = next(epoch for epoch in record.epochs if epoch.epoch == record.best_epoch)
    return RunMetrics(location=record.location, rows=rows, best_epoch=record.best_epoch, validation=best.validation)


def joined(members: Sequence[ModelRecord], location: str, ensemble: Ensemble, size_bytes: int) -> ModelRecord:
    """The record of an ensemble from those of its members. ``size_bytes``: of its model folder."""
    first, metric = members[0], members[0].best_metric
    values = ensemble.validation or {metric: float(np.mean([run.validation[metric] for run in ensemble.members]))}
    seconds = sum(member.seconds for member in members)
    trained_rows = sum(member.samples_per_s * member.seconds for member in members)
    return first.model_copy(update={
        "location": location, "model_location": f"{location}/{MODEL}", "best_value": values[metric],
        "steps": sum(m.steps for m in members), "parameters": sum(m.parameters for m in members),
        "seconds": seconds, "samples_per_s": trained_rows / max(seconds, 1e-9), "size_bytes": size_bytes,
        "resumed": sum(m.resumed for m in members), "stopped_early": any(m.stopped_early for m in members),
        "ensemble": ensemble,
    })  # fmt: skip
