"""Population-based training (Jaderberg et al. 2017): who goes on from whom, and with which values. Pure.

In: the parts of every member's training so far. Out: the next part. Each part is a trial of the study. A generation begins
when the one before is over, so that what comes out does not depend on which trials happened to go on at the same time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.recipe import Training
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.tuning.space import Point, Space

_SHARE = 4
"""One member in so many gives up its weights after each part, for those of one of as many best."""
_ANEW = 0.25
"""Probability that a changed field is drawn anew instead of moved."""
_FACTOR, _STEP = 1.25, 0.1
"""How far a field is moved: by this factor if its range is logarithmic, by this share of the range otherwise."""
FIELDS = ("learning_rate", "weight_decay", "label_smoothing", "focal_gamma", "class_weights", "max_grad_norm", "mixup",
          "adversarial", "warmup_fraction", "augmentation")  # fmt: skip
"""Of ``training``: what can change in the midst of a run."""


@dataclass(frozen=True)
class Part:
    """A trial of the study: ``min_epochs`` epochs of one member's training."""

    number: int
    member: int
    generation: int
    """0-based."""
    point: Point
    is_over: bool
    value: float | None
    """The objective after its last epoch, more is better; None: it failed."""


@dataclass(frozen=True)
class Heir:
    member: int
    generation: int
    parent: int
    """Number of the trial whose weights it goes on from."""
    point: Point


def generations(tuning: Tuning, training: Training) -> int:
    """Parts that each member's training has; 1 unless the scheduler is pbt."""
    return math.ceil(training.epochs / tuning.min_epochs) if tuning.scheduler == "pbt" else 1


def can_change(path: str) -> bool:
    """Whether a field may have another value in the midst of a run."""
    section, _, field = path.partition(".")
    return section == "training" and field.split(".")[0] in FIELDS


def next_heir(parts: Sequence[Part], generations: int, space: Space, seed: int) -> Heir | None:
    """None while a generation is not over, and when all have been begun."""
    for generation in range(1, generations):
        before = sorted((p for p in parts if p.generation == generation - 1), key=lambda part: part.member)
        begun = {part.member for part in parts if part.generation == generation}
        left = [part for part in before if part.member not in begun]
        if left:
            is_over = all(part.is_over for part in before) and any(part.value is not None for part in before)
            return _heir(left[0], before, space, seed) if is_over else None
    return None


def _heir(part: Part, before: Sequence[Part], space: Space, seed: int) -> Heir:
    ranked = sorted((p for p in before if p.value is not None), key=lambda p: (-(p.value or 0.0), p.number))
    share = max(1, len(before) // _SHARE)
    best, worst = ranked[:share], [p for p in before if p.value is None] + ranked[share:][-share:]
    generation = part.generation + 1
    if part not in worst:
        return Heir(part.member, generation, part.number, part.point)
    generator = random.Random(f"{seed} {part.member} {generation}")
    parent = generator.choice(best)
    return Heir(part.member, generation, parent.number, explored(parent.point, space, generator))


def explored(point: Point, space: Space, generator: random.Random) -> Point:
    """A point near by: each field moved a little, or now and then drawn anew."""
    found: Point = {}
    for parameter in space.parameters:
        if parameter.counts(found):
            anew = parameter.path not in point or generator.random() < _ANEW
            dimension = parameter.dimension
            found[parameter.path] = (
                _drawn(dimension, generator) if anew else _moved(point[parameter.path], dimension, generator)
            )
    return found


def _drawn(dimension: Dimension, generator: random.Random) -> object:
    if dimension.kind == "choice":
        return generator.choice(dimension.values)
    low, high, *_ = dimension.values
    if dimension.kind.startswith("log"):
        return _inside(math.exp(generator.uniform(math.log(low), math.log(high))), dimension)
    return _inside(generator.uniform(low, high), dimension)


def _moved(value: object, dimension: Dimension, generator: random.Random) -> object:
    up = generator.random() < 0.5
    if dimension.kind == "choice":
        at = dimension.values.index(value)
        return dimension.values[min(max(at + (1 if up else -1), 0), len(dimension.values) - 1)]
    assert isinstance(value, int | float)
    low, high, *_ = dimension.values
    if dimension.kind.startswith("log"):
        moved = value * (_FACTOR if up else 1 / _FACTOR)
    else:
        moved = value + (high - low) * (_STEP if up else -_STEP)
    at_least = dimension.values[2] if dimension.kind == "quantized" else 1 if dimension.kind.endswith("int") else 0
    if abs(moved - value) < at_least:
        moved = value + (at_least if up else -at_least)
    return _inside(moved, dimension)


def _inside(value: float, dimension: Dimension) -> float:
    low, high, *step = dimension.values
    if step:
        most = int((high - low) / step[0] + 1e-9)
        return float(low + min(max(round((value - low) / step[0]), 0), most) * step[0])
    value = min(max(value, low), high)
    return round(value) if dimension.kind.endswith("int") else value
