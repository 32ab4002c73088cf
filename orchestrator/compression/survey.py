"""What is known of the uncompressed model before the first candidate: which methods apply to it, which of its parts matter,
what it costs here, and what it answers.

In: a saved model and a prepared dataset. Out: a ``Survey``, written down once, so that all candidates of all runs of a
study are compared with the same figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.compression.cost import Costs, measure_beside
from orchestrator.compression.rows import Rows
from orchestrator.compression.sensitivity import count_tokens, measure_sensitivity
from orchestrator.compression.structure import methods_of
from orchestrator.data.text import TextEncoder
from orchestrator.models.checkpoint import load_model
from orchestrator.storage import ANSWERS, MEMBERS, Storage

_TIMED_INPUTS, _ROUNDS = 64, 3
_PARENT = "parent"


@dataclass(frozen=True)
class SurveyJob:
    storage: str
    model: str
    """Location of the uncompressed model."""
    dataset: str
    calibration_rows: int
    predict_batch: int
    """Rows per forward pass, where nothing is timed."""
    serving_batch: int
    """Inputs in a batch that is timed."""
    threads: int
    """Of what is timed."""
    cpus: int
    """Threads of everything else."""
    seed: int
    device: str = "cpu"
    """Where the training rows are looked at; what is timed is on the CPU."""


@dataclass(frozen=True)
class Survey:
    methods: dict[str, str]
    """Field of the structure, or ``max_tokens`` -> nothing, or why it cannot be had of this architecture."""
    sensitivity: dict[str, Any]
    """``Sensitivity`` as JSON."""
    costs: Costs
    probabilities: np.ndarray
    """float32 [validation rows, classes]"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"probabilities": [[float(p) for p in row] for row in self.probabilities]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Survey:
        probabilities = np.array(values["probabilities"], np.float32)
        return cls(values["methods"], values["sensitivity"], Costs(**values["costs"]), probabilities)


def survey(job: SurveyJob) -> Survey:
    """Runs where the candidates will."""
    torch.set_num_threads(max(1, job.cpus))
    storage = Storage(job.storage)
    folder = storage.fetch(job.model)
    rows = Rows(storage.fetch(job.dataset, verify=False), job.seed)
    whole, base = load_model(folder), load_model(folder_of_base(folder))
    batches = list(rows.labelled(base.encoder, job.calibration_rows))
    everything = np.arange(len(rows.validation))
    costs = measure_beside(
        {_PARENT: folder}, rows.raw(whole.encoder, _TIMED_INPUTS), job.serving_batch, job.threads, _ROUNDS, probe=False
    )
    sensitivity = replace(measure_sensitivity(base.network, batches), tokens=count_tokens(base.network, rows.tokens()))
    reads_texts = isinstance(base.encoder, TextEncoder)
    methods = methods_of(base.network, batches[0][0]) | {"max_tokens": "" if reads_texts else "it reads no texts"}
    return Survey(
        methods, sensitivity.to_json(), costs[_PARENT],
        rows.answers(whole, everything, job.predict_batch),
    )  # fmt: skip


def ask_teacher(job: SurveyJob, location: str) -> None:
    """Publish the uncompressed model's logits of the training rows: asked once, for all candidates and epochs."""
    torch.set_num_threads(max(1, job.cpus))
    storage = Storage(job.storage)
    rows = Rows(storage.fetch(job.dataset, verify=False), job.seed)
    logits = rows.training_logits(load_model(storage.fetch(job.model), device=job.device), job.predict_batch)
    with storage.publish(location) as folder:
        np.save(folder / ANSWERS, logits)


def folder_of_base(folder: Path) -> Path:
    """The model that is made smaller: of an ensemble its first member, which learns from all."""
    member = folder / MEMBERS / "0"
    return member if member.is_dir() else folder
