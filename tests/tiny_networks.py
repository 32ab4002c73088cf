"""Small random networks of many architectures, made from their configs, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.models.backbones import TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model

ensure_torchvision()
CLASSES = 3
COMMON: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "num_labels": CLASSES, "max_position_embeddings": 40}
USUAL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "Bert": USUAL,
    "Roberta": USUAL,
    "Electra": USUAL | {"embedding_size": 16},
    "MPNet": USUAL,
    "Albert": USUAL | {"embedding_size": 16},
    "DebertaV2": USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "Deberta": USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
    "DistilBert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 40},
    "GPTNeoX": USUAL,
    "Llama": USUAL | {"num_key_value_heads": 2},
    "Qwen3": USUAL | {"num_key_value_heads": 2, "head_dim": 8},
    "ModernBert": USUAL | {"global_attn_every_n_layers": 2, "local_attention": 8},
}


def text_network(family: str, spread: float = 0.15, **changes: Any) -> TransformersNetwork:
    """Weights far from zero: parts that do next to nothing would prove nothing."""
    import transformers

    common = {name: value for name, value in COMMON.items() if not (family == "GPT2" and name.startswith("max_"))}
    config = getattr(transformers, f"{family}Config")(**common | TEXT[family] | changes)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and not name.endswith("ln_f.weight"):
            nn.init.normal_(parameter, std=spread)
    return TransformersNetwork(model).eval()


def tokens(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, 60, mask.shape, generator=generator) * mask, "attention_mask": mask}


def image_network(architecture: str) -> TorchvisionNetwork:
    """Batch norms have seen something, so that their channels differ."""
    torch.manual_seed(0)
    network = TorchvisionNetwork.create(Model(weights="none"), architecture, ("a", "b", "c")).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1, generator=generator)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.2, generator=generator)
    return network


def pixels(rows: int = 2, side: int = 64) -> dict[str, torch.Tensor]:
    return {"pixels": torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(3))}


def labelled(inputs: dict[str, torch.Tensor], seed: int = 4) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """One batch with random labels."""
    rows = len(next(iter(inputs.values())))
    return [(inputs, torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(seed)))]
