"""Which parameters train: chosen by name.

In: a network and glob patterns. Out: the same network, in which the named parameters ask for no gradient; and the part of
its weights that a checkpoint has to hold.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from orchestrator.errors import RecipeError

_PREFIX = "model."
"""Of every parameter's name; users may leave it out."""


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match any pattern out of training; batch norms among them keep their statistics.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if _matches(name, pattern)]
        if not matched:
            raise RecipeError(f"training.freeze: {pattern!r} matches no parameter", _near(pattern, list(parameters)))
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RecipeError(
            f"training.freeze leaves nothing to train of {len(parameters)} parameters", "leave the head out of it"
        )
    network.train()  # which puts frozen batch norms aside


def trained_state(network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint has to hold of a state dict: all but the frozen parameters, which the backbone gives again."""
    frozen = _frozen(network)
    return {name: tensor for name, tensor in state.items() if name not in frozen}


def load_trained_state(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """What ``trained_state`` gave, into a network that is frozen in the same way."""
    network.load_state_dict(state | {name: parameter.detach() for name, parameter in _frozen(network).items()})


def frozen_sha256(network: nn.Module) -> str:
    """Of the frozen parameters; it tells whether a backbone is still the one that a run began with."""
    digest = hashlib.sha256()
    for name, parameter in _frozen(network).items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _frozen(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if not parameter.requires_grad}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(_PREFIX), pattern)


def _near(pattern: str, names: Sequence[str]) -> str:
    """The parameters and modules whose names look most like the pattern."""
    short = [name.removeprefix(_PREFIX) for name in names]
    modules = [".".join(name.split(".")[:depth]) + ".*" for name in short for depth in range(1, name.count(".") + 1)]
    candidates = list(dict.fromkeys([*modules, *short]))
    found = difflib.get_close_matches(pattern.removeprefix(_PREFIX), candidates, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(candidates[:3])} and others"
