"""One worker, from prepared data to a model; stopped anywhere, it goes on to the same weights."""

import dataclasses
import resource
import shutil
from pathlib import Path

import pytest
import torch
from knobs import Stopped, stop_at
from safetensors.torch import load_file, save_file

from orchestrator.data.dataset import Split
from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.errors import DiskFull, IntegrityError, TrainingFailed
from orchestrator.models.backbones import TransformersNetwork
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import parse_recipe
from orchestrator.storage import METRICS, MODEL, Storage, sha256_file
from orchestrator.tasks import TASKS
from orchestrator.training.failure import Diverged, Remedies
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.optim import schedule_factor
from orchestrator.training.state import latest_state, write_remedies
from orchestrator.training.worker import Place, TrainJob, train_worker

ALONE = Place(0, 1, torch.device("cpu"))


@pytest.fixture
def job(reviews_csv: Path, tiny_backbone: Path, tmp_path: Path) -> TrainJob:
    recipe = parse_recipe(
        f"name: r\ntask: text_classification\nstorage: {tmp_path}/runs\ndata: {{source: {reviews_csv}}}\n"
        f"model: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        "training: {epochs: 6, batch_size: 8, learning_rate: 2.0e-3, checkpoint_every_steps: 15}\n"
    )
    return prepared(recipe)


def prepared(recipe: Recipe) -> TrainJob:
    storage, source, task = Storage(recipe.storage), open_source(recipe.data), TASKS[recipe.task]
    encoder = task.encoder(recipe.model, ())
    dataset = prepare(recipe, encoder, source, storage, content_key(recipe, encoder, source, storage))
    return TrainJob(recipe, "train/r", dataset.location, dataset.labels)


def test_it_learns_what_the_words_say(job: TrainJob) -> None:
    train_worker(job, ALONE, lambda event: None)
    storage = Storage(job.recipe.storage)
    position, _ = latest_state(storage, job.run)
    assert position.finished
    assert position.best_value > 0.85
    assert position.step == 6 * 40


