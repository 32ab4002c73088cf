"""A network made ready for an exporter, and exporters kept quiet.

In: a ``Network`` and batches as they are collated. Out: a plain module that takes tensors by position and answers logits,
and an example for tracing. What is traced must hold for every batch, so nothing may depend on what the example's padding
happens to be.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from orchestrator.errors import CompressionFailed
from orchestrator.models import post_norm
from orchestrator.models.backbones import Network, TransformersNetwork
from orchestrator.models.reshaped import ReshapedNetwork

Batch = Mapping[str, torch.Tensor]
_EXAMPLE_ROWS = 3
"""An exporter takes a size of 1 for a constant."""
SAME = 1e-3
"""Of a probability: more than another order of fp32 sums makes."""


@dataclass(frozen=True)
class Traceable:
    module: nn.Module
    """Called with ``example``; answers fp32 logits [batch, classes]."""
    names: tuple[str, ...]
    """Of the inputs, in their order."""
    example: tuple[torch.Tensor, ...]
    varying: tuple[tuple[int, ...], ...]
    """Of each input: the dimensions that differ from batch to batch."""
    classes: int
    parameters: int

    @property
    def is_text(self) -> bool:
        return not self.example[0].is_floating_point()

    def exported(self) -> torch.export.ExportedProgram:
        """With the dimensions that vary left open. Raises whatever ``torch.export`` does where it must fix one of them."""
        left_open = tuple(dict.fromkeys(varying, torch.export.Dim.DYNAMIC) for varying in self.varying)
        return torch.export.export(self.module, self.example, dynamic_shapes=(left_open,), strict=False)


def traceable(network: Network, batches: Sequence[Batch], dtype: torch.dtype = torch.float32) -> Traceable:
    """A copy of the network, in evaluation mode. ``dtype``: of its weights."""
    names = tuple(batches[0])
    network = network.inner if isinstance(network, ReshapedNetwork) else network
    module = _ByPosition(_for_tracing(copy.deepcopy(network).cpu().to(dtype)), names, dtype)
    module.eval().requires_grad_(False)
    example = tuple(_rows(batches[0][name].cpu()) for name in names)
    with torch.no_grad():
        classes = module(*example).shape[1]
    varying = tuple((0,) if tensor.is_floating_point() else (0, 1) for tensor in example)
    return Traceable(module, names, example, varying, classes, sum(p.numel() for p in network.parameters()))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat(-(-_EXAMPLE_ROWS // len(tensor)), *[1] * (tensor.dim() - 1))[:_EXAMPLE_ROWS].contiguous()


class _ByPosition(nn.Module):
    """Tensors in a fixed order in, fp32 logits out."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.names, self.dtype = network, names, dtype

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        cast = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        logits: torch.Tensor = self.network(**dict(zip(self.names, cast, strict=True)))
        return logits.float()


class _Masked:
    """An attention mask for ``post_norm``: it counts in every batch, also where the example has no padding."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def all(self) -> bool:
        return False

    def bool(self) -> torch.Tensor:
        return self.mask.bool()


class _TracedTransformers(nn.Module):
    """The pass of a ``TransformersNetwork``, without a branch on the values of a batch.

    The one with less work where there is one: measured on ONNX Runtime and OpenVINO, what it leaves out weighs more than
    what they recognise and fuse in the library's own.
    """

    def __init__(self, network: TransformersNetwork) -> None:
        super().__init__()
        self.model, self.kept = network.model, network.kept_tokens
        self.is_supported = post_norm.is_supported(network.model)  # while tracing, no weight looks as it should

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        if self.is_supported and inputs.keys() == {"input_ids", "attention_mask"}:
            masked: torch.Tensor = _Masked(inputs["attention_mask"])  # type: ignore[assignment]
            return post_norm.forward(self.model, inputs["input_ids"], masked, self.kept)
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


def _for_tracing(module: nn.Module) -> nn.Module:
    """With each ``TransformersNetwork`` in it, also that of a reshaped one or of an ensemble's members, made traceable."""
    if isinstance(module, ReshapedNetwork):
        return _for_tracing(module.inner)
    if type(module) is TransformersNetwork:
        return _TracedTransformers(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _for_tracing(child))
    return module


Converted = TypeVar("Converted")


def first_that_agrees(
    traced: Traceable,
    ways: Sequence[Callable[[], Converted]],
    answers: Callable[[Converted, tuple[torch.Tensor, ...]], np.ndarray],
) -> Converted:
    """What the first way of conversion gave that answers as the network does, on other sizes than the example's too.

    A converter that meets something it does not know raises at best; at worst it makes a constant of what it saw.

    Raises whatever the last way raised, or CompressionFailed if its result answers otherwise.
    """
    questions = _questions(traced)
    for way in ways:
        is_last = way is ways[-1]
        try:
            converted = way()
            distance = max(_distance(wanted, answers(converted, inputs)) for inputs, wanted in questions)
        except Exception:
            if is_last:
                raise
            continue
        if distance < SAME:
            return converted
        if is_last:
            raise CompressionFailed(
                f"the converted network does not answer as the network does: a probability differs by {distance:.2g}",
                "choose another form",
            )
    raise AssertionError("no way of conversion was given")


def _distance(logits: torch.Tensor, answer: np.ndarray) -> float:
    """Largest difference of a probability; infinite where one is no number."""
    difference = (logits.softmax(-1) - torch.from_numpy(answer).softmax(-1)).abs().max().item()
    return difference if difference == difference else float("inf")


def _questions(traced: Traceable) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """Inputs of several sizes, and the logits they should get."""
    whole = traced.example
    variants = [whole, tuple(tensor[:1] for tensor in whole), tuple(tensor.repeat(3, *[1] * (tensor.dim() - 1))[:7]
                                                                    for tensor in whole)]  # fmt: skip
    if traced.is_text:
        tokens = whole[0].shape[1]
        variants += [
            tuple(tensor[:2, : max(1, tokens // 2)] for tensor in whole),
            tuple(torch.cat([tensor[:1], torch.zeros_like(tensor[:1])], 1) for tensor in whole),  # half of it padding
            tuple(tensor.repeat(1, 4) for tensor in whole),
        ]
    questions = []
    with torch.no_grad():
        for inputs in variants:
            with contextlib.suppress(Exception):  # longer than the network's positions
                questions.append((inputs, traced.module(*inputs)))
    return questions


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines, prints or progress bars of the libraries that are used inside."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.CRITICAL)
    silence = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # a warning to the root logger would have given it one
