"""Folds: every row in exactly one, classes spread evenly, groups whole, the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.dataset import Split
from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.errors import DataError, RecipeError
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import EpochMetrics, ModelRecord
from orchestrator.storage import Storage
from orchestrator.tasks import TASKS
from orchestrator.training.folds import (
    Fold,
    cross_validation,
    deal,
    fold_runs,
    fold_sizes,
    member_seed,
    model_runs,
    side_by_side,
    training_splits,
)


def counts(labels: np.ndarray, fold_of_row: np.ndarray, folds: int) -> np.ndarray:
    """Rows of each fold and label."""
    table = np.zeros((folds, int(labels.max()) + 1), int)
    np.add.at(table, (fold_of_row, labels), 1)
    return table


@settings(max_examples=60)
@given(st.integers(2, 20), st.lists(st.integers(0, 6), min_size=20, max_size=300), st.integers(0, 2**32 - 1))
def test_single_rows_are_spread_to_within_one_row_by_class_and_in_all(folds: int, labels: list[int], seed: int) -> None:
    of_row = np.array(labels)
    table = counts(of_row, deal(of_row, np.arange(len(labels)), folds, seed), folds)
    assert np.ptp(table, axis=0).max() <= 1 and np.ptp(table.sum(axis=1)) <= 1
    assert table.sum() == len(labels) and table.sum(axis=1).min() > 0


@settings(max_examples=60)
@given(st.integers(2, 8), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=60, max_size=300),
       st.booleans())  # fmt: skip
def test_no_group_is_torn_apart_and_no_fold_is_empty(folds: int, rows: list[tuple[int, int]], stratified: bool) -> None:
    groups, labels = np.array(rows).T
    if len(np.unique(groups)) < folds:
        return
    fold_of_row = deal(labels, groups, folds, 1, stratified=stratified)
    assert all(len(set(fold_of_row[groups == group].tolist())) == 1 for group in np.unique(groups))
    assert set(fold_of_row.tolist()) == set(range(folds))


def test_groups_of_many_sizes_still_give_folds_of_like_size_and_mix() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), generator.integers(1, 40, 200))
    labels = (generator.random(len(groups)) < np.where(groups % 3 == 0, 0.6, 0.1)).astype(int)
    table = counts(labels, deal(labels, groups, 5, 3), 5)
    sizes = table.sum(axis=1)
    assert sizes.max() / sizes.min() < 1.05
    assert np.ptp(table[:, 1] / sizes) < 0.02, "groups differ by half in their share of the label"


def test_the_same_seed_gives_the_same_folds_and_another_seed_others() -> None:
    labels, groups = np.arange(200) % 3, np.arange(200) // 2
    one, same, other = (deal(labels, groups, 4, seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_fewer_groups_than_folds_are_refused() -> None:
    with pytest.raises(
        DataError, match="3 folds need as many groups, but train and validation have 2: set .* at most 2"
    ):
        deal(np.array([0, 1, 0, 1]), np.array([5, 5, 6, 6]), 3, 1)


# ------------------------------------------------------------------------------------------------ of a prepared dataset


def prepared(
    reviews: Path, backbone: Path, root: Path, extra: str = "", training: str = "folds: 3"
) -> tuple[Recipe, Path]:
    recipe = parse_recipe(
        f"name: r\ntask: text_classification\nstorage: {root}\ndata: {{source: {reviews}{extra}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: 32}}\ntraining: {{{training}}}\n"
    )
    return recipe, folder_of(recipe)


def folder_of(recipe: Recipe) -> Path:
    """Of the recipe's dataset, prepared here."""
    storage, source = Storage(recipe.storage), open_source(recipe.data)
    encoder = TASKS[recipe.task].encoder(recipe.model, ())
    dataset = prepare(recipe, encoder, source, storage, content_key(recipe, encoder, source, storage))
    return storage.path(dataset.location)


def numbers(split: Split) -> list[int]:
    rows: list[int] = split.column("row").to_pylist()
    return rows


