"""The study report's plots. In: trials as records and what is searched. Out: one ``<svg>`` each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from orchestrator.page import CARD, COLORS, FAINT, figure, log_axis, short, svg
from orchestrator.recipe_tuning import Bound, Metric
from orchestrator.records import TrialRecord
from orchestrator.tuning.outcome import candidates, is_inside
from orchestrator.tuning.space import Parameter, Space

_TRIAL, _BEST, _WINNER, _FAILED = COLORS[0], COLORS[2], COLORS[1], COLORS[5]
_SHADES = LinearSegmentedColormap.from_list("scores", [COLORS[3], COLORS[0], COLORS[2]])
MAX_CURVES = 60
MAX_LINES = 200
_MAX_CHOICES = 8
_NOT_USED = "not used"
_MARK: dict[str, Any] = {
    "fontsize": 7, "va": "center", "zorder": 6,
    "bbox": {"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
}  # fmt: skip


def history(
    trials: Sequence[TrialRecord], objective: str, winner: int, default: float | None, *, maximized: bool
) -> str:
    """The objective of each trial by number, and the best so far. Stopped trials are hollow, failed ones stand below."""
    with figure(7.4, 3.0) as (drawn, axes):
        known = candidates(trials, [objective])
        for state, face, label in (("complete", _TRIAL, "complete"), ("pruned", "none", "stopped early")):
            some = [t for t in known if t.state == state]
            if some:
                axes.scatter([t.number for t in some], [t.metrics[objective] for t in some], s=18, facecolors=face,
                             edgecolors=_TRIAL, linewidths=1, label=label)  # fmt: skip
        order = sorted(known, key=lambda t: t.number)
        best = (np.maximum if maximized else np.minimum).accumulate([t.metrics[objective] for t in order])
        axes.step([t.number for t in order], best, where="post", color=_BEST, label="best so far")
        if default is not None:
            axes.axhline(default, color=FAINT, linestyle=":", label="the recipe's own values")
        failed = [t.number for t in trials if t.state == "failed"]
        if failed:
            axes.scatter(failed, [0.02] * len(failed), marker="x", s=20, color=_FAILED, label="failed",
                         transform=axes.get_xaxis_transform())  # fmt: skip
        _mark(axes, [t for t in known if t.number == winner], lambda t: (t.number, t.metrics[objective]))
        axes.set(xlabel="trial", ylabel=objective)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(drawn)


def _mark(axes: Axes, trials: Sequence[TrialRecord], place: Callable[[TrialRecord], tuple[float, float]]) -> None:
    for x, y in map(place, trials):
        axes.scatter([x], [y], marker="*", s=130, color=_WINNER, zorder=5, label="winner")


def learning_curves(trials: Sequence[TrialRecord], objective: str, winner: int, *, maximized: bool, unit: str) -> str:
    """The objective after each epoch; of many trials the best ones. A cross ends those that were stopped."""
    with figure() as (drawn, axes):
        told = [t for t in candidates(trials, [objective]) if t.history]
        sign = -1 if maximized else 1
        for trial in sorted(told, key=lambda t: sign * t.metrics[objective])[:MAX_CURVES]:
            epochs, values = zip(*_whole(trial, objective), strict=True)
            mine = trial.number == winner
            axes.plot(epochs, values, color=_WINNER if mine else _TRIAL, linewidth=2.2 if mine else 0.8,
                      alpha=1.0 if mine else 0.45, zorder=4 if mine else 2)  # fmt: skip
            if trial.state == "pruned":
                axes.scatter(epochs[-1:], values[-1:], marker="x", s=16, color=_TRIAL, linewidths=1)
        axes.set(xlabel=unit, ylabel=objective)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return svg(drawn)


def _whole(trial: TrialRecord, objective: str) -> list[tuple[int, float]]:
    """With its last epoch, which nobody had to decide after."""
    points = list(trial.history)
    if trial.state == "complete" and trial.epochs > points[-1][0]:
        points.append((trial.epochs, trial.metrics[objective]))
    return points


def importances(shares: Mapping[str, float]) -> str:
    """A bar per field, the largest on top."""
    with figure(3.6, 0.7 + 0.3 * len(shares)) as (drawn, axes):
        names = [_field(path) for path in shares][::-1]
        axes.barh(names, [100 * share for share in shares.values()][::-1], color=_TRIAL, height=0.6)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="share of what sets good trials apart, %")
        return svg(drawn)


def slice_of(parameter: Parameter, trials: Sequence[TrialRecord], objective: str, winner: int) -> str:
    """One field's values against the objective."""
    with figure(3.0, 2.3) as (drawn, axes):
        known = [t for t in candidates(trials, [objective]) if parameter.path in t.parameters]
        scale = _Scale(parameter)
        for state, face in (("complete", _TRIAL), ("pruned", "none")):
            some = [t for t in known if t.state == state]
            axes.scatter([scale.spread(t) for t in some], [t.metrics[objective] for t in some], s=14,
                         facecolors=face, edgecolors=_TRIAL, linewidths=0.9)  # fmt: skip
        _mark(axes, [t for t in known if t.number == winner], lambda t: (scale.spread(t), t.metrics[objective]))
        if scale.choices:
            axes.set_xticks(range(len(scale.choices)), [short(name) for name in scale.choices],
                            rotation=0 if len(scale.choices) < 4 else 30)  # fmt: skip
            axes.set_xlim(-0.6, len(scale.choices) - 0.4)
        elif scale.is_log:
            log_axis(axes)
        axes.set(xlabel=_field(parameter.path), ylabel=objective)
        return svg(drawn)


