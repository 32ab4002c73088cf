"""From a source to a published dataset: what is kept, what is set aside and why, and that it is the same every time."""

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestrator.data.dataset import SLICE, Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.data.text import TextEncoder
from orchestrator.errors import DataError, IntegrityError
from orchestrator.progress import Event
from orchestrator.recipe import Recipe
from orchestrator.records import DatasetRecord
from orchestrator.storage import RECIPE, RECORD, ROWS, Storage, verify_manifest

SPLITS = ("train", "validation", "test")


@pytest.fixture
def encoder(tiny_backbone: Path) -> TextEncoder:
    return TextEncoder.from_backbone(str(tiny_backbone), 16)


class Prepared:
    """A prepared dataset and what lies in its folder."""

    def __init__(self, root: Path, encoder: Encoder, data: dict[str, Any], task: str, **more: Any) -> None:
        self.recipe = Recipe.model_validate({"name": "set", "task": task, "data": data, **more})
        self.storage = Storage(str(root))
        source = open_source(self.recipe.data)
        self.key = content_key(self.recipe, encoder, source, self.storage)
        self.events: list[Event] = []
        self.record: DatasetRecord = prepare(self.recipe, encoder, source, self.storage, self.key, self.events.append)
        self.folder = self.storage.path(self.record.location)

    def rows(self, split: str) -> list[dict[str, Any]]:
        table = Split(self.folder, split)
        slices = [f"{SLICE}{name}" for name in self.recipe.evaluation.slices]
        columns = {name: table.column(name) for name in ("row", "raw", *slices)}
        inputs = table.inputs(np.arange(len(table)))
        return (
            pa.table(columns | {"label": table.labels} | dict(zip(inputs.column_names, inputs.columns, strict=True)))
        ).to_pylist()

    def raw(self, split: str) -> set[str]:
        return {row["raw"] for row in self.rows(split)}

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        assert self.record.quarantine is not None
        lines = self.storage.path(self.record.quarantine).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def prepare_text(root: Path, encoder: Encoder, data: dict[str, Any], **more: Any) -> Prepared:
    return Prepared(root, encoder, data, "text_classification", **more)


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def plain_rows(count: int, start: int = 0) -> list[tuple[str, ...]]:
    return [(f"the tea number {i} was {'great' if i % 2 else 'bad'}", "good" if i % 2 else "bad")
            for i in range(start, start + count)]  # fmt: skip


PLANTED: list[tuple[str, ...]] = [
    ("the same tea twice", "good"), ("the same tea twice", "good"), ("the same tea twice ", "good"),
    ("who can tell", "good"), ("who can tell", "bad"),
    ("", "good"), ("   ", "bad"), ("no label here", ""),
]  # fmt: skip


def test_every_planted_fault_is_counted_and_quarantined(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(40) + PLANTED)
    with path.open("a", encoding="utf-8") as file:
        file.write("ragged\n")
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(path)})
    counts = done.record.cleaning
    assert (counts.rows_read, counts.kept, counts.duplicates, counts.conflicts) == (49, 41, 2, 2)
    assert (counts.leaks, counts.missing, counts.unreadable) == (0, 3, 1)
    reasons = [(entry["verdict"], entry.get("row"), entry.get("line")) for entry in done.quarantine]
    assert sorted(reasons, key=str) == sorted(
        [("duplicate", 41, None), ("duplicate", 42, None), ("conflict", 43, None), ("conflict", 44, None),
         ("missing", 45, None), ("missing", 46, None), ("missing", 47, None), ("unreadable", None, 50)], key=str,
    )  # fmt: skip
    assert all(entry["reason"] and entry["file"] == "a.csv" for entry in done.quarantine)
    assert {entry["excerpt"] for entry in done.quarantine if entry["verdict"] == "conflict"} == {"who can tell"}


def test_long_inputs_are_excerpted(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", [*plain_rows(40), ("tea " * 500, "good"), ("tea " * 500, "good")])
    entry = prepare_text(tmp_path / "runs", encoder, {"source": str(path)}).quarantine[0]
    assert len(entry["excerpt"]) == 200


def test_the_recipe_may_keep_repetitions_and_they_share_a_split(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(60) * 3)
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(path), "cleaning": {"duplicates": "keep"},
                        "columns": {"text": "text", "label": "label"}})  # fmt: skip
    assert done.record.cleaning.kept == 180 and done.record.quarantine is None
    assert not done.raw("train") & done.raw("test") and not done.raw("train") & done.raw("validation")


