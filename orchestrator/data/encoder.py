"""What turns raw inputs into network inputs: the same code before training, in evaluation and behind the endpoint.

In: texts, or the bytes of image files. Out: Arrow columns (once, when preparing), then tensors (per batch). It is saved
inside the model, so a served model sees exactly what the trained one saw. Knows no labels and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch


@dataclass(frozen=True)
class Unreadable:
    """An input that cannot be encoded."""

    index: int
    """Position in the sequence handed to ``encode``."""
    reason: str


@dataclass(frozen=True)
class Encoded:
    """``columns`` hold the readable inputs in order; ``unreadable`` the others."""

    columns: dict[str, pa.Array]
    unreadable: tuple[Unreadable, ...] = ()
    truncated: np.ndarray | None = None
    """bool [readable]: the text was longer than ``max_tokens``; None for images."""


class Encoder(Protocol):
    @property
    def kind(self) -> Literal["text", "image"]:
        """What the inputs are."""

    def columns(self) -> list[pa.Field]:
        """The Arrow columns that ``encode`` makes."""

    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Tokenise texts (str) or decode and resize images (bytes), on all threads. Never raises for one bad input."""

    def lengths(self, table: pa.Table) -> Any:
        """Cost of each row for batch planning: int64 array of tokens per row, or of ones for images."""

    def collate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """The network's keyword arguments for these rows, padded to the longest (text) or normalised (images)."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON: saved as preprocess.json and part of the content address."""

    def save(self, folder: Path) -> None:
        """Write what ``load_encoder`` needs: tokenizer files (text), and preprocess.json in any case."""


ENCODER = "encoder"
"""Folder of a prepared dataset's own, in the dataset's."""
PREPROCESS = "preprocess.json"
"""``{"kind": "text", "max_tokens": 128, ...}`` or ``{"kind": "image", "image_size": 64, "mean": [...], "std": [...]}``."""
