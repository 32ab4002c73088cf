"""What an answer hangs on: words that decide, patches that decide, and models that cannot say."""

from __future__ import annotations

import importlib
import io
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small_networks
import tiny_networks
import torch
from PIL import Image
from served_models import LABELS, png, publish_image_model
from torch import nn

from orchestrator.data.combined import together
from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.exporting.forms import FORMS
from orchestrator.models.backbones import (
    EnsembleNetwork,
    Network,
    TorchvisionNetwork,
    TransformersNetwork,
    load_network,
)
from orchestrator.models.checkpoint import SavedModel
from orchestrator.models.ensemble import Mixture
from orchestrator.models.runtimes import is_installed
from orchestrator.recipe import Model
from orchestrator.serving import explain as explaining
from orchestrator.serving.explain import STEPS, TOLERANCE, Explanation, ExplanationRefused, TextPart, explain
from orchestrator.serving.predictor import Predictor
from orchestrator.storage import Storage

METHODS = ("occlusion", "integrated_gradients")
RUNTIMES = [form for form in ("torch-fp32", "onnxruntime-fp32", "openvino-fp32")
            if all(is_installed(package) for package in FORMS[form].packages)]  # fmt: skip
FILLER = ("the", "coffee", "tea", "box", "was", "and", "it", "my", "dog", "we", "bought", "this", "in", "a", "bag")
IMAGE_SIZE = 64
needs_captum = pytest.mark.skipif(not is_installed("captum"), reason="needs captum")


def predictor_of(network: Network, encoder: Encoder, batch: int = 4) -> Predictor:
    model = SavedModel(
        network.eval(), encoder, LABELS, f"{encoder.kind}_classification", {}, torch.device("cpu")
    )  # fmt: skip
    return Predictor(model, batch)


