"""Each form answers as the network it was made of, alone, for any batch, and takes as many bytes as its name says."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny_networks
import torch
from safetensors.torch import load_file
from small_networks import image_network, pictures, save_around, text_network, texts
from tiny_networks import tokens

from orchestrator.compression.cost import folder_bytes, parity
from orchestrator.compression.sensitivity import Sensitivity, measure_sensitivity
from orchestrator.compression.structure import Structure, reshape
from orchestrator.errors import CompressionFailed, IntegrityError, UserError
from orchestrator.exporting.forms import FORMS, available
from orchestrator.exporting.tracing import quiet
from orchestrator.models import compiled
from orchestrator.models.backbones import EnsembleNetwork, Network, load_network
from orchestrator.models.checkpoint import count_parameters
from orchestrator.models.compiled import has_compiler
from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import is_installed

HERE = [
    name
    for name, form in FORMS.items()
    if all(is_installed(package) for package in form.packages) and (has_compiler() or not form.needs_compiler)
]
EXACT = [name for name in HERE if name.endswith("fp32") and "compiled" not in name]
"""What is compiled is the program of torch-fp32, and takes a quarter of a minute each time."""
MAKERS = {"text": text_network, "image": image_network}
PAIRS = [(form, kind) for form in HERE for kind in MAKERS if (form, kind) != ("torchao-int8-weights", "image")]
"""All but what has no linear layers for TorchAO to make smaller."""
BATCHES = {
    "text": [texts(*(3 + (7 * i + j) % 29 for j in range(8)), seed=10 + i) for i in range(6)],
    "image": [pictures(8, seed=20 + i) for i in range(4)],
}
QUESTIONS = {"text": texts(*(2 + i % 30 for i in range(64)), seed=3), "image": pictures(64, seed=4)}
TOLERANCE = {"fp32": (1e-4, 1.0), "bf16": (0.1, 0.95), "int8": (0.5, 0.85), "int4": (0.6, 0.8)}
"""By what is in a form's name: largest difference of a probability, least share of rows with the same label. Wide, since
weights at random have more outliers than trained ones, and nothing to spare."""

Made = Callable[[str, str], tuple[Network, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Network and folder of a form, made when first asked for. In this process: that takes less time."""
    networks: dict[str, Network] = {}
    folders: dict[tuple[str, str], Path] = {}

    def make(form: str, kind: str) -> tuple[Network, Path]:
        network = networks.setdefault(kind, MAKERS[kind]()) if kind not in networks else networks[kind]
        if (form, kind) not in folders:
            folder = tmp_path_factory.mktemp("form")
            FORMS[form].convert(network, BATCHES[kind], folder)
            folders[form, kind] = folder
        return network, folders[form, kind]

    return make


