"""The records that walk the path: each stage reads some and writes one. Frozen, JSON, and without behaviour.

    prepare  -> DatasetRecord        tune     -> StudyRecord              train   -> ModelRecord
    compress -> CompressionRecord    evaluate -> EvaluationRecord         promote -> VersionRecord | Hold
    serve    -> EndpointRecord       ensemble -> EnsembleRecord

``location`` is always relative to the storage root, so a storage folder can be moved or mounted elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Interval(Record):
    """A metric's value with its bootstrap confidence interval."""

    value: float
    low: float
    high: float


class CleaningCounts(Record):
    """Rows by what happened to them. ``rows_read`` is the sum of all the others."""

    rows_read: int
    kept: int
    duplicates: int = 0
    """The same input and label, again."""
    conflicts: int = 0
    """The same input under different labels."""
    leaks: int = 0
    """In train although validation or test hold the same input."""
    missing: int = 0
    """No input or no label."""
    unreadable: int = 0
    """Ragged rows, broken images, undecodable cells."""


class SplitStats(Record):
    rows: int
    class_counts: dict[str, int]
    """Rows per label, every label of the dataset present."""


class DatasetRecord(Record):
    stage: Literal["prepare"] = "prepare"
    name: str
    key: str
    """Content address: hash of the source's bytes and of every recipe field that prepare reads."""
    location: str
    task: str
    input_kind: Literal["text", "image"]
    input_column: str
    label_column: str
    labels: tuple[str, ...]
    """Class names; a row's ``label`` column is an index into this tuple."""
    splits: dict[str, SplitStats]
    cleaning: CleaningCounts
    quarantine: str | None = None
    """Location of the file with every row that was set aside and the reason, if there was any."""
    slices: tuple[str, ...] = ()
    size_bytes: int
    seconds: float
    image_size: int | None = None
    mean_tokens: float | None = None
    truncated_fraction: float | None = None
    """Share of the texts that were longer than max_tokens."""


class EpochMetrics(Record):
    epoch: int
    step: int
    train_loss: float
    validation: dict[str, float]
    learning_rate: float
    samples_per_s: float


class RunMetrics(Record):
    """One fold's run, or one member of an ensemble, at its best epoch."""

    location: str
    rows: int
    """Rows it was validated on."""
    best_epoch: int
    validation: dict[str, float]


class CrossValidation(Record):
    runs: tuple[RunMetrics, ...]
    """One per fold."""
    mean: dict[str, float]
    """Of each validation metric over the folds."""
    deviation: dict[str, float]
    """Standard deviation over the folds, with n - 1."""


class Disagreement(Record):
    """How far the members of an ensemble are from each other on the validation rows; entropies in nats."""

    labels: float
    """Share of the rows on which two members give different labels, the mean over all pairs."""
    predictive_entropy: float
    """Of the ensemble's probabilities, the mean over the rows."""
    member_entropy: float
    """Of each member's probabilities, the mean over members and rows."""
    mutual_information: float
    """The difference of the two: how much of the uncertainty is the members' disagreement."""


class Ensemble(Record):
    members: tuple[RunMetrics, ...]
    validation: dict[str, float] | None = None
    """Of the members' mean probabilities. None if the members are the models of folds: no validation row is new to them."""
    disagreement: Disagreement | None = None
    """None where ``validation`` is."""


class MixtureMember(Record):
    """A registered version in an ensemble of versions."""

    version: int
    model: str
    """Key of its ModelRecord."""
    backbone: str
    weight: float
    validation: dict[str, float]
    """What it scores alone."""


class MixtureOfVersions(Record):
    """How registered versions answer as one."""

    members: tuple[MixtureMember, ...]
    combine: Literal["mean", "vote"]
    weights: Literal["equal", "fitted", "given"]
    validation: dict[str, float]
    """Of all together."""
    disagreement: Disagreement


