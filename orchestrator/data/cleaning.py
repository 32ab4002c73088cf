"""Which rows are kept, and what is wrong with the others. Pure; some thirty bytes per row, never the texts.

In: a 128-bit hash of each row's input, its label, its split. Out: a verdict per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntEnum

import numpy as np

from orchestrator.recipe import Cleaning
from orchestrator.records import CleaningCounts

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


class Verdict(IntEnum):
    KEPT = 0
    DUPLICATE = 1
    CONFLICT = 2
    LEAK = 3
    MISSING = 4
    UNREADABLE = 5


REASONS = {
    Verdict.DUPLICATE: "the same input and label as an earlier row",
    Verdict.CONFLICT: "the same input has different labels",
    Verdict.LEAK: "the same input is in a split that it will be tested on",
    Verdict.MISSING: "no input or no label",
    Verdict.UNREADABLE: "cannot be read",
}


def hash_inputs(inputs: Iterable[str | bytes]) -> np.ndarray:
    """128 bits of SHA-256 (in hardware on most processors) of each text without surrounding white space, or file."""
    return np.frombuffer(b"".join(map(digest, inputs)), HASH)


def digest(item: str | bytes) -> bytes:
    content = item.strip().encode() if isinstance(item, str) else item
    return hashlib.sha256(content).digest()[: HASH.itemsize]


def group_by_hash(hashes: np.ndarray) -> np.ndarray:
    """int64 [rows]: rows with the same input get the same number, numbers in order of first appearance."""
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: among equals the first row comes first
    ordered = hashes[order]
    starts = np.ones(len(order), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    firsts = order[starts]
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    groups = np.empty(len(order), np.int64)
    groups[order] = rank[np.cumsum(starts) - 1]
    return groups


def find_repeats(groups: np.ndarray, labels: np.ndarray, scope: np.ndarray, settings: Cleaning) -> np.ndarray:
    """Verdicts KEPT, DUPLICATE or CONFLICT among rows of the same ``scope`` (given split), int8 [rows]."""
    verdicts = np.zeros(len(groups), np.int8)
    inputs = _number(groups, scope)
    if settings.duplicates == "drop":
        _, first = np.unique(_number(inputs, labels), return_index=True)
        verdicts[:] = Verdict.DUPLICATE
        verdicts[first] = Verdict.KEPT
    if settings.conflicts == "drop":
        _, first = np.unique(_number(inputs, labels), return_index=True)
        names, distinct_labels = np.unique(inputs[first], return_counts=True)
        verdicts[np.isin(inputs, names[distinct_labels > 1])] = Verdict.CONFLICT
    return verdicts


def find_leaks(groups: np.ndarray, splits: np.ndarray, settings: Cleaning) -> np.ndarray:
    """bool [rows]: train rows whose input validation or test holds, and validation rows whose input test holds."""
    if settings.leaks == "keep":
        return np.zeros(len(groups), bool)
    in_test = np.isin(groups, groups[splits == TEST])
    in_validation = np.isin(groups, groups[splits == VALIDATION])
    leaks: np.ndarray = ((splits == TRAIN) & (in_test | in_validation)) | ((splits == VALIDATION) & in_test)
    return leaks


def count(verdicts: np.ndarray) -> CleaningCounts:
    numbers = np.bincount(verdicts, minlength=len(Verdict)).tolist()
    kept, duplicates, conflicts, leaks, missing, unreadable = numbers
    return CleaningCounts(rows_read=len(verdicts), kept=kept, duplicates=duplicates, conflicts=conflicts, leaks=leaks,
                          missing=missing, unreadable=unreadable)  # fmt: skip


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [rows]: one number per pair."""
    return first.astype(np.int64) * (int(second.max(initial=0)) + 2) + second + 1
