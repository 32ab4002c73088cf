"""Readers of tables: every row comes out as a row or as a bad row with its line."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.sources import Source, open_source
from orchestrator.errors import DataError
from orchestrator.recipe import Data


def source_of(path: Path, **settings: object) -> Source:
    return open_source(Data.model_validate({"source": str(path), **settings}))


def rows_of(source: Source) -> list[dict[str, str | None]]:
    return [row for batch in source.batches() for row in batch.table.to_pylist()]


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def test_quoted_commas_line_breaks_and_quotes_survive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"one, two\nthree ""four""",x\r\nfive,y\n')
    assert rows_of(source_of(path)) == [
        {"text": 'one, two\nthree "four"', "label": "x"},
        {"text": "five", "label": "y"},
    ]


def test_all_cells_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n007,1\n1e3,2\n")
    assert [row["text"] for row in rows_of(source_of(path))] == ["007", "1e3"]


def test_an_empty_cell_is_no_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\nfive\t\n\ty\n")
    assert rows_of(source_of(path)) == [{"text": "five", "label": None}, {"text": None, "label": "y"}]


def test_ragged_rows_are_told_with_their_line_and_the_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\na,x\nb\n"c\nd",y\ne,y,z\nf,x\n')
    batches = list(source_of(path).batches())
    bad = [row for batch in batches for row in batch.bad]
    assert [row["text"] for batch in batches for row in batch.table.to_pylist()] == ["a", "c\nd", "f"]
    assert [row.line for row in bad] == [3, 6]
    assert "1 fields" in bad[0].reason and "3 fields" in bad[1].reason
    assert bad[1].excerpt == "e | y | z"


def test_stray_quotes_cost_one_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"a" b,x\nc,y\n')
    batch = next(source_of(path).batches())
    assert batch.table.to_pylist() == [{"text": "c", "label": "y"}]
    assert batch.bad[0].line == 2 and "not valid CSV" in batch.bad[0].reason


def test_an_open_quote_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\na,x\n"never closed,y\nb,x\n')
    with pytest.raises(DataError, match=r"a.csv: a quote opened on line 3 is never closed"):
        rows_of(source_of(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_wins_over_the_recipe(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "a.csv", "text,label\ncafé,x\n", encoding)
    assert rows_of(source_of(path, encoding="latin-1")) == [{"text": "café", "label": "x"}]


def test_the_recipe_names_another_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\ncafé,x\n", "latin-1")
    assert rows_of(source_of(path, encoding="latin-1"))[0]["text"] == "café"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_undecodable_rows_are_marked(tmp_path: Path, name: str) -> None:
    line = "café,x" if name == "a.csv" else json.dumps({"text": "café", "label": "x"}, ensure_ascii=False)
    head = "text,label\n" if name == "a.csv" else '{"text": "tea", "label": "y"}\n'
    bad = [
        row for batch in source_of(write(tmp_path / name, f"{head}{line}\n", "latin-1")).batches() for row in batch.bad
    ]
    assert [(row.line, row.is_undecodable) for row in bad] == [(2, True)]


def test_an_unknown_encoding_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.encoding 'klingon' is unknown"):
        rows_of(source_of(write(tmp_path / "a.csv", "text,label\na,b\n"), encoding="klingon"))


def test_an_encoding_that_does_not_fit_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,x\ncafé,x\n", "latin-1")
    with pytest.raises(DataError, match=r"a\.csv: .*can't decode byte 0xe9.*data\.encoding"):
        rows_of(source_of(path, encoding="ascii"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv is empty"),
        ("text,label\n", "no rows"),
        ("text,text\na,b\n", "'text' appears twice"),
        ("\n\n", "is empty"),
    ],
)
def test_a_file_without_rows_or_names_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _ = source_of(write(tmp_path / "a.csv", content)).sample


def test_json_lines_keep_numbers_and_nested_values_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 3}\n\n{"text": ["b"], "label": true}\n')
    assert rows_of(source_of(path)) == [{"text": "a", "label": "3"}, {"text": '["b"]', "label": "true"}]


def test_broken_json_lines_are_told_with_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    batch = next(source_of(path).batches())
    assert [row["text"] for row in batch.table.to_pylist()] == ["a", "b"]
    assert [row.line for row in batch.bad] == [2, 3]
    assert "not valid JSON" in batch.bad[0].reason and "not a JSON object" in batch.bad[1].reason


def test_parquet_of_other_types_is_read_as_text(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", ""]), "label": [1, 2], "kind": pa.array(["u", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(source_of(tmp_path / "a.parquet")) == [
        {"text": "a", "label": "1", "kind": "u"},
        {"text": None, "label": "2", "kind": None},
    ]


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable Parquet file"):
        rows_of(source_of(write(tmp_path / "a.parquet", "text,label\n")))


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"text,label\na,x\n"))
    assert rows_of(source_of(path)) == [{"text": "a", "label": "x"}]


def test_batches_are_as_small_as_the_recipe_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"t{i},x\n" for i in range(25)))
    assert [batch.table.num_rows for batch in source_of(path, batch_rows=10).batches()] == [10, 10, 5]


def test_semicolons_and_bars_are_understood(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text;label\n"a; b";x\n')
    assert rows_of(source_of(path)) == [{"text": "a; b", "label": "x"}]
    path = write(tmp_path / "b.csv", '"a, b"|label\nc|x\n')
    assert rows_of(source_of(path)) == [{"a, b": "c", "label": "x"}]


def test_half_a_character_in_json_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine \\ud83d\\ude00"}\n{"text": "\\ud800 x"}\n')
    (batch,) = source_of(path).batches()
    assert batch.table.num_rows == 1
    assert [(bad.line, bad.reason) for bad in batch.bad] == [(2, "holds half of a character (a lone surrogate)")]


def test_a_cut_off_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    lines = "".join(f"tea number {random.random()},x\n" for _ in range(20_000))
    path.write_bytes(gzip.compress(("text,label\n" + lines).encode())[:90_000])
    with pytest.raises(DataError, match=r"a\.csv\.gz cannot be read to its end"):
        rows_of(source_of(path))


def test_a_missing_number_in_parquet_is_no_label(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert rows_of(source_of(tmp_path / "a.parquet")) == [{"label": "1"}, {"label": None}]
