"""The recipe's ``compression`` section: what a compressed model must keep, and what is done to make it.

A candidate is a structure (what is left of the network), a recovery (how it is trained on), and a form (which runtime
computes it, with which numbers). Each field of a candidate can be searched by its path, ``compression.layers``; what is not
searched holds for all candidates.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.recipe_tuning import Dimension
from orchestrator.section import Fraction, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]
FormName = Literal[
    "torch-fp32", "torch-bf16", "torch-compiled-fp32", "torch-compiled-bf16", "torchao-int8-weights",
    "onnxruntime-fp32", "onnxruntime-int8", "onnxruntime-int8-static", "onnxruntime-int4-weights",
    "openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int8-weights", "openvino-int4-weights",
]  # fmt: skip
"""Runtime and numbers. ``int8`` of onnxruntime finds the range of activations anew for each input, ``int8-static`` and that
of openvino by calibration rows; with ``weights`` only they are small, and computed with as they were."""
Cost = Literal["latency_ms", "latency_p95_ms", "batch_ms", "size_mb", "memory_mb"]
"""Of one input, the median and the 95th percentile; of ``serving.max_batch_size`` inputs, the median; of the folder; at most
resident while it answers."""
Objective = Literal["macro_f1", "weighted_f1", "accuracy", "agreement"] | Cost


class Limits(Section):
    """Hard: a candidate outside of one is never chosen. Qualities are those of the validation rows; costs, those measured on
    the machine that compresses."""

    macro_f1_drop: Fraction | None = 0.01
    """At most so much below the uncompressed model."""
    accuracy_drop: Fraction | None = None
    agreement: Fraction | None = None
    """At least this share of the rows gets the label that the uncompressed model gives."""
    latency_p50_ms: float | None = Field(default=None, gt=0.0)
    """Of one input, from text or file to probabilities."""
    latency_p95_ms: float | None = Field(default=None, gt=0.0)
    throughput_per_s: float | None = Field(default=None, gt=0.0)
    """Inputs per second, in batches of ``serving.max_batch_size``, at least."""
    size_bytes: int | None = Field(default=None, ge=1)
    """Of the model's folder."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Resident at most, of a process that has loaded it and answers."""


class Recovery(Section):
    """Training after the network was made smaller, with the uncompressed one as teacher."""

    epochs: int = Field(default=3, ge=0, le=1000)
    """0: none; what is left of the network is taken as it is."""
    learning_rate: float | None = Field(default=None, gt=0.0, le=10.0)
    """Peak. None: that of the uncompressed model's training."""
    steps: int = Field(default=1, ge=1, le=20)
    """Make the network smaller in so many steps, each followed by its share of the epochs."""
    distillation: Fraction = 0.7
    """Share of the loss that is the teacher's probabilities (Hinton et al. 2015); the rest is the labels'."""
    temperature: float = Field(default=2.0, ge=1.0, le=100.0)
    """Softens both networks' probabilities before they are compared."""
    hidden: float = Field(default=10.0, ge=0.0, le=100.0)
    """Weight of the distance between hidden states of student and teacher: on few rows it keeps what the labels alone would
    have forgotten. 0: the answers alone, which are then asked once for all candidates."""
    altered: Fraction = 0.95
    """Share of the texts that are altered anew in each epoch, with tokens and halves of others, for the teacher to answer: what
    keeps the student from learning few rows by heart."""
    fake_int8: bool = False
    """Quantisation-aware training: compute with weights and activations rounded as int8 would."""


class Compression(Section):
    trials: int = Field(default=24, ge=1, le=100_000)
    """Candidates in all: after 16 of them, 32 means 16 more."""
    time_budget_s: float | None = Field(default=None, gt=0.0)
    """No candidate begins after so long. None: until all are done."""
    limits: Limits = Limits()
    objectives: tuple[Objective, ...] = ("latency_ms", "macro_f1", "size_mb")
    """Traded off against each other within the limits; of those that no other beats in all, the best in the first is chosen."""
    space: dict[str, Dimension] | None = None
    """Paths of this section's fields and what to try for them, as in ``tuning.space``. None: what the network's architecture
    and the installed runtimes allow."""
    sampler: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    startup_trials: int = Field(default=8, ge=1, le=10_000)
    """Candidates at random before tpe has something to learn from."""
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Candidates at a time. ``auto``: as many as there is room for."""
    proxy_rows: int = Field(default=200, ge=16, le=1_000_000)
    """Validation rows by which a candidate is judged first: one that is beyond doubt outside of the limits there gets no
    further."""
    calibration_rows: int = Field(default=256, ge=8, le=100_000)
    """Training rows by which static int8 finds its ranges and importance is measured."""
    parity: Fraction = 0.95
    """Share of those rows to which an exported model must give the label that its network gives in torch; fp32 forms must agree
    in the probabilities too. A candidate that does not is refused."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads that costs are measured with: those of a replica (``serving.cpus_per_replica``)."""
    finalists: int = Field(default=4, ge=1, le=100)
    """Candidates whose costs are measured once more at the end, alone and longer; the limits hold for these figures."""

    layers: Share = 1.0
    """Share of a transformer's layers that stays."""
    heads: Share = 1.0
    """Share of the attention heads that stays."""
    units: Share = 1.0
    """Share of the feed-forward units that stays."""
    filters: Share = 1.0
    """Share of a convolutional network's filters that stays, those with more work counted more."""
    vocabulary: Share = 1.0
    """Share of the rows in the table of tokens that stays: those of the most frequent tokens in the training rows. The
    tokenizer stays as it is; a rare token reads the row of the one that is most like it."""
    max_tokens: int | None = Field(default=None, ge=4, le=8192)
    """Cut texts to this many tokens. None: as the uncompressed model does."""
    tokens: int | None = Field(default=None, ge=1, le=8192)
    """How many tokens of a text reach the last layer, at most: each layer passes on those that its attention looked at most,
    eight times as many in the second layer. None: all. Without effect where fewer than three layers are left."""
    rank: Share = 1.0
    """Linear layers as products of two thinner ones: share of the rank at which both cost as much as the one; 1: as they
    are."""
    sparsity: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the weights that becomes zero, the smallest first. Brings neither speed nor bytes in these runtimes."""
    recovery: Recovery = Recovery()
    form: FormName = "torch-fp32"

    @field_validator("objectives")
    @classmethod
    def _once_each(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if not objectives or len(set(objectives)) < len(objectives):
            raise ValueError(f"objectives needs one or more, each once, but got {', '.join(objectives) or 'none'}")
        return objectives

    @model_validator(mode="after")
    def _consistent(self) -> Compression:
        if self.space is not None and not self.space:
            raise ValueError("space is empty: name fields to search, or leave it out for what the architecture allows")
        if self.recovery.fake_int8 and self.recovery.epochs == 0:
            raise ValueError("recovery.fake_int8 is a way of training: give recovery.epochs, or leave it out")
        if self.recovery.fake_int8 and self.tokens is not None:
            raise ValueError(
                "recovery.fake_int8 rounds in the library's modules, which read all tokens: leave tokens out"
            )
        return self
