"""Checkpoints are whole or not there: killed anywhere inside the save, cut short, or with a bit flipped."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import IntegrityError
from orchestrator.storage import Storage
from orchestrator.training.state import Position, drop_newest, latest_state, load_tensors, publish_model, save_state

RUN = "train/r"
WRITES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
}


def tensors(step: int) -> dict[str, Any]:
    return {"network": {"w": torch.full((50,), float(step))}, "optimizer": {"state": {0: {"step": torch.tensor(step)}}}}


def save(storage: Storage, step: int) -> None:
    """As a worker does it at an epoch's end: the best model first, then the checkpoint that names it."""
    with storage.publish(f"{RUN}/best/epoch-{step:05d}") as folder:
        (folder / "weights").write_bytes(bytes([step]) * 1000)
    save_state(storage, RUN, Position(epoch=step, step=step, best_epoch=step), tensors(step))


def whole_state(storage: Storage) -> int:
    """The step of the checkpoint that a run would go on from; it, and the model it names, are as they were written."""
    position, folder = latest_state(storage, RUN)
    assert folder is not None
    state = load_tensors(folder)
    assert torch.equal(state["network"]["w"], tensors(position.step)["network"]["w"])
    model = storage.fetch(f"{RUN}/best/epoch-{position.best_epoch:05d}")
    assert (model / "weights").read_bytes() == bytes([position.step]) * 1000
    return position.step


def save_and_die(root: Path, at_event: int) -> None:
    """Save step 3, with SIGKILL right before the n-th thing that Python asks the system to change."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in WRITES and str(root) in str(arguments):
            seen += 1
            if seen == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    storage = Storage(str(root))
    sys.addaudithook(hook)
    save(storage, 3)
    os._exit(0)


def test_killed_anywhere_inside_the_save_the_old_or_the_new_checkpoint_is_there_whole(tmp_path: Path) -> None:
    """Every point at which a file is opened, renamed or removed, one after the other."""
    before = tmp_path / "before"
    for step in (1, 2):
        save(Storage(str(before)), step)
    found: list[int] = []
    context = multiprocessing.get_context("fork")
    for at_event in range(1, 1000):
        root = tmp_path / f"killed-{at_event}"
        shutil.copytree(before, root)
        process = context.Process(target=save_and_die, args=(root, at_event))
        process.start()
        process.join(60)
        found.append(whole_state(Storage(str(root))))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, "the fault fired"
        save(Storage(str(root)), 3)  # whoever goes on finds nothing in the way
        assert whole_state(Storage(str(root))) == 3
        shutil.rmtree(root)
    assert len(found) > 20, "the save has many points to die at"
    assert found == sorted(found) and set(found) == {2, 3}, "the old one until the new one is there"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path))
    for step in (1, 2, 3):
        save(storage, step)
    return storage


def newest(storage: Storage) -> Path:
    return storage.path(f"{RUN}/checkpoints/step-00000003")


def test_the_last_two_checkpoints_and_the_models_they_name_are_kept(storage: Storage) -> None:
    assert storage.children(f"{RUN}/checkpoints") == ["step-00000002", "step-00000003"]
    assert storage.children(f"{RUN}/best") == ["epoch-00002", "epoch-00003"]


def test_the_best_model_is_kept_however_old(storage: Storage) -> None:
    for step in range(4, 9):
        save_state(storage, RUN, Position(epoch=step, step=step, best_epoch=3), tensors(step))
    assert storage.children(f"{RUN}/best") == ["epoch-00003"]
    publish_model(storage, RUN, 3)
    publish_model(storage, RUN, 3)
    assert (storage.fetch(f"{RUN}/model") / "weights").read_bytes() == bytes([3]) * 1000


def test_a_run_can_go_on_from_the_checkpoint_before_the_newest_and_without_one_from_the_start(storage: Storage) -> None:
    drop_newest(storage, RUN)
    assert whole_state(storage) == 2
    drop_newest(storage, RUN)
    drop_newest(storage, RUN)
    assert latest_state(storage, RUN) == (Position(), None)


@pytest.mark.parametrize("name", ["tensors.pt", "position.json", "manifest.json"])
@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_checkpoint_cut_short_is_passed_over(storage: Storage, name: str, size: float) -> None:
    file = newest(storage) / name
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    assert whole_state(storage) == 2


@pytest.mark.parametrize("name", ["tensors.pt", "position.json"])
def test_any_flipped_bit_is_noticed(storage: Storage, name: str) -> None:
    file, generator = newest(storage) / name, random.Random(5)
    content = file.read_bytes()
    for _ in range(100):
        place = generator.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert whole_state(storage) == 2, f"bit {place}"
    file.write_bytes(content)
    assert whole_state(storage) == 3


def test_files_that_changed_places_or_are_gone_are_noticed(storage: Storage) -> None:
    older, newer = (newest(storage).with_name(f"step-0000000{n}") / "tensors.pt" for n in (2, 3))
    content = newer.read_bytes()
    newer.write_bytes(older.read_bytes())
    assert whole_state(storage) == 2
    newer.unlink()
    assert whole_state(storage) == 2
    newer.write_bytes(content)
    older.unlink()
    assert whole_state(storage) == 3


def test_when_no_checkpoint_is_whole_nothing_starts_anew_in_silence(storage: Storage) -> None:
    for folder in newest(storage).parent.iterdir():
        (folder / "tensors.pt").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"no checkpoint of train/r is whole \(.*tensors.pt .* delete the folder"):
        latest_state(storage, RUN)
