"""A smaller network is physically smaller, and answers as the one whose parts are zero; where that fails, it is refused."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import CLASSES, image_network, labelled, pixels, text_network, tokens
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.compression import heads, units
from orchestrator.compression.matrices import input_size, zero_inputs
from orchestrator.compression.parts import attentions, feed_forwards, longest_row, token_tables
from orchestrator.compression.reshaping import Reshaping, answers
from orchestrator.compression.sensitivity import Sensitivity, measure_sensitivity
from orchestrator.compression.structure import METHODS, Structure, methods_of, reshape
from orchestrator.compression.tokens import schedule, that_train
from orchestrator.errors import CompressionFailed, RecipeError
from orchestrator.models import post_norm
from orchestrator.models.backbones import EnsembleNetwork, Network, TransformersNetwork, load_network
from orchestrator.models.checkpoint import count_parameters
from orchestrator.models.reshaped import LowRank, ReshapedNetwork, SharedEmbedding
from orchestrator.recipe import Training
from orchestrator.training.fake_int8 import rounding

TEXT = tokens(9, 4, 7, 2)
PIXELS = pixels()


def torch_pruning() -> None:
    pytest.importorskip("torch_pruning", reason="an optional package")


def sensitivity_of(network: Network, inputs: dict[str, torch.Tensor]) -> Sensitivity:
    return measure_sensitivity(network, labelled(inputs))


def applying(network: Network, inputs: dict[str, torch.Tensor]) -> set[str]:
    return {field for field, reason in methods_of(network, inputs).items() if not reason}


def difference(one: Network, other: Network, inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((one(**inputs) - other(**inputs)).abs().max())


# ------------------------------------------------------------------------------------------------------ what applies

EVERYTHING = {"layers", "heads", "units", "vocabulary", "rank", "sparsity", "tokens"}


@pytest.mark.parametrize(
    ("family", "lacking"),
    [
        ("Bert", set()), ("Roberta", set()), ("DistilBert", set()), ("Electra", {"tokens"}), ("DebertaV2", {"tokens"}),
        ("Deberta", {"tokens"}), ("GPT2", {"tokens"}), ("GPTNeoX", {"tokens"}), ("Llama", {"tokens"}),
        ("Qwen3", {"tokens"}), ("ModernBert", {"tokens"}), ("MPNet", {"heads", "tokens"}),
        ("Albert", {"layers", "tokens"}),
    ],
)  # fmt: skip
def test_methods_that_apply_to_a_text_architecture(family: str, lacking: set[str]) -> None:
    torch_pruning()
    assert applying(text_network(family), TEXT) == EVERYTHING - lacking


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet18", {"layers", "filters", "sparsity"}),
        ("mobilenet_v3_small", {"filters", "rank", "sparsity"}),
        ("convnext_tiny", {"layers", "units", "rank", "sparsity"}),
    ],
)
def test_methods_that_apply_to_an_image_architecture(architecture: str, expected: set[str]) -> None:
    torch_pruning()
    assert applying(image_network(architecture), PIXELS) == expected


def test_without_torch_pruning_filters_name_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    network = image_network("resnet18")
    assert "torch-pruning, which is not installed" in methods_of(network, PIXELS)["filters"]
    with pytest.raises(RecipeError, match=r"pip install 'ray-orchestrator\[compress\]'"):
        reshape(network, Structure(filters=0.5), sensitivity_of(network, PIXELS), PIXELS)


def test_shared_layers_cannot_go_alone_and_the_reason_is_told() -> None:
    network = text_network("Albert")
    assert methods_of(network, TEXT)["layers"] == "its layers share their weights, so that none can go alone"
    with pytest.raises(CompressionFailed, match=r"compression.layers is 0.5, but its layers share their weights"):
        reshape(network, Structure(layers=0.5), sensitivity_of(network, TEXT), TEXT)


def test_position_biases_by_head_are_found_out_by_doing() -> None:
    reason = methods_of(text_network("MPNet"), TEXT)["heads"]
    assert reason.startswith("it does not run without some of its heads (")


def test_an_ensemble_is_refused() -> None:
    ensemble = EnsembleNetwork([text_network("Bert")])
    assert set(methods_of(ensemble, TEXT).values()) == {"nothing can be taken out of a EnsembleNetwork"}


class Crossed(nn.Module):
    """Looks like attention with four heads, and mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(32, 32) for _ in range(4))
        self.num_attention_heads = 4

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        mixed = self.query(states) * self.key(states).mean(-1, keepdim=True) + self.value(states)
        return self.dense(mixed), None


