"""Backbones: from the name in the recipe to a network that gives one logit per class.

In: a backbone's name, weights, labels. Out: a ``Network``: called with the encoder's tensors, it answers logits
[batch, classes]. Knows no data and no loss. One class per family, one table ``NETWORKS``.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from orchestrator.data.combined import part
from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.errors import BackboneError, CompressionFailed, IntegrityError, RecipeError
from orchestrator.models import post_norm
from orchestrator.models.ensemble import Mixture, log_mean_probabilities
from orchestrator.models.recomputing import recompute_sequences
from orchestrator.recipe import Model
from orchestrator.storage import MEMBERS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_DROPOUT_NAMES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout",
                  "attention_dropout", "seq_classif_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # fmt: skip


class Watched(NamedTuple):
    """What a network answered, and how it got there."""

    logits: torch.Tensor
    """[batch, classes]"""
    states: Sequence[torch.Tensor] = ()
    """After each layer or stage, from the inputs' side on: [batch, tokens, width], or [batch, channels, height, width]; none
    where the architecture does not tell."""
    places: Sequence[torch.Tensor] = ()
    """Which token each row of a state belongs to, where a layer may have left some out: int64 [batch, some]; else none."""


class Network(nn.Module):
    """A module that is called with the encoder's tensors and answers logits [batch, classes]."""

    @classmethod
    def create(cls, settings: Model, backbone: str, labels: tuple[str, ...]) -> Self:
        """Backbone as the recipe says, with a fresh head for these labels."""
        raise TypeError(f"{cls.__name__} is abstract")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What ``save`` wrote."""
        raise TypeError(f"{cls.__name__} is abstract")

    def save(self, folder: Path) -> None:
        """Weights as safetensors and a config.json."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def watched(self, **inputs: torch.Tensor) -> Watched:
        """Logits, and the hidden states after each layer or stage."""
        return Watched(self(**inputs))

    def recompute(self) -> None:
        """Keep few activations of the forward pass; the backward pass computes them again.

        Raises RecipeError where the architecture cannot.
        """
        raise TypeError(f"{type(self).__name__} is abstract")

    def moving(self, move: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        """Have forward passes go on from ``move(rows)``: word embeddings [batch, tokens, width], or normalised pixels.

        A context manager: leaving it ends this.
        """
        raise TypeError(f"{type(self).__name__} is abstract")

    def in_bf16(self) -> Network:
        """A copy that stores and multiplies bf16; itself where there is nothing to store."""
        return copy.deepcopy(self).to(torch.bfloat16)

    def train(self, mode: bool = True) -> Self:
        """As always, but a batch norm whose parameters are frozen keeps its statistics, and uses them."""
        super().train(mode)
        for norm in self.modules():
            own = [p.requires_grad for p in norm.parameters(recurse=False)]
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and own and not any(own):
                norm.eval()
        return self


class TransformersNetwork(Network):
    """Any encoder that transformers can put a sequence classification head on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept_tokens: tuple[int | None, ...] = ()
        """Of each layer, how many tokens it passes on at most; None, or nothing: all. See ``post_norm``."""

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        if self._is_post_norm(inputs):
            return post_norm.forward(self.model, **inputs, kept=self.kept_tokens)
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def _is_post_norm(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Raises CompressionFailed where the library would have to compute what it cannot."""
        if inputs.keys() == {"input_ids", "attention_mask"} and post_norm.is_supported(self.model):
            return True
        if self.kept_tokens:
            raise CompressionFailed(
                "a network whose layers leave tokens out has to be as it was made: no adapters, hooks or rounding in it",
                "train it without them, or leave compression.tokens out",
            )
        return False

    def watched(self, **inputs: torch.Tensor) -> Watched:
        if self._is_post_norm(inputs):
            return Watched(*post_norm.watched(self.model, **inputs, kept=self.kept_tokens))
        answer = self.model(**inputs, output_hidden_states=True)
        return Watched(answer.logits, list((answer.hidden_states or ())[1:]))  # the first are the embeddings

    @classmethod
    def create(cls, settings: Model, backbone: str, labels: tuple[str, ...]) -> Self:
        ensure_torchvision()
        from transformers import AutoConfig, AutoModelForSequenceClassification

        folder = text_backbone_folder(backbone)
        config = AutoConfig.from_pretrained(folder)
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        for name in _DROPOUT_NAMES if settings.dropout is not None else ():
            if hasattr(config, name):
                setattr(config, name, settings.dropout)
        with _quiet_transformers():
            if settings.weights == "none":
                return cls(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
            return cls(_from_pretrained(AutoModelForSequenceClassification, folder, backbone, config))

    @classmethod
    def load(cls, folder: Path) -> Self:
        ensure_torchvision()
        from transformers import AutoModelForSequenceClassification

        with _quiet_transformers():
            return cls(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]

    def recompute(self) -> None:
        model: Any = self.model
        if not model.supports_gradient_checkpointing:
            raise RecipeError(f"training.gradient_checkpointing: {type(model).__name__} has none", "set it to false")
        model.config.use_cache = False  # of generation; the library would say that it turns it off
        # Recent versions warn of the older name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def moving(self, move: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        model: Any = self.model
        handle: RemovableHandle = model.get_input_embeddings().register_forward_hook(lambda _, __, rows: move(rows))
        return handle


class TorchvisionNetwork(Network):
    """Any torchvision classification architecture whose last linear layer is its head."""

    def __init__(self, model: nn.Module, architecture: str, classes: int, dropout: float) -> None:
        super().__init__()
        self.model, self.architecture, self.classes, self.dropout = model, architecture, classes, dropout
        name, head = _last_linear(model)
        fresh: nn.Module = nn.Linear(head.in_features, classes)
        _replace(model, name, nn.Sequential(nn.Dropout(dropout), fresh) if dropout else fresh)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixels)
        return logits

    def watched(self, **inputs: torch.Tensor) -> Watched:
        states: list[torch.Tensor] = []

        def note(_: nn.Module, __: tuple[Any, ...], state: Any) -> None:
            if isinstance(state, torch.Tensor) and state.ndim > 2:  # and not the logits of a second head
                states.append(state)

        handles = [stage.register_forward_hook(note) for stage in _stages(self.model)]
        try:
            return Watched(self(**inputs), states)
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def create(cls, settings: Model, backbone: str, labels: tuple[str, ...]) -> Self:
        model = _architecture(backbone, pretrained=settings.weights == "pretrained")
        if settings.weights not in {"pretrained", "none"}:
            _load_state(model, Path(settings.weights))
        return cls(model, backbone, len(labels), settings.dropout or 0.0)

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = _architecture(config["architecture"], pretrained=False)
        network = cls(model, config["architecture"], config["classes"], config["dropout"])
        network.model.load_state_dict(load_file(folder / WEIGHTS))
        return network

    def save(self, folder: Path) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = {"library": "torchvision", "architecture": self.architecture,
                  "classes": self.classes, "dropout": self.dropout}  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    def recompute(self) -> None:
        recompute_sequences(self.model)

    def moving(self, move: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        def hook(
            _: nn.Module, __: tuple[()], inputs: dict[str, torch.Tensor]
        ) -> tuple[tuple[()], dict[str, torch.Tensor]]:
            return (), {"pixels": move(inputs["pixels"])}

        return self.register_forward_pre_hook(hook, with_kwargs=True)


class EnsembleNetwork(Network):
    """Networks of the same labels as one; its logits are the log of the mean of the members' probabilities, or of what a
    mixture makes of them."""

    def __init__(self, members: Sequence[Network], mixture: Mixture | None = None) -> None:
        """``mixture``: None for members that have equal weights, the same inputs and the same order of labels."""
        super().__init__()
        self.members, self.mixture = nn.ModuleList(members), mixture

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        if self.mixture is None:
            return log_mean_probabilities(torch.stack([member(**inputs).float() for member in self.members]))
        seen = {number: part(inputs, number) for number in set(self.mixture.encoders)}
        numbered = zip(self.members, self.mixture.encoders, strict=True)
        return self.mixture.answer([member(**seen[number]) for member, number in numbered])

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        members = [load_network(folder / MEMBERS / str(number)) for number in range(config["members"])]
        return cls(members, Mixture.read(config["mixture"]) if "mixture" in config else None)

    def save(self, folder: Path) -> None:
        write_ensemble_config(folder, len(self.members), self.mixture)
        for number, member in enumerate(self.members):
            place = folder / MEMBERS / str(number)
            place.mkdir(parents=True)
            member.save(place)  # type: ignore[operator]

    def in_bf16(self) -> Network:
        members = cast(list[Network], list(self.members))
        halved = [member.in_bf16() for member in members]
        same = all(new is old for new, old in zip(halved, members, strict=True))
        return self if same else EnsembleNetwork(halved, self.mixture).eval()


def write_ensemble_config(folder: Path, members: int, mixture: Mixture | None = None) -> None:
    config = {"library": "ensemble", "members": members} | ({"mixture": mixture.settings()} if mixture else {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


NETWORKS: Mapping[str, type[Network]] = {
    "transformers": TransformersNetwork, "torchvision": TorchvisionNetwork, "ensemble": EnsembleNetwork,
}  # fmt: skip
"""Library -> its networks. A saved folder says in config.json which one it is; transformers is the unspoken one."""

BUILT_UPON: Mapping[str, tuple[str, str]] = {
    "reshaped": ("orchestrator.models.reshaped", "ReshapedNetwork"),
    "onnxruntime": ("orchestrator.models.runtimes", "OnnxRuntimeNetwork"),
    "openvino": ("orchestrator.models.runtimes", "OpenVinoNetwork"),
    "program": ("orchestrator.models.runtimes", "ProgramNetwork"),
    "compiled": ("orchestrator.models.compiled", "CompiledNetwork"),
}
"""Library -> module and class of networks that build upon the ones here, and are therefore imported when one is loaded."""


def load_network(folder: Path) -> Network:
    """The network of a saved model folder. Raises IntegrityError if config.json names an unknown library."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    library = config.get("library", "transformers")
    if library in BUILT_UPON:
        module, name = BUILT_UPON[library]
        kind: type[Network] = getattr(importlib.import_module(module), name)
        return kind.load(folder)
    if library not in NETWORKS:
        known = ", ".join([*NETWORKS, *BUILT_UPON])
        raise IntegrityError(f"{folder / CONFIG} names the library {library!r}", f"known are {known}")
    return NETWORKS[library].load(folder)


def text_backbone_folder(backbone: str) -> Path:
    """A local folder with the backbone's files: as named, inside an installed package, or from the hub's cache.

    Raises BackboneError when it cannot be had, saying where it was looked for.
    """
    if backbone.startswith("package:"):
        return _package_folder(backbone.removeprefix("package:"))
    folder = Path(backbone).expanduser()
    if (folder / CONFIG).is_file():
        return folder.resolve()
    if folder.is_dir() or backbone.startswith((".", "/", "~")):
        raise BackboneError(f"model.backbone {backbone!r} is not a folder with a {CONFIG}", "check the path")
    return _hub_folder(backbone)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if not roots:
        raise BackboneError(f"model.backbone: no Python package {package!r} is installed", f"pip install {package}")
    configs = sorted((c for root in roots for c in root.rglob(CONFIG)), key=lambda c: len(c.parts))
    if not configs:
        raise BackboneError(f"model.backbone: the package {package!r} holds no {CONFIG}", "name another package")
    return configs[0].parent


def _hub_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise BackboneError(f"model.backbone {repository!r} is neither a folder nor a hub id", "check it") from None
    except OSError as error:
        raise BackboneError(
            f"model.backbone {repository!r} is neither a local folder nor in the local cache, "
            f"and the hub did not give it ({str(error).splitlines()[0]})",
            "check the name and the connection, or give a local folder or package:NAME",
        ) from None


def _from_pretrained(factory: Any, folder: Path, backbone: str, config: Any) -> nn.Module:
    try:
        model: nn.Module = factory.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"model.backbone {backbone!r} in {folder} cannot be loaded for classification "
            f"({str(error).strip().splitlines()[0]})",
            "it must hold config.json and model.safetensors of an encoder that transformers knows",
        ) from None
    return model


def _quiet_transformers() -> Any:
    """The head is always new here: the library's table of missing weights would only alarm."""
    from transformers.utils import logging as transformers_logging

    class Quiet:
        def __enter__(self) -> None:
            self.before = transformers_logging.get_verbosity()
            transformers_logging.set_verbosity(logging.ERROR)
            transformers_logging.disable_progress_bar()

        def __exit__(self, *exception: object) -> None:
            transformers_logging.set_verbosity(self.before)

    return Quiet()


def _architecture(name: str, *, pretrained: bool) -> nn.Module:
    ensure_torchvision()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise BackboneError(f"model.backbone {name!r} is not a torchvision classification architecture",
                            f"did you mean {' or '.join(near)}?")  # fmt: skip
    try:
        model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise BackboneError(
            f"the pretrained weights of {name!r} are not in the local cache and could not be downloaded ({error})",
            "set model.weights to the path of a state dict, or to none to start from random weights",
        ) from None
    return model


def _load_state(model: nn.Module, path: Path) -> None:
    """Weights from a file; those of the head are left out, since the head is new."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        head = _last_linear(model)[0]
        body = {name: tensor for name, tensor in state.items() if not name.startswith(head + ".")}
        missing = [name for name in model.load_state_dict(body, strict=False).missing_keys if not name.startswith(head)]
    except Exception as error:  # noqa: BLE001  a file that is not a state dict fails in many ways
        raise BackboneError(
            f"model.weights {str(path)!r} is not a state dict for this backbone ({str(error).splitlines()[0]})",
            "give a .safetensors or .pth file of the same architecture",
        ) from None
    if missing:
        raise BackboneError(f"model.weights {str(path)!r} lacks {len(missing)} tensors, such as {missing[0]}",
                            "give a state dict of the same architecture")  # fmt: skip


def _stages(model: nn.Module) -> list[nn.Module]:
    """The parts of a body that have parts of their own: those of ``features``, the layers of an ``encoder``, or those beside
    the head."""
    places = [module for name, module in model.named_modules() if name in {"features", "encoder.layers"}]
    body, head = places[0] if places else model, _last_linear(model)[0].partition(".")[0]
    return [
        part
        for name, part in body.named_children()
        if any(True for _ in part.children()) and any(True for _ in part.parameters()) and (places or name != head)
    ]


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise BackboneError("this architecture has no linear head to replace", "choose another, such as resnet50")
    return linears[-1]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
