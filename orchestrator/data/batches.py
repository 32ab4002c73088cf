"""Which rows go together: the batches of an epoch, and each worker's share of one. Pure, and the same for the same seed.

In: the rows' lengths and labels. Out: index arrays. Knows no tensors and no files.
"""

from __future__ import annotations

import numpy as np

_WINDOW_BATCHES = 50
"""Rows are sorted by length inside windows of this many batches: little padding, and still a different mix each epoch."""


def plan_epoch(
    lengths: np.ndarray, labels: np.ndarray, *, batch_size: int, seed: int, epoch: int, oversample: bool = False
) -> list[np.ndarray]:
    """The global batches of one epoch, in order; each an int64 array of row indices.

    Every row appears exactly once, unless ``oversample``: then as many rows as there are, each class equally often, rare
    classes with repetition. Only the last batch by size may be smaller.
    """
    generator = np.random.default_rng([seed, epoch])
    order = _balanced(labels, generator) if oversample else generator.permutation(len(labels))
    window = _WINDOW_BATCHES * batch_size
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def _balanced(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many rows as there are labels, each class equally often: all of a class before any of it again."""
    classes = np.unique(labels)
    wanted = np.full(len(classes), len(labels) // len(classes))
    wanted[: len(labels) % len(classes)] += 1
    rows = [_repeat(np.flatnonzero(labels == c), n, generator) for c, n in zip(classes, wanted, strict=True)]
    return generator.permutation(np.concatenate(rows))


def _repeat(rows: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    rounds = -(-count // len(rows))
    return np.concatenate([generator.permutation(rows) for _ in range(rounds)])[:count]


def share(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """One worker's rows of a global batch, which is sorted by length: dealt like cards, so all get similar lengths."""
    return batch[rank::world]


def evaluation_batches(lengths: np.ndarray, batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """One worker's batches of all rows, longest first; over all workers each row exactly once."""
    order = np.argsort(-lengths, kind="stable")[rank::world]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def mixed_seed(*numbers: int) -> int:
    """A seed from several numbers, well spread: the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
