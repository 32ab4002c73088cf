"""Networks that are no longer what their architecture's code builds: fewer layers, narrower modules, factored matrices.

In: a network of a library whose modules were made smaller, and how its architecture is built. Out: a ``Network`` that trains,
saves and loads as any other: the saved folder holds a ``Blueprint`` of what differs, and the shapes of its tensors tell the
rest. Parameters keep the names they had. Knows no importance: ``compression`` decides what goes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.errors import CompressionFailed, IntegrityError
from orchestrator.models.backbones import (
    CONFIG,
    WEIGHTS,
    Network,
    TorchvisionNetwork,
    TransformersNetwork,
    Watched,
    _architecture,
    _quiet_transformers,
)

_ROW_LENGTHS = ("n_layers", "num_layers", "num_hidden_layers")


@dataclass(frozen=True)
class Blueprint:
    """How to build the network again; paths of modules are the network's own."""

    base: dict[str, Any]
    """``of``: the library; and what that needs for its architecture, before anything was taken out."""
    layers: dict[str, list[int]] = field(default_factory=dict)
    """Row of layers -> positions, in the architecture's own row, of those that are left."""
    factored: list[str] = field(default_factory=list)
    """Linear layers that are ``LowRank`` now."""
    shared: list[str] = field(default_factory=list)
    """Embeddings that are ``SharedEmbedding`` now."""
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module -> numbers it computes with that are no longer those its code would set."""
    sparse: list[str] = field(default_factory=list)
    """Weights whose zeros stay zero in training."""
    tokens: list[int | None] = field(default_factory=list)
    """``TransformersNetwork.kept_tokens``."""

    @property
    def of(self) -> str:
        library: str = self.base["of"]
        return library


class LowRank(nn.Sequential):
    """A linear layer whose matrix [out, in] is a product of two, [out, rank] and [rank, in]."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool) -> None:
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