# --------------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def encoder(tiny_backbone: Path) -> TextEncoder:
    return TextEncoder.from_backbone(str(tiny_backbone), 32)


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path, encoder: TextEncoder) -> Network:
    """Good is what is great, bad what is awful, and all else so-so, whatever else is said."""
    torch.manual_seed(0)
    network = TransformersNetwork.create(Model(weights="none"), str(tiny_backbone), LABELS).eval()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    generator = np.random.default_rng(0)
    for _ in range(250):
        labels = generator.integers(0, 3, 24)
        rows = [sentence(generator, (["awful"], ["great"], [])[label]) for label in labels]
        inputs = encoder.collate(pa.table(encoder.encode(rows).columns))
        loss = nn.functional.cross_entropy(network(**inputs), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.zero_grad(set_to_none=True)
    return network


def sentence(generator: np.random.Generator, words: Sequence[str]) -> str:
    drawn = [*generator.choice([*FILLER, "unheard-of"], generator.integers(0, 16)), *words]
    generator.shuffle(drawn)
    return " ".join(drawn)


@pytest.fixture(scope="module")
def texts(trained: Network, encoder: TextEncoder) -> Predictor:
    return predictor_of(trained, encoder)


class OfLight(TorchvisionNetwork):
    """Logits that are a function of the mean of some pixels."""

    def __init__(self, logit: Callable[[torch.Tensor], torch.Tensor], rows: slice, columns: slice) -> None:
        nn.Module.__init__(self)
        self.logit, self.rows, self.columns = logit, rows, columns

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logit = self.logit(pixels[:, :, self.rows, self.columns].mean((1, 2, 3)))
        return torch.stack([torch.zeros_like(logit), logit, torch.zeros_like(logit)], 1)


def images_of(
    logit: Callable[[torch.Tensor], torch.Tensor], rows: slice = slice(None), columns: slice = slice(None)
) -> Predictor:
    """Of normalised pixels: mid-grey is 0, white 2."""
    return predictor_of(OfLight(logit, rows, columns), ImageEncoder(IMAGE_SIZE, (0.5,) * 3, (0.25,) * 3))


def grey_with_white(box: tuple[int, int, int, int], size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> bytes:
    image = Image.new("RGB", size, (128, 128, 128))
    image.paste((255, 255, 255), box)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


WHITE = grey_with_white((0, 0, IMAGE_SIZE, IMAGE_SIZE))


def weights(explanation: Explanation) -> dict[str, float]:
    return {part.text: part.weight for part in explanation.parts or []}


def counted(predictor: Predictor) -> tuple[list[int], Any]:
    """Rows of each pass from now on, and what ends the counting."""
    rows: list[int] = []

    def count(_: nn.Module, __: tuple[()], inputs: dict[str, torch.Tensor]) -> None:
        rows.append(len(next(iter(inputs.values()))))

    return rows, predictor.model.network.register_forward_pre_hook(count, with_kwargs=True)


# ------------------------------------------------------------------------------------------------------------ texts


@needs_captum
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("word", "label"), [("great", "good"), ("awful", "bad")])
def test_the_word_that_decides_has_the_largest_weight(texts: Predictor, method: Any, word: str, label: str) -> None:
    text = f"my dog bought the {word} coffee, and it was in a bag"
    explanation = explain(texts, text, method=method)
    assert (explanation.method, explanation.label, explanation.heatmap) == (method, label, None)
    assert explanation.score == texts.predict([text])[0].probabilities[LABELS.index(label)] > 0.9  # type: ignore[index]
    assert explanation.baseline_score < 0.5
    found = weights(explanation)
    assert max(found, key=lambda part: found[part]) == word
    assert found[word] > 0.5 and all(abs(found[other]) < found[word] / 3 for other in found if other != word)


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_a_word_that_decides_speaks_against_the_other_labels(texts: Predictor, method: Any) -> None:
    explanation = explain(texts, "the great coffee", "so-so", method)
    assert explanation.label == "so-so" and explanation.score < 0.1
    assert weights(explanation)["great"] < -0.3


@needs_captum
def test_two_words_that_say_the_same_share_the_weight_of_gradients_alone(texts: Predictor) -> None:
    text = "great coffee and great tea"
    gradients, hidden = (explain(texts, text, method=method).parts for method in reversed(METHODS))  # type: ignore[arg-type]
    of_great = [[part.weight for part in parts or [] if part.text == "great"] for parts in (gradients, hidden)]
    assert min(of_great[0]) > 0.1 > max(of_great[1])


def test_what_a_hidden_word_takes_away_is_what_the_network_says_without_it(
    texts: Predictor, encoder: TextEncoder
) -> None:
    explanation = explain(texts, "the Great tea", "good", "occlusion")
    vocabulary = encoder.tokenizer.get_vocab()
    rows = [["[CLS]", "the", "[UNK]", "tea", "[SEP]"], ["[CLS]", "[UNK]", "[UNK]", "[UNK]", "[SEP]"]]
    ids = torch.tensor([[vocabulary[word] for word in row] for row in rows])
    with torch.no_grad():
        logits = texts.model.network(input_ids=ids, attention_mask=torch.ones_like(ids))
    without, nothing = logits.softmax(-1)[:, 1].tolist()
    assert weights(explanation)["Great"] == pytest.approx(explanation.score - without, abs=1e-5)
    assert explanation.baseline_score == pytest.approx(nothing, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Great coffee, isn't it?!", ["Great", "coffee", ",", "isn't", "it", "?!"]),
        ("  well-made\t3.50 (really).\n", ["well-made", "3.50", "(", "really", ")."]),
        ("שָׁלוֹם עולם, great", ["שָׁלוֹם", "עולם", ",", "great"]),
        ("مَرْحَبًا بالعالم", ["مَرْحَبًا", "بالعالم"]),
        ("می‌خواهم نमस्ते", ["می‌خواهم", "نमस्ते"]),
        ("咖啡 great很好。", ["咖", "啡", "great", "很", "好", "。"]),
        ("great👩‍💻🙂🙂 ❤️ 🇩🇪🇫🇷 👍🏽!", ["great", "👩‍💻", "🙂", "🙂", "❤️", "🇩🇪", "🇫🇷", "👍🏽", "!"]),
        ("cafe\u0301 naïve \u00a0x", ["cafe\u0301", "naïve", "x"]),
    ],
)
def test_parts_are_the_words_of_any_script_and_cover_the_text(texts: Predictor, text: str, expected: list[str]) -> None:
    parts = explain(texts, text, method="occlusion").parts or []
    assert [part.text for part in parts] == expected
    assert_covers(parts, text)


