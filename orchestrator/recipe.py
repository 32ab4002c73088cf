"""The recipe: what the user writes, as one frozen, closed model per room.

In: a YAML file and ``--set path=value`` overrides. Out: a ``Recipe``, or a ``RecipeError`` with the line, the column and
the nearest known key. Knows nothing of torch, Ray or the data; so it parses in milliseconds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from orchestrator.errors import RecipeError
from orchestrator.marked_yaml import KeyPath, read_yaml

NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"
"""Names become folders and URL segments: lower case, digits, dot, dash and underscore inside, at most 64 characters."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SplitName = Literal["train", "validation", "test"]


class Section(BaseModel):
    """A part of the recipe: it never changes and takes no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


# --------------------------------------------------------------------------------------------------------------- data


class Columns(Section):
    text: str | None = None
    """Column of the text to classify. Inferred when a single column holds free text."""
    image: str | None = None
    """Column of paths to images, relative to the table's folder. Not needed for a folder of class folders."""
    label: str | None = None
    """Column of the class. Inferred when a single column has few distinct values."""


class SplitFiles(Section):
    train: str
    """Path or URL of the training rows."""
    validation: str | None = None
    """Path or URL of the validation rows; drawn from the training rows when absent."""
    test: str | None = None
    """Path or URL of the test rows; drawn from the training rows when absent."""


class SplitBy(Section):
    group: str | None = None
    """Rows that share a value of this column (a customer, a patient) land in the same split."""
    time: str | None = None
    """The oldest rows train, the newest test, by this column's order (numbers, or ISO 8601 dates)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SplitBy:
        if (self.group is None) == (self.time is None):
            raise ValueError("split.by needs exactly one of group and time")
        return self

    @property
    def column(self) -> str:
        return self.group or self.time or ""


class Split(Section):
    train: Fraction = 0.8
    """Share of the rows to train on."""
    validation: Fraction = 0.1
    """Share of the rows that choose the best checkpoint; never trained on."""
    test: Fraction = 0.1
    """Share of the rows that are looked at once, by evaluate."""
    stratified: bool = True
    """Keep the classes' shares equal in all splits."""
    files: SplitFiles | None = None
    """One file (or folder) per split instead of shares; replaces ``data.source``."""
    by: SplitBy | None = None
    """Split by groups or by time instead of at random."""

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares of train, validation and test must sum to 1, but sum to {total:g}")
        if min(self.train, self.validation, self.test) <= 0.0:
            raise ValueError("train, validation and test each need a share above 0")
        return self


class Cleaning(Section):
    duplicates: Literal["drop", "keep"] = "drop"
    """The same input with the same label, again in the same split."""
    conflicts: Literal["drop", "keep"] = "drop"
    """The same input with different labels: all of its rows are quarantined, or all are kept."""
    leaks: Literal["drop", "keep"] = "drop"
    """The same input in train and in validation or test: removed from train."""


class Data(Section):
    source: str | None = None
    """A .csv, .tsv, .jsonl or .parquet file, a folder of them, or a folder of class folders of images; a local path
    (relative to the working directory) or a URL that pyarrow opens (s3://, gs://, hdfs://, file://)."""
    columns: Columns = Columns()
    split: Split = Split()
    cleaning: Cleaning = Cleaning()
    encoding: str = "utf-8"
    """Character encoding of CSV, TSV and JSONL files; a byte order mark wins over it."""
    max_rows: int | None = Field(default=None, ge=10)
    """Read only the first rows (or a seeded sample of images): for a quick try."""
    batch_rows: int = Field(default=2048, ge=1, le=1_000_000)
    """Rows that are in memory at once while preparing."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.source is None) == (self.split.files is None):
            raise ValueError("data needs exactly one of source and split.files")
        return self


# -------------------------------------------------------------------------------------------------------------- model


class Model(Section):
    backbone: str | None = None
    """Text: a hub id, a local folder, or package:NAME, the folder with config.json inside an installed Python package.
    Images: the name of a torchvision classification architecture. None: all-MiniLM-L6-v2, or resnet50."""
    weights: str = "pretrained"
    """``pretrained``: the backbone's published weights; ``none``: start from random weights; else the path of a
    state dict (.safetensors, or .pth read without unpickling code). Text backbones take the first two."""
    max_tokens: int = Field(default=128, ge=8, le=8192)
    """Longer texts are cut to this many tokens (text only)."""
    image_size: int | None = Field(default=None, ge=16, le=1024)
    """Side in pixels of the square the network sees (images only). None: the images' median short side, rounded up to
    a multiple of 32, at least 64 and at most 224."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout probability of the whole network (text) or before the head (images). None: as the backbone says."""


