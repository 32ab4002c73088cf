"""What is published is whole, what is read is verified, what is named stays inside the root."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from orchestrator.data.hashing_file import HashingFile
from orchestrator.errors import DiskFull, IntegrityError, UserError
from orchestrator.storage import (
    MANIFEST,
    Storage,
    atomic_write,
    disk_errors,
    sha256_file,
    verify_manifest,
)


def publish(storage: Storage, location: str, **files: bytes) -> None:
    with storage.publish(location) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def test_a_published_folder_is_there_whole_and_verifies(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, "train/a", weights=b"w" * 1000)
    assert storage.exists("train/a")
    assert (storage.fetch("train/a") / "weights").read_bytes() == b"w" * 1000


def test_a_failure_while_publishing_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(RuntimeError), storage.publish("train/a") as folder:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError
    assert not storage.exists("train/a")
    assert not list((tmp_path / ".staging").iterdir())


def test_publishing_again_replaces_the_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, "a", old=b"1")
    publish(storage, "a", new=b"2")
    assert sorted(p.name for p in storage.fetch("a").iterdir()) == [MANIFEST, "new"]


@pytest.mark.parametrize("offset", [0, 500, 999])
def test_a_flipped_bit_is_detected_and_named(tmp_path: Path, offset: int) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, "a", weights=bytes(1000))
    content = bytearray((tmp_path / "a" / "weights").read_bytes())
    content[offset] ^= 1
    (tmp_path / "a" / "weights").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"weights is not the file.*expected \w{64}, found \w{64}"):
        storage.fetch("a")


def test_a_truncated_or_missing_file_is_detected(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, "a", weights=bytes(10))
    (tmp_path / "a" / "weights").write_bytes(bytes(9))
    with pytest.raises(IntegrityError, match="weights"):
        storage.fetch("a")
    (tmp_path / "a" / "weights").unlink()
    with pytest.raises(IntegrityError, match="no such file"):
        storage.fetch("a")
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(IntegrityError, match="no readable manifest"):
        storage.fetch("a")


@pytest.mark.parametrize("location", ["../outside", "a/../../outside", "/etc/passwd", "a/./../../b"])
def test_a_location_cannot_leave_the_root(tmp_path: Path, location: str) -> None:
    with pytest.raises(UserError, match="leads out"):
        Storage(str(tmp_path / "root")).path(location)


def test_a_link_cannot_leave_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        Storage(str(tmp_path / "root")).path("link/secret")


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        Storage("gopher://example/runs")


def remote_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An object store's stand-in: a subtree of the disk behind pyarrow's own interface, with a cache elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir(exist_ok=True)
    storage = Storage(str(tmp_path))
    storage.filesystem = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    storage.base, storage.is_local, storage.url = "", False, "s3://bucket"
    return storage


def test_a_remote_folder_is_uploaded_and_fetched_into_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = remote_storage(tmp_path, monkeypatch)
    publish(writer, "prepare/a", rows=b"123")
    writer.write_json("serve/note.json", {"pid": 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    assert writer.exists("prepare/a")
    assert (writer.fetch("prepare/a") / "rows").read_bytes() == b"123"
    assert writer.children("prepare") == ["a"]
    assert writer.read_json("serve/note.json") == {"pid": 1}
    writer.remove("prepare/a")
    assert not writer.exists("prepare/a")


def test_a_remote_folder_without_manifest_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = remote_storage(tmp_path, monkeypatch)
    publish(storage, "a", rows=b"123")
    (tmp_path / "bucket" / "a" / MANIFEST).unlink()
    assert not storage.exists("a")


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    atomic_write(path, b"old")
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_said_in_one_line_and_what_was_there_is_intact(tmp_path: Path) -> None:
    """A real limit of the system, in a child process: no file may grow past 64 KB."""
    storage = Storage(str(tmp_path))
    publish(storage, "a", weights=b"good")
    code = (
        "import resource, signal, sys\n"
        "from orchestrator.storage import Storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "with Storage(sys.argv[1]).publish('a') as folder:\n"
        "    (folder / 'weights').write_bytes(bytes(1 << 20))\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode != 0
    assert "DiskFull" in child.stderr.splitlines()[-1]
    assert (storage.fetch("a") / "weights").read_bytes() == b"good"


def test_the_error_of_a_full_disk_names_the_free_space(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskFull, match=r"MB free.*--storage"),
        disk_errors(tmp_path / "x"),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(b"x" * 100_000)
        file.flush()


def test_other_errors_of_the_disk_keep_their_own_words(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(13, "denied")


def test_a_manifest_lists_files_in_subfolders(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.publish("a") as folder:
        (folder / "encoder").mkdir()
        (folder / "encoder" / "vocab.txt").write_text("x")
    assert list(verify_manifest(tmp_path / "a")) == ["encoder/vocab.txt"]
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["format"] == 1


def test_a_file_that_hashes_while_it_is_written_is_the_file_that_lies_there(tmp_path: Path) -> None:
    storage, hashes = Storage(str(tmp_path)), dict[str, str]()
    with storage.publish("prepare/x-1", hashes) as folder:
        file = HashingFile(folder / "rows")
        for content in (b"one", memoryview(b"two"), b""):
            file.write(content)
        file.close()
        hashes["rows"] = file.sha256
    assert verify_manifest(storage.path("prepare/x-1"))["rows"]["sha256"] == sha256_file(tmp_path / "prepare/x-1/rows")


def test_a_flush_that_fails_while_the_file_is_written_fails_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    def fails(descriptor: int) -> None:
        flushed.append(descriptor)
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fdatasync", fails)
    file = HashingFile(tmp_path / "rows")
    file.write(bytes(40 << 20))
    with pytest.raises(OSError, match="the disk is broken"):
        file.close()
    assert flushed


def test_what_a_killed_writer_left_is_removed_after_a_day_and_not_before(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for name, age_s in (("old", 90_000), ("new", 80_000)):
        file = storage.path(f".staging/{name}/half")
        file.parent.mkdir(parents=True)
        file.write_text("half")
        for path in (file, file.parent):
            os.utime(path, (time.time() - age_s,) * 2)
    with storage.publish("a/b") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in storage.path(".staging").iterdir()] == ["new"]
