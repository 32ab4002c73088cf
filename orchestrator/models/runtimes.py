"""Networks that another runtime computes: ONNX Runtime, OpenVINO, or a traced torch program.

In: a folder that ``exporting/forms.py`` wrote: the runtime's own files, and a config.json with the number of classes, the
names of the inputs and the number of parameters. Out: ``Network``s that answer and cannot be trained. They need neither the
code nor the package that the network was made of. Threads: as many as torch has when the network is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from orchestrator.errors import IntegrityError, UserError
from orchestrator.models.backbones import CONFIG, Network
from orchestrator.models.hardware import has_bf16
from orchestrator.models.program import move_constants, read_program

ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"
_TOKENS, _MASK = "input_ids", "attention_mask"
_FEW = 16
"""Texts that are computed one after another, each as short as it is: faster than a batch whose shape is new."""
EXTRAS: Mapping[str, str] = {
    "onnx": "compress", "onnxscript": "compress", "onnxruntime": "compress", "openvino": "openvino", "nncf": "openvino",
    "torchao": "torchao",
}  # fmt: skip
"""Package -> the extra of this project that brings it."""


@dataclass(frozen=True)
class Answering:
    """What config.json says of a network that a runtime computes."""

    library: str
    classes: int
    inputs: tuple[str, ...]
    """Names of the tensors it is called with, in the order of the runtime's own."""
    parameters: int
    """Of the network it was made of."""
    precision: str = "fp32"
    """``bf16``: compute so what is neither int8 nor int4, where the hardware can; else all of that in fp32."""
    lengths: tuple[int, ...] = ()
    """Ascending: numbers of tokens that a text which comes alone is padded to, each with a graph of its own."""
    padding: int = 0
    """Token that it is padded with."""
    alone: bool = False
    """Whether an image that comes alone has a graph of its own."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of an example's tensors, for a program that is compiled."""

    @classmethod
    def read(cls, folder: Path) -> Answering:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        try:
            return cls(config["library"], config["classes"], tuple(config["inputs"]), config["parameters"],
                       config.get("precision", "fp32"), tuple(config.get("lengths", ())),
                       config.get("padding", 0), config.get("alone", False),
                       tuple(tuple(shape) for shape in config.get("shapes", ())))  # fmt: skip
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"{folder / CONFIG} lacks {error}", "compress the model again") from None

    def write(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(self.__dict__, indent=2), encoding="utf-8")