class PrivacySpent(Record):
    """What a run has spent of it, an upper bound: of the training rows, by the weights."""

    epsilon: float
    delta: float
    noise_multiplier: float
    """Standard deviation of the noise in each step, in norms that a row's gradient is clipped to."""


class ModelRecord(Record):
    stage: Literal["train"] = "train"
    name: str
    key: str
    location: str
    """The run's folder."""
    model_location: str
    """The folder any library opens: weights, config, tokenizer or transform, labels, manifest."""
    task: str
    backbone: str
    dataset: str
    """Key of the DatasetRecord it was trained on."""
    epochs: tuple[EpochMetrics, ...]
    best_epoch: int
    best_metric: str
    best_value: float
    steps: int
    workers: int
    device: str
    precision: str
    """Of its training; a compressed model's is its parent's."""
    parameters: int
    size_bytes: int
    seconds: float
    samples_per_s: float
    resumed: int = 0
    """How often training went on from a checkpoint after a stop or a lost worker."""
    stopped_early: bool = False
    privacy: PrivacySpent | None = None
    folds: CrossValidation | None = None
    ensemble: Ensemble | None = None
    """If there is one: steps, seconds and parameters are sums over the members; epochs are those of the first."""
    parent: str | None = None
    """Key of the model that it was compressed from; what the fields say of training is then that model's."""
    mixture: MixtureOfVersions | None = None
    """Of an ensemble of versions; it was not trained itself, so that steps, epochs and seconds are none."""
    form: str | None = None
    """Of a compressed model: runtime and numbers, such as ``openvino-int8``."""


class TrialRecord(Record):
    """One trial of a study, as its database has it."""

    number: int
    state: Literal["complete", "pruned", "failed", "running"]
    """``pruned``: stopped early; its values are those it had then."""
    parameters: dict[str, Any]
    """Value by recipe path, of the fields that counted."""
    metrics: dict[str, float] = {}
    history: tuple[tuple[int, float], ...] = ()
    """(Epochs done, objective) after each epoch; empty with several objectives."""
    violations: tuple[float, ...] = ()
    """Per bound of the constraints how far the trial is outside of it, as a share of the bound; at most 0 is inside."""
    epochs: int = 0
    seconds: float = 0.0
    started: float = 0.0
    """Seconds since 1970."""
    location: str = ""
    """The run's folder."""
    error: str = ""
    kind: str = ""
    """Of a failure: ``out_of_memory`` and ``diverged`` say that the values are bad, ``lost`` that the process died, ``raised``
    that the code did."""
    is_default: bool = False
    """It has the recipe's own values."""
    parent: int | None = None
    """Of a population: the trial whose weights it went on from."""


class StudyRecord(Record):
    stage: Literal["tune"] = "tune"
    name: str
    key: str
    location: str
    study: str
    """Its name in the database."""
    objectives: tuple[str, ...]
    maximized: tuple[bool, ...]
    trials: int
    complete: int
    pruned: int
    failed: int
    winner: TrialRecord
    default: TrialRecord | None = None
    """The trial with the recipe's own values, if one was run."""
    pareto: tuple[int, ...]
    """Numbers of the trials that no other beats in every objective."""
    noise: float | None = None
    """Half the width of the 95% interval of the winner's objective on the validation rows, or over the folds."""
    within_noise: int = 1
    """Trials whose objective is no further than that from the winner's, itself included."""
    optimism: float = 0.0
    """By how much the best of so many scores, each as noisy, is expected to flatter."""
    importances: dict[str, float] = {}
    """Share of the difference between trials that comes from a field (PED-ANOVA); sums to 1."""
    epochs: int
    """Trained in all trials together."""
    seconds: float
    """Of all trials together."""
    report: str
    model: ModelRecord
    """The winner's model, loaded afresh and scored again."""


class Change(Record):
    """What compression did to a class or a slice, on the validation rows."""

    rows: int
    before: float
    """F1 of a class, macro-F1 of a slice."""
    after: float
    is_flagged: bool
    """It lost more than the whole may lose, and more than a row or two make."""


