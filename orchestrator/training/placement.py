"""How many workers, on which devices: from the recipe and what the cluster has. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import ResourceError
from orchestrator.recipe import Training, Workers
from orchestrator.session import Resources
from orchestrator.training.folds import side_by_side

_MAX_AUTO_CPU_WORKERS, _CORES_WORTH_A_WORKER = 4, 8
"""On two cores one worker with two threads is 7% faster than two workers, and needs less memory and half the time to start:
a further worker comes with every further eight cores."""


@dataclass(frozen=True)
class Placement:
    """How many workers, on what."""

    workers: int
    device: Literal["cpu", "cuda"]
    cpus_per_worker: float
    fewest: int | None = None
    """Of an elastic run: with as few it goes on, rather than wait. None: it is not elastic."""


def place_workers(training: Training, resources: Resources) -> Placement:
    """Workers and devices for what the cluster has.

    Raises:
        ResourceError: more workers, or other devices, than the cluster has: said now instead of waiting for ever.
    """
    device: Literal["cpu", "cuda"] = "cuda" if resources.gpus and training.device != "cpu" else "cpu"
    if training.device == "cuda" and not resources.gpus:
        raise ResourceError(f"training.device is cuda, but the cluster has no GPU ({resources})", "set it to auto")
    slots = int(resources.gpus if device == "cuda" else resources.cpus)
    free = max(1, slots if device == "cuda" else int(resources.free_cpus))
    wanted, kind = training.workers, "GPUs" if device == "cuda" else "CPUs"
    fewest = wanted.min if isinstance(wanted, Workers) else 1 if wanted == "auto" else wanted
    if fewest > slots:
        name = "training.workers.min" if isinstance(wanted, Workers) else "training.workers"
        raise ResourceError(
            f"{name} is {fewest}, but the cluster has {slots} {kind} ({resources})",
            f"set {name} to at most {slots}, or training.workers to auto",
        )
    workers = _automatic(free, device, resources.nodes, training.batch_size) if wanted == "auto" else wanted
    if isinstance(workers, Workers):
        workers = max(workers.min, min(workers.max, slots))  # what is not free soon, it goes on without
    cpus = max(1.0, resources.free_cpus // workers) if resources.nodes == 1 else 1.0
    elastic = fewest if isinstance(wanted, Workers) else None
    return Placement(workers, device, min(cpus, resources.cpus_of_largest_node), elastic)


def _automatic(slots: int, device: str, nodes: int, batch_size: int) -> int:
    """As many as there are, but never more than rows in a batch, and on CPUs not more than pays off."""
    if device == "cpu":
        slots = min(slots // _CORES_WORTH_A_WORKER if nodes == 1 else slots, _MAX_AUTO_CPU_WORKERS)
    return max(1, min(slots, batch_size))


def place_runs(training: Training, resources: Resources, runs: int) -> tuple[Placement, int]:
    """Where each of several equal runs goes, and how many of them go on at a time: as many as there is room for.

    Raises ResourceError as ``place_workers`` does.
    """
    one = place_workers(training, resources)
    if runs == 1:
        return one, 1
    free = max(1, int(resources.free_cpus))
    slots = min(int(resources.gpus), free) if one.device == "cuda" else free
    workers, at_once = side_by_side(slots, runs, one.workers, may_shrink=training.workers == "auto")
    cpus = max(1.0, resources.free_cpus // (workers * at_once)) if resources.nodes == 1 else 1.0
    cpus = min(cpus, resources.cpus_of_largest_node)
    return replace(one, workers=workers, cpus_per_worker=cpus), at_once
