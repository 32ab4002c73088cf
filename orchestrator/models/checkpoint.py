"""The folder a trained model is saved in: any library opens it, and nothing in it runs code.

``model.safetensors`` + ``config.json`` (transformers layout, or a torchvision architecture's name with its state dict),
the tokenizer's files, ``preprocess.json``, ``labels.json``, ``card.json``; ``manifest.json`` comes from storage. An
ensemble has such folders below ``members``, and beside them all but the weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError

from orchestrator.data.encoder import Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.models.backbones import Network, load_network, write_ensemble_config
from orchestrator.models.ensemble import Mixture
from orchestrator.storage import MEMBERS, verify_manifest

LABELS = "labels.json"
CARD = "card.json"


@dataclass(frozen=True)
class SavedModel:
    """A network with everything it takes to go from raw inputs to probabilities."""

    network: Network
    """In evaluation mode, on ``device``."""
    encoder: Encoder
    labels: tuple[str, ...]
    task: str
    card: dict[str, Any]
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    """What a torch network multiplies in. What another runtime computes has its own."""

    def in_bf16(self) -> SavedModel:
        """A copy whose network stores and multiplies bf16, but for what another runtime computes."""
        return replace(self, network=self.network.in_bf16(), precision="bf16")

    def autocast(self) -> torch.autocast:
        """What whoever calls the network does within."""
        # Pixels come in fp32; tokens do not, and without autocast each product is spared a look.
        pixels = self.precision == "bf16" and self.encoder.kind == "image"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=pixels)

    def probabilities(self, rows: pa.Table) -> np.ndarray:
        """Encoded rows -> float32 probabilities [rows, classes]."""
        with torch.inference_mode(), self.autocast():
            inputs = {name: tensor.to(self.device) for name, tensor in self.encoder.collate(rows).items()}
            probabilities: np.ndarray = self.network(**inputs).float().softmax(dim=-1).cpu().numpy()
        return probabilities


def save_model(folder: Path, network: Network, encoder: Encoder, labels: tuple[str, ...], task: str) -> None:
    """Write the model into an existing folder (which ``Storage.publish`` then seals with a manifest)."""
    with system_errors():
        network.save(folder)
    save_surroundings(folder, encoder, labels, {"task": task, "parameters": count_parameters(network)})


def save_surroundings(folder: Path, encoder: Encoder, labels: tuple[str, ...], card: dict[str, Any]) -> None:
    """All but the network. ``card``: ``task``, ``parameters`` and whatever else is to be known of the model."""
    encoder.save(folder)
    _write_json(folder / LABELS, list(labels))
    _write_json(folder / CARD, card)


def save_ensemble(folder: Path, members: Sequence[Path]) -> None:
    """Write saved models of the same task, labels and encoder as one into an existing folder, which holds copies of them."""
    labels = json.loads((members[0] / LABELS).read_text(encoding="utf-8"))
    save_mixture(folder, members, None, load_encoder(members[0]), labels, {})


def save_mixture(
    folder: Path, members: Sequence[Path], mixture: Mixture | None, encoder: Encoder, labels: Sequence[str],
    card: Mapping[str, Any],
) -> None:  # fmt: skip
    """The same of models of one task that ``mixture`` joins. ``encoder``: of all together; ``card``: what else it tells."""
    for number, member in enumerate(members):
        shutil.copytree(member, folder / MEMBERS / str(number))
    cards = [json.loads((member / CARD).read_text(encoding="utf-8")) for member in members]
    write_ensemble_config(folder, len(members), mixture)
    counted = {"task": cards[0]["task"], "parameters": sum(card["parameters"] for card in cards)}
    save_surroundings(folder, encoder, tuple(labels), counted | dict(card))


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """The system's error that a library hides: torch has it as context of its own, safetensors tells its number in words.

    Raises OSError, such as for a full disk, instead of theirs.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise


def load_model(folder: Path, *, device: str = "cpu", verify: bool = True) -> SavedModel:
    """Read a saved model. Raises IntegrityError when a file is not the one that was saved."""
    if verify:
        verify_manifest(folder)
    labels = tuple(json.loads((folder / LABELS).read_text(encoding="utf-8")))
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    place = torch.device(device)
    network = load_network(folder).to(place).eval()
    return SavedModel(network, load_encoder(folder), labels, card["task"], card, place)


def count_parameters(network: torch.nn.Module) -> int:
    """Of a network that a runtime computes, and of such parts: what was counted when it was made."""
    runtimes: list[Any] = [module for module in network.modules() if hasattr(module, "stated_parameters")]
    theirs = {id(parameter) for module in runtimes for parameter in module.parameters()}
    own = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in theirs)
    return own + sum(int(module.stated_parameters) for module in runtimes)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