def test_a_leak_between_given_files_leaves_train(tmp_path: Path, encoder: TextEncoder) -> None:
    train = write_csv(tmp_path / "train.csv", plain_rows(60))
    test = write_csv(tmp_path / "test.csv", plain_rows(20, start=50))
    done = prepare_text(tmp_path / "runs", encoder, {"split": {"files": {"train": str(train), "test": str(test)}}})
    assert done.record.cleaning.leaks == 10
    assert done.record.splits["test"].rows == 20
    assert not done.raw("test") & (done.raw("train") | done.raw("validation"))
    assert {entry["file"] for entry in done.quarantine} == {"train.csv"}


def test_splits_are_stratified_and_recorded(tmp_path: Path, encoder: TextEncoder) -> None:
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(write_csv(tmp_path / "a.csv", plain_rows(200)))})
    assert done.record.labels == ("bad", "good")
    assert {split: stats.rows for split, stats in done.record.splits.items()} == dict(
        zip(SPLITS, (160, 20, 20), strict=True)
    )
    assert done.record.splits["test"].class_counts == {"bad": 10, "good": 10}
    assert np.bincount(Split(done.folder, "test").labels).tolist() == [10, 10]
    for row in done.rows("test"):
        assert done.record.labels[row["label"]] == ("good" if row["row"] % 2 else "bad")
        assert f"number {row['row']} " in row["raw"]


def test_groups_and_times_decide_the_split(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [(*row, f"shop {i % 20}", f"2024-01-{1 + i // 10:02d}") for i, row in enumerate(plain_rows(200))]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "label", "shop", "day"))
    columns = {"text": "text", "label": "label"}
    slices = {"slices": ["shop", "day"]}
    by_group = prepare_text(tmp_path / "runs", encoder, {"source": str(path), "columns": columns,
                            "split": {"by": {"group": "shop"}}}, evaluation=slices)  # fmt: skip
    shops = [{row["slice:shop"] for row in by_group.rows(split)} for split in SPLITS]
    assert not shops[0] & shops[1] and not shops[0] & shops[2] and not shops[1] & shops[2]
    by_time = prepare_text(tmp_path / "runs", encoder, {"source": str(path), "columns": columns,
                           "split": {"by": {"time": "day"}}}, evaluation=slices)  # fmt: skip
    days = [sorted(row["slice:day"] for row in by_time.rows(split)) for split in SPLITS]
    assert days[0][-1] < days[1][0] and days[1][-1] < days[2][0]


def test_token_ids_are_the_encoders_and_figures_are_recorded(tmp_path: Path, encoder: TextEncoder) -> None:
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(write_csv(tmp_path / "a.csv", plain_rows(60)))})
    rows = done.rows("validation")
    assert [r["input_ids"] for r in rows] == encoder.encode([r["raw"] for r in rows]).columns["input_ids"].to_pylist()
    assert done.record.mean_tokens == pytest.approx(8.0) and done.record.truncated_fraction == 0.0
    assert load_encoder(done.folder / "encoder").describe() == encoder.describe()


def test_the_folder_is_published_whole_with_recipe_and_record(tmp_path: Path, encoder: TextEncoder) -> None:
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(write_csv(tmp_path / "a.csv", plain_rows(60)))})
    assert {RECIPE, RECORD, *(f"{split}.arrow" for split in SPLITS)} <= set(verify_manifest(done.folder))
    assert DatasetRecord.model_validate_json((done.folder / RECORD).read_text(encoding="utf-8")) == done.record
    assert done.events[-1].message and any(event.done == 60 and "rows/s" in event.figures for event in done.events)


def test_a_second_run_has_the_same_key_and_the_same_bytes(tmp_path: Path, encoder: TextEncoder) -> None:
    data = {"source": str(write_csv(tmp_path / "a.csv", plain_rows(90) + PLANTED))}
    first, again = (prepare_text(tmp_path / root, encoder, data) for root in ("one", "two"))
    assert first.key == again.key
    for name in (*(f"{split}.arrow" for split in SPLITS), ROWS, "quarantine.jsonl"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_the_key_follows_what_prepare_reads_and_nothing_else(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = str(write_csv(tmp_path / "a.csv", plain_rows(40)))
    moved = str(write_csv(tmp_path / "elsewhere" / "a.csv", plain_rows(40)))
    other = str(write_csv(tmp_path / "b.csv", plain_rows(41)))

    def key(source: str = first, data: dict[str, Any] | None = None, **changes: Any) -> str:
        values = {"name": "set", "task": "text_classification", "data": {"source": source} | (data or {}), **changes}
        recipe = Recipe.model_validate(values)
        return content_key(recipe, encoder, open_source(recipe.data), Storage(str(tmp_path / "runs")))

    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"data": {"split": {"train": 0.6, "validation": 0.2, "test": 0.2}}},
        {"evaluation": {"slices": ["shop"]}}, {"data": {"cleaning": {"leaks": "keep"}}},
    ]  # fmt: skip
    assert len({key(), key(other), *(key(**change) for change in changes)}) == len(changes) + 2
    assert key(moved) == key()
    for change in ({"training": {"epochs": 9}}, {"data": {"batch_rows": 7}}, {"name": "other"}):
        assert key(**change) == key()


