"""Models with weights, labels and encoders of their own answer as one, and are saved, read and served like any model."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.combined import CombinedImages, CombinedTexts, together
from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.models.backbones import EnsembleNetwork, Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.models.checkpoint import SavedModel, load_model, save_mixture, save_model
from orchestrator.models.ensemble import Combine, Mixture, disagreement, fitted_weights, gains_of
from orchestrator.models.runtimes import Answering, RuntimeNetwork
from orchestrator.recipe import Model
from orchestrator.recipe_serving import Serving
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.runtime import settled
from orchestrator.storage import Storage

LABELS = ("bad", "good", "so so")
SAME = (0, 1, 2)
TEXTS = ["great fresh coffee", "the box was stale and it is awful " * 4, "tea"]


def mixture(weights: Sequence[float], combine: Combine = "mean", orders: Sequence[tuple[int, ...]] = ()) -> Mixture:
    return Mixture(tuple(weights), tuple(orders) or (SAME,) * len(weights), (0,) * len(weights), combine)


def told(probabilities: list[list[float]]) -> np.ndarray:
    """Of members with one row each."""
    return np.array(probabilities, np.float32)[:, None]


# ---------------------------------------------------------------------------------------------------------- combining


def test_a_mean_is_weighted() -> None:
    answer = mixture([0.75, 0.25]).probabilities(told([[0.8, 0.2, 0.0], [0.0, 0.4, 0.6]]))
    assert answer == pytest.approx(np.array([[0.6, 0.25, 0.15]]), abs=1e-6)


def test_labels_in_another_order_are_mapped() -> None:
    """The second member's own order is so so, bad, good."""
    answer = mixture([0.5, 0.5], orders=[SAME, (1, 2, 0)]).probabilities(told([[0.8, 0.2, 0.0], [0.6, 0.3, 0.1]]))
    assert answer == pytest.approx(np.array([[0.55, 0.15, 0.3]]), abs=1e-6)


def test_votes_count_by_their_members_weights_however_sure_they_are() -> None:
    answer = mixture([0.3, 0.3, 0.4], "vote").probabilities(told([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.0, 1.0, 0.0]]))
    assert answer == pytest.approx(np.array([[0.6, 0.4, 0.0]]), abs=1e-3)


@pytest.mark.parametrize(("sure", "expected"), [(0.6, 1), (0.8, 0)])
def test_the_mean_decides_between_labels_with_as_many_votes(sure: float, expected: int) -> None:
    answer = mixture([0.5, 0.5], "vote").probabilities(told([[sure, 1 - sure, 0.0], [0.3, 0.7, 0.0]]))
    assert answer.argmax() == expected and answer.sum() == pytest.approx(1.0)


def test_a_member_of_no_weight_says_nothing() -> None:
    answers = told([[0.8, 0.2, 0.0], [0.0, 0.4, 0.6]])
    assert mixture([1.0, 0.0]).probabilities(answers) == pytest.approx(answers[0], abs=1e-6)


@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_logits_far_beyond_what_exp_can_hold_stay_finite(combine: Combine) -> None:
    logits = [torch.tensor([[5000.0, -5000.0, 0.0]]), torch.tensor([[5000.0, -4000.0, 0.0]])]
    assert mixture([0.5, 0.5], combine).answer(logits).isfinite().all()


def test_members_disagree_in_the_measure_of_their_weights() -> None:
    apart = disagreement(told([[1.0, 0.0], [0.0, 1.0]]), [0.9, 0.1])
    assert apart.predictive_entropy == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))


# -------------------------------------------------------------------------------------------------------- weights


def drawn_likelihoods(weights: Sequence[float], rows: int = 20_000) -> np.ndarray:
    """Of labels that were drawn from a mixture of members with such weights."""
    generator = np.random.default_rng(0)
    members = generator.dirichlet([0.5] * 4, (len(weights), rows))
    from_member = generator.choice(len(weights), rows, p=weights)
    chances = members[from_member, np.arange(rows)]
    labels = (chances.cumsum(axis=1) > generator.random((rows, 1))).argmax(axis=1)
    return np.asarray(members[:, np.arange(rows), labels])


def test_known_weights_are_found_again() -> None:
    known = [0.6, 0.3, 0.1]
    assert fitted_weights(drawn_likelihoods(known)) == pytest.approx(np.array(known), abs=0.02)


def test_no_step_makes_the_labels_less_likely() -> None:
    likelihoods, weights = drawn_likelihoods([0.7, 0.2, 0.1], 500), np.full(3, 1 / 3)
    told = []
    for _ in range(200):
        told.append(np.log(weights @ likelihoods).mean())
        weights = weights * gains_of(likelihoods, weights)
        assert weights.sum() == pytest.approx(1.0)
    assert (np.diff(told) >= -1e-12).all() and told[-1] > told[0]


