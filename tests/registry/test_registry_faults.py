"""What users, other processes, full disks and editors of the database may do to the registry."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from orchestrator.errors import ConflictError, IntegrityError, ModelNotFound, UserError
from orchestrator.records import VersionRecord
from orchestrator.registry.listing import act_on_models
from orchestrator.registry.store import Registry
from orchestrator.storage import Storage


def draft(name: str, model: str) -> VersionRecord:
    return VersionRecord(name=name, version=0, location="", model=model, dataset="d", evaluation="e",
                         metrics={"macro_f1": 0.5}, code_version="1", created_at="now", manifest_sha256="")  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions of reviews."""
    source = tmp_path / "model"
    source.mkdir()
    registry = Registry(Storage(str(tmp_path / "store")))
    for name in "abc":
        (source / "model.safetensors").write_bytes(name.encode() * 1000)
        registry.register(draft("reviews", name), {"model": source})
    return registry


@pytest.mark.parametrize("version", [0, -1, 2**31, 2**63, 10**25])
def test_a_number_that_is_no_version_is_not_found(registry: Registry, version: int) -> None:
    with pytest.raises(ModelNotFound, match="its versions are 1, 2, 3"):
        registry.get("reviews", version)


@pytest.mark.parametrize("word", ["²", "१२३४५", "9" * 25, "-1", "1.0", "one"])
def test_the_command_line_refuses_what_is_no_version(registry: Registry, word: str) -> None:
    with pytest.raises(UserError):
        act_on_models(registry.storage.url, None, ["promote", "reviews", word], "champion")


def test_the_command_line_lists_moves_and_verifies(registry: Registry) -> None:
    url = registry.storage.url
    assert act_on_models(url, None, [], "champion")[1] == "reviews  3 versions"
    for version in ("1", "3"):
        act_on_models(url, None, ["promote", "reviews", version], "champion")
    assert registry.get("reviews", "champion").version == 3
    assert act_on_models(url, None, ["rollback", "reviews"], "champion")[0]["version"] == 1
    listing = act_on_models(url, None, ["reviews"], "champion")[1].splitlines()
    assert [("champion" in line, "macro_f1 0.5000" in line) for line in listing] == [(True, True)] + [(False, True)] * 2
    assert act_on_models(url, None, ["verify", "reviews"], "champion")[0]["verified"] == 3
    with pytest.raises(UserError, match="use: orchestrator models"):
        act_on_models(url, None, ["promote", "reviews"], "champion")


@pytest.mark.parametrize("alias", ["", "a/b", "..", "Champion", "a b", "x" * 65, "a\n"])
def test_a_hostile_alias_is_refused(registry: Registry, alias: str) -> None:
    with pytest.raises(UserError, match="the alias .* is not allowed"):
        registry.set_alias("reviews", alias, 1, "because")


def test_an_alias_that_reads_like_a_version_is_refused(registry: Registry) -> None:
    with pytest.raises(UserError, match="alias '1'"):
        registry.set_alias("reviews", "1", 2, "because")


def test_an_alias_of_a_version_that_is_not_there_changes_nothing(registry: Registry) -> None:
    registry.set_alias("reviews", "champion", 1, "first")
    with pytest.raises(ModelNotFound):
        registry.set_alias("reviews", "champion", 9, "no such version")
    assert registry.get("reviews", "champion").version == 1
    assert [line.version for line in registry.audit("reviews") if line.alias] == [1]


def test_rollback_goes_to_another_version_though_the_last_move_was_made_twice(registry: Registry) -> None:
    for version in (1, 2, 2):
        registry.set_alias("reviews", "champion", version, "by hand")
    assert registry.rollback("reviews").version == 1


def test_after_a_rollback_a_new_champion_rolls_back_to_where_it_came_from(registry: Registry) -> None:
    for version in (1, 2):
        registry.set_alias("reviews", "champion", version, "by hand")
    registry.rollback("reviews")
    registry.set_alias("reviews", "champion", 3, "by hand")
    assert registry.rollback("reviews").version == 1


def test_the_audit_log_says_who_moved_what_from_where_and_why(registry: Registry) -> None:
    registry.set_alias("reviews", "champion", 1, "the first")
    registry.set_alias("reviews", "champion", 3, "better with probability 0.99")
    last = registry.audit("reviews")[-1]
    assert (last.action, last.alias, last.version, last.previous) == ("alias", "champion", 3, 1)
    assert last.reason == "better with probability 0.99"
    assert last.time.endswith("+00:00")
    assert "@" in last.actor


