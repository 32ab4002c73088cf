"""The search space: recipe fields by dotted path, as Optuna's distributions and back.

In: a recipe and the fields of it that are searched, by the ``tuning`` or the ``compression`` section. Out: a ``Space``: it
draws points, checks them, and makes recipes of them. Everything is checked against the recipe's own types and ranges before
anything runs. Pure.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import did_you_mean, known_paths, problems_of
from orchestrator.recipe_tuning import Dimension

Point = dict[str, Any]
"""Values by path, of the fields that count for this point."""

_CANDIDATES = ("layers", "heads", "units", "filters", "vocabulary", "max_tokens", "tokens", "rank", "sparsity", "form",
               "recovery.")  # fmt: skip
_SEARCHED = {"tuning": ("model.", "training."), "compression": tuple(f"compression.{name}" for name in _CANDIDATES)}
_WHAT_DIFFERS = {
    "tuning": "trials differ in fields of model and training, and are compared on the same rows",
    "compression": f"candidates differ in {', '.join(name.rstrip('.') for name in _CANDIDATES)}",
}
_NOT_SEARCHED = {
    "training.workers": "it changes where a trial runs, not what comes out",
    "training.device": "it changes where a trial runs, not what comes out",
    "training.folds": "trials are compared on the same rows: set it in the recipe, and the mean over the folds counts",
    "training.best_metric": "it is what trials are compared by",
    "training.max_failures": "it changes no weights",
    "training.max_rollbacks": "it changes no weights",
    "training.disk_full_patience_s": "it changes no weights",
    "training.hang_timeout_s": "it changes no weights",
    "training.checkpoint_every_steps": "it changes no weights",
    "training.checkpoint_every_s": "it changes no weights",
}  # fmt: skip
_MAX_GRID = 100_000


@dataclass(frozen=True)
class Parameter:
    """A searched field."""

    path: str
    dimension: Dimension
    distribution: BaseDistribution

    section: str = "tuning"
    """Of the recipe, for messages."""

    def encode(self, value: Any) -> Any:
        """As Optuna keeps it: a choice that is no scalar is kept as JSON."""
        return _encoded(value) if self.dimension.kind == "choice" else value

    def decode(self, value: Any) -> Any:
        if self.dimension.kind != "choice":
            return value
        return next(choice for choice in self.dimension.values if _same(_encoded(choice), value))

    def holds(self, value: Any) -> bool:
        if self.dimension.kind == "choice":
            return any(_same(value, choice) for choice in self.dimension.values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return bool(self.distribution._contains(self.distribution.to_internal_repr(value)))

    def counts(self, point: Mapping[str, Any]) -> bool:
        """Whether the values of the fields it depends on ask for it."""
        return all(
            path in point and any(_same(point[path], wanted) for wanted in values)
            for path, values in self.dimension.when.items()
        )

    def grid(self) -> list[Any]:
        """Every value there is. Raises RecipeError for a range without steps."""
        low, high, *step = self.dimension.values if self.dimension.kind != "choice" else (0, 0)
        match self.dimension.kind:
            case "choice":
                return list(self.dimension.values)
            case "int" | "log_int":
                return list(range(low, high + 1))
            case "quantized":
                return [low + i * step[0] for i in range(int((high - low) / step[0] + 1e-9) + 1)]
        raise RecipeError(
            f"{self.section}.space.{self.path} is {self.dimension.kind}, which has no end of values, but the sampler is grid",
            "name them with choice, or take steps with quantized: [low, high, step]",
        )


class Space:
    """Searched fields, those that others depend on first."""

    def __init__(self, recipe: Recipe, dimensions: Mapping[str, Dimension], section: str = "tuning") -> None:
        """Raises RecipeError for a path that cannot be searched or a range outside of the field's. ``section``: of the recipe,
        which says what may be searched."""
        self.recipe = recipe
        for path in dimensions:
            _check_path(path, section)
        self.parameters = tuple(
            Parameter(path, dimensions[path], _distribution(dimensions[path]), section)
            for path in _in_order(dimensions, section)
        )
        for parameter in self.parameters:
            _check_conditions(parameter, dimensions)
            _check_range(recipe, parameter)

    @property
    def is_conditional(self) -> bool:
        return any(parameter.dimension.when for parameter in self.parameters)

    @property
    def is_finite(self) -> bool:
        """Whether its points can be listed, and are not too many for that."""
        return all(p.dimension.kind not in ("uniform", "log_uniform") for p in self.parameters) and (
            _product(len(p.grid()) for p in self.parameters) <= _MAX_GRID
        )

    def draw(self, trial: optuna.Trial) -> Point:
        """The trial's values, as its study's sampler chooses them."""
        point: Point = {}
        for parameter in self.parameters:
            if parameter.counts(point):
                point[parameter.path] = parameter.decode(_suggest(trial, parameter))
        return point

    def recipe_at(self, point: Mapping[str, Any]) -> Recipe:
        """The recipe with a point's values. Raises RecipeError if they do not go together."""
        return recipe_with(self.recipe, point)

    def encode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """As Optuna keeps it."""
        by_path = {parameter.path: parameter for parameter in self.parameters}
        return {path: by_path[path].encode(value) for path, value in point.items()}

    def decode(self, values: Mapping[str, Any]) -> Point:
        """What was encoded."""
        return {p.path: p.decode(values[p.path]) for p in self.parameters if p.path in values}

    def default(self, learning_rate: float) -> Point | None:
        """The recipe's own values; None if some lie outside the space. ``learning_rate``: what it is if left to the task."""
        values = self.recipe.model_dump(mode="json")
        point: Point = {}
        for parameter in self.parameters:
            if not parameter.counts(point):
                continue
            value = value_at(values, parameter.path)
            if parameter.path == "training.learning_rate" and value is None:
                value = learning_rate
            if not parameter.holds(value):
                return None
            point[parameter.path] = value
        return point

    def check_point(self, point: Mapping[str, Any], name: str) -> None:
        """Raises RecipeError for a path that is not searched or a value outside of its range. ``name``: for the message."""
        by_path = {parameter.path: parameter for parameter in self.parameters}
        for path, value in point.items():
            if path not in by_path:
                raise RecipeError(f"{name} has {path}, which is not searched", did_you_mean(path, list(by_path)))
            if not by_path[path].holds(value):
                raise RecipeError(f"{name}: {path} is {value!r}, outside of {told(by_path[path].dimension)}",
                                  "give a value inside, or widen the space")  # fmt: skip

    def contains(self, point: Mapping[str, Any]) -> bool:
        """Whether it has a value inside for each field that counts, and no other."""
        counting = {p.path: p for p in self.parameters if p.counts(point)}
        return set(counting) == set(point) and all(counting[path].holds(value) for path, value in point.items())

    def distributions(self, point: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        return {p.path: p.distribution for p in self.parameters if p.path in point}

    def grid(self) -> list[Point]:
        """Every combination, in order. Raises RecipeError if a range has no steps, or there are too many."""
        values = [parameter.grid() for parameter in self.parameters]
        if (size := _product(map(len, values))) > _MAX_GRID:
            raise RecipeError(f"the grid has {size} points", f"leave some out: at most {_MAX_GRID}, or another sampler")
        points: dict[str, Point] = {}
        for combination in itertools.product(*values):
            point: Point = {}
            for parameter, value in zip(self.parameters, combination, strict=True):
                if parameter.counts(point):
                    point[parameter.path] = value
            points.setdefault(json.dumps(point), point)
        return list(points.values())


def including(dimension: Dimension, value: Any) -> Dimension:
    """The dimension, stretched where it does not hold a value: another choice, or a further end."""
    if value is None or Parameter("", dimension, _distribution(dimension)).holds(value):
        return dimension
    if dimension.kind == "choice":
        values = (*dimension.values, value)
        return dimension.model_copy(update={"values": tuple(sorted(values)) if _are_numbers(values) else values})
    low, high, *step = dimension.values
    return dimension.model_copy(update={"values": (min(low, value), max(high, value), *step)})


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def told(dimension: Dimension) -> str:
    """For people: ``log_uniform [1e-05, 0.001]``."""
    return f"{dimension.kind} {list(dimension.values)}"


def recipe_with(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe with these values of its fields, and no search.

    Raises:
        RecipeError: they do not go together.
    """
    values = recipe.model_dump(mode="json") | {"tuning": None}
    for path, value in point.items():
        *parents, leaf = path.split(".")
        target = values
        for key in parents:
            target = target[key] if isinstance(target[key], dict) else target.setdefault(key, {})
        target[leaf] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(problems_of(error))) from None


def _check_path(path: str, section: str) -> None:
    paths = [p for p in known_paths() if p.startswith(_SEARCHED[section])]
    if path in _NOT_SEARCHED or path.startswith("training.workers."):
        why = _NOT_SEARCHED.get(path, _NOT_SEARCHED["training.workers"])
        raise RecipeError(f"{section}.space.{path} cannot be searched", why)
    if path in paths:
        return
    if path in set(known_paths()):
        raise RecipeError(f"{section}.space.{path} cannot be searched", _WHAT_DIFFERS[section])
    raise RecipeError(f"{section}.space.{path} is not a recipe field", did_you_mean(path, paths))


def _check_conditions(parameter: Parameter, dimensions: Mapping[str, Dimension]) -> None:
    for path, values in parameter.dimension.when.items():
        where = f"{parameter.section}.space.{parameter.path}: when names {path}"
        if path not in dimensions:
            raise RecipeError(f"{where}, which is not searched", did_you_mean(path, list(dimensions)))
        possible = Parameter(path, dimensions[path], _distribution(dimensions[path]))
        for value in values:
            if not possible.holds(value):
                raise RecipeError(f"{where}: {value!r}, outside of {told(dimensions[path])}", "it would never count")


def _check_range(recipe: Recipe, parameter: Parameter) -> None:
    """A field's range has no holes: the ends stand for what is between them."""
    kind, values = parameter.dimension.kind, parameter.dimension.values
    for value in values if kind == "choice" else values[:2]:
        try:
            recipe_with(recipe, {parameter.path: value})
        except RecipeError as error:
            raise RecipeError(f"{parameter.section}.space.{parameter.path}: {value!r} cannot be ({error})",
                              "keep the range within the field's own") from None  # fmt: skip


def _in_order(dimensions: Mapping[str, Dimension], section: str) -> list[str]:
    """Paths, each after those it depends on. Raises RecipeError when some depend on each other."""
    ordered: list[str] = []
    waiting = list(dimensions)
    while waiting:
        ready = [p for p in waiting if not set(dimensions[p].when) & set(waiting)]
        if not ready:
            raise RecipeError(
                f"{section}.space: {', '.join(waiting)} depend on each other by when", "leave one of them out"
            )
        ordered += ready
        waiting = [path for path in waiting if path not in ready]
    return ordered


def _distribution(dimension: Dimension) -> BaseDistribution:
    low, high, *step = dimension.values if dimension.kind != "choice" else (0, 0)
    match dimension.kind:
        case "choice":
            return CategoricalDistribution([_encoded(value) for value in dimension.values])
        case "uniform" | "log_uniform":
            return FloatDistribution(low, high, log=dimension.kind == "log_uniform")
        case "int" | "log_int":
            return IntDistribution(low, high, log=dimension.kind == "log_int")
        case "quantized":
            return FloatDistribution(low, low + int((high - low) / step[0] + 1e-9) * step[0], step=step[0])


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    match parameter.distribution:
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(parameter.path, choices)
        case IntDistribution(low=low, high=high, log=log):
            return trial.suggest_int(parameter.path, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(parameter.path, low, high, log=log, step=step)
    raise AssertionError(parameter.distribution)


def _encoded(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, sort_keys=True)


def _same(one: Any, other: Any) -> bool:
    """Equal, and true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def value_at(values: Mapping[str, Any], path: str) -> Any:
    """Of a recipe's values; None where there is none."""
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _product(sizes: Iterator[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
