"""The recipe: what the user writes, as one frozen, closed model per room.

In: a YAML file and ``--set path=value`` overrides. Out: a ``Recipe``, or a ``RecipeError`` with the line, the column and
the nearest known key. Knows nothing of torch, Ray or the data; so it parses in milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.recipe_compression import Compression
from orchestrator.recipe_serving import Serving
from orchestrator.recipe_tuning import Tuning
from orchestrator.section import Fraction, Name, Section

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


class Averaging(Section):
    kind: Literal["ema", "swa"] = "ema"
    """``ema``: an exponential moving average of the weights after each step; ``swa``: their plain mean over the last steps
    (Izmailov et al. 2018). The statistics of batch norms are averaged too."""
    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """Of ``ema``: what the average keeps of itself per step; it remembers about 1 / (1 - decay) steps."""
    start_fraction: float = Field(default=0.75, ge=0.0, lt=1.0)
    """Of ``swa``: share of all steps after which averaging begins; until then the weights are taken as they are."""


class Lora(Section):
    rank: int = Field(default=8, ge=1, le=1024)
    """Width of the matrices that train beside each target layer."""
    alpha: float = Field(default=16.0, gt=0.0, le=10_000.0)
    """What the matrices add is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an input of the matrices."""
    targets: tuple[str, ...] | None = None
    """Last parts of the names of linear layers, such as query and value. None: what peft takes for this backbone."""


class Privacy(Section):
    epsilon: float = Field(default=8.0, gt=0.0, le=1000.0)
    """How much more likely any result may become by one training row, as a logarithm, over the whole run; the noise follows
    from it. 8 is usual, 1 is strong."""
    delta: float = Field(default=1e-5, gt=0.0, lt=1.0)
    """Probability with which that may not hold; below 1 / training rows."""


class Distillation(Section):
    weight: Fraction = 0.7
    """Share of each row's loss that measures the distance to the teacher's answer; the rest that to the label."""
    temperature: float = Field(default=2.0, ge=1.0, le=100.0)
    """What the logits of both are divided by: the higher, the more the teacher's unlikely classes count."""
    hidden: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Weight of what the hidden states of both differ in, layer by layer, added to the loss. 0 is none, 1 is usual."""
    altered: Fraction = 0.0
    """Share of the texts that are altered anew in each epoch, with tokens and halves of others; of these the teacher alone
    says what they are. A student learns longer before it learns by heart."""


class Workers(Section):
    min: int = Field(default=1, ge=1, le=4096)
    """With fewer than these the run waits."""
    max: int = Field(default=4, ge=1, le=4096)

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class Training(Section):
    epochs: int = Field(default=3, ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    """Rows per optimiser step, over all workers and accumulation steps together: more workers, same result."""
    accumulate_steps: int = Field(default=1, ge=1, le=1024)
    """Forward and backward passes per optimiser step; each sees batch_size / accumulate_steps rows. Saves memory."""
    learning_rate: float | None = Field(default=None, gt=0.0, le=10.0)
    """Peak learning rate. None: 5e-5 for text, 3e-4 for pretrained images, 1e-3 for images from random weights."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """The learning rate of each layer is this factor times that of the layer above it; the head has the full rate,
    embeddings or the stem the lowest. 1 is the same rate for all."""
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
    focal_gamma: float = Field(default=0.0, ge=0.0, le=10.0)
    """Exponent of the focal loss (Lin et al. 2017): the higher, the less rows count that are answered well already. 0 is
    cross-entropy, 2 is usual."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """``balanced``: each class weighs n / (classes * n_class) in the loss; or a weight per label."""
    oversample: bool = False
    """Draw the rows of rare classes more often, until all classes are equally frequent in an epoch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 where the processor or GPU multiplies bf16 in hardware, else fp32."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] | Workers = "auto"
    """Data-parallel processes. ``auto``: one per GPU of the cluster; on a machine without GPUs one per eight cores, on a
    cluster without GPUs one per core, up to 4. ``{min: 1, max: 4}``: as many as there is room for; when some are lost for
    good the run goes on with the others."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: each worker holds the whole network; ``fsdp``: each holds a part of its weights, gradients and optimiser,
    for networks that do not fit otherwise. Checkpoints are the same: a run may go on with the other one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: the GPU if the cluster has any."""
    best_metric: Literal["macro_f1", "weighted_f1", "accuracy", "loss"] = "macro_f1"
    """The validation metric that chooses the best epoch's weights."""
    early_stopping: EarlyStopping | None = None
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between checkpoints inside an epoch; one is written at each epoch's end in any case."""
    checkpoint_every_s: float | None = Field(default=300.0, gt=0.0)
    """Seconds after which another checkpoint is written inside an epoch; None: by steps alone."""
    max_failures: int = Field(default=2, ge=0, le=100)
    """How often workers that died or hung are started again from the last checkpoint before the run gives up."""
    max_rollbacks: int = Field(default=3, ge=0, le=20)
    """How often the run goes back to its last checkpoint, each time with half the learning rate, when the loss is no
    number any more."""
    disk_full_patience_s: float = Field(default=600.0, ge=0.0, le=86_400.0)
    """How long a run whose disk is full waits for room before it gives up; what it wrote before is intact either way."""
    hang_timeout_s: float = Field(default=300.0, ge=1.0, le=86_400.0)
    """A worker that does nothing for so long is ended and started again. Longer than any single step takes."""
    augmentation: Augmentation = Augmentation()
    folds: int | None = Field(default=None, ge=2, le=20)
    """K-fold cross-validation: the rows of train and validation are dealt into so many folds, and each is validated by a
    run that trains on the others. The test rows are not touched. None: no cross-validation."""
    ensemble: Literal["folds"] | Annotated[int, Field(ge=1, le=32)] = 1
    """Networks trained from different seeds and saved as one model, which answers with the mean of their
    probabilities; 1 is a single network. ``folds``: the networks of the cross-validation are the members."""
    mixup: float = Field(default=0.0, ge=0.0, le=100.0)
    """Alpha of mixup (Zhang et al. 2018), images only: each image is blended with another by a share from Beta(alpha,
    alpha). 0 is none, 0.2 is usual."""
    adversarial: float = Field(default=0.0, ge=0.0, le=100.0)
    """Epsilon of adversarial training (Miyato et al. 2017): each row is trained on a second time, its word embeddings or
    normalised pixels moved by this L2 distance to where its loss grows fastest. 0 is none. Doubles the time."""
    averaging: Averaging | None = None
    """Average the weights over steps; what is validated, kept as best and saved is the average. None: the last weights."""
    lora: Lora | None = None
    """Train small matrices beside the backbone's layers, and the head, instead of all weights (text only; needs
    ``pip install 'ray-orchestrator[lora]'``). The saved model is merged. None: train all weights."""
    privacy: Privacy | None = None
    """Differential privacy by DP-SGD (Abadi et al. 2016; needs ``pip install 'ray-orchestrator[privacy]'``): each row's
    gradient is scaled down to ``max_grad_norm``, and noise is added. Batches are drawn by chance, ``batch_size`` rows on
    average, and batch norms stay as they are. It covers the training rows and the saved model; checkpoints and metrics are
    as confidential as the rows. None: none."""
    distillation: Distillation | None = None
    """Learn a teacher's answers beside the labels (Hinton et al. 2015). ``orchestrator compress`` has a teacher, the model
    that it makes smaller; ``orchestrator train`` has none. None: the labels alone."""
    fake_int8: bool = False
    """Quantisation-aware training (Jacob et al. 2018): training steps round weights and inputs of linear and convolution layers
    as an int8 runtime will. What is validated and saved are the plain fp32 weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: far less memory, about a third more
    time."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of parameters that stay as they are, such as ``bert.embeddings.*`` or ``layer1.*``; batch norms among
    them keep their statistics too."""

    @model_validator(mode="after")
    def _whole_weights(self) -> Training:
        ours = self.averaging or self.adversarial or self.lora or self.distillation or self.fake_int8
        if self.strategy == "fsdp" and ours:
            raise ValueError(
                "averaging, adversarial, lora, distillation and fake_int8 need the whole weights on each worker: set "
                "strategy to ddp"
            )
        return self

    @model_validator(mode="after")
    def _what_misleads(self) -> Training:
        if self.distillation and self.folds:
            raise ValueError("distillation does not go with folds, since the teacher has seen the rows that they are "
                             "validated on: leave out one or the other")  # fmt: skip
        if self.fake_int8 and self.lora:
            raise ValueError("fake_int8 does not go with lora, whose layers are rounded before they are merged: leave "
                             "out one or the other")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _private(self) -> Training:
        """What would use a row more often than the accountant knows, or in ways that clipping does not bound."""
        against = {
            "strategy: fsdp": self.strategy == "fsdp", "precision: bf16": self.precision == "bf16", "mixup": self.mixup,
            "adversarial": self.adversarial, "oversample": self.oversample, "folds": self.folds,
            "class_weights: balanced": self.class_weights == "balanced", "ensemble": self.ensemble != 1,
            "gradient_checkpointing": self.gradient_checkpointing, "max_grad_norm: null": self.max_grad_norm is None,
            "distillation": self.distillation, "fake_int8": self.fake_int8,
        }  # fmt: skip
        if self.privacy and (found := [name for name, given in against.items() if given]):
            raise ValueError(f"privacy does not go with {', '.join(found)}: leave out one or the other")
        return self

    @model_validator(mode="after")
    def _folds_to_join(self) -> Training:
        if self.ensemble == "folds" and self.folds is None:
            raise ValueError("ensemble is folds, but there are none: set training.folds, or ensemble to a number")
        return self


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
    tuning: Tuning | None = None
    """Search for better values of recipe fields; the winner is the model. None: train with the recipe's own values."""
    compression: Compression | None = None
    """Make the trained model smaller and faster, within limits. None: it stays as it is."""
    evaluation: Evaluation = Evaluation()
    promotion: Promotion = Promotion()
    serving: Serving = Serving()
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _reserved_names(self) -> Recipe:
        if self.name in {"promote", "rollback", "verify"}:
            raise ValueError(f"name {self.name!r} is a word of the command line; choose another")
        return self

    @model_validator(mode="after")
    def _folds_have_no_order(self) -> Recipe:
        if self.training.folds and self.data.split.by and self.data.split.by.time:
            raise ValueError(
                f"training.folds would train on rows that are newer than those it validates on, which data.split.by.time "
                f"({self.data.split.by.time}) rules out; leave training.folds out, or split at random or by group"
            )
        return self

    @model_validator(mode="after")
    def _private_rows_stay_private(self) -> Recipe:
        if self.training.privacy and self.compression:
            raise ValueError(
                "compression looks at the training rows without noise, which training.privacy rules out; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _knobs_fit_the_task(self) -> Recipe:
        if self.training.mixup and self.task != "image_classification":
            raise ValueError(
                "training.mixup blends pixels, which texts have none of; remove it, or use label_smoothing"
            )
        if self.training.lora and self.task != "text_classification":
            raise ValueError("training.lora adapts text backbones alone; remove it, or use freeze")
        return self
