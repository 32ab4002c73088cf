"""Encoders of members that see an input in different ways, as one."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestrator.data.combined import encoders_of, named, part, together
from orchestrator.data.encoders import load_encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder

TEXTS = ["great coffee", "the box was stale and we bought it and it is awful", ""]


def test_each_encoder_finds_its_own_tensors(tiny_backbone: Path) -> None:
    encoders = [TextEncoder(tiny_backbone, tokens) for tokens in (6, 32)]
    both, numbers = together(encoders)
    made = both.encode(TEXTS)
    assert numbers == (0, 1) and [field.name for field in both.columns()] == list(made.columns)
    tensors = both.collate(pa.table(made.columns))
    for number, encoder in enumerate(encoders):
        alone = encoder.collate(pa.table(encoder.encode(TEXTS).columns))
        mine = part(tensors, number)
        assert mine.keys() == alone.keys()
        assert all((mine[name] == alone[name]).all() for name in alone)
    assert made.truncated is not None and made.truncated.tolist() == [False, True, False]
    assert both.lengths(pa.table(made.columns)).tolist() == [4, 14, 2]


def test_a_row_of_a_dataset_holds_what_the_first_encoder_alone_would_make(tiny_backbone: Path) -> None:
    """Under its usual names: a member of that encoder reads a dataset that was made for all."""
    first = TextEncoder(tiny_backbone, 6)
    both, _ = together([first, TextEncoder(tiny_backbone, 32)])
    assert both.encode(TEXTS).columns["input_ids"].equals(first.encode(TEXTS).columns["input_ids"])
    assert named("input_ids", 1) in both.encode(TEXTS).columns


def test_encoders_that_do_the_same_are_one(tiny_backbone: Path) -> None:
    one, other, short = (TextEncoder(tiny_backbone, tokens) for tokens in (32, 32, 6))
    alone, numbers = together([one, other])
    assert alone is one and numbers == (0, 0)
    both, numbers = together([one, short, other])
    assert encoders_of(both) == (one, short) and numbers == (0, 1, 0)


def test_another_padding_token_is_another_encoder(tiny_backbone: Path) -> None:
    one, other = TextEncoder(tiny_backbone, 32), TextEncoder(tiny_backbone, 32)
    other.tokenizer.pad_token = "[UNK]"
    assert together([one, other])[1] == (0, 1)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_saved_one_is_the_same(kind: str, tiny_backbone: Path, tmp_path: Path) -> None:
    texts = [TextEncoder(tiny_backbone, tokens) for tokens in (6, 32)]
    images = [ImageEncoder(size, (0.5,) * 3, (0.25,) * 3) for size in (16, 24)]
    both, _ = together(texts if kind == "text" else images)
    both.save(tmp_path)
    read = load_encoder(tmp_path)
    assert read.describe() == both.describe() and read.kind == kind
    assert read.columns() == both.columns()
    assert both.describe().get("image_size") == (24 if kind == "image" else None)


def test_the_sharpest_picture_comes_first() -> None:
    small, large = (ImageEncoder(size, (0.5,) * 3, (0.25,) * 3) for size in (16, 24))
    both, numbers = together([small, large])
    assert encoders_of(both) == (large, small) and numbers == (1, 0)
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = 255
    made = both.encode([png(pixels), b"no image"])
    assert [(broken.index, broken.reason) for broken in made.unreadable] == [(1, "is not an image of a known format")]
    for encoder, name in ((large, "pixels"), (small, "1.pixels")):
        assert made.columns[name].equals(encoder.encode([png(pixels)]).columns["pixels"])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
