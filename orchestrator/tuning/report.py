"""The study's report: what was tried, what came out, and how far the winner is to be believed, on one HTML page.

In: the study's record, all of its trials and what was searched. Out: a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orchestrator.page import render
from orchestrator.recipe_tuning import Tuning
from orchestrator.records import StudyRecord, TrialRecord
from orchestrator.tuning import plots
from orchestrator.tuning.outcome import at_the_border, candidates, is_inside
from orchestrator.tuning.space import Space

_TEMPLATE = Path(__file__).with_name("report.html")
_MAX_ROWS = 200
_OPEN_UP_TO = 30
_COSTS = ("size_mb", "parameters", "latency_ms", "seconds")
_MAX_CHARACTERS = 160


def write_report(
    path: Path, study: StudyRecord, trials: Sequence[TrialRecord], tuning: Tuning, space: Space, unit: str = "epoch"
) -> None:
    """Render the page. ``unit``: what a trial can be stopped after, ``epoch`` or ``fold``."""
    values = {
        "study": study, "winner": study.winner, "default": study.default, "unit": unit,
        "gains": _gains(study), "fields": _fields(study, space), "metrics": _metrics(study),
        "borders": at_the_border(study.winner, space), "plots": _plots(study, trials, tuning, space, unit),
        "slices": [Markup(plots.slice_of(p, trials, study.objectives[0], study.winner.number)) for p in space.parameters],
        "front": [t for t in trials if t.number in study.pareto], "constraints": _constraints(study, trials, tuning),
        "failures": _failures(trials), "rows": _rows(study, trials), "trials": trials, "open_up_to": _OPEN_UP_TO,
        "paths": [parameter.path for parameter in space.parameters], "max_rows": _MAX_ROWS,
        "max_curves": plots.MAX_CURVES, "max_lines": plots.MAX_LINES,
    }  # fmt: skip
    filters = {"value": told, "field": lambda path: path.removeprefix("training."), "duration": _duration}
    path.write_text(render(_TEMPLATE, values, filters), encoding="utf-8")


def told(value: Any) -> str:
    """Numbers to three or four digits, paths by their last part."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    text = str(value)
    name = text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~", "./")) else text
    return name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 1]}…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _gains(study: StudyRecord) -> list[dict[str, Any]]:
    """Per objective: the winner's value, the default's, and by how much it is better."""
    found = []
    for objective, up in zip(study.objectives, study.maximized, strict=True):
        value = study.winner.metrics[objective]
        own = study.default.metrics.get(objective) if study.default else None
        gain = None if own is None else (value - own if up else own - value)
        found.append({"name": objective, "value": value, "own": own, "gain": gain, "up": up})
    return found


def _fields(study: StudyRecord, space: Space) -> list[tuple[str, Any, Any]]:
    own = study.default.parameters if study.default else {}
    return [(p.path, study.winner.parameters.get(p.path), own.get(p.path)) for p in space.parameters]


def _metrics(study: StudyRecord) -> list[tuple[str, float, float | None]]:
    own = study.default.metrics if study.default else {}
    return [(name, value, own.get(name)) for name, value in study.winner.metrics.items()]


def _plots(
    study: StudyRecord, trials: Sequence[TrialRecord], tuning: Tuning, space: Space, unit: str
) -> dict[str, Markup]:
    first, up, winner = study.objectives[0], study.maximized[0], study.winner.number
    default = study.default.metrics.get(first) if study.default else None
    drawn = {
        "history": plots.history(trials, first, winner, default, maximized=up),
        "parallel": plots.parallel(trials, space, first, winner, maximized=up),
    }
    if any(trial.history for trial in candidates(trials, [first])):
        drawn["curves"] = plots.learning_curves(trials, first, winner, maximized=up, unit=f"{unit}s")
    if study.importances:
        drawn["importances"] = plots.importances(study.importances)
    if len(study.objectives) > 1:
        drawn["pareto"] = plots.pareto(trials, study.objectives, study.pareto, winner, tuning.constraints)
    return {name: Markup(text) for name, text in drawn.items()}


def _constraints(study: StudyRecord, trials: Sequence[TrialRecord], tuning: Tuning) -> list[dict[str, Any]]:
    measured = [trial for trial in trials if trial.violations and trial.metrics]
    bounds = [(metric, word, limit) for metric, bound in tuning.constraints.items()
              for word, limit in (("at most", bound.at_most), ("at least", bound.at_least)) if limit is not None]  # fmt: skip
    return [
        {"metric": metric, "bound": f"{word} {told(limit)}", "value": study.winner.metrics.get(metric),
         "inside": sum(trial.violations[i] <= 0 for trial in measured), "of": len(measured)}
        for i, (metric, word, limit) in enumerate(bounds)
    ]  # fmt: skip


def _failures(trials: Sequence[TrialRecord]) -> list[tuple[str, str, list[int]]]:
    """Error, its kind, and the trials that ended so, the most frequent first."""
    found: dict[tuple[str, str], list[int]] = {}
    for trial in trials:
        if trial.state == "failed":
            line = (trial.error.splitlines() or ["no reason was given"])[0]
            found.setdefault((line[: 2 * _MAX_CHARACTERS], trial.kind.replace("_", " ")), []).append(trial.number)
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(error, kind, numbers) for (error, kind), numbers in ranked]


def _rows(study: StudyRecord, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Of the table: the best trials first, then those without a value."""
    first, sign = study.objectives[0], -1 if study.maximized[0] else 1
    ranked = sorted(trials, key=lambda t: (first not in t.metrics, sign * t.metrics.get(first, 0.0), t.number))
    costs = [name for name in _COSTS if any(name in t.metrics for t in trials) and name not in study.objectives]
    names = [*study.objectives, *costs]
    return [
        {"trial": t, "metrics": [(name, t.metrics.get(name)) for name in names], "is_inside": is_inside(t),
         "state": "stopped early" if t.state == "pruned" else t.state}
        for t in ranked[:_MAX_ROWS]
    ]  # fmt: skip
