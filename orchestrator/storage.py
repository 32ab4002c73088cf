"""Every path and file name, and every write that must not be half there.

A *location* is a path relative to the storage root (``prepare/reviews-1a2b3c``). A published location is a folder whose
``manifest.json`` lists each file with size and SHA-256; it appears whole or not at all. The root is a local folder or any
URL that pyarrow opens; what lies on an object store is fetched into a local cache and verified before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import fs

from orchestrator.errors import DiskFull, IntegrityError, UserError

MANIFEST = "manifest.json"
RECORD = "record.json"
RECIPE = "recipe.yaml"
QUARANTINE = "quarantine.jsonl"
ROWS = "rows.arrow"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
FOLDS = "folds"
MEMBERS = "members"
TRIALS = "trials"
DATASET = "dataset.json"
LINEAGE = "lineage.json"
STUDENTS = "students"
START = "start"
RECOVERY = "recovery"
SURVEY = "survey.json"
TEACHER = "teacher"
ANSWERS = "answers.npy"
"""What a teacher says of all training rows, in their order: logits, float32 [rows, classes]."""
SCRATCH = "scratch"
BEST = "best"
REMEDIES = "remedies.json"
TRACEBACK = "traceback.txt"
MODEL = "model"
MODEL_RECORD = "model.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.parquet"
SAMPLES = "samples.json"
KEY = "key.json"
REGISTRY_DATABASE = "registry/registry.db"
STUDIES_DATABASE = "tune/studies.db"
_CHUNK_BYTES = 1 << 20
_FORGOTTEN_S = 86_400.0


def stage_location(stage: str, name: str, key: str) -> str:
    """Where a stage's result lives: ``train/reviews-1a2b3c4d5e6f``."""
    return f"{stage}/{name}-{key[:12]}"


def checkpoint_location(run_location: str, step: int) -> str:
    return f"{run_location}/{CHECKPOINTS}/step-{step:08d}"


def part_location(run_location: str, kind: str, number: int) -> str:
    """One of the runs that make up a run, or one of the models that make up a model. ``kind``: FOLDS or MEMBERS."""
    return f"{run_location}/{kind}/{number}"


def best_location(run_location: str, epoch: int) -> str:
    """The model of an epoch that was the best so far."""
    return f"{run_location}/{BEST}/epoch-{epoch:05d}"


def version_location(name: str, version: int) -> str:
    return f"registry/models/{name}/{version}"


def split_file(split: str) -> str:
    return f"{split}.arrow"


def endpoint_host_file(port: int) -> str:
    """Note of the background process that keeps a local endpoint up."""
    return f"serve/host-{port}.json"


def feedback_location(name: str) -> str:
    """What users said about a model's answers."""
    return f"serve/feedback/{name}"


def rollout_location(name: str) -> str:
    """The plan of a model's last rollout, and below it what was counted of each."""
    return f"serve/rollouts/{name}"


def rollouts_log() -> str:
    """Who started, changed and ended rollouts."""
    return "serve/rollouts/log"


def keys_location() -> str:
    return "serve/keys"


def key_location(number: str) -> str:
    return f"{keys_location()}/{number}"


def usage_location(day: str) -> str:
    """Inputs per key on a day, a JSON file of each gateway."""
    return f"serve/usage/{day}"


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "orchestrator"