def assert_covers(parts: Sequence[TextPart], text: str) -> None:
    between, end = "", 0
    for part in parts:
        assert end <= part.start < part.end and part.text == text[part.start : part.end]
        between, end = between + text[end : part.start], part.end
    assert not (between + text[end:]).strip()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """Words in pieces of one letter, and a mask token; at most 12 tokens."""
    ensure_torchvision()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("pieces")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)  # fmt: skip
    return TextEncoder.from_backbone(str(folder), 12)


@pytest.fixture(scope="module")
def in_pieces(pieces: TextEncoder) -> Predictor:
    return predictor_of(tiny_networks.text_network("Bert", spread=0.3, vocab_size=70), pieces)


def test_a_word_of_many_pieces_is_hidden_as_a_whole(in_pieces: Predictor, pieces: TextEncoder) -> None:
    text, label = "Ábc, de-f", LABELS[0]
    explanation = explain(in_pieces, text, label, "occlusion")
    vocabulary = pieces.tokenizer.get_vocab()
    row = ["[CLS]", "a", "##b", "##c", ",", "[MASK]", "[MASK]", "[MASK]", "[MASK]", "[SEP]"]
    ids = torch.tensor([[vocabulary[piece] for piece in row]])
    with torch.no_grad():
        without = in_pieces.model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).softmax(-1)[0, 0].item()
    assert list(weights(explanation)) == ["Ábc", ",", "de-f"]
    assert weights(explanation)["de-f"] == pytest.approx(explanation.score - without, abs=1e-5)
    assert abs(weights(explanation)["de-f"]) > 1e-3


@needs_captum
def test_a_words_gradients_are_the_sum_of_its_pieces(in_pieces: Predictor) -> None:
    text = "abc, def"
    apart = explain(in_pieces, text, LABELS[0], "integrated_gradients")
    together = explain(in_pieces, text, LABELS[0], "integrated_gradients", max_parts=3)
    assert [part.text for part in together.parts or []] == ["abc", ", def"]
    found = weights(apart)
    expected = {"abc": found["abc"], ", def": found[","] + found["def"]}
    assert weights(together) == pytest.approx(expected, abs=1e-5)
    assert min(map(abs, found.values())) > 1e-4


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_what_the_model_does_not_read_is_one_part_that_weighs_nothing(in_pieces: Predictor, method: Any) -> None:
    text = "abc defghij klmnop, and so on. "
    explanation = explain(in_pieces, text, method=method)
    parts = explanation.parts or []
    assert [part.text for part in parts] == ["abc", "defghij", "klmnop, and so on."]
    assert parts[-1].weight == 0.0 != parts[0].weight
    assert_covers(parts, text)


@pytest.mark.parametrize(
    ("text", "read", "rest"),
    [("abc defghijkl mno", ["abc", "defghijkl"], "mno"), ("abc,defghijkl,mno", ["abc", ",", "defghijkl"], ",mno")],
)
def test_the_word_that_is_cut_is_still_a_word(in_pieces: Predictor, text: str, read: list[str], rest: str) -> None:
    parts = explain(in_pieces, text, method="occlusion").parts or []
    assert [part.text for part in parts if part.weight != 0.0] == read
    assert [part.text for part in parts] == [*read, rest]


