"""The form that TorchAO makes: linear layers whose weights are int8, as a program that torch alone computes.

In: a network and batches. Out: a program's files. TorchAO quantises modules, and the network computes some of its products
without any: so it is traced first, and each product becomes a module again. What TorchAO makes of it is traced once more;
then its weights are plain numbers, and nobody who loads them needs the package. It runs where torch does, on GPUs too.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from orchestrator.errors import CompressionFailed
from orchestrator.exporting.program_form import write_bf16, write_traced
from orchestrator.exporting.tracing import Batch, quiet, traceable
from orchestrator.models.backbones import Network
from orchestrator.models.program import read_program
from orchestrator.models.runtimes import needed

_LEAST_SHARE = 0.25
"""Of the weights, that linear layers hold: below it there is nothing to gain."""


def write_int8_weights(network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Weights of linear layers stored in int8, with a scale per channel; they and all the rest are computed with in bf16."""
    quantization = needed("torchao.quantization")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_bf16(network, batches, Path(scratch))
        module = read_program(Path(scratch))
    share = _with_linear_layers(module)
    if share < _LEAST_SHARE:
        raise CompressionFailed(f"linear layers hold {share:.0%} of its weights, and TorchAO makes no others smaller",
                                "choose another form")  # fmt: skip
    with quiet():
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    write_traced(replace(traceable(network, batches, torch.bfloat16), module=_ByPosition(module)), folder, "bf16")


class _ByPosition(nn.Module):
    """Called as what is traced otherwise."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(*tensors)
        return logits


def _with_linear_layers(module: fx.GraphModule) -> float:
    """Products with weights become modules, in place; returns what share of the weights these hold."""
    weights = sum(parameter.numel() for parameter in module.parameters())
    found = 0
    for number, node in enumerate(list(module.graph.nodes)):
        if node.target is torch.ops.aten.linear.default and node.args[1].op == "get_attr":
            layer = _linear(*(operator.attrgetter(str(n.target))(module) for n in node.args[1:] if n is not None))
            found += layer.weight.numel()
            module.add_submodule(f"linear_{number}", layer)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(f"linear_{number}", (node.args[0],)))
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return found / max(1, weights)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    linear: nn.Linear = layer
    return linear
