"""Telling the input from the label, or saying why it cannot be told."""

import pyarrow as pa
import pytest

from orchestrator.data.schema import infer_schema
from orchestrator.errors import DataError
from orchestrator.recipe import Columns


def table(**columns: list[str]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


REVIEWS = [f"this is the review number {i}" for i in range(60)]
SCORES = ["good", "bad", "fair"] * 20
IDS = [str(1000 + i) for i in range(60)]


def test_free_text_and_few_values_are_told_apart() -> None:
    schema = infer_schema(table(id=IDS, opinion=REVIEWS, mark=SCORES), Columns(), "text")
    assert (schema.kind, schema.input_column, schema.label_column) == ("text", "opinion", "mark")


def test_measurements_and_numbers_of_rows_are_no_labels() -> None:
    prices = [f"{i % 7}.5" for i in range(60)]
    assert (
        infer_schema(table(id=IDS, price=prices, words=REVIEWS, mark=SCORES), Columns(), "text").label_column == "mark"
    )


def test_paths_of_images_are_an_image_column() -> None:
    schema = infer_schema(table(file=[f"a/{i}.JPG" for i in range(60)], mark=SCORES), Columns(), "image")
    assert (schema.kind, schema.input_column, schema.label_column) == ("image", "file", "mark")


def test_two_candidates_are_an_error_that_lists_them() -> None:
    with pytest.raises(DataError, match=r"several columns hold free text: first .*second .*data\.columns\.text"):
        infer_schema(table(first=REVIEWS, second=[r + " too" for r in REVIEWS], mark=SCORES), Columns(), "text")
    with pytest.raises(
        DataError, match=r"several columns hold few distinct values: shop .*mark .*data\.columns\.label"
    ):
        infer_schema(table(words=REVIEWS, shop=["a", "b"] * 30, mark=SCORES), Columns(), "text")


def test_a_usual_name_decides_between_two() -> None:
    schema = infer_schema(table(text=REVIEWS, note=[r + " !" for r in REVIEWS], mark=SCORES), Columns(), "text")
    assert schema.input_column == "text"


def test_no_candidate_is_an_error_that_lists_all() -> None:
    with pytest.raises(DataError, match=r"no column holds few distinct values: id \(60 distinct values\)"):
        infer_schema(table(words=REVIEWS, id=IDS), Columns(), "text")


def test_named_columns_are_taken_as_named() -> None:
    schema = infer_schema(table(a=REVIEWS, b=REVIEWS, c=SCORES, d=SCORES), Columns(text="b", label="d"), "text")
    assert (schema.input_column, schema.label_column) == ("b", "d")


def test_a_column_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no column 'reviw'; the columns are review, mark: did you mean 'review'\?"):
        infer_schema(table(review=REVIEWS, mark=SCORES), Columns(text="reviw"), "text")
