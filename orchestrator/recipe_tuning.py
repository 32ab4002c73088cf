"""The recipe's ``tuning`` section: what is searched, how, and for what.

A dimension is written as its kind and range, ``{log_uniform: [1.0e-5, 1.0e-3]}``; whether its path is a recipe field, and
the range within the field's own, is checked by ``tuning/space.py``, which knows the whole recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from orchestrator.section import Section

Metric = Literal["macro_f1", "weighted_f1", "accuracy", "loss", "latency_ms", "size_mb", "parameters", "seconds"]
"""Of the validation rows: the first four. ``latency_ms``: the median of single inputs; ``size_mb``: of the model's folder;
``seconds``: of training."""
Kind = Literal["choice", "uniform", "log_uniform", "int", "log_int", "quantized"]
_KINDS = ("choice", "uniform", "log_uniform", "int", "log_int", "quantized")
MAXIMIZED = ("macro_f1", "weighted_f1", "accuracy", "agreement", "throughput_per_s")
"""Of the metrics of a search, or of a compression, those of which more is better."""
_FEWEST_MEMBERS = 4
"""Of a population: one of four is replaced at a time."""


class Dimension(Section):
    """One searched field: ``{KIND: VALUES}``, and ``when: {PATH: VALUES}`` if it counts only beside certain values of another.

    A plain list is a ``choice``. ``uniform``, ``log_uniform``, ``int`` and ``log_int`` take [low, high], both included;
    ``quantized`` takes [low, high, step].
    """

    kind: Kind
    values: tuple[Any, ...]
    when: dict[str, tuple[Any, ...]] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        if isinstance(given, Dimension):
            return given
        if isinstance(given, list | tuple):
            given = {"choice": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"needs a kind and its values, such as {{uniform: [0.0, 0.3]}}, but got {given!r}")
        kinds = [key for key in given if key in _KINDS]
        others = [str(key) for key in given if key not in (*_KINDS, "when")]
        if len(kinds) != 1 or others:
            found = ", ".join([*kinds, *others]) or "none"
            raise ValueError(f"needs exactly one of {', '.join(_KINDS)} (and may have when), but got {found}")
        kind, when = kinds[0], given.get("when") or {}
        if not isinstance(when, Mapping):
            raise ValueError(f"when needs other searched fields and their values, but got {when!r}")
        paths = {str(path): tuple(v) if isinstance(v, list | tuple) else (v,) for path, v in when.items()}
        return {"kind": kind, "values": _checked(kind, given[kind]), "when": paths}

    @model_serializer
    def _to_short_form(self) -> dict[str, Any]:
        short: dict[str, Any] = {self.kind: list(self.values)}
        return short | ({"when": {path: list(values) for path, values in self.when.items()}} if self.when else {})


def _checked(kind: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{kind} needs a list, but got {values!r}")
    if kind == "choice":
        if not values:
            raise ValueError("choice needs at least one value")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"choice has a value twice: {list(values)}")
        return tuple(values)
    names = ("low", "high", "step") if kind == "quantized" else ("low", "high")
    if len(values) != len(names):
        raise ValueError(f"{kind} needs [{', '.join(names)}], but got {list(values)}")
    numbers = tuple(_number(kind, value) for value in values)
    if numbers[0] >= numbers[1]:
        raise ValueError(f"{kind} needs low below high, but got {list(values)}")
    if kind.startswith("log") and numbers[0] <= 0:
        raise ValueError(f"{kind} needs low above 0, but got {list(values)}")
    if kind == "quantized" and not 0 < numbers[2] <= numbers[1] - numbers[0]:
        raise ValueError(f"quantized needs a step above 0 and at most high - low, but got {list(values)}")
    return numbers


def _number(kind: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{kind} needs numbers, but got {value!r}") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{kind} needs finite numbers, but got {value!r}")
    if not kind.endswith("int"):
        return number
    if number != int(number):
        raise ValueError(f"{kind} needs whole numbers, but got {value!r}")
    return int(number)


class Bound(Section):
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Bound:
        if self.at_most is None and self.at_least is None:
            raise ValueError("needs at_most, at_least or both")
        return self


class Tuning(Section):
    trials: int = Field(default=24, ge=1, le=100_000)
    """Trials of the study in all: after 16 of them, 32 means 16 more. With pbt, the members of its population."""
    time_budget_s: float | None = Field(default=None, gt=0.0)
    """No trial begins, and none goes on to another epoch, after so long. None: until all trials are done."""
    space: dict[str, Dimension] | None = None
    """Dotted paths of recipe fields and what to try for them. None: what is usual for the task."""
    objectives: tuple[Metric, ...] = ()
    """What to optimise on the validation rows; several give a Pareto front. ``{maximize: macro_f1, minimize: latency_ms}``
    says the same. None given: ``training.best_metric``."""
    constraints: dict[Metric, Bound] = {}
    """The winner keeps within these."""
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "random", "qmc", "grid"] = "tpe"
    """How the next values are chosen: by a density estimate (multivariate TPE), a Gaussian process, an evolution strategy, a
    genetic algorithm for several objectives, at random, evenly spread (Sobol), or all combinations of choices."""
    startup_trials: int = Field(default=8, ge=1, le=10_000)
    """Trials at random before tpe and gp have something to learn from."""
    scheduler: Literal["auto", "asha", "hyperband", "median", "pbt", "none"] = "auto"
    """Which trials are stopped early, by their objective after each epoch. ``auto``: asha for one objective, none for
    several. ``pbt`` stops none: ``trials`` are the members of a population, and every ``min_epochs`` epochs the worst quarter
    of them go on from the weights of the best quarter, with values near theirs."""
    min_epochs: int = Field(default=1, ge=1, le=10_000)
    """No trial is stopped before."""
    reduction: int = Field(default=3, ge=2, le=100)
    """Of asha and hyperband: one trial in so many goes on at each rung."""
    default_first: bool = True
    """The first trial takes the recipe's own values, so that the winner is compared with them."""
    start: tuple[dict[str, Any], ...] = ()
    """Points to try next: values by path; what a point leaves out is the sampler's choice."""
    warm_start: tuple[str, ...] = ()
    """Names of earlier studies whose trials the sampler learns from."""
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Trials at a time. ``auto``: as many as there is room for."""
    database: str | None = None
    """An SQLAlchemy URL for the trials. None: ``registry.url``, or SQLite in the storage folder."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _from_directions(cls, given: Any) -> Any:
        if isinstance(given, str):
            return (given,)
        if not isinstance(given, Mapping):
            return given
        names: list[str] = []
        for direction, metrics in given.items():
            if direction not in ("maximize", "minimize"):
                raise ValueError(f"objectives knows maximize and minimize, but got {direction!r}")
            for metric in [metrics] if isinstance(metrics, str) else metrics:
                if (metric in MAXIMIZED) != (direction == "maximize"):
                    raise ValueError(f"{metric} cannot be {direction}d: the other direction is better")
                names.append(metric)
        return tuple(names)

    @model_validator(mode="after")
    def _consistent(self) -> Tuning:
        if self.space is not None and not self.space:
            raise ValueError("space is empty: name fields to search, or leave it out for what is usual for the task")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives has one twice: {', '.join(self.objectives)}")
        several = len(self.objectives) > 1
        if several and self.scheduler not in ("auto", "none"):
            raise ValueError(f"scheduler {self.scheduler} compares trials by one objective: leave it out for several")
        if self.scheduler == "pbt" and (self.trials < _FEWEST_MEMBERS or self.sampler == "grid"):
            raise ValueError(f"scheduler pbt needs trials of at least {_FEWEST_MEMBERS}, its population, and no grid")
        if several and self.sampler == "cmaes":
            raise ValueError("sampler cmaes takes one objective: use tpe, gp or nsga2 for several")
        return self
