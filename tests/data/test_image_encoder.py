"""Any image file to upright square RGB, or the reason why not."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from orchestrator.data.augment import augment
from orchestrator.data.encoder import PREPROCESS
from orchestrator.data.encoders import load_encoder
from orchestrator.data.images import ImageEncoder, median_short_side
from orchestrator.errors import IntegrityError
from orchestrator.recipe import Augmentation

ENCODER = ImageEncoder(16, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(*contents: bytes) -> np.ndarray:
    encoded = ENCODER.encode(contents)
    assert not encoded.unreadable
    return ENCODER.pixels(pa.table(encoded.columns)).numpy()


def test_a_wide_image_is_cut_in_the_middle() -> None:
    image = Image.new("RGB", (48, 16), "black")
    image.paste("white", (16, 0, 32, 16))
    assert pixels_of(file_of(image)).mean() > 250


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (20, 20), 100), (100, 100, 100)),
        (Image.fromarray(np.full((20, 20), 32768, np.uint16)), (127, 127, 127)),
        (Image.new("RGBA", (20, 20), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (20, 20), (0, 255)), (0, 0, 0)),
        (Image.new("1", (20, 20), 1), (255, 255, 255)),
        (Image.new("RGB", (20, 20), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE), (9, 8, 7)),
    ],
    ids=["grey", "16 bit", "transparent", "grey with alpha", "bitmap", "palette"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert np.abs(pixels_of(file_of(image))[0].mean(axis=(1, 2)) - expected).max() <= 1


def test_cmyk_is_converted() -> None:
    assert np.abs(pixels_of(file_of(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"))[0, 0] - 254.0).max() < 4


def test_an_image_is_turned_upright() -> None:
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = pixels_of(file_of(image, exif=exif))[0, 0]
    assert turned[:6].max() < 10 and turned[10:].min() > 245


def test_broken_files_come_with_a_reason_and_the_others_are_encoded() -> None:
    good = file_of(Image.new("RGB", (30, 20), "red"), "JPEG")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    encoded = ENCODER.encode([b"no image", good, file_of(noise)[:300], b"", good])
    assert [item.index for item in encoded.unreadable] == [0, 2, 3]
    assert "not an image of a known format" in encoded.unreadable[0].reason
    assert "cannot be decoded" in encoded.unreadable[1].reason
    assert len(encoded.columns["pixels"]) == 2


def test_a_decompression_bomb_is_refused_unopened() -> None:
    bomb = file_of(Image.new("1", (9000, 9000)))
    assert len(bomb) < 100_000
    assert "9000 x 9000 pixels" in ENCODER.encode([bomb]).unreadable[0].reason


def test_collate_normalises_each_channel() -> None:
    table = pa.table(ENCODER.encode([file_of(Image.new("RGB", (16, 16), (0, 255, 255)))]).columns)
    pixels = ENCODER.collate(table)["pixels"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert pixels[0].amax(dim=(1, 2)).tolist() == pytest.approx([-1.0, 2.0, 1.0])


def test_rows_taken_out_of_a_table_are_the_right_ones() -> None:
    contents = [file_of(Image.new("L", (16, 16), shade)) for shade in range(0, 200, 20)]
    table = pa.table(ENCODER.encode(contents).columns)
    assert ENCODER.pixels(table.slice(3, 2))[:, 0, 0, 0].tolist() == [60, 80]
    assert ENCODER.pixels(table.take(pa.array([7, 1])))[:, 0, 0, 0].tolist() == [140, 20]


def test_a_saved_encoder_is_the_same(tmp_path: Path) -> None:
    ENCODER.save(tmp_path)
    assert load_encoder(tmp_path).describe() == ENCODER.describe()
    (tmp_path / PREPROCESS).write_text('{"kind": "sound"}', encoding="utf-8")
    with pytest.raises(IntegrityError, match="unknown kind 'sound'"):
        load_encoder(tmp_path)


def test_the_median_short_side_leaves_broken_files_out() -> None:
    files = [file_of(Image.new("L", (40, side))) for side in (10, 20, 30)]
    assert median_short_side([*files, b"broken"]) == 20.0


def test_augmentation_is_the_same_for_the_same_seed_and_differs_between_rows() -> None:
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8).repeat(3, 1, 1, 1)
    wanted = Augmentation(horizontal_flip=0.5, rotation_degrees=15, crop_scale=0.6, zoom=0.2, color=0.3)
    state = torch.random.get_rng_state()
    one, again = augment(pixels, wanted, [1, 2, 1]), augment(pixels, wanted, [1, 2, 1])
    assert torch.equal(one, again) and torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == pixels.shape and one.dtype == torch.uint8


def test_without_augmentation_pixels_are_untouched_and_a_flip_is_a_flip() -> None:
    pixels = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(pixels, Augmentation(), [1, 2]), pixels)
    assert torch.equal(augment(pixels, Augmentation(horizontal_flip=1.0), [1, 2]), pixels.flip(-1))
