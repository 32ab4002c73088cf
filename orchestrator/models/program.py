"""A traced network as plain data: ``program.json`` lists its operators, ``model.safetensors`` holds its weights.

In: the two files. Out: a module that runs them, without the code the network was traced from. Reading them runs no code of
theirs: an operator must be one of torch's own (``torch.ops.aten``, or arithmetic on sizes), and arguments are numbers, names
of other results or of weights, and a few enumerations. ``torch.export.load`` would not do: it unpickles the example
inputs in its archive, falls back to unpickling anything, evaluates strings as expressions, and looks up functions by
any name below ``torch``.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import fx, nn

from orchestrator.errors import IntegrityError

PROGRAM = "program.json"
PROGRAM_WEIGHTS = "model.safetensors"
FORMAT = 1
SIZES: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv",
                                                  "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")},
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc,
}  # fmt: skip
"""What a program may compute beside tensors: with their sizes, and with operators that give several results."""
ENUMERATIONS = ("dtype", "layout", "memory_format")
"""Arguments that are attributes of torch, by the type's name."""
_TOUCH_FILES = ("from_file", "save")


def read_program(folder: Path) -> fx.GraphModule:
    """The module that answers as the traced network did. It takes the inputs by position, in the order of config.json.

    Raises:
        IntegrityError: the file asks for something that is not an operator of torch.
    """
    weights = load_file(folder / PROGRAM_WEIGHTS)
    try:
        program = json.loads((folder / PROGRAM).read_text(encoding="utf-8"))
        if program["format"] != FORMAT:
            raise ValueError(f"is of format {program['format']!r}, this package reads {FORMAT}")
        return fx.GraphModule(_holder(weights), _graph(program, weights))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / PROGRAM} cannot be read ({error})", "compress the model again") from None


def move_constants(module: fx.GraphModule, device: torch.device) -> None:
    """Have tensors that the program makes be made on ``device``."""
    made = [node for node in module.graph.nodes if "device" in node.kwargs]
    for node in made:
        node.update_kwarg("device", device)
    if made:
        module.recompile()


class _Holder(nn.Module):
    """Weights under flat names, as attributes that a graph can ask for."""


def _holder(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    holder = _Holder()
    for name, tensor in weights.items():
        if not name.isidentifier():
            raise ValueError(f"the weight {name!r} has no plain name")
        own = tensor.clone()  # out of the mapped file: aligned, and there when the file is not
        if own.is_floating_point():
            holder.register_parameter(name, nn.Parameter(own, requires_grad=False))
        else:
            holder.register_buffer(name, own)
    return holder


def _graph(program: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> fx.Graph:
    graph = fx.Graph()
    results: dict[str, fx.Node] = {name: graph.placeholder(f"input_{i}") for i, name in enumerate(program["inputs"])}
    held = {name: graph.get_attr(name) for name in weights}
    for step in program["steps"]:
        arguments = tuple(_value(value, results, held) for value in step["args"])
        options = {str(name): _value(value, results, held) for name, value in step["kwargs"].items()}
        results[step["name"]] = graph.call_function(_function(step["op"]), arguments, options)
    graph.output(results[program["output"]])
    graph.lint()
    return graph


def _function(name: str) -> Callable[..., Any]:
    """``aten.linear.default`` or ``sizes.mul``. Raises ValueError for anything else."""
    space, _, rest = name.partition(".")
    if space == "sizes" and rest in SIZES:
        return SIZES[rest]
    family, _, overload = rest.partition(".")
    if space == "aten" and family not in _TOUCH_FILES:
        found = getattr(getattr(torch.ops.aten, family, None), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise ValueError(f"{name!r} is no operator of this torch")


def _value(value: Any, results: Mapping[str, fx.Node], held: Mapping[str, fx.Node]) -> Any:
    """An argument as it was before ``exporting/program_form.py`` wrote it down."""
    if isinstance(value, list):
        return [_value(one, results, held) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, told),) = value.items()
    if kind == "result":
        return results[told]
    if kind == "weight":
        return held[told]
    if kind == "number":
        return float(told)
    if kind == "device":
        return torch.device("cpu")
    found = getattr(torch, told, None) if kind in ENUMERATIONS else None
    if found is None or type(found).__name__ != kind:
        raise ValueError(f"{value!r} is no argument of an operator")
    return found