def test_each_row_but_those_of_test_validates_once_and_trains_in_all_other_folds(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    recipe, folder = prepared(reviews_csv, tiny_backbone, tmp_path)
    known = sorted(numbers(Split(folder, "train")) + numbers(Split(folder, "validation")))
    pairs = [training_splits(folder, run.fold) for run in fold_runs(recipe, "train/r")]
    assert sorted(row for _, validation in pairs for row in numbers(validation)) == known
    for train, validation in pairs:
        assert sorted(numbers(train) + numbers(validation)) == known
        assert not set(numbers(train)) & set(numbers(Split(folder, "test")))
    assert fold_sizes(recipe, folder, ("bad", "good")) == [len(validation) for _, validation in pairs]
    assert not list(folder.parent.glob("*/fold*")), "no row is written again"


def test_a_folds_inputs_and_labels_are_those_of_its_rows(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    _, folder = prepared(reviews_csv, tiny_backbone, tmp_path)
    whole = Split(folder, "train", "validation")
    of_number = dict(zip(numbers(whole), range(len(whole)), strict=True))
    _, part = training_splits(folder, Fold(1, 3, 17, stratified=True))
    rows = np.array([of_number[number] for number in numbers(part)])
    assert part.inputs(np.arange(len(part))).equals(whole.inputs(rows))
    assert (part.labels == whole.labels[rows]).all() and len(part) > 100


def test_the_recipes_groups_are_the_folds_groups(reviews_csv: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    extra = ", columns: {label: score, text: review}, split: {by: {group: shop}}"
    recipe, folder = prepared(reviews_csv, tiny_backbone, tmp_path, extra, "folds: 2")
    shops = [set(shops_of(training_splits(folder, run.fold)[1])) for run in fold_runs(recipe, "")]
    assert shops[0] and shops[1] and not shops[0] & shops[1]


def shops_of(split: Split) -> list[int]:
    return [int(text.rsplit(" ", 1)[1]) % 4 for text in split.column("raw").to_pylist()]


def test_copies_of_an_input_that_are_kept_share_a_fold(tiny_backbone: Path, tmp_path: Path) -> None:
    table = tmp_path / "copies.csv"
    lines = [f"{'great' if n % 2 else 'stale'} coffee number {n},{'good' if n % 2 else 'bad'}" for n in range(60)]
    table.write_text("\n".join(["text,label", *(line for line in lines for _ in range(3))]) + "\n")
    extra = ", columns: {text: text, label: label}, cleaning: {duplicates: keep}"
    recipe, folder = prepared(table, tiny_backbone, tmp_path, extra)
    texts = [set(training_splits(folder, run.fold)[1].column("raw").to_pylist()) for run in fold_runs(recipe, "")]
    assert sum(map(len, texts)) == len(set.union(*texts)) > 40


def test_a_label_that_one_fold_has_all_of_is_named(reviews_csv: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    head, *rows = reviews_csv.read_text().splitlines(keepends=True)
    for name, part in (("train", [*rows[100:], "odd thing,odd,shop 9\n"]), ("test", rows[:100])):
        (tmp_path / f"{name}.csv").write_text("".join([head, *part]))
    recipe = parse_recipe(
        f"name: r\ntask: text_classification\nstorage: {tmp_path}\ndata: {{columns: {{label: score, text: review}}, split: "
        f"{{files: {{train: {tmp_path}/train.csv, validation: {tmp_path}/test.csv, test: {tmp_path}/test.csv}}}}, "
        f"cleaning: {{leaks: keep, duplicates: keep}}}}\n"
        f"model: {{backbone: {tiny_backbone}, max_tokens: 32}}\ntraining: {{folds: 3}}\n"
    )
    with pytest.raises(
        DataError, match=r"the label 'odd' lies in fold \d of 3 alone \(1 rows\), so the run that .*: add"
    ):
        fold_sizes(recipe, folder_of(recipe), ("bad", "good", "odd"))


# ---------------------------------------------------------------------------------------------------------- the recipe


def recipe_with(training: str, split: str = "") -> Recipe:
    return parse_recipe(
        f"name: r\ntask: text_classification\ndata: {{source: a.csv{split}}}\ntraining: {{{training}}}\n", "r.yaml"
    )


def test_folds_in_order_of_time_are_refused_with_a_way_out() -> None:
    with pytest.raises(RecipeError, match=r"newer than those .*by.time \(day\) rules out; leave training.folds out"):
        recipe_with("folds: 3", ", split: {by: {time: day}}")


def test_an_ensemble_of_folds_needs_folds() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:4:1: training: ensemble is folds, but there are none: set"):
        recipe_with("ensemble: folds")


@pytest.mark.parametrize("training", ["folds: 1", "folds: 21", "ensemble: 0", "ensemble: 33", "ensemble: fold"])
def test_numbers_out_of_range_are_refused(training: str) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:4:\d+: training.(folds|ensemble)"):
        recipe_with(training)


def test_the_runs_of_a_recipe() -> None:
    usual = recipe_with("epochs: 1")
    assert fold_runs(usual, "train/r") == ()
    (only,) = model_runs(usual, "train/r")
    assert (only.name, only.location, only.seed, only.fold) == ("", "train/r", usual.seed, None)
    members = model_runs(recipe_with("ensemble: 3"), "train/r")
    assert [run.location for run in members] == [f"train/r/members/{i}" for i in range(3)]
    assert members[0].seed == usual.seed and len({run.seed for run in members}) == 3
    both = recipe_with("folds: 3, ensemble: folds")
    assert model_runs(both, "train/r") == fold_runs(both, "train/r")
    assert [run.name for run in fold_runs(both, "train/r")] == ["fold 1/3", "fold 2/3", "fold 3/3"]


def test_members_seeds_are_seeds_and_all_different() -> None:
    seeds = [member_seed(seed, member) for seed in (0, 17, 2**32 - 1) for member in range(32)]
    assert len(set(seeds)) == 96 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("slots", "runs", "alone", "may_shrink", "expected"),
    [
        (2, 3, 2, True, (1, 2)), (2, 3, 2, False, (2, 1)), (8, 3, 4, True, (2, 3)), (8, 3, 2, False, (2, 3)),
        (8, 20, 4, True, (1, 8)), (1, 5, 1, True, (1, 1)), (2, 5, 4, False, (4, 1)), (64, 2, 8, True, (8, 2)),
    ],
)  # fmt: skip
def test_runs_share_the_slots(slots: int, runs: int, alone: int, may_shrink: bool, expected: tuple[int, int]) -> None:
    assert side_by_side(slots, runs, alone, may_shrink=may_shrink) == expected


def test_the_mean_and_the_deviation_are_of_each_folds_best_epoch() -> None:
    records = [record_of([0.5, best, 0.6], best_epoch=1) for best in (0.8, 0.9, 0.7)]
    result = cross_validation(records, [10, 10, 9])
    assert result.mean["macro_f1"] == pytest.approx(0.8)
    assert result.deviation["macro_f1"] == pytest.approx(0.1)
    assert [(run.rows, run.best_epoch) for run in result.runs] == [(10, 1), (10, 1), (9, 1)]


def record_of(values: list[float], best_epoch: int) -> ModelRecord:
    epochs = tuple(
        EpochMetrics(epoch=i, step=10 * i, train_loss=0.1, validation={"macro_f1": value}, learning_rate=0.1,
                     samples_per_s=1.0)
        for i, value in enumerate(values)
    )  # fmt: skip
    return ModelRecord(
        name="r", key="k", location="train/r", model_location="train/r/model", task="text_classification", backbone="b",
        dataset="d", epochs=epochs, best_epoch=best_epoch, best_metric="macro_f1", best_value=values[best_epoch],
        steps=30, workers=1, device="cpu", precision="fp32", parameters=1, size_bytes=1, seconds=1.0, samples_per_s=1.0,
    )  # fmt: skip