def test_no_other_weights_make_the_labels_more_likely() -> None:
    likelihoods = drawn_likelihoods([0.5, 0.5], 300)
    shares = np.linspace(0, 1, 2001)
    best = max(np.log(np.array([share, 1 - share]) @ likelihoods).mean() for share in shares)
    assert np.log(fitted_weights(likelihoods) @ likelihoods).mean() >= best - 1e-6


def test_a_member_that_is_always_worse_gets_nothing() -> None:
    good = np.random.default_rng(0).uniform(0.5, 1.0, 200)
    assert fitted_weights(np.stack([good, good / 2])) == pytest.approx(np.array([1.0, 0.0]), abs=1e-4)


def test_a_row_that_all_hold_for_impossible_spoils_nothing() -> None:
    likelihoods = np.array([[0.9, 0.8, 0.0], [0.1, 0.3, 0.0]])
    weights = fitted_weights(likelihoods)
    assert np.isfinite(weights).all() and weights[0] > 0.99


# ------------------------------------------------------------------------------------------------------ as a folder


def text_network(backbone: Path, seed: int) -> Network:
    torch.manual_seed(seed)
    network = TransformersNetwork.create(Model(weights="none"), str(backbone), LABELS)
    for parameter in network.parameters():  # far enough apart to disagree
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def image_network(seed: int) -> Network:
    torch.manual_seed(seed)
    network = TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS).eval()
    torch.nn.init.normal_(network.model.fc.weight, std=0.5)  # type: ignore[union-attr,arg-type]
    return network


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(
    root: Path, members: Sequence[tuple[Network, Encoder, tuple[str, ...]]], weights: Sequence[float],
    combine: Combine = "mean",
) -> tuple[Path, list[Path]]:  # fmt: skip
    """The folder of all together, and those of the members."""
    storage = Storage(str(root))
    for number, (network, encoder, labels) in enumerate(members):
        with storage.publish(f"alone/{number}") as folder:
            save_model(folder, network, encoder, labels, f"{encoder.kind}_classification")
    folders = [storage.fetch(f"alone/{number}") for number in range(len(members))]
    encoder, numbers = together([encoder for _, encoder, _ in members])
    orders = tuple(tuple(labels.index(label) for label in LABELS) for _, _, labels in members)
    with storage.publish("together") as folder:
        save_mixture(folder, folders, Mixture(tuple(weights), orders, numbers, combine), encoder, LABELS, {"seen": 1})
    return storage.path("together"), folders


def answers_of(model: SavedModel, inputs: Sequence[str | bytes]) -> np.ndarray:
    """In the order of LABELS."""
    predictions = Predictor(model).predict(inputs)
    assert all(prediction.error is None for prediction in predictions)
    order = [model.labels.index(label) for label in LABELS]
    return np.array([prediction.probabilities for prediction in predictions])[:, order]


def assert_is_the_mean(
    whole: Path, members: Sequence[Path], weights: Sequence[float], inputs: list[str | bytes]
) -> None:
    alone = np.stack([answers_of(load_model(member), inputs) for member in members])
    assert np.abs(alone[0] - alone[1]).max() > 0.05, "the members differ"
    assert answers_of(load_model(whole), inputs) == pytest.approx(np.average(alone, axis=0, weights=weights), abs=1e-5)


def test_texts_are_cut_for_each_member_as_it_was_trained(tiny_backbone: Path, tmp_path: Path) -> None:
    encoders = [TextEncoder(tiny_backbone, tokens) for tokens in (6, 32)]
    members = [(text_network(tiny_backbone, seed), encoder, LABELS) for seed, encoder in enumerate(encoders)]
    whole, folders = saved(tmp_path, members, [0.7, 0.3])
    assert isinstance(load_model(whole).encoder, CombinedTexts)
    assert_is_the_mean(whole, folders, [0.7, 0.3], list(TEXTS))


def test_members_that_cut_texts_alike_share_the_work(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [TextEncoder(tiny_backbone, tokens) for tokens in (32, 32, 6)]
    members = [(text_network(tiny_backbone, seed), encoder, LABELS) for seed, encoder in enumerate(encoders)]
    whole, folders = saved(tmp_path, members, [0.5, 0.25, 0.25])
    assert_is_the_mean(whole, folders, [0.5, 0.25, 0.25], list(TEXTS))
    model, calls = load_model(whole), []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: calls.append(self) or encode(self, texts))
    Predictor(model).predict(TEXTS)
    assert len(calls) == 2


def test_members_of_one_encoder_are_read_by_it_as_it_is(tiny_backbone: Path, tmp_path: Path) -> None:
    encoder, other = (TextEncoder(tiny_backbone, 32) for _ in range(2))
    members = [(text_network(tiny_backbone, 0), encoder, LABELS), (text_network(tiny_backbone, 1), other, LABELS)]
    whole, folders = saved(tmp_path, members, [0.5, 0.5])
    assert load_model(whole).encoder.describe() == encoder.describe()
    assert_is_the_mean(whole, folders, [0.5, 0.5], list(TEXTS))


