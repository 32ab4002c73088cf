"""Recipes as files: YAML text to a ``Recipe`` and back.

In: a YAML file and ``--set path=value`` overrides. Out: a ``Recipe``, or a ``RecipeError`` with the line, the column and
the nearest known key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import RecipeError
from orchestrator.marked_yaml import KeyPath, read_yaml
from orchestrator.recipe import Recipe
from orchestrator.section import Section

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
            f"--set {path.strip()} is not a recipe field", did_you_mean(path.strip(), list(known_paths()))
        )
    value, _ = read_yaml(raw, f"--set {path}")
    target = values
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    target[keys[-1]] = value


def _explain(error: ValidationError, origin: str, marks: Mapping[KeyPath, yaml.Mark]) -> str:
    return "\n".join(f"{_where(origin, location, marks)}: {problem}" for problem, location in _problems(error).items())


def problems_of(error: ValidationError) -> list[str]:
    """What is wrong with a recipe's values, a sentence each."""
    return list(_problems(error))


def _problems(error: ValidationError) -> dict[str, KeyPath]:
    found: dict[str, KeyPath] = {}
    for item in error.errors():
        location = tuple(part for part in item["loc"] if not _is_union_tag(part))
        found.setdefault(_one_problem(item, ".".join(map(str, location)) or "recipe"), location)
    return found


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
        hint = did_you_mean(dotted, list(known_paths()))
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


def did_you_mean(dotted: str, candidates: Sequence[str]) -> str:
    """A hint for a path that is none of the candidates."""
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
