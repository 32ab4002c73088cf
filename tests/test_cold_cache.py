"""A machine that has fetched nothing yet from an object store, or a part, or the same at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from pyarrow import fs
from test_storage import remote_storage

from orchestrator.serving.served import known_inputs
from orchestrator.storage import MANIFEST, SAMPLES, Storage, verify_manifest, write_manifest

VERSION = "registry/models/reviews/1"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A version in the store; nothing in the cache."""
    storage = remote_storage(tmp_path, monkeypatch)
    with storage.publish(VERSION) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"w" * 1000)
        write_manifest(folder / "model")
        (folder / SAMPLES).write_text('[{"input": "a text", "scores": {}}, {"input": {"b64": "AAAA"}, "scores": {}}]')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cold"))
    return storage


def test_a_replica_starts_where_nothing_was_fetched(storage: Storage) -> None:
    verify_manifest(storage.fetch(f"{VERSION}/model"))
    assert known_inputs(storage, f"{VERSION}/model") == ["a text", bytes(3)]
    assert known_inputs(storage, "registry/models/older/1/model") == []
    assert not (storage.path(VERSION) / MANIFEST).exists(), "the rest of the version is not fetched for it"


def test_the_whole_is_fetched_where_a_part_of_it_is(storage: Storage) -> None:
    storage.fetch(f"{VERSION}/model")
    whole = storage.fetch(VERSION)
    assert set(verify_manifest(whole)) == {SAMPLES, "model/weights"}
    verify_manifest(whole / "model")
    assert [path.name for path in whole.parent.iterdir()] == ["1"], "nothing is left behind"


def test_two_that_fetch_the_same_at_once_both_have_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_copied, copy = Barrier(2), fs.copy_files

    def copied(*arguments: Any, **options: Any) -> None:
        copy(*arguments, **options)
        both_have_copied.wait(60)

    monkeypatch.setattr(fs, "copy_files", copied)
    with ThreadPoolExecutor(2) as threads:
        for folder in threads.map(storage.fetch, [VERSION] * 2):
            verify_manifest(folder)
