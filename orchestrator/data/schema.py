"""A first look at data nobody has described yet: what it seems to be, its columns, its classes, what looks odd.

In: a path. Out: a ``SourceSummary``, from which a recipe can be started.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.columns import IMAGE_TASK, LABEL_COLUMN, has_image_column, infer_columns
from orchestrator.data.sources import Source, open_source
from orchestrator.recipe import Columns, Data, Recipe

__all__ = ["SourceSummary", "infer_columns", "inspect_source"]

_TEXT_TASK = "text_classification"
_UNEVEN = 10
_FEW_ROWS = 10


@dataclass(frozen=True)
class SourceSummary:
    task: str
    files: int
    rows: int
    is_exact: bool
    """Whether ``rows`` was counted; else it is estimated from the first rows and the files' size."""
    columns: tuple[str, ...]
    input_column: str
    label_column: str
    labels: dict[str, int]
    """Rows per label, most frequent first: of all rows for a folder of images, else of the first rows."""
    given_splits: tuple[str, ...]
    """Splits that the folders' names give."""
    warnings: tuple[str, ...]


def inspect_source(path: str) -> SourceSummary:
    """Look at the first rows. Raises DataError when nothing can be made of them."""
    source = open_source(_recipe(path, IMAGE_TASK))
    if not source.is_image_folder:
        source = open_source(_recipe(path, _TEXT_TASK))
    sample = source.sample
    task = IMAGE_TASK if source.is_image_folder or has_image_column(sample) else _TEXT_TASK
    input_column, label_column = infer_columns(sample, Columns(), task)
    labels = _label_counts(source, sample, label_column)
    rows, is_exact = _count_rows(source, sample)
    return SourceSummary(
        task, len(source.files), rows, is_exact, tuple(sample.column_names), input_column, label_column, labels,
        source.given_splits, tuple(_warnings(sample, input_column, label_column, labels, rows)),
    )  # fmt: skip


def _recipe(path: str, task: str) -> Recipe:
    return Recipe.model_validate({"name": "first-look", "task": task, "data": Data(source=path)})


def _label_counts(source: Source, sample: pa.Table, column: str) -> dict[str, int]:
    if source.is_image_folder and column == LABEL_COLUMN:
        return dict(Counter(str(file.label) for file in source.files).most_common())
    values = sample[column].drop_null().value_counts().to_pylist()
    return dict(Counter({pair["values"]: pair["counts"] for pair in values}).most_common())


def _count_rows(source: Source, sample: pa.Table) -> tuple[int, bool]:
    if source.is_image_folder:
        return len(source.files), True
    if source.is_sampled_whole:
        return sample.num_rows, True
    characters = sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in sample.columns)
    bytes_per_row = characters / sample.num_rows + sample.num_columns
    return round(sum(file.size_bytes for file in source.files) / bytes_per_row), False


def _warnings(
    sample: pa.Table, input_column: str, label_column: str, labels: dict[str, int], rows: int
) -> list[str]:
    missing = {c: sample[c].null_count for c in (input_column, label_column) if sample[c].null_count}
    found = [f"{count} of the first {sample.num_rows} rows have no {column}" for column, count in missing.items()]
    if len(labels) > 1 and max(labels.values()) > _UNEVEN * min(labels.values()):
        found.append("the classes are uneven; see training.class_weights and training.oversample")
    rare = [label for label, count in labels.items() if count < _FEW_ROWS]
    if rare and rows <= sample.num_rows:
        found.append(f"{len(rare)} labels have fewer than {_FEW_ROWS} rows: {', '.join(rare[:5])}")
    repeated = sample.num_rows - pc.count_distinct(sample[input_column]).as_py()
    if repeated > missing.get(input_column, 0):
        found.append(f"{repeated} of the first {sample.num_rows} inputs are repeated; prepare drops repetitions")
    return found