def test_a_stopped_run_goes_on_to_the_same_weights(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Storage(job.recipe.storage), TrainJob(job.recipe, "train/parts", job.dataset, job.labels)
    train_worker(job, ALONE, lambda event: None)
    monkeypatch.setattr("orchestrator.training.worker._REPORT_EVERY_S", 0.0)
    for step in (22, 61, 133):
        with pytest.raises(Stopped):
            train_worker(parts, ALONE, stop_at(step))
    train_worker(parts, ALONE, lambda event: None)
    weights = [sha256_file(whole.path(f"{run}/{MODEL}/model.safetensors")) for run in (job.run, parts.run)]
    assert weights[0] == weights[1]
    assert latest_state(whole, parts.run)[0].resumed == 3
    steps = [line["step"] for line in read_metrics(whole.path(f"{parts.run}/{METRICS}")) if line["kind"] == "train"]
    assert steps == list(range(1, 241))


def test_a_broken_checkpoint_is_passed_over_and_all_broken_is_an_error(job: TrainJob) -> None:
    train_worker(job, ALONE, lambda event: None)
    storage = Storage(job.recipe.storage)
    older, newer = (
        storage.path(f"{job.run}/checkpoints/{name}") for name in storage.children(f"{job.run}/checkpoints")
    )
    flip(newer / "tensors.pt")
    assert latest_state(storage, job.run)[1] == older
    flip(older / "tensors.pt")
    with pytest.raises(IntegrityError, match="no checkpoint of train/r is whole"):
        train_worker(job, ALONE, lambda event: None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_early_stopping_ends_the_run(job: TrainJob) -> None:
    recipe = parse_recipe_with(job, {"epochs": 50, "learning_rate": 1e-9, "early_stopping": {"patience_epochs": 2}})
    train_worker(TrainJob(recipe, "train/early", job.dataset, job.labels), ALONE, lambda event: None)
    position, _ = latest_state(Storage(recipe.storage), "train/early")
    assert position.stopped_early
    assert position.epoch == 3


@pytest.mark.parametrize("options", [{"accumulate_steps": 4}, {"oversample": True}, {"class_weights": "balanced"},
                                     {"label_smoothing": 0.1, "schedule": "cosine"}])  # fmt: skip
def test_every_option_trains(job: TrainJob, options: dict[str, object]) -> None:
    recipe = parse_recipe_with(job, {"epochs": 1, **options})
    train_worker(TrainJob(recipe, "train/option", job.dataset, job.labels), ALONE, lambda event: None)
    assert latest_state(Storage(recipe.storage), "train/option")[0].finished


def parse_recipe_with(job: TrainJob, training: dict[str, object]) -> Recipe:
    return Recipe.model_validate(job.recipe.model_dump() | {"training": job.recipe.training.model_dump() | training})


@pytest.mark.parametrize("training", [{"batch_size": 95}, {"batch_size": 32, "accumulate_steps": 32}])
def test_one_image_at_a_time_trains_although_batch_norm_needs_two(
    shapes_folder: Path, tmp_path: Path, training: dict[str, int]
) -> None:
    recipe = Recipe.model_validate({
        "name": "shapes", "task": "image_classification", "storage": str(tmp_path), "data": {"source": str(shapes_folder)},
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 32}, "training": {"epochs": 1, **training},
    })  # fmt: skip
    job = prepared(recipe)
    assert len(Split(Storage(recipe.storage).path(job.dataset), "train")) == 96, "batches of 95 leave one row"
    train_worker(job, ALONE, lambda event: None)
    assert latest_state(Storage(recipe.storage), job.run)[0].finished


def test_a_loss_that_is_no_number_from_the_first_step_on_ends_the_run(job: TrainJob, tmp_path: Path) -> None:
    backbone = tmp_path / "broken"
    shutil.copytree(str(job.recipe.model.backbone), backbone)
    weights = load_file(backbone / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    model = job.recipe.model.model_copy(update={"backbone": str(backbone)})
    broken = prepared(job.recipe.model_copy(update={"model": model}))
    with pytest.raises(
        TrainingFailed, match=r"the loss is nan .* at step 1 \(epoch 1, .*\): .*check the backbone"
    ) as caught:
        train_worker(broken, ALONE, lambda event: None)
    assert not isinstance(caught.value, Diverged), "a lower learning rate would not help"
    assert latest_state(Storage(job.recipe.storage), broken.run)[1] is None, "no checkpoint holds broken weights"


def test_a_loss_that_overflows_leaves_the_last_checkpoint_and_half_the_rate_gets_on(job: TrainJob) -> None:
    storage = Storage(job.recipe.storage)
    with OverflowAt(40), pytest.raises(Diverged, match=r"the loss is nan .* at step 41 \(epoch 2, learning rate"):
        train_worker(job, ALONE, lambda event: None)
    position, _ = latest_state(storage, job.run)
    assert (position.step, position.epoch) == (40, 1), "the last good checkpoint"
    write_remedies(storage, job.run, Remedies(rate_factor=0.5, rollbacks=1))
    train_worker(job, ALONE, lambda event: None)
    rates = {line["step"]: line["learning_rate"] for line in lines_of(storage, job, "train")}
    planned = 2.0e-3
    assert rates[40] == pytest.approx(planned * schedule_factor(39, 240, 0.06, "linear"))
    assert rates[41] == pytest.approx(0.5 * planned * schedule_factor(40, 240, 0.06, "linear"))


class OverflowAt:
    """In the block, the training step after ``steps`` gives logits that are no numbers."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __enter__(self) -> None:
        self.handle = torch.nn.modules.module.register_module_forward_hook(self._spoil)

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()

    def _spoil(self, module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(module, TransformersNetwork) or not module.training:
            return None
        self.left -= 1
        return None if self.left >= 0 else logits * float("nan")


def lines_of(storage: Storage, job: TrainJob, kind: str) -> list[dict[str, float]]:
    return [line for line in read_metrics(storage.path(f"{job.run}/{METRICS}")) if line["kind"] == kind]


@pytest.mark.parametrize("limit_bytes", [8_000, 60_000])
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on_to_the_same_weights(job: TrainJob, limit_bytes: int) -> None:
    """A checkpoint does not fit, or the best model, which a library writes."""
    recipe = parse_recipe_with(job, {"epochs": 2, "checkpoint_every_steps": 15 if limit_bytes < 50_000 else None})
    storage, job = Storage(recipe.storage), dataclasses.replace(job, recipe=recipe)
    parts, unlimited = dataclasses.replace(job, run="train/parts"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, unlimited[1]))
    try:
        with pytest.raises(DiskFull, match="no room to write"):
            train_worker(parts, ALONE, lambda event: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(storage.path(".staging").iterdir()), "nothing half-written is left"
    for each in (parts, job):
        train_worker(each, ALONE, lambda event: None)
    weights = [sha256_file(storage.path(f"{run}/{MODEL}/model.safetensors")) for run in (job.run, parts.run)]
    assert weights[0] == weights[1]
