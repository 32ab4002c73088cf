"""The answers on the test rows, kept: for promotion's paired comparison and for whoever wants to look closer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator.data.dataset import Split

_SAMPLES = 32


def write_predictions(path: Path, split: Split, probabilities: np.ndarray, labels: Sequence[str]) -> None:
    """Parquet: row, raw, label, predicted, and one probability column per class."""
    names = np.array(labels, dtype=object)
    columns = {
        "row": split.column("row"), "raw": split.column("raw"), "label": pa.array(names[split.labels]),
        "predicted": pa.array(names[probabilities.argmax(axis=1)]), "label_index": pa.array(split.labels),
        "predicted_index": pa.array(probabilities.argmax(axis=1).astype(np.int32)),
    } | {f"probability:{label}": pa.array(probabilities[:, c]) for c, label in enumerate(labels)}  # fmt: skip
    pq.write_table(pa.table(columns), path)


def write_samples(
    path: Path, split: Split, probabilities: np.ndarray, labels: Sequence[str], image_size: int | None,
    ask: Callable[[list[bytes]], np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Some rows as a client would send them, with what was answered: who serves the model asks it again.

    JSON: ``[{"input": TEXT or {"b64": PNG}, "scores": {LABEL: PROBABILITY}}, ...]``, evenly spread over the rows. ``ask``:
    gives the probabilities of pictures, of a model that does not see an image as its picture alone.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, _SAMPLES).round().astype(np.int64))
    answers = probabilities[rows]
    if image_size is None:
        inputs: list[Any] = split.column("raw", rows).to_pylist()
    else:
        pictures = [picture_of(split, int(row), image_size) for row in rows]
        answers = ask(pictures) if ask else answers
        inputs = [{"b64": base64.b64encode(picture).decode()} for picture in pictures]
    samples = [{"input": given, "scores": dict(zip(labels, map(float, answer), strict=True))}
               for given, answer in zip(inputs, answers, strict=True)]  # fmt: skip
    path.write_text(json.dumps(samples), encoding="utf-8")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """What ``write_samples`` wrote; nothing of versions that were registered before there were any."""
    if not path.is_file():
        return []
    samples: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return samples


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
