"""Where rows come from: tables of texts or image paths, and folders of class folders of images.

In: the recipe's ``data`` section. Out: batches of rows, some thousand at a time, and the rows that could not be read with
the reason for each; the inputs of a batch as texts or as bytes. Local paths and any URL that pyarrow opens.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from orchestrator.data.tables import READERS, BadRow, RowBatch, Table
from orchestrator.errors import DataError
from orchestrator.recipe import Data
from orchestrator.storage import Storage, sha256_file, sha256_json

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
FINGERPRINTS = "prepare/fingerprints.json"
_SPLIT_FOLDERS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
                  "val": "validation", "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip
_HASH_CHUNK_BYTES = 1 << 20
WRONG_ENCODING = "set data.encoding to the file's own, such as latin-1 or cp1252"
_SAMPLE_ROWS = 1000
_FILES_PER_TASK = 16
SMALL_IMAGE_BYTES = 8192
"""Below this, most of the time goes to Python itself, where threads get in each other's way: one is faster than two."""
_REMOTE_READERS = 32
"""An object store answers slowly but many at a time; a local disk is best read by as many threads as there are cores."""


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
class Skipped:
    """A file of the source's folder that is neither a table nor an image that can be read."""

    name: str
    reason: str


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
    found = [entry for split, path in given.items() for entry in _find(path, split)]
    names = [entry.name for entry in found]
    if len(set(names)) < len(names):  # train/cat/1.png and test/cat/1.png
        found = [replace(e, name=f"{e.split}/{e.name}") if isinstance(e, SourceFile) else e for e in found]
    return Source(data, found)


class Source:
    """Reading starts anew with every call of ``batches``."""

    def __init__(self, data: Data, found: Sequence[SourceFile | Skipped]) -> None:
        files = [entry for entry in found if isinstance(entry, SourceFile)]
        kinds = {_kind(file.name) for file in files}
        if len(kinds) > 1:
            raise DataError(
                f"the source mixes {' and '.join(sorted(map(str, kinds)))} files", "keep one kind per folder"
            )
        self.is_image_folder = kinds == {"image"}
        self.data, self.skipped = data, tuple(entry for entry in found if isinstance(entry, Skipped))
        self.files = _some_of_each(files, data.max_rows) if self.is_image_folder else tuple(files)
        self.is_local = all(isinstance(file.filesystem, fs.LocalFileSystem) for file in files)

    @property
    def given_splits(self) -> tuple[str, ...]:
        """Names of the splits that the files themselves give."""
        return tuple(dict.fromkeys(file.split for file in self.files if file.split))

    @cached_property
    def sample(self) -> pa.Table:
        """The first thousand rows or so, to look at. Raises DataError when there are none that can be read."""
        parts: list[pa.Table] = []
        bad: list[tuple[str, BadRow]] = []
        for batch in self.batches():
            bad += [(batch.file, row) for row in batch.bad]
            parts += [batch.table] if batch.table.num_rows else []
            if sum(part.num_rows for part in parts) >= _SAMPLE_ROWS:
                break
        if parts:
            return pa.concat_tables(parts).slice(0, _SAMPLE_ROWS)
        if bad:
            file, row = bad[0]
            raise DataError(
                f"{file} has no row that can be read: line {row.line} {row.reason}",
                WRONG_ENCODING if row.is_undecodable else "see that line first",
            )
        raise DataError(f"{self.files[0].name} has no rows", "it needs rows below the column names")

    def batches(self) -> Iterator[SourceBatch]:
        """All rows in a fixed order, ``data.batch_rows`` at most at a time; of each given split ``max_rows`` at most."""
        if self.is_image_folder:
            yield from self._image_batches()
            return
        columns: list[str] | None = None
        for _, files in itertools.groupby(self.files, lambda file: file.split):
            left = self.data.max_rows
            for file in files:
                for batch in self._read(file):
                    if left is not None and left <= 0:
                        break
                    if columns is None and batch.table.num_columns:
                        columns = batch.table.column_names
                    table = _aligned(batch.table, columns, file.name).slice(0, left)
                    left = None if left is None else left - table.num_rows
                    yield SourceBatch(file.name, file.split, table, batch.bad)

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
        try:
            yield from READERS[_suffix(file.name)](table)
        except (OSError, EOFError) as error:  # a cut off .gz, a network that fails
            raise DataError(
                f"{file.name} cannot be read to its end ({_reason(error)})", "is the file whole? copy it again"
            ) from None

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

    def read_image(self, name: str, table_file: str = "") -> bytes | str:
        """The content of an image file, or the reason why it cannot be read.

        ``name``: as the rows give it; in a table, relative to the folder of the table ``table_file`` or absolute.
        """
        try:
            filesystem, path = self._place(name, table_file)
            if isinstance(filesystem, fs.LocalFileSystem):  # a third of the time that pyarrow's stream takes
                return Path(path).read_bytes()
            with filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())
        except (OSError, ValueError) as error:
            return f"cannot be opened ({_reason(error)})"

    def _place(self, name: str, table_file: str) -> tuple[fs.FileSystem, str]:
        if self.is_image_folder:
            file = self._by_name[name]
            return file.filesystem, file.path
        owner = self._by_name[table_file]
        folder = owner.path.rpartition("/")[0]
        return owner.filesystem, name if name.startswith("/") else f"{folder}/{name}"

    @cached_property
    def _by_name(self) -> dict[str, SourceFile]:
        return {file.name: file for file in self.files}

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """For whatever is done file by file."""
        mean_bytes = sum(file.size_bytes for file in self.files) / len(self.files)
        if not self.is_local:
            number = _REMOTE_READERS
        elif self.is_image_folder and mean_bytes < SMALL_IMAGE_BYTES:
            number = 1
        else:
            number = os.cpu_count() or 1
        return ThreadPoolExecutor(number, thread_name_prefix="read")

    def fingerprint(self, storage: Storage, image_column: str | None = None) -> str:
        """SHA-256 over names and contents, those of the images that a table's ``image_column`` names included.

        Files whose size and time of change are known are not read again.
        """
        facts = [_Facts.of_file(file) for file in self.files]
        if image_column is not None and not self.is_image_folder:
            facts += [fact for batch in self.batches() for fact in self._named_images(batch, image_column)]
        signature = sha256_json([[f.path, f.size_bytes, f.modified_ns, f.split] for f in facts])
        known = storage.read_json(FINGERPRINTS) or {}
        if signature not in known:
            parts = [facts[start : start + _FILES_PER_TASK] for start in range(0, len(facts), _FILES_PER_TASK)]
            contents = itertools.chain.from_iterable(self.threads.map(_sha256_of_each, parts))
            known[signature] = sha256_json([[f.name, f.split, d] for f, d in zip(facts, contents, strict=True)])
            storage.write_json(FINGERPRINTS, known)
        return str(known[signature])

    def _named_images(self, batch: SourceBatch, column: str) -> Iterator[_Facts]:
        places = {name: self._place(name, batch.file) for name in batch.table[column].to_pylist() if name}
        if not places:
            return
        filesystem = next(iter(places.values()))[0]
        for name, info in zip(places, filesystem.get_file_info([path for _, path in places.values()]), strict=True):
            yield _Facts(name, info.path, None, info.size or 0, info.mtime_ns or 0, filesystem)


