"""LoRA (Hu et al. 2021): small matrices beside the backbone's linear layers train, and the head; the rest stays.

In: a text network. Out: the same with adapters; and when it is saved, one without, whose weights hold what they learned.
Only here is peft known, which is an optional package.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.errors import RecipeError
from orchestrator.models.backbones import Network
from orchestrator.recipe import Lora
from orchestrator.training.optim import layer_depths


def adapt(network: Network, settings: Lora) -> None:
    """Put adapters beside the target layers; only these and the head (what follows the last layer) train from now on.

    Raises:
        RecipeError: peft is not installed, or the targets are no linear layers of this backbone.
    """
    peft, model = _peft(), network.get_submodule("model")
    head = {name for name, depth in layer_depths([n for n, _ in network.named_parameters()]).items() if depth == 0}
    linears = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.targets) if settings.targets else None,
    )  # fmt: skip
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise RecipeError(f"training.lora: {reason}", f"set training.lora.targets to some of {linears}") from None
    for name, adapted in _adapters(network).items():
        if not isinstance(adapted.get_base_layer(), nn.Linear):
            raise RecipeError(f"training.lora.targets: {name} is not linear", f"choose some of {linears}")
    for name, parameter in network.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
    network.train()


def merge(network: Network) -> None:
    """Add what the adapters learned to the layers beside them, and take them away: nothing of peft is left."""
    for name, adapted in _adapters(network).items():
        adapted.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, adapted.get_base_layer())
    del network.get_submodule("model").peft_config


def _adapters(network: Network) -> dict[str, Any]:
    layer = _peft().tuners.tuners_utils.BaseTunerLayer
    return {name: module for name, module in network.named_modules() if isinstance(module, layer)}


def _peft() -> Any:
    ensure_torchvision()
    try:
        import peft
    except ImportError:
        raise RecipeError(
            "training.lora needs the package peft, which is not installed", "pip install 'ray-orchestrator[lora]'"
        ) from None
    return peft