class RuntimeNetwork(Network):
    """A network that answers and cannot be trained."""

    def __init__(self, answering: Answering) -> None:
        super().__init__()
        self.answering = answering
        self.arranges_rows = False
        """Whether it sees to padding itself, and is best given all rows at once."""
        self.stated_parameters = answering.parameters
        """For ``count_parameters``: what a runtime holds are no torch parameters."""

    def save(self, folder: Path) -> None:
        raise TypeError(f"a {type(self).__name__} is not saved again: copy the folder it was loaded from")

    def in_bf16(self) -> Network:
        return self  # it computes as it was exported

    def recompute(self) -> None:
        raise TypeError(f"a {type(self).__name__} cannot be trained")

    def moving(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        raise TypeError(f"a {type(self).__name__} cannot be trained")


class OnnxRuntimeNetwork(RuntimeNetwork):
    """``model.onnx`` in an ONNX Runtime session on the CPU."""

    def __init__(self, answering: Answering, session: Any) -> None:
        super().__init__(answering)
        self._session = session

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(Answering.read(folder), onnx_session(folder / ONNX_FILE, torch.get_num_threads()))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        (logits,) = self._session.run(None, _arrays(inputs, self.answering))
        return torch.from_numpy(logits).to(_device_of(inputs))


class OpenVinoNetwork(RuntimeNetwork):
    """``model.xml`` and ``model.bin``, compiled by OpenVINO for the CPU.

    A batch whose shape is not that of the one before costs a small network more than its products do. So what comes alone has
    graphs that never see another shape: of an image one, of a text some, to whose lengths it is padded.
    """

    def __init__(self, answering: Answering, compiled: Any, singles: Mapping[int, Any], alone: Any = None) -> None:
        """``singles``: for each of ``answering.lengths``, compiled for one text of so many tokens. ``alone``: for one input as
        it is."""
        super().__init__(answering)
        self._request = compiled.create_infer_request()
        self._singles = {tokens: one.create_infer_request() for tokens, one in singles.items()}
        self._alone = alone.create_infer_request() if alone else None
        self.arranges_rows = bool(singles)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> Self:
        answering = Answering.read(folder)
        precision = "bf16" if answering.precision == "bf16" and has_bf16(torch.device("cpu")) else "f32"
        file, threads = folder / OPENVINO_FILE, torch.get_num_threads()
        singles = {n: openvino_compiled(_for_one(file, n), precision, threads) for n in answering.lengths}
        alone = openvino_compiled(_for_one(file), precision, threads) if answering.alone else None
        return cls(answering, openvino_compiled(file, precision, threads), singles, alone)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        arrays = _arrays(inputs, self.answering)
        rows = len(next(iter(arrays.values())))
        with self._lock:  # a request holds its own tensors
            if rows == 1 or (self._singles and rows <= _FEW):
                singly = ({name: array[[row]] for name, array in arrays.items()} for row in range(rows))
                logits = np.concatenate([self._infer(*self._fitting(one)) for one in singly])
            else:
                logits = self._infer(self._request, arrays)
        return torch.from_numpy(logits).to(_device_of(inputs))

    def _fitting(self, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
        """Who answers this one input, and what it is given."""
        if self._alone:
            return self._alone, arrays
        tokens = next(iter(arrays.values())).shape[1]
        if _MASK in arrays:  # what a longer neighbour made it be padded with
            tokens = int(np.flatnonzero(arrays[_MASK])[-1]) + 1
        length = next((n for n in self.answering.lengths if n >= tokens), None)
        if length is None:
            return self._request, arrays
        padded = {}
        for name, array in arrays.items():
            padded[name] = np.full((1, length), self.answering.padding if name == _TOKENS else 0, array.dtype)
            padded[name][:, :tokens] = array[:, :tokens]
        return self._singles[length], padded

    def _infer(self, request: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        result = request.infer([arrays[name] for name in self.answering.inputs], share_inputs=True)
        return np.array(result[0], np.float32)


def _for_one(file: Path, tokens: int | None = None) -> Any:
    """The openvino.Model in ``file``, for one text of so many tokens, or one input whose other sizes are all known."""
    openvino = needed("openvino")
    model = openvino.Core().read_model(str(file))
    sizes = {port: list(port.partial_shape)[1:] if tokens is None else [tokens] for port in model.inputs}
    model.reshape({port: openvino.PartialShape([1, *rest]) for port, rest in sizes.items()})
    return model


class ProgramNetwork(RuntimeNetwork):
    """``program.json`` and ``model.safetensors``: operators of torch, without the Python that called them."""

    def __init__(self, answering: Answering, module: torch.fx.GraphModule) -> None:
        super().__init__(answering)
        self.module = module

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(Answering.read(folder), read_program(folder))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(_device_of(inputs).type, enabled=False):  # of an ensemble, whose other members may want it
            logits: torch.Tensor = self.module(*(inputs[name] for name in self.answering.inputs))
        return logits

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As always, and what the program makes itself moves along."""
        super()._apply(fn, recurse)
        weight = next(self.module.parameters(), None)
        if weight is not None:
            move_constants(self.module, weight.device)
        return self


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def needed(package: str) -> Any:
    """The module, imported now. Raises UserError naming the extra that brings it."""
    # OpenVINO and NNCF send usage data through this package, and do without where it cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = EXTRAS.get(package.partition(".")[0], "compress")
        raise UserError(
            f"this model needs the package {package}, which cannot be imported ({error})",
            f"pip install 'ray-orchestrator[{extra}]'",
        ) from None


def onnx_session(file: Path, threads: int) -> Any:
    """An onnxruntime.InferenceSession on the CPU, which says nothing but errors."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Threads that wait by spinning take the cores from other replicas on this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def openvino_compiled(model: Any, precision: str, threads: int) -> Any:
    """An openvino.CompiledModel for the CPU. ``model``: a file or an openvino.Model; ``precision``: ``f32`` or ``bf16``."""
    openvino = needed("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # several replicas would be pinned to the same cores
    }
    return openvino.Core().compile_model(str(model) if isinstance(model, Path) else model, "CPU", settings)


def _arrays(inputs: Mapping[str, torch.Tensor], answering: Answering) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(inputs[name].detach().cpu().numpy()) for name in answering.inputs}


def _device_of(inputs: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(inputs.values())).device
