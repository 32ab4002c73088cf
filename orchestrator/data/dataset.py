"""Prepared splits, memory-mapped: opening one reads nothing, taking rows reads just those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.errors import IntegrityError
from orchestrator.storage import split_file


def open_split(folder: Path, split: str) -> pa.Table:
    """A split of a prepared dataset. Raises IntegrityError when its file is missing or not Arrow."""
    path = folder / split_file(split)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} is not a prepared split ({error})", "run prepare again") from None


def labels_of(table: pa.Table) -> np.ndarray:
    """int32 [rows]: each row's index into the dataset's labels."""
    labels: np.ndarray = table["label"].to_numpy()
    return labels
