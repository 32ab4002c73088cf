"""Prepare: from the source's rows to clean, split, encoded, memory-mapped Arrow. Two passes in bounded memory.

In: a source, an encoder, the recipe. Out: a published folder and its DatasetRecord. The first pass hashes each row and
decides; the second encodes the kept rows and writes them. Nothing is dropped in silence: what is set aside goes to
quarantine.jsonl with its reason.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.cleaning import REASONS, SPLITS, Verdict, count
from orchestrator.data.decide import Decision, FirstPass, decide
from orchestrator.data.encoder import Encoder
from orchestrator.data.schema import Schema, infer_schema
from orchestrator.data.sources import Source, SourceBatch
from orchestrator.errors import DataError
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe import Recipe, to_yaml
from orchestrator.records import DatasetRecord, SplitStats
from orchestrator.storage import (
    QUARANTINE,
    RECIPE,
    RECORD,
    Storage,
    folder_bytes,
    sha256_json,
    split_file,
    stage_location,
)

_FORMAT = 1
_MAX_UNDECODABLE = 0.01
_EXCERPT_CHARACTERS = 200


def content_key(recipe: Recipe, encoder: Encoder, fingerprint: str) -> str:
    """Hash of everything that prepare reads: the same key means the same result."""
    data = recipe.data.model_dump(mode="json", exclude={"batch_rows"})
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
    first = FirstPass(recipe, source, schema)
    for done in first.run():
        report(Event("prepare", done=done, total=0, figures={"pass": "1/2", "rows": done}))
    _check_decodable(first)
    decision = decide(recipe, first)
    location = stage_location("prepare", recipe.name, key)
    with storage.publish(location) as folder:
        second = _SecondPass(folder, recipe, encoder, source, schema, decision)
        second.run(report)
        encoder_folder = folder / "encoder"
        encoder_folder.mkdir()
        encoder.save(encoder_folder)
        (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
        record = _record(recipe, encoder, schema, second, key, location, time.monotonic() - started)
        (folder / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
    report(Event("prepare", message=f"{record.cleaning.kept} of {record.cleaning.rows_read} rows kept"))
    return record


def _check_decodable(first: FirstPass) -> None:
    """A few broken cells are set aside; many of them mean that the whole file is in another encoding."""
    undecodable = [(file, bad) for file, bad in first.bad if bad.is_undecodable]
    rows = len(first.labels) + len(first.bad)
    if undecodable and len(undecodable) > max(1.0, _MAX_UNDECODABLE * rows):
        file, bad = undecodable[0]
        raise DataError(
            f"{file}: {len(undecodable)} of {rows} rows are not in the expected encoding, the first on line {bad.line}",
            "set data.encoding to the file's own, such as latin-1 or cp1252",
        )


@dataclass
class _Output:
    writer: pa.ipc.RecordBatchFileWriter
    counts: np.ndarray


class _SecondPass:
    """Encodes the kept rows and writes each split's file and the quarantine."""

    def __init__(
        self, folder: Path, recipe: Recipe, encoder: Encoder, source: Source, schema: Schema, decision: Decision
    ) -> None:
        self.folder, self.recipe, self.encoder, self.source = folder, recipe, encoder, source
        self.schema, self.decision = schema, decision
        self.verdicts = decision.verdicts.copy()
        self.bad_rows = 0
        self.set_aside = 0
        self.tokens = self.truncated = 0
        slices = [pa.field(f"slice:{column}", pa.string()) for column in recipe.evaluation.slices]
        self.arrow_schema = pa.schema(
            [("row", pa.int64()), ("label", pa.int32()), ("raw", pa.string()), *slices, *encoder.columns()]
        )

    def run(self, report: Report) -> None:
        with ExitStack() as files:
            self.outputs = [self._open(split, files) for split in SPLITS]
            self.quarantine = files.enter_context((self.folder / QUARANTINE).open("w", encoding="utf-8"))
            row, total = 0, len(self.verdicts)
            started = time.monotonic()
            for batch in self.source.batches():
                self._batch(batch, row)
                row += batch.table.num_rows
                speed = row / max(time.monotonic() - started, 1e-9)
                report(Event("prepare", done=row, total=total, figures={"pass": "2/2", "rows/s": speed}))
        for split, output in zip(SPLITS, self.outputs, strict=True):
            if not output.counts.any():
                raise DataError(f"no readable rows are left for {split}", f"see the reasons: {self._some_reasons()}")
        if not self.set_aside:
            (self.folder / QUARANTINE).unlink()

    def _open(self, split: str, files: ExitStack) -> _Output:
        sink = files.enter_context(pa.OSFile(str(self.folder / split_file(split)), "wb"))
        writer = files.enter_context(pa.ipc.new_file(sink, self.arrow_schema))
        return _Output(writer, np.zeros(len(self.decision.labels), np.int64))

    def _batch(self, batch: SourceBatch, first_row: int) -> None:
        for bad in batch.bad:
            self.bad_rows += 1
            self._set_aside(None, batch, bad.line, Verdict.UNREADABLE, bad.reason, bad.excerpt)
        verdicts = self.verdicts[first_row : first_row + batch.table.num_rows]
        for index in np.flatnonzero(verdicts != Verdict.KEPT):
            verdict = Verdict(int(verdicts[index]))
            reason = self.decision.reasons.get(first_row + int(index), REASONS[verdict])
            self._set_aside(first_row + int(index), batch, None, verdict, reason, self._raw(batch, int(index)))
        kept = np.flatnonzero(verdicts == Verdict.KEPT)
        if len(kept):
            self._encode(batch, kept, first_row)

    def _encode(self, batch: SourceBatch, kept: np.ndarray, first_row: int) -> None:
        raw = batch.table[self.schema.input_column].take(pa.array(kept)).to_pylist()
        inputs = self.source.read_images(raw, batch.file) if self.schema.kind == "image" else raw
        encoded = self.encoder.encode([item if isinstance(item, bytes) else b"" for item in inputs]
                                      if self.schema.kind == "image" else inputs)  # fmt: skip
        broken = {item.index: item.reason for item in encoded.unreadable}
        for index, reason in broken.items():
            row = first_row + int(kept[index])
            self.verdicts[row] = Verdict.UNREADABLE
            self._set_aside(row, batch, None, Verdict.UNREADABLE, reason, raw[index])
        readable = np.delete(kept, list(broken))
        self._write(batch, readable, first_row, encoded.columns)

    def _write(self, batch: SourceBatch, readable: np.ndarray, first_row: int, features: dict[str, pa.Array]) -> None:
        rows = first_row + readable
        labels, splits = self.decision.label_of_row[rows], self.decision.splits[rows]
        picked = batch.table.take(pa.array(readable))
        columns: dict[str, Any] = {"row": pa.array(rows, pa.int64()), "label": pa.array(labels, pa.int32()),
                                   "raw": picked[self.schema.input_column]}  # fmt: skip
        columns |= {f"slice:{name}": picked[name] for name in self.recipe.evaluation.slices} | features
        table = pa.table(columns, schema=self.arrow_schema)
        for code, output in enumerate(self.outputs):
            mine = np.flatnonzero(splits == code)
            if len(mine):
                output.writer.write_table(table.take(pa.array(mine)))
                output.counts += np.bincount(labels[mine], minlength=len(output.counts))
        if "input_ids" in features:
            lengths = np.asarray(pc.list_value_length(features["input_ids"]).to_numpy())
            self.tokens += int(lengths.sum())
            self.truncated += int((lengths >= lengths.max(initial=0)).sum()) if self._is_full(lengths) else 0

    def _is_full(self, lengths: np.ndarray) -> bool:
        return bool(lengths.max(initial=0) >= self.recipe.model.max_tokens)

    def _raw(self, batch: SourceBatch, index: int) -> str:
        return batch.table[self.schema.input_column][index].as_py() or ""

    def _set_aside(
        self, row: int | None, batch: SourceBatch, line: int | None, verdict: Verdict, reason: str, excerpt: str
    ) -> None:
        self.set_aside += 1
        entry = {"file": batch.file or excerpt, "row": row, "line": line, "split": batch.split,
                 "verdict": verdict.name.lower(), "reason": reason, "excerpt": excerpt[:_EXCERPT_CHARACTERS]}  # fmt: skip
        self.quarantine.write(json.dumps({k: v for k, v in entry.items() if v is not None}, ensure_ascii=False) + "\n")

    def _some_reasons(self) -> str:
        self.quarantine.flush() if not self.quarantine.closed else None
        lines = (self.folder / QUARANTINE).read_text(encoding="utf-8").splitlines()[:3]
        return "; ".join(f"{e['file']}: {e['reason']}" for e in map(json.loads, lines))


def _record(
    recipe: Recipe, encoder: Encoder, schema: Schema, second: _SecondPass, key: str, location: str, seconds: float
) -> DatasetRecord:
    labels = second.decision.labels
    counts = count(np.concatenate([second.verdicts, np.full(second.bad_rows, Verdict.UNREADABLE, np.int8)]))
    splits = {
        split: SplitStats(rows=int(o.counts.sum()), class_counts=dict(zip(labels, o.counts.tolist(), strict=True)))
        for split, o in zip(SPLITS, second.outputs, strict=True)
    }
    is_text = schema.kind == "text"
    return DatasetRecord(
        name=recipe.name, key=key, location=location, task=recipe.task, input_kind=schema.kind,
        input_column=schema.input_column, label_column=schema.label_column, labels=labels, splits=splits,
        cleaning=counts, quarantine=f"{location}/{QUARANTINE}" if second.set_aside else None,
        slices=recipe.evaluation.slices, size_bytes=folder_bytes(second.folder), seconds=seconds,
        image_size=encoder.describe().get("image_size"),
        mean_tokens=second.tokens / counts.kept if is_text else None,
        truncated_fraction=second.truncated / counts.kept if is_text else None,
    )  # fmt: skip
