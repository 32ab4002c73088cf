"""Private training: what a row can change is bounded, noise is added once, and epsilon counts every step."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from knobs import changed, image_job, text_job, trained, trained_by_two, weights
from pydantic import ValidationError
from torch import nn

from orchestrator.errors import DataError, RecipeError
from orchestrator.models.backbones import Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Lora, Model, Privacy, Training
from orchestrator.storage import METRICS, Storage
from orchestrator.training import privacy
from orchestrator.training.loop import MicroBatch
from orchestrator.training.lora import adapt
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.privacy import (
    Noise,
    PrivateGradients,
    check_privacy,
    draw_batches,
    epsilon_spent,
    freeze_batch_norms,
    noise_multiplier,
)
from orchestrator.training.state import latest_state, load_tensors
from orchestrator.training.worker import TrainJob

LABELS = ("a", "b")
SILENT = Noise(secret=0, multiplier=0.0)


def texts() -> dict[str, torch.Tensor]:
    rows = [[2, 5, 6, 9, 3, 0], [2, 7, 3, 0, 0, 0], [2, 8, 5, 5, 7, 3], [2, 4, 3, 0, 0, 0]]
    tokens = torch.tensor(rows)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def images() -> dict[str, torch.Tensor]:
    return {"pixels": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def bert(folder: Path) -> Network:
    return TransformersNetwork.create(Model(dropout=0.0), str(folder), LABELS)


def bert_with_lora(folder: Path) -> Network:
    network = bert(folder)
    adapt(network, Lora(rank=2))
    return network


def resnet(_: Path) -> Network:
    return TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS)


def vit(_: Path) -> Network:
    from torchvision.models import VisionTransformer

    small = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    return TorchvisionNetwork(small, "vit", 2, 0.0)


NETWORKS: dict[str, tuple[Callable[[Path], Network], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (bert, texts), "lora": (bert_with_lora, texts), "resnet": (resnet, images), "vit": (vit, images),
}  # fmt: skip


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def part(inputs: dict[str, torch.Tensor], rows: slice) -> MicroBatch:
    labels = torch.tensor([0, 1, 1, 0])[rows]
    return MicroBatch({name: t[rows] for name, t in inputs.items()}, labels, torch.ones(len(labels)))


def gradient(network: Network) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize("name", NETWORKS)
def test_each_row_changes_the_gradient_by_the_clipping_norm_at_most(name: str, tiny_backbone: Path) -> None:
    """The sum that ghost clipping gives is that of the rows' own gradients, each computed alone and scaled down."""
    build, make = NETWORKS[name]
    torch.manual_seed(3)
    network, inputs = build(tiny_backbone).train(), make()
    freeze_batch_norms(network)
    alone = []
    for row in range(4):
        network.zero_grad(set_to_none=True)
        one = part(inputs, slice(row, row + 1))
        losses(network(**one.inputs), one.labels).sum().backward()
        alone.append(gradient(network).clone())
    norms = torch.stack([g.norm() for g in alone])
    limit = float(norms.sort().values[1:3].mean())  # two rows are above it and two below
    expected = sum(g * min(1.0, limit / float(norm)) for g, norm in zip(alone, norms, strict=True)) / 4
    private = PrivateGradients(network, SILENT, limit, batch_size=4)
    parts = [part(inputs, slice(0, 3)), part(inputs, slice(3, 4))]
    private.step(parts, losses, seed=0, world=1)
    assert float((gradient(network) - expected).norm() / expected.norm()) < 1e-3


def test_the_noise_has_the_deviation_that_the_accountant_counts_on(tiny_backbone: Path) -> None:
    network = bert(tiny_backbone).train()
    drawn = []
    for multiplier in (0.0, 3.0):
        private = PrivateGradients(bert_like(network), Noise(1, multiplier), max_norm=0.5, batch_size=8)
        private.step([part(texts(), slice(0, 4))], losses, seed=5, world=1)
        drawn.append(gradient(private.network))
    noise = (drawn[1] - drawn[0]) * 8
    assert abs(float(noise.std()) / (3.0 * 0.5) - 1.0) < 0.02 and abs(float(noise.mean())) < 0.05


def bert_like(network: Network) -> Network:
    import copy

    return copy.deepcopy(network)


def test_the_least_noise_that_keeps_the_budget_is_found() -> None:
    budget = Privacy(epsilon=3.0)
    multiplier = noise_multiplier(budget, rate=0.01, steps=1000)
    assert 2.9 < epsilon_spent(budget, multiplier, 0.01, 1000) <= 3.0
    assert epsilon_spent(budget, multiplier, 0.01, 500) < epsilon_spent(budget, multiplier, 0.01, 1000)
    assert epsilon_spent(budget, multiplier, 0.01, 0) == 0.0
    assert noise_multiplier(Privacy(epsilon=1.0), 0.01, 1000) > multiplier


