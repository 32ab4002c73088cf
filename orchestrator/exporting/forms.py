"""The forms a network can be given: which runtime computes it, with which numbers.

In: a network, and batches of real training rows as they are collated: the first one is traced with, all of them calibrate. Out:
the network's files in a folder, for ``load_network``. A form whose library breaks, in whatever way, breaks with
``CompressionFailed``: the libraries of other runtimes are therefore run in a process of their own (``apart.py``), where
they can neither take this one down, nor print, nor change how torch works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.exporting import onnx_form, openvino_form, program_form, torchao_form
from orchestrator.exporting.apart import convert_apart, failing_clearly
from orchestrator.exporting.tracing import Batch
from orchestrator.models.backbones import Network
from orchestrator.models.compiled import has_compiler
from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import EXTRAS, is_installed, needed


@dataclass(frozen=True)
class Form:
    name: str
    library: str
    """In config.json, which says what loads it."""
    packages: tuple[str, ...]
    """What must be importable to make it."""
    needs_calibration: bool
    """Whether the batches' values count, beside their shapes."""
    convert: Callable[[Network, Sequence[Batch], Path], None]
    """Write it from within this process."""
    needs_bf16: bool = False
    needs_compiler: bool = False

    def write(self, network: Network, batches: Sequence[Batch], folder: Path) -> None:
        """Write the network's files and config.json into an existing folder. The network stays as it is.

        Raises:
            UserError: a package is not installed.
            CompressionFailed: the runtime's library cannot convert this network.
        """
        for package in self.packages:
            if not is_installed(package):
                needed(package)
        if self.packages:
            convert_apart(self.name, network, batches, folder)
        else:
            with failing_clearly(self.name):
                self.convert(network, batches, folder)


_ONNX = ("onnxruntime", "onnx", "onnxscript")
_OPENVINO = ("openvino",)
_NNCF = (*_OPENVINO, "nncf")
FORMS: Mapping[str, Form] = {form.name: form for form in (
    Form("torch-fp32", "program", (), False, program_form.write_fp32),
    Form("torch-bf16", "program", (), False, program_form.write_bf16, needs_bf16=True),
    Form("torch-compiled-fp32", "compiled", (), False, program_form.write_compiled_fp32, needs_compiler=True),
    Form("torch-compiled-bf16", "compiled", (), False, program_form.write_compiled_bf16, needs_bf16=True, needs_compiler=True),
    Form("torchao-int8-weights", "program", ("torchao",), False, torchao_form.write_int8_weights, needs_bf16=True),
    Form("onnxruntime-fp32", "onnxruntime", _ONNX, False, onnx_form.write_fp32),
    Form("onnxruntime-int8", "onnxruntime", _ONNX, False, onnx_form.write_int8),
    Form("onnxruntime-int8-static", "onnxruntime", _ONNX, True, onnx_form.write_int8_static),
    Form("onnxruntime-int4-weights", "onnxruntime", _ONNX, False, onnx_form.write_int4_weights),
    Form("openvino-fp32", "openvino", _OPENVINO, False, openvino_form.write_fp32),
    Form("openvino-bf16", "openvino", _OPENVINO, False, openvino_form.write_bf16, needs_bf16=True),
    Form("openvino-int8", "openvino", _NNCF, True, openvino_form.write_int8),
    Form("openvino-int8-weights", "openvino", _NNCF, False, openvino_form.write_int8_weights),
    Form("openvino-int4-weights", "openvino", _NNCF, False, openvino_form.write_int4_weights),
)}  # fmt: skip


def available() -> dict[str, str]:
    """Form -> why it cannot be made here, or nothing if it can."""
    return {name: _missing(form) for name, form in FORMS.items()}


def _missing(form: Form) -> str:
    missing = [package for package in form.packages if not is_installed(package)]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'ray-orchestrator[{EXTRAS[missing[0]]}]'"
    if form.needs_bf16 and not has_bf16(torch.device("cpu")):
        return "this processor has no bf16 in hardware, and would be slower with it"
    if form.needs_compiler and not has_compiler():
        return "needs a C++ compiler, g++ or clang, wherever it is loaded for the first time"
    return ""
