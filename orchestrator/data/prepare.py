"""Prepare: from the source's rows to clean, split, encoded, memory-mapped Arrow, in bounded memory.

In: a source, an encoder, the recipe. Out: a published folder and its DatasetRecord. Every input is read and encoded once;
then, with all rows known, it is decided which are kept and in which split. Nothing is dropped in silence: what is set aside
goes to quarantine.jsonl with its reason.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from orchestrator.data.cleaning import REASONS, SPLITS, Verdict, count
from orchestrator.data.dataset import SLICE, column_at, row_columns, write_split
from orchestrator.data.decide import Decision, Facts, decide
from orchestrator.data.encoder import ENCODER, Encoder
from orchestrator.data.hashing_file import HashingFile
from orchestrator.data.intake import Intake, Rows
from orchestrator.data.schema import Schema, infer_schema
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import to_yaml
from orchestrator.records import DatasetRecord, SplitStats
from orchestrator.storage import (
    QUARANTINE,
    RECIPE,
    RECORD,
    ROWS,
    Storage,
    folder_bytes,
    sha256_json,
    stage_location,
)

_FORMAT = 3
_EXCERPT_CHARACTERS = 200


def content_key(recipe: Recipe, encoder: Encoder, source: Source, storage: Storage) -> str:
    """Hash of everything that prepare reads: the same key means the same result, wherever the files lie.

    Raises DataError when the columns are unclear.
    """
    schema = infer_schema(source.sample, recipe.data.columns, encoder.kind)
    fingerprint = source.fingerprint(storage, schema.input_column if schema.kind == "image" else None)
    data = recipe.data.model_dump(mode="json", exclude={"source": True, "batch_rows": True, "split": {"files"}})
    slices = list(recipe.evaluation.slices)
    return sha256_json([_FORMAT, recipe.task, recipe.seed, data, slices, fingerprint, encoder.describe()])


def prepare(
    recipe: Recipe, encoder: Encoder, source: Source, storage: Storage, key: str, report: Report = ignore
) -> DatasetRecord:
    """Write the dataset and its record.

    Raises:
        DataError: the rows cannot make a training, a validation and a test set.
        DiskFull: no room; nothing is left behind.
    """
    started = time.monotonic()
    schema = infer_schema(source.sample, recipe.data.columns, encoder.kind)
    _check_columns(recipe, source)
    location = stage_location("prepare", recipe.name, key)
    hashes: dict[str, str] = {}
    with storage.publish(location, hashes) as folder:
        facts = Facts(recipe, schema)
        with Quarantine(folder / QUARANTINE) as quarantine:
            with RowsFile(folder / ROWS, recipe, encoder, schema) as file:
                _read(recipe, encoder, source, facts, file, quarantine, report)
            hashes[ROWS] = file.sha256
            decision = decide(recipe, facts)
            _set_aside(folder, facts, decision, quarantine)
        _write_splits(folder, facts, decision)
        encoder_folder = folder / ENCODER
        encoder_folder.mkdir()
        encoder.save(encoder_folder)
        (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
        record = _record(recipe, encoder, schema, facts, decision, key, started, quarantine, folder)
        (folder / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
    report(Event("prepare", message=f"{record.cleaning.kept} of {record.cleaning.rows_read} rows kept"))
    return record


def _check_columns(recipe: Recipe, source: Source) -> None:
    columns, by = source.sample.column_names, recipe.data.split.by
    for name in ([by.column] if by else []) + list(recipe.evaluation.slices):
        if name not in columns:
            raise DataError(f"there is no column {name!r}; the columns are {', '.join(columns)}", "choose one of these")


def _read(
    recipe: Recipe,
    encoder: Encoder,
    source: Source,
    facts: Facts,
    file: RowsFile,
    quarantine: Quarantine,
    report: Report,
) -> None:
    """Everything once, into the rows' file; what cannot be used into the quarantine."""
    for skipped in source.skipped:
        quarantine.add(file=skipped.name, verdict="skipped", reason=skipped.reason)
    by, started = recipe.data.split.by, time.monotonic()
    for rows in Intake(source, file.schema, encoder, by.column if by else None).run():
        batch, names = rows.batch, rows.batch.table[file.schema.input_column]
        for bad in batch.bad:
            quarantine.add(file=batch.file, line=bad.line, split=batch.split, verdict="unreadable", reason=bad.reason,
                           excerpt=bad.excerpt)  # fmt: skip
        for index in np.flatnonzero(rows.verdicts != Verdict.KEPT).tolist():
            verdict, name = Verdict(int(rows.verdicts[index])), names[index].as_py() or ""
            quarantine.add(file=batch.file or name, row=facts.rows + index, split=batch.split,
                           verdict=verdict.name.lower(), reason=rows.reasons.get(index, REASONS[verdict]),
                           excerpt=name)  # fmt: skip
        lengths = encoder.lengths(pa.table(rows.encoded.columns))
        file.add(rows, facts.rows)
        facts.add(rows, lengths)
        speed = facts.rows / max(time.monotonic() - started, 1e-9)
        total = len(source.files) if source.is_image_folder else 0
        report(Event("prepare", done=facts.rows, total=total, figures={"rows/s": speed}))


