"""Readers of table files: CSV, TSV, JSON lines and Parquet, as batches of text columns.

In: an open file. Out: ``RowBatch`` values in bounded memory; a row that cannot be read comes as a ``BadRow`` with its line
and reason, and the reading goes on. One reader per kind of file, one table ``READERS``.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import DataError

_EXCERPT_CHARACTERS = 200
_MAX_FIELD_CHARACTERS = 10_000_000
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
ENCODING_HINT = "set data.encoding to the file's own, such as latin-1 or cp1252"
_NULL = pa.scalar(None, pa.string())


@dataclass(frozen=True)
class BadRow:
    line: int
    """1-based line of the file where the row ends."""
    reason: str
    excerpt: str = ""
    is_undecodable: bool = False
    """Bytes that are not of the file's encoding: many of these mean that the encoding is wrong."""
    index: int = 0
    """Position among all rows of its batch, the readable ones included."""


@dataclass(frozen=True)
class RowBatch:
    """Rows of one file: string columns, null where there is no value, and the rows that could not be read."""

    table: pa.Table
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class TableFile:
    """A table file and how to read it."""

    name: str
    open: Callable[[], Any]
    """Gives a fresh binary stream."""
    encoding: str
    batch_rows: int


def read_delimited(file: TableFile, delimiter: str) -> Iterator[RowBatch]:
    """CSV and TSV by RFC 4180: quoted fields may hold line breaks; rows of another width are bad rows.

    Raises DataError for an empty file, a repeated column name, a quote that is never closed, another encoding.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with _text(file) as text:
        lines = _Lines(text, file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(reader, file.name, delimiter)
        for part in _in_batches(_csv_rows(reader, lines, len(header), file.name), file.batch_rows):
            good, bad = _sort_out(part)
            columns = [pa.array([row[i] or None for row in good], pa.string()) for i in range(len(header))]
            yield RowBatch(pa.table(columns, names=header), bad)


def _header(reader: Any, name: str, delimiter: str) -> list[str]:
    try:
        header = [column.strip() for column in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{name}: the first line cannot be read ({error})", "check its quotes") from None
    if not any(header):
        raise DataError(f"{name} is empty", "it needs a first line with the column names, and rows below it")
    if not _is_decodable(header):
        raise DataError(f"{name}: line 1 is not in the expected encoding", ENCODING_HINT)
    other = next((d for d in ",;\t|" if d != delimiter and d in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{name}: the first line is separated by {other!r} instead of {delimiter!r}",
            "write it with commas as .csv, or with tabs as .tsv",
        )
    check_column_names(header, name)
    return header


def check_column_names(names: Sequence[str], file: str) -> None:
    """Raises DataError for a name that appears twice."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{file}: the column name {repeated!r} appears twice", "rename one of them")


def _csv_rows(reader: Any, lines: _Lines, width: int, name: str) -> Iterator[list[str] | BadRow]:
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield _not_csv(error, name, first_line, lines)
            continue
        if row is None:
            return
        if not row:
            continue  # an empty line separates nothing and holds nothing
        if len(row) != width:
            reason = f"has {len(row)} fields, but the first line names {width} columns"
            yield BadRow(reader.line_num, reason, _excerpt(row))
        elif not _is_decodable(row):
            yield BadRow(reader.line_num, "is not in the expected encoding", _excerpt(row), is_undecodable=True)
        else:
            yield row


def _not_csv(error: csv.Error, name: str, first_line: int, lines: _Lines) -> BadRow:
    if "unexpected end" in str(error) or "field limit" in str(error):
        raise DataError(f"{name}: a quote opened on line {first_line} is never closed", "close it, or double it") from None
    spread = f" from line {first_line} to line {lines.number}" if lines.number > first_line else ""
    return BadRow(lines.number, f"is not valid CSV{spread} ({error})", _excerpt([lines.last]))


