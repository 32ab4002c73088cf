"""Texts to token ids, by the backbone's own tokenizer."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

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


def unframed(folder: Path) -> Path:
    """A tokenizer that adds no special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "very", "bad", "the", "coffee", "great"])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("framed", [True, False], ids=["special tokens at both ends", "none"])
def test_rows_that_were_encoded_whole_are_cut_as_the_tokenizer_cuts(
    tiny_backbone: Path, tmp_path: Path, *, framed: bool
) -> None:
    texts = [*TEXTS, "the coffee was very very bad", "great " * 7]
    whole = TextEncoder(tiny_backbone if framed else unframed(tmp_path), 32)
    for limit in (5, 8, 31, 40):
        short = whole.shortened(limit)
        rows, cut = (pa.table(encoder.encode(texts).columns) for encoder in (whole, short))
        for table in (rows, rows.slice(2), rows.slice(3, 1)):
            same = cut.slice(0 if len(table) == len(rows) else len(rows) - 4 if len(table) == 4 else 3, len(table))
            assert short.lengths(table).tolist() == short.lengths(same).tolist()
            ours, theirs = short.collate(table), short.collate(same)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert short.describe()["max_tokens"] == min(limit, 32)


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
