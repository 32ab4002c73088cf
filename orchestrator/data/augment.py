"""Random changes of training images, through torchvision.transforms.v2: each image its own, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.recipe import Augmentation


def augment(pixels: torch.Tensor, settings: Augmentation, seeds: Sequence[int]) -> torch.Tensor:
    """uint8 [rows, 3, height, width] -> the same shape; ``seeds`` has one number per row."""
    transform = build_transform(settings, pixels.shape[-1])
    if transform is None:
        return pixels
    result = torch.empty_like(pixels)
    with torch.random.fork_rng(devices=[]):  # v2 draws from the global generator
        for row, seed in enumerate(seeds):
            torch.manual_seed(seed)
            result[row] = transform(pixels[row])
    return result


def build_transform(settings: Augmentation, image_size: int) -> Any | None:
    """The transforms the recipe asks for, in one; None if it asks for none."""
    ensure_torchvision()
    from torchvision.transforms import v2

    steps: list[Any] = []
    if settings.crop_scale < 1.0:
        steps.append(v2.RandomResizedCrop(image_size, scale=(settings.crop_scale, 1.0), antialias=True))
    if settings.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(settings.horizontal_flip))
    if settings.rotation_degrees or settings.zoom:
        scale = (1.0 - settings.zoom, 1.0 + settings.zoom) if settings.zoom else None
        steps.append(
            v2.RandomAffine(settings.rotation_degrees, scale=scale, interpolation=v2.InterpolationMode.BILINEAR)
        )
    if settings.color:
        strength = settings.color
        steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    return v2.Compose(steps) if steps else None