@dataclass(frozen=True)
class _Facts:
    """What tells a file from its earlier self without reading it."""

    name: str
    path: str
    split: str | None
    size_bytes: int
    modified_ns: int
    filesystem: fs.FileSystem

    @classmethod
    def of_file(cls, file: SourceFile) -> _Facts:
        return cls(file.name, file.path, file.split, file.size_bytes, file.modified_ns, file.filesystem)


def _find(source: str, split: str | None) -> list[SourceFile | Skipped]:
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
    if not any(isinstance(file, SourceFile) for file in files):
        raise DataError(
            f"the folder {source} holds no table and no image", f"known are {', '.join(READERS)} and images"
        )
    return [file for file in files if file is not None]


def _in_folder(
    info: fs.FileInfo, root: str, split: str | None, filesystem: fs.FileSystem
) -> SourceFile | Skipped | None:
    """A file of a folder source; None for hidden ones. Class and split are the names of its folders."""
    name = info.path[len(root) :].lstrip("/")
    parts = name.split("/")
    kind = _kind(name)
    if any(part.startswith(".") for part in parts) or parts[-1].startswith("_"):
        return None  # hidden files, and the marks that Spark and others leave beside their tables
    if kind is None:
        return Skipped(name, "is not a kind of file that can be read")
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


def _some_of_each(files: Sequence[SourceFile], limit: int | None) -> tuple[SourceFile, ...]:
    """At most ``limit`` files of each given split, evenly spaced: images lie class by class."""
    if limit is None:
        return tuple(files)
    parts = [[file for file in files if file.split == split] for split in dict.fromkeys(f.split for f in files)]
    return tuple(
        part[number * len(part) // min(limit, len(part))] for part in parts for number in range(min(limit, len(part)))
    )


def _sha256_of_each(files: Sequence[_Facts]) -> list[str | None]:
    return [_sha256(file) for file in files]


def _sha256(file: _Facts) -> str | None:
    """Hash of the content; None when there is no such file, which prepare will say."""
    digest: Any = hashlib.sha256()
    try:
        if isinstance(file.filesystem, fs.LocalFileSystem):
            path = Path(file.path)
            small = file.size_bytes <= _HASH_CHUNK_BYTES  # a chunk's buffer costs more than to hash a small image
            return hashlib.sha256(path.read_bytes()).hexdigest() if small else sha256_file(path)
        with file.filesystem.open_input_stream(file.path) as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return None
    return str(digest.hexdigest())


def _reason(error: Exception) -> str:
    """A system error's words without its number and path."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (words or type(error).__name__).splitlines()[0]
