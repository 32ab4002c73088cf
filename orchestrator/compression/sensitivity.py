"""How much the loss hangs on each part of a network, from a few hundred labelled rows.

In: a network and batches. Out: a ``Sensitivity``, which is plain numbers. One forward and backward pass per batch tells of
all heads, units and filters: the first-order Taylor expansion of the loss in a factor on a part's result (Molchanov et al.
2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference"; of heads: Michel et al. 2019). For each layer,
one more forward pass without it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from orchestrator.compression.matrices import is_matrix
from orchestrator.compression.parts import attentions, feed_forwards, longest_row, token_tables, tokens_of
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import ReshapedNetwork, drop_layers, library_logits

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]
"""Inputs, and labels int64 [rows]."""
Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Sensitivity:
    """In units of the loss (nats per row), by paths of modules. Higher: rather keep it."""

    rows: int = 0
    loss: float = 0.0
    """Of the network as it is."""
    layers: list[float] = field(default_factory=list)
    """Rise of the loss without each; infinite where the network does not run without it."""
    heads: Scores = field(default_factory=dict)
    """Attention -> of each head."""
    units: Scores = field(default_factory=dict)
    """Contracting matrix of a feed-forward pair -> of each of its inputs."""
    filters: Scores = field(default_factory=dict)
    """Convolution or batch norm -> of each of its channels."""
    inputs: Scores = field(default_factory=dict)
    """Matrix -> mean square of each of its inputs, over rows and tokens."""
    tokens: list[int] = field(default_factory=list)
    """How often each token comes; empty where the network reads none."""

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"layers": [rise if math.isfinite(rise) else None for rise in self.layers]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        layers = [math.inf if rise is None else float(rise) for rise in values["layers"]]
        return cls(**{**values, "layers": layers})

    def keeping(self, kind: str, place: str, kept: Sequence[int]) -> Self:
        """Of the network in which ``place`` has only these left; ``kind``: a field of scores."""
        scores: Scores = getattr(self, kind)
        if place not in scores:
            return self
        left: dict[str, Any] = {kind: scores | {place: [scores[place][position] for position in kept]}}
        return replace(self, **left)

    def keeping_layers(self, path: str, numbers: Mapping[str, str], kept: Sequence[int]) -> Self:
        """Of the network whose row at ``path`` has only these left; ``numbers``: a layer's name in the row -> its new name."""

        def left(scores: Scores) -> Scores:
            renamed = ((_renamed(place, path, numbers), values) for place, values in scores.items())
            return {place: values for place, values in renamed if place is not None}

        parts: dict[str, Any] = {kind: left(getattr(self, kind)) for kind in ("heads", "units", "filters", "inputs")}
        return replace(self, layers=[self.layers[position] for position in kept], **parts)


def _renamed(place: str, path: str, numbers: Mapping[str, str]) -> str | None:
    if not place.startswith(path + "."):
        return place
    name, dot, rest = place.removeprefix(path + ".").partition(".")
    return f"{path}.{numbers[name]}{dot}{rest}" if name in numbers else None


def measure_sensitivity(network: Network, batches: Iterable[Batch]) -> Sensitivity:
    """Of all that can be taken out. ``network`` stays as it is; the measuring is done on a copy, in evaluation mode."""
    inner = network.inner if isinstance(network, ReshapedNetwork) else network
    subject, device = copy.deepcopy(inner).eval(), next(inner.parameters()).device
    subject.zero_grad(set_to_none=True)
    every = [({name: t.to(device) for name, t in inputs.items()}, labels.to(device)) for inputs, labels in batches]
    rows = sum(len(labels) for _, labels in every)
    taylor, norms = _taylor(subject, every)
    loss = _loss(subject, every)
    scores: dict[str, Any] = {
        kind: {place: (values / rows).tolist() for place, values in taylor[kind].items()} for kind in _KINDS
    }
    rises = [rise / rows for rise in _rises(subject, every, loss)]
    tokens = count_tokens(subject, (inputs["input_ids"] for inputs, _ in every if "input_ids" in inputs))
    return Sensitivity(rows=rows, loss=loss / rows, layers=rises, inputs=norms, tokens=tokens, **scores)


