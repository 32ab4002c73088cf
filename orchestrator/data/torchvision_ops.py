"""Makes torchvision importable beside a torch it was not compiled for.

A CPU build of torch beside the package index's torchvision (built for CUDA) cannot load torchvision's compiled operators,
and then ``import torchvision`` fails on the first one it describes, and parts of transformers with it. Classification and
transforms need none of them, so we define the names; calling one still fails, as it should.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_NAMES = ("nms", "qnms")
_definitions: list[torch.library.Library] = []  # definitions live as long as their library object


@functools.cache
def ensure_torchvision() -> None:
    """Call before importing torchvision or a model of transformers. Does nothing where the compiled operators load."""
    if importlib.util.find_spec("torchvision") is None or _compiled_operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        library.define(name + _SCHEMA)
    _definitions.append(library)


def torchvision_is_patched() -> bool:
    """Whether ``ensure_torchvision`` had to define the operators."""
    return bool(_definitions)


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for file in (file for folder in folders for file in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd"))):
        try:
            torch.ops.load_library(str(file))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
