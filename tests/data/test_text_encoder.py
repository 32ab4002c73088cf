"""Texts to token ids, by the backbone's own tokenizer."""

from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.data.encoders import load_encoder
from orchestrator.data.text import TextEncoder
from orchestrator.errors import BackboneError

TEXTS = ["the coffee was great", "bad", "", "very " * 100]


def test_the_ids_are_those_of_the_tokenizer(tiny_backbone: Path) -> None:
    encoder = TextEncoder.from_backbone(str(tiny_backbone), 16)
    ids = encoder.encode(TEXTS).columns["input_ids"].to_pylist()
    expected = encoder.tokenizer(TEXTS, truncation=True, max_length=16)["input_ids"]
    assert ids == expected
    assert len(ids[3]) == 16


def test_collate_pads_to_the_longest_and_masks_it(tiny_backbone: Path) -> None:
    encoder = TextEncoder.from_backbone(str(tiny_backbone), 32)
    table = pa.table(encoder.encode(TEXTS[:3]).columns)
    batch = encoder.collate(table)
    assert batch["input_ids"].shape == (3, 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == encoder.lengths(table).tolist() == [6, 3, 2]
    assert batch["input_ids"][1, 3:].tolist() == [encoder.tokenizer.pad_token_id] * 3


def test_collate_takes_any_rows_of_a_table(tiny_backbone: Path) -> None:
    encoder = TextEncoder.from_backbone(str(tiny_backbone), 32)
    table = pa.table(encoder.encode(TEXTS).columns)
    whole, part = encoder.collate(table), encoder.collate(table.slice(1, 2))
    assert part["input_ids"].tolist() == whole["input_ids"][1:3, : part["input_ids"].shape[1]].tolist()


def test_a_saved_encoder_gives_the_same_ids_and_description(tiny_backbone: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_backbone(str(tiny_backbone), 16)
    before = encoder.describe()
    ids = encoder.encode(TEXTS).columns["input_ids"]
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.encode(TEXTS).columns["input_ids"].equals(ids)
    assert loaded.describe() == before == encoder.describe()


def test_the_description_tells_lengths_apart(tiny_backbone: Path) -> None:
    short, long = (TextEncoder.from_backbone(str(tiny_backbone), n).describe() for n in (16, 32))
    assert short != long


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="holds no tokenizer"):
        TextEncoder.from_backbone(str(tmp_path), 16)
