"""Each setting of training: a run that was stopped ends in the same weights, and so do two workers, up to rounding."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from knobs import (
    ALONE,
    WITHOUT_BATCH_NORM,
    Stopped,
    changed,
    image_job,
    stop_at,
    text_job,
    trained,
    trained_by_two,
    weights,
)
from safetensors.torch import load_file, save_file

from orchestrator.errors import IntegrityError
from orchestrator.training.worker import TrainJob, train_worker

TEXT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "freeze": {"freeze": ("bert.embeddings.*", "bert.encoder.layer.0.*")},
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "lora and ema": {"lora": {"rank": 4}, "averaging": {"decay": 0.9}, "gradient_checkpointing": True},
    "layer_decay": {"layer_decay": 0.5},
    "ema": {"averaging": {"kind": "ema", "decay": 0.9}},
    "swa": {"averaging": {"kind": "swa", "start_fraction": 0.5}},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "adversarial": {"adversarial": 0.5},
    "focal": {"focal_gamma": 2.0, "label_smoothing": 0.1, "class_weights": "balanced"},
}
IMAGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mixup": {"mixup": 0.4, "class_weights": "balanced"},
    "freeze": {"freeze": ("conv1.*",)},
    "layer_decay": {"layer_decay": 0.5},
    "ema": {"averaging": {"kind": "ema", "decay": 0.9}},
    "swa": {"averaging": {"kind": "swa", "start_fraction": 0.5}},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "adversarial": {"adversarial": 0.5},
    "focal": {"focal_gamma": 2.0, "label_smoothing": 0.1, "class_weights": "balanced"},
}


@pytest.fixture(scope="module")
def text(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return text_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return image_job(shapes_folder, tmp_path_factory.mktemp("images"), "shufflenet_v2_x0_5")


@pytest.fixture(scope="module")
def resnet(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return image_job(shapes_folder, tmp_path_factory.mktemp("resnet"), "resnet18")


@pytest.mark.parametrize("knob", TEXT)
def test_a_stopped_run_on_texts_ends_in_the_same_weights(text: TrainJob, knob: str, at_every_step: None) -> None:
    runs = [changed(text, f"{knob}-{name}", TEXT[knob]) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(2, 5, 8))
    if knob != "nothing":
        assert trained(runs[0])[0] != trained(changed(text, "nothing-whole", {}))[0], "the setting changes the weights"


def test_another_backbone_under_the_same_name_is_found_before_a_run_goes_on(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, at_every_step: None
) -> None:
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    job = changed(text_job(reviews_csv, backbone, tmp_path / "runs"), "other", TEXT["freeze"])
    with pytest.raises(Stopped):
        train_worker(job, ALONE, stop_at(4))
    tensors = load_file(backbone / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][3, 3] += 1e-3
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="the backbone is not the one that train/other began with"):
        train_worker(job, ALONE, lambda event: None)


@pytest.mark.parametrize("knob", IMAGES)
def test_a_stopped_run_on_images_ends_in_the_same_weights(images: TrainJob, knob: str, at_every_step: None) -> None:
    runs = [changed(images, f"{knob}-{name}", IMAGES[knob]) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(1, 3))


@pytest.mark.parametrize("knob", TEXT)
def test_two_workers_on_texts_agree_with_one(text: TrainJob, knob: str, tmp_path: Path) -> None:
    training = {**TEXT[knob], "epochs": 1}
    if "lora" in training:
        training["lora"] = training["lora"] | {"dropout": 0.0}
    one, two = (changed(text, f"{knob}-{name}", training, {"dropout": 0.0}) for name in ("one", "two"))
    agree(one, two, tmp_path / "meeting")


@pytest.mark.parametrize("knob", IMAGES)
def test_two_workers_on_images_agree_with_one(resnet: TrainJob, knob: str, tmp_path: Path) -> None:
    freeze = (*WITHOUT_BATCH_NORM, *IMAGES[knob].get("freeze", ()))
    training = {**IMAGES[knob], "epochs": 1, "freeze": freeze}
    one, two = (changed(resnet, f"{knob}-{name}", training) for name in ("one", "two"))
    agree(one, two, tmp_path / "meeting")


def agree(one: TrainJob, two: TrainJob, meeting: Path) -> None:
    """Adam turns a rounding of a gradient near zero into a whole step of the learning rate; so most, and on average."""
    trained(one)
    trained_by_two(two, meeting)
    ours, theirs = weights(one), weights(two)
    difference = torch.cat([(ours[name].float() - theirs[name].float()).flatten() for name in ours]).abs()
    assert difference.max() < 5e-3 and difference.mean() < 2e-6
