"""The forms that torch itself computes: operators and weights as plain data.

In: a network and a batch. Out: ``program.json``, ``model.safetensors`` and config.json in a folder, for ``models/program.py``
to read or ``models/compiled.py`` to compile. ``torch.export`` traces; what depends on weights alone is computed here once,
batch norms become part of the convolutions before them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from orchestrator.errors import CompressionFailed
from orchestrator.exporting.tracing import Batch, Traceable, quiet, traceable
from orchestrator.models.backbones import Network
from orchestrator.models.compiled import CompiledNetwork
from orchestrator.models.program import ENUMERATIONS, FORMAT, PROGRAM, PROGRAM_WEIGHTS, SIZES
from orchestrator.models.runtimes import Answering

_SIZES_BY_FUNCTION = {function: name for name, function in SIZES.items()}
_CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range",
           "sym_constrain_range_for_size")  # fmt: skip
"""Operators that only look: what they check was checked when tracing."""
_UNCHANGED = ("dropout", "alias", "detach", "detach_", "lift_fresh_copy")
"""In evaluation, these give back their first argument."""


def write_fp32(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    write_traced(traceable(network, batches), folder, "fp32")


def write_bf16(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights and everything but the logits in bf16: half the bytes."""
    write_traced(traceable(network, batches, torch.bfloat16), folder, "bf16")


