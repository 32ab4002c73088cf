"""Predicting the test rows on Ray: one task per worker, each with its share of the rows, then one that times.

In: locations of a saved model and a prepared dataset. Out: probabilities of every test row, and what an answer costs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from orchestrator.data.batches import evaluation_batches
from orchestrator.data.dataset import Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.evaluation.predictions import picture_of
from orchestrator.models.checkpoint import SavedModel, load_model
from orchestrator.progress import Event, Report
from orchestrator.storage import Storage

_TIMED_INPUTS = 50
_WARM_UP_INPUTS = 5


@dataclass(frozen=True)
class Cost:
    """Measured alone on one worker, from the text (or a PNG of the network's size) to the probabilities."""

    latency_ms_p50: float
    latency_ms_p95: float
    throughput_per_s: float


@dataclass(frozen=True)
class PredictJob:
    storage: str
    model: str
    dataset: str
    split: str
    batch_size: int
    device: str
    bf16: bool = False
    """Compute as a bf16 training run validates, instead of in fp32 as an endpoint does."""


def predict_split(job: PredictJob, rows: int, workers: int, cpus_per_worker: float, report: Report) -> np.ndarray:
    """Probabilities [rows, classes] of a split, in the order of its rows."""
    options = {"num_cpus": cpus_per_worker, "num_gpus": 1 if job.device == "cuda" else 0, "max_retries": 2}
    task = ray.remote(**options)(_predict_share)
    waiting = [task.remote(job, rank, workers, int(cpus_per_worker)) for rank in range(workers)]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    while waiting:
        ready, waiting = ray.wait(waiting)
        parts += [part for reference in ready for part in ray.get(reference)]
        done = sum(len(indices) for indices, _ in parts)
        report(Event("evaluate", done=done, total=rows, figures={"split": job.split}))
    return _joined(parts, rows)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], rows: int) -> np.ndarray:
    result = np.zeros((rows, parts[0][1].shape[1]), dtype=np.float32)
    for indices, probabilities in parts:
        result[indices] = probabilities
    return result


def predict_here(job: PredictJob, threads: int) -> np.ndarray:
    """As ``predict_split``, in this process."""
    parts = _predict_share(job, 0, 1, threads)
    return _joined(parts, sum(len(rows) for rows, _ in parts))


def predict_inputs(job: PredictJob, inputs: Sequence[Any], cpus_per_worker: float) -> np.ndarray:
    """Probabilities [rows, classes] of raw inputs, which are none of the job's split."""
    options = {"num_cpus": cpus_per_worker, "num_gpus": 1 if job.device == "cuda" else 0}
    answers: np.ndarray = ray.get(ray.remote(**options)(_predict_inputs).remote(job, inputs))
    return answers


def _predict_inputs(job: PredictJob, inputs: Sequence[Any]) -> np.ndarray:
    model = load_model(Storage(job.storage).fetch(job.model), device=job.device)
    return model.probabilities(pa.table(model.encoder.encode(inputs).columns))


def measure_cost(job: PredictJob, cpus_per_worker: float) -> Cost:
    """Latency of single inputs and throughput in batches, on an otherwise idle worker."""
    options = {"num_cpus": cpus_per_worker, "num_gpus": 1 if job.device == "cuda" else 0}
    cost: Cost = ray.get(ray.remote(**options)(measure_here).remote(job, int(cpus_per_worker)))
    return cost


def _predict_share(job: PredictJob, rank: int, world: int, threads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    import torch

    torch.set_num_threads(max(1, threads))
    storage = Storage(job.storage)
    model = load_model(storage.fetch(job.model), device=job.device)
    split = Split(storage.fetch(job.dataset, verify=False), job.split)
    shares = evaluation_batches(split.lengths(model.encoder), job.batch_size, rank, world)
    with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.bf16):
        return [(rows, model.probabilities(split.inputs(rows))) for rows in shares]


def measure_here(job: PredictJob, threads: int) -> Cost:
    """As ``measure_cost``, in this process."""
    import torch

    torch.set_num_threads(max(1, threads))
    storage = Storage(job.storage)
    model = load_model(storage.fetch(job.model), device=job.device)
    split = Split(storage.fetch(job.dataset, verify=False), job.split)
    rows = np.linspace(0, len(split) - 1, max(_TIMED_INPUTS + _WARM_UP_INPUTS, job.batch_size)).astype(np.int64)
    inputs = _raw_inputs(split, rows, model.encoder)
    single = _seconds(model, [[value] for value in inputs[: _TIMED_INPUTS + _WARM_UP_INPUTS]])
    batches = _seconds(model, [inputs[: job.batch_size]] * 3)
    p50, p95 = np.percentile(np.array(single[_WARM_UP_INPUTS:]) * 1e3, [50, 95])
    return Cost(float(p50), float(p95), job.batch_size / min(batches))


def _raw_inputs(split: Split, rows: np.ndarray, encoder: Encoder) -> list[str] | list[bytes]:
    if isinstance(encoder, ImageEncoder):
        return [picture_of(split, int(row), encoder.image_size) for row in rows]
    texts: list[str] = split.column("raw", rows).to_pylist()
    return texts


def _seconds(model: SavedModel, batches: Sequence[Sequence[Any]]) -> list[float]:
    times = []
    for batch in batches:
        started = time.perf_counter()
        model.probabilities(pa.table(model.encoder.encode(batch).columns))
        times.append(time.perf_counter() - started)
    return times
