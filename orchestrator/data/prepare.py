"""Prepare: from the source's rows to clean, split, encoded, memory-mapped Arrow, in bounded memory.

In: a source, an encoder, the recipe. Out: a published folder and its DatasetRecord. Every input is read and encoded once,
into a spool; then, with all rows known, it is decided which are kept and where; then the splits are written from the spool.
Nothing is dropped in silence: what is set aside goes to quarantine.jsonl with its reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from orchestrator.data.cleaning import REASONS, SPLITS, Verdict, count
from orchestrator.data.dataset import SplitWriter
from orchestrator.data.decide import Decision, Facts, decide
from orchestrator.data.encoder import Encoder
from orchestrator.data.intake import Intake, Rows
from orchestrator.data.schema import Schema, infer_schema
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe import Recipe, to_yaml
from orchestrator.records import DatasetRecord, SplitStats
from orchestrator.storage import (
    QUARANTINE,
    RECIPE,
    RECORD,
    SPOOL,
    Storage,
    folder_bytes,
    sha256_json,
    stage_location,
)

_FORMAT = 2
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
    with storage.publish(location) as folder:
        facts = Facts(recipe, schema)
        with Quarantine(folder / QUARANTINE) as quarantine:
            with Spool(folder / SPOOL, recipe, encoder, schema) as spool:
                _read(recipe, encoder, source, facts, spool, quarantine, report)
            decision = decide(recipe, facts)
            _write(folder, spool, decision, quarantine, report)
        spool.path.unlink()
        encoder_folder = folder / "encoder"
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
    recipe: Recipe, encoder: Encoder, source: Source, facts: Facts, spool: Spool, quarantine: Quarantine, report: Report
) -> None:
    """Everything once, into the spool; rows that cannot be used into the quarantine."""
    for skipped in source.skipped:
        quarantine.add(file=skipped.name, verdict="skipped", reason=skipped.reason)
    by, started = recipe.data.split.by, time.monotonic()
    for rows in Intake(source, spool.schema, encoder, by.column if by else None).run():
        batch, names = rows.batch, rows.batch.table[spool.schema.input_column]
        for bad in batch.bad:
            quarantine.add(file=batch.file, line=bad.line, split=batch.split, verdict="unreadable", reason=bad.reason,
                           excerpt=bad.excerpt)  # fmt: skip
        for index in np.flatnonzero(rows.verdicts != Verdict.KEPT).tolist():
            verdict, name = Verdict(int(rows.verdicts[index])), names[index].as_py() or ""
            quarantine.add(file=batch.file or name, row=facts.rows + index, split=batch.split,
                           verdict=verdict.name.lower(), reason=rows.reasons.get(index, REASONS[verdict]),
                           excerpt=name)  # fmt: skip
        lengths = encoder.lengths(pa.table(rows.encoded.columns))
        spool.add(rows, facts.rows)
        facts.add(rows, lengths)
        speed = facts.rows / max(time.monotonic() - started, 1e-9)
        report(Event("prepare", done=facts.rows, total=0, figures={"rows": facts.rows, "rows/s": speed}))


def _write(folder: Path, spool: Spool, decision: Decision, quarantine: Quarantine, report: Report) -> None:
    """The splits' files, and the rows that the decision set aside."""
    done, total = 0, len(decision.verdicts)
    with ExitStack() as files:
        writers = [files.enter_context(SplitWriter(folder, split, spool.columns)) for split in SPLITS]
        for table, file, split in spool.read():
            rows = table["row"].to_numpy()
            verdicts, splits = decision.verdicts[rows], decision.splits[rows]
            table = table.set_column(1, spool.columns.field(1), pa.array(decision.label_of_row[rows]))
            for index in np.flatnonzero(verdicts != Verdict.KEPT).tolist():
                verdict, raw = Verdict(int(verdicts[index])), table["raw"][index].as_py()
                quarantine.add(file=file or raw, row=int(rows[index]), split=split, verdict=verdict.name.lower(),
                               reason=REASONS[verdict], excerpt=raw)  # fmt: skip
            for code, writer in enumerate(writers):
                mine = np.flatnonzero((splits == code) & (verdicts == Verdict.KEPT))
                if len(mine):
                    writer.write(table.take(pa.array(mine)))
            done = int(rows[-1]) + 1
            report(Event("prepare", done=done, total=total, figures={"writing": "splits"}))


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


class Spool:
    """All encoded rows in the source's order, on disk, until it is known where they belong."""

    def __init__(self, path: Path, recipe: Recipe, encoder: Encoder, schema: Schema) -> None:
        self.path, self.schema, self.slices = path, schema, recipe.evaluation.slices
        slices = [pa.field(f"slice:{column}", pa.string()) for column in self.slices]
        self.columns = pa.schema(
            [("row", pa.int64()), ("label", pa.int32()), ("raw", pa.string()), *slices, *encoder.columns()]
        )
        self._origins: list[tuple[str, str | None]] = []

    def add(self, rows: Rows, first_row: int) -> None:
        kept = rows.kept
        if not len(kept):
            return
        picked = rows.batch.table.take(pa.array(kept))
        columns = {"row": pa.array(kept + first_row), "label": pa.array(np.full(len(kept), -1, np.int32)),
                   "raw": picked[self.schema.input_column]}  # fmt: skip
        columns |= {f"slice:{name}": picked[name] for name in self.slices} | rows.encoded.columns
        self._writer.write_table(pa.table(columns, schema=self.columns).combine_chunks())
        self._origins.append((rows.batch.file, rows.batch.split))

    def read(self) -> Iterator[tuple[pa.Table, str, str | None]]:
        """Rows with the file and the given split that they came from."""
        with pa.memory_map(str(self.path)) as stored, pa.ipc.open_file(stored) as reader:
            for number, (file, split) in enumerate(self._origins):
                yield pa.Table.from_batches([reader.get_batch(number)]), file, split

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self.columns)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
        finally:
            self._sink.close()


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
