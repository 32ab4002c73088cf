"""Reading and encoding, batch by batch: each input is read once, hashed, and tokenised or decoded.

In: a source and an encoder. Out: ``Rows`` in the source's order, in bounded memory. While the caller writes one batch and
reads another, two more are being encoded, so that tokenizer and decoder always have work for all cores.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.cleaning import HASH, Verdict, digest
from orchestrator.data.encoder import Encoded, Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.schema import Schema
from orchestrator.data.sources import Source, SourceBatch

_IMAGES_AT_ONCE = 64
"""Image files can be large: of a batch of rows, this many are in memory as files and pixels."""
_IMAGES_PER_TASK = 8
"""A task costs as much as a small image."""
_AT_ONCE = 2
"""Batches that are encoded at the same time."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Rows:
    """A batch, read and encoded."""

    batch: SourceBatch
    hashes: np.ndarray
    """HASH [rows]; zeros where there is no input"""
    verdicts: np.ndarray
    """int8 [rows]: KEPT so far, MISSING or UNREADABLE"""
    reasons: dict[int, str]
    """What is known beyond the verdict, by index into the batch."""
    encoded: Encoded
    """Of the rows whose verdict is KEPT, in order."""

    @property
    def kept(self) -> np.ndarray:
        """int64: indices into the batch"""
        return np.flatnonzero(self.verdicts == Verdict.KEPT)


class Intake:
    def __init__(self, source: Source, schema: Schema, encoder: Encoder, required: str | None = None) -> None:
        """``required``: one more column that a row cannot do without, beside input and label."""
        self.source, self.schema, self.encoder, self.required = source, schema, encoder, required

    def run(self) -> Iterator[Rows]:
        """All rows of the source."""
        batches = self.source.batches()
        if self.schema.kind == "image":
            batches = itertools.chain.from_iterable(map(_pieces, batches))
        with ThreadPoolExecutor(_AT_ONCE, "encode") as threads:
            yield from _map_ahead(self.take_in, batches, threads)

    def take_in(self, batch: SourceBatch) -> Rows:
        """Hash and encode the rows that have all they need. Never raises for one bad row."""
        inputs = batch.table[self.schema.input_column]
        labels = batch.table[self.schema.label_column]
        reasons = {}
        filled = _filled(inputs) & _filled(labels)
        if self.required is not None:
            lacking = ~_filled(batch.table[self.required])
            reasons = {int(i): f"no value in the column {self.required!r}" for i in np.flatnonzero(lacking & filled)}
            filled &= ~lacking
        verdicts = np.where(filled, Verdict.KEPT, Verdict.MISSING).astype(np.int8)
        usable = np.flatnonzero(filled)
        digests, encoded = self._encode(inputs.take(pa.array(usable)).to_pylist(), batch.file)
        hashes = np.zeros(len(filled), HASH)
        hashes[usable] = np.frombuffer(b"".join(digests), HASH)
        for broken in encoded.unreadable:
            index = int(usable[broken.index])
            verdicts[index], reasons[index] = Verdict.UNREADABLE, broken.reason
        return Rows(batch, hashes, verdicts, reasons, encoded)

    def _encode(self, inputs: list[str], file: str) -> tuple[list[bytes], Encoded]:
        if self.schema.kind == "text":
            return list(map(digest, inputs)), self.encoder.encode(inputs)
        encoder = cast(ImageEncoder, self.encoder)

        def read(name: str) -> tuple[bytes, bytes | str]:
            content = self.source.read_image(name, file)
            if isinstance(content, str):
                return bytes(HASH.itemsize), content
            return digest(content), encoder.decode(content)

        def read_some(names: list[str]) -> list[tuple[bytes, bytes | str]]:
            return [read(name) for name in names]

        parts = [inputs[start : start + _IMAGES_PER_TASK] for start in range(0, len(inputs), _IMAGES_PER_TASK)]
        found = list(itertools.chain.from_iterable(self.source.threads.map(read_some, parts)))
        return [hashed for hashed, _ in found], encoder.pack([pixels for _, pixels in found])


def _filled(column: pa.ChunkedArray) -> np.ndarray:
    """bool [rows]: there is something beside white space"""
    filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)
    return np.asarray(filled.to_numpy(), bool)


def _pieces(batch: SourceBatch) -> Iterator[SourceBatch]:
    """The batch's rows, few at a time; its bad rows come with the first."""
    for start in range(0, max(1, batch.table.num_rows), _IMAGES_AT_ONCE):
        part = batch.table.slice(start, _IMAGES_AT_ONCE)
        yield replace(batch, table=part, bad=batch.bad if start == 0 else ())


def _map_ahead(function: Callable[[T], R], items: Iterator[T], executor: Executor) -> Iterator[R]:
    """``map``, with the next items already under way."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > _AT_ONCE:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