def test_the_size_of_batches_changes_nothing_but_the_memory(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(90) + PLANTED)
    small, large = (prepare_text(tmp_path / str(n), encoder, {"source": str(path), "batch_rows": n}) for n in (7, 1000))
    for split in SPLITS:
        assert small.rows(split) == large.rows(split)


def test_memory_does_not_grow_with_the_source(tmp_path: Path, encoder: TextEncoder) -> None:
    generator = random.Random(0)
    peaks = []
    for rows in (2_000, 20_000):
        path = tmp_path / f"{rows}.csv"
        write_csv(
            path, [(f"{i} " + "tea " * generator.randint(150, 200), "good" if i % 2 else "bad") for i in range(rows)]
        )
        pool = pa.proxy_memory_pool(pa.system_memory_pool())
        previous = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            prepare_text(tmp_path / f"runs-{rows}", encoder, {"source": str(path), "batch_rows": 100})
        finally:
            pa.set_memory_pool(previous)
        peaks.append(pool.max_memory())
        size = path.stat().st_size
    assert size > 12_000_000
    assert peaks[1] < size / 3
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("the tea was fine", "good")] * 3 + [(f"tea {i} is here", "good") for i in range(20)],
            "only one class: 'good'",
        ),
        ([*plain_rows(40), ("so very odd", "rare"), ("more odd tea", "rare")], "label 'rare' has 2 distinct rows"),
        ([("", "good"), ("", "bad")] * 10, "none of the 20 rows can be used: all lack"),
    ],
    ids=["one class", "too few", "nothing usable"],
)
def test_data_that_cannot_train_is_an_error_and_leaves_nothing(
    tmp_path: Path, encoder: TextEncoder, rows: list[tuple[str, ...]], message: str
) -> None:
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=message):
        prepare_text(tmp_path / "runs", encoder, {"source": str(path), "columns": {"text": "text", "label": "label"}})
    assert not list((tmp_path / "runs").glob("prepare/set-*")) and not list((tmp_path / "runs").glob(".staging/*"))


def test_a_label_seen_only_in_the_test_file_is_an_error(tmp_path: Path, encoder: TextEncoder) -> None:
    train = write_csv(tmp_path / "train.csv", plain_rows(60))
    test = write_csv(tmp_path / "test.csv", [*plain_rows(20, start=100), ("odd tea", "odd")])
    with pytest.raises(DataError, match=r"label 'odd' is in test \(1 rows\) but not in train"):
        prepare_text(tmp_path / "runs", encoder, {"split": {"files": {"train": str(train), "test": str(test)}}})


def test_a_column_that_is_not_there_is_an_error(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(40))
    with pytest.raises(DataError, match=r"no column 'txt'; the columns are text, label: did you mean 'text'\?"):
        prepare_text(tmp_path / "runs", encoder, {"source": str(path), "columns": {"text": "txt"}})
    with pytest.raises(DataError, match="no column 'shop'"):
        prepare_text(tmp_path / "runs", encoder, {"source": str(path)}, evaluation={"slices": ["shop"]})


