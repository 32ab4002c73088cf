"""The compression report's plots. In: candidates as records. Out: one ``<svg>`` each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from orchestrator.page import COLORS, FAINT, figure, log_axis, svg
from orchestrator.records import TrialRecord

_FRONT, _CHOSEN, _PARENT, _LIMIT = COLORS[2], COLORS[1], COLORS[0], COLORS[5]
_UNITS = {"latency_ms": "latency of one input, ms", "size_mb": "size, MB"}
_MOST_BELOW = 0.25
"""Of the quality axis: what lost more than this is drawn at its foot, or the rest could not be told apart."""


def trade_off(
    trials: Sequence[TrialRecord], cost: str, before: Mapping[str, float], inside: Sequence[int], front: Sequence[int],
    winner: int, least_quality: float | None, most_cost: float | None,
) -> str:  # fmt: skip
    """Macro-F1 against a cost, on a logarithmic axis. ``inside``: candidates within the limits; ``front``: those that no
    other there beats. The uncompressed model is the origin of it all."""
    floor = before["macro_f1"] * (1 - _MOST_BELOW)
    with figure(5.2, 3.6) as (drawn, axes):
        known = [t for t in trials if cost in t.metrics and "macro_f1" in t.metrics]
        groups = [
            ([t for t in known if t.number not in inside], "none", FAINT, "outside of the limits"),
            ([t for t in known if t.number in inside and t.number not in front], FAINT, FAINT, "beaten"),
            ([t for t in known if t.number in front], _FRONT, _FRONT, "not beaten"),
        ]
        for some, face, edge, label in groups:
            if some:
                axes.scatter([t.metrics[cost] for t in some], [max(floor, t.metrics["macro_f1"]) for t in some], s=22,
                             facecolors=face, edgecolors=edge, linewidths=1, label=label)  # fmt: skip
        axes.scatter(
            [before[cost]], [before["macro_f1"]], marker="D", s=42, color=_PARENT, label="uncompressed", zorder=4
        )
        for trial in (t for t in known if t.number == winner):
            axes.scatter([trial.metrics[cost]], [trial.metrics["macro_f1"]], marker="*", s=150, color=_CHOSEN,
                         label="chosen", zorder=5)  # fmt: skip
        _limits(axes, least_quality, most_cost)
        log_axis(axes)
        axes.set(xlabel=_UNITS.get(cost, cost), ylabel="macro-F1 on validation")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
        return svg(drawn)


def _limits(axes: Axes, least_quality: float | None, most_cost: float | None) -> None:
    if least_quality is not None:
        axes.axhline(least_quality, color=_LIMIT, linestyle="--", linewidth=1)
    if most_cost is not None:
        axes.axvline(most_cost, color=_LIMIT, linestyle="--", linewidth=1)