def test_a_members_own_order_of_labels_is_mapped(tiny_backbone: Path, tmp_path: Path) -> None:
    encoder, turned = TextEncoder(tiny_backbone, 32), ("so so", "bad", "good")
    members = [(text_network(tiny_backbone, 0), encoder, LABELS), (text_network(tiny_backbone, 1), encoder, turned)]
    whole, folders = saved(tmp_path, members, [0.4, 0.6])
    assert_is_the_mean(whole, folders, [0.4, 0.6], list(TEXTS))


def test_images_are_resized_for_each_member_from_the_file(tmp_path: Path) -> None:
    encoders = [ImageEncoder(size, (0.5,) * 3, (0.25,) * 3) for size in (32, 64)]
    members = [(image_network(seed), encoder, LABELS) for seed, encoder in enumerate(encoders)]
    whole, folders = saved(tmp_path, members, [0.3, 0.7])
    encoder = load_model(whole).encoder
    assert isinstance(encoder, CombinedImages) and encoder.image_size == 64
    assert_is_the_mean(whole, folders, [0.3, 0.7], [png(1), png(2, (90, 70))])


def test_a_broken_image_spoils_no_other(tmp_path: Path) -> None:
    encoders = [ImageEncoder(size, (0.5,) * 3, (0.25,) * 3) for size in (32, 64)]
    whole, _ = saved(tmp_path, [(image_network(seed), e, LABELS) for seed, e in enumerate(encoders)], [0.5, 0.5])
    predictor = Predictor.from_folder(whole, max_pixels=2000)
    broken, fine, large = predictor.predict([b"\x89PNG not really", png(1), png(2, (90, 70))])
    assert fine.probabilities and broken.error == "is not an image of a known format"
    assert large.error == "has 90 x 70 pixels, more than 2000"
    assert fine == predictor.predict([png(1)])[0]


def test_it_stands_alone_and_says_what_it_is(tiny_backbone: Path, tmp_path: Path) -> None:
    encoders = [TextEncoder(tiny_backbone, tokens) for tokens in (6, 32)]
    members = [(text_network(tiny_backbone, seed), encoder, LABELS) for seed, encoder in enumerate(encoders)]
    whole, folders = saved(tmp_path, members, [0.7, 0.3], "vote")
    before = answers_of(load_model(whole), TEXTS)
    shutil.rmtree(folders[0].parent)
    model = load_model(whole)
    np.testing.assert_array_equal(answers_of(model, TEXTS), before)
    assert isinstance(model.network, EnsembleNetwork) and model.network.mixture is not None
    assert model.network.mixture.combine == "vote" and model.card["seen"] == 1
    assert model.card["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert json.loads((whole / "config.json").read_text())["library"] == "ensemble"


# ------------------------------------------------------------------------------------------------------------- bf16


class Elsewhere(RuntimeNetwork):
    """What another runtime would compute; it cannot be copied, and notices what numbers torch computes with."""

    def __init__(self, answer: Sequence[float]) -> None:
        super().__init__(Answering("elsewhere", len(LABELS), ("input_ids",), 7))
        self.answer, self.handle = answer, iter(())

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.answer] * len(inputs["input_ids"]))


def served(networks: Sequence[Network], encoder: Encoder) -> Predictor:
    weights = [1 / len(networks)] * len(networks)
    network = EnsembleNetwork(networks, mixture(weights)).eval()
    return Predictor(SavedModel(network, encoder, LABELS, "text_classification", {}, torch.device("cpu")))


def test_in_bf16_what_another_runtime_computes_stays_as_it_is(tiny_backbone: Path) -> None:
    elsewhere, torchs = Elsewhere([2.0, 0.0, 0.0]), text_network(tiny_backbone, 0)
    before = served([elsewhere, torchs], TextEncoder(tiny_backbone, 32))
    after = settled(before, Serving(precision="bf16"), TEXTS)
    assert after.model.precision == "bf16" and isinstance(after.model.network, EnsembleNetwork)
    assert after.model.network.members[0] is elsewhere
    assert {p.dtype for p in after.model.network.members[1].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in torchs.parameters()} == {torch.float32}
    one, other = ([p.probabilities for p in predictor.predict(TEXTS)] for predictor in (before, after))
    assert np.array(other) == pytest.approx(np.array(one), abs=0.03)


def test_an_ensemble_of_other_runtimes_alone_stays_as_it_is(tiny_backbone: Path) -> None:
    predictor = served([Elsewhere([2.0, 0.0, 0.0]), Elsewhere([0.0, 1.0, 0.0])], TextEncoder(tiny_backbone, 32))
    assert settled(predictor, Serving(precision="bf16"), TEXTS) is predictor
