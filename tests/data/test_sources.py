"""Finding files: tables, folders of them, files per split, class folders of images; and knowing when they changed."""

import os
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.data.sources import Source, open_source
from orchestrator.errors import DataError
from orchestrator.recipe import Data
from orchestrator.storage import Storage


def open_at(path: Path | str, **settings: object) -> Source:
    return open_source(Data.model_validate({"source": str(path), **settings}))


def write_table(path: Path, rows: int, start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"text {number},{number % 2}" for number in range(start, start + rows)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


def write_image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
    return path


def texts(source: Source) -> list[str]:
    return [row["text"] for batch in source.batches() for row in batch.table.to_pylist()]


def test_a_folder_of_tables_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_table(tmp_path / "b.csv", 2, start=2)
    write_table(tmp_path / "a.csv", 2)
    (tmp_path / ".hidden.csv").write_text("not,this\n1,2\n", encoding="utf-8")
    assert texts(open_at(tmp_path)) == ["text 0", "text 1", "text 2", "text 3"]


def test_a_mixed_folder_is_an_error(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", 2)
    (tmp_path / "b.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"mixes \.csv and \.jsonl"):
        open_at(tmp_path)


def test_files_with_other_columns_are_an_error(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", 2)
    (tmp_path / "b.csv").write_text("wort,klasse\nx,y\n", encoding="utf-8")
    with pytest.raises(DataError, match="b.csv has other columns"):
        texts(open_at(tmp_path))


def test_another_order_of_columns_is_put_right(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", 1)
    (tmp_path / "b.csv").write_text("label,text\ny,text 9\n", encoding="utf-8")
    assert texts(open_at(tmp_path)) == ["text 0", "text 9"]


def test_given_files_give_their_splits(tmp_path: Path) -> None:
    train, test = write_table(tmp_path / "train.csv", 3), write_table(tmp_path / "test.csv", 2)
    source = open_source(Data.model_validate({"split": {"files": {"train": str(train), "test": str(test)}}}))
    assert source.given_splits == ("train", "test")
    assert [(batch.split, batch.table.num_rows) for batch in source.batches()] == [("train", 3), ("test", 2)]


def test_nothing_there_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing at .*absent\.csv"):
        open_at(tmp_path / "absent.csv")


def test_a_foreign_ending_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(DataError, match="not a kind of file that can be read"):
        open_at(tmp_path / "a.docx")
    with pytest.raises(DataError, match="holds no table and no image"):
        open_at(tmp_path)


def test_class_folders_give_the_labels(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/more/2.png", "dog/1.PNG", ".cache/x.png"):
        write_image(tmp_path / name)
    table = next(open_at(tmp_path).batches()).table
    assert table.to_pylist() == [
        {"image": "cat/1.png", "label": "cat"},
        {"image": "cat/more/2.png", "label": "cat"},
        {"image": "dog/1.PNG", "label": "dog"},
    ]


def test_split_folders_above_the_class_folders_give_the_splits(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "test/dog/2.png"):
        write_image(tmp_path / name)
    source = open_at(tmp_path)
    assert set(source.given_splits) == {"train", "validation", "test"}
    assert {file.label for file in source.files} == {"cat", "dog"}


def test_an_image_outside_of_class_folders_is_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "stray.png")
    with pytest.raises(DataError, match="stray.png is in no class folder"):
        open_at(tmp_path)


def test_a_url_is_read_like_a_path(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", 3)
    assert texts(open_at(f"file://{path}")) == texts(open_at(path))
    with pytest.raises(DataError, match="cannot be opened"):
        open_at("nosuchscheme://bucket/a.csv")


def test_images_that_cannot_be_opened_come_with_the_reason(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_image(tmp_path / "pictures" / "1.png")
    table.write_text("image,label\npictures/1.png,x\npictures/2.png,y\n", encoding="utf-8")
    source = open_at(table)
    there, absent = (source.read_image(f"pictures/{n}.png", "table.csv") for n in (1, 2))
    assert isinstance(there, bytes) and there.startswith(b"\x89PNG")
    assert isinstance(absent, str) and "cannot be opened" in absent


def test_a_quick_try_takes_images_of_every_class(tmp_path: Path) -> None:
    for label in ("a", "b", "c"):
        for number in range(20):
            write_image(tmp_path / label / f"{number}.png")
    source = open_at(tmp_path, max_rows=12)
    assert len(source.files) == 12
    assert {file.label for file in source.files} == {"a", "b", "c"}


def test_a_quick_try_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", 50)
    assert texts(open_at(path, max_rows=12, batch_rows=5)) == [f"text {i}" for i in range(12)]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "runs"))
    path = write_table(tmp_path / "a.csv", 5)
    first = open_at(path).fingerprint(storage)
    assert open_at(path).fingerprint(storage) == first
    write_table(path, 5, start=1)
    assert open_at(path).fingerprint(storage) != first


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "runs"))
    path = write_table(tmp_path / "a.csv", 5)
    first = open_at(path).fingerprint(storage)
    times = path.stat()
    write_table(path, 5, start=5)  # as long as before
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert open_at(path).fingerprint(storage) == first
    assert open_at(path).fingerprint(Storage(str(tmp_path / "other"))) != first