def test_a_file_in_another_encoding_is_an_error_that_says_what_to_try(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f"{('café', 'the')[i % 4 > 0]} number {i},{('bad', 'good')[i % 2]}\n" for i in range(60))
    path.write_bytes(("text,label\n" + rows).encode("latin-1"))
    with pytest.raises(DataError, match=r"15 of 60 rows .*line 2 of a\.csv: .*data\.encoding.*latin-1"):
        prepare_text(tmp_path / "one", encoder, {"source": str(path), "columns": {"text": "text", "label": "label"}})
    done = prepare_text(tmp_path / "two", encoder, {"source": str(path), "encoding": "latin-1"})
    assert sum("café" in row["raw"] for split in SPLITS for row in done.rows(split)) == 15


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 30 noisy images each, and one file of each kind of fault."""
    root = tmp_path_factory.mktemp("pictures") / "set"
    generator = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 128)):
        (root / label).mkdir(parents=True)
        for number in range(30):
            pixels = generator.integers(low, low + 100, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number:02d}.png")
    (root / "light" / "broken.png").write_bytes(b"\x89PNG not really")
    (root / "light" / "cut.png").write_bytes((root / "light" / "00.png").read_bytes()[:200])
    (root / "dark" / "twin.png").write_bytes((root / "dark" / "00.png").read_bytes())
    return root


def image_encoder() -> ImageEncoder:
    return ImageEncoder(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_class_folders_become_pixels_and_broken_images_are_quarantined(tmp_path: Path, pictures: Path) -> None:
    done = Prepared(tmp_path, image_encoder(), {"source": str(pictures)}, "image_classification")
    counts = done.record.cleaning
    assert (counts.rows_read, counts.kept, counts.duplicates, counts.unreadable) == (63, 60, 1, 2)
    assert done.record.labels == ("dark", "light") and done.record.image_size == 16
    assert {e["excerpt"] for e in done.quarantine} == {"dark/twin.png", "light/broken.png", "light/cut.png"}
    rows = done.rows("test")
    expected = image_encoder().encode([(pictures / row["raw"]).read_bytes() for row in rows])
    assert [row["pixels"] for row in rows] == expected.columns["pixels"].to_pylist()


def test_a_table_of_image_paths_is_read_relative_to_itself(tmp_path: Path, pictures: Path) -> None:
    names = sorted(p.relative_to(pictures.parent).as_posix() for p in pictures.glob("*/[0-9]*.png"))
    rows = [(name, name.split("/")[1]) for name in names] + [("set/absent.png", "dark")]
    path = write_csv(pictures.parent / "table.csv", rows, ("picture", "kind"))
    done = Prepared(tmp_path, image_encoder(), {"source": f"file://{path}"}, "image_classification")
    assert (done.record.input_column, done.record.label_column) == ("picture", "kind")
    assert (done.record.cleaning.kept, done.record.cleaning.unreadable) == (60, 1)
    assert "cannot be opened" in done.quarantine[0]["reason"]


def test_a_split_that_is_not_arrow_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="run prepare again"):
        Split(tmp_path, "train")
    (tmp_path / "train.arrow").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="is not a prepared file"):
        Split(tmp_path, "train")


# -------------------------------------------------------------------------------------- what real files have in store


COLUMNS = {"columns": {"text": "text", "label": "label"}}


def test_a_few_undecodable_cells_are_set_aside(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(600))
    with path.open("ab") as file:
        file.write("café 1,good\ncafé 2,bad\n".encode("latin-1"))
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(path), **COLUMNS})
    assert (done.record.cleaning.kept, done.record.cleaning.unreadable) == (600, 2)


def test_a_file_of_ragged_rows_is_an_error_that_names_the_first(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a,b,c\n" * 30, encoding="utf-8")
    with pytest.raises(DataError, match="a.csv has no row that can be read: line 2 has 3 fields, but the first line"):
        prepare_text(tmp_path / "runs", encoder, {"source": str(path)})


def test_rows_without_time_or_group_are_set_aside(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [(*row, f"2024-01-{1 + i // 10:02d}T10:00:00Z" if i else "") for i, row in enumerate(plain_rows(200))]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "label", "day"))
    for by in ("time", "group"):
        done = prepare_text(tmp_path / by, encoder, {"source": str(path), **COLUMNS, "split": {"by": {by: "day"}}})
        assert done.record.cleaning.missing == 1
        assert done.quarantine[0]["reason"] == "no value in the column 'day'"


def test_a_time_column_that_changes_its_mind_is_an_error(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [(*row, str(i) if i < 100 else "2024-01-01") for i, row in enumerate(plain_rows(200))]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "label", "day"))
    data = {"source": str(path), **COLUMNS, "split": {"by": {"time": "day"}}, "batch_rows": 50}
    with pytest.raises(DataError, match="the column 'day' holds numbers first and other values later"):
        prepare_text(tmp_path / "runs", encoder, data)


def test_a_limit_of_rows_holds_for_each_given_file(tmp_path: Path, encoder: TextEncoder) -> None:
    files = {s: str(write_csv(tmp_path / f"{s}.csv", plain_rows(60, i * 100))) for i, s in enumerate(("train", "test"))}
    done = prepare_text(tmp_path / "runs", encoder, {"split": {"files": files}, "max_rows": 30, **COLUMNS})
    assert done.record.splits["test"].rows == 30 and done.record.cleaning.kept == 60


def test_batches_of_one_row_are_understood(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(60))
    assert prepare_text(tmp_path / "runs", encoder, {"source": str(path), "batch_rows": 1}).record.cleaning.kept == 60


def test_only_texts_that_were_cut_count_as_truncated(tmp_path: Path, encoder: TextEncoder) -> None:
    def tokens(count: int) -> tuple[str, ...]:
        text = " ".join(["tea"] * count)
        return text, "good" if count % 2 else "bad"

    path = write_csv(tmp_path / "a.csv", [tokens(count) for count in range(1, 29)])
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(path), **COLUMNS})
    exactly = sum(len(row["input_ids"]) == 16 for split in SPLITS for row in done.rows(split))
    assert done.record.truncated_fraction is not None
    assert round(done.record.truncated_fraction * 28) == exactly - 1  # one of the full ones just fits


def test_large_splits_are_read_at_random_across_chunks(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_csv(tmp_path / "a.csv", plain_rows(400))
    done = prepare_text(tmp_path / "runs", encoder, {"source": str(path), "batch_rows": 30})
    assert len(pa.ipc.open_file(done.folder / ROWS).read_all()["row"].chunks) > 5
    split = Split(done.folder, "train")
    rows = np.random.default_rng(0).permutation(len(split))[:50]
    texts = split.column("raw", rows).to_pylist()
    assert texts == [split.column("raw").to_pylist()[row] for row in rows]
    assert split.inputs(rows)["input_ids"].to_pylist() == encoder.encode(texts).columns["input_ids"].to_pylist()
    assert split.lengths(encoder)[rows].tolist() == [len(i) for i in split.inputs(rows)["input_ids"].to_pylist()]
    assert split.inputs(rows[:0]).num_rows == 0


@pytest.fixture
def own_pictures(tmp_path: Path, pictures: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


def write_image(path: Path, color: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), color).save(path)


def test_foreign_files_are_listed_and_broken_images_are_no_conflict(tmp_path: Path, own_pictures: Path) -> None:
    labels = sorted(folder.name for folder in own_pictures.iterdir())
    for label in labels:
        (own_pictures / label / "broken.png").write_bytes(b"\x89PNG nope")
    (own_pictures / labels[0] / "photo.heic").write_bytes(b"x")
    done = Prepared(tmp_path / "runs", image_encoder(), {"source": str(own_pictures)}, "image_classification")
    assert done.record.cleaning.conflicts == 0
    found = {e["file"]: e["verdict"] for e in done.quarantine if "broken" in e["file"] or "heic" in e["file"]}
    assert found == {f"{labels[0]}/photo.heic": "skipped"} | {f"{label}/broken.png": "unreadable" for label in labels}


def test_a_class_of_broken_images_only_is_an_error(tmp_path: Path, own_pictures: Path) -> None:
    (own_pictures / "zebra").mkdir()
    for number in range(3):
        (own_pictures / "zebra" / f"{number}.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"no row of the label 'zebra' can be used \(3 unreadable\)"):
        Prepared(tmp_path / "runs", image_encoder(), {"source": str(own_pictures)}, "image_classification")


def test_a_changed_image_of_a_table_changes_the_key(tmp_path: Path, own_pictures: Path) -> None:
    files = sorted(own_pictures.glob("*/*.png"))
    table = write_csv(tmp_path / "t.csv", [(str(f), f.parent.name) for f in files], ("image", "label"))
    recipe = Recipe.model_validate({"name": "x", "task": "image_classification", "data": {"source": str(table)}})
    storage = Storage(str(tmp_path / "runs"))
    before = content_key(recipe, image_encoder(), open_source(recipe.data), storage)
    files[0].write_bytes(files[1].read_bytes())
    assert content_key(recipe, image_encoder(), open_source(recipe.data), storage) != before


def test_the_same_file_names_in_two_given_splits_are_kept_apart(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        for label in ("cat", "dog"):
            for i in range(6):
                write_image(tmp_path / split / label / f"{i}.png", (number * 100 + i, 10, 50 * (label == "cat")))
    files = {split: str(tmp_path / split) for split in ("train", "test")}
    done = Prepared(tmp_path / "runs", image_encoder(), {"split": {"files": files}}, "image_classification")
    assert done.record.cleaning.kept == 24
    assert all(row["pixels"][0] >= 100 for row in done.rows("test"))
