"""Small networks with random weights, batches for them, and saved models of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.models.backbones import Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model
from orchestrator.storage import write_manifest

LABELS = ("a", "b", "c")
WORDS, WIDTH = 2000, 64


def text_network(words: int = WORDS, layers: int = 2) -> Network:
    """A narrow BERT with biases that are not zero and logits that are not all alike."""
    ensure_torchvision()
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=words, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
                        intermediate_size=4 * WIDTH, max_position_embeddings=64, num_labels=len(LABELS))  # fmt: skip
    model = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.1)
    nn.init.normal_(model.classifier.weight, std=1.0)
    return TransformersNetwork(model).eval()


def image_network(architecture: str = "resnet18") -> Network:
    """With batch-norm statistics that are not zero and one, and logits that are not all alike."""
    torch.manual_seed(0)
    network = TorchvisionNetwork.create(Model(weights="none"), architecture, LABELS)
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(**pictures(16, seed))
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, std=0.1)
    return network.eval()


def texts(*lengths: int, seed: int = 1, words: int = WORDS) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, words, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictures(rows: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(rows, 3, 4, 4, generator=generator)
    noise = torch.randn(rows, 3, 64, 64, generator=generator)
    return {"pixels": nn.functional.interpolate(means, size=64) + 0.3 * noise}


def save_around(folder: Path, backbone: Path | None) -> Path:
    """What else a saved model's folder has: the tokenizer of ``backbone``, or settings for pictures."""
    encoder = TextEncoder(backbone, 32) if backbone else ImageEncoder(64, (0.5,) * 3, (0.5,) * 3)
    encoder.save(folder)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    task = "text_classification" if backbone else "image_classification"
    (folder / "card.json").write_text(json.dumps({"task": task, "parameters": 1}))
    write_manifest(folder)
    return folder
