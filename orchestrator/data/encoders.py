"""Encoders by kind, and reading back a saved one."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.data.combined import ENCODERS, combined
from orchestrator.data.encoder import PREPROCESS, Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.errors import IntegrityError


def load_encoder(folder: Path) -> Encoder:
    """What ``Encoder.save`` wrote. Raises IntegrityError when preprocess.json is missing or of an unknown kind."""
    try:
        settings = json.loads((folder / PREPROCESS).read_text(encoding="utf-8"))
        if "encoders" in settings:
            return combined([load_encoder(folder / ENCODERS / str(n)) for n in range(len(settings["encoders"]))])
        if settings["kind"] == "text":
            return TextEncoder(folder, settings["max_tokens"])
        if settings["kind"] == "image":
            return ImageEncoder(settings["image_size"], settings["mean"], settings["std"])
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder / PREPROCESS} cannot be read ({error})", "prepare or train again") from None
    raise IntegrityError(f"{folder / PREPROCESS} is of the unknown kind {settings['kind']!r}", "update this package")