@pytest.mark.parametrize("where", ["number = 5", "number >= 4", "number > 0"])
def test_an_audit_log_cut_off_at_its_end_is_detected(registry: Registry, where: str) -> None:
    registry.set_alias("reviews", "champion", 1, "first")
    registry.set_alias("reviews", "champion", 2, "second")
    registry.verify_audit()
    with registry.engine.begin() as connection:
        assert connection.execute(sa.text(f"DELETE FROM audit WHERE {where}")).rowcount >= 1
    with pytest.raises(IntegrityError, match="audit log"):
        registry.verify_audit()


def test_a_file_added_to_a_version_is_detected(registry: Registry) -> None:
    record = registry.get("reviews", 1)
    (registry.storage.path(record.location) / "model" / "added_tokens.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"added_tokens\.json"):
        registry.open(record)


def test_every_single_flipped_bit_is_detected(registry: Registry) -> None:
    record = registry.get("reviews", 1)
    folder = registry.storage.path(record.location)
    for name in ("model/model.safetensors", "manifest.json"):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 25)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            (folder / name).write_bytes(flipped)
            with pytest.raises(IntegrityError):
                registry.open(record)
        (folder / name).write_bytes(whole)
    registry.open(record)


def test_a_version_whose_file_is_gone_is_detected(registry: Registry) -> None:
    record = registry.get("reviews", 2)
    (registry.storage.path(record.location) / "model" / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="no such file"):
        registry.open(record)


def test_other_models_and_their_aliases_stay_apart(registry: Registry, tmp_path: Path) -> None:
    registry.register(draft("digits", "a"), {"model": tmp_path / "model"})
    registry.set_alias("digits", "champion", 1, "first")
    registry.set_alias("reviews", "champion", 3, "first")
    assert registry.names() == ["digits", "reviews"]
    assert (registry.get("digits", "champion").version, registry.get("reviews", "champion").version) == (1, 3)


def _race(root: str, worker: int, start: object, moved: object) -> None:
    registry = Registry(Storage(root))
    start.wait()  # type: ignore[attr-defined]
    try:
        registry.set_alias("reviews", "champion", 1 + worker % 3, f"by {worker}", expected=None)
        moved.put(worker)  # type: ignore[attr-defined]
    except ConflictError:
        pass


def test_of_eight_processes_that_move_an_alias_at_once_one_wins(registry: Registry) -> None:
    context = multiprocessing.get_context("spawn")
    start, moved = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_race, args=(registry.storage.url, w, start, moved)) for w in range(8)]
    for process in processes:
        process.start()
    winner = moved.get(timeout=60)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert moved.empty()
    assert registry.get("reviews", "champion").version == 1 + winner % 3
    registry.verify_audit()


_FILL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_registry_faults import Registry, Storage, draft
from orchestrator.errors import DiskFull
registry = Registry(Storage(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    registry.register(draft("reviews", "large"), {"model": Path(sys.argv[3])})
except DiskFull as error:
    print("DiskFull", error)
"""


def test_a_disk_that_is_full_loses_nothing_that_was_there(registry: Registry, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    (large / "model.safetensors").write_bytes(bytes(2_000_000))
    command = [sys.executable, "-c", _FILL, registry.storage.url, str(Path(__file__).parent), str(large)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert child.stdout.startswith("DiskFull no room to write"), child.stderr
    assert [v.version for v in registry.versions("reviews")] == [1, 2, 3]
    assert all(registry.open(v) for v in registry.versions("reviews"))
    assert list((tmp_path / "store" / ".staging").iterdir()) == []
    assert registry.register(draft("reviews", "large"), {"model": large}).version == 4


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may become another user")
def test_a_user_without_a_name_may_register() -> None:
    code = (
        "import os\nfrom orchestrator.registry.store import _actor\nimport pwd\n"
        "[os.environ.pop(key, None) for key in ('LOGNAME', 'USER', 'LNAME', 'USERNAME')]\n"
        "os.setuid(54321)\nprint(_actor())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.startswith("uid 54321@"), child.stderr
