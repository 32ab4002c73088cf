"""Prepared splits, memory-mapped: opening one reads nothing, taking rows reads just those."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from orchestrator.errors import IntegrityError
from orchestrator.storage import split_file

_CHUNK_BYTES = 64 << 20
"""Rows are written in chunks of about this size: what fits into one is taken from at full speed."""


def open_split(folder: Path, split: str) -> pa.Table:
    """A split of a prepared dataset. Raises IntegrityError when its file is missing or not Arrow."""
    path = folder / split_file(split)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} is not a prepared split ({error})", "run prepare again") from None


def labels_of(table: pa.Table) -> np.ndarray:
    """int32 [rows]: each row's index into the dataset's labels."""
    labels: np.ndarray = table["label"].to_numpy()
    return labels


class RowReader:
    """Takes rows of a split in any order at a cost that does not grow with the split.

    ``Table.take`` joins all chunks of a column before it takes the first row.
    """

    def __init__(self, table: pa.Table, columns: Sequence[pa.Field] | None = None) -> None:
        """``columns``: only these are taken; None: all."""
        self._chunks = (table if columns is None else table.select([field.name for field in columns])).to_batches()
        self._ends = np.cumsum([chunk.num_rows for chunk in self._chunks])

    def take(self, rows: np.ndarray) -> pa.Table:
        """These rows, in this order."""
        chunk_of_row = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(chunk_of_row, kind="stable")
        parts = []
        for chunk in np.unique(chunk_of_row):
            offset = self._ends[chunk] - self._chunks[chunk].num_rows
            parts.append(self._chunks[chunk].take(pa.array(rows[order][chunk_of_row[order] == chunk] - offset)))
        if len(parts) < 2:
            return pa.Table.from_batches(parts or [self._chunks[0].slice(0, 0)])
        return pa.Table.from_batches(parts).combine_chunks().take(pa.array(np.argsort(order)))


class SplitWriter:
    """Writes one split's file, chunk by chunk. A context manager: leaving it closes the file."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        self._sink = pa.OSFile(str(folder / split_file(split)), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_bytes >= _CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._waiting_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
        finally:
            self._sink.close()
