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
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import DataError

_EXCERPT_CHARACTERS = 200
_MAX_FIELD_CHARACTERS = 50_000_000
_OTHER_DELIMITERS = (";", "\t", "|", ",")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


@dataclass(frozen=True)
class BadRow:
    line: int
    """1-based line of the file (or row, where there are no lines)."""
    reason: str
    excerpt: str = ""
    is_undecodable: bool = False
    """Bytes that are not of the file's encoding: many of these mean that the encoding is wrong."""


@dataclass(frozen=True)
class RowBatch:
    """Rows of one file: string columns, null where there is no value."""

    table: pa.Table
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table file and how to read it."""

    name: str
    open: Callable[[], Any]
    """Gives a fresh binary stream."""
    encoding: str
    batch_rows: int


def read_delimited(table: Table, delimiter: str) -> Iterator[RowBatch]:
    """CSV and TSV by RFC 4180: quoted fields may hold line breaks; rows of another width are bad rows.

    A first line without the delimiter but with a semicolon, tab or bar is taken to be separated by that.

    Raises DataError for an empty file, a repeated column name, a quote that is never closed.
    """
    csv.field_size_limit(min(_MAX_FIELD_CHARACTERS, sys.maxsize))
    with _text(table) as text:
        reader = csv.reader(text, delimiter=_delimiter(table, delimiter), strict=True)
        header = _header(reader, table.name)
        rows = _parsed(reader, len(header), table.name)
        for part in _in_batches(rows, table.batch_rows):
            good = [row for row in part if isinstance(row, list)]
            columns = [pa.array([row[i] or None for row in good], pa.string()) for i in range(len(header))]
            yield RowBatch(pa.table(columns, names=header), tuple(row for row in part if isinstance(row, BadRow)))


def _delimiter(table: Table, usual: str) -> str:
    try:
        with _text(table) as text:
            first = text.readline(_MAX_FIELD_CHARACTERS)
    except UnicodeError:
        return usual  # the reading itself will say where
    names = re.sub(r'"[^"]*"', "", first)
    return usual if usual in names else max((usual, *_OTHER_DELIMITERS), key=names.count)


def _header(reader: Any, name: str) -> list[str]:
    try:
        header = [column.strip() for column in next(reader, [])]
    except (csv.Error, UnicodeError) as error:
        raise DataError(
            f"{name}: the first line cannot be read ({error})", "check data.encoding and the quotes"
        ) from None
    if not any(header):
        raise DataError(f"{name} is empty", "it needs a first line with the column names, and rows below it")
    repeated = next((column for column in header if header.count(column) > 1), None)
    if repeated is not None:
        raise DataError(f"{name}: the column name {repeated!r} appears twice in the first line", "rename one of them")
    if not _is_decodable(header):
        raise DataError(f"{name}: the first line is not in the expected encoding", "set data.encoding, such as latin-1")
    return header


def _parsed(reader: Any, width: int, name: str) -> Iterator[list[str] | BadRow]:
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{name}: a quote opened on line {line} is never closed", "close or double it"
                ) from None
            yield BadRow(line, f"not valid CSV ({error})")
            continue
        except UnicodeError as error:
            raise DataError(
                f"{name}: there are bytes soon after line {line} that are not in the expected encoding ({error})",
                "set data.encoding to the file's own",
            ) from None
        if row is None:
            return
        if not row:
            continue  # an empty line separates nothing and holds nothing
        if len(row) != width:
            yield BadRow(line, f"has {len(row)} fields, but the first line names {width} columns", _excerpt(row))
        elif not _is_decodable(row):
            yield BadRow(line, "has bytes that are not of the file's encoding", _excerpt(row), is_undecodable=True)
        else:
            yield row


def read_json_lines(table: Table) -> Iterator[RowBatch]:
    """One JSON object per line; numbers and booleans become text, nested values their JSON."""
    with _text(table) as text:
        for part in _in_batches(_objects(text), table.batch_rows):
            good = [row for row in part if isinstance(row, dict)]
            names = dict.fromkeys(itertools.chain.from_iterable(good))
            columns = {name: pa.array([_as_text(row.get(name)) for row in good], pa.string()) for name in names}
            yield RowBatch(pa.table(columns), tuple(row for row in part if isinstance(row, BadRow)))


def _objects(text: Iterable[str]) -> Iterator[dict[str, Any] | BadRow]:
    for line, raw in enumerate(text, start=1):
        if not raw.strip():
            continue
        if not _is_decodable([raw]):
            yield BadRow(line, "has bytes that are not of the file's encoding", _excerpt([raw]), is_undecodable=True)
            continue
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            yield BadRow(line, f"not valid JSON ({error})", _excerpt([raw]))
            continue
        if not isinstance(value, dict):
            yield BadRow(line, "not a JSON object", _excerpt([raw]))
        elif "\\ud" in raw and not _is_decodable([json.dumps(value, ensure_ascii=False)]):
            yield BadRow(line, "holds half of a character (a lone surrogate)", _excerpt([raw]))
        else:
            yield value


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return json.dumps(value, ensure_ascii=False)


def read_parquet(table: Table) -> Iterator[RowBatch]:
    """Parquet, row group by row group. Raises DataError when the file is not Parquet."""
    with table.open() as stream:
        try:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(table.batch_rows):
                columns = [_string_column(column) for column in batch.columns]
                yield RowBatch(pa.table(columns, names=batch.schema.names))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{table.name} is not a readable Parquet file ({error})", "write it again") from None


def _string_column(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):  # pandas writes what is missing as NaN
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        text = pc.cast(column, pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        text = pa.array([_as_text(_plain(value)) for value in column.to_pylist()], pa.string())
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else json.loads(json.dumps(value, default=str))


Reader = Callable[[Table], Iterator[RowBatch]]
READERS: Mapping[str, Reader] = {
    ".csv": lambda table: read_delimited(table, ","),
    ".tsv": lambda table: read_delimited(table, "\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
}
"""File ending -> reader. A compressed file's ending (.csv.gz) counts without its last part."""


def _text(table: Table) -> io.TextIOWrapper:
    """Decoded lines. A byte order mark wins over the recipe; undecodable UTF-8 is kept as surrogates, to be found."""
    with table.open() as stream:
        start = stream.read(4)
    marked = next((encoding for mark, encoding in _BOMS if start.startswith(mark)), None)
    encoding = marked or table.encoding
    errors = "surrogateescape" if codecs.lookup(encoding).name.startswith("utf-8") else "strict"
    return io.TextIOWrapper(io.BufferedReader(table.open()), encoding=encoding, errors=errors, newline="")


def _is_decodable(cells: list[str]) -> bool:
    try:
        for cell in cells:
            if not cell.isascii():
                cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(cells: list[str]) -> str:
    return " | ".join(cells)[:_EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()


def _in_batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while part := list(itertools.islice(iterator, size)):
        yield part