class Storage:
    """The storage root and what may be done below it."""

    def __init__(self, root: str) -> None:
        """``root``: a local folder (made absolute here) or a URL. Raises UserError for a URL that pyarrow cannot open."""
        self.url = root if "://" in root else str(Path(root).expanduser().resolve())
        try:
            self.filesystem, self.base = fs.FileSystem.from_uri(self.url)
        except (ValueError, OSError) as error:
            raise UserError(
                f"storage {root!r} cannot be opened ({error})", "give a folder, s3://... or gs://..."
            ) from None
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, location: str) -> Path:
        """The local folder of a location: the place itself, or its place in the cache of a remote root."""
        root = Path(self.base) if self.is_local else self._cache()
        resolved = (root / location).resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise UserError(f"{location!r} leads out of the storage folder", "use plain names without '..'")
        return resolved

    def place(self, location: str) -> str:
        """Where a location is, for people: a path from the working directory, a full path, or a URL."""
        if not self.is_local:
            return f"{self.url.partition('?')[0].rstrip('/')}/{location}"
        path = self.path(location)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

    def _cache(self) -> Path:
        return cache_root() / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def _remote(self, location: str) -> str:
        return f"{self.base.rstrip('/')}/{location}"

    def exists(self, location: str) -> bool:
        """Whether a published folder (one with a manifest) or a file is there."""
        if self.is_local:
            path = self.path(location)
            return path.is_file() or (path / MANIFEST).is_file()
        names = [self._remote(location), f"{self._remote(location)}/{MANIFEST}"]
        return any(info.type == fs.FileType.File for info in self.filesystem.get_file_info(names))

    def children(self, location: str) -> list[str]:
        """Names of the folders directly below a location, sorted."""
        if self.is_local:
            path = self.path(location)
            return sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        selector = fs.FileSelector(self._remote(location), allow_not_found=True)
        return sorted(i.base_name for i in self.filesystem.get_file_info(selector) if i.type == fs.FileType.Directory)

    @contextlib.contextmanager
    def publish(self, location: str, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Give an empty folder to fill; when the block ends well its content appears at ``location``, whole.

        ``hashes``: SHA-256 by name of files whose writer knows it when the block ends; the others are read again for it.

        Raises DiskFull when there is no room; what stood at ``location`` before then still stands.
        """
        staging = self.path(f".staging/{uuid.uuid4().hex}")
        try:
            _drop_forgotten(staging.parent)
            with disk_errors(staging):
                staging.mkdir(parents=True)
                yield staging
                write_manifest(staging, hashes)
                self._put(staging, location)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _put(self, staging: Path, location: str) -> None:
        target = self.path(location)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_local:
            self._upload(staging, location)
        retired = self.path(f".staging/{uuid.uuid4().hex}")
        if target.exists():
            target.replace(retired)
        staging.replace(target)
        sync_folder(target.parent)
        shutil.rmtree(retired, ignore_errors=True)

    def _upload(self, folder: Path, location: str) -> None:
        """All files first, the manifest last: a remote folder without it does not exist."""
        for file in sorted(folder.rglob("*"), key=lambda f: f.name == MANIFEST):
            if file.is_file():
                self._upload_file(file, f"{location}/{file.relative_to(folder).as_posix()}")

    def _upload_file(self, file: Path, location: str) -> None:
        target = self._remote(location)
        self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        with file.open("rb") as source, self.filesystem.open_output_stream(target) as sink:
            while chunk := source.read(_CHUNK_BYTES):
                sink.write(chunk)

    def fetch(self, location: str, *, verify: bool = True) -> Path:
        """The local folder of a published location, downloaded if need be.

        Raises IntegrityError when it is not there, or when a file is not the one that was published.
        """
        path = self.path(location)
        if not self.is_local and not (path / MANIFEST).is_file():
            self._download(location, path)
        if verify:
            verify_manifest(path)
        return path

    def _download(self, location: str, path: Path) -> None:
        staging = path.parent / f".{path.name}-{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        try:
            fs.copy_files(self._remote(location), str(staging), source_filesystem=self.filesystem)
            _move_in(staging, path)
        except FileNotFoundError:
            raise IntegrityError(f"{self.url}/{location} is not there", "run the stage that writes it again") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def push(self, location: str) -> None:
        """Bring a file or folder that grows in its local place to a remote root; a local root already has it."""
        path = self.path(location)
        if self.is_local or not path.exists():
            return
        for file in [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()):
            self._upload_file(file, f"{location}/{file.relative_to(path).as_posix()}".removesuffix("/."))

    def pull(self, location: str) -> Path:
        """The local place of such a file or folder, brought up to date from a remote root."""
        path = self.path(location)
        if not self.is_local:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                fs.copy_files(self._remote(location), str(path), source_filesystem=self.filesystem)
        return path

    def write_json(self, location: str, value: Any) -> None:
        """Write one JSON file atomically."""
        with disk_errors(self.path(location)):
            atomic_write(self.path(location), json.dumps(value, indent=2, ensure_ascii=False).encode())
            if not self.is_local:
                self._upload_file(self.path(location), location)

    def read_json(self, location: str) -> Any | None:
        """A JSON file's value, None when it is not there."""
        try:
            if self.is_local:
                return json.loads(self.path(location).read_bytes())
            with self.filesystem.open_input_stream(self._remote(location)) as stream:
                return json.loads(stream.read())
        except FileNotFoundError:
            return None

    def remove(self, location: str) -> None:
        """Delete a published folder; its manifest goes first, so that it is never found half there."""
        path = self.path(location)
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self._remote(location)}/{MANIFEST}")
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(self._remote(location))


def _move_in(fetched: Path, path: Path) -> None:
    """Another process may have fetched the same meanwhile, or this one a folder inside it: file by file then, the manifests
    last and the outermost last of all."""
    try:
        fetched.replace(path)
        return
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    for file in sorted(fetched.rglob("*"), key=lambda f: (f.name == MANIFEST, -len(f.parts))):
        if file.is_file():
            target = path / file.relative_to(fetched)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def _drop_forgotten(staging: Path) -> None:
    """Remove what writers that were killed left behind: nothing was written there for a day."""
    for folder in staging.iterdir() if staging.is_dir() else ():
        with contextlib.suppress(OSError):  # its writer is just publishing it
            if max(p.stat().st_mtime for p in (folder, *folder.rglob("*"))) < time.time() - _FORGOTTEN_S:
                shutil.rmtree(folder, ignore_errors=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None) -> str:
    """List every file of the folder with size and SHA-256, flushed to disk; returns the manifest's own SHA-256.

    ``hashes``: those that are known already, by name.
    """
    known = hashes or {}
    paths = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    with ThreadPoolExecutor(2) as threads:  # the disk is busy with one while the processor hashes the other
        synced = threads.map(_sync_file, paths)
        found = threads.map(lambda path: known.get(path.relative_to(folder).as_posix()) or sha256_file(path), paths)
        files = {
            path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256, _ in zip(paths, found, synced, strict=True)
        }
    content = json.dumps({"format": 1, "files": files}, indent=2).encode()
    atomic_write(folder / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every listed file, and that there is no other (hidden ones aside).

    Raises IntegrityError that names the file, the expected and the actual hash.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {str(name): str(facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder} has no readable {MANIFEST} ({error})", "write it again") from None
    for name, sha256 in expected.items():
        file = folder / name
        actual = sha256_file(file) if file.is_file() else "no such file"
        if actual != sha256:
            raise IntegrityError(
                f"{file} is not the file that was written (SHA-256 expected {sha256}, found {actual})",
                "restore it from a copy, or write it again",
            )
    for file in (f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST and not f.name.startswith(".")):
        if file.relative_to(folder).as_posix() not in expected:
            raise IntegrityError(f"{file} was added after {folder} was written", "take it out")
    return dict(files)


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's word for a full or read-only disk into ours, with figures."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFull) or error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise DiskFull(
            f"no room to write {path} ({free / 1e6:.1f} MB free); what was written before is intact",
            "free some space or choose another --storage, then run the same command again",
        ) from None
