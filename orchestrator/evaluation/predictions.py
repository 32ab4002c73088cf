"""The answers on the test rows, kept: for promotion's paired comparison and for whoever wants to look closer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator.data.dataset import Split
from orchestrator.records import DatasetRecord


def write_predictions(path: Path, split: Split, probabilities: np.ndarray, labels: Sequence[str]) -> None:
    """Parquet: row, raw, label, predicted, and one probability column per class."""
    names = np.array(labels, dtype=object)
    columns = {
        "row": split.column("row"), "raw": split.column("raw"), "label": pa.array(names[split.labels]),
        "predicted": pa.array(names[probabilities.argmax(axis=1)]), "label_index": pa.array(split.labels),
        "predicted_index": pa.array(probabilities.argmax(axis=1).astype(np.int32)),
    } | {f"probability:{label}": pa.array(probabilities[:, c]) for c, label in enumerate(labels)}  # fmt: skip
    pq.write_table(pa.table(columns), path)


def pictures_of(split: Split, dataset: DatasetRecord) -> list[bytes] | None:
    """PNG of each image as the network saw it; None for texts."""
    size = dataset.image_size
    if size is None:
        return None
    pictures = split.inputs(np.arange(len(split)))["pixels"]
    return [_png(Image.frombytes("RGB", (size, size), pixels.as_py())) for pixels in pictures]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, labels and predicted labels (indices), each [rows]."""
    table = pq.read_table(path, columns=["row", "label_index", "predicted_index"])
    return table["row"].to_numpy(), table["label_index"].to_numpy(), table["predicted_index"].to_numpy()