def answers(network: Network, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        probabilities: np.ndarray = network(**inputs).softmax(-1).numpy()
    return probabilities


@pytest.mark.parametrize(("form", "kind"), PAIRS)
def test_a_form_answers_as_the_network_it_was_made_of(form: str, kind: str, made: Made) -> None:
    network, folder = made(form, kind)
    found = load_network(folder)
    expected, got = answers(network, QUESTIONS[kind]), answers(found, QUESTIONS[kind])
    assert got.dtype == np.float32 and expected.std() > 0.05
    difference, agreement = next(limit for name, limit in TOLERANCE.items() if name in form)
    distance = parity(expected, got)
    assert distance.max_difference < difference and distance.agreement >= agreement, distance
    assert count_parameters(found) == count_parameters(network)
    config = json.loads((folder / "config.json").read_text())
    assert config["library"] == FORMS[form].library and config["classes"] == 3


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("lengths", [(1,), (5,), (2, 40), (33, 33, 1, 9, 17, 20, 64)], ids=str)
def test_any_number_of_texts_of_any_length(form: str, lengths: tuple[int, ...], made: Made) -> None:
    network, folder = made(form, "text")
    inputs = texts(*lengths)
    assert np.abs(answers(network, inputs) - answers(load_network(folder), inputs)).max() < 1e-4


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_any_number_of_pictures(form: str, rows: int, made: Made) -> None:
    network, folder = made(form, "image")
    assert np.abs(answers(network, pictures(rows)) - answers(load_network(folder), pictures(rows))).max() < 1e-4


@pytest.mark.parametrize("form", EXACT)
def test_a_row_is_answered_the_same_beside_longer_ones(form: str, made: Made) -> None:
    found = load_network(made(form, "text")[1])
    together = texts(12, 30)
    alone = {name: tensor[:1, :12] for name, tensor in together.items()}
    assert np.abs(answers(found, alone)[0] - answers(found, together)[0]).max() < 1e-5
    hidden = together | {"input_ids": together["input_ids"] + 7 * (1 - together["attention_mask"])}
    assert np.abs(answers(found, hidden) - answers(found, together)).max() < 1e-6
    shorter = together | {"attention_mask": together["attention_mask"] * (torch.arange(30) < 10)}
    assert np.abs(answers(found, shorter) - answers(found, together)).max() > 1e-3


@pytest.mark.skipif("openvino-fp32" not in HERE, reason="needs openvino")
def test_texts_that_come_alone_are_padded_where_padding_is_known_and_tells_nothing() -> None:
    from orchestrator.exporting.openvino_form import _lengths
    from orchestrator.exporting.tracing import traceable

    padded = [texts(40, 35), texts(90, 70, 90)]
    network = text_network()
    assert _lengths(traceable(network, padded), padded, 4) == ((32, 64, 90), 0)
    assert _lengths(traceable(network, padded), padded, 8) == ((16, 32, 48, 64, 80, 90), 0)
    assert _lengths(traceable(network, padded), [texts(30, 30)], 8) == ((), 0), "no token is seen to pad"
    mean = traceable(network, padded)
    mean.module.forward = lambda ids, mask: ids.float().mean(1, keepdim=True) * torch.tensor([[1e-3, -1e-3]])  # type: ignore[method-assign]
    assert _lengths(mean, padded, 8) == ((), 0), "its answers hang on the padding"


@pytest.mark.parametrize(("form", "kind"), [pair for pair in PAIRS if "fp32" not in pair[0]])
def test_fewer_bits_are_fewer_bytes(form: str, kind: str, made: Made) -> None:
    whole = 4 * count_parameters(made("torch-fp32", kind)[0])
    graph = 400_000  # names of operators, which a larger network has hardly more of
    share = 0.5 if "bf16" in form or "torchao" in form else 0.27  # it leaves embeddings in bf16
    if form == "onnxruntime-int4-weights" and kind == "image":
        share = 1.0  # only linear layers have int4 there
    assert folder_bytes(made(form, kind)[1]) < share * 1.04 * whole + graph


@pytest.mark.parametrize("form", HERE)
def test_the_same_network_and_rows_give_the_same_answers(form: str, made: Made, tmp_path: Path) -> None:
    network, folder = made(form, "text")
    FORMS[form].convert(network, BATCHES["text"], tmp_path)
    first, second = (answers(load_network(place), QUESTIONS["text"]) for place in (folder, tmp_path))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "form", [n for n in HERE if n in {"torch-fp32", "torch-compiled-fp32", "onnxruntime-int8-static", "openvino-int8"}]
)
def test_writing_leaves_the_network_alone_and_says_nothing(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = text_network().train()
    before = copy.deepcopy(network.state_dict())
    FORMS[form].write(network, BATCHES["text"], tmp_path)
    assert capfd.readouterr() == ("", "")
    assert network.training and all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    expected, got = (answers(n.eval(), QUESTIONS["text"]) for n in (network, load_network(tmp_path)))
    assert parity(expected, got).agreement >= 0.85
    assert {path.name for path in tmp_path.iterdir()} <= {
        "config.json", "model.onnx", "model.xml", "model.bin", "program.json", "model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "efficientnet_b0"])
def test_other_architectures_as_a_program(architecture: str, tmp_path: Path) -> None:
    """Squeeze and excitation, hard swish, blocks left out by chance in training."""
    network = image_network(architecture)
    FORMS["torch-fp32"].write(network, BATCHES["image"], tmp_path)
    found = load_network(tmp_path)
    assert np.abs(answers(network, QUESTIONS["image"]) - answers(found, QUESTIONS["image"])).max() < 1e-4
    steps = json.loads((tmp_path / "program.json").read_text())["steps"]
    assert not any("batch_norm" in step["op"] for step in steps)


@pytest.mark.parametrize(
    "family",
    ["Roberta", "GPT2", "ModernBert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Deberta", "DebertaV2"))],
)
@pytest.mark.parametrize("form", EXACT)
def test_other_families_of_texts(form: str, family: str, tmp_path: Path) -> None:
    """Each has something that one of the exporters makes a constant of, or does not know."""
    network = tiny_networks.text_network(family)
    FORMS[form].convert(network, [tokens(9, 9)], tmp_path)
    found = load_network(tmp_path)
    for inputs in (tokens(9, 4), tokens(3), tokens(20, 31, 2)):
        assert np.abs(answers(network, inputs) - answers(found, inputs)).max() < 1e-4


