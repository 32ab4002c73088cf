"""The forms that ONNX Runtime computes.

In: a network and batches. Out: ``model.onnx`` (above 2 GB with ``model.onnx.data``) and config.json in a folder. The graph is
exported by torch and quantised by ONNX Runtime's own quantisers. Word embeddings, half the bytes of a small encoder, are
quantised here: one scale per row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.exporting.tracing import Batch, Traceable, first_that_agrees, quiet, traceable
from orchestrator.models.backbones import Network
from orchestrator.models.runtimes import ONNX_FILE, Answering, needed, onnx_session

_OPSET = 17
_OUTPUT = "logits"
_LARGE_BYTES = 1_900_000_000
"""One file of ONNX holds at most 2 GB."""
_TABLE_NUMBERS = 4096
"""A smaller embedding is not worth its scales."""
_BLOCK = 32
"""Weights that share a scale, in int4."""

Model = Any
"""An onnx.ModelProto."""


def write_fp32(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    _write(network, batches, folder, lambda graph, _, __: graph)


def write_int8(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights in int8 with a scale per output channel; the range of activations is found anew for each batch."""
    _write(network, batches, folder, _dynamic)


def write_int8_static(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights and activations in int8; the range of activations is that of the calibration batches."""
    _write(network, batches, folder, _static)


def write_int4_weights(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights of linear layers in int4, 32 to a scale; embeddings in int8."""
    _write(network, batches, folder, _four_bits)


def _write(
    network: Network,
    batches: Sequence[Batch],
    folder: Path,
    quantised: Callable[[Model, Traceable, Sequence[Batch]], Model],
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package)
    traced = traceable(network, batches)
    with quiet():
        model = quantised(exported(traced), traced, batches)
        save(model, folder / ONNX_FILE)
    Answering("onnxruntime", traced.classes, traced.names, traced.parameters).write(folder)


def save(model: Model, file: Path) -> None:
    import onnx

    if model.ByteSize() > _LARGE_BYTES:
        onnx.save_model(
            model, file, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{file.name}.data"
        )
    else:
        onnx.save_model(model, file)


def exported(traced: Traceable) -> Model:
    """By way of TorchScript, whose graphs ONNX Runtime computes faster; by way of ``torch.export`` where that knows an operator
    less, or takes for constant what is not.

    ONNX Runtime's own optimiser for transformers is left out: beside what a session does anyway it brought nothing.
    """
    import onnx

    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        ways = [partial(way, traced, Path(scratch) / f"{number}.onnx")
                for number, way in enumerate((_by_torchscript, _by_export))]  # fmt: skip
        file, _ = first_that_agrees(traced, ways, _answers)
        return onnx.load(file)


Exported = tuple[Path, Any]
"""A file and a session of it."""


def _answers(made: Exported, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    session = made[1]
    names = [one.name for one in session.get_inputs()]
    logits: np.ndarray = session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})[0]
    return logits


def _by_torchscript(traced: Traceable, file: Path) -> Exported:
    sizes = ("batch", "tokens")
    axes = {name: {d: sizes[d] for d in varying} for name, varying in zip(traced.names, traced.varying, strict=True)}
    torch.onnx.export(
        traced.module, traced.example, file, input_names=list(traced.names), output_names=[_OUTPUT],
        dynamic_axes=axes | {_OUTPUT: {0: "batch"}}, opset_version=_OPSET, dynamo=False,
    )  # fmt: skip
    return file, onnx_session(file, torch.get_num_threads())


def _by_export(traced: Traceable, file: Path) -> Exported:
    program = torch.onnx.export(
        traced.exported(), input_names=list(traced.names), output_names=[_OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None  # as no file was given
    program.save(file)
    return file, onnx_session(file, torch.get_num_threads())


def _dynamic(model: Model, traced: Traceable, _: Sequence[Batch]) -> Model:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _through_file() as file:
        quantize_dynamic(
            _small_embeddings(model), file, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True, reduce_range=_saturates(), weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )  # fmt: skip
        return onnx.load(file)


def _static(model: Model, traced: Traceable, batches: Sequence[Batch]) -> Model:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with _through_file() as file:
        quantize_static(
            _small_embeddings(model), file, _reader(traced.names, batches), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"] if traced.is_text else None, per_channel=True,
            reduce_range=_saturates(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )  # fmt: skip
        return onnx.load(file)


def _four_bits(model: Model, _: Traceable, __: Sequence[Batch]) -> Model:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(_small_embeddings(model), bits=4, block_size=_BLOCK, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model


@contextlib.contextmanager
def _through_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / ONNX_FILE


def _reader(names: Sequence[str], batches: Sequence[Batch]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch[name].cpu().numpy() for name in names}

    return Reader()


def _saturates() -> bool:
    """Whether sums of int8 products overflow on this processor, so that weights must do with 7 bits."""
    capabilities = torch.cpu.get_capabilities()
    exact = any("vnni" in name or name == "amx_int8" for name, has in capabilities.items() if has is True)
    return capabilities["architecture"] == "x86_64" and not exact


def _small_embeddings(model: Model) -> Model:
    """Tables that rows are gathered from, in int8 with a scale per row: rows are scaled back after they were gathered."""
    from onnx import helper, numpy_helper

    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, done = [], set()
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_table(node, table):
            nodes.append(node)
            continue
        name, rows, result = table.name, node.input[1], node.output[0]
        if name not in done:
            done.add(name)
            whole, scales = _rounded(numpy_helper.to_array(table))
            model.graph.initializer.extend([numpy_helper.from_array(whole, f"{name}_int8"),
                                            numpy_helper.from_array(scales, f"{name}_scales")])  # fmt: skip
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", rows], [f"{result}_int8"]),
            helper.make_node("Gather", [f"{name}_scales", rows], [f"{result}_scales"]),
            helper.make_node("Cast", [f"{result}_int8"], [f"{result}_whole"], to=tables[name].data_type),
            helper.make_node("Mul", [f"{result}_whole", f"{result}_scales"], [result]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for name in done - used:
        model.graph.initializer.remove(tables[name])
    return model


def _is_table(node: Any, table: Any) -> bool:
    from onnx import TensorProto

    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return (axis == 0 and table.data_type == TensorProto.FLOAT and len(table.dims) == 2
            and table.dims[0] * table.dims[1] >= _TABLE_NUMBERS)  # fmt: skip


def _rounded(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rows, width] -> int8 of the same shape and fp32 scales [rows, 1]."""
    scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127.0, np.finfo(np.float32).tiny).astype(np.float32)
    return np.round(table / scales).clip(-127, 127).astype(np.int8), scales
