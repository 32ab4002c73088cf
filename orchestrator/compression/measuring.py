"""What a candidate is worth: its answers against the labels, the uncompressed model's and its own network's, and its costs
beside the uncompressed model's.

In: folders of saved models. Out: metrics by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from orchestrator.compression.cost import Costs, measure_beside, parity
from orchestrator.compression.limits import is_hopeless
from orchestrator.compression.rows import Rows
from orchestrator.compression.survey import Survey
from orchestrator.errors import CompressionFailed
from orchestrator.evaluation.metrics import summary
from orchestrator.models.checkpoint import SavedModel, load_model
from orchestrator.recipe_compression import Compression

_TIMED_INPUTS, _ROUNDS, _FEW_ROUNDS = 32, 3, 1
_FP32_DIFFERENCE = 1e-3
"""Of a probability: more than another order of fp32 sums makes."""
QUALITY = ("macro_f1", "weighted_f1", "accuracy", "loss")


@dataclass(frozen=True)
class Judge:
    parent: Path
    """Folder of the uncompressed model."""
    survey: Survey
    rows: Rows
    settings: Compression
    predict_batch: int
    serving_batch: int

    def metrics(self, student: Path, folder: Path) -> dict[str, float]:
        """Of the candidate in ``folder``, made of the network in ``student``.

        Raises:
            CompressionFailed: it does not answer as its network does.
        """
        candidate = load_model(folder)
        proxy = self.rows.some(self.rows.validation, self.settings.proxy_rows)
        answers = self.rows.answers(candidate, proxy, self.predict_batch)
        metrics = self._parity(load_model(student), answers, proxy)
        hopeless = is_hopeless(self.settings.limits, *self._right(answers, proxy))
        if not hopeless:
            proxy = np.arange(len(self.rows.validation))
            answers = self.rows.answers(candidate, proxy, self.predict_batch)
        metrics |= self._quality(answers, proxy)
        return metrics | self._costs(folder, _FEW_ROUNDS if hopeless else _ROUNDS)

    def _parity(self, student: SavedModel, answers: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """The gate: what was exported is the network that was trained."""
        found = parity(self.rows.answers(student, rows, self.predict_batch), answers)
        is_fp32 = self.settings.form.endswith("fp32")
        if (is_fp32 and found.max_difference > _FP32_DIFFERENCE) or found.agreement < self.settings.parity:
            raise CompressionFailed(
                f"{self.settings.form} does not answer as the network does: {found.agreement:.1%} of {len(rows)} labels "
                f"agree, the largest difference of a probability is {found.max_difference:.3g}",
                "another form may keep what this one loses",
            )
        return {"parity_difference": found.max_difference, "parity_agreement": found.agreement}

    def _right(self, answers: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = self.rows.validation.labels[rows]
        return answers.argmax(1) == labels, self.survey.probabilities[rows].argmax(1) == labels

    def _quality(self, answers: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        scores = summary(self.rows.validation.labels[rows], answers)
        with_parent = parity(self.survey.probabilities[rows], answers)
        return {name: scores[name] for name in QUALITY} | {"agreement": with_parent.agreement, "rows": float(len(rows))}

    def _costs(self, folder: Path, rounds: int) -> dict[str, float]:
        """Measured in turns with the uncompressed model; what the machine did to both is taken out."""
        both = measure_beside(
            {"parent": self.parent, "candidate": folder}, self._raw, self.serving_batch, self.settings.threads, rounds,
            probe=False,
        )  # fmt: skip
        return scaled(both["candidate"], both["parent"], self.survey.costs)

    @cached_property
    def _raw(self) -> list[object]:
        return self.rows.raw(load_model(self.parent).encoder, _TIMED_INPUTS)


def scaled(costs: Costs, beside: Costs, reference: Costs) -> dict[str, float]:
    """``costs`` as they would have been in the hour in which ``reference`` was measured of the model that ``beside`` is."""
    single, batch = (
        reference.latency_ms_p50 / beside.latency_ms_p50,
        reference.throughput_per_s / beside.throughput_per_s,
    )
    metrics = {
        "latency_ms": costs.latency_ms_p50 * single, "latency_p95_ms": costs.latency_ms_p95 * single,
        "batch_ms": costs.batch_ms_p50 / batch, "throughput_per_s": costs.throughput_per_s * batch,
        "size_mb": costs.size_bytes / 1e6, "speedup": beside.latency_ms_p50 / costs.latency_ms_p50,
        "batch_speedup": costs.throughput_per_s / beside.throughput_per_s,
    }  # fmt: skip
    return metrics | ({"memory_mb": costs.peak_rss_bytes / 1e6} if costs.peak_rss_bytes else {})
