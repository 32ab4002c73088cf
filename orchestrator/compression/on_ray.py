"""Looking at the uncompressed model, and measuring the finalists, each as one task with a node's cores to itself.

In: plain jobs. Out: a ``Survey``; costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray

from orchestrator.compression.cost import Costs, measure_beside
from orchestrator.compression.rows import Rows
from orchestrator.compression.survey import Survey, SurveyJob, ask_teacher, survey
from orchestrator.models.checkpoint import load_model
from orchestrator.storage import Storage

_TIMED_INPUTS, _ROUNDS, _ROUNDS_OF_ALL_THREADS = 64, 5, 3


@dataclass(frozen=True)
class FinalJob:
    survey: SurveyJob
    models: Mapping[int, str]
    """Number of a candidate -> location of its model. -1: the uncompressed one."""


@dataclass(frozen=True)
class FinalCosts:
    as_served: dict[int, Costs]
    """With the threads of a replica."""
    all_threads: dict[int, Costs]


def survey_on_ray(job: SurveyJob) -> Survey:
    found: Survey = ray.get(ray.remote(num_cpus=job.cpus, max_retries=1)(survey).remote(job))
    return found


def ask_teacher_on_ray(job: SurveyJob, location: str) -> None:
    gpus = 1 if job.device == "cuda" else 0
    ray.get(ray.remote(num_cpus=job.cpus, num_gpus=gpus, max_retries=1)(ask_teacher).remote(job, location))


def final_costs_on_ray(job: FinalJob) -> FinalCosts:
    found: FinalCosts = ray.get(ray.remote(num_cpus=job.survey.cpus, max_retries=1)(_final_costs).remote(job))
    return found


def _final_costs(job: FinalJob) -> FinalCosts:
    """Memory and loading are measured in processes of their own, which nothing else has warmed up."""
    storage, settings = Storage(job.survey.storage), job.survey
    folders = {str(number): storage.fetch(location) for number, location in job.models.items()}
    rows = Rows(storage.fetch(settings.dataset, verify=False), settings.seed)
    inputs = rows.raw(load_model(next(iter(folders.values()))).encoder, _TIMED_INPUTS)
    one = measure_beside(folders, inputs, settings.serving_batch, settings.threads, _ROUNDS)
    all_ = measure_beside(folders, inputs, settings.serving_batch, settings.cpus, _ROUNDS_OF_ALL_THREADS, probe=False)
    return FinalCosts({int(n): costs for n, costs in one.items()}, {int(n): costs for n, costs in all_.items()})
