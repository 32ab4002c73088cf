"""Layer-wise learning rates: which block a parameter is in, by its name alone, and that the schedule keeps the shares."""

import pytest
import torch
from torch import nn

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.models.backbones import TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model
from orchestrator.training.optim import build_optimizer, layer_depths, set_learning_rate

SIZES = {"vocab_size": 60, "num_labels": 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 24}  # fmt: skip
DISTIL = {"vocab_size": 60, "num_labels": 2, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24}


def text_depths(family: str, **sizes: int) -> dict[str, int]:
    ensure_torchvision()
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes)
    network = TransformersNetwork(getattr(transformers, f"{family}ForSequenceClassification")(config))
    return layer_depths([name for name, _ in network.named_parameters()])


def of(depths: dict[str, int], prefix: str) -> set[int]:
    found = {depth for name, depth in depths.items() if name.startswith(f"model.{prefix}")}
    assert found, prefix
    return found


@pytest.mark.parametrize(
    ("family", "sizes", "stem", "layers", "head"),
    [
        ("Bert", SIZES, ["bert.embeddings"], "bert.encoder.layer", ["classifier", "bert.pooler"]),
        ("Roberta", SIZES, ["roberta.embeddings"], "roberta.encoder.layer", ["classifier"]),
        ("Electra", SIZES, ["electra.embeddings"], "electra.encoder.layer", ["classifier"]),
        ("DebertaV2", SIZES, ["deberta.embeddings"], "deberta.encoder.layer", ["classifier"]),
        ("DistilBert", DISTIL, ["distilbert.embeddings"], "distilbert.transformer.layer",
         ["pre_classifier", "classifier"]),
        ("ModernBert", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                        "sep_token_id": 2}, ["model.embeddings"], "model.layers", ["head", "classifier"]),
    ],
)  # fmt: skip
def test_encoders_go_from_the_embeddings_up_to_the_head(family, sizes, stem, layers, head) -> None:
    depths = text_depths(family, **sizes)
    assert [of(depths, f"{layers}.{number}.") for number in range(3)] == [{3}, {2}, {1}]
    assert all(of(depths, name) == {4} for name in stem)
    assert all(of(depths, name) == {0} for name in head)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet18", {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1, "fc": 0}),
        ("shufflenet_v2_x0_5", {"conv1": 4, "stage2": 3, "stage3": 2, "stage4": 1, "fc": 0}),
        ("mobilenet_v3_small", {"features.0": 13, "features.12": 1, "classifier": 0}),
        ("densenet121", {"features.conv0": 5, "features.denseblock1": 4, "features.transition1": 4,
                         "features.denseblock4": 1, "classifier": 0}),
        ("convnext_tiny", {"features.0": 8, "features.7": 1, "classifier": 0}),
        ("vit_b_32", {"class_token": 13, "conv_proj": 13, "encoder.pos_embedding": 13,
                      "encoder.layers.encoder_layer_0": 12, "encoder.layers.encoder_layer_11": 1, "heads": 0}),
    ],
)  # fmt: skip
def test_image_architectures_go_from_the_stem_up_to_the_head(architecture: str, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        network = TorchvisionNetwork.create(Model(weights="none"), architecture, ("a", "b"))
    depths = layer_depths([name for name, _ in network.named_parameters()])
    assert {
        prefix: of(depths, f"{prefix}.") if prefix not in LEAVES else of(depths, prefix) for prefix in expected
    } == {prefix: {depth} for prefix, depth in expected.items()}


LEAVES = {"class_token", "encoder.pos_embedding"}


def test_without_named_blocks_the_children_are_the_blocks() -> None:
    names = ["model.stem.weight", "model.a.0.weight", "model.a.1.weight", "model.b.weight", "model.fc.weight"]
    assert list(layer_depths(names).values()) == [3, 2, 2, 1, 0]


def test_the_schedule_keeps_each_layers_share() -> None:
    network = nn.ModuleDict({"stem": nn.Linear(2, 3), "middle": nn.Linear(3, 3), "fc": nn.Linear(3, 2)})
    optimizer = build_optimizer(network, 0.1, 0.01, layer_decay=0.5)
    set_learning_rate(optimizer, 0.04)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, rate in (("stem", 0.01), ("middle", 0.02), ("fc", 0.04)):
        assert [rates[id(p)] for p in network[name].parameters()] == pytest.approx([rate, rate])
    assert optimizer.param_groups[0]["lr"] == 0.04, "the head comes first, whose rate is the one reported"


def test_without_decay_there_are_the_two_groups_there_always_were() -> None:
    groups = build_optimizer(nn.Linear(3, 2), 0.1, 0.01).param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.01, 0.1), (0.0, 0.1)]
