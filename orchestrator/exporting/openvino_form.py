"""The forms that OpenVINO computes.

In: a network and batches. Out: ``model.xml``, ``model.bin`` and config.json in a folder. OpenVINO traces the network itself;
NNCF quantises. What int8 by calibration leaves as it was, word embeddings above all, is then stored in int8 too, and turned
back when it is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.exporting import onnx_form
from orchestrator.exporting.tracing import SAME, Batch, Traceable, first_that_agrees, quiet, traceable
from orchestrator.models.backbones import Network
from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import OPENVINO_FILE, Answering, is_installed, needed, openvino_compiled

_GROUP = 64
"""Weights that share a scale, in int4."""
_COPIED_BYTES = 128_000_000
"""Of weights, at most, where what comes alone has graphs, and so weights, of its own."""
_FEWEST_LENGTHS, _MOST_LENGTHS, _LENGTH_STEP = 4, 8, 16
_MASK = "attention_mask"

Model = Any
"""An openvino.Model."""


def write_fp32(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    _write(network, batches, folder, lambda model, _, __: model, "fp32")


def write_bf16(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Stored in fp16, which keeps more digits in as many bytes; computed in bf16."""
    _write(network, batches, folder, lambda model, _, __: model, "bf16", half=True)


def write_int8(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights and activations in int8; the range of activations is that of the calibration batches."""
    _write(network, batches, folder, _calibrated, _rest(), half=True)


def write_int8_weights(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights stored in int8, with a scale per channel, and computed with as they were."""
    _write(network, batches, folder, lambda model, _, __: _stored(model, bits=8), _rest(), half=True)


def write_int4_weights(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights of linear layers stored in int4, embeddings and the head in int8, all computed with as they were."""
    _write(network, batches, folder, lambda model, _, __: _stored(model, bits=4), _rest(), half=True)


def _rest() -> str:
    """What is not int8 is computed in what this processor does best."""
    return "bf16" if has_bf16(torch.device("cpu")) else "fp32"


def _write(
    network: Network, batches: Sequence[Batch], folder: Path,
    quantised: Callable[[Model, Traceable, Sequence[Batch]], Model], precision: str, *, half: bool = False,
) -> None:  # fmt: skip
    openvino = needed("openvino")
    traced = traceable(network, batches)
    with quiet(), torch.no_grad():
        model = quantised(_converted(traced), traced, batches)
        openvino.save_model(model, str(folder / OPENVINO_FILE), compress_to_fp16=half)
    weights = (folder / OPENVINO_FILE).with_suffix(".bin").stat().st_size
    copies = min(_MOST_LENGTHS, _COPIED_BYTES // weights)
    is_for_lengths = traced.is_text and copies >= _FEWEST_LENGTHS
    lengths, padding = _lengths(traced, batches, copies) if is_for_lengths else ((), 0)
    alone = not traced.is_text and copies >= 1
    Answering("openvino", traced.classes, traced.names, traced.parameters, precision, lengths, padding, alone).write(
        folder
    )


def _lengths(traced: Traceable, batches: Sequence[Batch], most: int) -> tuple[tuple[int, ...], int]:
    """Of texts that come alone, and the token that fills them up; no lengths where nothing is padded, or padding tells."""
    longest = max(batch[_MASK].shape[1] for batch in batches) if _MASK in traced.names else 0
    padded = next((batch for batch in batches if longest and not bool(batch[_MASK].all())), None)
    if padded is None:
        return (), 0
    row = int(padded[_MASK].sum(1).argmin())
    tokens = int(padded[_MASK][row].sum())
    alone = {name: padded[name][row : row + 1] for name in traced.names}
    filled, bare = (traced.module(*(t[:, :end] for t in alone.values())) for end in (None, tokens))
    if float((filled.softmax(1) - bare.softmax(1)).abs().max()) > SAME:
        return (), 0
    step = -(-longest // (most * _LENGTH_STEP)) * _LENGTH_STEP
    return (*range(step, longest, step), longest), int(padded["input_ids"][row, -1])


def _converted(traced: Traceable) -> Model:
    """From torch where that gives the network's answers; by way of ONNX, whose operators OpenVINO knows better, where not."""
    openvino = needed("openvino")

    def traced_by_openvino() -> Converted:
        return _compiled(openvino.convert_model(traced.module, example_input=traced.example), traced)

    def exported_by_torch() -> Converted:
        return _compiled(openvino.convert_model(traced.exported()), traced)

    def by_onnx() -> Converted:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.onnx"
            onnx_form.save(onnx_form.exported(traced), file)
            return _compiled(openvino.convert_model(file), traced)

    ways = [traced_by_openvino, exported_by_torch]
    if is_installed("onnxruntime") and is_installed("onnx"):
        ways.append(by_onnx)
    return first_that_agrees(traced, ways, _answers)[0]


Converted = tuple[Model, Any]
"""A model and a request for answers of it."""


def _answers(converted: Converted, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    return np.array(converted[1].infer([tensor.numpy() for tensor in inputs])[0])


def _compiled(model: Model, traced: Traceable) -> Converted:
    """With the sizes that do not vary set."""
    openvino = needed("openvino")
    shapes = [[-1 if d in varying else size for d, size in enumerate(tensor.shape)]
              for tensor, varying in zip(traced.example, traced.varying, strict=True)]  # fmt: skip
    model.reshape({port: openvino.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
    return model, openvino_compiled(model, "f32", torch.get_num_threads()).create_infer_request()


def _calibrated(model: Model, traced: Traceable, batches: Sequence[Batch]) -> Model:
    nncf = needed("nncf")
    rows = [tuple(batch[name].cpu().numpy() for name in traced.names) for batch in batches]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER if traced.is_text else None,
    )
    return _stored(quantised, bits=8) if traced.is_text else quantised


def _stored(model: Model, bits: int) -> Model:
    nncf = needed("nncf")
    if bits == 8:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=_GROUP)
