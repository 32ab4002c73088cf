"""A trained network given to OpenVINO, once on each machine.

In: a loaded model and inputs it is meant for. Out: the same model with another network, or none. What was made is kept in the
cache, below ``~/.cache/orchestrator``, so replicas that start later find it; so is that it could not be made. Knows neither
Ray nor HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch

from orchestrator.errors import CompressionFailed
from orchestrator.exporting.forms import FORMS, available
from orchestrator.models.backbones import load_network
from orchestrator.models.checkpoint import SavedModel, count_parameters
from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import RuntimeNetwork
from orchestrator.recipe_serving import Precision
from orchestrator.serving.contract import Input
from orchestrator.storage import MANIFEST, cache_root

log = logging.getLogger(__name__)
_LARGEST_PARAMETERS = 300_000_000
"""Beyond that, converting takes minutes and several times the weights' memory."""
_KEPT = 8
"""Those that were used last."""
_REASON = "reason.txt"
_EXAMPLES, _ROWS = 4, 8


def converted(model: SavedModel, folder: Path, wanted: Precision, inputs: Sequence[Input]) -> SavedModel | None:
    """The model of ``folder`` as OpenVINO computes it; None where it cannot, or would be no better: on a GPU, where the
    package is missing, or a part of it is computed by another runtime already."""
    form = f"openvino-{'bf16' if wanted != 'fp32' and has_bf16(model.device) else 'fp32'}"
    if model.device.type != "cpu" or available()[form] or not _is_torch(model):
        return None
    kept = cache_root() / "converted" / _key(folder, form)
    try:
        if not kept.exists():
            _convert(model, form, inputs, kept)
        if (kept / _REASON).exists():
            return None
        os.utime(kept)
        return replace(model, network=load_network(kept).eval(), precision="bf16" if "bf16" in form else "fp32")
    except Exception as error:  # noqa: BLE001  (whatever it is: torch computes the model as well)
        log.warning("OpenVINO cannot take %s, torch computes it: %s", folder, error)
        shutil.rmtree(kept, ignore_errors=True)
        return None


def _is_torch(model: SavedModel) -> bool:
    is_foreign = any(isinstance(module, RuntimeNetwork) for module in model.network.modules())
    return not is_foreign and count_parameters(model.network) <= _LARGEST_PARAMETERS


def _key(folder: Path, form: str) -> str:
    """Of the files of the model, and of what converts them."""
    from importlib.metadata import version

    digest = hashlib.sha256(f"{form} {version('openvino')} {version('torch')}".encode())
    digest.update((folder / MANIFEST).read_bytes())
    return digest.hexdigest()[:32]


def _convert(model: SavedModel, form: str, inputs: Sequence[Input], kept: Path) -> None:
    """Into ``kept``, which holds a reason instead where the network cannot be converted."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        made = Path(scratch) / kept.name
        made.mkdir()
        try:
            FORMS[form].write(model.network, _batches(model, inputs), made)
        except CompressionFailed as error:
            (made / _REASON).write_text(error.message, encoding="utf-8")
            log.warning("torch computes this model: %s", error.message)
        if not kept.exists():  # another replica may have been as quick
            made.rename(kept)
    _forget(kept.parent)


def _batches(model: SavedModel, inputs: Sequence[Input]) -> list[dict[str, torch.Tensor]]:
    """Examples to trace with."""
    encoded = model.encoder.encode(list(inputs)[: _EXAMPLES * _ROWS])
    table = pa.table(encoded.columns)
    return [model.encoder.collate(table.slice(start, _ROWS)) for start in range(0, table.num_rows, _ROWS)]


def _forget(cache: Path) -> None:
    folders = [(folder.stat().st_mtime, folder) for folder in cache.iterdir() if not folder.name.startswith("tmp")]
    for _, folder in sorted(folders, reverse=True)[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
