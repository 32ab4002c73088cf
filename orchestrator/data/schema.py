"""Which column is the input and which the label: as told, or inferred where there is only one answer.

In: the first rows. Out: two column names, or a DataError that lists the columns and says what is unclear.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.sources import IMAGE_COLUMN, IMAGE_SUFFIXES, LABEL_COLUMN
from orchestrator.errors import DataError
from orchestrator.recipe import Columns

_TEXT_NAMES = ("text", "sentence", "review", "content", "body", "message", "comment", "document", "title")
_LABEL_NAMES = ("label", "class", "category", "target", "sentiment", "topic", "intent", "score", "rating", "y")
_MAX_CLASSES = 200
_MIN_WORDS = 2.5


@dataclass(frozen=True)
class Schema:
    kind: Literal["text", "image"]
    input_column: str
    label_column: str


@dataclass(frozen=True)
class _Profile:
    name: str
    distinct: int
    filled: int
    words: float
    """Mean number of words in a value."""
    images: float
    """Share of the values that end like an image file."""
    numeric: float
    """Share of the values that are numbers with a fraction: measurements, not classes."""


def infer_schema(sample: pa.Table, wanted: Columns, kind: Literal["text", "image"] | None = None) -> Schema:
    """Names of the input and the label column. ``kind`` None: whatever the columns look like."""
    for name in (wanted.text, wanted.image, wanted.label):
        _check_is_there(name, sample.column_names)
    if sample.column_names == [IMAGE_COLUMN, LABEL_COLUMN] and kind != "text":
        return Schema("image", IMAGE_COLUMN, LABEL_COLUMN)
    profiles = [_profile(name, sample[name]) for name in sample.column_names]
    label = wanted.label
    wanted_input = wanted.image if kind == "image" else wanted.text
    rest = [p for p in profiles if p.name != label]
    chosen = wanted_input or _infer_input(rest, kind)
    label = label or _infer_label([p for p in profiles if p.name != chosen])
    is_image = next(p for p in profiles if p.name == chosen).images > 0.5
    return Schema("image" if is_image and kind != "text" else "text", chosen, label)


def _check_is_there(name: str | None, columns: list[str]) -> None:
    if name is None or name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
    raise DataError(f"there is no column {name!r}; the columns are {', '.join(columns)}", hint)


def _infer_input(profiles: list[_Profile], kind: str | None) -> str:
    images = [p for p in profiles if p.images > 0.5] if kind != "text" else []
    texts = [p for p in profiles if p.words >= _MIN_WORDS and _is_varied(p)] if kind != "image" else []
    candidates = images or texts
    word = "image" if kind == "image" else "text"
    return _only(candidates, _TEXT_NAMES, profiles, f"data.columns.{word}", "free text" if word == "text" else "paths")


def _is_varied(profile: _Profile) -> bool:
    """More values than classes would have, however often each of them comes."""
    return profile.distinct > min(_MAX_CLASSES, profile.filled // 2)


def _infer_label(profiles: list[_Profile]) -> str:
    candidates = [
        p for p in profiles
        if 2 <= p.distinct <= min(_MAX_CLASSES, max(2, p.filled // 3)) and p.numeric < 0.5 and p.words < 6
    ]  # fmt: skip
    return _only(candidates, _LABEL_NAMES, profiles, "data.columns.label", "few distinct values")


def _only(
    candidates: list[_Profile], usual: tuple[str, ...], profiles: list[_Profile], field: str, looks_like: str
) -> str:
    """The only candidate, or the only one with a usual name."""
    if len(candidates) == 1:
        return candidates[0].name
    named = [p.name for p in candidates if p.name.lower() in usual]
    if len(named) == 1:
        return named[0]
    listed = ", ".join(f"{p.name} ({p.distinct} distinct values)" for p in candidates or profiles)
    found = f"several columns hold {looks_like}: {listed}" if candidates else f"no column holds {looks_like}: {listed}"
    raise DataError(found, f"name the right one under {field}")


def _profile(name: str, column: pa.ChunkedArray) -> _Profile:
    values = column.drop_null()
    filled = len(values)
    if not filled:
        return _Profile(name, 0, 0, 0.0, 0.0, 0.0)
    trimmed = pc.utf8_trim_whitespace(values)
    words = pc.mean(pc.add(pc.count_substring_regex(trimmed, r"\s+"), 1)).as_py()
    endings = pc.utf8_lower(pc.replace_substring_regex(values, r"^.*(\.[^.]*)$", r"\1"))
    images = pc.mean(pc.is_in(endings, pa.array(sorted(IMAGE_SUFFIXES)))).as_py()
    numeric = pc.mean(pc.match_substring_regex(trimmed, r"^[-+]?\d+\.\d+$")).as_py()
    return _Profile(name, pc.count_distinct(values).as_py(), filled, words, images, numeric)
