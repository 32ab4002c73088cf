"""``check``: validate a recipe and its data, and say what a run would take, without starting Ray or training.

The time of a step is measured: two steps of the real network on the real batch size, in this process.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrator.models.checkpoint import count_parameters
from orchestrator.progress import format_seconds
from orchestrator.records import DatasetRecord
from orchestrator.session import available_cpus

if TYPE_CHECKING:
    from orchestrator.pipeline import Pipeline
    from orchestrator.recipe import Recipe, Training

_BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two moments in fp32."""
_MEASURED_STEPS = 2
_WITH_TEACHER = 4 / 3
"""A step with the teacher's forward pass beside it, of one without: forward and backward cost as three passes."""


def plan_run(pipeline: Pipeline) -> dict[str, Any]:
    """Prepares the data (which is kept for the run), then plans. Raises what the run would raise at its start."""
    recipe = pipeline.recipe
    dataset = pipeline.prepare()
    network = pipeline.task.network(recipe.model, dataset.labels)
    rows_of_runs = _rows_of_runs(pipeline, dataset)
    workers, at_once = _workers(pipeline)
    tuning, trials = recipe.tuning, recipe.tuning.trials if recipe.tuning else 1
    rows = dataset.splits["train"].rows
    steps = trials * recipe.training.epochs * sum(-(-rows // recipe.training.batch_size) for rows in rows_of_runs)
    seconds_per_step = _measure(pipeline, dataset, network)
    parameters = count_parameters(network)
    memory = workers * at_once * parameters * _BYTES_PER_PARAMETER
    # of each run two checkpoints of three copies each, the best model, the version; of a search, of those at a time, and of
    # a population, of those that go on and those they go on from
    kept = 2 * trials if tuning and tuning.scheduler == "pbt" else at_once
    runs_on_disk = len(rows_of_runs) * (kept + 1 if tuning else 1)
    disk = runs_on_disk * parameters * 4 * 8 + dataset.size_bytes + _compression_disk(recipe, parameters, at_once)
    values = {
        "rows": rows, "steps": steps, "runs": len(rows_of_runs), "workers": workers, "parameters": parameters,
        "memory_bytes": memory, "disk_bytes": disk, "seconds": steps * seconds_per_step,
    }  # fmt: skip
    free = shutil.disk_usage(pipeline.storage.path("")).free
    plan = {
        "train": f"{rows} rows, {recipe.training.epochs} epochs, {steps} steps of {recipe.training.batch_size} rows",
        **_told(recipe.training, len(rows_of_runs), at_once),
        **_tuning(pipeline, at_once),
        **_compression(pipeline, -(-rows // recipe.training.batch_size) * seconds_per_step),
        "workers": f"{workers} on {available_cpus()} CPUs and {torch.cuda.device_count()} GPUs of this machine",
        "memory": f"{memory / 1e9:.1f} GB for weights and optimiser over all workers, activations come on top",
        "disk": f"about {disk / 1e9:.1f} GB of {free / 1e9:.0f} GB free",
        "time": f"about {format_seconds(values['seconds'])} of training, measured over {_MEASURED_STEPS} steps here",
    }
    return {"stage": "check", "name": recipe.name, "plan": plan, **values}


def _rows_of_runs(pipeline: Pipeline, dataset: DatasetRecord) -> list[int]:
    """How many rows each run trains on: those of the folds, then those of the model or its members."""
    from orchestrator.training.folds import fold_runs, fold_sizes, model_runs

    recipe, train, validation = pipeline.recipe, dataset.splits["train"].rows, dataset.splits["validation"].rows
    sizes = fold_sizes(recipe, pipeline.storage.fetch(dataset.location, verify=False), dataset.labels)
    runs = dict.fromkeys((*fold_runs(recipe, ""), *model_runs(recipe, "")))  # an ensemble of the folds is the same runs
    return [train + validation - sizes[run.fold.number] if run.fold else train for run in runs]


def _told(training: Training, runs: int, at_once: int) -> dict[str, str]:
    if runs == 1:
        return {}
    folds = [f"{training.folds} folds"] if training.folds else []
    model = "which are the model's members" if training.ensemble == "folds" else f"{training.ensemble} for the model"
    return {"runs": f"{runs}: {', '.join([*folds, model])}; up to {at_once} at a time; the steps are of all"}


def _tuning(pipeline: Pipeline, at_once: int) -> dict[str, str]:
    from orchestrator.tuning.space import told

    tuning = pipeline.recipe.tuning
    if tuning is None:
        return {}
    stage = pipeline.tune_stage()
    stage.check()
    fields = ", ".join(f"{p.path.removeprefix('training.')} {told(p.dimension)}" for p in stage.space.parameters)
    told_of_all = "steps and time are of all of them, if none is stopped early"
    objectives = ", ".join(stage.objectives)
    return {"tune": f"{tuning.trials} trials, {at_once} at a time, for {objectives}; {told_of_all}; searched: {fields}"}


def _compression_disk(recipe: Recipe, parameters: int, at_once: int) -> int:
    """At most, in bytes: of each candidate a student and a model, in fp32, and of those under way what training keeps."""
    settings = recipe.compression
    return (2 * settings.trials + 8 * at_once) * parameters * 4 if settings else 0


def _compression(pipeline: Pipeline, epoch_s: float) -> dict[str, str]:
    """``epoch_s``: of the uncompressed model, without a teacher."""
    settings = pipeline.recipe.compression
    if settings is None:
        return {}
    stage = pipeline.compress_stage(None)
    stage.check()
    here = [name for name, why in stage.forms.items() if not why]
    limits = ", ".join(f"{name} {value:g}" for name, value in settings.limits if value is not None) or "none"
    student_s = settings.recovery.epochs * epoch_s * _WITH_TEACHER
    return {"compress": f"{settings.trials} candidates for {', '.join(settings.objectives)}; limits: {limits}; each student "
                        f"takes {settings.recovery.epochs} epochs, at most {format_seconds(student_s)}, smaller ones less; "
                        f"forms to be had here: {', '.join(here)}"}  # fmt: skip


def _workers(pipeline: Pipeline) -> tuple[int, int]:
    """Workers of each run, and how many runs go on at a time: the folds first, then those of the model."""
    from orchestrator.session import Resources
    from orchestrator.training.folds import fold_runs, model_runs
    from orchestrator.training.placement import place_runs
    from orchestrator.tune import room_for

    cpus, recipe = available_cpus(), pipeline.recipe
    resources = Resources(1, cpus, torch.cuda.device_count(), cpus, cpus)
    if recipe.tuning:
        placement, at_once = room_for(recipe, recipe.tuning, resources)
        return placement.workers, at_once
    runs = max(len(fold_runs(recipe, "")), len(model_runs(recipe, "")))
    placement, at_once = place_runs(recipe.training, resources, runs)
    return placement.workers, at_once


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
