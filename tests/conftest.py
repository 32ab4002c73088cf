"""What many tests share: a tiny text backbone made here, small data sets, and one Ray instance for the whole run."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch's threads wait for each other in a loop that keeps their core busy. Where other processes want the same cores, a step of
# our small networks then takes up to a second instead of 10 ms: here they sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A deadline of 200 ms for each example would measure how busy the machine is.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

WORDS = {
    "good": ("great", "lovely", "rich", "smooth", "fresh", "tasty", "crisp", "perfect", "delicious", "happy"),
    "bad": ("stale", "bland", "broken", "awful", "sour", "burnt", "rotten", "dull", "terrible", "sad"),
}
FILLER = (
    "the", "coffee", "tea", "box", "cup", "was", "is", "and", "it", "my", "dog", "we", "bought", "this", "very", "quite",
    "in", "a", "bag", "of",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: two processes that share them are then done at about the same time."""
    items.sort(key=lambda item: item.path.parent.name not in ("tuning", "training", "end_to_end"))


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two narrow layers with a word tokenizer, as a folder in the transformers layout."""
    from orchestrator.data.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("backbone") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS["good"], *WORDS["bad"], *FILLER]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def make_review(label: str, generator: random.Random) -> str:
    """A sentence whose words give its label away, now and then wrongly."""
    told = label if generator.random() < 0.97 else {"good": "bad", "bad": "good"}[label]
    words = generator.choices(FILLER, k=generator.randint(3, 20)) + generator.choices(WORDS[told], k=2)
    generator.shuffle(words)
    return " ".join(words)


def write_reviews(path: Path, rows: int, seed: int = 0) -> Path:
    generator = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "score", "shop"])
        for number in range(rows):
            label = "good" if number % 3 else "bad"
            writer.writerow([f"{make_review(label, generator)} {number}", label, f"shop {number % 4}"])
    return path


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv", 400)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of small PNGs that differ in brightness pattern, and one broken file."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images") / "shapes"
    generator = np.random.default_rng(0)
    for label, axis in (("horizontal", 0), ("vertical", 1)):
        (root / label).mkdir(parents=True)
        for number in range(60):
            stripes = np.indices((40, 48))[axis] // generator.integers(3, 6) % 2 * 160
            noise = generator.integers(0, 60, (40, 48))
            Image.fromarray((stripes + noise).astype(np.uint8)).save(root / label / f"{number:03d}.png")
    (root / "vertical" / "broken.png").write_bytes(b"\x89PNG not really")
    return root


@pytest.fixture(scope="session")
def ray_session() -> Iterator[object]:
    """One private Ray instance, shared by every test that needs Ray."""
    from orchestrator.session import connect

    with connect() as session:
        yield session
