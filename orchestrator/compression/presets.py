"""What is tried where a recipe leaves ``compression.space`` out, and what is tried first. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.recipe_compression import Compression
from orchestrator.recipe_tuning import Dimension

FORM = "compression.form"
_RECOVERY = "compression.recovery."
_TEXTS = "compression.max_tokens"
"""What is cut off a text no training brings back: three quarters of 128 tokens turn 3% of the labels of reviews
(docs/log.md). It is left to the sampler."""
_SHARES: dict[str, tuple[float, ...]] = {
    "layers": (0.17, 0.34, 0.5, 0.67, 1.0), "heads": (0.34, 0.5, 1.0), "units": (0.25, 0.5, 1.0), "vocabulary": (0.15, 1.0),
    "filters": (0.35, 0.5, 0.7, 1.0),
}  # fmt: skip
"""Few values of each, so that candidates share students. Low rank and zeros are left to who asks for them."""
_FORMS = ("openvino-int8", "onnxruntime-int8", "onnxruntime-int8-static", "openvino-bf16", "openvino-int8-weights",
          "openvino-fp32", "onnxruntime-fp32", "torch-bf16", "torch-fp32")  # fmt: skip
_MOST_FORMS = 6
_LAYERS = "compression.layers"
_RUNGS = ((0.5, 1.0), (0.0, 1.0), (0.0, 0.75))
"""How much is left of what can be taken out, and of the layers, in candidates that show how far it can go. A layer is missed
most: half of the heads, or 85% of the vocabulary, can go from MiniLM without any recovery (docs/log.md)."""
_WHOLE = 3
"""One of so many candidates is the whole network, at most, in the first place."""
_FORMS_OF_A_STUDENT = 3
_SHORTEST = 16
"""Tokens that texts are cut to, at least."""
_LAST_TOKENS, _FEWEST_LAST = 8, 4
"""One token of so many reaches the last layer, and at least so many do."""


def usual_space(
    methods: Mapping[str, str], forms: Mapping[str, str], settings: Compression, max_tokens: int
) -> dict[str, Dimension]:
    """``methods``, ``forms``: name -> nothing, or why it cannot be had. ``max_tokens``: of the uncompressed model."""
    space: dict[str, Any] = {
        f"compression.{method}": {"choice": sorted({*shares, getattr(settings, method)})}
        for method, shares in _SHARES.items()
        if not methods.get(method, "unknown")
    }
    if not methods.get("max_tokens", "unknown") and max_tokens * 3 // 4 >= _SHORTEST:
        space["compression.max_tokens"] = {"choice": list(dict.fromkeys((max_tokens * 3 // 4, settings.max_tokens)))}
    if not methods.get("tokens", "unknown") and max_tokens // _LAST_TOKENS >= _FEWEST_LAST:
        space["compression.tokens"] = {"choice": list(dict.fromkeys((max_tokens // _LAST_TOKENS, settings.tokens)))}
    here = [form for form in _FORMS if not forms[form]][:_MOST_FORMS]
    space[FORM] = {"choice": list(dict.fromkeys((*here, settings.form)))}
    return {path: Dimension.model_validate(dimension) for path, dimension in space.items()}


def first_points(dimensions: Mapping[str, Dimension], own: dict[str, Any] | None, trials: int) -> list[dict[str, Any]]:
    """What no sampler has to find out: the network as it is in its forms, those of int8 first, and in the first of these a
    ladder with less and less left of everything, of the layers last.

    ``own``: the recipe's values, if all lie within their dimensions. ``trials``: how many there will be, not all of which
    are spent on the network as it is.
    """
    forms = dimensions[FORM].values if FORM in dimensions else ()
    small = [form for form in forms if form.endswith("int8")]
    plain = [{**own, FORM: form} for form in sorted(forms, key=lambda form: form not in small)] if own else []
    shares = {
        path: _falling(path, d) for path, d in dimensions.items() if not path.startswith((FORM, _RECOVERY, _TEXTS))
    }
    if not own or not shares or not all(shares.values()):
        return plain
    rungs = [
        {path: _left(values, layers if path == _LAYERS else others) for path, values in shares.items()}
        for others, layers in _RUNGS
    ]
    ladder = [own | rung | ({FORM: small[0]} if small else {}) for rung in rungs]
    points = plain[: max(1, trials // _WHOLE)] + ladder
    return [point for number, point in enumerate(points) if point not in points[:number]]


def others_of(point: dict[str, Any], forms: Sequence[str], ranking: Sequence[str]) -> list[dict[str, Any]]:
    """The same student in further forms: exporting and measuring it costs little beside training it. ``ranking``: forms that
    the whole network was tried in, the best first."""
    ranked = [*(form for form in ranking if form in forms), *(form for form in forms if form not in ranking)]
    further = [form for form in ranked if form != point.get(FORM)]
    return [point | {FORM: form} for form in further[: _FORMS_OF_A_STUDENT - 1]]


def _left(falling: Sequence[Any], share: float) -> Any:
    return falling[math.floor((1.0 - share) * (len(falling) - 1) + 0.5)]


def _falling(path: str, dimension: Dimension) -> list[Any]:
    """The choices from the one that leaves most; empty where that cannot be told."""
    if dimension.kind != "choice" or dimension.when:
        return []
    numbers = [value for value in dimension.values if isinstance(value, int | float) and not isinstance(value, bool)]
    others = [value for value in dimension.values if value is None]
    if len(numbers) + len(others) < len(dimension.values):
        return []
    return [*others, *sorted(numbers, reverse=not path.endswith("sparsity"))]
