"""An ensemble answers with the mean of its members' probabilities, and is saved, read and checked like any model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data.encoders import load_encoder
from orchestrator.data.text import TextEncoder
from orchestrator.errors import IntegrityError
from orchestrator.models import post_norm
from orchestrator.models.backbones import (
    EnsembleNetwork,
    Network,
    TorchvisionNetwork,
    TransformersNetwork,
    load_network,
)
from orchestrator.models.checkpoint import load_model, save_ensemble, save_model
from orchestrator.models.ensemble import disagreement, log_mean_probabilities
from orchestrator.recipe import Model
from orchestrator.storage import MANIFEST, Storage

LABELS = ("bad", "good", "so so")
TOKENS = {
    "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def text_network(backbone: Path, seed: int) -> TransformersNetwork:
    torch.manual_seed(seed)
    network = TransformersNetwork.create(Model(weights="none"), str(backbone), LABELS)
    for parameter in network.parameters():  # far enough apart to disagree
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture
def members(tiny_backbone: Path) -> list[TransformersNetwork]:
    return [text_network(tiny_backbone, seed) for seed in range(3)]


def test_its_probabilities_are_the_mean_of_the_members(members: list[TransformersNetwork]) -> None:
    network = EnsembleNetwork(members).eval()
    with torch.inference_mode():
        together = network(**TOKENS).softmax(dim=-1)
        alone = torch.stack([member(**TOKENS).softmax(dim=-1) for member in members])
    torch.testing.assert_close(together, alone.mean(dim=0))
    assert (alone[0] - alone[1]).abs().max() > 0.05, "the members differ"


def test_members_take_the_fast_pass_and_give_the_librarys_answers(members: list[TransformersNetwork]) -> None:
    network = EnsembleNetwork(members).eval()
    assert all(post_norm.is_supported(member.model) for member in network.members)
    with torch.inference_mode():
        theirs = torch.stack([member.model(**TOKENS).logits.softmax(dim=-1) for member in members]).mean(dim=0)
        torch.testing.assert_close(network(**TOKENS).softmax(dim=-1), theirs, rtol=1e-5, atol=1e-6)


def test_logits_far_beyond_what_exp_can_hold_stay_finite() -> None:
    logits = torch.tensor([[[5000.0, -5000.0]], [[5000.0, -5000.0]], [[-5000.0, 5000.0]]])
    result = log_mean_probabilities(logits)
    torch.testing.assert_close(result.exp(), torch.tensor([[2 / 3, 1 / 3]]))
    sure = log_mean_probabilities(logits[:2])
    assert sure.isfinite().all() and sure[0, 1] == -10_000.0


def test_halves_are_averaged_as_whole_floats() -> None:
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    result = log_mean_probabilities(logits.bfloat16())
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, logits.bfloat16().double().softmax(-1).mean(0).log().float(), rtol=1e-4, atol=1e-5
    )


def test_one_member_is_itself() -> None:
    logits = torch.randn(1, 5, 3)
    torch.testing.assert_close(log_mean_probabilities(logits).softmax(-1), logits[0].softmax(-1))


def test_an_image_ensemble_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = EnsembleNetwork(
        [TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS) for _ in range(2)]
    ).eval()
    network.save(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        before, after = network(pixels=pixels), load_network(tmp_path).eval()(pixels=pixels)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- as a folder


@pytest.fixture
def saved(tiny_backbone: Path, members: list[TransformersNetwork], tmp_path: Path) -> Path:
    """An ensemble made of saved models, published."""
    storage, encoder = Storage(str(tmp_path)), TextEncoder.from_backbone(str(tiny_backbone), 32)
    for number, member in enumerate(members):
        with storage.publish(f"alone/{number}") as folder:
            save_model(folder, member, encoder, LABELS, "text_classification")
    with storage.publish("together") as folder:
        save_ensemble(folder, [storage.fetch(f"alone/{number}") for number in range(3)])
    return storage.path("together")


def test_a_saved_ensemble_opens_like_any_model(saved: Path, members: list[Network]) -> None:
    model = load_model(saved)
    assert isinstance(model.network, EnsembleNetwork) and not model.network.training
    assert (model.labels, model.task) == (LABELS, "text_classification")
    assert model.card["parameters"] == sum(p.numel() for p in model.network.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model.network(**TOKENS), EnsembleNetwork(members).eval()(**TOKENS), rtol=0, atol=0)


def test_it_needs_no_other_folder_and_its_members_are_models_of_their_own(saved: Path) -> None:
    shutil.rmtree(saved.parent / "alone")
    alone = [load_model(saved / "members" / str(number)) for number in range(3)]
    assert {member.labels for member in alone} == {LABELS}
    assert load_encoder(saved).describe() == alone[0].encoder.describe()
    assert json.loads((saved / "config.json").read_text()) == {"library": "ensemble", "members": 3}


def test_the_manifest_covers_the_members_files(saved: Path) -> None:
    listed = json.loads((saved / MANIFEST).read_text())["files"]
    found = {f.relative_to(saved).as_posix() for f in saved.rglob("*") if f.is_file() and f.name != MANIFEST}
    assert set(listed) == found and "members/2/model.safetensors" in found


def test_a_flipped_bit_in_any_member_is_noticed(saved: Path) -> None:
    file = saved / "members" / "1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"members/1/model.safetensors is not the file that was written"):
        load_model(saved)


# -------------------------------------------------------------------------------------------------- disagreement


def test_members_that_agree_share_no_information() -> None:
    one = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    apart = disagreement(np.stack([one, one, one]))
    assert (apart.labels, apart.mutual_information) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert apart.predictive_entropy == pytest.approx((np.log(2) - 0.9 * np.log(0.9) - 0.1 * np.log(0.1)) / 3)


def test_members_that_are_sure_of_different_labels_disagree_by_all_of_the_entropy() -> None:
    apart = disagreement(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert (apart.labels, apart.member_entropy) == (1.0, 0.0)
    assert apart.mutual_information == pytest.approx(np.log(2))


def test_labels_are_compared_in_all_pairs() -> None:
    votes = np.eye(2)[np.array([[0, 0], [0, 1], [1, 1]])]  # of three pairs: 1 and 2 of 2 rows, 1 of 2
    assert disagreement(votes).labels == pytest.approx((0.5 + 1.0 + 0.5) / 3)