def test_what_only_looks_like_heads_is_refused() -> None:
    network = text_network("DistilBert")
    for layer in network.get_submodule("model.distilbert.transformer.layer"):
        layer.attention = Crossed()  # type: ignore[assignment]
    assert [a.heads for a in attentions(network)] == [4, 4, 4]
    assert (
        methods_of(network, TEXT)["heads"]
        == "without some of its heads it does not answer as with zeros in their place"
    )


# ------------------------------------------------------------------------------------------------------ what comes out


def test_nothing_asked_for_leaves_the_network_as_it_is() -> None:
    network = text_network("Bert")
    same = reshape(network, Structure(), Sensitivity(), TEXT)
    assert same is not network
    assert type(same) is type(network)
    assert difference(same, network, TEXT) == 0.0


FAMILIES = ("Bert", "DistilBert", "GPT2", "GPTNeoX", "Llama", "DebertaV2", "Deberta", "ModernBert")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_without_heads_answers_as_the_one_with_these_heads_zeroed(family: str) -> None:
    network = text_network(family)
    sensitivity = sensitivity_of(network, TEXT)
    smaller = reshape(network, Structure(heads=0.5), sensitivity, TEXT)
    parts = attentions(network)
    left = {a.name: a.heads for a in attentions(smaller.inner)}  # type: ignore[attr-defined]
    assert sum(left.values()) == sum(a.heads for a in parts) // 2
    twin = copy.deepcopy(network)
    for part in parts:
        scores, out = sensitivity.heads[part.name], twin.get_submodule(part.out)
        weakest = sorted(range(part.heads), key=lambda head, s=scores: s[head])[: part.heads - left[part.name]]  # type: ignore[misc]
        size = input_size(out) // part.heads
        zero_inputs(out, [head * size + column for head in weakest for column in range(size)])
    assert difference(smaller, twin, TEXT) < 1e-5
    assert difference(smaller, network, TEXT) > 1e-3
    assert count_parameters(smaller) < count_parameters(network)


def test_layers_may_keep_different_numbers_of_heads_and_the_fast_pass_still_serves_them() -> None:
    network = text_network("Bert")
    names = [a.name for a in attentions(network)]
    scores = dict(zip(names, ([4.0, 4.0, 4.0, 4.0], [1.0, 2.0, 1.0, 3.0], [0.1, 0.1, 0.2, 0.1]), strict=True))
    smaller = reshape(network, Structure(heads=0.5), Sensitivity(heads=scores), TEXT)
    assert isinstance(smaller, ReshapedNetwork)
    assert [a.heads for a in attentions(smaller.inner)] == [4, 1, 1]
    assert post_norm.is_supported(smaller.model)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**TEXT), answers(smaller, TEXT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama", "ModernBert"])
def test_units_go_by_importance_in_multiples_of_eight(family: str) -> None:
    network = text_network(family)
    smaller = reshape(network, Structure(units=0.5), sensitivity_of(network, TEXT), TEXT)
    left = [pair.units for pair in feed_forwards(smaller.inner)]  # type: ignore[attr-defined]
    assert len(left) == 3
    assert all(count % 8 == 0 and 8 <= count <= 48 for count in left)
    assert abs(sum(left) - 72) <= 12


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama", "ModernBert", "DebertaV2"])
def test_the_layers_that_matter_least_go(family: str) -> None:
    network = text_network(family)
    sensitivity = Sensitivity(layers=[3.0, 0.1, 2.0])
    smaller = reshape(network, Structure(layers=0.67), sensitivity, TEXT)
    assert isinstance(smaller, ReshapedNetwork)
    row = longest_row(network)
    assert row is not None
    assert smaller.blueprint.layers == {row.path: [0, 2]}
    whole, left = network.get_submodule(row.path), smaller.get_submodule(row.path)
    assert len(left) == 2  # type: ignore[arg-type]
    one, other = whole[2].state_dict(), left[1].state_dict()  # type: ignore[index]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_low_rank_has_the_rank_it_is_told_and_the_head_stays() -> None:
    network = text_network("Bert")
    smaller = reshape(network, Structure(rank=0.5), sensitivity_of(network, TEXT), TEXT)
    pairs = {name: pair for name, pair in smaller.named_modules() if isinstance(pair, LowRank)}
    assert {pair[0].weight.shape[0] for name, pair in pairs.items() if ".attention." in name} == {
        8
    }  # 0.5 * 32 * 32 / 64
    assert {pair[0].weight.shape[0] for name, pair in pairs.items() if "intermediate" in name} == {
        9
    }  # 0.5 * 48 * 32 / 80
    assert type(smaller.get_submodule("model.classifier")) is nn.Linear
    assert count_parameters(smaller) < count_parameters(network)
    assert not post_norm.is_supported(smaller.get_submodule("model"))


def test_a_higher_rank_is_nearer_to_the_whole_network() -> None:
    network = text_network("Bert")
    sensitivity = sensitivity_of(network, TEXT)
    far, near = (reshape(network, Structure(rank=rank), sensitivity, TEXT) for rank in (0.2, 0.95))
    assert difference(near, network, TEXT) < difference(far, network, TEXT)


def test_columns_whose_inputs_are_large_are_kept_more_faithfully() -> None:
    network = text_network("Bert")
    sensitivity = sensitivity_of(network, TEXT)
    blind = reshape(network, Structure(rank=0.6), Sensitivity(), TEXT)
    seeing = reshape(network, Structure(rank=0.6), sensitivity, TEXT)
    assert difference(seeing, network, TEXT) < difference(blind, network, TEXT)


def test_zeros_are_the_smallest_weights_and_stay_zero_in_training() -> None:
    network = text_network("Bert")
    sparse = reshape(network, Structure(sparsity=0.6), Sensitivity(), TEXT)
    matrices = [m.weight for m in sparse.modules() if isinstance(m, nn.Linear)]
    share = sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)
    assert share == pytest.approx(0.6, abs=0.01)
    zeros = [(weight == 0).clone() for weight in matrices]
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01, weight_decay=0.1)
    before = matrices[0].detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(**TEXT), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert all(torch.equal(weight == 0, zero) for weight, zero in zip(matrices, zeros, strict=True))
    assert not torch.equal(matrices[0], before)