class CompressionRecord(Record):
    stage: Literal["compress"] = "compress"
    name: str
    key: str
    location: str
    study: str
    """Its name in the database."""
    parent: str
    """Key of the ModelRecord that was compressed."""
    before: dict[str, float]
    """The uncompressed model's metrics."""
    objectives: tuple[str, ...]
    maximized: tuple[bool, ...]
    trials: int
    complete: int
    failed: int
    winner: TrialRecord
    """With the costs of the last measurement."""
    finalists: tuple[TrialRecord, ...]
    """Those that were measured once more, the winner among them."""
    all_threads: dict[int, dict[str, float]]
    """Costs of the finalists with all of a machine's cores, by number; -1 is the uncompressed model."""
    pareto: tuple[int, ...]
    """Numbers of the candidates within the limits that no other there beats in every objective."""
    refused: dict[int, str]
    """Why a candidate was not taken."""
    methods: dict[str, str]
    """Method -> nothing, or why this architecture has none of it."""
    forms: dict[str, str]
    """Form -> nothing, or why it is not to be had here."""
    classes: dict[str, Change]
    slices: dict[str, dict[str, Change]] = {}
    seconds: float
    """Of all candidates together."""
    report: str
    model: ModelRecord
    """The winner's, loaded afresh and scored again."""


class EnsembleRecord(Record):
    stage: Literal["ensemble"] = "ensemble"
    name: str
    key: str
    location: str
    rows: int
    """Validation rows, which the weights were fitted on if they were fitted."""
    best: int
    """The version that scores best alone, by the model's ``best_metric``."""
    is_better: bool
    """All together score better than that on the validation rows."""
    seconds: float
    model: ModelRecord


class EvaluationRecord(Record):
    stage: Literal["evaluate"] = "evaluate"
    name: str
    key: str
    location: str
    model: str
    """Key of the ModelRecord."""
    dataset: str
    rows: int
    metrics: dict[str, Interval]
    """accuracy, macro_f1, weighted_f1, macro_precision, macro_recall, roc_auc, average_precision, log_loss,
    calibration_error."""
    per_class: dict[str, dict[str, Interval]]
    """Label -> precision, recall, f1, support (as an interval of zero width), roc_auc, average_precision."""
    confusion: tuple[tuple[int, ...], ...]
    """Row: true label; column: predicted label."""
    slices: dict[str, dict[str, dict[str, float]]] = {}
    """Column -> value -> rows, accuracy, macro_f1."""
    latency_ms_p50: float
    """One input, batch of one, on one worker, tokenising or decoding included."""
    latency_ms_p95: float
    throughput_per_s: float
    size_bytes: int
    report: str
    """Location of the HTML report."""
    predictions: str
    """Location of the Parquet file with the probabilities of each test row."""
    seconds: float


class VersionRecord(Record):
    stage: Literal["promote"] = "promote"
    name: str
    version: int
    location: str
    aliases: tuple[str, ...] = ()
    model: str
    dataset: str
    evaluation: str
    metrics: dict[str, float]
    parents: tuple[int, ...] = ()
    """Versions this one was made from (compression, fine-tuning)."""
    code_version: str
    created_at: str
    """UTC, ISO 8601."""
    manifest_sha256: str
    decision: str = ""
    """Why it was promoted."""


class Hold(Record):
    """The version is registered, but the champion stays."""

    stage: Literal["promote"] = "promote"
    name: str
    version: int
    champion: int | None
    reason: str


class EndpointRecord(Record):
    stage: Literal["serve"] = "serve"
    name: str
    version: int
    url: str
    predict_url: str
    host: str
    port: int
    min_replicas: int
    max_replicas: int
    ray_address: str
    pid: int | None = None
    """Process that keeps a local endpoint up; None on a cluster."""
    seconds: float
