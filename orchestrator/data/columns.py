"""Which column is the input and which the label: as told, or inferred where there is only one answer. Pure.

In: the first rows. Out: two column names, or a DataError that lists the columns and says what is unclear.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.errors import DataError
from orchestrator.recipe import Columns

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
"""Columns of the table that a folder of class folders becomes."""
IMAGE_TASK = "image_classification"
_TEXT_NAMES = {"text", "sentence", "review", "content", "body", "message", "comment", "document"}
_LABEL_NAMES = {"label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "y"}
_MAX_CLASSES = 200
_MIN_WORDS = 2.5
_MIN_LETTERS = 6


@dataclass(frozen=True)
class _Profile:
    name: str
    filled: int
    """Rows with a value."""
    distinct: int
    words: float
    """Mean number of words of a value."""
    unspaced: float
    """Share of values written without spaces in a script that has none, such as Chinese."""
    images: float
    """Share of values that end like an image file."""
    fractions: float
    """Share of values that are numbers with decimals: measurements, not classes."""

    @property
    def is_text(self) -> bool:
        is_prose = self.words >= _MIN_WORDS or self.unspaced > 0.5
        return is_prose and self.images < 0.5 and self.distinct > self.filled // 2

    @property
    def is_image(self) -> bool:
        return self.images > 0.5

    @property
    def is_label(self) -> bool:
        """Few distinct values, each several times; numbers of rows or customers, and measurements, are not."""
        few = 2 <= self.distinct <= min(_MAX_CLASSES, max(2, self.filled // 3))
        return few and self.fractions < 0.5 and self.words < 6


def infer_columns(sample: pa.Table, wanted: Columns, task: str) -> tuple[str, str]:
    """Names of the input and the label column.

    ``sample``: the first rows, all columns text. Raises DataError when a wanted column is not there, or when no column
    or several could be meant.
    """
    is_image = task == IMAGE_TASK
    chosen, label = wanted.image if is_image else wanted.text, wanted.label
    for name in (chosen, label):
        check_column(name, sample.column_names)
    if chosen is not None and chosen == label:
        raise DataError(f"the column {chosen!r} cannot be both the input and the label", "name two columns")
    profiles = [_profile(name, sample[name]) for name in sample.column_names]
    if chosen is None:
        chosen = _infer_input([p for p in profiles if p.name != label], is_image)
    if label is None:
        others = [p for p in profiles if p.name != chosen]
        label = _only([p for p in others if p.is_label], _LABEL_NAMES, others, "data.columns.label", "few distinct values")
    return chosen, label


def check_column(name: str | None, columns: Sequence[str]) -> None:
    """Raises DataError, with the nearest name, when a named column is not there."""
    if name is None or name in columns:
        return
    near = difflib.get_close_matches(name.lower(), [column.lower() for column in columns], n=1)
    meant = next((column for column in columns if near and column.lower() == near[0]), None)
    hint = f"did you mean {meant!r}?" if meant is not None else "choose one of these"
    raise DataError(f"there is no column {name!r}; the columns are {', '.join(columns)}", hint)


def has_image_column(sample: pa.Table) -> bool:
    """Whether some column holds paths of images."""
    return any(_profile(name, sample[name]).is_image for name in sample.column_names)


def _infer_input(profiles: list[_Profile], is_image: bool) -> str:
    if is_image:
        return _only([p for p in profiles if p.is_image], {"image", "path", "file"}, profiles, "data.columns.image",
                     "paths of images")  # fmt: skip
    return _only([p for p in profiles if p.is_text], _TEXT_NAMES, profiles, "data.columns.text", "free text")


def _only(candidates: list[_Profile], usual: set[str], profiles: list[_Profile], field: str, looks_like: str) -> str:
    """The only candidate, or the only one with a usual name."""
    if len(candidates) == 1:
        return candidates[0].name
    named = [p.name for p in candidates if p.name.lower() in usual]
    if len(named) == 1:
        return named[0]
    listed = ", ".join(f"{p.name} ({p.distinct} distinct values)" for p in candidates or profiles)
    how_many = "several columns hold" if candidates else "no column clearly holds"
    raise DataError(f"{how_many} {looks_like}: {listed}", f"name the right one under {field}")


def _profile(name: str, column: pa.ChunkedArray) -> _Profile:
    values = pc.utf8_trim_whitespace(column.drop_null())
    if not len(values):
        return _Profile(name, 0, 0, 0.0, 0.0, 0.0, 0.0)
    endings = pc.utf8_lower(pc.replace_substring_regex(values, r"^.*(\.[^.]*)$", r"\1"))
    letters = pc.greater_equal(pc.utf8_length(values), _MIN_LETTERS)
    return _Profile(
        name, len(values), pc.count_distinct(values).as_py(),
        words=_mean(pc.add(pc.count_substring_regex(values, r"\s+"), 1)),
        unspaced=_mean(pc.and_(letters, pc.match_substring_regex(values, r"^[^\x00-\x7f]{2}"))),
        images=_mean(pc.is_in(endings, pa.array(sorted(IMAGE_SUFFIXES)))),
        fractions=_mean(pc.match_substring_regex(values, r"^[-+]?\d*\.\d+$")),
    )  # fmt: skip


def _mean(values: pa.ChunkedArray) -> float:
    return float(pc.mean(pc.cast(values, pa.float64())).as_py())
