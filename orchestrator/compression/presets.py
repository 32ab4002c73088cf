"""What is tried where a recipe leaves ``compression.space`` out: what architecture and installed runtimes allow. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.recipe_compression import Compression
from orchestrator.recipe_tuning import Dimension

_SHARES: dict[str, tuple[float, ...]] = {
    "layers": (0.17, 0.34, 0.5, 0.67, 1.0), "heads": (0.5, 1.0), "units": (0.25, 0.5, 1.0), "filters": (0.35, 0.5, 0.7, 1.0),
}  # fmt: skip
"""Few values of each, so that candidates share students. Low rank and zeros are left to who asks for them."""
_FORMS = ("openvino-int8", "onnxruntime-int8", "onnxruntime-int8-static", "openvino-bf16", "openvino-int8-weights",
          "openvino-fp32", "onnxruntime-fp32", "torch-bf16", "torch-fp32")  # fmt: skip
_MOST_FORMS = 6


def usual_space(methods: Mapping[str, str], forms: Mapping[str, str], settings: Compression) -> dict[str, Dimension]:
    """``methods``, ``forms``: name -> nothing, or why it cannot be had."""
    space: dict[str, Any] = {
        f"compression.{method}": {"choice": sorted({*shares, getattr(settings, method)})}
        for method, shares in _SHARES.items()
        if not methods.get(method)
    }
    here = [form for form in _FORMS if not forms[form]][:_MOST_FORMS]
    space["compression.form"] = {"choice": list(dict.fromkeys((*here, settings.form)))}
    return {path: Dimension.model_validate(dimension) for path, dimension in space.items()}