@needs_captum
def test_padding_changes_nothing(in_pieces: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = explain(in_pieces, "abc, def", method="integrated_gradients")
    monkeypatch.setattr("orchestrator.data.text._PAD_MULTIPLE", 12)
    padded = explain(in_pieces, "abc, def", method="integrated_gradients")
    assert weights(padded) == pytest.approx(weights(alone), abs=1e-5)


@pytest.mark.parametrize("max_parts", [3, 4, 7, 10, 128])
@pytest.mark.parametrize("words", [1, 6, 9, 29, 40_000])
def test_a_text_costs_no_more_rows_than_said(texts: Predictor, max_parts: int, words: int) -> None:
    text = " ".join((FILLER * (words // len(FILLER) + 1))[:words])
    rows, counting = counted(texts)
    with counting:
        parts = explain(texts, text, method="occlusion", max_parts=max_parts).parts or []
    assert sum(rows) <= max_parts + 1 and max(rows) <= texts.max_batch_size
    assert len(parts) == min(words, max_parts - 1, 31)  # 30 tokens between the special ones, and the rest
    assert_covers(parts, text)


@pytest.mark.parametrize("text", ["", " \n\t "])
@pytest.mark.parametrize("method", ["auto", "occlusion"])
def test_a_text_without_words_has_no_parts(texts: Predictor, text: str, method: Any) -> None:
    explanation = explain(texts, text, method=method)
    assert explanation.parts == []
    assert explanation.baseline_score == pytest.approx(explanation.score, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- images


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_the_quadrant_that_decides_has_all_the_weight(method: Any) -> None:
    predictor = images_of(lambda light: 2.0 * light, slice(0, 32), slice(32, 64))
    explanation = explain(predictor, WHITE, method=method, max_parts=66)
    heat = np.array(explanation.heatmap)
    assert (explanation.method, explanation.label, explanation.parts) == (method, "good", None)
    assert heat.shape == (8, 8)
    decides = np.zeros((8, 8), bool)
    decides[:4, 4:] = True
    assert (heat[decides] > 1e-3).all() and (heat[~decides] == 0.0).all()


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_where_the_docstring_says(method: Any) -> None:
    """120 x 60 pixels: the model sees columns 30 to 90."""
    picture = grey_with_white((75, 0, 90, 15), (120, 60))
    heat = np.array(explain(images_of(lambda light: 5.0 * light), picture, "good", method).heatmap)
    side = len(heat)
    columns, rows = 30 + 60 * np.arange(side) / side, 60 * np.arange(side) / side
    white = (rows[:, None] < 15) & (columns + 60 / side > 75)
    assert side == 11 and white.sum() == 9
    assert heat[white].sum() > 0.9 * heat.sum() > 0.05


@needs_captum
@pytest.mark.parametrize("max_parts", [3, 4, 6, 10, 128, 198, 1000])
def test_an_image_costs_no_more_rows_than_said(max_parts: int) -> None:
    predictor = images_of(lambda light: light)
    rows, counting = counted(predictor)
    with counting:
        heatmap = explain(predictor, png(1), method="occlusion", max_parts=max_parts).heatmap or []
    assert sum(rows) <= max_parts + 1 and max(rows) <= predictor.max_batch_size
    assert len(heatmap) == len(heatmap[0]) == {3: 1, 4: 1, 6: 2, 10: 2, 128: 11}.get(max_parts, 14)


# ---------------------------------------------------------------------------------------------- integrated gradients


@needs_captum
@pytest.mark.parametrize("label", LABELS)
def test_gradients_add_up_to_the_difference_of_the_scores(tmp_path: Path, texts: Predictor, label: str) -> None:
    storage = Storage(str(tmp_path))
    images = Predictor.from_folder(storage.path(publish_image_model(storage, "shapes", 1)))
    for predictor, value in ((texts, "we bought this great coffee"), (images, png(3))):
        explanation = explain(predictor, value, label, "integrated_gradients")
        found = explanation.heatmap or [list(weights(explanation).values())]
        difference = explanation.score - explanation.baseline_score
        assert np.array(found).sum() == pytest.approx(difference, abs=TOLERANCE)
        assert np.abs(found).max() > 1e-4


@needs_captum
def test_gradients_cost_no_more_rows_than_said(in_pieces: Predictor) -> None:
    rows, counting = counted(in_pieces)
    with counting:
        explain(in_pieces, "abc, def", method="integrated_gradients")
    assert sum(rows) == 1 + 2 + STEPS[0]


@needs_captum
def test_more_steps_are_taken_where_the_first_miss_the_tolerance() -> None:
    predictor = images_of(lambda light: 60.0 * (light - 0.7))
    rows, counting = counted(predictor)
    with counting:
        explanation = explain(predictor, WHITE, method="integrated_gradients")
    assert sum(rows) == 1 + 2 * 2 + sum(STEPS)
    assert abs(np.array(explanation.heatmap).sum() - (explanation.score - explanation.baseline_score)) <= TOLERANCE


@needs_captum
def test_gradients_that_do_not_add_up_are_no_explanation() -> None:
    """A jump has no slope."""
    predictor = images_of(lambda light: 6.0 * (light > 0.5) + 0.01 * light)
    with pytest.raises(ExplanationRefused, match="add up to 0.* 'occlusion'"):
        explain(predictor, WHITE, method="integrated_gradients")
    explanation = explain(predictor, WHITE)
    assert explanation.method == "occlusion" and explanation.baseline_score < 0.5 < 0.9 < explanation.score


@needs_captum
def test_an_ensembles_explanation_is_the_mean_of_its_members(pieces: TextEncoder) -> None:
    """Whose embeddings are 32 and 16 wide."""
    networks = [tiny_networks.text_network(family, spread=0.3, vocab_size=70) for family in ("Bert", "Albert")]
    ensemble = predictor_of(EnsembleNetwork(networks), pieces)
    whole, *each = (
        explain(one, "abc, def", LABELS[0]) for one in (ensemble, *(predictor_of(n, pieces) for n in networks))
    )
    assert whole.method == "integrated_gradients"
    for name in ("score", "baseline_score"):
        assert getattr(whole, name) == pytest.approx(np.mean([getattr(one, name) for one in each]), abs=1e-5)
    means = {word: np.mean([weights(one)[word] for one in each]) for word in ("abc", ",", "def")}
    assert weights(whole) == pytest.approx(means, abs=1e-5)
    assert min(abs(weights(each[0])[word] - weights(each[1])[word]) for word in means) > 1e-3


def mixed(networks: Sequence[Network], encoders: Sequence[Encoder], combine: Any = "mean") -> Predictor:
    """With weights 0.7 and 0.3."""
    encoder, numbers = together(encoders)
    return predictor_of(EnsembleNetwork(networks, Mixture((0.7, 0.3), ((0, 1, 2),) * 2, numbers, combine)), encoder)


def test_a_word_is_hidden_from_each_member_in_its_own_tokens(
    pieces: TextEncoder, encoder: TextEncoder, trained: Network
) -> None:
    """One knows words, the other their pieces."""
    other = tiny_networks.text_network("Bert", spread=0.3, vocab_size=70)
    both, text = mixed([trained, other], [encoder, pieces]), "abc, def great"
    whole = explain(both, text, LABELS[1])
    each = [explain(predictor_of(*one), text, LABELS[1], "occlusion") for one in ((trained, encoder), (other, pieces))]
    assert whole.method == "occlusion", "auto falls back to it"
    for name in ("score", "baseline_score"):
        assert getattr(whole, name) == pytest.approx(
            0.7 * getattr(each[0], name) + 0.3 * getattr(each[1], name), abs=1e-5
        )
    expected = {word: 0.7 * weight + 0.3 * weights(each[1])[word] for word, weight in weights(each[0]).items()}
    assert weights(whole) == pytest.approx(expected, abs=1e-5)
    assert max(abs(weight) for weight in weights(each[1]).values()) > 1e-3


@needs_captum
def test_a_patch_is_hidden_from_members_that_see_other_sizes(tmp_path: Path) -> None:
    encoders = [ImageEncoder(size, (0.5,) * 3, (0.25,) * 3) for size in (32, 64)]
    networks = [tiny_networks.image_network("resnet18"), small_networks.image_network()]
    whole = explain(mixed(networks, encoders), png(1), LABELS[1], max_parts=18)
    each = [
        explain(predictor_of(*one), png(1), LABELS[1], "occlusion", 18) for one in zip(networks, encoders, strict=True)
    ]
    assert whole.method == "occlusion"
    heatmaps = [np.array(one.heatmap) for one in each]
    assert np.array(whole.heatmap) == pytest.approx(0.7 * heatmaps[0] + 0.3 * heatmaps[1], abs=1e-5)


@needs_captum
def test_gradients_of_an_ensemble_have_its_weights_and_its_labels(pieces: TextEncoder) -> None:
    networks = [tiny_networks.text_network(family, spread=0.3, vocab_size=70) for family in ("Bert", "Albert")]
    joined = EnsembleNetwork(networks, Mixture((0.7, 0.3), ((0, 1, 2), (2, 0, 1)), (0, 0)))
    whole = explain(predictor_of(joined, pieces), "abc, def", LABELS[0])
    first, second = (
        explain(predictor_of(n, pieces), "abc, def", label)
        for n, label in zip(networks, (LABELS[0], LABELS[2]), strict=True)
    )
    assert whole.method == "integrated_gradients"
    expected = {word: 0.7 * weights(first)[word] + 0.3 * weights(second)[word] for word in ("abc", ",", "def")}
    assert weights(whole) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("combine", "told"), [("vote", "members vote, and a vote has no"), ("mean", "see an input in different ways")]
)
def test_gradients_that_an_ensemble_does_not_have_are_refused(
    combine: str, told: str, trained: Network, encoder: TextEncoder
) -> None:
    encoders = [encoder, encoder.shortened(8) if combine == "mean" else encoder]
    both = mixed([trained, trained], encoders, combine)
    with pytest.raises(ExplanationRefused, match=told):
        explain(both, "great tea", method="integrated_gradients")
    assert explain(both, "great tea").method == "occlusion"


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_an_image_model_that_is_served_in_bf16_is_explained(method: Any) -> None:
    encoder = ImageEncoder(IMAGE_SIZE, (0.5,) * 3, (0.25,) * 3)
    whole = predictor_of(small_networks.image_network(), encoder)
    half = Predictor(whole.model.in_bf16())
    first, second = (explain(one, png(1), LABELS[0], method, 18) for one in (whole, half))
    assert second.method == method
    assert np.array(second.heatmap) == pytest.approx(np.array(first.heatmap), abs=0.05)


@needs_captum
def test_explaining_leaves_the_model_as_it_was(texts: Predictor) -> None:
    network = texts.model.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    answered = texts.predict(["the great coffee"])
    explain(texts, "the great coffee", method="integrated_gradients")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training or module._forward_hooks for module in network.modules())
    assert texts.predict(["the great coffee"]) == answered


@needs_captum
def test_another_thread_may_predict_meanwhile(texts: Predictor) -> None:
    question = ["this awful tea was in the cup"]
    expected, here = texts.predict(question)[0].probabilities, threading.get_ident()
    found: list[Any] = []

    def ask(*_: Any) -> None:
        if threading.get_ident() == here:
            thread = threading.Thread(target=lambda: found.append(texts.predict(question)[0].probabilities))
            thread.start()
            thread.join()

    with texts.model.network.register_forward_pre_hook(ask):
        explain(texts, "the great coffee", method="integrated_gradients")
    assert len(found) > STEPS[0] / texts.max_batch_size
    assert all(answer == pytest.approx(expected, abs=1e-6) for answer in found)


# ---------------------------------------------------------------------------------------------------- other runtimes


@pytest.mark.parametrize("form", RUNTIMES)
def test_a_text_model_of_another_runtime_goes_by_occlusion(
    form: str, trained: Network, encoder: TextEncoder, texts: Predictor, tmp_path: Path
) -> None:
    example = encoder.collate(pa.table(encoder.encode(["the coffee was great", "we bought tea"]).columns))
    FORMS[form].convert(trained, [example], tmp_path)
    exported = predictor_of(load_network(tmp_path), encoder)
    with pytest.raises(ExplanationRefused, match="no gradients .* 'occlusion'"):
        explain(exported, "the great tea", method="integrated_gradients")
    text = "my dog bought the great coffee"
    explanation = explain(exported, text)
    assert explanation.method == "occlusion"
    expected = weights(explain(texts, text, method="occlusion"))
    assert weights(explanation) == pytest.approx(expected, abs=1e-4) and expected["great"] > 0.5


@needs_captum
@pytest.mark.parametrize("form", RUNTIMES)
def test_an_image_model_of_another_runtime_goes_by_occlusion(form: str, tmp_path: Path) -> None:
    network, pictures = small_networks.image_network(), ImageEncoder(IMAGE_SIZE, (0.5,) * 3, (0.25,) * 3)
    FORMS[form].convert(network, [small_networks.pictures(4)], tmp_path)
    exported = explain(predictor_of(load_network(tmp_path), pictures), png(1), max_parts=18)
    expected = explain(predictor_of(network, pictures), png(1), method="occlusion", max_parts=18)
    assert exported.method == "occlusion" and exported.label == expected.label
    assert np.array(exported.heatmap) == pytest.approx(np.array(expected.heatmap), abs=1e-3)
    assert np.abs(expected.heatmap).max() > 1e-2  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- refusing


def test_an_unknown_label_is_refused(texts: Predictor) -> None:
    with pytest.raises(ExplanationRefused, match="no label 'splendid': name one of bad, good, so-so"):
        explain(texts, "great", "splendid")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(b"not an image", "the image is not an image of a known format"), ("a text", "classifies images, but got str")],
)
def test_an_image_that_cannot_be_read_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(ExplanationRefused, match=reason):
        explain(images_of(lambda light: light), value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(b"bytes", "classifies texts, but got bytes"), ("so \ud83d", "half a surrogate pair at character 3")],
)
def test_what_is_no_text_is_refused(texts: Predictor, value: Any, reason: str) -> None:
    with pytest.raises(ExplanationRefused, match=reason):
        explain(texts, value)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ExplanationRefused, match="not finite"):
        explain(images_of(lambda light: light * torch.nan), WHITE)