def write_compiled_fp32(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """For inductor; compiled at once, to see that it can be."""
    write_traced(traceable(network, batches), folder, "fp32", compiled=True)
    with quiet():
        CompiledNetwork.load(folder)


def write_compiled_bf16(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    write_traced(traceable(network, batches, torch.bfloat16), folder, "bf16", compiled=True)
    with quiet():
        CompiledNetwork.load(folder)


def write_traced(traced: Traceable, folder: Path, precision: str, *, compiled: bool = False) -> None:
    """Raises CompressionFailed where it has what a program cannot."""
    with quiet(), torch.no_grad():
        program = traced.exported()
        steps, weights, output = _written(program)
    save_file(weights, folder / PROGRAM_WEIGHTS, metadata={"format": "pt"})
    content = {"format": FORMAT, "inputs": [f"input_{i}" for i in range(len(traced.names))], "steps": steps,
               "output": output}  # fmt: skip
    (folder / PROGRAM).write_text(json.dumps(content), encoding="utf-8")
    library, shapes = ("compiled", tuple(tuple(t.shape) for t in traced.example)) if compiled else ("program", ())
    Answering(library, traced.classes, traced.names, traced.parameters, precision, shapes=shapes).write(folder)


Written = tuple[list[dict[str, Any]], dict[str, torch.Tensor], str]


def _written(program: torch.export.ExportedProgram) -> Written:
    """Steps, the weights they ask for, and the name of the step that gives the logits."""
    writer = _Writer(_constants(program))
    for node in program.graph.nodes:
        writer.take(node)
    return writer.finished()


def _constants(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Placeholder -> the parameter, buffer or constant that it stands for."""
    signature = program.graph_signature
    held: dict[str, torch.Tensor] = {}
    for placeholder, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        held[placeholder] = program.state_dict[name] if name in program.state_dict else program.constants[name]
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        held[placeholder] = program.constants[name]
    return held


class _Writer:
    """Goes through a graph once, and keeps of each node a step, a constant, or what it is the same as."""

    def __init__(self, constants: Mapping[str, torch.Tensor]) -> None:
        self.constants = constants
        self.known: dict[fx.Node, torch.Tensor] = {}
        """Nodes that depend on weights alone."""
        self.names: dict[fx.Node, str] = {}
        self.steps: list[dict[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.output = ""
        self._inputs = 0

    def take(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self.output = self._argument(node.args[0][0])["result"]  # type: ignore[index]
        elif node.op == "call_function":
            self._call(node)
        elif node.op != "get_attr" or node.users:  # a submodule of a switched-off check has no user left
            raise _unsupported(f"{node.op} {node.target}")

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.constants:
            self.known[node] = self.constants[node.name].detach()
        else:
            self.names[node] = f"input_{self._inputs}"
            self._inputs += 1

    def _call(self, node: fx.Node) -> None:
        if self._depends_on_weights_alone(node):
            self.known[node] = node.target(*map(self._held, node.args), **node.kwargs)  # type: ignore[operator]
            return
        name = _operator(node.target)
        short = name.split(".")[1]
        if short in _CHECKS:
            return
        if short in _UNCHANGED:
            self._same(node, node.args[0])
        elif short == "batch_norm" and self._into_convolution(node):
            pass
        else:
            self._step(node, name)

    def _same(self, node: fx.Node, as_: Any) -> None:
        if as_ in self.known:
            self.known[node] = self.known[as_]
        else:
            self.names[node] = self.names[as_]

    def _held(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self.known.__getitem__)

    def _depends_on_weights_alone(self, node: fx.Node) -> bool:
        inputs, result = node.all_input_nodes, _meta(node)
        if not inputs or any(one not in self.known for one in inputs) or not isinstance(result, torch.Tensor):
            return False
        # what is stored in int8 stays so until it is used
        return not (result.is_floating_point() and any(self.known[one].dtype is torch.int8 for one in inputs))

    def _step(self, node: fx.Node, name: str) -> None:
        self.names[node] = node.name
        self.steps.append({"name": node.name, "op": name, "args": [self._argument(a) for a in node.args],
                           "kwargs": {key: self._argument(a) for key, a in node.kwargs.items()}})  # fmt: skip

    def _into_convolution(self, node: fx.Node) -> bool:
        """A batch norm right after a convolution, as other weights of that convolution."""
        before, *norm = node.args
        if not (
            isinstance(before, fx.Node) and before.target is torch.ops.aten.conv2d.default and len(before.users) == 1
        ):
            return False
        convolution = next((step for step in self.steps if step["name"] == self.names.get(before)), None)
        if convolution is None or any(value is not None and value not in self.known for value in norm[:4]):
            return False
        scale, shift, mean, variance = (None if value is None else self.known[value] for value in norm[:4])  # type: ignore[index]
        bias = before.args[2] if len(before.args) > 2 else None
        weight, bias = fuse_conv_bn_weights(
            self.known[before.args[1]], None if bias is None else self.known[bias],  # type: ignore[index]
            mean, variance, node.args[7], scale, shift,  # type: ignore[arg-type]
        )  # fmt: skip
        rest = convolution["args"][3:]
        convolution["args"] = [convolution["args"][0], self._weight(f"{before.name}_weight", weight),
                               self._weight(f"{before.name}_bias", bias), *rest]  # fmt: skip
        self.names[node] = self.names[before]
        return True

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._weight(value.name, self.known[value]) if value in self.known else {"result": self.names[value]}
        if isinstance(value, (list, tuple)):
            return [self._argument(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}
        if isinstance(value, torch.device):
            return {"device": value.type}
        if type(value).__name__ in ENUMERATIONS:
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise _unsupported(f"an argument of type {type(value).__name__}")

    def _weight(self, name: str, tensor: torch.Tensor) -> dict[str, str]:
        self.weights[name] = tensor
        return {"weight": name}

    def finished(self) -> Written:
        asked = set(_asked(self.steps))  # a convolution's first weights are no longer
        weights = {name: tensor.detach().clone(memory_format=torch.contiguous_format)
                   for name, tensor in self.weights.items() if name in asked}  # fmt: skip
        return self.steps, weights, self.output


def _asked(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for one in value for name in _asked(one)]
    if isinstance(value, dict):
        return [value["weight"]] if value.keys() == {"weight"} else _asked(list(value.values()))
    return []


def _operator(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    if target in _SIZES_BY_FUNCTION:
        return f"sizes.{_SIZES_BY_FUNCTION[target]}"
    raise _unsupported(str(target))


def _meta(node: fx.Node) -> Any:
    return node.meta.get("val")


def _unsupported(what: str) -> CompressionFailed:
    return CompressionFailed(f"this network cannot be written as a program of torch's operators: it has {what}",
                             "choose another form")  # fmt: skip