# ----------------------------------------------------------------------------------------------------------- training


class Augmentation(Section):
    """Random changes of training images, drawn anew for each image and epoch. All off by default."""

    horizontal_flip: Fraction = 0.0
    """Probability of a left-right flip."""
    rotation_degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    """Rotated by a uniform angle within plus or minus this."""
    crop_scale: float = Field(default=1.0, gt=0.0, le=1.0)
    """A crop of at least this share of the area, resized back; 1 is no crop."""
    zoom: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Scaled by a uniform factor within 1 plus or minus this."""
    color: float = Field(default=0.0, ge=0.0, le=1.0)
    """Strength of brightness, contrast and saturation jitter."""


class EarlyStopping(Section):
    patience_epochs: int = Field(default=2, ge=1)
    """Stop after this many epochs without a better ``training.best_metric`` on validation."""
    min_gain: float = Field(default=0.0, ge=0.0)
    """A smaller gain than this does not count as better (in the metric's unit)."""


class Training(Section):
    epochs: int = Field(default=3, ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    """Rows per optimiser step, over all workers and accumulation steps together: more workers, same result."""
    accumulate_steps: int = Field(default=1, ge=1, le=1024)
    """Forward and backward passes per optimiser step; each sees batch_size / accumulate_steps rows. Saves memory."""
    learning_rate: float | None = Field(default=None, gt=0.0, le=10.0)
    """Peak learning rate. None: 5e-5 for text, 3e-4 for pretrained images, 1e-3 for images from random weights."""
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0)
    """AdamW's decoupled decay; norms and biases are exempt."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls from its peak to zero after the warm-up."""
    warmup_fraction: Fraction = 0.06
    """Share of all steps in which the learning rate climbs from zero."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this global L2 norm; None: never."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the probability mass spread over all classes."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """``balanced``: each class weighs n / (classes * n_class) in the loss; or a weight per label."""
    oversample: bool = False
    """Draw the rows of rare classes more often, until all classes are equally frequent in an epoch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 where the processor or GPU multiplies bf16 in hardware, else fp32."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Data-parallel processes. ``auto``: one per GPU of the cluster, else one per CPU core up to 4."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: the GPU if the cluster has any."""
    best_metric: Literal["macro_f1", "weighted_f1", "accuracy", "loss"] = "macro_f1"
    """The validation metric that chooses the best epoch's weights."""
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between checkpoints inside an epoch; one is written at each epoch's end in any case."""
    max_failures: int = Field(default=2, ge=0, le=100)
    """How often workers that died are started again from the last checkpoint before the run gives up."""
    augmentation: Augmentation = Augmentation()


# ---------------------------------------------------------------------------------------- evaluation, promotion, serving


class Evaluation(Section):
    slices: tuple[str, ...] = ()
    """Columns of the source; metrics are given for each of their values too."""
    bootstrap_samples: int = Field(default=1000, ge=100, le=100_000)
    """Resamples of the test rows behind each confidence interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Coverage of the confidence intervals."""
    mistakes: int = Field(default=20, ge=0, le=1000)
    """How many of the most confident mistakes to show."""
    batch_size: int = Field(default=64, ge=1, le=65_536)
    """Rows per forward pass."""


class Promotion(Section):
    metric: Literal["macro_f1", "weighted_f1", "accuracy"] = "macro_f1"
    """What the challenger has to be better in, on the same test rows."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Probability, by a paired bootstrap, that the challenger is better, from which it is promoted."""
    at_least: Fraction = 0.0
    """A model below this value of the metric is never promoted."""


class Serving(Section):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the endpoint to the network."""
    port: int = Field(default=8000, ge=1, le=65_535)
    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(default=2, ge=1, le=1000)
    cpus_per_replica: float = Field(default=1.0, gt=0.0, le=256.0)
    """CPU cores that each replica reserves, and the threads it computes with."""
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Instances that are predicted together at most."""
    latency_budget_ms: float = Field(default=50.0, gt=0.0, le=60_000.0)
    """What a request may take; the batching window and the autoscaling follow from it."""
    request_timeout_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """A request that is not answered by then is answered with 503."""
    max_instances: int = Field(default=128, ge=1, le=100_000)
    """Instances in one request at most."""
    max_body_bytes: int = Field(default=10_000_000, ge=1_000, le=1_000_000_000)
    """Size of a request's body at most."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Serving:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})")
        return self


class Registry(Section):
    url: str | None = None
    """An SQLAlchemy URL of the registry's database. None: SQLite in the storage folder."""


class Recipe(Section):
    name: Name
    """The model's name in the registry and on the endpoint."""
    task: Literal["text_classification", "image_classification"]
    storage: str = "./runs"
    """Folder or URL under which datasets, runs, evaluations and the registry live."""
    seed: int = Field(default=17, ge=0, lt=2**32)
    """Of splits, initial weights, dropout, batch order and the bootstrap."""
    data: Data
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    promotion: Promotion = Promotion()
    serving: Serving = Serving()
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _reserved_names(self) -> Recipe:
        if self.name in {"promote", "rollback", "verify"}:
            raise ValueError(f"name {self.name!r} is a word of the command line; choose another")
        return self


# ------------------------------------------------------------------------------------------------------------- loading

_MAX_RECIPE_BYTES = 1_000_000


def load_recipe(path: str | Path, overrides: Sequence[str] = (), storage: str | None = None) -> Recipe:
    """Read a recipe file, apply ``--set`` overrides (``path=value``, the value in YAML) and ``--storage``.

    Raises:
        RecipeError: file missing, not YAML, a duplicate or unknown key, a value outside its range.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_RECIPE_BYTES:
            raise RecipeError(f"a recipe is at most {_MAX_RECIPE_BYTES} bytes, but {file} has {file.stat().st_size}")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {file}", "write one with: orchestrator init DATA") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {file} ({error})", "it must be a readable UTF-8 text file") from None
    return parse_recipe(text, str(file), overrides, storage)


def parse_recipe(
    text: str, origin: str = "recipe", overrides: Sequence[str] = (), storage: str | None = None
) -> Recipe:
    """Turn YAML text into a ``Recipe``; ``origin`` names it in error messages."""
    values, marks = read_yaml(text, origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} must be a mapping of keys", "start from: orchestrator init DATA")
    for override in overrides:
        _apply_override(values, override)
    if storage is not None:
        values["storage"] = storage
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin, marks)) from None


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def known_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted path of a recipe field, sections first."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field.annotation)
        if section is not None:
            yield from known_paths(section, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, raw = override.partition("=")
    if not equals:
        raise RecipeError(f"--set needs PATH=VALUE, but got {override!r}", "for example --set training.epochs=1")
    keys = path.strip().split(".")
    if path.strip() not in set(known_paths()) and keys[:2] != ["training", "class_weights"]:
        raise RecipeError(
            f"--set {path.strip()} is not a recipe field", _did_you_mean(path.strip(), list(known_paths()))
        )
    value, _ = read_yaml(raw, f"--set {path}")
    target = values
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    target[keys[-1]] = value


def _explain(error: ValidationError, origin: str, marks: Mapping[KeyPath, yaml.Mark]) -> str:
    lines: dict[str, None] = {}
    for item in error.errors():
        location = tuple(part for part in item["loc"] if not _is_union_tag(part))
        dotted = ".".join(map(str, location)) or "recipe"
        lines[f"{_where(origin, location, marks)}: {_one_problem(item, dotted)}"] = None
    return "\n".join(lines)


def _is_union_tag(part: str | int) -> bool:
    """Pydantic adds a union member's type to the location; users know only their keys."""
    return isinstance(part, str) and bool(re.search(r"[\[(]|^(int|float|str|constrained-)", part))


def _where(origin: str, location: KeyPath, marks: Mapping[KeyPath, yaml.Mark]) -> str:
    for length in range(len(location), 0, -1):
        if mark := marks.get(location[:length]):
            return f"{origin}:{mark.line + 1}:{mark.column + 1}"
    return origin


def _one_problem(item: Any, dotted: str) -> str:
    if item["type"] == "extra_forbidden":
        hint = _did_you_mean(dotted, list(known_paths()))
        return f"{dotted} is not a recipe field: {hint}"
    if item["type"] == "missing":
        return f"{dotted} is required: add it"
    if item["type"] == "string_pattern_mismatch" and dotted == "name":
        return (
            f"name must be lower-case letters, digits, '.', '-' or '_', at most 64 characters, starting and ending with "
            f"a letter or digit, but got {item['input']!r}"
        )
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{dotted}: {message}"
    return f"{dotted}: {message[0].lower()}{message[1:]}, but got {item['input']!r}"


def _did_you_mean(dotted: str, candidates: Sequence[str]) -> str:
    parent, _, leaf = dotted.rpartition(".")
    siblings = [c for c in candidates if c.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, [s.rpartition(".")[2] for s in siblings], n=1, cutoff=0.6)
    if near:
        return f"did you mean {f'{parent}.' if parent else ''}{near[0]}?"
    elsewhere = [c for c in candidates if c.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(dotted, candidates, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    return "known here are " + ", ".join(s.rpartition(".")[2] for s in siblings) if siblings else "remove it"
