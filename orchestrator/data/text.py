"""Texts to token ids, by the backbone's own tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from orchestrator.data.encoder import PREPROCESS, Encoded
from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.errors import BackboneError
from orchestrator.storage import sha256_json

_PAD_MULTIPLE = 8 if torch.cuda.is_available() else 1
"""Batches are padded to a multiple of this. A GPU's kernels like eight; on a CPU it would only be more work."""


class TextEncoder:
    """Keeps the folder its tokenizer came from, and opens it in each process when first used."""

    kind: ClassVar[Literal["text"]] = "text"

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """``folder``: tokenizer files. Texts are cut to ``max_tokens``, special tokens included."""
        self.folder, self.max_tokens = folder, max_tokens

    @classmethod
    def from_backbone(cls, folder: str, max_tokens: int) -> TextEncoder:
        """Raises BackboneError when the folder holds no fast tokenizer."""
        encoder = cls(Path(folder), max_tokens)
        limit = encoder.tokenizer.model_max_length
        return cls(Path(folder), min(max_tokens, limit)) if limit < max_tokens else encoder

    @cached_property
    def tokenizer(self) -> Any:
        ensure_torchvision()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BackboneError(f"{self.folder} holds no tokenizer ({reason})", "name a complete backbone") from None
        if not tokenizer.is_fast:
            raise BackboneError(f"the tokenizer in {self.folder} has no fast version", "choose another backbone")
        return tokenizer

    @cached_property
    def _backend(self) -> Any:
        """The Rust tokenizer itself, which works on all cores; transformers' wrapper would cost as much again."""
        backend = self.tokenizer.backend_tokenizer
        backend.enable_truncation(self.max_tokens)
        backend.no_padding()
        return backend

    def shortened(self, max_tokens: int) -> TextEncoder:
        """The same, of texts cut to this many tokens; it reads rows that were encoded before in the same way."""
        return TextEncoder(self.folder, min(max_tokens, self.max_tokens))

    def columns(self) -> list[pa.Field]:
        return [pa.field("input_ids", pa.list_(pa.int32()))]

    def encode(self, inputs: Sequence[str]) -> Encoded:
        encodings = self._backend.encode_batch_fast(list(inputs))
        rows = [encoding.ids for encoding in encodings]
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, count=int(offsets[-1]))
        full = [len(row) >= self.max_tokens for row in rows]
        truncated = np.array([f and bool(e.overflowing) for f, e in zip(full, encodings, strict=True)], bool)
        return Encoded({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))}, truncated=truncated)

    def lengths(self, table: pa.Table) -> np.ndarray:
        return np.minimum(_lengths(table["input_ids"]), self.max_tokens)

    def collate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """int64 [rows, longest] ``input_ids`` and ``attention_mask``."""
        column = table["input_ids"].combine_chunks()
        whole, tokens = _lengths(column), column.flatten().to_numpy()
        lengths = np.minimum(whole, self.max_tokens)
        width = min(self.max_tokens, -(-int(lengths.max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE)
        mask = np.arange(width) < lengths[:, None]
        if (whole > lengths).any():
            tokens = tokens[self._places(whole, lengths, width)[mask]]
        ids = np.full(mask.shape, self._padding, np.int64)
        ids[mask] = tokens
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    @cached_property
    def _padding(self) -> int:
        return self.tokenizer.pad_token_id or 0  # looked up by its text each time

    def _places(self, whole: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
        """Where the tokens of rows that are cut stand in all rows' tokens, [rows, width]: as the tokenizer cuts, the text's
        last ones go, and the special ones at the end stay."""
        columns, starts = np.arange(width), whole.cumsum() - whole
        ends = columns >= (lengths - self._closing)[:, None]
        return np.asarray(starts[:, None] + columns + np.where(ends, (whole - lengths)[:, None], 0))

    @cached_property
    def _closing(self) -> int:
        """Special tokens after the text."""
        special = self._backend.encode("a").special_tokens_mask
        return sum(1 for _ in itertools.takewhile(bool, reversed(special)))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_tokens": self.max_tokens, "tokenizer_sha256": self._rules_sha256}

    @cached_property
    def _rules_sha256(self) -> str:
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules = {
            name: backend[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
        }
        return sha256_json(rules)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        (folder / PREPROCESS).write_text(json.dumps(self.describe(), indent=2), encoding="utf-8")


def _lengths(column: Any) -> np.ndarray:
    """int64 [rows]"""
    return np.asarray(pc.list_value_length(column).to_numpy(), np.int64)
