"""A prepared dataset on disk: all encoded rows in one memory-mapped file, and each split as positions in it.

Opening reads nothing, taking rows reads just those. Rows that were set aside may lie in the file, but no split points at
them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.data.encoder import Encoder
from orchestrator.errors import IntegrityError
from orchestrator.storage import ROWS, split_file

SLICE = "slice:"
"""Prefix of the columns that metrics are sliced by."""


def row_columns(slices: Sequence[str], encoder: Encoder) -> pa.Schema:
    """What is kept of a row: its number in the source, the input as it came, the slices, and the network's inputs."""
    kept = [pa.field(f"{SLICE}{name}", pa.string()) for name in slices]
    return pa.schema([("row", pa.int64()), ("raw", pa.string()), *kept, *encoder.columns()])


def write_split(folder: Path, split: str, positions: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
    """``positions``: int64, which rows of the rows' file; ``labels``: int32, their indices into the dataset's labels;
    ``groups``: int64, rows with the same number may not be torn apart when the split is divided further."""
    table = pa.table({
        "position": pa.array(positions, pa.int64()), "label": pa.array(labels, pa.int32()),
        "group": pa.array(groups, pa.int64()),
    })  # fmt: skip
    with pa.OSFile(str(folder / split_file(split)), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def column_at(folder: Path, name: str, positions: np.ndarray) -> list[str]:
    """A column's values at these positions of the rows' file."""
    values: list[str] = _Chunks(_open(folder / ROWS).select([name])).take(positions)[name].to_pylist()
    return values


class Split:
    """Rows of a prepared dataset: a split, several as one, or some rows of them. Numbered from 0 within."""

    def __init__(self, folder: Path, *splits: str) -> None:
        """Raises IntegrityError when a file is missing or not Arrow."""
        index = pa.concat_tables([_open(folder / split_file(split)) for split in splits]).combine_chunks()
        self._table = _open(folder / ROWS)
        self._positions: np.ndarray = index["position"].to_numpy()
        self.labels: np.ndarray = index["label"].to_numpy()
        """int32 [rows]: each row's index into the dataset's labels"""
        self.groups: np.ndarray = index["group"].to_numpy()
        """int64 [rows]: rows with the same number belong together: the same input, or the same split.by.group"""
        names = [n for n in self._table.column_names if n not in ("row", "raw") and not n.startswith(SLICE)]
        self._inputs = _Chunks(self._table.select(names))

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, rows: np.ndarray) -> Split:
        """These rows alone, as a split of their own over the same file. ``rows``: indices, or a bool for each row."""
        part = copy.copy(self)
        part._positions, part.labels, part.groups = self._positions[rows], self.labels[rows], self.groups[rows]
        return part

    def lengths(self, encoder: Encoder) -> np.ndarray:
        """int64 [rows]: what each costs the network, in tokens; ones for images."""
        lengths: np.ndarray = encoder.lengths(self._table)[self._positions]
        return lengths

    def inputs(self, rows: np.ndarray) -> pa.Table:
        """The network's input columns of these rows, in this order."""
        return self._inputs.take(self._positions[rows])

    def column(self, name: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
        """``row``, ``raw`` or a slice's column, of these rows or of all."""
        positions = self._positions if rows is None else self._positions[rows]
        return _Chunks(self._table.select([name])).take(positions)[name]


class _Chunks:
    """Takes rows in any order at a cost that does not grow with the table: ``Table.take`` joins all chunks first."""

    def __init__(self, table: pa.Table) -> None:
        self._chunks = table.to_batches()
        self._ends = np.cumsum([chunk.num_rows for chunk in self._chunks])

    def take(self, rows: np.ndarray) -> pa.Table:
        chunk_of_row = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(chunk_of_row, kind="stable")
        chunks, starts = np.unique(chunk_of_row[order], return_index=True)
        parts = [self._chunks[0].slice(0, 0)]
        for chunk, mine in zip(chunks, np.split(rows[order], starts[1:]), strict=bool(len(rows))):
            first = self._ends[chunk] - self._chunks[chunk].num_rows
            parts.append(self._chunks[chunk].take(pa.array(mine - first)))
        taken = pa.Table.from_batches(parts).combine_chunks()
        return taken if len(chunks) < 2 else taken.take(pa.array(np.argsort(order)))


def _open(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} is not a prepared file ({error})", "run prepare again") from None
