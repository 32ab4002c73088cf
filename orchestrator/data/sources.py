"""Where rows come from: tables of texts or image paths, and folders of class folders of images.

In: the recipe's ``data`` section. Out: batches of rows, some thousand at a time, and the rows that could not be read with
the reason for each; the inputs of a batch as texts or as bytes. Local paths and any URL that pyarrow opens.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyarrow import fs

from orchestrator.data.tables import READERS, BadRow, RowBatch, Table
from orchestrator.errors import DataError
from orchestrator.recipe import Data
from orchestrator.storage import Storage, sha256_json

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
FINGERPRINTS = "prepare/fingerprints.json"
_SPLIT_FOLDERS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
                  "val": "validation", "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip
_READ_THREADS = 8
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    path: str
    """Path inside ``filesystem``."""
    name: str
    """What messages call it: the path below the source's folder."""
    split: str | None
    label: str | None
    """The class folder's name, for images in class folders."""
    size_bytes: int
    modified_ns: int
    filesystem: fs.FileSystem


@dataclass(frozen=True)
class SourceBatch:
    """Rows of one file (or of several image files), with their given split if there is one."""

    file: str
    split: str | None
    table: pa.Table
    bad: tuple[BadRow, ...] = ()


def open_source(data: Data) -> Source:
    """Find the files.

    Raises:
        DataError: nothing there, or a mixture that cannot be read as one source.
    """
    if data.split.files is None:
        assert data.source is not None
        return Source(data, _find(data.source, None))
    given = {name: path for name, path in data.split.files.model_dump().items() if path is not None}
    return Source(data, [file for split, path in given.items() for file in _find(path, split)])


class Source:
    def __init__(self, data: Data, files: Sequence[SourceFile]) -> None:
        kinds = {_kind(file.name) for file in files}
        if len(kinds) > 1:
            raise DataError(
                f"the source mixes {' and '.join(sorted(map(str, kinds)))} files", "keep one kind per folder"
            )
        self.is_image_folder = kinds == {"image"}
        limit = data.max_rows if self.is_image_folder else None  # images lie class by class: take some of each
        self.data, self.files = data, tuple(files) if limit is None else _spread(files, limit)

    @property
    def given_splits(self) -> tuple[str, ...]:
        """Names of the splits that the files themselves give."""
        return tuple(dict.fromkeys(file.split for file in self.files if file.split))

    @cached_property
    def sample(self) -> pa.Table:
        """The first rows, to look at. Raises DataError when there are none."""
        first = next((batch.table for batch in self.batches() if batch.table.num_rows), None)
        if first is None:
            raise DataError(f"{self.files[0].name} has no rows", "it needs rows below the column names")
        return first

    def batches(self) -> Iterator[SourceBatch]:
        """All rows in a fixed order, ``data.batch_rows`` at most at a time."""
        batches = self._image_batches() if self.is_image_folder else self._table_batches()
        return batches if self.data.max_rows is None else _first_rows(batches, self.data.max_rows)

    def _table_batches(self) -> Iterator[SourceBatch]:
        columns: list[str] | None = None
        for file in self.files:
            for batch in self._read(file):
                if columns is None and batch.table.num_columns:
                    columns = batch.table.column_names
                yield SourceBatch(file.name, file.split, _aligned(batch.table, columns, file.name), batch.bad)

    def _read(self, file: SourceFile) -> Iterator[RowBatch]:
        if not file.size_bytes:
            raise DataError(f"{file.name} is empty", "it needs a first line with the column names, and rows below it")
        compression = "gzip" if file.name.endswith(".gz") else None
        try:
            codecs.lookup(self.data.encoding)
        except LookupError:
            raise DataError(f"data.encoding {self.data.encoding!r} is unknown", "try utf-8 or latin-1") from None
        table = Table(
            file.name, lambda: file.filesystem.open_input_stream(file.path, compression=compression),
            self.data.encoding, self.data.batch_rows,
        )  # fmt: skip
        if _suffix(file.name) == ".parquet":
            table = Table(file.name, lambda: file.filesystem.open_input_file(file.path), "", self.data.batch_rows)
        return READERS[_suffix(file.name)](table)

    def _image_batches(self) -> Iterator[SourceBatch]:
        for start in range(0, len(self.files), self.data.batch_rows):
            part = self.files[start : start + self.data.batch_rows]
            for split in dict.fromkeys(file.split for file in part):
                files = [file for file in part if file.split == split]
                table = pa.table({
                    IMAGE_COLUMN: pa.array([file.name for file in files], pa.string()),
                    LABEL_COLUMN: pa.array([file.label for file in files], pa.string()),
                })  # fmt: skip
                yield SourceBatch("", split, table)

    def read_images(self, names: Sequence[str], table_file: str = "") -> list[bytes | str]:
        """The content of each image, or the reason why it cannot be read; read side by side.

        ``names``: of image files, relative to the folder of the table they were named in.
        """
        return list(self._readers.map(lambda name: self._read_image(name, table_file), names))

    def _read_image(self, name: str, table_file: str) -> bytes | str:
        file = self._by_name.get(name) if self.is_image_folder else None
        try:
            if file is not None:
                with file.filesystem.open_input_stream(file.path) as stream:
                    return bytes(stream.read())
            owner = self._by_name[table_file]
            folder = owner.path.rpartition("/")[0]
            path = name if name.startswith("/") else f"{folder}/{name}"
            with owner.filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())
        except OSError as error:
            return f"cannot be opened ({str(error).splitlines()[0]})"

    @cached_property
    def _by_name(self) -> dict[str, SourceFile]:
        return {file.name: file for file in self.files}

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def fingerprint(self, storage: Storage) -> str:
        """SHA-256 over names and contents. Files whose size and time of change are known are not read again."""
        facts = [[f.path, f.size_bytes, f.modified_ns, f.split] for f in self.files]
        signature = sha256_json([facts, str(self.files[0].filesystem.type_name)])
        known = storage.read_json(FINGERPRINTS) or {}
        if signature not in known:
            contents = self._readers.map(_sha256, self.files)
            known[signature] = sha256_json([[f.name, f.split, d] for f, d in zip(self.files, contents, strict=True)])
            storage.write_json(FINGERPRINTS, known)
        return str(known[signature])