class _Scale:
    """Where a field's values stand on an axis."""

    def __init__(self, parameter: Parameter) -> None:
        self.path, dimension = parameter.path, parameter.dimension
        self.is_log = dimension.kind.startswith("log")
        self.values = dimension.values if dimension.kind == "choice" else ()
        self.choices = [_told(value) for value in self.values]
        self.low, self.high = (0.0, float(max(1, len(self.choices) - 1))) if self.choices else map(
            self._number, dimension.values[:2]
        )  # fmt: skip

    def _number(self, value: float) -> float:
        return math.log(value) if self.is_log else float(value)

    def spread(self, trial: TrialRecord) -> float:
        """Choices are spread a little, the same way each time."""
        value = trial.parameters[self.path]
        if not self.choices:
            return float(value)
        jitter = zlib.crc32(f"{trial.number} {self.path}".encode()) / 2**32 - 0.5
        return self.values.index(value) + 0.3 * jitter

    def share(self, value: object) -> float:
        """From 0, the low end, to 1."""
        at = float(self.values.index(value)) if self.choices else self._number(value)  # type: ignore[arg-type]
        return (at - self.low) / ((self.high - self.low) or 1.0)

    def ends(self) -> list[tuple[float, str]]:
        """Ticks."""
        if self.choices:
            step = max(1, len(self.choices) // _MAX_CHOICES)
            return [(self.share(v), short(_told(v))) for v in self.values[::step]]
        unscaled = math.exp if self.is_log else float
        return [(share, _told(unscaled(self.low + share * (self.high - self.low)))) for share in (0.0, 0.5, 1.0)]


def parallel(trials: Sequence[TrialRecord], space: Space, objective: str, winner: int, *, maximized: bool) -> str:
    """A line per trial through all fields to the objective, the better the greener; of many trials the best ones."""
    sign = 1 if maximized else -1
    known = sorted(candidates(trials, [objective]), key=lambda t: sign * t.metrics[objective])[-MAX_LINES:]
    scales = [_Scale(parameter) for parameter in space.parameters]
    values = [t.metrics[objective] for t in known]
    low, high = min(values), max(values)
    with figure(1.6 + 1.35 * (len(scales) + 1), 3.6) as (drawn, axes):
        lines, places = [], []
        for trial in known:
            heights = [scale.share(trial.parameters[scale.path]) if scale.path in trial.parameters else -0.12
                       for scale in scales]  # fmt: skip
            place = (trial.metrics[objective] - low) / ((high - low) or 1.0)
            lines.append(list(enumerate([*heights, place])))
            places.append(place if maximized else 1 - place)
        axes.add_collection(LineCollection(lines, colors=_SHADES(np.array(places)), linewidths=1, alpha=0.65))
        best = [line for trial, line in zip(known, lines, strict=True) if trial.number == winner]
        axes.add_collection(LineCollection(best, colors=_WINNER, linewidths=2.4))
        _axes_of(axes, scales, known, low, high)
        names = [_field(parameter.path) for parameter in space.parameters]
        axes.set_xticks(range(len(names) + 1), [short(name.replace("_", " ")) for name in [*names, objective]])
        axes.set(xlim=(-0.2, len(names) + 0.6), ylim=(-0.2, 1.08), yticks=[])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        return svg(drawn)


def _axes_of(axes: Axes, scales: Sequence[_Scale], known: Sequence[TrialRecord], low: float, high: float) -> None:
    ticks = [scale.ends() for scale in scales] + [
        [(0.0, _told(low)), (1.0, _told(high))] if high > low else [(0.0, _told(low))]
    ]
    for column, marks in enumerate(ticks):
        axes.plot([column, column], [0, 1], color=FAINT, linewidth=1)
        for height, text in marks:
            axes.text(column + 0.04, height, text, **_MARK)
        if column < len(scales) and any(scales[column].path not in t.parameters for t in known):
            axes.text(column + 0.04, -0.12, _NOT_USED, **_MARK)


def pareto(
    trials: Sequence[TrialRecord], objectives: Sequence[str], front: Sequence[int], winner: int,
    constraints: Mapping[Metric, Bound],
) -> str:  # fmt: skip
    """The first two objectives: the front coloured, what it beats grey, what breaks a constraint hollow."""
    with figure(4.6, 3.4) as (drawn, axes):
        known = candidates(trials, objectives)
        x, y = objectives[0], objectives[1]
        groups = [
            ([t for t in known if not is_inside(t)], "none", FAINT, "outside of a constraint"),
            ([t for t in known if is_inside(t) and t.number not in front], FAINT, FAINT, "beaten"),
            ([t for t in known if t.number in front], _BEST, _BEST, "front"),
        ]
        for some, face, edge, label in groups:
            if some:
                axes.scatter([t.metrics[x] for t in some], [t.metrics[y] for t in some], s=22, facecolors=face,
                             edgecolors=edge, linewidths=1, label=label)  # fmt: skip
        _mark(axes, [t for t in known if t.number == winner], lambda t: (t.metrics[x], t.metrics[y]))
        for metric, bound in constraints.items():
            for limit in (bound.at_most, bound.at_least):
                if limit is not None and metric in (x, y):
                    line = axes.axvline if metric == x else axes.axhline
                    line(limit, color=_FAILED, linestyle="--", linewidth=1)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
        return svg(drawn)


def _field(path: str) -> str:
    return path.removeprefix("training.")


def _told(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.rstrip("/").rpartition("/")[2] or text
