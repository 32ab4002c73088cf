"""Small real models for the serving tests: random weights that follow from the version, real tokenizers and images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.models.backbones import Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.models.checkpoint import save_model
from orchestrator.recipe import Model
from orchestrator.storage import Storage, version_location

LABELS = ("bad", "good", "so-so")


def publish_text_model(storage: Storage, name: str, version: int, backbone: Path) -> str:
    """Returns the location."""
    torch.manual_seed(version)
    network = TransformersNetwork.create(Model(weights="none"), str(backbone), LABELS)
    return _publish(
        storage, name, version, network, TextEncoder.from_backbone(str(backbone), 32), "text_classification"
    )


def publish_image_model(storage: Storage, name: str, version: int) -> str:
    torch.manual_seed(version)
    network = TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS)
    encoder = ImageEncoder(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return _publish(storage, name, version, network, encoder, "image_classification")


def _publish(storage: Storage, name: str, version: int, network: Network, encoder: Encoder, task: str) -> str:
    location = version_location(name, version)
    with storage.publish(location) as folder:
        save_model(folder, network, encoder, LABELS, task)
    return location


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
