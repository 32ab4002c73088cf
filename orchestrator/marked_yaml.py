"""YAML with marks: plain values, and the line and column of each key.

In: text. Out: values and marks, or a RecipeError that says where the text is wrong. Safe: no tags that run code, no
duplicate keys, no alias bombs. Knows nothing of what the keys mean.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from orchestrator.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top."""
_MAX_NODES = 50_000
_MAX_DEPTH = 32


def read_yaml(text: str, origin: str) -> tuple[Any, dict[KeyPath, yaml.Mark]]:
    """Plain values and where each key stands. Safe: no tags that run code, no duplicate keys, no alias bombs."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise RecipeError(
            f"{where}: not valid YAML ({error.problem})", "check indentation, quotes and colons"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML ({error})") from None
    marks: dict[KeyPath, yaml.Mark] = {}
    return (None if node is None else _Construct(origin, marks).value(node, ())), marks


class _Construct:
    """Builds values from composed YAML nodes, so that each key's line is known and each node is counted."""

    def __init__(self, origin: str, marks: dict[KeyPath, yaml.Mark]) -> None:
        self.origin, self.marks, self.nodes = origin, marks, 0
        self.scalars = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise RecipeError(f"{self._at(node)}: the recipe expands to too many values", "remove anchors and aliases")
        self.marks[path] = node.start_mark
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return _exponent_float(self.scalars.construct_object(node))
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{self._at(node)}: cannot read this value ({error})", "use a plain value") from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        seen: dict[str, yaml.Mark] = {}
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in seen:
                raise RecipeError(
                    f"{self._at(key_node)}: the key {key!r} is given twice, first on line {seen[key].line + 1}",
                    "keep one of the two",
                )
            seen[key] = key_node.start_mark
            result[key] = self.value(value_node, (*path, key))
            self.marks[(*path, key)] = key_node.start_mark
        return result

    def _at(self, node: yaml.Node) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _exponent_float(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; everybody who writes it means the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
