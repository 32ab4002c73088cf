"""Networks that a runtime computes are networks that answer, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import image_network, pictures, save_around, text_network, texts

from orchestrator.errors import IntegrityError
from orchestrator.exporting.forms import FORMS
from orchestrator.models.backbones import EnsembleNetwork, load_network
from orchestrator.models.checkpoint import count_parameters, load_model
from orchestrator.models.runtimes import (
    Answering,
    OnnxRuntimeNetwork,
    OpenVinoNetwork,
    ProgramNetwork,
    RuntimeNetwork,
    is_installed,
)

KINDS = {"torch-fp32": ProgramNetwork, "onnxruntime-fp32": OnnxRuntimeNetwork, "openvino-fp32": OpenVinoNetwork}
HERE = [name for name in KINDS if all(is_installed(package) for package in FORMS[name].packages)]
WORDS = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = {name: tmp_path_factory.mktemp("form") for name in HERE}
    for name, folder in result.items():
        FORMS[name].convert(text_network(words=WORDS), [texts(9, 4, words=WORDS)], folder)
    return result


@pytest.mark.parametrize("form", HERE)
def test_a_saved_model_of_any_runtime_is_loaded_as_any_other(
    form: str, folders: dict[str, Path], tiny_backbone: Path
) -> None:
    save_around(folders[form], tiny_backbone)
    model = load_model(folders[form], verify=False)
    assert type(model.network) is KINDS[form] and not model.network.training
    inputs = texts(9, 4, words=WORDS)
    with torch.inference_mode():
        logits, expected = model.network(**inputs), text_network(words=WORDS)(**inputs)
    assert logits.dtype == torch.float32 and logits.device == inputs["input_ids"].device
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", HERE)
def test_answers_do_not_share_memory_with_later_ones(form: str, folders: dict[str, Path]) -> None:
    network = load_network(folders[form])
    first = network(**texts(9, words=WORDS))
    kept = first.clone()
    network(**texts(9, words=WORDS, seed=5))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("form", HERE)
def test_a_runtime_network_cannot_be_saved_or_trained(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    network = load_network(folders[form])
    assert isinstance(network, RuntimeNetwork)
    with pytest.raises(TypeError, match="copy the folder"):
        network.save(tmp_path)
    for attempt in (network.recompute, lambda: network.moving(lambda rows: rows)):
        with pytest.raises(TypeError, match="cannot be trained"):
            attempt()


@pytest.mark.parametrize("form", HERE)
def test_parameters_are_those_of_the_network_it_was_made_of(form: str, folders: dict[str, Path]) -> None:
    alone, torchs = load_network(folders[form]), text_network(words=WORDS)
    assert count_parameters(alone) == count_parameters(torchs)
    assert count_parameters(EnsembleNetwork([alone, torchs])) == 2 * count_parameters(torchs)


@pytest.mark.parametrize("form", HERE)
def test_threads_are_as_many_as_torch_has(form: str, folders: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        network = load_network(folders[form])
    finally:
        torch.set_num_threads(before)
    if isinstance(network, OnnxRuntimeNetwork):
        assert network._session.get_session_options().intra_op_num_threads == 2
    if isinstance(network, OpenVinoNetwork):
        compiled = network._request.get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 2


@pytest.mark.skipif("openvino-fp32" not in HERE, reason="needs openvino")
def test_openvino_answers_several_threads_at_a_time(folders: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    network = load_network(folders["openvino-fp32"])
    questions = [texts(9, 4 + i % 5, seed=i, words=WORDS) for i in range(24)]
    expected = [network(**question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda question: network(**question), questions))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif("openvino-fp32" not in HERE, reason="needs openvino")
def test_a_text_that_comes_alone_is_padded_to_a_length_that_has_a_graph_of_its_own(folders: dict[str, Path]) -> None:
    network = load_network(folders["openvino-fp32"])
    assert isinstance(network, OpenVinoNetwork)
    lengths = network.answering.lengths
    assert lengths and set(network._singles) == set(lengths)
    for tokens in (2, lengths[0], lengths[0] - 1, lengths[-1], lengths[-1] + 1):
        alone = texts(tokens, seed=tokens, words=WORDS)
        request, given = network._fitting({name: tensor.numpy() for name, tensor in alone.items()})
        fits = tokens <= lengths[-1]
        assert (request is not network._request) == fits
        assert given["input_ids"].shape[1] == (min(n for n in lengths if n >= tokens) if fits else tokens)
        together = {name: torch.cat([tensor, tensor]) for name, tensor in alone.items()}
        torch.testing.assert_close(network(**alone), network(**together)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("openvino-fp32" not in HERE, reason="needs openvino")
def test_few_texts_are_computed_one_by_one_each_as_short_as_it_is(folders: dict[str, Path]) -> None:
    network = load_network(folders["openvino-fp32"])
    assert isinstance(network, OpenVinoNetwork)
    few = texts(9, 3, 5, words=WORDS)
    many = {name: torch.cat([tensor] * 8) for name, tensor in few.items()}
    asked = []
    whole = network._infer

    def watched(request: object, arrays: dict[str, np.ndarray]) -> np.ndarray:
        asked.append(arrays["input_ids"].shape)
        return whole(request, arrays)

    network._infer = watched  # type: ignore[method-assign]
    one_by_one = network(**few)
    shortest = [min(n for n in network.answering.lengths if n >= tokens) for tokens in (9, 3, 5)]
    assert asked == [(1, length) for length in shortest]
    torch.testing.assert_close(one_by_one, network(**many)[:3], rtol=1e-4, atol=1e-4)
    assert asked[3:] == [(24, 9)], "more of them are a batch"


@pytest.mark.skipif("openvino-fp32" not in HERE, reason="needs openvino")
def test_an_image_that_comes_alone_has_a_graph_of_its_own(tmp_path: Path) -> None:
    FORMS["openvino-fp32"].convert(image_network(), [pictures(8)], tmp_path)
    network = load_network(tmp_path)
    assert isinstance(network, OpenVinoNetwork) and network.answering.alone
    together = pictures(3)
    alone = {"pixels": together["pixels"][:1]}
    arrays = {name: tensor.numpy() for name, tensor in alone.items()}
    assert network._fitting(arrays)[0] is network._alone is not network._request
    torch.testing.assert_close(network(**alone), network(**together)[:1], rtol=1e-4, atol=1e-4)


def test_a_config_that_lacks_something_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"library": "onnxruntime", "classes": 2}))
    with pytest.raises(IntegrityError, match=r"config\.json lacks 'inputs'"):
        load_network(tmp_path)


def test_what_config_says_comes_back(tmp_path: Path) -> None:
    said = Answering("openvino", 4, ("input_ids", "attention_mask"), 1234, "bf16", (16, 32), 7)
    said.write(tmp_path)
    assert Answering.read(tmp_path) == said