@pytest.mark.parametrize("form", EXACT)
def test_an_ensemble_of_a_pruned_and_a_whole_network(form: str, tmp_path: Path) -> None:
    """The example has no padding, and padding counts none the less."""
    whole, other = tiny_networks.text_network("Bert"), tiny_networks.text_network("DistilBert")
    sensitivity = measure_sensitivity(whole, [(tokens(9, 9, 4), torch.tensor([0, 1, 2]))])
    pruned = reshape(whole, Structure(layers=0.67, heads=0.5, units=0.5), sensitivity, tokens(9, 4))
    network = EnsembleNetwork([pruned, other]).eval()
    FORMS[form].convert(network, [tokens(9, 9)], tmp_path)
    for inputs in (tokens(9, 4), tokens(20, 31, 2)):
        assert np.abs(answers(network, inputs) - answers(load_network(tmp_path), inputs)).max() < 1e-4


@pytest.mark.parametrize("example", [(9, 9), (4, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("form", EXACT)
def test_a_network_whose_upper_layers_read_fewer_tokens(form: str, example: tuple[int, ...], tmp_path: Path) -> None:
    """Of texts that have more tokens, as many, and fewer, whichever the example has."""
    network = reshape(tiny_networks.text_network("Bert"), Structure(tokens=4), Sensitivity(), tokens(9, 4)).eval()
    FORMS[form].convert(network, [tokens(*example)], tmp_path)
    found = load_network(tmp_path)
    for inputs in (tokens(9, 4), tokens(3), tokens(20), tokens(20, 31, 2)):
        assert np.abs(answers(network, inputs) - answers(found, inputs)).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- alone

ALONE = """
import json, sys
from importlib.abc import MetaPathFinder

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        training = name.startswith(("torchvision.models", "orchestrator.training", "orchestrator.compression"))
        if training or name.startswith("transformers.models.") and ".modeling_" in name or "modeling_utils" in name:
            raise ImportError(f"{name} is of training")

sys.meta_path.insert(0, Refusing())
from pathlib import Path
import pyarrow as pa
from orchestrator.models.checkpoint import load_model

model = load_model(Path(sys.argv[1]), verify=False)
inputs = ["the coffee was great", "stale"] if model.encoder.kind == "text" else [Path(sys.argv[2]).read_bytes()]
print(json.dumps(model.probabilities(pa.table(model.encoder.encode(inputs).columns)).tolist()))
"""


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("form", EXACT)
def test_a_form_needs_no_code_of_its_architecture(
    form: str, kind: str, tiny_backbone: Path, shapes_folder: Path, tmp_path: Path
) -> None:
    network = text_network(words=60) if kind == "text" else image_network()
    FORMS[form].convert(network, [texts(9, 4, words=60)] if kind == "text" else BATCHES[kind], tmp_path)
    save_around(tmp_path, tiny_backbone if kind == "text" else None)
    picture = next(path for path in shapes_folder.rglob("*.png") if path.stat().st_size > 100)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(tmp_path), str(picture)],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = np.array(json.loads(done.stdout))
    assert rows.shape == (2 if kind == "text" else 1, 3) and np.allclose(rows.sum(1), 1.0)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------ what goes wrong


class Missing(MetaPathFinder):
    """Makes packages as if they were not installed."""

    names: ClassVar[tuple[str, ...]] = ("onnxruntime", "openvino", "nncf", "onnx", "onnxscript")

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without_runtimes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] in Missing.names]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    yield