@pytest.mark.parametrize(
    "architecture", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "densenet121"]
)
def test_filters_go_in_multiples_of_eight_and_all_classes_stay(architecture: str) -> None:
    torch_pruning()
    network = image_network(architecture)
    smaller = reshape(network, Structure(filters=0.6), sensitivity_of(network, PIXELS), PIXELS)
    whole = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    left = {name: m for name, m in smaller.named_modules() if isinstance(m, nn.Conv2d)}
    narrower = [name for name in whole if left[name].out_channels < whole[name].out_channels]
    assert len(narrower) > len(whole) / 4
    assert all(left[name].out_channels % 8 == 0 for name in narrower)
    assert smaller(**PIXELS).shape == (2, CLASSES)
    assert count_parameters(smaller) < 0.85 * count_parameters(network)


def test_of_filters_that_matter_alike_those_with_more_work_go_first() -> None:
    torch_pruning()
    network = image_network("resnet18")
    alike = Sensitivity(filters={
        name: [1.0] * m.weight.shape[0] for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    })  # fmt: skip
    smaller = reshape(network, Structure(filters=0.6), alike, PIXELS)
    left = {
        name: smaller.get_submodule(name).out_channels / m.out_channels  # type: ignore[operator]
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    assert left["model.layer1.0.conv1"] < 0.2, "16 x 16 places, 64 channels"
    assert left["model.layer4.1.conv1"] > 0.8, "2 x 2 places, 512 channels"
    assert products(smaller) < 0.3 * products(network)


def products(network: nn.Module) -> int:
    with FlopCounterMode(display=False) as counted:
        network(**PIXELS)
    return counted.get_total_flops()


def test_where_too_few_layers_are_left_none_leaves_tokens_out() -> None:
    network = text_network("Bert")
    for share in (0.34, 0.67):  # one layer, two
        smaller = reshape(network, Structure(layers=share, tokens=8), sensitivity_of(network, TEXT), TEXT)
        assert isinstance(smaller, ReshapedNetwork) and isinstance(smaller.inner, TransformersNetwork)
        assert not smaller.inner.kept_tokens
    two = text_network("Bert", num_hidden_layers=2)
    with pytest.raises(CompressionFailed, match="it has 2 layers, and it takes three"):
        reshape(two, Structure(tokens=8), sensitivity_of(two, TEXT), TEXT)


def test_leaving_tokens_out_needs_a_training_that_can() -> None:
    methods = {"heads": "", "tokens": ""}
    assert that_train(methods, Training()) == methods
    not_with = that_train(methods, Training(gradient_checkpointing=True))
    assert not_with["heads"] == "" and "gradient_checkpointing" in not_with["tokens"]
    other = {"tokens": "it has 2 layers, and it takes three"}
    assert that_train(other, Training(gradient_checkpointing=True)) == other


def test_all_methods_go_together_and_again_on_what_is_left() -> None:
    network = text_network("Bert")
    everything = Structure(layers=0.67, heads=0.75, units=0.7, rank=0.8, sparsity=0.2)
    once = reshape(network, everything, sensitivity_of(network, TEXT), TEXT)
    twice = reshape(once, Structure(layers=0.5, heads=0.5), sensitivity_of(once, TEXT), TEXT)
    sizes = [count_parameters(n) for n in (network, once, twice)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert isinstance(twice, ReshapedNetwork)
    (kept,) = twice.blueprint.layers.values()
    assert len(kept) == 1
    assert twice.blueprint.sparse
    assert applying(twice, TEXT) >= {"units", "sparsity"}


def test_the_given_network_is_never_changed() -> None:
    network = text_network("Llama").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layers = network.model.config.num_hidden_layers  # type: ignore[union-attr]
    sensitivity = sensitivity_of(network, TEXT)
    reshape(network, Structure(layers=0.3, heads=0.5, units=0.5, rank=0.5, sparsity=0.5), sensitivity, TEXT)
    methods_of(network, TEXT)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.training
    assert network.model.config.num_hidden_layers == layers  # type: ignore[union-attr]


def test_a_sensitivity_of_another_network_is_refused() -> None:
    network = text_network("Bert")
    with pytest.raises(CompressionFailed, match="the sensitivity does not know the attention"):
        reshape(network, Structure(heads=0.5), Sensitivity(), TEXT)
    with pytest.raises(CompressionFailed, match="the sensitivity knows 0 layers, the network has 3"):
        reshape(network, Structure(layers=0.5), Sensitivity(), TEXT)


def test_after_a_removal_the_sensitivity_is_that_of_what_is_left() -> None:
    network = text_network("GPT2")
    state = units.apply(heads.apply(Reshaping(network, sensitivity_of(network, TEXT)), 0.5, TEXT), 0.5, TEXT)
    for part in attentions(state.network):
        assert len(state.sensitivity.heads[part.name]) == part.heads
        assert len(state.sensitivity.inputs[part.out]) == input_size(state.network.get_submodule(part.out))
    for pair in feed_forwards(state.network):
        assert len(state.sensitivity.units[pair.down]) == len(state.sensitivity.inputs[pair.down]) == pair.units


def test_every_field_of_the_structure_has_its_method() -> None:
    assert list(METHODS) == list(Structure.__dataclass_fields__)
    assert all(getattr(Structure(), field) == method.untouched for field, method in METHODS.items())


# -------------------------------------------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("family", [*FAMILIES, "Albert", "Roberta"])
def test_rare_tokens_read_the_row_that_is_most_like_theirs(family: str) -> None:
    network = text_network(family)
    sensitivity = replace(sensitivity_of(network, TEXT), tokens=list(range(60)))  # the higher, the more frequent
    smaller = reshape(network, Structure(vocabulary=0.4), sensitivity, TEXT)
    assert isinstance(smaller, ReshapedNetwork)
    names = token_tables(network)
    table, shared = (n.get_submodule(names[0]) for n in (network, smaller.inner))
    assert isinstance(table, nn.Embedding) and isinstance(shared, SharedEmbedding)
    assert shared.weight.shape == (24, table.weight.shape[1])
    assert count_parameters(network) - count_parameters(smaller) == 36 * table.weight.shape[1]
    frequent = range(36, 60) if table.padding_idx is None else [table.padding_idx, *range(37, 60)]
    twin, kept = copy.deepcopy(network), list(frequent)
    likeness = functional.cosine_similarity(table.weight[:, None], table.weight[kept][None], dim=-1)
    stand_ins = torch.tensor(kept)[likeness.argmax(1)]
    twin.get_submodule(names[0]).weight.data.copy_(table.weight[stand_ins])  # type: ignore[union-attr]
    assert difference(smaller, twin, TEXT) < 1e-5 < 1e-3 < difference(smaller, network, TEXT)


def test_a_vocabulary_can_be_made_smaller_twice_and_saved(tmp_path: Path) -> None:
    network = text_network("Bert")
    sensitivity = replace(sensitivity_of(network, TEXT), tokens=list(range(60)))
    once = reshape(network, Structure(vocabulary=0.5), sensitivity, TEXT)
    twice = reshape(once, Structure(vocabulary=0.5), sensitivity, TEXT)
    at_once = reshape(network, Structure(vocabulary=0.25), sensitivity, TEXT)
    assert count_parameters(twice) == count_parameters(at_once) < count_parameters(once)
    twice.save(tmp_path)
    again = load_network(tmp_path).eval()
    assert difference(again, twice, TEXT) == 0.0


def test_all_rows_of_a_smaller_vocabulary_learn() -> None:
    network = text_network("Bert")
    sensitivity = replace(sensitivity_of(network, TEXT), tokens=[0] * 60)
    smaller = reshape(network, Structure(vocabulary=0.2), sensitivity, TEXT)
    smaller(**TEXT).sum().backward()
    shared = next(module for module in smaller.modules() if isinstance(module, SharedEmbedding))
    read = shared.row_of[TEXT["input_ids"]].unique().long()
    assert shared.weight.grad is not None
    assert shared.weight.grad[read].abs().sum(1).min() > 0


# ------------------------------------------------------------------------------------------------------------ the tokens


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta"])
def test_the_upper_layers_read_fewer_tokens_and_a_saved_network_does_too(family: str, tmp_path: Path) -> None:
    network = text_network(family)
    smaller = reshape(network, Structure(tokens=3), Sensitivity(), TEXT)
    assert isinstance(smaller, ReshapedNetwork) and isinstance(smaller.inner, TransformersNetwork)
    assert smaller.inner.kept_tokens == (None, 3, None)
    assert count_parameters(smaller) == count_parameters(network)
    with torch.no_grad():
        expected = post_norm.forward(network.model, **TEXT, kept=(None, 3, None))
        torch.testing.assert_close(smaller(**TEXT), expected, rtol=0, atol=0)
    short = tokens(3, 2)
    assert difference(smaller, network, short) < 1e-5 < difference(smaller, network, TEXT)
    smaller.save(tmp_path)
    again = load_network(tmp_path).eval()
    assert difference(again, smaller, TEXT) == 0.0


def test_what_is_made_smaller_again_goes_on_leaving_tokens_out() -> None:
    network = text_network("Bert")
    once = reshape(network, Structure(tokens=3), Sensitivity(), TEXT)
    sensitivity = sensitivity_of(once, TEXT)
    assert sensitivity == sensitivity_of(network, TEXT), "all layers see all tokens while it is looked at"
    twice = reshape(once, Structure(heads=0.5), sensitivity, TEXT)
    fewer = reshape(once, Structure(tokens=2), sensitivity, TEXT)
    for smaller, most in ((twice, 3), (fewer, 2)):
        assert isinstance(smaller, ReshapedNetwork) and isinstance(smaller.inner, TransformersNetwork)
        assert smaller.inner.kept_tokens == (None, most, None)


def test_a_network_that_leaves_tokens_out_refuses_what_only_the_library_can_do() -> None:
    smaller = reshape(text_network("Bert"), Structure(tokens=3), Sensitivity(), TEXT)
    with rounding(smaller), pytest.raises(CompressionFailed, match="no adapters, hooks or rounding in it"):
        smaller(**TEXT)
    smaller(**TEXT)


def test_factored_matrices_cannot_leave_tokens_out() -> None:
    network = text_network("Bert")
    sensitivity = sensitivity_of(network, TEXT)
    with pytest.raises(CompressionFailed, match="its forward pass is its library's own"):
        reshape(network, Structure(rank=0.5, tokens=3), sensitivity, TEXT)


def test_how_many_tokens_leave_each_layer() -> None:
    assert schedule(3, 5) == (None, 5, None)
    assert schedule(6, 4) == (None, 32, 16, 8, 4, None)
    twelve = schedule(12, 10)
    assert twelve[0] is twelve[-1] is None and twelve[1] == 80 and twelve[-2] == 10
    falling = [count for count in twelve if count is not None]
    assert falling == sorted(falling, reverse=True)


def test_where_upper_layers_read_few_tokens_more_of_their_units_stay() -> None:
    """A share is then one of the work: what a unit costs goes with the tokens that its layer computes."""
    network, long = text_network("Bert"), tokens(30, 30, 30, 30)
    paths = [pair.down for pair in feed_forwards(network)]
    alike = Sensitivity(units={path: [1.0 + n / 100 for n in range(48)] for path in paths})
    even = reshape(network, Structure(units=0.5), alike, long)
    fewer = reshape(network, Structure(units=0.5, tokens=4), alike, long)
    sizes = [[input_size(n.get_submodule(path)) for path in paths] for n in (even, fewer)]
    assert sizes[0] == [24, 24, 24]
    first, second, third = sizes[1]
    assert first < 24 < second <= third == 48
    costs = [1.0, (4 / 30) ** 0.5, (1 / 16) ** 0.5]  # of a unit in each layer; of the last, no less than a sixteenth
    left = sum(cost * units for cost, units in zip(costs, sizes[1], strict=True)) / (48 * sum(costs))
    assert abs(left - 0.5) < 0.1
