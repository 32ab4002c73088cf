"""The first pass: hash every row, then decide which rows are kept and which split each belongs to.

In: a source's batches. Out: a ``Decision``. Keeps some forty bytes per row, whatever the size of the texts or images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.cleaning import HASH, SPLITS, Verdict, find_leaks, find_repeats, group_by_hash, hash_inputs
from orchestrator.data.schema import Schema
from orchestrator.data.sources import Source, SourceBatch
from orchestrator.data.splits import at_random, by_group, by_time, check_labels, test_of, validation_of
from orchestrator.data.tables import BadRow
from orchestrator.errors import DataError
from orchestrator.recipe import Recipe

_UNSET = -1


@dataclass(frozen=True)
class Decision:
    verdicts: np.ndarray
    """int8 [rows], Verdict"""
    splits: np.ndarray
    """int8 [rows], index into SPLITS; meaningless for rows that are not kept"""
    label_of_row: np.ndarray
    """int32 [rows], index into labels; -1 where there is none"""
    labels: tuple[str, ...]
    reasons: dict[int, str] = field(default_factory=dict)
    """What is known beyond the verdict, by row."""


class FirstPass:
    """Facts about each row, collected batch by batch."""

    def __init__(self, recipe: Recipe, source: Source, schema: Schema) -> None:
        self.recipe, self.source, self.schema = recipe, source, schema
        self.bad: list[tuple[str, BadRow]] = []
        self.reasons: dict[int, str] = {}
        self._vocabulary: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._parts: dict[str, list[np.ndarray]] = {"hash": [], "label": [], "given": [], "verdict": [], "by": []}
        by = recipe.data.split.by
        self.by_column = (by.group or by.time) if by else None
        self._check_columns()

    def _check_columns(self) -> None:
        columns = self.source.sample.column_names
        for name in (self.by_column, *self.recipe.evaluation.slices):
            if name is not None and name not in columns:
                raise DataError(
                    f"there is no column {name!r}; the columns are {', '.join(columns)}", "choose one of these"
                )

    def run(self) -> Iterator[int]:
        """Read everything once; yields the number of rows so far."""
        rows = 0
        for batch in self.source.batches():
            self._batch(batch, rows)
            rows += batch.table.num_rows
            yield rows
        joined = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self._parts.items()}
        self.hashes, self.given, self.verdicts, self.by = (joined[n] for n in ("hash", "given", "verdict", "by"))
        self.labels, self.label_of_row = self._sorted_labels(joined["label"].astype(np.int32))

    def _batch(self, batch: SourceBatch, first_row: int) -> None:
        self.bad += [(batch.file, bad) for bad in batch.bad]
        rows = batch.table.num_rows
        inputs = batch.table[self.schema.input_column].to_pylist()
        labels = pc.utf8_trim_whitespace(batch.table[self.schema.label_column]).to_pylist()
        missing = np.array([not (i and i.strip()) or not label for i, label in zip(inputs, labels, strict=True)], bool)
        verdict = np.where(missing, Verdict.MISSING, Verdict.KEPT).astype(np.int8)
        contents = self._contents(inputs, batch, verdict, first_row)
        self._parts["hash"].append(hash_inputs(contents) if rows else np.zeros(0, HASH))
        self._parts["label"].append(np.array([self._vocabulary.setdefault(x, len(self._vocabulary)) if x else -1
                                              for x in labels], np.int32))  # fmt: skip
        self._parts["given"].append(np.full(rows, SPLITS.index(batch.split) if batch.split else _UNSET, np.int8))
        self._parts["verdict"].append(verdict)
        self._parts["by"].append(self._by_values(batch, first_row))

    def _contents(
        self, inputs: list[str | None], batch: SourceBatch, verdict: np.ndarray, first_row: int
    ) -> list[str | bytes]:
        """What is hashed: the texts, or the images' bytes. An image that cannot be read is marked here."""
        if self.schema.kind == "text":
            return [item or "" for item in inputs]
        contents = self.source.read_images([item or "" for item in inputs], batch.file)
        for index, content in enumerate(contents):
            if isinstance(content, str) and verdict[index] == Verdict.KEPT:
                verdict[index] = Verdict.UNREADABLE
                self.reasons[first_row + index] = content
        return contents

    def _by_values(self, batch: SourceBatch, first_row: int) -> np.ndarray:
        if self.by_column is None:
            return np.zeros(batch.table.num_rows, np.int64)
        column = batch.table[self.by_column]
        by = self.recipe.data.split.by
        if by is not None and by.time is not None:
            return _times(column, by.time)
        values = column.to_pylist()
        return np.array([self._groups.setdefault(str(v), len(self._groups)) for v in values], np.int64)

    def _sorted_labels(self, codes: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """Labels in alphabetical order (numbers by value), and each row's index into them."""
        names = sorted(self._vocabulary, key=_label_order)
        new_code = np.empty(len(names) + 1, np.int32)
        for index, name in enumerate(names):
            new_code[self._vocabulary[name]] = index
        new_code[-1] = -1
        return tuple(names), new_code[codes]


def decide(recipe: Recipe, first: FirstPass) -> Decision:
    """Verdict and split of each row. Raises DataError when no training, validation and test set come out."""
    if not len(first.verdicts):
        raise DataError("the source has no readable rows", "check the file")
    settings, seed = recipe.data, recipe.seed
    verdicts, splits = first.verdicts.copy(), np.full(len(first.verdicts), _UNSET, np.int8)
    usable = np.flatnonzero(verdicts == Verdict.KEPT)
    groups = group_by_hash(first.hashes[usable])
    repeats = find_repeats(groups, first.label_of_row[usable], first.given[usable], settings.cleaning)
    verdicts[usable] = repeats
    kept, groups = usable[repeats == Verdict.KEPT], groups[repeats == Verdict.KEPT]
    splits[kept] = _assign(recipe, first, kept, groups, seed)
    leaks = find_leaks(groups, splits[kept], settings.cleaning)
    verdicts[kept[leaks]] = Verdict.LEAK
    clean = kept[~leaks]
    used = np.unique(first.label_of_row[clean])
    labels, label_of_row = _only_used(first, used)
    check_labels(label_of_row[clean], splits[clean], labels)
    return Decision(verdicts, splits, label_of_row, labels, first.reasons)


def _assign(recipe: Recipe, first: FirstPass, kept: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """A split for each kept row: by its file, by group, by time or at random."""
    settings, labels = recipe.data.split, first.label_of_row[kept]
    if (first.given != _UNSET).any():
        return _complete(first.given[kept].copy(), labels, groups, recipe, first.labels)
    if settings.by is not None and settings.by.group is not None:
        return by_group(first.by[kept], settings, seed)
    if settings.by is not None:
        return by_time(first.by[kept], settings)
    return at_random(labels, groups, settings, seed, first.labels)


def _complete(
    given: np.ndarray, labels: np.ndarray, groups: np.ndarray, recipe: Recipe, names: tuple[str, ...]
) -> np.ndarray:
    """Draw the splits that the files do not give out of the training rows."""
    for code, draw in ((2, test_of), (1, validation_of)):
        if not (given == code).any():
            train = np.flatnonzero(given == 0)
            if not len(train):
                raise DataError("there are no training rows", "name a train file or folder")
            given[train] = draw(labels[train], groups[train], recipe.data.split, recipe.seed, names)
    return given


def _only_used(first: FirstPass, used: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels that no kept row has are not classes."""
    new_code = np.full(len(first.labels) + 1, -1, np.int32)
    new_code[used] = np.arange(len(used))
    return tuple(first.labels[int(code)] for code in used), new_code[first.label_of_row]


def _label_order(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _times(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """int64 [rows]: order in time, from numbers or ISO 8601 dates. A row without a time counts as the oldest."""
    for convert in (
        lambda c: pc.cast(pc.multiply(pc.cast(c, pa.float64()), 1e6), pa.int64(), safe=False),
        lambda c: pc.cast(pc.cast(c, pa.timestamp("us")), pa.int64()),
    ):
        try:
            values: np.ndarray = pc.fill_null(convert(column), np.iinfo(np.int64).min).to_numpy()
        except pa.ArrowInvalid:
            continue
        return values
    raise DataError(
        f"the column {name!r} holds neither numbers nor ISO 8601 dates", "give another column to split.by.time"
    )