def _set_aside(folder: Path, facts: Facts, decision: Decision, quarantine: Quarantine) -> None:
    """The rows that could be read but are not kept: duplicates, conflicts and leaks."""
    written = np.flatnonzero(facts.column("verdict") == Verdict.KEPT)
    dropped = np.flatnonzero(decision.verdicts[written] != Verdict.KEPT)
    raws = column_at(folder, "raw", dropped)
    for row, raw in zip(written[dropped].tolist(), raws, strict=True):
        verdict, (file, split) = Verdict(int(decision.verdicts[row])), facts.origin(row)
        quarantine.add(file=file or raw, row=row, split=split, verdict=verdict.name.lower(), reason=REASONS[verdict],
                       excerpt=raw)  # fmt: skip


def _write_splits(folder: Path, facts: Facts, decision: Decision) -> None:
    written = np.flatnonzero(facts.column("verdict") == Verdict.KEPT)  # row of each position in the rows' file
    for code, split in enumerate(SPLITS):
        positions = np.flatnonzero((decision.verdicts[written] == Verdict.KEPT) & (decision.splits[written] == code))
        rows = written[positions]
        write_split(folder, split, positions, decision.label_of_row[rows], decision.group_of_row[rows])


class Quarantine:
    """quarantine.jsonl: what was set aside, each with its reason. There is no file when there is nothing in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, 0

    def add(self, *, excerpt: str = "", **entry: Any) -> None:
        self.entries += 1
        values = {name: value for name, value in entry.items() if value is not None}
        if excerpt:
            values["excerpt"] = excerpt[:_EXCERPT_CHARACTERS]
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def __enter__(self) -> Self:
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.entries:
            self.path.unlink()


class RowsFile:
    """All encoded rows in the source's order, written as they come. A context manager: leaving it closes the file."""

    def __init__(self, path: Path, recipe: Recipe, encoder: Encoder, schema: Schema) -> None:
        self.schema, self.slices = schema, recipe.evaluation.slices
        self._columns = row_columns(self.slices, encoder)
        self._file = HashingFile(path)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self._columns)

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is closed."""
        return self._file.sha256

    def add(self, rows: Rows, first_row: int) -> None:
        picked = rows.batch.table.take(pa.array(rows.kept))
        columns = {"row": pa.array(rows.kept + first_row), "raw": picked[self.schema.input_column]}
        columns |= {f"{SLICE}{name}": picked[name] for name in self.slices} | rows.encoded.columns
        if len(rows.kept):
            self._writer.write_table(pa.table(columns, schema=self._columns))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
        finally:
            self._file.close()


def _record(
    recipe: Recipe, encoder: Encoder, schema: Schema, facts: Facts, decision: Decision, key: str, started: float,
    quarantine: Quarantine, folder: Path,
) -> DatasetRecord:  # fmt: skip
    location = stage_location("prepare", recipe.name, key)
    kept = decision.verdicts == Verdict.KEPT
    is_text = schema.kind == "text"
    return DatasetRecord(
        name=recipe.name, key=key, location=location, task=recipe.task, input_kind=schema.kind,
        input_column=schema.input_column, label_column=schema.label_column, labels=decision.labels,
        splits={split: _stats(decision, kept & (decision.splits == code)) for code, split in enumerate(SPLITS)},
        cleaning=count(np.concatenate([decision.verdicts, np.full(facts.bad_rows, Verdict.UNREADABLE, np.int8)])),
        quarantine=f"{location}/{QUARANTINE}" if quarantine.entries else None,
        slices=recipe.evaluation.slices, size_bytes=folder_bytes(folder), seconds=time.monotonic() - started,
        image_size=encoder.describe().get("image_size"),
        mean_tokens=float(facts.column("tokens")[kept].mean()) if is_text else None,
        truncated_fraction=float(facts.column("truncated")[kept].mean()) if is_text else None,
    )  # fmt: skip


def _stats(decision: Decision, mine: np.ndarray) -> SplitStats:
    counts = np.bincount(decision.label_of_row[mine], minlength=len(decision.labels)).tolist()
    return SplitStats(rows=int(mine.sum()), class_counts=dict(zip(decision.labels, counts, strict=True)))
