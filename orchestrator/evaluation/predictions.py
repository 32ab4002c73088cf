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


def write_predictions(path: Path, split: Split, probabilities: np.ndarray, labels: Sequence[str]) -> None:
    """Parquet: row, raw, label, predicted, and one probability column per class."""
    names = np.array(labels, dtype=object)
    columns = {
        "row": split.column("row"), "raw": split.column("raw"), "label": pa.array(names[split.labels]),
        "predicted": pa.array(names[probabilities.argmax(axis=1)]), "label_index": pa.array(split.labels),
        "predicted_index": pa.array(probabilities.argmax(axis=1).astype(np.int32)),
    } | {f"probability:{label}": pa.array(probabilities[:, c]) for c, label in enumerate(labels)}  # fmt: skip
    pq.write_table(pa.table(columns), path)


def picture_of(split: Split, row: int, size: int) -> bytes:
    """PNG of an image as the network saw it, ``size`` pixels square."""
    (pixels,) = split.inputs(np.array([row]))["pixels"].to_pylist()
    buffer = io.BytesIO()
    Image.frombytes("RGB", (size, size), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, labels and predicted labels (indices), each [rows]."""
    table = pq.read_table(path, columns=["row", "label_index", "predicted_index"])
    return table["row"].to_numpy(), table["label_index"].to_numpy(), table["predicted_index"].to_numpy()
