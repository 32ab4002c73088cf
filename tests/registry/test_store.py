"""Versions never change, are never lost, and never appear half."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from orchestrator.errors import ConflictError, IntegrityError, ModelNotFound, UserError
from orchestrator.records import VersionRecord
from orchestrator.registry.store import Registry
from orchestrator.storage import REGISTRY_DATABASE, Storage


def draft(name: str, model: str) -> VersionRecord:
    return VersionRecord(name=name, version=0, location="", model=model, dataset="d", evaluation="e",
                         metrics={"macro_f1": 0.5}, code_version="1", created_at="now", manifest_sha256="")  # fmt: skip


def make_model(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "store")))


def register(registry: Registry, tmp_path: Path, model: str, name: str = "reviews") -> VersionRecord:
    return registry.register(draft(name, model), {"model": make_model(tmp_path / f"m-{model}", model.encode())})


def test_versions_are_numbered_and_their_files_are_copies(registry: Registry, tmp_path: Path) -> None:
    assert [register(registry, tmp_path, m).version for m in "abc"] == [1, 2, 3]
    (tmp_path / "m-b" / "model.safetensors").write_bytes(b"changed since")
    folder = registry.open(registry.get("reviews", 2))
    assert (folder / "model" / "model.safetensors").read_bytes() == b"b"


def test_the_same_model_registered_again_is_the_same_version(registry: Registry, tmp_path: Path) -> None:
    assert register(registry, tmp_path, "a") == register(registry, tmp_path, "a")
    assert len(registry.versions("reviews")) == 1


def test_a_flipped_bit_in_a_version_is_detected(registry: Registry, tmp_path: Path) -> None:
    record = register(registry, tmp_path, "a")
    file = registry.storage.path(record.location) / "model" / "model.safetensors"
    file.write_bytes(b"b")
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not the file"):
        registry.open(record)


def test_a_version_whose_manifest_was_replaced_too_is_detected(registry: Registry, tmp_path: Path) -> None:
    from orchestrator.storage import write_manifest

    record = register(registry, tmp_path, "a")
    folder = registry.storage.path(record.location)
    (folder / "model" / "model.safetensors").write_bytes(b"b")
    write_manifest(folder)
    with pytest.raises(IntegrityError, match="not the one that was registered"):
        registry.open(record)


def test_an_alias_moves_and_rolls_back(registry: Registry, tmp_path: Path) -> None:
    for model in "abc":
        version = register(registry, tmp_path, model).version
        registry.set_alias("reviews", "champion", version, "better")
    assert registry.get("reviews", "champion").version == 3
    assert registry.rollback("reviews").version == 2
    assert registry.rollback("reviews").version == 1
    with pytest.raises(UserError, match="no earlier version"):
        registry.rollback("reviews")
    assert registry.get("reviews", 1).aliases == ("champion",)


def test_an_alias_that_moved_in_the_meantime_is_not_overwritten(registry: Registry, tmp_path: Path) -> None:
    for model in "ab":
        register(registry, tmp_path, model)
    registry.set_alias("reviews", "champion", 1, "first", expected=None)
    with pytest.raises(ConflictError, match="points at 1, not at None"):
        registry.set_alias("reviews", "champion", 2, "second", expected=None)
    assert registry.get("reviews", "champion").version == 1


def test_what_is_not_there_says_what_is(registry: Registry, tmp_path: Path) -> None:
    register(registry, tmp_path, "a")
    with pytest.raises(ModelNotFound, match="known are: reviews"):
        registry.get("review", 1)
    with pytest.raises(ModelNotFound, match="its versions are 1"):
        registry.get("reviews", 7)
    with pytest.raises(ModelNotFound, match="'champion'"):
        registry.get("reviews", "champion")


HOSTILE = [
    "..", "../x", "a/../b", "a/b", "a\\b", "..\\..\\x", "%2e%2e", "%252e%252e%252f", "/etc/passwd", "C:\\x", "file://x",
    "a\x00b", "a\nb", "a b", "A", "é", "．．", "a‥b", "∕etc", "-a", ".a", "a.", "a-", "", " ", "a" * 65, "a" * 300, "#", "a#b",
    "a?b", "a;b", "$(x)", "`x`", "a|b", "a&b", "a*b", "~", "~root", "a'b", 'a"b', "a..b", "con:", "{a}", "[a]", "a%b",
    "a\tb", "\u202ea", "a\u200bb", "\ufeffa", "a,b", "a=b", "a@b", "a+b",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        registry.get(name, 1)
    with pytest.raises(UserError, match="is not allowed"):
        registry.register(draft("x", "m").model_copy(update={"name": name}), {"model": make_model(tmp_path / "m")})
    assert not (tmp_path / "store" / "registry" / "models").exists()


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE audit SET reason = 'nothing to see' WHERE number = 2",
        "DELETE FROM audit WHERE number = 2",
        "UPDATE audit SET number = CASE number WHEN 1 THEN 102 WHEN 2 THEN 101 ELSE number END",
    ],
)
def test_an_edited_audit_log_is_detected(registry: Registry, tmp_path: Path, tamper: str) -> None:
    for model in "abc":
        register(registry, tmp_path, model)
    registry.verify_audit()
    with registry.engine.begin() as connection:
        assert connection.execute(sa.text(tamper)).rowcount >= 1
    with pytest.raises(IntegrityError, match="line [12] of the audit log"):
        registry.verify_audit()


def _register_many(root: str, worker: int, count: int) -> None:
    registry = Registry(Storage(root))
    model = make_model(Path(root).parent / f"worker-{worker}")
    for number in range(count):
        registry.register(draft("reviews", f"{worker}-{number}"), {"model": model})


def test_processes_that_register_at_once_lose_nothing(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_register_many, args=(root, w, 8)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    registry = Registry(Storage(root))
    versions = registry.versions("reviews")
    assert [v.version for v in versions] == list(range(1, 33))
    assert len({v.model for v in versions}) == 32
    assert all(registry.open(v) for v in versions)
    registry.verify_audit()


def test_a_writer_killed_at_any_moment_leaves_only_whole_versions(tmp_path: Path) -> None:
    root = tmp_path / "store"
    code = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "from test_store import Registry, Storage, draft, make_model\n"
        "registry = Registry(Storage(sys.argv[1]))\nmodel = make_model(Path(sys.argv[1]).parent / 'm', bytes(3_000_000))\n"
        "start = len(registry.versions('reviews'))\n"
        "for number in range(start, 1000):\n"
        "    print(registry.register(draft('reviews', f'm{number}'), {'model': model}).version, flush=True)\n"
    )
    acknowledged = 0
    for delay_s in (0.02, 0.07, 0.13):
        child = subprocess.Popen([sys.executable, "-c", code, str(root), str(Path(__file__).parent)],
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert child.stdout is not None
        acknowledged = int(child.stdout.readline())
        time.sleep(delay_s)
        os.kill(child.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
        assert child.wait() == -signal.SIGKILL
    registry = Registry(Storage(str(root)))
    versions = registry.versions("reviews")
    assert [v.version for v in versions] == list(range(1, len(versions) + 1))
    assert len(versions) >= acknowledged
    assert all(registry.open(v) for v in versions)
    with sqlite3.connect(root / REGISTRY_DATABASE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    registry.verify_audit()


def test_a_remote_storage_needs_a_database_by_name(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.is_local = False
    with pytest.raises(UserError, match="registry.url"):
        Registry(storage)
    with pytest.raises(UserError, match="cannot be opened"):
        Registry(storage, "nonsense://")