def test_epsilon_is_that_of_the_gaussian_mechanism_where_there_is_a_formula() -> None:
    """All rows in each of k batches: the Renyi divergence of order a is k a / (2 z^2); delta by Canonne et al. 2020."""
    z, k, delta = 4.0, 10, 1e-5
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    best = min(k * a / (2 * z * z) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders)
    assert epsilon_spent(Privacy(delta=delta), z, 1.0, k) == pytest.approx(best, rel=1e-6)


def test_rows_are_drawn_each_by_its_own_chance() -> None:
    epochs = [draw_batches(1000, 50, 7, epoch) for epoch in range(40)]
    sizes = [len(batch) for batches in epochs for batch in batches]
    assert len(epochs[0]) == 20 and len(set(sizes)) > 10
    assert abs(np.mean(sizes) - 50) < 1.5 and abs(np.std(sizes) - math.sqrt(50 * 0.95)) < 1.0
    assert all((np.diff(batch) > 0).all() for batch in epochs[0]), "none twice in a batch"
    assert not np.array_equal(epochs[0][0], draw_batches(1000, 50, 8, 0)[0]), "the secret decides"
    assert len(draw_batches(10, 64, 7, 0)[0]) == 10, "fewer rows than a batch: all of them"


def test_a_delta_that_promises_nothing_is_refused() -> None:
    check_privacy(Privacy(), 50_000)
    with pytest.raises(DataError, match=r"promises nothing for 100 training rows"):
        check_privacy(Privacy(delta=0.01), 100)


@pytest.mark.parametrize(
    "with_it",
    [{"ensemble": 2}, {"folds": 3}, {"oversample": True}, {"class_weights": "balanced"}, {"max_grad_norm": None},
     {"strategy": "fsdp"}, {"mixup": 0.2}, {"adversarial": 0.1}, {"precision": "bf16"}],
)  # fmt: skip
def test_what_would_use_rows_behind_the_accountants_back_is_refused(with_it: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="privacy does not go with " + next(iter(with_it))):
        Training.model_validate({"privacy": {}, **with_it})


def test_a_missing_opacus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(RecipeError, match="opacus") as raised:
        check_privacy(Privacy(), 1000)
    assert "ray-orchestrator[privacy]" in str(raised.value.next_step)


@pytest.fixture(scope="module")
def text(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return text_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("private"))


SECRET = 42


@pytest.fixture
def same_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw a new one each, and could not be compared."""
    monkeypatch.setattr(privacy.secrets, "randbits", lambda bits: SECRET)


PRIVATE = {"privacy": {"epsilon": 5.0}, "averaging": {"decay": 0.9}}


def test_a_stopped_private_run_ends_in_the_same_weights_and_epsilon(
    text: TrainJob, same_secret: None, at_every_step: None
) -> None:
    whole, parts = changed(text, "whole", PRIVATE), changed(text, "parts", PRIVATE)
    assert trained(whole)[0] == trained(parts, stops=(2, 5, 8))[0]
    spent = [[line["epsilon"] for line in validations(job)] for job in (whole, parts)]
    assert spent[0] == spent[1] and 0 < spent[0][0] < spent[0][1] <= 5.0
    assert all(math.isfinite(w.sum()) for w in weights(whole).values())


def test_a_stopped_run_keeps_its_secret_and_another_has_its_own(text: TrainJob) -> None:
    first, second = changed(text, "first", PRIVATE), changed(text, "second", PRIVATE)
    assert trained(first)[0] != trained(second)[0], "the same seed, and still other noise"
    assert secret_of(first) != secret_of(second) and secret_of(first).bit_length() > 100


def test_two_workers_agree_with_one(text: TrainJob, same_secret: None, tmp_path: Path) -> None:
    without_dropout = {"dropout": 0.0}
    one, two = (changed(text, name, {"privacy": {"epsilon": 5.0}}, without_dropout) for name in ("one", "two"))
    trained(one)
    trained_by_two(two, tmp_path / "meeting", secret=SECRET)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=2e-3, atol=2e-4)


def test_images_train_privately_with_their_batch_norms_as_they_are(shapes_folder: Path, tmp_path: Path) -> None:
    job = changed(image_job(shapes_folder, tmp_path, "resnet18"), "r", {"privacy": {"epsilon": 8.0}, "epochs": 1})
    trained(job)
    norms = {name: value for name, value in weights(job).items() if "running_mean" in name}
    assert norms and all(not value.any() for value in norms.values())


def validations(job: TrainJob) -> list[dict[str, float]]:
    lines = read_metrics(Storage(job.recipe.storage).path(job.run) / METRICS)
    return [line for line in lines if line["kind"] == "validation"]


def secret_of(job: TrainJob) -> int:
    folder = latest_state(Storage(job.recipe.storage), job.run)[1]
    assert folder is not None
    secret: int = load_tensors(folder)["noise"]["secret"]
    return secret
