"""Two processes, each with a part of the network: the same training as with a copy each, and as alone."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from knobs import trained_by_two
from running import prepared_job, with_training
from safetensors.torch import load_file
from torch import distributed, nn

from orchestrator.recipe import Recipe
from orchestrator.storage import MODEL, Storage, sha256_file
from orchestrator.training import sharding
from orchestrator.training.parallel import state_of
from orchestrator.training.state import latest_state
from orchestrator.training.worker import Place, TrainJob, train_worker


@pytest.fixture(scope="module")
def job(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """In fp32 on any machine, and without dropout, whose masks differ between the ways to compute."""
    job = prepared_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("runs"), "workers: 2")
    values = job.recipe.model_dump() | {"model": job.recipe.model.model_dump() | {"dropout": 0.0}}
    return dataclasses.replace(
        job, recipe=with_training(Recipe.model_validate(values), epochs=2, batch_size=9, precision="fp32")
    )


def train_on_two(job: TrainJob, run: str, strategy: str, stop_at: int | None = None) -> TrainJob:
    """In two processes; ``stop_at``: how many parts of steps each does before it ends."""
    mine = dataclasses.replace(job, recipe=with_training(job.recipe, strategy=strategy), run=run)
    meeting = Storage(job.recipe.storage).path(f"{run}-{strategy}-{stop_at}")
    meeting.parent.mkdir(parents=True, exist_ok=True)
    trained_by_two(mine, meeting, stop_at)
    return mine


def weights(job: TrainJob, run: str) -> dict[str, torch.Tensor]:
    return load_file(Storage(job.recipe.storage).path(f"{run}/{MODEL}/model.safetensors"))


def assert_close(job: TrainJob, one: str, other: str) -> None:
    for name, value in weights(job, one).items():
        torch.testing.assert_close(value, weights(job, other)[name], rtol=1e-3, atol=2e-4, msg=name)


def test_sharded_training_agrees_with_copies_and_with_one_worker_and_resumes_exactly(job: TrainJob) -> None:
    """Uneven batches of nine rows; 41 validation rows."""
    train_worker(dataclasses.replace(job, run="train/alone"), Place(0, 1, torch.device("cpu")), lambda event: None)
    train_on_two(job, "train/ddp", "ddp")
    train_on_two(job, "train/fsdp", "fsdp")
    assert_close(job, "train/ddp", "train/alone")
    assert_close(job, "train/fsdp", "train/ddp")

    storage = Storage(job.recipe.storage)
    train_on_two(job, "train/parts", "fsdp", stop_at=23)
    stopped, _ = latest_state(storage, "train/parts")
    assert stopped.step == 15 and not stopped.finished, "the fault fired between two checkpoints"
    train_on_two(job, "train/parts", "fsdp")
    files = [storage.path(f"{run}/{MODEL}/model.safetensors") for run in ("train/fsdp", "train/parts")]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert latest_state(storage, "train/parts")[0].resumed == 1


def test_training_does_not_change_a_state_that_was_taken(tmp_path: Path) -> None:
    """It is written while training goes on."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        sharding.shard(network, [network[0]], torch.device("cpu"), world=1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        training_step(network, optimizer)
        taken = state_of(network, optimizer)
        before = copy.deepcopy(taken)
        training_step(network, optimizer)
        after = state_of(network, optimizer)
        assert int(taken["optimizer"]["state"][0]["step"]) == int(before["optimizer"]["state"][0]["step"]) == 1
        assert int(after["optimizer"]["state"][0]["step"]) == 2, "the step was taken"
        torch.testing.assert_close(taken, before, rtol=0, atol=0)
    finally:
        distributed.destroy_process_group()


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow
def test_a_run_may_go_on_with_the_other_strategy(job: TrainJob) -> None:
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        run = f"train/{first}-{second}"
        train_on_two(job, run, first, stop_at=23)
        train_on_two(job, run, second)
        assert latest_state(Storage(job.recipe.storage), run)[0].resumed == 1
    assert_close(job, "train/ddp-fsdp", "train/fsdp-ddp")