def test_settings_that_make_no_sense_are_refused(texts: Predictor) -> None:
    with pytest.raises(ExplanationRefused, match="no method 'lime': known are auto, occlusion, integrated_gradients"):
        explain(texts, "great", method="lime")  # type: ignore[arg-type]
    with pytest.raises(ExplanationRefused, match="max_parts is 2: take at least 3"):
        explain(texts, "great", max_parts=2)


def test_without_captum_texts_go_by_occlusion_and_all_else_says_what_to_install(
    texts: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setattr(explaining, "is_installed", lambda package: package != "captum")
    assert explain(texts, "great coffee").method == "occlusion"
    for refused in (
        lambda: explain(texts, "great coffee", method="integrated_gradients"),
        lambda: explain(images_of(lambda light: light), WHITE),
    ):
        with pytest.raises(ExplanationRefused, match=r"needs the package captum.*ray-orchestrator\[explain\]"):
            refused()


def test_the_stand_in_is_the_mask_or_the_unknown_token_but_never_the_padding(
    encoder: TextEncoder, pieces: TextEncoder, tmp_path: Path
) -> None:
    transformers = importlib.import_module("transformers")
    tokenizers = importlib.import_module("tokenizers")
    assert explaining._stand_in(encoder) == encoder.tokenizer.unk_token_id
    assert explaining._stand_in(pieces) == pieces.tokenizer.mask_token_id

    def of(vocabulary: dict[str, int]) -> TextEncoder:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        folder = tmp_path / str(len(vocabulary))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<end>", unk_token="<end>"
        ).save_pretrained(folder)  # fmt: skip
        return TextEncoder.from_backbone(str(folder), 8)

    assert explaining._stand_in(of({"<end>": 0, "a": 1, "Ġ": 2})) == 2
    with pytest.raises(ExplanationRefused, match="no token that could stand for a hidden word"):
        explaining._stand_in(of({"<end>": 0, "a": 1}))
