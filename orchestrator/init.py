"""``init``: look at a table or a folder of images, infer its schema, write a recipe, say what was seen."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from orchestrator.data.schema import Schema, infer_schema
from orchestrator.data.sources import Source, open_source
from orchestrator.errors import DataError, UserError
from orchestrator.recipe import Columns, Data
from orchestrator.recipe_file import parse_recipe

_SHOWN_LABELS = 8


def write_starting_recipe(path: str, output: str | None, *, force: bool) -> str:
    """Write the recipe and return what was seen, for people.

    Raises:
        DataError: nothing usable at ``path``.
        UserError: there is a recipe already.
    """
    source = open_source(Data(source=path))
    schema = infer_schema(source.sample, Columns())
    target = Path(output or f"{recipe_name(path)}.yaml")
    if target.exists() and not force:
        raise UserError(f"{target} is there already", "choose another with --output, or overwrite it with --force")
    text = starting_recipe(path, schema, source)
    parse_recipe(text, str(target))
    target.write_text(text, encoding="utf-8")
    return f"{_seen(source, schema)}\nwrote {target}; next: orchestrator run {target}"


def recipe_name(path: str) -> str:
    """A model name out of the last part of a path."""
    stem = re.sub(r"(\.(csv|tsv|jsonl|ndjson|parquet|gz))+$", "", path.rstrip("/").rpartition("/")[2].lower())
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:64].strip("-._")
    return name or "model"


def starting_recipe(path: str, schema: Schema, source: Source) -> str:
    """A short recipe: what cannot be defaulted, and the fields most people change first."""
    lines = [f"name: {recipe_name(path)}", f"task: {schema.kind}_classification", "data:", f"  source: {_quoted(path)}"]
    if not source.is_image_folder:
        names = f"{schema.kind}: {_quoted(schema.input_column)}, label: {_quoted(schema.label_column)}"
        lines.append(f"  columns: {{{names}}}")
    if schema.kind == "text":
        backbone = "sentence-transformers/all-MiniLM-L6-v2  # a hub id, a local folder, or package:NAME"
        lines += ["model:", f"  backbone: {backbone}"]
    else:
        lines += ["model:", "  backbone: resnet50", "  weights: pretrained  # or none, or the path of a state dict"]
    lines += ["training: {epochs: 3, batch_size: 32}", "serving: {port: 8000}", ""]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _seen(source: Source, schema: Schema) -> str:
    labels = Counter(label for label in source.sample[schema.label_column].to_pylist() if label)
    if len(labels) < 2 and not source.is_image_folder:
        raise DataError(f"the first rows hold only the label {next(iter(labels), None)!r}", "is it the right column?")
    shown = ", ".join(f"{label} ({count})" for label, count in labels.most_common(_SHOWN_LABELS))
    more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    return (
        f"{len(source.files)} file{'s' * (len(source.files) != 1)}: {schema.kind} in {schema.input_column!r}, "
        f"label in {schema.label_column!r}\nlabels of the first {source.sample.num_rows} rows: {shown}{more}"
    )
