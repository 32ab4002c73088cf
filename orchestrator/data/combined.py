"""Several encoders as one, for networks that answer together and see an input in different ways.

In: the encoders of an ensemble's members. Out: one encoder that makes the columns and tensors of all. Those of the first have
their usual names, those of number ``n`` begin with ``n.``. Members whose encoders do the same share one: a text is then
tokenised once. The first of several image encoders is the one with the most pixels, so that the picture of a row is the
sharpest that any member saw.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.encoder import PREPROCESS, Encoded, Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder

ENCODERS = "encoders"
"""Folder with a folder for each of them."""
T = TypeVar("T")


def together(encoders: Sequence[Encoder]) -> tuple[Encoder, tuple[int, ...]]:
    """One encoder for all, of one kind; and of each, which of the distinct ones it is. One that is alone stays as it is."""
    distinct: dict[str, Encoder] = {}
    for encoder in encoders:
        distinct.setdefault(_rules(encoder), encoder)
    names = sorted(distinct, key=lambda name: -distinct[name].describe().get("image_size", 0))
    numbers = tuple(names.index(_rules(encoder)) for encoder in encoders)
    return combined([distinct[name] for name in names]), numbers


def combined(encoders: Sequence[Encoder]) -> Encoder:
    """The encoders, distinct and in order, as one."""
    texts = [encoder for encoder in encoders if isinstance(encoder, TextEncoder)]
    images = [encoder for encoder in encoders if isinstance(encoder, ImageEncoder)]
    if len(encoders) == 1:
        return encoders[0]
    return CombinedTexts(texts) if texts else CombinedImages(images)


def encoders_of(encoder: Encoder) -> tuple[Encoder, ...]:
    """The encoders that it is made of; itself alone, usually."""
    return tuple(encoder.encoders) if isinstance(encoder, CombinedTexts | CombinedImages) else (encoder,)


def named(name: str, number: int) -> str:
    """What a column or tensor of encoder ``number`` is called."""
    return f"{number}.{name}" if number else name


def part(values: Mapping[str, T], number: int) -> dict[str, T]:
    """Of what is named for all encoders, that of one, under its usual names."""
    if number:
        return {name.removeprefix(f"{number}."): v for name, v in values.items() if name.startswith(f"{number}.")}
    return {name: value for name, value in values.items() if "." not in name}


def _rules(encoder: Encoder) -> str:
    """The same for encoders that make the same tensors of every input."""
    padding = encoder._padding if isinstance(encoder, TextEncoder) else None
    return json.dumps([encoder.describe(), padding], sort_keys=True)


def _rows(table: pa.Table, encoder: Encoder, number: int) -> pa.Table:
    """The columns of one encoder, as it knows them."""
    return pa.table({field.name: table[named(field.name, number)] for field in encoder.columns()})


class _Combined:
    """What does not depend on the kind of input."""

    kind: ClassVar[Literal["text", "image"]]
    encoders: tuple[Any, ...]

    def columns(self) -> list[pa.Field]:
        numbered = enumerate(self.encoders)
        return [field.with_name(named(field.name, n)) for n, encoder in numbered for field in encoder.columns()]

    def collate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """The tensors of all, [rows, ...] each."""
        return {
            named(name, number): tensor
            for number, encoder in enumerate(self.encoders)
            for name, tensor in encoder.collate(_rows(table, encoder, number)).items()
        }

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "encoders": [encoder.describe() for encoder in self.encoders]}

    def save(self, folder: Path) -> None:
        for number, encoder in enumerate(self.encoders):
            place = folder / ENCODERS / str(number)
            place.mkdir(parents=True)
            encoder.save(place)
        (folder / PREPROCESS).write_text(json.dumps(self.describe(), indent=2), encoding="utf-8")


class CombinedTexts(_Combined):
    kind: ClassVar[Literal["text"]] = "text"

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self.encoders = tuple(encoders)

    def encode(self, inputs: Sequence[str]) -> Encoded:
        each = [encoder.encode(inputs) for encoder in self.encoders]
        columns = {named(name, n): array for n, made in enumerate(each) for name, array in made.columns.items()}
        return Encoded(columns, truncated=np.any([made.truncated for made in each], axis=0))

    def lengths(self, table: pa.Table) -> np.ndarray:
        """int64 [rows]: of the longest that any network reads."""
        numbered = enumerate(self.encoders)
        lengths: np.ndarray = np.max([e.lengths(_rows(table, e, number)) for number, e in numbered], axis=0)
        return lengths


class CombinedImages(_Combined, ImageEncoder):
    """An image encoder like its first, which makes the pixels of the others besides, each from the file itself."""

    kind: ClassVar[Literal["image"]] = "image"

    def __init__(self, encoders: Sequence[ImageEncoder]) -> None:
        first = encoders[0]
        super().__init__(first.image_size, first.mean, first.std)
        self.encoders = tuple(encoders)

    def decode(self, content: bytes) -> bytes | str:
        """The pixels for one encoder after the other, or the reason why there are none."""
        parts: list[bytes] = []
        for encoder in self.encoders:
            found = self.square(content, encoder.image_size)
            if isinstance(found, str):
                return found
            parts.append(found)
        return b"".join(parts)

    def pack(self, results: Sequence[bytes | str]) -> Encoded:
        ends = list(itertools.accumulate(encoder.row_bytes for encoder in self.encoders))
        columns, unreadable = {}, ()
        for number, (encoder, end) in enumerate(zip(self.encoders, ends, strict=True)):
            start = end - encoder.row_bytes
            made = encoder.pack([found if isinstance(found, str) else found[start:end] for found in results])
            columns[named("pixels", number)], unreadable = made.columns["pixels"], made.unreadable
        return Encoded(columns, unreadable)

    def describe(self) -> dict[str, Any]:
        """``image_size``: that of the pictures that are shown of a row."""
        return super().describe() | {"image_size": self.image_size}
