"""``check``: validate a recipe and its data, and say what a run would take, without starting Ray or training.

The time of a step is measured: two steps of the real network on the real batch size, in this process.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrator.errors import ResourceError
from orchestrator.models.checkpoint import count_parameters
from orchestrator.progress import format_seconds
from orchestrator.records import DatasetRecord
from orchestrator.session import available_cpus

if TYPE_CHECKING:
    from orchestrator.pipeline import Pipeline

_BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two moments in fp32."""
_MEASURED_STEPS = 2


def plan_run(pipeline: Pipeline) -> dict[str, Any]:
    """Prepares the data (which is kept for the run), then plans. Raises what the run would raise at its start."""
    recipe = pipeline.recipe
    dataset = pipeline.prepare()
    network = pipeline.task.network(recipe.model, dataset.labels)
    workers = _workers(pipeline)
    rows = dataset.splits["train"].rows
    steps = recipe.training.epochs * -(-rows // recipe.training.batch_size)
    seconds_per_step = _measure(pipeline, dataset, network)
    parameters = count_parameters(network)
    memory = workers * parameters * _BYTES_PER_PARAMETER
    disk = parameters * 4 * 8 + dataset.size_bytes  # two checkpoints of three copies each, the best model, the version
    values = {
        "rows": rows, "steps": steps, "workers": workers, "parameters": parameters, "memory_bytes": memory,
        "disk_bytes": disk, "seconds": steps * seconds_per_step,
    }  # fmt: skip
    free = shutil.disk_usage(pipeline.storage.path("")).free
    plan = {
        "train": f"{rows} rows, {recipe.training.epochs} epochs, {steps} steps of {recipe.training.batch_size} rows",
        "workers": f"{workers} on {available_cpus()} CPUs and {torch.cuda.device_count()} GPUs of this machine",
        "memory": f"{memory / 1e9:.1f} GB for weights and optimiser over all workers, activations come on top",
        "disk": f"about {disk / 1e9:.1f} GB of {free / 1e9:.0f} GB free",
        "time": f"about {format_seconds(values['seconds'])} of training, measured over {_MEASURED_STEPS} steps here",
    }
    return {"stage": "check", "name": recipe.name, "plan": plan, **values}


def _workers(pipeline: Pipeline) -> int:
    from orchestrator.session import Resources

    cpus, gpus = available_cpus(), torch.cuda.device_count()
    resources = Resources(1, cpus, gpus, cpus, cpus)
    wanted = pipeline.recipe.training.workers
    limit = gpus or cpus
    if wanted != "auto" and wanted > limit:
        raise ResourceError(
            f"training.workers is {wanted}, but this machine has {resources}", f"set it to at most {limit}, or to auto"
        )
    return min(limit, 4) if wanted == "auto" else wanted


def _measure(pipeline: Pipeline, dataset: DatasetRecord, network: torch.nn.Module) -> float:
    """Seconds per optimiser step with all cores of this machine, on rows of typical length."""
    from orchestrator.data.dataset import Split

    split = Split(pipeline.storage.fetch(dataset.location, verify=False), "train")
    encoder = pipeline.encoder_for(pipeline.recipe)
    lengths = split.lengths(encoder)
    middle = np.argsort(lengths)[len(lengths) // 2 :][: pipeline.recipe.training.batch_size]
    inputs = encoder.collate(split.inputs(middle))
    network.train()
    times = []
    for _ in range(_MEASURED_STEPS + 1):  # the first warms up
        started = time.perf_counter()
        network(**inputs).float().logsumexp(dim=-1).mean().backward()  # a loss's cost, without labels
        network.zero_grad()
        times.append(time.perf_counter() - started)
    return float(np.mean(times[1:]))