class SharedEmbedding(nn.Embedding):
    """An embedding of fewer rows than there are tokens: some tokens read the row of another."""

    row_of: torch.Tensor
    """int32 [tokens]"""

    def __init__(self, tokens: int, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("row_of", torch.zeros(tokens, dtype=torch.int32))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(self.row_of[input], self.weight)


class ReshapedNetwork(Network):
    """What is left of a network. ``model`` and the names of its parameters are as before."""

    def __init__(self, inner: Network, blueprint: Blueprint) -> None:
        super().__init__()
        self._inner = (inner,)  # in a tuple: its modules are registered once, under ``model``
        self.model = inner.get_submodule("model")
        self.blueprint = blueprint
        self.training = inner.training
        for name in blueprint.sparse:
            _keep_zeros(self.get_parameter(name))

    @classmethod
    def of(cls, parent: Network, inner: Network, layers: Mapping[str, list[int]], *, sparse: bool = False) -> Self:
        """``inner``: what ``parent`` became. ``layers``: row -> positions, in the parent's row, of the layers that are left."""
        before = parent.blueprint if isinstance(parent, ReshapedNetwork) else Blueprint(base_of(parent))
        rows = dict(before.layers)
        for path, kept in layers.items():
            rows[path] = [rows[path][position] for position in kept] if path in rows else list(kept)
        weights = sparse_weights(inner) if sparse else [n for n in before.sparse if n in dict(inner.named_parameters())]
        return cls(inner, _described(inner, before.base, rows, weights))

    @property
    def inner(self) -> Network:
        """A network of its library."""
        return self._inner[0]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        tracing = torch.compiler.is_exporting() or torch.jit._trace.is_tracing()
        if tracing and not self.blueprint.tokens:  # ours looks at the values of the mask
            return library_logits(self.inner, inputs)
        logits: torch.Tensor = self.inner(**inputs)
        return logits

    def watched(self, **inputs: torch.Tensor) -> Watched:
        """Logits and hidden states after each layer or stage, as the inner network has them."""
        return self.inner.watched(**inputs)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.inner.training = mode
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        try:
            blueprint = Blueprint(**config["blueprint"])
            inner = _built(blueprint, {name: tensor.shape for name, tensor in state.items()})
            inner.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise IntegrityError(
                f"{folder} holds no network that its {CONFIG} describes ({reason})",
                "use the version of the libraries that it was made with, or compress the model again",
            ) from None
        return cls(inner, blueprint)

    def save(self, folder: Path) -> None:
        # Copies: weights that two modules share would be refused.
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = {"library": "reshaped", "of": self.blueprint.of, "blueprint": asdict(self.blueprint)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    def recompute(self) -> None:
        self.inner.recompute()

    def moving(self, move: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        return self.inner.moving(move)


def library_logits(network: Network, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits [batch, classes] with every module called as its library calls it, whatever faster way the network knows.

    So all layers see all tokens.
    """
    if isinstance(network, ReshapedNetwork):
        return library_logits(network.inner, inputs)
    if isinstance(network, TransformersNetwork):
        logits: torch.Tensor = network.model(**inputs).logits
        return logits
    answered: torch.Tensor = network(**inputs)
    return answered


def drop_layers(network: nn.Module, path: str, kept: list[int]) -> None:
    """Leave of the row of modules at ``path`` those at these positions, in place, and what counts them in line with it."""
    row = network.get_submodule(path)
    names, modules = list(row._modules), list(row._modules.values())
    if all(name.isdigit() for name in names):
        names = [str(number) for number in range(len(names))]
        left = dict(zip(names, (modules[position] for position in kept), strict=False))
    else:
        left = {names[position]: modules[position] for position in kept}
    row._modules.clear()
    row._modules.update(left)
    for number, position in enumerate(kept):  # where in a decoder's cache a layer finds its own
        for module in modules[position].modules():  # type: ignore[union-attr]
            if vars(module).get("layer_idx") == position:
                module.layer_idx = number
    owner = network.get_submodule(path.rpartition(".")[0])
    for name in _ROW_LENGTHS:
        if vars(owner).get(name) == len(modules):
            setattr(owner, name, len(kept))
    _shorten_config(getattr(network.get_submodule("model"), "config", None), len(modules), kept)


def base_of(network: Network) -> dict[str, Any]:
    """What ``_BUILDERS`` needs to build this network's architecture.

    Raises CompressionFailed for a network that is no library's, such as an ensemble.
    """
    if isinstance(network, ReshapedNetwork):
        return network.blueprint.base
    if isinstance(network, TransformersNetwork):
        config: Any = network.model.config
        return {"of": "transformers", "config": json.loads(config.to_json_string(use_diff=False))}
    if isinstance(network, TorchvisionNetwork):
        return {"of": "torchvision", "architecture": network.architecture, "classes": network.classes,
                "dropout": network.dropout}  # fmt: skip
    raise CompressionFailed(
        f"nothing can be taken out of a {type(network).__name__}", "compress the network that it was made of"
    )


def sparse_weights(network: nn.Module) -> list[str]:
    """Names of the matrices and filters that have zeros; an embedding has some for the padding token."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    weights = [(name, weight) for name, weight in network.named_parameters() if weight.ndim > 1]
    return [name for name, weight in weights if id(weight) not in tables and bool((weight == 0).any())]


def _keep_zeros(weight: nn.Parameter) -> None:
    """No gradient reaches a weight that is zero; neither does AdamW's decay move it. (FSDP makes other parameters of these.)"""
    if weight.requires_grad:
        weight.register_hook(lambda gradient: gradient * (weight != 0))


# ------------------------------------------------------------------------------------------------------------ building


def _transformers(base: Mapping[str, Any]) -> Network:
    ensure_torchvision()
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = dict(base["config"])
    config = AutoConfig.for_model(settings.pop("model_type")).from_dict(settings)
    with _quiet_transformers(), _uninitialised():
        return TransformersNetwork(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def _torchvision(base: Mapping[str, Any]) -> Network:
    model = _architecture(base["architecture"], pretrained=False)
    return TorchvisionNetwork(model, base["architecture"], base["classes"], base["dropout"])


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Network]] = {
    "transformers": _transformers, "torchvision": _torchvision,
}  # fmt: skip


def _uninitialised() -> AbstractContextManager[None]:
    """Weights that will be overwritten need no random numbers: most of the time of building a large network."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # older than 5.1
        return contextlib.nullcontext()
    without: AbstractContextManager[None] = no_init_weights()
    return without


def _built(blueprint: Blueprint, shapes: Mapping[str, torch.Size]) -> Network:
    """The network with weights that mean nothing, in these shapes."""
    network = _BUILDERS[blueprint.of](blueprint.base)
    for path, kept in blueprint.layers.items():
        drop_layers(network, path, kept)
    for name in blueprint.factored:
        (rank, inputs), (outputs, _) = shapes[f"{name}.0.weight"], shapes[f"{name}.1.weight"]
        put(network, name, LowRank(inputs, rank, outputs, bias=f"{name}.1.bias" in shapes))
    for name in blueprint.shared:
        put(network, name, SharedEmbedding(*shapes[f"{name}.row_of"], *shapes[f"{name}.weight"]))
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.shape != shapes[name]:
            _resize(network, name, tensor, shapes[name])
    if isinstance(network, TransformersNetwork):
        network.kept_tokens = tuple(blueprint.tokens)
    for name, values in blueprint.attributes.items():
        module = network.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    return network


def put(network: nn.Module, name: str, module: nn.Module) -> None:
    """``module`` in the place of the one with this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def _resize(network: nn.Module, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    parent, _, leaf = name.rpartition(".")
    empty = torch.empty(shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        setattr(network.get_submodule(parent), leaf, nn.Parameter(empty, requires_grad=tensor.requires_grad))
    else:
        network.get_submodule(parent)._buffers[leaf] = empty


def _shorten_config(config: Any, length: int, kept: list[int]) -> None:
    """Of transformers: the forward pass reads from it how many layers there are, and what is said of each."""
    if config is None:
        return
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, (list, tuple)) and len(value) == length and name.endswith(("types", "layers")):
                setattr(part, name, [value[position] for position in kept])
        if getattr(part, "num_hidden_layers", None) == length:
            part.num_hidden_layers = len(kept)


def _described(inner: Network, base: dict[str, Any], layers: dict[str, list[int]], sparse: list[str]) -> Blueprint:
    """What to do to a network of the architecture to get ``inner``'s modules, their parameters' shapes apart."""
    plain = _BUILDERS[base["of"]](base)
    for path, kept in layers.items():
        drop_layers(plain, path, kept)
    others = dict(plain.named_modules())
    factored, shared, attributes = [], [], {}
    for name, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, LowRank):
            factored.append(name)
        elif isinstance(module, SharedEmbedding):
            shared.append(name)
        elif name in others and (changed := _changed(module, others[name])):
            attributes[name] = changed
    tokens = list(inner.kept_tokens) if isinstance(inner, TransformersNetwork) else []
    return Blueprint(base, layers, factored, shared, attributes, sparse, tokens)


def _changed(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    before = vars(other)
    return {
        name: list(value) if isinstance(value, (tuple, list)) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_size(value) and _is_size(before.get(name)) and before[name] != value
    }


def _is_size(value: Any) -> bool:
    """Numbers that a module computes with. What is true or false tells how it is used."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(part, int) for part in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)
