"""What models cost on this machine, side by side: time, memory, bytes.

In: folders of saved models and raw inputs. Out: ``Costs`` of each. Times are from the text (or image file) to the
probabilities, as ``evaluation/on_ray.py`` takes them. All models are in this process and take turns round by round, so what
else the machine does falls on all of them; compare figures of one call, not of two.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.errors import CompressionFailed
from orchestrator.models.checkpoint import SavedModel, load_model

_WARM_UP_INPUTS = 3
_PROBE_S = 300.0
_PROBED_INPUTS = 32
_PROBE = "orchestrator.compression.probe"


@dataclass(frozen=True)
class Costs:
    latency_ms_p50: float
    """Of one input, from the text (or file) to the probabilities."""
    latency_ms_p95: float
    batch_ms_p50: float
    """Of ``batch_size`` inputs together."""
    throughput_per_s: float
    """Inputs per second, in such batches."""
    load_s: float
    """From the folder to the first answer, in a fresh process whose imports are done, and in this one if none was started."""
    peak_rss_bytes: int
    """Resident at most, of a fresh process that has loaded the model and answers; 0 if none was started."""
    size_bytes: int
    """Of all files in the folder."""


@dataclass(frozen=True)
class Parity:
    """How far two models' answers to the same rows are from each other."""

    max_difference: float
    """Of a probability."""
    mean_difference: float
    agreement: float
    """Share of the rows with the same most probable class."""


def measure_beside(
    folders: Mapping[str, Path],
    inputs: Sequence[Any],
    batch_size: int,
    threads: int,
    rounds: int,
    *,
    probe: bool = True,
) -> dict[str, Costs]:
    """Costs of each model, under the names given.

    Args:
        inputs: texts, or contents of image files; each is answered once per round alone, and the first ``batch_size`` of
            them (again from the start if there are fewer) together.
        threads: of the processor, for each model.
        probe: start a fresh process per model, for ``load_s`` and ``peak_rss_bytes``. Takes some seconds each.

    Raises:
        CompressionFailed: a model cannot be loaded, or takes its process down when it answers.
    """
    probed = {name: probe_folder(folder, inputs, batch_size, threads) for name, folder in folders.items() if probe}
    with _threads(threads):
        models, load_s = _loaded(folders, inputs)
        batch = list(islice(cycle(inputs), batch_size))
        singles: dict[str, list[list[float]]] = {name: [] for name in models}
        batches: dict[str, list[float]] = {name: [] for name in models}
        names = list(models)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                _answer(models[name], batch)  # others' weights are in the caches
                singles[name].append([_seconds(models[name], [value]) for value in inputs])
                batches[name].append(_seconds(models[name], batch))
    return {
        name: _costs(singles[name], batches[name], batch_size, probed.get(name, {"load_s": load_s[name]}), folder)
        for name, folder in folders.items()
    }


def _costs(
    singles: Sequence[Sequence[float]],
    batches: Sequence[float],
    batch_size: int,
    probed: Mapping[str, Any],
    folder: Path,
) -> Costs:
    """Medians over the rounds; the percentiles are those of the inputs of one round."""
    p50, p95 = np.median(np.percentile(np.array(singles) * 1e3, [50, 95], axis=1), axis=1)
    batch_s = float(np.median(batches))
    return Costs(float(p50), float(p95), batch_s * 1e3, batch_size / batch_s, float(probed["load_s"]),
                 int(probed.get("peak_rss_bytes", 0)), folder_bytes(folder))  # fmt: skip


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parity(one: np.ndarray, other: np.ndarray) -> Parity:
    """``one``, ``other``: probabilities [rows, classes] of the same rows, at least one."""
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    agreement = float((one.argmax(axis=1) == other.argmax(axis=1)).mean())
    return Parity(float(difference.max()), float(difference.mean()), agreement)


def probe_folder(folder: Path, inputs: Sequence[Any], batch_size: int, threads: int) -> dict[str, Any]:
    """``load_s`` and ``peak_rss_bytes`` of a fresh process that loads the model and answers, one by one and together."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.json"
        file.write_text(json.dumps([_as_json(value) for value in inputs[:_PROBED_INPUTS]]), encoding="utf-8")
        command = [sys.executable, "-m", _PROBE, str(folder), "--inputs", str(file),
                   "--batch", str(batch_size), "--threads", str(threads)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PROBE_S, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise _dead(folder, f"no answer within {_PROBE_S:.0f} s") from None
    if done.returncode:
        raise _dead(folder, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _dead(folder: Path, reason: str) -> CompressionFailed:
    return CompressionFailed(
        f"a process that loads the model in {folder} and answers did not end well ({reason})", "choose another form"
    )


def _as_json(value: Any) -> Any:
    return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def from_json(value: Any) -> Any:
    """What ``probe_folder`` wrote: a text, or the bytes of a file."""
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else value


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loaded(folders: Mapping[str, Path], inputs: Sequence[Any]) -> tuple[dict[str, SavedModel], dict[str, float]]:
    """Models that have answered a few times, and how long it took to the first answer."""
    models, seconds = {}, {}
    for name, folder in folders.items():
        started = time.perf_counter()
        models[name] = load_model(folder)
        _answer(models[name], inputs[:1])
        seconds[name] = time.perf_counter() - started
        for value in inputs[:_WARM_UP_INPUTS]:
            _answer(models[name], [value])
    return models, seconds


def _answer(model: SavedModel, inputs: Sequence[Any]) -> np.ndarray:
    return model.probabilities(pa.table(model.encoder.encode(inputs).columns))


def _seconds(model: SavedModel, inputs: Sequence[Any]) -> float:
    started = time.perf_counter()
    _answer(model, inputs)
    return time.perf_counter() - started
