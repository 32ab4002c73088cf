"""A fresh process that loads a saved model and answers: how long that takes, and how much memory.

    python -m orchestrator.compression.probe FOLDER [--inputs FILE] [--batch 1] [--threads 1]

Prints one line of JSON: ``load_s``, from the folder to the first answer (the runtime's own import included), and
``peak_rss_bytes``. ``FILE`` holds a JSON list of texts, or of ``{"b64": content of an image file}``; without it, one
made-up input is answered.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from orchestrator.compression.cost import from_json
from orchestrator.models.checkpoint import SavedModel, load_model


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.compression.probe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    given = json.loads(chosen.inputs.read_text(encoding="utf-8")) if chosen.inputs else []
    print(json.dumps(measure(chosen.folder, [from_json(value) for value in given], chosen.batch)))  # noqa: T201


def measure(folder: Path, inputs: Sequence[Any], batch: int) -> dict[str, Any]:
    started = time.perf_counter()
    model = load_model(folder)
    inputs = inputs or [_made_up(model)]
    _answer(model, inputs[:1])
    load_s = time.perf_counter() - started
    for value in inputs:
        _answer(model, [value])
    _answer(model, [inputs[i % len(inputs)] for i in range(batch)])
    return {"load_s": load_s, "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    """Of this process since its program began. The usual figure would be its parent's, where that was larger."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _answer(model: SavedModel, inputs: Sequence[Any]) -> None:
    model.probabilities(pa.table(model.encoder.encode(inputs).columns))


def _made_up(model: SavedModel) -> str | bytes:
    if model.encoder.kind == "text":
        return "one two three four five six seven eight"
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(picture, "PNG")
    return picture.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