@pytest.mark.parametrize(("form", "extra"), [("onnxruntime-int8", "compress"), ("openvino-int8", "openvino")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    form: str, extra: str, without_runtimes: None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"pip install 'ray-orchestrator\[{extra}\]'"):
        FORMS[form].write(text_network(), BATCHES["text"], tmp_path)
    assert extra in available()[form]
    assert available()["torch-fp32"] == ""


@pytest.mark.skipif("torch-compiled-fp32" not in HERE, reason="needs a C++ compiler")
def test_a_program_is_compiled_once_on_a_machine_and_without_a_compiler_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    folder = made("torch-compiled-fp32", "text")[1]
    assert not [file for file in folder.iterdir() if file.suffix not in {".json", ".safetensors"}], "no machine code"
    cached = answers(load_network(folder), QUESTIONS["text"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler" in available()["torch-compiled-fp32"]
    assert np.array_equal(answers(load_network(folder), QUESTIONS["text"]), cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="there is no C\\+\\+ compiler here"):
        load_network(folder)


@pytest.mark.skipif("torchao-int8-weights" not in HERE, reason="needs torchao")
def test_what_torchao_made_is_int8_and_needs_no_torchao(made: Made, tmp_path: Path) -> None:
    folder = made("torchao-int8-weights", "text")[1]
    kinds = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert list(kinds.values()).count(torch.int8) >= 10
    assert "torchao" not in (folder / "program.json").read_text()
    with pytest.raises(CompressionFailed, match="linear layers hold 0% of its weights"):
        FORMS["torchao-int8-weights"].write(image_network(), BATCHES["image"], tmp_path)


def test_programs_that_were_not_used_for_long_are_forgotten(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.pt2").touch()
        os.utime(tmp_path / f"{number}.pt2", (number, number))
    compiled._forget(tmp_path)
    assert sorted(int(file.stem) for file in tmp_path.iterdir()) == list(range(4, 20))


def test_bf16_is_available_where_the_hardware_has_it() -> None:
    assert (available()["torch-bf16"] == "") == has_bf16(torch.device("cpu"))


BREAKING = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Breaking(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "{package}":
            {act}

sys.meta_path.insert(0, Breaking())
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise RuntimeError('no such luck\\\\nline 2')", "no such luck"),
    ],
)
@pytest.mark.skipif("onnxruntime-fp32" not in HERE, reason="needs onnxruntime")
def test_a_library_that_breaks_breaks_the_form_alone(
    act: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAKING.format(package="onnxruntime.capi", act=act))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "form"
    folder.mkdir()
    with pytest.raises(CompressionFailed, match=f"onnxruntime-fp32 .*{said}") as caught:
        FORMS["onnxruntime-fp32"].write(text_network(), BATCHES["text"], folder)
    assert "\n" not in str(caught.value) and caught.value.next_step
    assert list(folder.iterdir()) == []


class Undecided(Network):
    """Branches on values, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 64 * 64, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        flat = pixels.flatten(1)
        return self.linear(flat) if flat.sum() > 0 else self.linear(-flat)


def test_a_network_that_cannot_be_traced_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CompressionFailed, match="cannot be given the form torch-fp32") as caught:
        FORMS["torch-fp32"].write(Undecided(), BATCHES["image"], tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("old", "new"),
    [("aten.linear.default", "aten.from_file.default"), ("aten.linear.default", "os.system"),
     ("aten.linear.default", "sizes.__import__"), ('{"result"', '{"hub"')],
)  # fmt: skip
def test_a_program_cannot_ask_for_more_than_torchs_operators(old: str, new: str, made: Made, tmp_path: Path) -> None:
    for file in made("torch-fp32", "text")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    program = tmp_path / "program.json"
    assert old in program.read_text()
    program.write_text(program.read_text().replace(old, new))
    with pytest.raises(IntegrityError, match=r"program\.json"):
        load_network(tmp_path)


def test_quiet_leaves_logging_and_streams_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    handlers = list(logging.root.handlers)
    with quiet():
        logging.warning("not seen")
        print("not seen")
    print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert logging.root.handlers == handlers and logging.root.manager.disable == 0
