"""What users say is kept whole or not at all, on a disk that fills up and by several writers."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from orchestrator.errors import DiskFull
from orchestrator.serving.feedback import append_feedback
from orchestrator.storage import Storage, feedback_location

PLACE = f"{feedback_location('reviews')}.jsonl"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def lines(storage: Storage) -> list[int]:
    return [json.loads(line)["number"] for line in storage.path(PLACE).read_bytes().splitlines()]


@contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """The system writes what still fits, and says that the rest does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_remark_that_does_not_fit_is_refused_and_leaves_no_part(storage: Storage) -> None:
    append_feedback(storage, "reviews", {"number": 1})
    full = storage.path(PLACE).stat().st_size
    with files_no_longer_than(full + 5), pytest.raises(DiskFull, match="no room to write"):
        append_feedback(storage, "reviews", {"number": 2})
    assert storage.path(PLACE).stat().st_size == full
    append_feedback(storage, "reviews", {"number": 3})
    assert lines(storage) == [1, 3]


def test_a_line_that_was_torn_spoils_no_other(storage: Storage) -> None:
    append_feedback(storage, "reviews", {"number": 1})
    with storage.path(PLACE).open("ab") as file:
        file.write(b'{"numb')
    append_feedback(storage, "reviews", {"number": 2})
    written = storage.path(PLACE).read_bytes().splitlines()
    assert written == [b'{"number": 1}', b'{"numb', b'{"number": 2}']


def test_several_may_write_at_a_time(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: append_feedback(storage, "reviews", {"number": number}), range(100)))
    assert sorted(lines(storage)) == list(range(100))


def test_nothing_of_it_stays_in_the_cache_of_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "root").mkdir()
    storage = Storage(str(tmp_path / "root"))
    storage.filesystem = fs.SubTreeFileSystem(str(tmp_path / "root"), fs.LocalFileSystem())
    storage.base, storage.is_local, storage.url = "", False, "s3://bucket"
    append_feedback(storage, "reviews", {"number": 1})
    (kept,) = (tmp_path / "root" / feedback_location("reviews")).iterdir()
    assert json.loads(kept.read_bytes()) == {"number": 1}
    assert not (tmp_path / "cache").exists()
