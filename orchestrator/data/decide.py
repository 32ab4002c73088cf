"""Facts about every row, then the decision which rows are kept and which split each belongs to.

In: what the intake saw, batch by batch. Out: a ``Decision``. Keeps some forty bytes per row, whatever the size of the texts
or images.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.cleaning import SPLITS, Verdict, find_leaks, find_repeats, group_by_hash
from orchestrator.data.intake import Rows
from orchestrator.data.schema import Schema
from orchestrator.data.sources import WRONG_ENCODING
from orchestrator.data.splits import at_random, by_group, by_time, check_labels, test_of, validation_of
from orchestrator.errors import DataError
from orchestrator.recipe import Recipe

_UNSET = -1
_MAX_UNDECODABLE = 0.01


@dataclass(frozen=True)
class Decision:
    verdicts: np.ndarray
    """int8 [rows], Verdict"""
    splits: np.ndarray
    """int8 [rows], index into SPLITS; meaningless for rows that are not kept"""
    label_of_row: np.ndarray
    """int32 [rows], index into labels; -1 where there is none"""
    labels: tuple[str, ...]
    group_of_row: np.ndarray
    """int64 [rows]: rows with the same number stay together, also when training rows are divided further"""


class Facts:
    """What is known of each row, collected batch by batch."""

    def __init__(self, recipe: Recipe, schema: Schema) -> None:
        self.schema, self.by = schema, recipe.data.split.by
        self.rows = self.bad_rows = self.undecodable_rows = 0
        self._first_bad: str | None = None
        self._first_undecodable: str | None = None
        self._times = _Times()
        self._vocabulary: dict[str, int] = {}
        self._parts: dict[str, list[np.ndarray]] = {}
        self._starts: list[int] = []
        self._origins: list[tuple[str, str | None]] = []

    def add(self, rows: Rows, tokens: np.ndarray) -> None:
        """``tokens``: int64, of each kept row."""
        batch, number = rows.batch, rows.batch.table.num_rows
        self._note_bad(rows)
        kept, labels = rows.kept, pc.utf8_trim_whitespace(batch.table[self.schema.label_column]).to_pylist()
        tokens_of_row, truncated = np.zeros(number, np.int32), np.zeros(number, bool)
        tokens_of_row[kept] = tokens
        if rows.encoded.truncated is not None:
            truncated[kept] = rows.encoded.truncated
        code_of_label = self._vocabulary.setdefault
        facts = {
            "hash": rows.hashes,
            "verdict": rows.verdicts,
            "label": np.array([code_of_label(x, len(self._vocabulary)) if x else _UNSET for x in labels], np.int32),
            "given": np.full(number, SPLITS.index(batch.split) if batch.split else _UNSET, np.int8),
            "by": self._order(batch.table, number),
            "tokens": tokens_of_row,
            "truncated": truncated,
        }
        for name, values in facts.items():
            self._parts.setdefault(name, []).append(values)
        origin = (batch.file, batch.split)
        if not self._origins or self._origins[-1] != origin:
            self._starts.append(self.rows)
            self._origins.append(origin)
        self.rows += number

    def _note_bad(self, rows: Rows) -> None:
        for bad in rows.batch.bad:
            self.bad_rows += 1
            self._first_bad = self._first_bad or f"line {bad.line} of {rows.batch.file} {bad.reason}"
            if bad.is_undecodable:
                self.undecodable_rows += 1
                self._first_undecodable = self._first_undecodable or f"line {bad.line} of {rows.batch.file}"
        for index, reason in rows.reasons.items():
            name = rows.batch.table[self.schema.input_column][index].as_py()
            self._first_bad = self._first_bad or f"{name} {reason}"

    def _order(self, table: pa.Table, number: int) -> np.ndarray:
        """int64 [rows]: the group's number or the time of each row; zeros when neither decides the split."""
        if self.by is None:
            return np.zeros(number, np.int64)
        if self.by.time is not None:
            return self._times.of(table[self.by.time], self.by.time)
        return np.array([_number_of(value) for value in table[self.by.column].to_pylist()], np.int64)

    def column(self, name: str) -> np.ndarray:
        """One fact of all rows: hash, verdict, label, given, by, tokens or truncated."""
        return np.concatenate(self._parts[name])

    def origin(self, row: int) -> tuple[str, str | None]:
        """File (empty for image folders) and given split that a row came from."""
        return self._origins[bisect.bisect_right(self._starts, row) - 1]

    def check(self) -> None:
        """Raises DataError when hardly anything could be read: then it is the file that is wrong, not some rows."""
        read = self.rows + self.bad_rows
        if self.undecodable_rows > max(1.0, _MAX_UNDECODABLE * read):
            raise DataError(
                f"{self.undecodable_rows} of {read} rows are not in the expected encoding, the first on "
                f"{self._first_undecodable}",
                WRONG_ENCODING,
            )
        if not self.rows or not (self.column("verdict") == Verdict.KEPT).any():
            raise DataError(
                f"none of the {read} rows can be used: {self._first_bad or 'all lack an input or a label'}",
                "see that one first",
            )

    def sorted_labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Labels in alphabetical order (numbers by value), and each row's index into them, -1 for none."""
        names = sorted(self._vocabulary, key=_label_order)
        new_code = np.empty(len(names) + 1, np.int32)
        for index, name in enumerate(names):
            new_code[self._vocabulary[name]] = index
        new_code[_UNSET] = _UNSET
        return tuple(names), new_code[self.column("label")]


