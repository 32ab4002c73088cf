"""Image files to square RGB pixels."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from orchestrator.data.encoder import PREPROCESS, Encoded, Unreadable
from orchestrator.data.sources import SMALL_IMAGE_BYTES

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a small file can unfold to gigabytes."""


class ImageEncoder:
    """Upright, RGB, the shorter side resized to ``image_size``, the centre cut out."""

    kind: ClassVar[Literal["image"]] = "image"
    max_pixels: int = MAX_PIXELS
    threads: int | None = None
    """That decode; None: one for each core."""

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """``image_size`` in pixels; ``mean`` and ``std`` of each channel of values within 0 and 1."""
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)

    def columns(self) -> list[pa.Field]:
        return [pa.field("pixels", pa.binary(self.row_bytes))]

    @property
    def row_bytes(self) -> int:
        """Pixels of one image: a byte for each of three channels."""
        return self.image_size * self.image_size * 3

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Pillow decodes and resizes without the interpreter's lock."""
        return ThreadPoolExecutor(self.threads or os.cpu_count() or 1, thread_name_prefix="decode")

    def encode(self, inputs: Sequence[bytes]) -> Encoded:
        are_small = sum(map(len, inputs)) < SMALL_IMAGE_BYTES * len(inputs)
        each = map if are_small else self._threads.map
        return self.pack(list(each(self.decode, inputs)))

    def pack(self, results: Sequence[bytes | str]) -> Encoded:
        """What ``decode`` gave, as columns."""
        pixels = [result for result in results if isinstance(result, bytes)]
        broken = tuple(Unreadable(i, result) for i, result in enumerate(results) if isinstance(result, str))
        flat = pa.py_buffer(b"".join(pixels))
        return Encoded({"pixels": pa.Array.from_buffers(pa.binary(self.row_bytes), len(pixels), [None, flat])}, broken)

    def decode(self, content: bytes) -> bytes | str:
        """Pixels in HWC order, or the reason why there are none."""
        return self.square(content, self.image_size)

    def square(self, content: bytes, size: int) -> bytes | str:
        """The same, ``size`` pixels wide and high."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > self.max_pixels:
                    return f"has {image.width} x {image.height} pixels, more than {self.max_pixels}"
                image.draft("RGB", (size, size))  # JPEG: decode at a fraction of the size
                ImageOps.exif_transpose(image, in_place=True)
                return ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BILINEAR).tobytes()
        except UnidentifiedImageError:
            return "is not an image of a known format"
        except Exception as error:  # noqa: BLE001  of damaged files each format's reader raises what it comes upon
            return f"cannot be decoded ({str(error) or type(error).__name__})"

    def lengths(self, table: pa.Table) -> np.ndarray:
        return np.ones(table.num_rows, np.int64)

    def collate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """float32 [rows, 3, image_size, image_size] ``pixels``, normalised."""
        return {"pixels": self.normalise(self.pixels(table))}

    def pixels(self, table: pa.Table) -> torch.Tensor:
        """uint8 [rows, 3, image_size, image_size]."""
        column = table["pixels"].combine_chunks()
        start = column.offset * self.row_bytes
        flat = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * self.row_bytes]
        shaped = flat.reshape(len(column), self.image_size, self.image_size, 3)
        return torch.from_numpy(shaped.transpose(0, 3, 1, 2).copy())

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, 3, height, width] -> float32 of the same shape."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255.0 for values in (self.mean, self.std))
        return (pixels.float() - mean) / std

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def save(self, folder: Path) -> None:
        (folder / PREPROCESS).write_text(json.dumps(self.describe(), indent=2), encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay in their process."""
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16-bit grey scaled to 8 bits rather than cut off."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values * (255.0 / top)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def median_short_side(contents: Iterable[bytes]) -> float:
    """Median of the shorter sides in pixels, of the images whose header can be read; 224 if none can."""
    sides = []
    for content in contents:
        try:
            with Image.open(io.BytesIO(content)) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return float(np.median(sides)) if sides else 224.0