def read_json_lines(file: TableFile) -> Iterator[RowBatch]:
    """One JSON object per line; numbers and booleans become text, nested values their JSON.

    Raises DataError when the file is of another encoding that cannot be decoded at all.
    """
    with _text(file) as text:
        for part in _in_batches(_json_rows(_Lines(text, file)), file.batch_rows):
            good, bad = _sort_out(part)
            names = dict.fromkeys(itertools.chain.from_iterable(good))
            columns = {name: pa.array([_as_text(row.get(name)) for row in good], pa.string()) for name in names}
            yield RowBatch(pa.table(columns), bad)


def _json_rows(lines: _Lines) -> Iterator[dict[str, Any] | BadRow]:
    for line in lines:
        if not line.strip():
            continue
        if not _is_decodable([line]):
            yield BadRow(lines.number, "is not in the expected encoding", _excerpt([line]), is_undecodable=True)
            continue
        try:
            value = json.loads(line)
            problem = "" if isinstance(value, dict) else "is not a JSON object"
        except (ValueError, RecursionError) as error:
            value, problem = None, f"is not valid JSON ({error})"
        if not problem and "\\u" in line and not _is_decodable([json.dumps(value, ensure_ascii=False)]):
            problem = "holds half of a character (a lone surrogate)"
        yield BadRow(lines.number, problem, _excerpt([line])) if problem else value


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return json.dumps(value, ensure_ascii=False)


def read_parquet(file: TableFile) -> Iterator[RowBatch]:
    """Parquet, ``batch_rows`` at a time. Raises DataError when the file is not Parquet."""
    with file.open() as stream:
        try:
            parquet = pq.ParquetFile(stream, pre_buffer=False)
            check_column_names(parquet.schema_arrow.names, file.name)
            for batch in parquet.iter_batches(file.batch_rows):
                columns = [_string_column(column) for column in batch.columns]
                yield RowBatch(pa.table(columns, names=batch.schema.names))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file.name} is not a readable Parquet file ({error})", "write it again") from None


def _string_column(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        text = pc.cast(column, pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        text = pa.array([_as_text(_plain(value)) for value in column.to_pylist()], pa.string())
    return pc.if_else(pc.equal(text, ""), _NULL, text)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else json.loads(json.dumps(value, default=str))


Reader = Callable[[TableFile], Iterator[RowBatch]]
READERS: Mapping[str, Reader] = {
    ".csv": lambda file: read_delimited(file, ","),
    ".tsv": lambda file: read_delimited(file, "\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
}
"""File ending -> reader. A compressed file's ending (.csv.gz) counts without its last part."""


class _Lines:
    """Hands lines through and remembers the last one, so that a row that cannot be parsed can be shown."""

    def __init__(self, text: Iterator[str], file: TableFile) -> None:
        self._text, self._file = text, file
        self.last, self.number = "", 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number += 1
        try:
            self.last = next(self._text)
        except UnicodeError as error:
            raise DataError(
                f"{self._file.name}: line {self.number} is not in the expected encoding ({error})", ENCODING_HINT
            ) from None
        return self.last


def _text(file: TableFile) -> io.TextIOWrapper:
    """Decoded lines. A byte order mark wins over the recipe; undecodable UTF-8 is kept as surrogates, to be found."""
    with file.open() as stream:
        start = stream.read(4)
    marked = next((encoding for mark, encoding in _BOMS if start.startswith(mark)), None)
    encoding = marked or file.encoding
    errors = "surrogateescape" if codecs.lookup(encoding).name.startswith("utf-8") else "strict"
    return io.TextIOWrapper(io.BufferedReader(file.open()), encoding=encoding, errors=errors, newline="")


def _is_decodable(cells: list[str]) -> bool:
    try:
        for cell in cells:
            if not cell.isascii():
                cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(cells: list[str]) -> str:
    return " | ".join(cells)[:_EXCERPT_CHARACTERS].encode("utf-8", "replace").decode().rstrip("\r\n")


def _in_batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while part := list(itertools.islice(iterator, size)):
        yield part


def _sort_out(part: list[Any]) -> tuple[list[Any], tuple[BadRow, ...]]:
    """The readable rows, and the others with their positions."""
    good = [row for row in part if not isinstance(row, BadRow)]
    if len(good) == len(part):
        return good, ()
    return good, tuple(replace(row, index=i) for i, row in enumerate(part) if isinstance(row, BadRow))