def decide(recipe: Recipe, facts: Facts) -> Decision:
    """Verdict and split of each row. Raises DataError when no training, validation and test set come out."""
    facts.check()
    all_labels, label_of_row = facts.sorted_labels()
    given, verdicts = facts.column("given"), facts.column("verdict")
    splits = np.full(len(verdicts), _UNSET, np.int8)
    usable = np.flatnonzero(verdicts == Verdict.KEPT)
    groups = group_by_hash(facts.column("hash")[usable])
    repeats = find_repeats(groups, label_of_row[usable], given[usable], recipe.data.cleaning)
    verdicts[usable] = repeats
    _check_each_label_is_left(all_labels, label_of_row, verdicts)
    kept, groups = usable[repeats == Verdict.KEPT], groups[repeats == Verdict.KEPT]
    candidates = _Candidates(label_of_row[kept], groups, given[kept], facts.column("by")[kept], all_labels)
    splits[kept] = _assign(recipe, candidates)
    leaks = find_leaks(groups, splits[kept], recipe.data.cleaning)
    verdicts[kept[leaks]] = Verdict.LEAK
    clean = kept[~leaks]
    check_labels(label_of_row[clean], splits[clean], all_labels)
    return Decision(verdicts, splits, label_of_row, all_labels, _groups(recipe, facts))


def _groups(recipe: Recipe, facts: Facts) -> np.ndarray:
    """The recipe's own groups, else rows with the same input (of whose hash 64 bits do)."""
    by = recipe.data.split.by
    if by is not None and by.group is not None:
        return facts.column("by")
    return facts.column("hash")["low"].view(np.int64)


def _check_each_label_is_left(labels: tuple[str, ...], label_of_row: np.ndarray, verdicts: np.ndarray) -> None:
    """A class must not vanish because all of its images are broken, say."""
    for code in np.setdiff1d(np.arange(len(labels)), label_of_row[verdicts == Verdict.KEPT]).tolist():
        lost = np.bincount(verdicts[label_of_row == code], minlength=len(Verdict))
        words = ", ".join(f"{lost[verdict]} {verdict.name.lower()}" for verdict in Verdict if lost[verdict])
        raise DataError(
            f"no row of the label {labels[code]!r} can be used ({words})", "mend its rows, or take the label out"
        )


@dataclass(frozen=True)
class _Candidates:
    """The rows that are to be split; arrays of [rows]."""

    labels: np.ndarray
    groups: np.ndarray
    given: np.ndarray
    by: np.ndarray
    names: tuple[str, ...]
    """of the labels"""


def _assign(recipe: Recipe, rows: _Candidates) -> np.ndarray:
    """A split for each row: by its file, by group, by time or at random."""
    settings, seed = recipe.data.split, recipe.seed
    if (rows.given != _UNSET).any():
        return _complete(recipe, rows)
    if settings.by is not None and settings.by.group is not None:
        return by_group(rows.by, settings, seed)
    if settings.by is not None:
        return by_time(rows.by, settings)
    return at_random(rows.labels, rows.groups, settings, seed, rows.names)


def _complete(recipe: Recipe, rows: _Candidates) -> np.ndarray:
    """Draw the splits that the files do not give out of the training rows."""
    given = rows.given.copy()
    for code, draw in ((2, test_of), (1, validation_of)):
        if not (given == code).any():
            train = np.flatnonzero(given == 0)
            if not len(train):
                raise DataError("there are no training rows", "name a train file or folder")
            given[train] = draw(rows.labels[train], rows.groups[train], recipe.data.split, recipe.seed, rows.names)
    return given


def _label_order(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _number_of(value: str | None) -> int:
    """The same number for the same value, without a table of all values."""
    digest = hashlib.blake2b((value or "").encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Times:
    """Order in time, from numbers or from ISO 8601 dates with or without a zone: one kind for the whole column."""

    _kinds = {
        "numbers": lambda c: pc.cast(pc.multiply(pc.cast(c, pa.float64()), 1e6), pa.int64(), safe=False),
        "dates without a time zone": lambda c: pc.cast(pc.cast(c, pa.timestamp("us")), pa.int64()),
        "dates with a time zone": lambda c: pc.cast(pc.cast(c, pa.timestamp("us", "UTC")), pa.int64()),
    }

    def __init__(self) -> None:
        self._kind: str | None = None

    def of(self, column: pa.ChunkedArray, name: str) -> np.ndarray:
        """int64 [rows], in microseconds or in millionths of the number; zero where there is none."""
        filled = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.string()), column)
        if filled.null_count == len(filled):
            return np.zeros(len(filled), np.int64)
        for kind, convert in self._kinds.items():
            if self._kind not in (None, kind):
                continue
            try:
                values: np.ndarray = pc.fill_null(convert(filled), 0).to_numpy()
            except pa.ArrowInvalid:
                continue
            self._kind = kind
            return values
        expected = f"holds {self._kind} first and other values later" if self._kind else "is neither numbers nor dates"
        raise DataError(
            f"the column {name!r} {expected}", "write all as numbers or as ISO 8601 dates, or split by another column"
        )