def _find(source: str, split: str | None) -> list[SourceFile]:
    filesystem, path = _filesystem(source)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"there is nothing at {source}", "data.source is relative to the working directory: check it")
    if info.type == fs.FileType.File:
        if _kind(info.base_name) in {None, "image"}:
            raise DataError(f"{source} is not a kind of file that can be read", f"known are {', '.join(READERS)}")
        return [_file(info, info.base_name, split, None, filesystem)]
    found = [i for i in filesystem.get_file_info(fs.FileSelector(path, recursive=True)) if i.type == fs.FileType.File]
    files = [_in_folder(i, path.rstrip("/"), split, filesystem) for i in sorted(found, key=lambda i: i.path)]
    usable = [file for file in files if file is not None]
    if not usable:
        raise DataError(
            f"the folder {source} holds no table and no image", f"known are {', '.join(READERS)} and images"
        )
    return usable


def _in_folder(info: fs.FileInfo, root: str, split: str | None, filesystem: fs.FileSystem) -> SourceFile | None:
    """A file of a folder source; None for hidden and foreign ones. Class and split are the names of its folders."""
    name = info.path[len(root) :].lstrip("/")
    parts = name.split("/")
    kind = _kind(name)
    if kind is None or any(part.startswith((".", "_")) for part in parts):
        return None
    if kind != "image":
        return _file(info, name, split, None, filesystem)
    folders = parts[:-1]
    if split is None and len(folders) > 1 and folders[0].lower() in _SPLIT_FOLDERS:
        split, folders = _SPLIT_FOLDERS[folders[0].lower()], folders[1:]
    if not folders:
        raise DataError(f"the image {name} is in no class folder", "put each image in a folder named after its class")
    return _file(info, name, split, folders[0], filesystem)


def _file(info: fs.FileInfo, name: str, split: str | None, label: str | None, filesystem: fs.FileSystem) -> SourceFile:
    return SourceFile(info.path, name, split, label, info.size or 0, info.mtime_ns or 0, filesystem)


def _filesystem(source: str) -> tuple[fs.FileSystem, str]:
    from pathlib import Path

    try:
        if "://" in source:
            found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(source)
            return found
        return fs.LocalFileSystem(), str(Path(source).expanduser().resolve())
    except (ValueError, OSError) as error:
        raise DataError(
            f"data.source {source!r} cannot be opened ({error})", "give a path, s3://... or gs://..."
        ) from None


def _suffix(name: str) -> str:
    return "." + name.lower().removesuffix(".gz").rpartition(".")[2]


def _kind(name: str) -> str | None:
    suffix = _suffix(name)
    if suffix in READERS:
        return suffix
    return "image" if suffix in IMAGE_SUFFIXES else None


def _aligned(table: pa.Table, columns: list[str] | None, name: str) -> pa.Table:
    """The columns of the first file, in its order; a column that is missing here is null."""
    if columns is None or table.column_names == columns:
        return table
    if not set(table.column_names) & set(columns) and table.num_rows:
        raise DataError(f"{name} has other columns ({', '.join(table.column_names)}) than the files before it "
                        f"({', '.join(columns)})", "give all files the same columns")  # fmt: skip
    missing = pa.nulls(table.num_rows, pa.string())
    return pa.table({c: table[c] if c in table.column_names else missing for c in columns})


def _spread(files: Sequence[SourceFile], limit: int) -> tuple[SourceFile, ...]:
    """At most ``limit`` files, evenly spaced."""
    if len(files) <= limit:
        return tuple(files)
    return tuple(files[number * len(files) // limit] for number in range(limit))


def _first_rows(batches: Iterator[SourceBatch], limit: int) -> Iterator[SourceBatch]:
    for batch in batches:
        if limit <= 0:
            return
        yield SourceBatch(batch.file, batch.split, batch.table.slice(0, limit), batch.bad)
        limit -= batch.table.num_rows


def _sha256(file: SourceFile) -> str:
    digest: Any = hashlib.sha256()
    with file.filesystem.open_input_stream(file.path) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())