def count_tokens(network: Network, ids: Iterable[torch.Tensor]) -> list[int]:
    """How often each token of the network's table comes in these; empty where it has no such table."""
    names = token_tables(network)
    if not names:
        return []
    counts = torch.zeros(tokens_of(network.get_submodule(names[0])), dtype=torch.int64)
    for part in ids:
        counts += torch.bincount(part.flatten().cpu(), minlength=len(counts))
    found: list[int] = counts.tolist()
    return found


_KINDS = ("heads", "units", "filters")


def _taylor(subject: Network, batches: Sequence[Batch]) -> tuple[dict[str, dict[str, torch.Tensor]], Scores]:
    """Sums over rows of each part's score, and mean squares of inputs."""
    sums: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in _KINDS}
    frozen = [parameter for parameter in subject.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # so that gradients get everywhere
    with torch.enable_grad(), _gates(subject, sums), _squares(subject) as squares:
        for inputs, labels in batches:
            functional.cross_entropy(library_logits(subject, inputs).float(), labels, reduction="sum").backward()
            _add_filters(subject, sums["filters"])
            subject.zero_grad(set_to_none=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sums, {place: (total / max(1, count)).tolist() for place, (total, count) in squares.items()}


@contextmanager
def _gates(subject: Network, sums: dict[str, dict[str, torch.Tensor]]) -> Iterator[None]:
    """In the block, backward passes add |gradient of a factor on the part's result|, row by row."""
    watched = [("heads", a.name, a.out, a.heads) for a in attentions(subject)]
    watched += [("units", f.down, f.down, f.units) for f in feed_forwards(subject)]
    handles = [
        subject.get_submodule(path).register_forward_pre_hook(_gate(sums[kind], place, parts))
        for kind, place, path, parts in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate(
    sums: dict[str, torch.Tensor], place: str, parts: int
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        values = arguments[0]

        def add(gradient: torch.Tensor) -> None:
            by_part = (gradient * values.detach()).float().unflatten(-1, (parts, -1)).sum(-1)
            total = by_part.reshape(len(by_part), -1, parts).sum(1).abs().sum(0)
            sums[place] = sums[place] + total if place in sums else total

        if values.requires_grad:
            values.register_hook(add)

    return hook


@contextmanager
def _squares(subject: Network) -> Iterator[dict[str, tuple[torch.Tensor, int]]]:
    """In the block, forward passes add up the squares of what each matrix is given, and count."""
    squares: dict[str, tuple[torch.Tensor, int]] = {}

    def watch(place: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            values = arguments[0].detach().float().flatten(0, -2)
            total, count = squares.get(place, (torch.zeros(values.shape[-1], device=values.device), 0))
            squares[place] = total + values.square().sum(0), count + len(values)

        return hook

    matrices = [(name, module) for name, module in subject.named_modules() if is_matrix(module)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in matrices]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _add_filters(subject: Network, sums: dict[str, torch.Tensor]) -> None:
    """What a factor on a channel would have got as gradient is that of its weights times these."""
    for name, module in subject.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
            terms = [p.detach() * p.grad for p in module.parameters(recurse=False) if p.grad is not None]
            if terms:
                total = torch.stack([term.reshape(len(term), -1).sum(1).float() for term in terms]).sum(0).abs()
                sums[name] = sums[name] + total if name in sums else total


def _loss(subject: Network, batches: Sequence[Batch]) -> float:
    """Sum over the rows."""
    with torch.no_grad():
        losses = [
            functional.cross_entropy(library_logits(subject, inputs).float(), labels, reduction="sum")
            for inputs, labels in batches
        ]
    return float(torch.stack(losses).double().sum())


def _rises(subject: Network, batches: Sequence[Batch], loss: float) -> list[float]:
    row = longest_row(subject)
    return [_loss_without(subject, row.path, row.length, n, batches) - loss for n in range(row.length)] if row else []


def _loss_without(subject: Network, path: str, length: int, layer: int, batches: Sequence[Batch]) -> float:
    smaller = copy.deepcopy(subject)
    try:
        drop_layers(smaller, path, [n for n in range(length) if n != layer])
        loss = _loss(smaller, batches)
    except Exception:  # noqa: BLE001  of convolutional networks, some change the number of channels
        return math.inf
    return loss if math.isfinite(loss) else math.inf
